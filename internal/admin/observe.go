package admin

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"time"
)

// The words for the state of a store.
const (
	Connected  = "connected"  // it answers and is trusted
	Recovering = "recovering" // it answers, and what it missed is being repaired
	Down       = "down"
	Unused     = "unused" // no route's phase has this store
)

// Health is the state of the process and of both stores.
type Health struct {
	Serving  bool  `json:"serving"`
	Draining bool  `json:"draining"`
	Redis    Store `json:"redis"`
	Postgres Store `json:"postgres"`
}

// Store is the state of one store: one of the words above, why it is not connected, and for how long it has been so.
type Store struct {
	Status string `json:"status"`
	Reason string `json:"reason,omitempty"`
	Since  int64  `json:"since_seconds"`
}

// Observed is the process as the observe address shows it. Methods are called from many goroutines.
type Observed interface {
	// Health answers at once and asks nobody.
	Health() Health
	// Stats is what GET /cache/stats encodes. ctx bounds what has to be asked of a store.
	Stats(ctx context.Context) any
	// Phases is what GET /phase encodes: of all routes, or of the one named. The error is ErrNoRoute.
	Phases(ctx context.Context, route string) (any, error)
	// ReadyRequires says what /readyz demands of the stores: none, any, redis, postgres or all.
	ReadyRequires() string
	// Identity is what tells this process from others, by name: version, instance.
	Identity() map[string]string
}

// statsTime bounds what GET /cache/stats asks of Redis. Prometheus and people give up after ten seconds.
const statsTime = 2 * time.Second

// Observe returns the handler of the observe address. metrics answers GET /metrics.
func Observe(p Observed, metrics http.Handler) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /livez", func(w http.ResponseWriter, _ *http.Request) { text(w, http.StatusOK, "ok\n") })
	mux.HandleFunc("GET /startupz", func(w http.ResponseWriter, _ *http.Request) {
		if !p.Health().Serving {
			text(w, http.StatusServiceUnavailable, "not listening yet\n")
			return
		}
		text(w, http.StatusOK, "ok\n")
	})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) { readyz(w, r, p.Health(), p.ReadyRequires()) })
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { healthz(w, p) })
	mux.HandleFunc("GET /cache/stats", func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), statsTime)
		defer cancel()
		writeJSON(w, http.StatusOK, p.Stats(ctx))
	})
	mux.HandleFunc("GET /phase", func(w http.ResponseWriter, r *http.Request) {
		out, err := p.Phases(r.Context(), r.URL.Query().Get("route"))
		if err != nil {
			text(w, http.StatusNotFound, err.Error()+"\n")
			return
		}
		writeJSON(w, http.StatusOK, out)
	})
	mux.Handle("GET /metrics", metrics)
	return mux
}

// ready tells whether the stores are as requires demands. A store that no route uses is missed by nobody.
func ready(h Health, requires string) bool {
	redis := h.Redis.Status == Connected || h.Redis.Status == Unused
	postgres := h.Postgres.Status == Connected || h.Postgres.Status == Unused
	switch requires {
	case "any":
		return h.Redis.Status == Connected || h.Postgres.Status == Connected
	case "redis":
		return redis
	case "postgres":
		return postgres
	case "all":
		return redis && postgres
	}
	return true
}

// readyz says whether clients should be sent here. By default the stores are shown and do not count: an outage that all
// sidecars share must not take every pod out of service.
func readyz(w http.ResponseWriter, r *http.Request, h Health, requires string) {
	ok := h.Serving && !h.Draining && ready(h, requires)
	code := http.StatusOK
	if !ok {
		code = http.StatusServiceUnavailable
	}
	if strings.Contains(r.Header.Get("Accept"), "application/json") {
		writeJSON(w, code, struct {
			Ready    bool   `json:"ready"`
			Requires string `json:"requires"`
			Health
		}{ok, requires, h})
		return
	}
	var b strings.Builder
	line := func(ok bool, name, words string) {
		sign := "[-]"
		if ok {
			sign = "[+]"
		}
		fmt.Fprintf(&b, "%s%s %s\n", sign, name, words)
	}
	switch {
	case h.Draining:
		line(false, "proxy", "draining")
	case !h.Serving:
		line(false, "proxy", "not listening yet")
	default:
		line(true, "proxy", "ok")
	}
	line(h.Redis.up(), "redis", h.Redis.words())
	line(h.Postgres.up(), "postgres", h.Postgres.words())
	if ok {
		b.WriteString("ready")
	} else {
		b.WriteString("not ready")
	}
	fmt.Fprintf(&b, " (stores required: %s)\n", requires)
	text(w, code, b.String())
}

func (s Store) up() bool { return s.Status == Connected || s.Status == Unused }

func (s Store) words() string {
	words := s.Status
	if s.Status == Connected {
		words = "ok"
	}
	if s.Reason != "" && !s.up() {
		words += ": " + s.Reason
	}
	return words
}

// healthz is for people and dashboards. It is no probe, and always 200.
func healthz(w http.ResponseWriter, p Observed) {
	h := p.Health()
	status := "ok"
	switch redis, postgres := h.Redis.up(), h.Postgres.up(); {
	case h.Draining:
		status = "draining"
	case !h.Serving:
		status = "starting"
	case !redis && !postgres:
		status = "down"
	case !redis || !postgres:
		status = "degraded"
	}
	writeJSON(w, http.StatusOK, struct {
		Status   string            `json:"status"`
		Identity map[string]string `json:"process"`
		Health
	}{status, p.Identity(), h})
}

func text(w http.ResponseWriter, code int, body string) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(code)
	_, _ = w.Write([]byte(body)) // a client that has left needs no answer
}

func writeJSON(w http.ResponseWriter, code int, v any) {
	body, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		text(w, http.StatusInternalServerError, "the answer cannot be encoded\n")
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(code)
	_, _ = w.Write(append(body, '\n')) // as above
}
