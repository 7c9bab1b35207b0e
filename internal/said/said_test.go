package said

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// told are the lines that a log has had, with their fields.
func told(logs *observer.ObservedLogs) (out []string) {
	for _, e := range logs.TakeAll() {
		line := e.Level.String() + " " + e.Message
		for _, f := range e.Context {
			switch f.Type {
			case zapcore.StringType:
				line += " " + f.Key + "=" + f.String
			case zapcore.Int64Type:
				line += " " + f.Key + "=" + strconv.FormatInt(f.Integer, 10)
			default:
				line += fmt.Sprintf(" %s=%v", f.Key, f.Interface)
			}
		}
		out = append(out, line)
	}
	return out
}

func newLog(each ...string) (*zap.Logger, *observer.ObservedLogs) {
	c, logs := observer.New(zap.InfoLevel)
	return zap.New(Core(c, each...)), logs
}

func expect(t *testing.T, logs *observer.ObservedLogs, want ...string) {
	t.Helper()
	if got := told(logs); strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("told:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// The first is told at once, what follows is counted and told by the minute, and after a quiet minute the next is a first again.
func TestRepeatedLinesAreCounted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log, logs := newLog()
		down := func(n int64) { log.Warn("down", zap.String("reason", "refused"), zap.Int64("n", n)) }
		down(1)
		down(2)
		log.Warn("down", zap.String("reason", "timeout")) // another cause
		log.Debug("down")                                 // below the level
		expect(t, logs, "warn down reason=refused n=1", "warn down reason=timeout")
		time.Sleep(30 * time.Second)
		down(3)
		expect(t, logs)
		time.Sleep(31 * time.Second)
		synctest.Wait()
		expect(t, logs, "warn down reason=refused n=3 repeated=2")
		down(4)
		expect(t, logs) // it goes on
		time.Sleep(time.Minute)
		synctest.Wait()
		expect(t, logs, "warn down reason=refused n=4 repeated=1")
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		down(5)
		down(6)
		expect(t, logs, "warn down reason=refused n=5")
		_ = log.Sync()
		expect(t, logs, "warn down reason=refused n=6 repeated=1")
	})
}

func TestEventsOfTheirOwn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log, logs := newLog("reloaded")
		log.Info("reloaded")
		log.Info("reloaded")
		log = log.With(zap.String("of", "a"))
		log.Info("other")
		log.Info("other")
		log.With(zap.String("and", "b")).Info("other")
		expect(t, logs, "info reloaded", "info reloaded", "info other of=a", "info other of=a and=b")
		_ = log.Sync()
	})
}

// However many causes there are, what is remembered is bounded, and none is lost from the count.
func TestCausesAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log, logs := newLog()
		for i := range 1000 {
			log.Warn("many", zap.String("reason", strconv.Itoa(i)))
		}
		if n := len(told(logs)); n != perMessage+1 {
			t.Errorf("%d lines", n)
		}
		_ = log.Sync()
		expect(t, logs, fmt.Sprintf("warn many reason=999 repeated=%d", 1000-perMessage-1))
		for i := range 1000 {
			log.Warn("message " + strconv.Itoa(i))
		}
		if n := len(told(logs)); n != maxCauses+1 {
			t.Errorf("%d lines", n)
		}
		_ = log.Sync()
		if n := logs.Len(); n != 1 {
			t.Errorf("%d lines", n)
		}
	})
}

const secret = "user:4711"

type pgError struct{ code string }

func (e pgError) Error() string    { return "Key (key)=(" + secret + ") already exists" }
func (e pgError) SQLState() string { return e.code }

func TestErrorsAreToldByTheirReason(t *testing.T) {
	for _, c := range []struct {
		err  error
		want string
	}{
		{nil, "none"},
		{errors.New(secret), "other"},
		{fmt.Errorf(secret+": %w", pgError{"23505"}), "SQLSTATE 23505"},
		{pgError{"28P01"}, "the password is refused (SQLSTATE 28P01)"},
		{pgError{secret}, "SQLSTATE of no known form"},
		{fmt.Errorf(secret+": %w", context.DeadlineExceeded), "no answer in time"},
		{context.Canceled, "given up"},
		{&net.OpError{Op: "dial", Net: secret, Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)}, "connection refused"},
		{&os.PathError{Op: "open", Path: secret, Err: syscall.ENOENT}, "no such file or directory"},
		{&net.DNSError{Name: secret, Err: "no such host"}, "the name is not found"},
		{&net.OpError{Op: "read", Err: os.ErrDeadlineExceeded}, "no answer in time"},
		{fmt.Errorf(secret+" %w", io.ErrUnexpectedEOF), "the connection was closed"},
		{net.ErrClosed, "closed here"},
		{errors.New("tls: first record " + secret), "tls"},
		{Because("the file", fmt.Errorf("%s: %w", secret, syscall.EACCES)), "the file: permission denied"},
		{errors.Join(Sentence("it cannot be registered"), pgError{"53300"}), "it cannot be registered: it has too many connections (SQLSTATE 53300)"},
	} {
		if got := Reason(c.err); got != c.want {
			t.Errorf("%v: %q, want %q", c.err, got, c.want)
		}
	}
	log, logs := newLog()
	log.With(zap.Error(errors.New(secret))).Warn("with", zap.Error(pgError{"23505"}))
	expect(t, logs, "warn with reason=other reason=SQLSTATE 23505")
	_ = log.Sync()
}

func TestPanicsAreToldByTheirPlace(t *testing.T) {
	log, logs := newLog()
	contained := func(f func()) {
		defer func() { log.Error("it panicked", Panic(recover())...) }()
		f()
	}
	contained(func() { panic(secret) })
	contained(func() { func() map[string]int { return nil }()[secret] = 1 })
	contained(func() { _ = secret[len(os.Args)+100:] })
	contained(func() { var p *pgError; _ = p.code })
	got := strings.Join(told(logs), "\n")
	for _, want := range []string{"kind=panic", "kind=runtime error", "kind=out of range", "kind=nil pointer", "at=said.TestPanicsAreToldByTheirPlace.func"} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in\n%s", want, got)
		}
	}
	if strings.Contains(got, secret) {
		t.Errorf("it tells what was said:\n%s", got)
	}
	_ = log.Sync()
}
