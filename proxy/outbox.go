package proxy

import "sync"

// outbox is what waits to be written to a socket: small pieces are gathered into one, large ones stay where they are. The zero value is
// empty.
type outbox struct {
	segs  []segment
	bytes int // of all
}

// segment is a run of bytes. pooled: its memory is a chunk's, and goes back when it is written.
type segment struct {
	b      []byte
	pooled *[chunkSize]byte
	open   bool // small pieces may be added
}

// chunkSize is how much of a large reply is passed on at once: large enough that the system calls do not count, small enough that
// a client that reads as fast as Redis writes costs no more than a few of them. A value of 64 KiB and what frames it fit, and are one write.
const chunkSize = 72 << 10

var chunks = sync.Pool{New: func() any { return new([chunkSize]byte) }}

// add copies b: behind what is in the last chunk, or into the buffer for small pieces, or into chunks.
func (o *outbox) add(b []byte) {
	if len(b) == 0 {
		return
	}
	n := len(o.segs)
	switch {
	case n > 0 && o.segs[n-1].open && len(o.segs[n-1].b)+len(b) <= keepOut:
		o.segs[n-1].b = append(o.segs[n-1].b, b...)
		o.bytes += len(b)
	case n == 0 && len(b) <= keepOut:
		o.segs = append(o.segs, segment{b: append([]byte(nil), b...), open: true})
		o.bytes += len(b)
	default:
		o.addChunks(b)
	}
}

// lend adds b without a copy; it must not change until it is written.
func (o *outbox) lend(b []byte) {
	o.bytes += len(b)
	o.segs = append(o.segs, segment{b: b})
}

// addChunks copies b into chunks.
func (o *outbox) addChunks(b []byte) {
	for len(b) > 0 {
		n := len(o.segs)
		if n == 0 || o.segs[n-1].pooled == nil || len(o.segs[n-1].b) == chunkSize {
			c := chunks.Get().(*[chunkSize]byte)
			o.segs = append(o.segs, segment{b: c[:0], pooled: c})
			n++
		}
		s := &o.segs[n-1]
		k := copy(s.pooled[len(s.b):], b)
		s.b = s.pooled[:len(s.b)+k]
		o.bytes += k
		b = b[k:]
	}
}

// take moves everything of from to the end of o.
func (o *outbox) take(from *outbox) {
	if len(from.segs) == 0 {
		return
	}
	o.segs = append(o.segs, from.segs...)
	o.bytes += from.bytes
	clear(from.segs)
	from.segs, from.bytes = from.segs[:0], 0
}

// swap empties o into old, whose memory it reuses: what old holds has been written.
func (o *outbox) swap(old *outbox) {
	var first []byte // the buffer for small pieces
	for _, s := range old.segs {
		if s.open && first == nil && cap(s.b) <= 2*keepOut { // append rounds up
			first = s.b[:0]
		}
		s.free()
	}
	clear(old.segs)
	next := outbox{segs: old.segs[:0]}
	if cap(next.segs) > 1024 {
		next.segs = nil
	}
	if first != nil {
		next.segs = append(next.segs, segment{b: first, open: true})
	}
	*old, *o = *o, next
}

// keepOut is the most that the buffer for small pieces holds, which is kept: thousands of clients may each have had a long pipeline once. What is more goes
// into chunks, which are everybody's. It equals what a connection is read by.
const keepOut = 16 << 10

// lendFrom bytes and more are written from where they are. Slots of that size are not recycled (keepSlotBytes), so that nobody changes them meanwhile.
const lendFrom = 32 << 10

func (s *segment) free() {
	if s.pooled != nil {
		chunks.Put(s.pooled)
		s.pooled = nil
	}
}

// drop gives the memory back unwritten.
func (o *outbox) drop() {
	for i := range o.segs {
		o.segs[i].free()
	}
	*o = outbox{}
}
