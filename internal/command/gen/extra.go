package main

import "strings"

// extra has the commands of Redis 8.8, which was not at hand to be recorded, with the facts of its src/commands. A command that
// is missing here is unknown to the proxy, which then asks the server; a fact that is wrong here is believed. So what is not
// certain stays out (what is still in development, and what a build may lack), and so do the commands of modules that need not
// be loaded: JSON, search, time series, Bloom filters.
var extra = []row{
	keyed("8.8.0", "arcount", 2, "readonly fast", "array", "RO access"),
	keyed("8.8.0", "ardel", -3, "write fast", "array", "RW delete"),
	keyed("8.8.0", "ardelrange", -4, "write", "array", "RW delete"),
	keyed("8.8.0", "arget", 3, "readonly fast", "array", "RO access"),
	keyed("8.8.0", "argetrange", 4, "readonly", "array", "RO access"),
	keyed("8.8.0", "argrep", -6, "readonly", "array", "RO access"),
	keyed("8.8.0", "arinfo", -2, "readonly", "array", "RO access"),
	keyed("8.8.0", "arinsert", -3, "write denyoom fast", "array", "RW update"),
	keyed("8.8.0", "arlastitems", -3, "readonly", "array", "RO access"),
	keyed("8.8.0", "arlen", 2, "readonly fast", "array", "RO access"),
	keyed("8.8.0", "armget", -3, "readonly fast", "array", "RO access"),
	keyed("8.8.0", "armset", -4, "write denyoom fast", "array", "RW update"),
	keyed("8.8.0", "arnext", 2, "readonly fast", "array", "RO access"),
	keyed("8.8.0", "arop", -5, "readonly", "array", "RO access"),
	keyed("8.8.0", "arring", -4, "write denyoom", "array", "RW update"),
	keyed("8.8.0", "arscan", -4, "readonly", "array", "RO access"),
	keyed("8.8.0", "arseek", 3, "write fast", "array", "RW update"),
	keyed("8.8.0", "arset", -4, "write denyoom fast", "array", "RW update"),
	keyed("8.8.0", "increx", -2, "write denyoom fast", "string", "RW access update"),
	keyed("8.8.0", "xnack", -7, "write fast", "stream", "RW update"),
}

// plain is a command without keys. Flags and categories are lists of words; those categories that follow from the
// flags are added as Redis adds them.
func plain(since, name string, arity int, flags, categories string, tips ...string) row {
	c := row{since: since, name: name, arity: arity, flags: strings.Fields(flags), tips: tips}
	for _, category := range strings.Fields(categories) {
		c.acl = append(c.acl, "@"+category)
	}
	c.acl = append(c.acl, implied(c.flags)...)
	return c
}

// implied are the categories that follow from flags.
func implied(flags []string) []string {
	var acl []string
	speed := "@slow"
	for _, flag := range flags {
		switch flag {
		case "write":
			acl = append(acl, "@write")
		case "readonly":
			acl = append(acl, "@read")
		case "admin":
			acl = append(acl, "@admin", "@dangerous")
		case "blocking":
			acl = append(acl, "@blocking")
		case "fast":
			speed = "@fast"
		}
	}
	return append(acl, speed)
}

// keyed is a command with one key, right behind its name.
func keyed(since, name string, arity int, flags, categories, keyFlags string, tips ...string) row {
	c := plain(since, name, arity, flags, categories, tips...)
	c.first, c.last, c.step = 1, 1, 1
	c.specs = []keySpec{{
		flags: strings.Fields(keyFlags),
		begin: "index",
		find:  "range",
		args:  map[string]int{"index": 1, "lastkey": 0, "keystep": 1, "limit": 0},
	}}
	return c
}
