// Package config turns a file, the environment and flags into one checked Config.
//
// The layers are defaults < file < environment < flags. Each setting is one struct field whose tags
// hold everything there is to know about it: its key, its bounds, its words, whether it is a secret
// and whether it can change while the proxy runs. Load reads the file as a tree of YAML nodes, so
// that every mistake has its line, and goes on after each one, so that the operator sees all of them
// at once.
//
// Order of reading: config.go (the settings), load.go (the layers), decode.go and scalar.go (from
// text to values), check.go and address.go (what only several settings together can get wrong), then
// watch.go and diff.go (a file that changes under a running proxy).
package config

import "time"

// Config is every setting of the proxy. A Config that Load returned is complete and consistent: no
// setting is out of its bounds and every route has all of its rules.
//
// The tags, read by reflection:
//
//	yaml    the key
//	words   the only texts it may be
//	min,max the bounds, in the notation of the setting, both inclusive
//	secret  "text" or "url": what Redacted hides
//	reload  "hot": a running proxy takes it over; see Diff
type Config struct {
	Listen   Listen   `yaml:"listen"`
	Limits   Limits   `yaml:"limits"`
	Observe  Observe  `yaml:"observe"`
	Admin    Admin    `yaml:"admin"`
	Health   Health   `yaml:"health"`
	Redis    Redis    `yaml:"redis"`
	Postgres Postgres `yaml:"postgres"`
	Journal  Journal  `yaml:"journal"`
	Breaker  Breaker  `yaml:"breaker"`
	Verify   Verify   `yaml:"verify"`
	Commands Commands `yaml:"commands"`
	Log      Log      `yaml:"log"`
	// Default is what a route gets for each rule that it does not state.
	Default Rules `yaml:"default" reload:"hot"`
	// Routes are in the order in which they are tried. A file without the key gets the one route of
	// Defaults; an empty list is a choice: everything passes to Redis untouched.
	Routes []Route `yaml:"routes" reload:"hot"`
}

// Listen is where the application's Redis clients connect.
type Listen struct {
	// Address is host:port or unix:///path.
	Address string `yaml:"address"`
	TLS     TLS    `yaml:"tls"`
	// Password is asked of clients (AUTH); empty asks for none. Load fills it from PasswordFile.
	Password     string `yaml:"password" secret:"text"`
	PasswordFile string `yaml:"password_file"`
	MaxClients   int    `yaml:"max_clients" min:"1" max:"1000000"`
	// ShutdownGrace is how long a shutdown waits for commands in flight.
	ShutdownGrace time.Duration `yaml:"shutdown_grace" min:"0s" max:"1h"`
}

// TLS is the listener's certificate; all empty is plain text.
type TLS struct {
	CertFile string `yaml:"cert_file"`
	KeyFile  string `yaml:"key_file"`
	// ClientCAFile, if set, makes a client certificate signed by it a condition.
	ClientCAFile string `yaml:"client_ca_file"`
}

// Enabled reports whether the listener speaks TLS.
func (t TLS) Enabled() bool { return t.CertFile != "" }

// Limits keep one client from taking the memory of all.
type Limits struct {
	// MaxQueryBuffer bounds a command that has not arrived completely.
	MaxQueryBuffer Size `yaml:"max_query_buffer" min:"1MiB" max:"16GiB"`
	// MaxInflightPerClient and MaxInflightBytesPerClient bound what a pipeline may have outstanding, replies
	// that the client does not fetch included; above them the client is not read from, and loses nothing.
	MaxInflightPerClient      int  `yaml:"max_inflight_per_client" min:"1" max:"1000000"`
	MaxInflightBytesPerClient Size `yaml:"max_inflight_bytes_per_client" min:"64KiB" max:"16GiB"`
}

// Observe is the read-only HTTP listener: health, metrics, stats.
type Observe struct {
	Address string `yaml:"address"`
}

// Admin is the HTTP listener that can change things. It is loopback only.
type Admin struct {
	// Address is a loopback host:port; empty means no admin listener.
	Address string `yaml:"address"`
}

// Health says what /readyz demands of the stores.
type Health struct {
	ReadyRequires string `yaml:"ready_requires" words:"none any redis postgres all" reload:"hot"`
}

// Redis is the way to Redis.
type Redis struct {
	// URL is what redis.ParseURL of go-redis understands: redis://, rediss:// or unix://.
	URL string `yaml:"url" secret:"url"`
	// PasswordFile holds the password that URL then leaves out; Load puts it there. See Password.
	PasswordFile string `yaml:"password_file"`
	// Timeout is the one bounded wait that a dead Redis costs a client.
	Timeout     time.Duration `yaml:"timeout" min:"1ms" max:"1m" unit:"ms"`
	DialTimeout time.Duration `yaml:"dial_timeout" min:"1ms" max:"1m"`
	// Connections is the number of connections that clients share, for each version of the protocol, and of the event loops that
	// serve them; 0: one for every two processors, at most three.
	Connections int `yaml:"connections" min:"0" max:"64"`
	// MaxMemory is what Redis should be allowed to use; 0 means that it is not our business.
	MaxMemory Size `yaml:"max_memory"`
	// ManageMemory applies MaxMemory with CONFIG SET; without it a deviation is only reported.
	ManageMemory bool `yaml:"manage_memory"`
	// FailoverWindow is how old a Redis may be when it comes back and still be repaired key by key;
	// tombstones are kept that long.
	FailoverWindow time.Duration `yaml:"failover_window" min:"1m" max:"720h"`
	TLS            RedisTLS      `yaml:"tls"`
}

// RedisTLS refines a rediss:// connection.
type RedisTLS struct {
	// CAFile is trusted instead of the system's roots; empty keeps those.
	CAFile             string `yaml:"ca_file"`
	InsecureSkipVerify bool   `yaml:"insecure_skip_verify"`
}

// Postgres is the way to the store.
type Postgres struct {
	// URL is postgres://…; empty is allowed only if no route is in a phase that has a store.
	URL string `yaml:"url" secret:"url"`
	// PasswordFile holds the password that URL then leaves out; Load puts it there. See Password.
	PasswordFile string        `yaml:"password_file"`
	Timeout      time.Duration `yaml:"timeout" min:"1ms" max:"10m"`
	MaxReads     int           `yaml:"max_reads" min:"1" max:"1000"`
	MaxWrites    int           `yaml:"max_writes" min:"1" max:"1000"`
	// MaxValue bounds the value of a key that has a copy here.
	MaxValue Size `yaml:"max_value" min:"1MiB" max:"512MiB"`
}

// Journal is how sidecars learn of each other's doubts.
type Journal struct {
	Poll time.Duration `yaml:"poll" min:"10ms" max:"1m" unit:"ms"`
}

// Breaker is how often an outage is tested for its end.
type Breaker struct {
	Probe    time.Duration `yaml:"probe" min:"1ms" max:"1m" unit:"ms"`
	ProbeMax time.Duration `yaml:"probe_max" min:"1ms" max:"10m"`
}

// Verify is the comparison of both copies while clients are served.
type Verify struct {
	// Sample is the share of hits whose copies are compared.
	Sample Fraction `yaml:"sample" reload:"hot"`
}

// Commands says which commands clients may use.
type Commands struct {
	// Deny are the entries that policy.ParseDenyRule reads.
	Deny []string `yaml:"deny" reload:"hot"`
}

// Log is what the proxy writes to standard error.
type Log struct {
	Level string `yaml:"level" words:"debug info warn error" reload:"hot"`
	// Format auto is console on a terminal and JSON elsewhere.
	Format string `yaml:"format" words:"auto json console"`
}

// Rules are what a route says about its keys.
type Rules struct {
	Phase string `yaml:"phase" words:"phase0 phase1 phase2 drain phase3"`
	// TTL is for a SET that brings none; 0 is none.
	TTL time.Duration `yaml:"ttl" min:"0s" max:"876000h"`
	// TTLJitter spreads TTL by up to this share of it.
	TTLJitter Fraction `yaml:"ttl_jitter"`
	// NegativeTTL is how long "absent in both stores" is remembered; 0 is not at all.
	NegativeTTL time.Duration `yaml:"negative_ttl" min:"0s" max:"24h"`
	OnUnknown   string        `yaml:"on_unknown" words:"miss error"`
	WritePolicy string        `yaml:"write_policy" words:"any both"`
}

// Route is a key pattern and the rules for its keys.
type Route struct {
	Name string `yaml:"name"`
	// Match is a glob as in Redis's KEYS, or, where the store is a column, a policy.Template.
	Match string `yaml:"match"`
	Rules `yaml:",inline"`
	Store Store `yaml:"store"`
}

// Store is where a route's JSONB lives.
type Store struct {
	// Kind table is the proxy's own table, cacheproxy.entries; column is one that the application has, which the others name.
	Kind string `yaml:"kind" words:"table column"`
	// Table is schema.table, as policy.ParseTable reads it.
	Table string `yaml:"table,omitempty"`
	// KeyColumn is the column of the only placeholder; KeyColumns are those of several, by their names.
	KeyColumn  string            `yaml:"key_column,omitempty"`
	KeyColumns map[string]string `yaml:"key_columns,omitempty"`
	// ValueColumn is the column of type jsonb.
	ValueColumn string `yaml:"value_column,omitempty"`
	// ExpiresColumn and UpdatedColumn are columns of type timestamptz; empty means that there is none.
	ExpiresColumn string `yaml:"expires_column,omitempty"`
	UpdatedColumn string `yaml:"updated_column,omitempty"`
}

// Defaults is the configuration without a file, an environment and flags, and the only place where
// defaults stand. Every call returns a value of its own.
func Defaults() Config {
	c := Config{
		Listen: Listen{
			Address:       "127.0.0.1:6380",
			MaxClients:    10_000,
			ShutdownGrace: 10 * time.Second,
		},
		Limits: Limits{
			MaxQueryBuffer:            1 * GiB,
			MaxInflightPerClient:      1024,
			MaxInflightBytesPerClient: 64 * MiB,
		},
		Observe: Observe{Address: "127.0.0.1:9180"},
		Admin:   Admin{Address: "127.0.0.1:9181"},
		Health:  Health{ReadyRequires: "none"},
		Redis: Redis{
			URL:            "redis://127.0.0.1:6379/0",
			Timeout:        250 * time.Millisecond,
			DialTimeout:    1 * time.Second,
			FailoverWindow: 1 * time.Hour,
		},
		Postgres: Postgres{
			URL:       "postgres://127.0.0.1:5432/app",
			Timeout:   2 * time.Second,
			MaxReads:  8,
			MaxWrites: 4,
			MaxValue:  32 * MiB,
		},
		Journal: Journal{Poll: 500 * time.Millisecond},
		Breaker: Breaker{Probe: 100 * time.Millisecond, ProbeMax: 1 * time.Second},
		// What would stop the Redis that others use too, hang it for good, or make it another one's replica. What only
		// keeps it busy (KEYS, SAVE, DEBUG SLEEP, CLIENT PAUSE) or changes its data and settings is an ACL's business; so are
		// DEBUG LOADAOF, which ends a Redis without an AOF, and DEBUG RELOAD NOFLUSH, which Redis's own test suite needs.
		Commands: Commands{Deny: []string{
			"shutdown", "replicaof", "slaveof", "failover",
			"module|load", "module|loadex", "module|unload",
			"debug|segfault", "debug|panic", "debug|assert", "debug|oom", "debug|restart", "debug|crash-and-recover",
			"debug|repl-pause", "debug|pause-after-fork",
			"cluster|addslots", "cluster|addslotsrange", "cluster|bumpepoch", "cluster|delslots", "cluster|delslotsrange",
			"cluster|failover", "cluster|flushslots", "cluster|forget", "cluster|meet", "cluster|migrateslots",
			"cluster|migration", "cluster|replicate", "cluster|reset", "cluster|set-config-epoch", "cluster|setslot",
		}},
		Log: Log{Level: "info", Format: "auto"},
		Default: Rules{
			Phase:       "phase1",
			OnUnknown:   "miss",
			WritePolicy: "any",
		},
	}
	c.Routes = []Route{defaultRoute(c.Default, "*")}
	return c
}

// defaultRoute is the route of a configuration that names none.
func defaultRoute(rules Rules, match string) Route {
	r := newRoute(rules)
	r.Name, r.Match = "default", match
	return r
}

// newRoute is a route before its own keys are read.
func newRoute(rules Rules) Route {
	return Route{Rules: rules, Store: Store{Kind: "table"}}
}
