package model

import (
	"encoding/binary"
	"slices"
)

// An operation is a letter of a program. What it does to a key, given what the key holds, is in apply.
const (
	opGet    = 'G'
	opSet    = 'S' // of a value of its own
	opSetTTL = 'P' // the same, with a TTL
	opDel    = 'D'
	opSwap   = 'X' // GETSET: evaluated by the proxy
	opSetNX  = 'N' // evaluated by the proxy
	opExpire = 'E' // evaluated by the proxy
	opAppend = 'A' // evaluated by the proxy: the value changes, the TTL does not
	opRun    = 'R' // GETSET as a script: load, run, mirror
	opTx     = 'T' // the same, as a transaction that cannot be queued again
	opMSet   = 'M' // of both keys
	opFlush  = 'F' // FLUSHALL
	opBack   = 'B' // not a command: the sidecar goes one phase back
)

// operation is a letter of a program with the keys it is about; lower case is the second key.
type operation struct {
	kind byte
	keys uint8
}

func newOperation(letter byte) operation {
	switch {
	case letter == opMSet || letter == opFlush:
		return operation{letter, bit(0) | bit(1)}
	case letter == opBack:
		return operation{letter, 0}
	case letter >= 'a':
		return operation{letter - 'a' + 'A', bit(1)}
	}
	return operation{letter, bit(0)}
}

// looks: the operation depends on what the key holds, if only for its reply.
func (o operation) looks() bool {
	return o.needs() || o.kind == opDel
}

// needs: what becomes of the key depends on what it holds.
func (o operation) needs() bool {
	return o.kind == opSwap || o.kind == opSetNX || o.kind == opExpire || o.kind == opAppend || o.kind == opRun || o.kind == opTx
}

// apply is what operation i does to a key that holds val until exp: what it answers, and what the key holds then. same: it
// changes nothing.
func (o operation) apply(i int, val, exp int8) (res, nval, nexp int8, same bool) {
	mine := int8(i + 1)
	switch o.kind {
	case opGet:
		return val, val, exp, true
	case opSet, opMSet:
		return 0, mine, 0, false
	case opSetTTL:
		return 0, mine, mine, false
	case opDel, opFlush:
		return 0, 0, 0, false
	case opSwap, opRun, opTx:
		return val, mine, 0, false
	case opAppend: // it answers a length
		return min(val, 1), mine, exp, false
	case opSetNX:
		if val == 0 {
			return 1, mine, 0, false
		}
	case opExpire:
		if val != 0 {
			return 1, val, mine, false
		}
	}
	return 0, val, exp, true
}

// history judges what clients were told of one key: whether any order of the operations explains it. Its states are sets of
// explanations, named by numbers. An explanation is one uint64:
//
//	bits 0-3    the value of the key
//	bits 4-7    the moment at which it ends, 0 never
//	bits 8+4i   operation i: 0 it has not taken effect yet, else 1 plus what it answers
//	bits 32-39  the operations that are pending: begun and not answered
//	bits 40-47  the moments that are over
//
// An operation that is never answered may take effect at any time, or never.
type history struct {
	ops   [maxOps]operation
	sets  [][]uint64
	reads []uint16 // of each set: the values that a read may answer now
	ids   map[string]int32
	memo  map[uint64]int32
}

const (
	evBegin  = iota
	evAnswer // with arg
	evForget // it has not taken effect, and will not: a read without an answer, a refusal
	evSet    // something has set the key to arg, or has not
	evPass   // moment arg is over
)

// noExplanation is the empty set.
const noExplanation = int32(0)

func newHistory(ops [maxOps]operation, val, exp int8) (h *history, start int32) {
	h = &history{ops: ops, ids: map[string]int32{}, memo: map[uint64]int32{}}
	h.intern(nil)
	return h, h.intern([]uint64{uint64(val) | uint64(exp)<<4})
}

func (h *history) intern(set []uint64) int32 {
	slices.Sort(set)
	set = slices.Compact(set)
	b := make([]byte, 0, 8*len(set))
	for _, c := range set {
		b = binary.LittleEndian.AppendUint64(b, c)
	}
	if id, ok := h.ids[string(b)]; ok {
		return id
	}
	id := int32(len(h.sets))
	reads := uint16(0)
	for _, c := range set {
		reads |= 1 << (c & 15)
	}
	h.sets = append(h.sets, set)
	h.reads = append(h.reads, reads)
	h.ids[string(b)] = id
	return id
}

// canRead tells whether a read that begins and ends now may answer v.
func (h *history) canRead(id int32, v int8) bool { return h.reads[id]>>uint(v)&1 == 1 }

func answerOf(c uint64, op int) uint64 { return c >> (8 + 4*uint(op)) & 15 }

// step is what becomes of the explanations when ev happens.
func (h *history) step(id int32, ev, op int, arg uint8) int32 {
	key := uint64(id)<<24 | uint64(ev)<<16 | uint64(op)<<8 | uint64(arg)
	if next, ok := h.memo[key]; ok {
		return next
	}
	var out []uint64
	for _, c := range h.sets[id] {
		done := c &^ (15<<(8+4*uint(op)) | 1<<(32+uint(op)))
		switch ev {
		case evBegin:
			out = append(out, c|1<<(32+uint(op)))
		case evAnswer:
			if answerOf(c, op) == uint64(arg)+1 {
				out = append(out, done)
			}
		case evForget:
			if h.ops[op].kind == opGet || answerOf(c, op) == 0 {
				out = append(out, done)
			}
		case evSet:
			out = append(out, c, c&^255|uint64(arg))
		case evPass:
			c |= 1 << (40 + uint(arg))
			if c>>4&15 == uint64(arg) {
				c &^= 255
			}
			out = append(out, c)
		}
	}
	next := h.intern(h.closure(out))
	h.memo[key] = next
	return next
}

// closure adds every explanation in which pending operations take effect now.
func (h *history) closure(set []uint64) []uint64 {
	seen := map[uint64]bool{}
	work := slices.Clone(set)
	var out []uint64
	for len(work) > 0 {
		c := work[len(work)-1]
		work = work[:len(work)-1]
		if seen[c] {
			continue
		}
		seen[c] = true
		out = append(out, c)
		for i := range maxOps {
			if c>>(32+uint(i))&1 == 0 || answerOf(c, i) != 0 {
				continue
			}
			res, val, exp, _ := h.ops[i].apply(i, int8(c&15), int8(c>>4&15)) //nolint:gosec // four bits
			if exp != 0 && c>>(40+uint(exp))&1 == 1 {
				val, exp = 0, 0
			}
			work = append(work, c&^255|uint64(val)|uint64(exp)<<4|uint64(res+1)<<(8+4*uint(i)))
		}
	}
	return out
}
