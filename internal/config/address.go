package config

import (
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/redis/go-redis/v9"
)

// unixScheme begins the address of a unix socket.
const unixScheme = "unix://"

// maxSocketPath is what Linux's sockaddr_un holds, without the NUL that ends it.
const maxSocketPath = 107

// checkUnix checks the path of unix:///path.
func checkUnix(path string) *mistake {
	switch {
	case !strings.HasPrefix(path, "/") || path == "/":
		return &mistake{"is not the address of a unix socket", "write unix:///path/to/socket, with three slashes"}
	case len(path) > maxSocketPath:
		return &mistake{fmt.Sprintf("the socket's path has %d bytes, the system takes %d", len(path), maxSocketPath), "choose a shorter path"}
	}
	return nil
}

var hostname = regexp.MustCompile(`^[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_.])?$`)

// checkHostPort checks an address to listen on. The host may be empty (every interface), the port 0
// (any free one). The example is for the remedy.
func checkHostPort(address, example string) *mistake {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		remedy := "write host:port, such as " + example
		if n, err := strconv.ParseUint(address, 10, 16); err == nil {
			remedy = fmt.Sprintf("did you mean 127.0.0.1:%d?", n)
		} else if strings.Count(address, ":") > 1 && !strings.Contains(address, "[") {
			remedy = "write an IPv6 host in brackets, as in [::1]:6380"
		} else if strings.HasPrefix(address, "/") {
			remedy = "did you mean unix://" + address + "?"
		}
		return &mistake{fmt.Sprintf("%q is not host:port", address), remedy}
	}
	if _, err := strconv.ParseUint(port, 10, 16); err != nil {
		return &mistake{fmt.Sprintf("%q is not a port", port), "write a number from 1 to 65535, or 0 for any free port"}
	}
	if _, err := netip.ParseAddr(host); err != nil && host != "" && !hostname.MatchString(host) {
		return &mistake{fmt.Sprintf("%q is neither an IP address nor a host name", host), "write host:port, such as " + example}
	}
	return nil
}

// isLoopback reports whether an address that checkHostPort accepts stays on this machine.
func isLoopback(address string) bool {
	host, _, _ := net.SplitHostPort(address)
	ip, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && ip.Unmap().IsLoopback()
}

// sameListener reports whether two sockets could not be bound side by side: the same path, or the
// same port on hosts of which one contains the other.
func sameListener(a, b string) bool {
	if strings.HasPrefix(a, unixScheme) || strings.HasPrefix(b, unixScheme) {
		return a == b
	}
	hostA, portA, errA := net.SplitHostPort(a)
	hostB, portB, errB := net.SplitHostPort(b)
	if errA != nil || errB != nil || portNumber(portA) != portNumber(portB) || portNumber(portA) == 0 {
		return false
	}
	canonical := func(host string) string {
		if host == "localhost" {
			return "127.0.0.1"
		}
		if ip, err := netip.ParseAddr(host); err == nil && ip.IsUnspecified() {
			return ""
		} else if err == nil {
			return ip.Unmap().String()
		}
		return strings.ToLower(host)
	}
	hostA, hostB = canonical(hostA), canonical(hostB)
	return hostA == hostB || hostA == "" || hostB == ""
}

func portNumber(port string) uint64 {
	n, _ := strconv.ParseUint(port, 10, 16)
	return n
}

// escapes is the remedy for what is nearly always a password that was pasted as it is.
const escapes = "in a password write %40 for @, %3A for :, %2F for /, %3F for ?, %23 for #, %25 for %"

// checkRedisURL checks a URL without repeating any of it: what cannot be parsed may be a password in
// the wrong place.
func checkRedisURL(raw string) *mistake {
	scheme, rest, ok := strings.Cut(raw, "://")
	switch {
	case raw == "":
		return &mistake{"is empty", "write redis://host:6379/0"}
	case !ok:
		return &mistake{"is not a URL", "write redis://host:6379/0, rediss://host:6379/0 or unix:///path"}
	case scheme == "redis-sentinel", scheme == "redis-cluster":
		return &mistake{scheme + ":// is " + notSupported, "use redis:// or rediss:// with the address of the primary"}
	case !slices.Contains([]string{"redis", "rediss", "unix"}, scheme):
		remedy := "use redis://, rediss:// or unix://"
		if word := didYouMean(scheme, []string{"redis", "rediss", "unix"}); word != "" {
			remedy = "did you mean " + word + "://?"
		}
		return &mistake{"has an unknown scheme", remedy}
	}
	u, err := url.Parse(raw)
	if err != nil || u.Fragment != "" || strings.Contains(u.Path+u.RawQuery, "@") {
		return &mistake{"is not a URL that can be parsed", escapes}
	}
	if scheme == "unix" {
		path := rest[strings.LastIndexByte(rest, '@')+1:]
		path, _, _ = strings.Cut(path, "?")
		if bad := checkUnix(path); bad != nil {
			return bad
		}
	} else if u.Hostname() == "" {
		return &mistake{"names no host", "write " + scheme + "://host:6379/0"}
	}
	opts, err := redis.ParseURL(raw)
	switch {
	case err != nil:
		return &mistake{"is not a URL of Redis: " + strings.TrimPrefix(err.Error(), "redis: "), "write redis://host:6379/0 or unix:///path?db=0"}
	case opts.DB < 0:
		return &mistake{"names a negative database", "write a database number from 0 on"}
	}
	return nil
}

// sslModes are libpq's.
var sslModes = []string{"disable", "allow", "prefer", "require", "verify-ca", "verify-full"}

// checkPostgresURL checks a URL of Postgres, which is not quite a URL: as in libpq, it may name
// several hosts. As with Redis, nothing of it is repeated.
func checkPostgresURL(raw string) *mistake {
	scheme, rest, ok := strings.Cut(raw, "://")
	if !ok {
		return &mistake{"is not a URL", "write postgres://user:password@host:5432/database"}
	}
	if scheme != "postgres" && scheme != "postgresql" {
		remedy := "use postgres:// or postgresql://"
		if strings.Contains(scheme, "postgres") || didYouMean(scheme, []string{"postgres", "postgresql"}) != "" {
			remedy = "did you mean postgres://?"
		}
		return &mistake{"has an unknown scheme", remedy}
	}
	// As libpq: credentials end at an @ that stands before any slash.
	var credentials string
	if i := strings.IndexAny(rest, "@/"); i >= 0 && rest[i] == '@' {
		credentials, rest = rest[:i], rest[i+1:]
	}
	rest, query, _ := strings.Cut(rest, "?")
	hosts, database, _ := strings.Cut(rest, "/")
	broken := &mistake{"is not a URL that can be parsed", escapes}
	if strings.ContainsAny(hosts, "@#") || strings.Contains(database, "@") {
		return broken
	}
	for _, part := range []string{credentials, hosts, database} {
		if _, err := url.PathUnescape(part); err != nil {
			return broken
		}
	}
	for host := range strings.SplitSeq(hosts, ",") {
		if i := strings.LastIndexByte(host, ':'); i > strings.LastIndexByte(host, ']') {
			if n, err := strconv.ParseUint(host[i+1:], 10, 16); err != nil || n == 0 {
				return &mistake{"has a port that is no number from 1 to 65535", "write host:5432; " + escapes}
			}
		}
	}
	values, err := url.ParseQuery(query)
	if err != nil {
		return broken
	}
	if mode := values.Get("sslmode"); mode != "" && !slices.Contains(sslModes, mode) {
		return &mistake{"has an unknown sslmode", "write " + anyOf(sslModes)}
	}
	return nil
}

// credentials are a URL taken apart around the password.
type credentials struct {
	scheme, user, rest string // rest begins behind the @
	hasPassword        bool
}

// splitURL takes apart a URL that checkRedisURL or checkPostgresURL has let pass.
func splitURL(raw string) (c credentials) {
	c.scheme, c.rest, _ = strings.Cut(raw, "://")
	if i := strings.IndexAny(c.rest, "@/?"); i >= 0 && c.rest[i] == '@' {
		c.user, c.rest = c.rest[:i], c.rest[i+1:]
		c.user, _, c.hasPassword = strings.Cut(c.user, ":")
	}
	return c
}

// with is the URL with this password.
func (c credentials) with(password string) string {
	return c.scheme + "://" + c.user + url.UserPassword("", password).String() + "@" + c.rest
}

// without is the URL with none.
func (c credentials) without() string {
	if c.user == "" {
		return c.scheme + "://" + c.rest
	}
	return c.scheme + "://" + c.user + "@" + c.rest
}
