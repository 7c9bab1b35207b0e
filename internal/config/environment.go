package config

import (
	"math"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

const (
	ownPrefix      = "CACHEPROXY_"
	fileVariable   = "CACHEPROXY_CONFIG"
	prefixVariable = "REDIS_KEY_PREFIX"
)

// variable is an environment variable that sets one setting.
type variable struct {
	name, key string
	// notation turns the variable's own notation into the file's; nil if they are the same.
	notation func(text string) (string, *mistake)
}

// variables are applied in this order. CACHEPROXY_CONFIG and REDIS_KEY_PREFIX are not among them,
// because what they set is no setting of the file.
var variables = []variable{
	{name: "REDIS_URL", key: "redis.url"},
	{name: "DATABASE_URL", key: "postgres.url"},
	{name: "REDIS_CACHE_TTL_SECONDS", key: "default.ttl", notation: seconds},
	{name: "REDIS_MAX_CACHE_SIZE_MB", key: "redis.max_memory", notation: megabytes},
	{name: "CACHEPROXY_PHASE", key: "default.phase"},
	{name: "CACHEPROXY_LISTEN", key: "listen.address"},
	{name: "CACHEPROXY_OBSERVE", key: "observe.address"},
	{name: "CACHEPROXY_ADMIN", key: "admin.address"},
	{name: "CACHEPROXY_LOG_LEVEL", key: "log.level"},
}

func seconds(text string) (string, *mistake) {
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil || n < 0 || n > math.MaxInt64/int64(time.Second) {
		return "", &mistake{"is not a number of seconds", "write digits only, such as 3600"}
	}
	return text + "s", nil
}

func megabytes(text string) (string, *mistake) {
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil || n < 0 {
		return "", &mistake{"is not a number of megabytes", "write digits only, such as 512"}
	}
	return text + "mb", nil
}

// readEnvironment applies the variables that are set and returns the pattern of the default route.
func (l *loader) readEnvironment(env func(string) (string, bool)) (pattern string) {
	for _, v := range variables {
		text, _ := env(v.name)
		if text == "" {
			continue
		}
		at := origin{file: inEnvironment, name: v.name}
		if v.notation != nil {
			var bad *mistake
			if text, bad = v.notation(text); bad != nil {
				l.report(at, v.key, bad.problem, bad.remedy)
				l.bad[v.key] = true
				continue
			}
		}
		l.set(v.key, text, at)
	}
	prefix, _ := env(prefixVariable)
	if prefix == "" || l.routes != nil { // a file with routes has no default route
		return "*"
	}
	// A prefix with its colon means the same as one without it.
	pattern = escapeGlob(strings.TrimSuffix(prefix, ":")) + ":*"
	l.origins["routes[0].match"] = origin{file: inEnvironment, name: prefixVariable}
	return pattern
}

var globSpecial = regexp.MustCompile(`[*?\[\\]`)

// escapeGlob is the pattern that matches s and nothing else.
func escapeGlob(s string) string { return globSpecial.ReplaceAllString(s, `\$0`) }

// serviceLink are the names that Kubernetes gives to every container of a namespace that has a
// Service called cacheproxy or cacheproxy-something (the container format of Docker's links).
var serviceLink = regexp.MustCompile(`_(SERVICE_(HOST|PORT(_\w+)?)|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)$`)

// refuseStrangers reports every CACHEPROXY_… variable that nobody reads: it is a misspelt one, and
// silence would mean that the proxy runs with the default.
func (l *loader) refuseStrangers() {
	known := []string{fileVariable}
	for _, v := range variables {
		known = append(known, v.name)
	}
	for _, entry := range l.environ {
		name, value, _ := strings.Cut(entry, "=")
		if !strings.HasPrefix(name, ownPrefix) || slices.Contains(known, name) {
			continue
		}
		if serviceLink.MatchString(name) || strings.HasSuffix(name, "_PORT") && strings.Contains(value, "://") {
			continue
		}
		var own []string
		for _, k := range known {
			if strings.HasPrefix(k, ownPrefix) {
				own = append(own, strings.TrimPrefix(k, ownPrefix))
			}
		}
		remedy := "remove it; " + ownPrefix + " can be followed by " + anyOf(own)
		if word := didYouMean(strings.TrimPrefix(name, ownPrefix), own); word != "" {
			remedy = "did you mean " + ownPrefix + word + "?"
		}
		l.report(origin{file: inEnvironment, name: name}, "", "unknown variable", remedy)
	}
}
