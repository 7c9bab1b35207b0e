package said

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"runtime"
	"strconv"
	"strings"
	"syscall"

	"go.uber.org/zap"
)

// states are the SQLSTATEs that a person can do something about, in words. Others are told by their number alone.
var states = map[string]string{
	"28P01": "the password is refused",
	"28000": "the role may not connect",
	"3D000": "there is no such database",
	"3F000": "there is no such schema",
	"42P01": "there is no such table",
	"42703": "there is no such column",
	"42501": "the role lacks a right",
	"25006": "it is read-only",
	"53100": "its disk is full",
	"53200": "it is out of memory",
	"53300": "it has too many connections",
	"55P03": "a lock was not to be had in time",
	"57014": "a statement took too long",
	"57P01": "it shuts down",
	"57P02": "it has crashed",
	"57P03": "it starts, or shuts down",
}

// Sentence is an error in our own words, without anything of a client's: a log may say it.
type Sentence string

func (s Sentence) Error() string { return string(s) }

// Reason is the sentence.
func (s Sentence) Reason() string { return string(s) }

// Because is a sentence of ours about err.
func Because(sentence string, err error) error { return because{sentence, err} }

type because struct {
	sentence string
	err      error
}

func (b because) Error() string  { return b.sentence + ": " + b.err.Error() }
func (b because) Unwrap() error  { return b.err }
func (b because) Reason() string { return b.sentence + ": " + Reason(b.err) }

// Reason tells an error in words of a closed list. Its text is nowhere among them: Postgres quotes rows, Redis quotes arguments, and drivers quote
// addresses with what stands in them.
func Reason(err error) string {
	var (
		named interface{ Reason() string } // of our own, for this purpose
		state interface{ SQLState() string }
		errno syscall.Errno
		dns   *net.DNSError
		late  interface{ Timeout() bool }
	)
	if several, ok := err.(interface{ Unwrap() []error }); ok { //nolint:errorlint // what it is made of is asked in turn
		var all []string
		for _, e := range several.Unwrap() {
			all = append(all, Reason(e))
		}
		return strings.Join(all, ": ")
	}
	switch {
	case err == nil:
		return "none"
	case errors.As(err, &named):
		return named.Reason()
	case errors.As(err, &state):
		return sqlState(state.SQLState())
	case errors.Is(err, context.Canceled):
		return "given up"
	case errors.As(err, &dns):
		return "the name is not found"
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded):
		return "no answer in time"
	case errors.As(err, &errno):
		return errno.Error() // the system's words
	case errors.As(err, &late) && late.Timeout():
		return "no answer in time"
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return "the connection was closed"
	case errors.Is(err, net.ErrClosed):
		return "closed here"
	case tlsError(err):
		return "tls"
	}
	return "other"
}

// sqlState is code, if it is one, and what it means.
func sqlState(code string) string {
	if len(code) != 5 || strings.Trim(code, "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ") != "" {
		return "SQLSTATE of no known form"
	}
	if text := states[code]; text != "" {
		return text + " (SQLSTATE " + code + ")"
	}
	return "SQLSTATE " + code
}

// tlsError goes by the packages' prefixes: they have a dozen types.
func tlsError(err error) bool {
	for ; err != nil; err = errors.Unwrap(err) {
		if s := err.Error(); strings.HasPrefix(s, "tls: ") || strings.HasPrefix(s, "x509: ") || strings.HasPrefix(s, "remote error: tls: ") {
			return true
		}
	}
	return false
}

// Panic tells what was recovered, and where: what kind of error it is, and the functions that were under way. A panic's text and a stack's arguments may be
// what a client has sent.
func Panic(p any) []zap.Field {
	kind := "panic"
	if e, ok := p.(runtime.Error); ok {
		kind = "runtime error" // its text has no more than types and lengths, and types may be told by where it was
		if strings.Contains(e.Error(), "nil pointer") {
			kind = "nil pointer"
		} else if strings.Contains(e.Error(), "out of range") {
			kind = "out of range"
		}
	}
	pcs := make([]uintptr, 32)
	frames := runtime.CallersFrames(pcs[:runtime.Callers(2, pcs)])
	var at []string
	for {
		f, more := frames.Next()
		if f.Function == "runtime.gopanic" {
			at = nil // before it are those who recover
		}
		if name := f.Function; name != "" && !strings.HasPrefix(name, "runtime.") {
			at = append(at, name[strings.LastIndexByte(name, '/')+1:]+":"+strconv.Itoa(f.Line))
		}
		if !more {
			break
		}
	}
	fields := []zap.Field{zap.String("kind", kind), zap.Strings("stack", at)}
	if len(at) > 0 {
		fields = append(fields, zap.String("at", at[0]))
	}
	return fields
}
