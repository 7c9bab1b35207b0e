package config

import (
	"fmt"
	"regexp"
	"strings"
	"unicode/utf8"

	"cacheproxy/policy"
)

// check reports what a single value in its bounds cannot show: malformed addresses, files that are
// missing, and settings that contradict each other.
func (l *loader) check() {
	l.checkListeners()
	l.checkListenTLS()
	l.checkPassword()
	l.checkStores()
	l.checkTimes()
	l.checkDeny()
	l.checkRoutes()
}

// refuse reports a mistake with a setting, if there is one, and returns whether there was none.
func (l *loader) refuse(key string, bad *mistake) bool {
	if bad != nil {
		l.reject(key, bad.problem, bad.remedy)
		l.bad[key] = true
	}
	return !l.bad[key]
}

func (l *loader) checkListeners() {
	c, defaults := l.cfg, Defaults()
	if path, isUnix := strings.CutPrefix(c.Listen.Address, unixScheme); isUnix {
		l.refuse("listen.address", checkUnix(path))
	} else {
		l.refuse("listen.address", checkHostPort(c.Listen.Address, defaults.Listen.Address))
	}
	l.refuse("observe.address", checkHostPort(c.Observe.Address, defaults.Observe.Address))
	if c.Admin.Address != "" && l.refuse("admin.address", checkHostPort(c.Admin.Address, defaults.Admin.Address)) && !isLoopback(c.Admin.Address) {
		l.reject("admin.address", "is not a loopback address, and the admin listener asks for no password",
			`write 127.0.0.1:9181, or "" for no admin listener`)
	}
	listeners := []struct{ key, address string }{
		{"listen.address", c.Listen.Address},
		{"observe.address", c.Observe.Address},
		{"admin.address", c.Admin.Address},
	}
	for i, a := range listeners {
		for _, b := range listeners[i+1:] {
			if l.bad[a.key] || l.bad[b.key] || !sameListener(a.address, b.address) {
				continue
			}
			// The mistake is with the one that was changed.
			key, other := b.key, a.key
			if !l.given(key) {
				key, other = other, key
			}
			l.reject(key, "is the same address as "+other, "give one of them another port")
		}
	}
}

func (l *loader) checkListenTLS() {
	t := l.cfg.Listen.TLS
	switch {
	case t.CertFile != "" && t.KeyFile == "":
		l.reject("listen.tls.cert_file", "is set without key_file", "set listen.tls.key_file too, or neither")
	case t.CertFile == "" && t.KeyFile != "":
		l.reject("listen.tls.key_file", "is set without cert_file", "set listen.tls.cert_file too, or neither")
	}
	if t.ClientCAFile != "" && t.CertFile == "" {
		l.reject("listen.tls.client_ca_file", "is set without cert_file: clients show certificates only over TLS",
			"set listen.tls.cert_file and key_file too")
	}
	l.checkFile("listen.tls.cert_file", t.CertFile)
	l.checkFile("listen.tls.key_file", t.KeyFile)
	l.checkFile("listen.tls.client_ca_file", t.ClientCAFile)
}

// checkFile reports a file that is named and cannot be read.
func (l *loader) checkFile(key, path string) {
	if path == "" {
		return
	}
	if _, err := readBounded(path); err != nil {
		l.reject(key, "the file cannot be read: "+reason(err), "name an existing file that this user may read")
	}
}

// checkPassword fetches the password from its file.
func (l *loader) checkPassword() {
	c := &l.cfg.Listen
	if c.PasswordFile == "" {
		return
	}
	if c.Password != "" {
		l.reject("listen.password_file", "is set together with listen.password", "set one of them")
		return
	}
	c.Password = l.readPassword("listen.password_file", c.PasswordFile)
}

// readPassword is the first line of a file that a setting names, or "" with a problem reported.
func (l *loader) readPassword(key, path string) string {
	text, err := readBounded(path)
	if err != nil {
		l.reject(key, "the file cannot be read: "+reason(err), "name an existing file that this user may read")
		return ""
	}
	password := firstLine(text)
	if password == "" {
		l.reject(key, errEmptyPassword.Error(), "write the password there, or remove the setting")
	}
	return password
}

// fillPassword puts the password of a file into the URL of a store, so that whoever connects needs to know of one setting only.
func (l *loader) fillPassword(store string, raw *string, path string) {
	key := store + ".password_file"
	if path == "" || l.bad[store+".url"] {
		return
	}
	u := splitURL(*raw)
	switch {
	case u.hasPassword:
		l.reject(key, "is set, but "+store+".url has a password", "leave one of them out")
	case u.user == "" && store == "postgres":
		l.reject(key, "is set, but postgres.url names no user", "write postgres://user@host:5432/database")
	default:
		if password := l.readPassword(key, path); password != "" {
			*raw = u.with(password)
		}
	}
}

func (l *loader) checkStores() {
	r := l.cfg.Redis
	if l.refuse("redis.url", checkRedisURL(r.URL)) && !strings.HasPrefix(r.URL, "rediss://") {
		if r.TLS.CAFile != "" {
			l.reject("redis.tls.ca_file", "is set, but redis.url does not speak TLS", "write rediss:// in redis.url, or remove this")
		}
		if r.TLS.InsecureSkipVerify {
			l.reject("redis.tls.insecure_skip_verify", "is set, but redis.url does not speak TLS", "write rediss:// in redis.url, or remove this")
		}
	}
	l.checkFile("redis.tls.ca_file", r.TLS.CAFile)
	if r.ManageMemory && r.MaxMemory == 0 && !l.bad["redis.max_memory"] {
		l.reject("redis.manage_memory", "is true without redis.max_memory", "set redis.max_memory, for instance 512mb")
	}
	l.fillPassword("redis", &l.cfg.Redis.URL, r.PasswordFile)
	if p := &l.cfg.Postgres; p.URL != "" {
		l.refuse("postgres.url", checkPostgresURL(p.URL))
		l.fillPassword("postgres", &p.URL, p.PasswordFile)
	}
}

func (l *loader) checkTimes() {
	c := l.cfg
	if c.Breaker.Probe > c.Breaker.ProbeMax && !l.bad["breaker.probe_max"] {
		key := "breaker.probe"
		if !l.given(key) {
			key = "breaker.probe_max"
		}
		l.reject(key, fmt.Sprintf("breaker.probe (%s) is longer than breaker.probe_max (%s)", c.Breaker.Probe, c.Breaker.ProbeMax),
			"make probe the shorter of the two")
	}
}

// routeName keeps names fit for labels, replies and command lines.
var routeName = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.:-]{0,63}$`)

func (l *loader) checkRoutes() {
	names, patterns := map[string]int{}, map[string]int{}
	all := -1 // the first route that matches every key
	for i, r := range l.cfg.Routes {
		path := fmt.Sprintf("routes[%d]", i)
		if l.bad[path] {
			continue
		}
		for _, key := range []string{path + ".name", path + ".match"} {
			if at, ok := l.origins[path]; ok && !l.given(key) {
				l.origins[key] = at // what is missing is missing where the route begins
			}
		}
		switch first, taken := names[r.Name]; {
		case r.Name == "":
			l.reject(path+".name", "is missing", "give the route a name of its own")
		case !routeName.MatchString(r.Name):
			l.reject(path+".name", "is no name for a route", "use up to 64 letters, digits and _ . : -")
		case taken:
			l.reject(path+".name", fmt.Sprintf("%q is also the name of routes[%d]", r.Name, first), "give each route a name of its own")
		default:
			names[r.Name] = i
		}

		column := r.Store.Kind == "column"
		if column {
			l.checkColumn(r, path)
		} else {
			l.checkTable(r.Store, path+".store")
		}
		first, taken := patterns[r.Match]
		taken = taken && column == (l.cfg.Routes[first].Store.Kind == "column")
		switch {
		case !l.refuse(path+".match", l.checkMatch(r.Match, path, column)):
		case taken:
			l.reject(path+".match", fmt.Sprintf("routes[%d] above has the same pattern and wins", first), "remove one of the two routes")
		case all >= 0:
			l.reject(path+".match", fmt.Sprintf("can never match: routes[%d] above matches every key", all), "move this route above it")
		default:
			l.checkShadowed(i, path)
			patterns[r.Match] = i
			if !column && strings.Trim(r.Match, "*") == "" {
				all = i
			}
		}
	}
	l.checkColumnsOnce()
	l.checkStoreNeeded()
}

// checkStoreNeeded reports an empty postgres.url that routes rely on: once, with their names.
func (l *loader) checkStoreNeeded() {
	if l.cfg.Postgres.URL != "" {
		return
	}
	var needy []string
	for _, r := range l.cfg.PolicyRoutes() {
		if r.Phase.Rules().UsesStore {
			needy = append(needy, fmt.Sprintf("%q (%s)", r.Name, r.Phase))
		}
	}
	if len(needy) > 0 {
		l.reject("postgres.url", "is empty, but a store is needed by the route "+strings.Join(needy, ", "),
			"set it, or DATABASE_URL, or move what needs it to phase3")
	}
}

var placeholder = regexp.MustCompile(`\{[A-Za-z_]\w*\}`)

// checkMatch checks the pattern of a route.
//
// Braces are literal in a glob, because Redis Cluster's hash tags are ({user1}:*). But a glob with a
// {placeholder} and nothing that varies matches one key only: it was meant for a column.
func (l *loader) checkMatch(pattern, route string, column bool) *mistake {
	if bad := checkPattern(pattern); bad != nil {
		return bad
	}
	if column {
		return nil // checkColumn has read it
	}
	if name := placeholder.FindString(pattern); name != "" && !globSpecial.MatchString(pattern) && !l.bad[route+".store.kind"] {
		return &mistake{name + " is a placeholder only with store: {kind: column}", "did you mean " + placeholder.ReplaceAllString(pattern, "*") + "?"}
	}
	return nil
}

// checkPattern checks a glob by itself.
func checkPattern(pattern string) *mistake {
	switch {
	case pattern == "":
		return &mistake{"is empty", `write a glob as in Redis's KEYS, such as "user:*"`}
	case len(pattern) > policy.MaxKey:
		return &mistake{fmt.Sprintf("has %d bytes; keys longer than %d are not routed", len(pattern), policy.MaxKey), "write a shorter pattern"}
	case !utf8.ValidString(pattern) || strings.ContainsRune(pattern, 0):
		return &mistake{"is not UTF-8, or holds a NUL byte; such keys are not routed", "write a pattern in UTF-8"}
	case strings.HasPrefix(pattern, "cacheproxy:"):
		return &mistake{"names the proxy's own keys, which are never routed", "write a pattern for keys of the application"}
	}
	return nil
}
