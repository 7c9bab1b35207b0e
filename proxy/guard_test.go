package proxy

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	cryptorand "crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/big"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/tidwall/redcon"
	"go.uber.org/goleak"

	"cacheproxy/internal/testenv"
)

// A guarded is a redcon server behind a guard. Its handler detaches at the
// first command; serve has the connection from then on.
type guarded struct {
	guard *guardListener
	addr  string
	held  atomic.Int64 // the largest buffer any session has had
}

// A guardSession answers one client's commands.
type guardSession interface {
	// answer appends the reply to cmd. It returns false to close.
	answer(out []byte, c *guardConn, cmd command) ([]byte, bool)
	close()
}

// guardServer starts a guarded redcon server until the test ends.
func guardServer(t testing.TB, ln net.Listener, lim limits, maxClients int, open func() guardSession) *guarded {
	t.Helper()
	before := goleak.IgnoreCurrent()
	g := &guarded{guard: newGuard(ln, lim, maxClients, func(err error, _ time.Duration) { t.Log(err) }), addr: ln.Addr().String()}
	var sessions sync.WaitGroup
	srv := redcon.NewServer("", func(conn redcon.Conn, first redcon.Command) {
		if n := len(conn.PeekPipeline()); n != 0 {
			t.Errorf("redcon holds %d further commands", n)
		}
		dc := conn.Detach()
		if n := len(dc.ReadPipeline()); n != 0 {
			t.Errorf("redcon has kept %d further commands", n)
		}
		sessions.Add(1)
		go func() {
			defer sessions.Done()
			g.serve(conn.NetConn().(*guardConn), command{raw: first.Raw, args: first.Args}, open())
		}()
	}, nil, nil)
	srv.SetIdleClose(200 * time.Millisecond) // must not outlive Detach
	done := make(chan error, 1)
	go func() { done <- srv.Serve(g.guard) }()
	t.Cleanup(func() {
		srv.Close()
		if err := <-done; err != nil {
			t.Error(err)
		}
		sessions.Wait()
		if n := g.guard.clients(); n != 0 {
			t.Errorf("%d clients are left", n)
		}
		if err := goleak.Find(before); err != nil {
			t.Error(err)
		}
	})
	return g
}

// serve is the session loop in its simplest form.
func (g *guarded) serve(c *guardConn, cmd command, s guardSession) {
	defer c.Close()
	defer s.close()
	var out []byte
	// The first command was read by redcon, so more is for us to ask.
	for more := c.pending(); ; {
		var ok bool
		out, ok = s.answer(out, c, cmd)
		for n := int64(len(c.in.buf)); n > g.held.Load(); {
			g.held.Store(n)
		}
		if !ok || !more {
			if _, err := c.Write(out); err != nil || !ok {
				return
			}
			out = out[:0]
		}
		var err error
		if cmd, more, err = c.next(); err != nil {
			var violation *protocolError
			if errors.As(err, &violation) {
				c.Write(append(out, violation.reply()...))
			}
			return
		}
	}
}

// guardEcho answers PING, ECHO and anything else with its first argument.
type guardEcho struct{}

func (guardEcho) close() {}
func (guardEcho) answer(out []byte, _ *guardConn, cmd command) ([]byte, bool) {
	if len(cmd.args) > 1 {
		return appendBulk(out, cmd.args[1][:min(len(cmd.args[1]), 20)]), true
	}
	return appendSimple(out, "PONG"), true
}

func openGuardEcho() guardSession { return guardEcho{} }

func guardTCP(t testing.TB) net.Listener {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return ln
}

func guardUnix(t testing.TB) net.Listener {
	t.Helper()
	dir, err := os.MkdirTemp("", "guard") // t.TempDir may be too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	ln, err := net.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	return ln
}

// talkTo sends the chunks, ends its half of the connection and returns all that
// comes back. A server that closes early may cut off what is sent, not what it
// has said.
func talkTo(t testing.TB, addr string, chunks ...[]byte) string {
	t.Helper()
	c := dialServer(t, addr)
	defer c.Close()
	go func() {
		for _, b := range chunks {
			if _, err := c.Write(b); err != nil {
				return
			}
		}
		c.Conn.(interface{ CloseWrite() error }).CloseWrite()
	}()
	got, err := io.ReadAll(c.Conn)
	if err != nil && !errors.Is(err, syscall.ECONNRESET) {
		t.Fatalf("%v after %.200q", err, got)
	}
	return string(got)
}

// What kills redcon, or keeps it busy for ever, must be an error like any
// other, whether it comes first or later, and trouble nobody else.
func TestGuardDeathPackets(t *testing.T) {
	g := guardServer(t, guardTCP(t), limits{}, 0, openGuardEcho)
	other := dialServer(t, g.addr)
	other.send([]byte("PING\r\n"))
	other.frame(t)
	for _, c := range []struct{ in, want string }{
		{"*1\r\n$9223372036854775807\r\n", "-ERR Protocol error: invalid bulk length\r\n"},
		{"*9223372036854775807\r\n", "-ERR Protocol error: invalid multibulk length\r\n"},
		{"*2000000000\r\n", ""},
		{"*1\r\n$-100\r\n", "-ERR Protocol error: invalid bulk length\r\n"},
		{"*x\r\n", "-ERR Protocol error: invalid multibulk length\r\n"},
		{"*1\r\nPING\r\n", "-ERR Protocol error: expected '$', got 'P'\r\n"},
		{"PING \"a\r\n", "-ERR Protocol error: unbalanced quotes in request\r\n"},
		{strings.Repeat("a", 1<<20), "-ERR Protocol error: too big inline request\r\n"},
		{"POST / HTTP/1.1\r\nHost: localhost\r\n\r\n", ""},
		{"*0\r\n*-1\r\n\r\n", ""},
		{"", ""},
	} {
		if got := talkTo(t, g.addr, []byte(c.in)); got != c.want {
			t.Errorf("%.40q: %q, want %q", c.in, got, c.want)
		}
		if got := talkTo(t, g.addr, []byte("PING\r\n*1\r\n$4\r\nPING\r\n"+c.in)); got != "+PONG\r\n+PONG\r\n"+c.want {
			t.Errorf("PING PING %.40q: %q", c.in, got)
		}
	}
	other.send([]byte("*2\r\n$4\r\nECHO\r\n$2\r\nhi\r\n"))
	if got := string(other.frame(t)); got != "$2\r\nhi\r\n" {
		t.Errorf("the other client gets %q", got)
	}
}

// redcon recurses once per partial read and keeps what it has read: a slow
// command overflows its stack. From the guard it gets one command in one piece.
func TestGuardDrip(t *testing.T) {
	g := guardServer(t, guardUnix(t), limits{}, 0, openGuardEcho)
	c := dialServer(t, g.addr)
	value := bytes.Repeat([]byte("v"), 20_000)
	for i := range 3 {
		for _, b := range singleBytes(appendCommand(nil, []byte("ECHO"), value[:20_000-i])) {
			c.send(b)
		}
		if got := string(c.frame(t)); got != string(appendBulk(nil, value[:20])) {
			t.Fatal(got)
		}
	}
	if held := g.held.Load(); held > 64<<10 {
		t.Errorf("%d bytes held", held)
	}
}

// An unaligned stream makes redcon hold all of it.
func TestGuardMemory(t *testing.T) {
	g := guardServer(t, guardUnix(t), limits{}, 0, openGuardEcho)
	c := dialServer(t, g.addr)
	one := appendCommand(nil, "ECHO", strings.Repeat("v", 997))
	chunk := bytes.Repeat(one, 4096)
	const total = 256 << 20
	sent := make(chan int, 1)
	go func() {
		n := 0
		for n*len(one) < total {
			if _, err := c.Write(chunk); err != nil {
				break
			}
			n += 4096
		}
		sent <- n
		c.Conn.(*net.UnixConn).CloseWrite()
	}()
	got, err := io.Copy(io.Discard, c.Conn)
	if err != nil {
		t.Fatal(err)
	}
	if want := int64(<-sent * len(appendBulk(nil, strings.Repeat("v", 20)))); got != want {
		t.Errorf("%d bytes of replies, want %d", got, want)
	}
	if held := g.held.Load(); held != keepBuffer {
		t.Errorf("%d bytes held", held)
	}
}

// The deadline that redcon set for the first command must not end the session,
// and a session's own deadline must not lose bytes.
func TestGuardDeadlines(t *testing.T) {
	a, b := net.Pipe()
	defer a.Close()
	g := newGuard(&scriptedListener{}, limits{}, 0, nil)
	c := g.wrap(b)
	defer c.Close()
	go a.Write([]byte("*1\r\n$4\r\nPING\r\n*2\r\n$4\r\nEC"))
	p := make([]byte, 4096)
	if n, err := c.Read(p); err != nil || string(p[:n]) != "*1\r\n$4\r\nPING\r\n" {
		t.Fatalf("%q, %v", p[:n], err)
	}
	c.SetDeadline(time.Now().Add(-time.Hour))
	c.SetWriteDeadline(time.Time{})
	go a.Write([]byte("HO\r\n$2\r\nhi\r\nPI"))
	cmd, more, err := c.next()
	if err != nil || more || string(cmd.raw) != "*2\r\n$4\r\nECHO\r\n$2\r\nhi\r\n" {
		t.Fatalf("%q, %v, %v", cmd.raw, more, err)
	}
	c.SetReadDeadline(time.Now().Add(-time.Hour))
	if _, _, err := c.next(); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatal(err)
	}
	c.SetReadDeadline(time.Time{})
	go a.Write([]byte("NG\r\nPING\r\n\r\n"))
	cmd, more, err = c.next()
	if err != nil || !more || string(cmd.args[0]) != "PING" || !c.pending() {
		t.Fatalf("%q, %v, %v", cmd.raw, more, err)
	}
	cmd, more, err = c.next()
	if err != nil || more || c.pending() {
		t.Fatalf("%q, %v, %v", cmd.raw, more, err)
	}
	if c.NetConn() != b {
		t.Error("not the connection below")
	}
}

// A client that does not finish its first command in time is closed, although
// redcon sets later deadlines; once it has, there is no deadline.
func TestGuardHandshake(t *testing.T) {
	g := newGuard(&scriptedListener{}, limits{handshake: time.Hour}, 0, nil)
	conn := &deadlineConn{}
	c := g.wrap(conn)
	first := conn.read
	if d := time.Until(first); d <= 0 || d > time.Hour {
		t.Fatal("no deadline", d)
	}
	for _, later := range []time.Time{{}, first.Add(time.Minute)} {
		if c.SetReadDeadline(later); conn.read != first {
			t.Errorf("put off from %v to %v", first, conn.read)
		}
	}
	if c.SetDeadline(first.Add(-time.Minute)); conn.read != first.Add(-time.Minute) {
		t.Error("cannot be earlier")
	}
	conn.Reader = strings.NewReader("PI")
	if _, err := c.Read(make([]byte, 100)); err != io.EOF || conn.read.IsZero() {
		t.Error(err, conn.read)
	}
	conn.Reader = strings.NewReader("NG\r\n")
	if n, err := c.Read(make([]byte, 100)); err != nil || n != 14 || !conn.read.IsZero() {
		t.Error(n, err, conn.read)
	}
	later := time.Now().Add(2 * time.Hour)
	if c.SetReadDeadline(later); conn.read != later {
		t.Error("the handshake is over")
	}

	s := guardServer(t, guardUnix(t), limits{handshake: 20 * time.Millisecond}, 0, openGuardEcho)
	slow := dialServer(t, s.addr)
	slow.send([]byte("PIN"))
	if b, err := io.ReadAll(slow.Conn); len(b) != 0 || err != nil && !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("%q, %v", b, err)
	}
}

// deadlineConn is a net.Conn that remembers its read deadline.
type deadlineConn struct {
	net.Conn
	io.Reader
	read time.Time
}

func (d *deadlineConn) Read(p []byte) (int, error)        { return d.Reader.Read(p) }
func (d *deadlineConn) SetReadDeadline(t time.Time) error { d.read = t; return nil }
func (d *deadlineConn) SetWriteDeadline(time.Time) error  { return nil }

// redcon may stay in front: then it gets one command after the other.
func TestGuardRead(t *testing.T) {
	in := "PING\r\n" + string(appendCommand(nil, "ECHO", strings.Repeat("v", 10_000))) + "*0\r\nPING\r\n*x\r\n"
	a, b := net.Pipe()
	c := newGuard(&scriptedListener{}, limits{}, 0, nil).wrap(b)
	last := make(chan string, 1)
	go func() {
		a.Write([]byte(in))
		said, _ := io.ReadAll(a)
		last <- string(said)
	}()
	if n, err := c.Read(nil); n != 0 || err != nil {
		t.Error(n, err)
	}
	rd := redcon.NewReader(c)
	for _, want := range []string{"PING", "ECHO", "PING"} {
		cmds, err := rd.ReadCommands()
		if err != nil || len(cmds) != 1 || string(cmds[0].Args[0]) != want {
			t.Fatalf("%q, %v", cmds, err)
		}
	}
	if _, err := rd.ReadCommands(); err != io.EOF {
		t.Error(err)
	}
	c.Close()
	if got := <-last; got != "-ERR Protocol error: invalid multibulk length\r\n" {
		t.Errorf("%q", got)
	}

	c = newGuard(&scriptedListener{}, limits{}, 0, nil).wrap(&deadlineConn{Reader: strings.NewReader("PING\r\n")})
	c.Read(make([]byte, 1))
	if _, _, err := c.next(); err != errPartial {
		t.Errorf("the rest of the first command is lost: %v", err)
	}
	c = newGuard(&scriptedListener{}, limits{}, 0, nil).wrap(&deadlineConn{Reader: idleReader{}})
	if _, _, err := c.next(); err != io.ErrNoProgress {
		t.Errorf("a reader without progress: %v", err)
	}
	// Bytes that come with an error count.
	c = newGuard(&scriptedListener{}, limits{}, 0, nil).wrap(&deadlineConn{Reader: finalReader{strings.NewReader("PING\r\nPI")}})
	if cmd, more, err := c.next(); err != nil || more || string(cmd.args[0]) != "PING" {
		t.Error(cmd, more, err)
	}
	if _, _, err := c.next(); err != io.EOF {
		t.Error(err)
	}
}

// idleReader reads nothing.
type idleReader struct{}

func (idleReader) Read([]byte) (int, error) { return 0, nil }

// finalReader returns all of its bytes together with io.EOF.
type finalReader struct{ r io.Reader }

func (f finalReader) Read(p []byte) (int, error) {
	n, _ := f.r.Read(p)
	return n, io.EOF
}

// scriptedListener is a listener whose Accept does what the steps say, then waits for
// Close.
type scriptedListener struct {
	steps  []func() (net.Conn, error)
	calls  atomic.Int64
	closed chan struct{}
}

func (s *scriptedListener) Accept() (net.Conn, error) {
	if i := int(s.calls.Add(1)) - 1; i < len(s.steps) {
		return s.steps[i]()
	}
	<-s.closed
	return nil, net.ErrClosed
}
func (s *scriptedListener) Close() error   { close(s.closed); return nil }
func (s *scriptedListener) Addr() net.Addr { return &net.UnixAddr{Name: "scripted", Net: "unix"} }

// Without file descriptors Accept fails at once and for ever; it must not spin.
func TestGuardBackoff(t *testing.T) {
	_, conn := net.Pipe()
	defer conn.Close()
	emfile := func() (net.Conn, error) {
		return nil, &net.OpError{Op: "accept", Err: os.NewSyscallError("accept4", syscall.EMFILE)}
	}
	ln := &scriptedListener{steps: []func() (net.Conn, error){emfile, emfile, emfile, func() (net.Conn, error) { return conn, nil }}, closed: make(chan struct{})}
	var said []string
	g := newGuard(ln, limits{}, 0, func(err error, again time.Duration) { said = append(said, fmt.Sprintf("%v, again in %v", err, again)) })
	c, err := g.Accept()
	if err != nil || g.clients() != 1 {
		t.Fatal(err, g.clients())
	}
	c.Close()
	c.Close()
	if g.clients() != 0 {
		t.Errorf("%d clients", g.clients())
	}
	if len(said) != 3 || !strings.HasSuffix(said[0], "again in 5ms") || !strings.HasSuffix(said[2], "again in 20ms") {
		t.Errorf("%q", said)
	}

	// Close ends the wait of a back-off, however long.
	failing := &scriptedListener{closed: make(chan struct{}), steps: slices.Repeat([]func() (net.Conn, error){emfile}, 1000)}
	waiting := make(chan struct{}, 1000)
	g = newGuard(failing, limits{}, 0, func(error, time.Duration) { waiting <- struct{}{} })
	done := make(chan error, 1)
	go func() { _, err := g.Accept(); done <- err }()
	<-waiting
	g.Close()
	if err := <-done; !errors.Is(err, net.ErrClosed) {
		t.Error(err)
	}
	if n := failing.calls.Load(); n > 20 {
		t.Errorf("%d calls of Accept", n)
	}
}

func TestGuardMaxClients(t *testing.T) {
	g := guardServer(t, guardTCP(t), limits{}, 2, openGuardEcho)
	ping := func() *serverConn {
		c := dialServer(t, g.addr)
		c.send([]byte("PING\r\n"))
		if got := string(c.frame(t)); got != "+PONG\r\n" {
			t.Fatal(got)
		}
		return c
	}
	a, b := ping(), ping()
	if got := talkTo(t, g.addr); got != replyMaxClients {
		t.Errorf("%q", got)
	}
	if g.guard.refused() != 1 || g.guard.clients() != 2 {
		t.Error(g.guard.refused(), g.guard.clients())
	}
	b.Conn.(*net.TCPConn).CloseWrite()
	io.ReadAll(b.Conn) // until the server has closed it
	ping()
	a.send([]byte("PING\r\n"))
	a.frame(t)
}

// A guard may wrap a TLS listener. A client that is refused gets no words: they
// would have to wait for its handshake.
func TestGuardTLS(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), cryptorand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), DNSNames: []string{"localhost"}}
	der, err := x509.CreateCertificate(cryptorand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(cert)
	ln := tls.NewListener(guardTCP(t), &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}})
	g := guardServer(t, ln, limits{}, 1, openGuardEcho)
	conn, err := tls.Dial("tcp", g.addr, &tls.Config{RootCAs: roots, ServerName: "localhost"})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(time.Minute))
	c := &serverConn{Conn: conn}
	c.send([]byte("PING\r\nPING\r\n"))
	if a, b := string(c.frame(t)), string(c.frame(t)); a != "+PONG\r\n" || b != a {
		t.Error(a, b)
	}
	if got := talkTo(t, g.addr); got != "" {
		t.Errorf("%q", got)
	}
}

// A guardForwarder sends the canonical form of each command to a Redis, and its
// reply back.
type guardForwarder struct {
	up *serverConn
}

func (f *guardForwarder) close() { f.up.Close() }
func (f *guardForwarder) answer(out []byte, c *guardConn, cmd command) ([]byte, bool) {
	f.up.send(cmd.raw)
	frame, err := f.up.next()
	if err != nil {
		return out, false
	}
	name := strings.ToLower(string(cmd.args[0]))
	if name == "auth" && !isError(frame) {
		c.setAuthenticated(true)
	}
	return append(out, frame...), name != "quit"
}

// guardCorpus returns inputs of every kind: valid, broken, and valid ones with
// a few bytes changed.
func guardCorpus() [][]byte {
	valid := []string{
		"PING\r\n",
		"*1\r\n$4\r\nPING\r\n",
		"*2\r\n$4\r\nECHO\r\n$5\r\nthere\r\n", // no command's name: HELLO would tell an id
		"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$5\r\nv\x00\r\n*\r\n*2\r\n$3\r\nGET\r\n$1\r\nk\r\n",
		"*4\r\n$4\r\nMGET\r\n$1\r\nk\r\n$0\r\n\r\n$4\r\nnone\r\n",
		"SET k \"a\\x00\\n\"\r\nGET k\nGET 'k'\r\n",
		"*3\r\n$5\r\nRPUSH\r\n$1\r\nl\r\n$1\r\na\r\n*4\r\n$6\r\nLRANGE\r\n$1\r\nl\r\n$1\r\n0\r\n$2\r\n-1\r\n",
		"*1\r\n$4\r\nQUIT\r\nPING\r\n",
		"NOSUCH a b\r\n*1\r\n$3\r\nGET\r\n",
		"*2\r\n$4\r\nECHO\r\n$40000\r\n" + strings.Repeat("x", 40000) + "\r\n",
		"ECHO \"" + strings.Repeat("y", 30000) + "\"\r\n",
		"*1\r\n$0\r\n\r\n",
		strings.Repeat("*2\r\n$4\r\nECHO\r\n$3\r\nabc\r\n", 50),
		"*11\r\n$3\r\nDEL\r\n" + strings.Repeat("$2\r\nkk\r\n", 10),
	}
	var corpus [][]byte
	for _, v := range valid {
		corpus = append(corpus, []byte(v))
	}
	for _, c := range scanCases {
		// Redis compares the length of a line with what it happens to have
		// read, and forgets replies that it owes to a client it suspects.
		if len(c.in) > maxLine && !strings.HasSuffix(c.in, "\n") || c.name == "HTTP header" {
			continue
		}
		if len(c.in) <= maxLine {
			corpus = append(corpus, []byte(c.in))
			corpus = append(corpus, []byte(c.in+"PING\r\n"))
		}
		if !strings.Contains(c.name, "HTTP") && len(c.in) < 1000 {
			for _, v := range valid[:4] {
				corpus = append(corpus, []byte(v+c.in+v))
			}
		}
	}
	r := rand.New(rand.NewPCG(7, 0))
	odd := []byte("*$+-0123456789 \r\n\x00\"'\\x\tP\xff")
	for i := range 400 {
		b := []byte(valid[i%len(valid)])
		for range 1 + r.IntN(3) {
			at := r.IntN(min(len(b), 60))
			switch c := odd[r.IntN(len(odd))]; r.IntN(3) {
			case 0:
				b[at] = c
			case 1:
				b = slices.Insert(b, at, c)
			default:
				b = slices.Delete(b, at, at+1)
			}
		}
		corpus = append(corpus, append(b, "PING\r\n"...))
	}
	return corpus
}

// What a client of the guard hears is what a client of Redis hears, to the byte.
func TestGuardOracle(t *testing.T) {
	r := testenv.Redis(t)
	g := guardServer(t, guardUnix(t), limits{}, 0, func() guardSession { return &guardForwarder{up: dialServer(t, r.Addr())} })
	rnd := rand.New(rand.NewPCG(1, 0))
	compare := func(b []byte) {
		want := talkTo(t, r.Addr(), b)
		talkTo(t, r.Addr(), []byte("FLUSHALL\r\n"))
		if got := talkTo(t, g.addr, b); got != want {
			t.Errorf("%.300q:\n%.300q, Redis answers\n%.300q", b, got, want)
		}
		talkTo(t, r.Addr(), []byte("FLUSHALL\r\n"))
		if got := talkTo(t, g.addr, randomPieces(b, rnd)...); got != want && len(b) < 2000 {
			t.Errorf("%.300q in pieces:\n%.300q, Redis answers\n%.300q", b, got, want)
		}
		talkTo(t, r.Addr(), []byte("FLUSHALL\r\n"))
	}
	corpus := guardCorpus()
	if len(corpus) < 500 {
		t.Fatalf("only %d inputs", len(corpus))
	}
	for _, b := range corpus {
		compare(b)
	}
}

// The limits before AUTH are Redis's too, and AUTH in a pipeline lifts them for
// what comes behind it.
func TestGuardOracleAuth(t *testing.T) {
	r := testenv.Redis(t, "--requirepass", "secret")
	g := guardServer(t, guardUnix(t), limits{auth: true}, 0, func() guardSession { return &guardForwarder{up: dialServer(t, r.Addr())} })
	dels := func(n int) string {
		return fmt.Sprintf("*%d\r\n$3\r\nDEL\r\n%s", n, strings.Repeat("$1\r\nk\r\n", n-1))
	}
	echo := func(n int) string { return string(appendCommand(nil, "ECHO", strings.Repeat("a", n))) }
	for _, in := range []string{
		"PING\r\n", dels(10), dels(11), echo(16384), echo(16385), "*2147483648\r\n", "*1\r\n$536870913\r\n",
		"AUTH secret\r\nPING\r\n" + dels(11) + echo(16385),
		"AUTH wrong\r\nPING\r\n" + dels(11),
		"AUTH wrong\r\n" + echo(16385) + "PING\r\n",
		"PING\r\nAUTH secret\r\n" + echo(20000) + "*x\r\n",
	} {
		want := talkTo(t, r.Addr(), []byte(in))
		if got := talkTo(t, g.addr, []byte(in)); got != want {
			t.Errorf("%.100q:\n%.300q, Redis answers\n%.300q", in, got, want)
		}
	}
}

// chunkReader is a reader that returns one chunk a time.
type chunkReader [][]byte

func (c *chunkReader) Read(p []byte) (int, error) {
	if len(*c) == 0 {
		return 0, io.EOF
	}
	n := copy(p, (*c)[0])
	if (*c)[0] = (*c)[0][n:]; len((*c)[0]) == 0 {
		*c = (*c)[1:]
	}
	return n, nil
}

// FuzzGuard holds that a stream means the same however it is split, that what
// is forwarded means what was sent, and that redcon reads it as we do.
func FuzzGuard(f *testing.F) {
	for i, c := range scanCases {
		if len(c.in) < 200 {
			f.Add([]byte(c.in), uint64(i))
		}
	}
	for i, b := range guardCorpus() {
		if len(b) < 200 && i%7 == 0 {
			f.Add(b, uint64(i))
		}
	}
	lim := limits{bulk: 1000, args: 50, buffer: 4000}
	f.Fuzz(func(t *testing.T, in []byte, seed uint64) {
		r := rand.New(rand.NewPCG(seed, 0))
		want := feedScanner(t, newScanner(lim), in)
		chunks := randomPieces(bytes.Clone(in), r)
		if got := feedScanner(t, newScanner(lim), chunks...); got != want {
			t.Fatalf("in one piece:\n%s\nin pieces:\n%s", want, got)
		}

		// Through the connection, with the first command read by redcon.
		var got strings.Builder
		var raw []byte
		chunks = randomPieces(bytes.Clone(in), r)
		c := newGuard(&scriptedListener{}, lim, 0, nil).wrap(&deadlineConn{Conn: discardConn{}, Reader: (*chunkReader)(&chunks)})
		cmds, err := redcon.NewReader(c).ReadCommands()
		if err == nil {
			if len(cmds) != 1 {
				t.Fatalf("redcon has %d commands", len(cmds))
			}
			raw = append(raw, cmds[0].Raw...)
			fmt.Fprintf(&got, "%q\n", cmds[0].Args)
			for {
				cmd, more, err := c.next()
				if err != nil {
					var violation *protocolError
					if errors.As(err, &violation) {
						fmt.Fprintf(&got, "! %s", violation.Error())
					} else if err != io.EOF {
						t.Fatal(err)
					}
					break
				}
				raw = append(raw, cmd.raw...)
				fmt.Fprintf(&got, "%q\n", cmd.args)
				if more != c.pending() {
					t.Fatal("more and pending differ")
				}
			}
			if got.String() != want {
				t.Fatalf("the scanner:\n%s\nthe connection:\n%s", want, got.String())
			}
		} else if err != io.EOF {
			t.Fatalf("redcon does not read what the guard let through: %v", err)
		}

		commands := want
		if i := strings.LastIndex("\n"+want, "\n! "); i >= 0 {
			commands = want[:i]
		}
		// An inline argument may exceed the limits above, as its line does not.
		if again := feedScanner(t, newScanner(limits{}), raw); len(raw) > 0 && again != commands {
			t.Fatalf("sent:\n%s\nforwarded:\n%s", commands, again)
		}
	})
}

// discardConn is a net.Conn that forgets what is written.
type discardConn struct{ net.Conn }

func (discardConn) Write(p []byte) (int, error) { return len(p), nil }

func BenchmarkGuardConn(b *testing.B) {
	in := []byte(strings.Repeat("*2\r\n$3\r\nGET\r\n$16\r\nanalysis:123456\n\r\n", 16))
	src := &endlessReader{in: in}
	c := newGuard(&scriptedListener{}, limits{}, 0, nil).wrap(&deadlineConn{Reader: src})
	b.ReportAllocs()
	for b.Loop() {
		for range 16 {
			if _, _, err := c.next(); err != nil {
				b.Fatal(err)
			}
		}
	}
}

// endlessReader returns the same bytes at each read.
type endlessReader struct{ in []byte }

func (e *endlessReader) Read(p []byte) (int, error) { return copy(p, e.in), nil }
