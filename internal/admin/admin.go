// Package admin answers HTTP: health and statistics on the observe address, which only tells, and reload, phases and
// profiles on the admin address, which can change things and is loopback only.
//
// Read observe.go for the first, control.go for the second, and Serve here for how long a server lives.
package admin

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	stdlog "log"
	"net"
	"net/http"
	"time"

	"go.uber.org/zap"
)

const (
	// headerTime is how long a client may take to say what it wants; no client on these addresses is far away.
	headerTime = 5 * time.Second
	// profileTime is the longest profile that can be asked for; every answer must be written within it.
	profileTime = 60 * time.Second
	// idleTime keeps the connection of a Prometheus that comes every fifteen or thirty seconds.
	idleTime = 90 * time.Second
	// farewell is how long requests under way may take when the process stops. A profile is cut off.
	farewell = time.Second
)

// Serve answers HTTP on ln, which it owns, until ctx ends. Then it lets the requests under way finish for a moment,
// and returns nil.
func Serve(ctx context.Context, ln net.Listener, h http.Handler, log *zap.Logger) error {
	requests, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	srv := &http.Server{
		Handler:           h,
		ReadHeaderTimeout: headerTime,
		ReadTimeout:       2 * headerTime,
		WriteTimeout:      profileTime + headerTime,
		IdleTimeout:       idleTime,
		MaxHeaderBytes:    16 << 10,
		BaseContext:       func(net.Listener) context.Context { return requests },
		ErrorLog:          stdlog.New(complaints{log}, "", 0),
	}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(ln) }()
	select {
	case err := <-served:
		return fmt.Errorf("serve http: %w", err)
	case <-ctx.Done():
	}
	bounded, stop := context.WithTimeout(requests, farewell)
	defer stop()
	err := srv.Shutdown(bounded)
	cancel() // a profile under way ends here
	if err != nil {
		err = srv.Close()
	}
	<-served //nolint:errcheck // ErrServerClosed
	if err != nil && !errors.Is(err, net.ErrClosed) {
		log.Warn("an http server did not stop cleanly", zap.Error(err))
	}
	return nil
}

// complaints is where net/http writes what goes wrong with a connection. Its texts quote what somebody has sent.
type complaints struct{ log *zap.Logger }

func (c complaints) Write(b []byte) (int, error) {
	if bytes.HasPrefix(b, []byte("http: panic")) {
		c.log.Error("an http request panicked")
	} else {
		c.log.Warn("an http connection went wrong")
	}
	return len(b), nil
}
