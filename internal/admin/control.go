package admin

import (
	"errors"
	"net"
	"net/http"
	"net/http/pprof"
	"net/netip"
	"net/url"

	"cacheproxy/policy"
)

// ErrNoRoute is returned by Controlled.SetPhase and Observed.Phases.
var ErrNoRoute = errors.New("no such route")

// Controlled is the process as the admin address can change it. Methods are called from many goroutines.
type Controlled interface {
	// Reload reads the configuration again. After an error the old one is still in force; the text of the error is
	// shown to the operator and holds no secrets.
	Reload() error
	// SetPhase moves a route one step. The error is ErrNoRoute, or says why the step is refused; force is for what can be
	// overruled.
	SetPhase(route string, to policy.Phase, force bool) error
}

// headerName must be sent with what changes something. A page in a browser cannot send it to another origin without
// asking first, and nobody answers that question here.
const headerName = "X-Cacheproxy"

// Control returns the handler of the admin address. It answers only requests that name a loopback host: a page whose
// name was made to resolve to 127.0.0.1 still names itself.
func Control(p Controlled) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /reload", func(w http.ResponseWriter, _ *http.Request) {
		if err := p.Reload(); err != nil {
			text(w, http.StatusUnprocessableEntity, err.Error()+"\n")
			return
		}
		text(w, http.StatusOK, "reloaded\n")
	})
	mux.HandleFunc("POST /phase", func(w http.ResponseWriter, r *http.Request) { setPhase(w, r, p) })
	mux.HandleFunc("GET /debug/pprof/", pprof.Index)
	mux.HandleFunc("GET /debug/pprof/cmdline", pprof.Cmdline)
	mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("GET /debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	return guarded(mux)
}

func setPhase(w http.ResponseWriter, r *http.Request, p Controlled) {
	query := r.URL.Query()
	route, word := query.Get("route"), query.Get("phase")
	if route == "" {
		text(w, http.StatusBadRequest, "the parameter route is missing\n")
		return
	}
	to, err := policy.ParsePhase(word)
	if err != nil {
		text(w, http.StatusBadRequest, err.Error()+"\n")
		return
	}
	switch err := p.SetPhase(route, to, query.Get("force") == "1"); {
	case errors.Is(err, ErrNoRoute):
		text(w, http.StatusNotFound, err.Error()+"\n")
	case err != nil:
		text(w, http.StatusConflict, err.Error()+"\n")
	default:
		text(w, http.StatusOK, "ok\n")
	}
}

// guarded keeps browsers out that were sent here by somebody else's page.
func guarded(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case !loopback(r.Host) || !sameOrigin(r.Header.Get("Origin")):
			text(w, http.StatusForbidden, "the admin address is for this machine only: name it as localhost or 127.0.0.1\n")
		case r.Method != http.MethodGet && r.Method != http.MethodHead && r.Header.Get(headerName) != "1":
			text(w, http.StatusForbidden, "send the header "+headerName+": 1\n")
		default:
			next.ServeHTTP(w, r)
		}
	})
}

// loopback tells whether a Host header names this machine as itself.
func loopback(host string) bool {
	if name, _, err := net.SplitHostPort(host); err == nil {
		host = name
	}
	if host == "localhost" {
		return true
	}
	ip, err := netip.ParseAddr(trimBrackets(host))
	return err == nil && ip.Unmap().IsLoopback()
}

func trimBrackets(host string) string {
	if len(host) > 1 && host[0] == '[' && host[len(host)-1] == ']' {
		return host[1 : len(host)-1]
	}
	return host
}

// sameOrigin tells whether a page that asks, if it is a page, comes from this machine.
func sameOrigin(origin string) bool {
	if origin == "" {
		return true
	}
	u, err := url.Parse(origin)
	return err == nil && loopback(u.Host)
}
