package main

import (
	"bytes"
	"context"
	"embed"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"

	"cacheproxy/internal/command/internal/scratch"
)

// later are the servers whose records complete the table, the one that is believed first. A record has the commands that
// a server has and Redis 7.0.15 lacks, or has with other facts.
var later = []string{"redis-8.6.3", "valkey-9.1.2"}

//go:embed later
var records embed.FS

// recorded is a row as a record has it, one on each line.
type recorded struct {
	Name  string   `json:"name"`
	Since string   `json:"since,omitempty"`
	Arity int      `json:"arity"`
	Flags []string `json:"flags"`
	Keys  [3]int   `json:"keys"`
	ACL   []string `json:"acl"`
	Tips  []string `json:"tips,omitempty"`
	Specs []struct {
		Flags   []string       `json:"flags"`
		Begin   string         `json:"begin"`
		Keyword string         `json:"keyword,omitempty"`
		Find    string         `json:"find"`
		Args    map[string]int `json:"args"`
	} `json:"specs,omitempty"`
}

func toRecorded(c row) recorded {
	r := recorded{Name: c.name, Since: c.since, Arity: c.arity, Flags: c.flags, Keys: [3]int{c.first, c.last, c.step}, ACL: c.acl, Tips: c.tips}
	for _, s := range c.specs {
		r.Specs = append(r.Specs, struct {
			Flags   []string       `json:"flags"`
			Begin   string         `json:"begin"`
			Keyword string         `json:"keyword,omitempty"`
			Find    string         `json:"find"`
			Args    map[string]int `json:"args"`
		}{s.flags, s.begin, s.keyword, s.find, s.args})
	}
	return r
}

func (r recorded) row() row {
	c := row{name: r.Name, since: r.Since, arity: r.Arity, flags: r.Flags, first: r.Keys[0], last: r.Keys[1], step: r.Keys[2], acl: r.ACL, tips: r.Tips}
	for _, s := range r.Specs {
		c.specs = append(c.specs, keySpec{flags: s.Flags, begin: s.Begin, keyword: s.Keyword, find: s.Find, args: s.Args})
	}
	return c
}

// readRecord returns the rows of a record in the form that the table takes them.
func readRecord(name string) ([]row, error) {
	text, err := records.ReadFile("later/" + name + ".jsonl")
	if err != nil {
		return nil, err
	}
	var rows []row
	for line := range bytes.Lines(text) {
		var r recorded
		if err := json.Unmarshal(line, &r); err != nil {
			return nil, fmt.Errorf("read the record of %s: %w", name, err)
		}
		rows = append(rows, believe(r.row()))
	}
	return rows, nil
}

// believe corrects what modules say of themselves. Redis declares every key of a module's command read and written, also
// of one that is flagged read-only, and lets modules stay out of the ACL categories that follow from their flags.
func believe(c row) row {
	if !slices.Contains(c.flags, "module") {
		return c
	}
	if slices.Contains(c.flags, "readonly") {
		for i, s := range c.specs {
			if slices.Contains(s.flags, "RW") {
				c.specs[i].flags = []string{"RO", "access"}
			}
		}
	}
	if len(c.acl) == 0 {
		c.acl = implied(c.flags)
	}
	return c
}

// record asks a later server and writes down in what it differs from the installed one.
func record(ctx context.Context, program, dir string) error {
	base, err := scratch.Start(ctx)
	if err != nil {
		return err
	}
	defer base.Stop()
	old, err := ask(ctx, base)
	if err != nil {
		return err
	}
	server, err := scratch.StartProgram(ctx, program)
	if err != nil {
		return err
	}
	defer server.Stop()
	name, err := server.Product(ctx)
	if err != nil {
		return err
	}
	rows, err := ask(ctx, server)
	if err != nil {
		return err
	}
	known := make(map[string]row)
	for _, c := range old {
		known[c.name] = c
	}
	slices.SortFunc(rows, func(a, b row) int { return strings.Compare(a.name, b.name) })
	var text bytes.Buffer
	for _, c := range rows {
		was, ok := known[c.name]
		if ok && same(was, c) {
			continue
		}
		if !ok {
			c.since = since(ctx, server, c.name)
		}
		line, err := json.Marshal(toRecorded(c))
		if err != nil {
			return err
		}
		text.Write(append(line, '\n'))
	}
	return os.WriteFile(filepath.Join(dir, name+".jsonl"), text.Bytes(), 0o644)
}

// same compares rows; the server sends sets in any order.
func same(a, b row) bool {
	for _, c := range []*row{&a, &b} {
		c.flags, c.acl, c.tips = slices.Sorted(slices.Values(c.flags)), slices.Sorted(slices.Values(c.acl)), slices.Sorted(slices.Values(c.tips))
		c.specs = slices.Clone(c.specs)
		for i := range c.specs {
			c.specs[i].flags = slices.Sorted(slices.Values(c.specs[i].flags))
		}
	}
	return reflect.DeepEqual(a, b)
}

// since is the version that brought a command, as COMMAND DOCS tells; "" if it does not.
func since(ctx context.Context, server *scratch.Server, name string) string {
	docs, err := server.Do(ctx, "command", "docs", name).Slice()
	if err != nil || len(docs) != 2 {
		return ""
	}
	fields, ok := docs[1].([]any)
	if !ok {
		return ""
	}
	for i := 0; i+1 < len(fields); i += 2 {
		if fields[i] == "since" {
			version, _ := fields[i+1].(string)
			return version
		}
	}
	return ""
}
