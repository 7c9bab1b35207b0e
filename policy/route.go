package policy

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"slices"
	"time"
	"unicode/utf8"
)

// MaxKey is the longest key, in bytes, that is routed. A B-tree of Postgres takes entries of up to about
// 2,700 bytes, and the route's name shares one with the key: longer keys could not be indexed.
const MaxKey = 2000

// maxMatch is the longest pattern, in bytes: enough for the longest key with each byte escaped. It bounds
// what one comparison can cost.
const maxMatch = 2 * MaxKey

// maxName is the longest name of a route, in bytes. It is a label on every metric, and beside a key of MaxKey
// bytes it must still fit an index entry.
const maxName = 200

// reservedPrefix begins the keys that the proxy keeps in Redis for itself.
const reservedPrefix = "cacheproxy:"

// OnUnknown is a closed list: what a read answers if the store that might hold the value cannot be asked.
type OnUnknown uint8

const (
	// UnknownMiss: nil, as if the key did not exist. The default.
	UnknownMiss OnUnknown = iota
	// UnknownError: -UNAVAILABLE.
	UnknownError
)

var onUnknownWords = [...]string{"miss", "error"}

// String returns the word for u that the configuration uses.
func (u OnUnknown) String() string { return enumWord("OnUnknown", onUnknownWords[:], uint8(u)) }

// WritePolicy is a closed list: how many stores a write needs where the phase writes to both.
type WritePolicy uint8

const (
	// WriteAny: one suffices, the other is repaired. The default.
	WriteAny WritePolicy = iota
	// WriteBothStores: a write is refused unless both take it.
	WriteBothStores
)

var writePolicyWords = [...]string{"any", "both"}

// String returns the word for w that the configuration uses.
func (w WritePolicy) String() string { return enumWord("WritePolicy", writePolicyWords[:], uint8(w)) }

// Route is a key pattern and what holds for the keys it matches.
type Route struct {
	Name        string        // unique among the routes, at most 200 bytes
	Match       string        // a pattern for Glob, at most 4,000 bytes, braces literal; with Template: its text
	Template    *Template     // for a column that the application has; nil: the proxy's own table
	Place       string        // where that column is, in words for people: "column c of table s.t"
	Phase       Phase         // zero: Phase0
	TTL         time.Duration // of a value written without one; 0: none
	Jitter      float64       // share of TTL that expiries are spread over, from 0 to 1; 0.1 is 10 %
	NegativeTTL time.Duration // how long "absent in both stores" is remembered; 0: not at all
	OnUnknown   OnUnknown
	WritePolicy WritePolicy
}

// Column tells whether the store of the route is a column that the application has: it holds JSON alone, and only keys
// that have a row.
func (r *Route) Column() bool { return r.Template != nil }

// Prefix is the literal that every key of the route begins with.
func (r *Route) Prefix() string {
	if r.Template != nil {
		return r.Template.Literals()[0]
	}
	lit, _ := literal(r.Match)
	return lit
}

// check returns what is wrong with r by itself.
func (r *Route) check() []error {
	var errs []error
	wrong := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if r.Name == "" {
		wrong("name is empty")
	}
	if len(r.Name) > maxName {
		wrong("name has %d bytes, at most %d are allowed", len(r.Name), maxName)
	}
	if r.Match == "" {
		wrong("match is empty")
	}
	if len(r.Match) > maxMatch {
		wrong("match has %d bytes, at most %d are allowed", len(r.Match), maxMatch)
	}
	if !r.Phase.valid() {
		wrong("%s is no phase", r.Phase)
	}
	if r.TTL < 0 {
		wrong("ttl is negative")
	}
	if r.NegativeTTL < 0 {
		wrong("negative_ttl is negative")
	}
	if !(r.Jitter >= 0 && r.Jitter <= 1) { // so written, it refuses NaN too
		wrong("ttl_jitter is not between 0 and 1")
	}
	return errs
}

// Router finds the route of a key. It is immutable: goroutines share it freely, and a change makes a new one.
type Router struct {
	routes []Route
	root   *node // refers to routes by position
}

// NewRouter returns a Router over a copy of routes, in order of precedence; no routes is a valid choice. The
// error joins everything that is wrong with them: a name that is empty, too long or taken, a pattern that
// is empty or too long, a value out of its range.
func NewRouter(routes []Route) (*Router, error) {
	r := &Router{routes: slices.Clone(routes), root: newNode("")}
	var errs []error
	byName := make(map[string]int, len(routes))
	for i := range r.routes {
		route := &r.routes[i]
		for _, err := range route.check() {
			errs = append(errs, fmt.Errorf("routes[%d]: %w", i, err))
		}
		if first, taken := byName[route.Name]; !taken {
			byName[route.Name] = i
		} else if route.Name != "" {
			errs = append(errs, fmt.Errorf("routes[%d]: name %q is that of routes[%d]", i, route.Name, first))
		}
		r.root.insert(route, i)
	}
	if len(errs) > 0 {
		return nil, errors.Join(errs...)
	}
	return r, nil
}

// Routes returns a copy of the routes in order of precedence.
func (r *Router) Routes() []Route { return slices.Clone(r.routes) }

// WithPhase returns a Router that differs from r only in the phase of the route called name. It does not ask
// whether the change is one Step; the caller decides what a jump means. It fails if there is no such route or
// no such phase.
func (r *Router) WithPhase(name string, p Phase) (*Router, error) {
	i := slices.IndexFunc(r.routes, func(route Route) bool { return route.Name == name })
	if i < 0 {
		return nil, fmt.Errorf("no route is called %q", name)
	}
	if !p.valid() {
		return nil, fmt.Errorf("%s is no phase", p)
	}
	routes := slices.Clone(r.routes)
	routes[i].Phase = p
	return &Router{routes: routes, root: r.root}, nil
}

// Eligible reports whether key can be routed at all: whether a column of type text can hold it (valid UTF-8
// without NUL), whether it fits an index (at most MaxKey bytes) and whether it is not one of the proxy's own
// ("cacheproxy:…"). The empty key is eligible.
func Eligible(key []byte) bool {
	return len(key) <= MaxKey &&
		!bytes.HasPrefix(key, []byte(reservedPrefix)) &&
		bytes.IndexByte(key, 0) < 0 &&
		utf8.Valid(key)
}

// Match returns the first route whose pattern matches key, or nil if there is none or key is not Eligible.
// The route belongs to r and must not be changed. Match allocates nothing and does not keep key.
//
// The patterns that matter, a literal or a literal and a star, cost one walk down a tree of literals: its time
// is bounded by the length of the key, however many routes there are. Any other pattern is compared only if the key
// begins with the literal that it begins with, and if it could still come before the best match so far.
func (r *Router) Match(key []byte) *Route {
	if !Eligible(key) {
		return nil
	}
	best := noRoute
	for n, rest := r.root, key; n != nil; n, rest = n.next(rest) {
		best = min(best, n.prefix)
		if len(rest) == 0 {
			best = min(best, n.exact)
		}
		for i := 0; i < len(n.globs) && n.globs[i].route < best; i++ {
			if n.globs[i].matches(key) {
				best = n.globs[i].route
			}
		}
	}
	if best == noRoute {
		return nil
	}
	return &r.routes[best]
}

// In reports whether key is the route's that is called name.
func (r *Router) In(key []byte, name string) bool {
	route := r.Match(key)
	return route != nil && route.Name == name
}

// noRoute comes after every route.
const noRoute = math.MaxInt

// node is a place in a compressed tree of the literals that patterns begin with. A hash per length of
// literal would do as well for a few lengths; the tree needs no assumption about how many there are and reads each
// byte of the key once. It is static once built.
type node struct {
	label    string // the bytes between the parent and this node; empty only at the root
	first    []byte // first[i] is children[i].label[0]; all differ
	children []*node

	// The patterns whose literal ends here, each as its route's position.
	exact  int        // the first that is nothing but the literal
	prefix int        // the first that is the literal and a star
	globs  []nodeGlob // the others, in order
}

type nodeGlob struct {
	route    int
	pattern  []byte
	template *Template // nil: the pattern says all
}

// matches compares a key with the whole pattern.
func (g *nodeGlob) matches(key []byte) bool {
	if g.template != nil {
		return g.template.Matches(key)
	}
	return Glob(g.pattern, key)
}

func newNode(label string) *node { return &node{label: label, exact: noRoute, prefix: noRoute} }

// insert files the pattern of a route under n, the root. Routes come in order.
func (n *node) insert(r *Route, route int) {
	if r.Template != nil {
		n = n.at(r.Template.literals[0])
		n.globs = append(n.globs, nodeGlob{route: route, template: r.Template})
		return
	}
	pattern := r.Match
	lit, rest := literal(pattern)
	n = n.at(lit)
	switch rest {
	case "":
		n.exact = min(n.exact, route)
	case "*":
		n.prefix = min(n.prefix, route)
	default:
		n.globs = append(n.globs, nodeGlob{route: route, pattern: []byte(pattern)})
	}
}

// literal splits pattern into the bytes that every match begins with, without their escapes, and the pattern
// that follows them.
func literal(pattern string) (lit, rest string) {
	b := make([]byte, 0, len(pattern))
	for i := 0; i < len(pattern); i++ {
		switch c := pattern[i]; {
		case c == '*' || c == '?' || c == '[':
			return string(b), pattern[i:]
		case c == '\\' && i+1 < len(pattern):
			i++
			b = append(b, pattern[i])
		default:
			b = append(b, c)
		}
	}
	return string(b), ""
}

// at returns the node under n where lit ends. It makes the node if need be.
func (n *node) at(lit string) *node {
	for lit != "" {
		i := bytes.IndexByte(n.first, lit[0])
		if i < 0 {
			i = n.adopt(newNode(lit))
		}
		child := n.children[i]
		k := 1
		for k < len(lit) && k < len(child.label) && lit[k] == child.label[k] {
			k++
		}
		if k < len(child.label) { // lit leaves, or ends, within the label: split it there
			upper := newNode(child.label[:k])
			child.label = child.label[k:]
			upper.adopt(child)
			n.children[i], child = upper, upper
		}
		n, lit = child, lit[k:]
	}
	return n
}

// adopt adds child and returns its position.
func (n *node) adopt(child *node) int {
	n.first = append(n.first, child.label[0])
	n.children = append(n.children, child)
	return len(n.children) - 1
}

// next returns the child whose label rest begins with, and what follows the label; nil if there is none.
func (n *node) next(rest []byte) (*node, []byte) {
	if len(rest) == 0 {
		return nil, nil
	}
	i := bytes.IndexByte(n.first, rest[0])
	if i < 0 {
		return nil, nil
	}
	child := n.children[i]
	if len(rest) < len(child.label) || string(rest[:len(child.label)]) != child.label {
		return nil, nil
	}
	return child, rest[len(child.label):]
}
