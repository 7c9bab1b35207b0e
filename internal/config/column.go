package config

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"cacheproxy/policy"
)

// ColumnRoute is a route whose store is a column of the application's own.
type ColumnRoute struct {
	Route string
	Store Store
	// Keys are the key columns in the order of the template's placeholders.
	Keys     []string
	Template *policy.Template
}

// ColumnRoutes are the routes whose store is a column. The receiver must come from Load.
func (c *Config) ColumnRoutes() []ColumnRoute {
	var out []ColumnRoute
	for _, r := range c.Routes {
		if t := r.template(); t != nil {
			out = append(out, ColumnRoute{Route: r.Name, Store: r.Store, Keys: r.Store.keys(t), Template: t})
		}
	}
	return out
}

// template is the pattern of a route whose store is a column; nil for other routes, and for patterns that Load refuses.
func (r *Route) template() *policy.Template {
	if r.Store.Kind != "column" {
		return nil
	}
	t, err := policy.ParseTemplate(r.Match)
	if err != nil {
		return nil
	}
	return t
}

// place says where the column of a route is; "" for other routes.
func (r *Route) place() string {
	if r.Store.Kind != "column" {
		return ""
	}
	return "column " + r.Store.ValueColumn + " of table " + r.Store.Table
}

// keys are the columns of the template's placeholders.
func (s *Store) keys(t *policy.Template) []string {
	if s.KeyColumn != "" {
		return []string{s.KeyColumn}
	}
	keys := t.Names()
	for i, name := range keys {
		keys[i] = s.KeyColumns[name]
	}
	return keys
}

// checkTable reports what only a column has.
func (l *loader) checkTable(s Store, path string) {
	for _, c := range []struct {
		key   string
		given bool
	}{
		{"table", s.Table != ""},
		{"key_column", s.KeyColumn != ""},
		{"key_columns", s.KeyColumns != nil},
		{"value_column", s.ValueColumn != ""},
		{"expires_column", s.ExpiresColumn != ""},
		{"updated_column", s.UpdatedColumn != ""},
	} {
		if c.given && !l.bad[path+".kind"] {
			l.reject(path+"."+c.key, "belongs to a column, and this store is the proxy's own table", "write kind: column beside it, or remove it")
		}
	}
}

// checkColumn reports what is wrong with a route whose store is a column, as far as the file shows it.
func (l *loader) checkColumn(r Route, route string) {
	path := route + ".store"
	for _, key := range []string{".table", ".key_column", ".value_column"} {
		if !l.given(path + key) { // what is missing is missing where the kind stands
			l.origins[path+key] = l.origins[path+".kind"]
		}
	}
	s := r.Store
	if s.Table == "" {
		l.reject(path+".table", "is missing", "name the table that has the column, as in public.reports")
	} else if schema, _, err := policy.ParseTable(s.Table); err != nil {
		l.reject(path+".table", "is no name of a table: "+err.Error(), `write schema.table, with double quotes around what has dots, as in public."my.table"`)
	} else if schema == "cacheproxy" || schema == "pg_catalog" || schema == "information_schema" {
		l.reject(path+".table", "is in the schema "+schema+", where no table of the application's is", "name the table that has the column")
	}
	if s.ValueColumn == "" {
		l.reject(path+".value_column", "is missing", "name the column of type jsonb that holds the values")
	}
	l.checkKeyColumns(r, route)
	for _, c := range []struct{ key, name string }{
		{".key_column", s.KeyColumn}, {".value_column", s.ValueColumn}, {".expires_column", s.ExpiresColumn}, {".updated_column", s.UpdatedColumn},
	} {
		if c.name != "" {
			if err := policy.CheckIdentifier(c.name); err != nil {
				l.reject(path+c.key, "is no name of a column: "+err.Error(), "write it as it stands in the catalogue, without quotes of SQL")
			}
		}
	}
	l.checkEachColumnOnce(s, path)
}

// checkKeyColumns reports what is wrong with the template, and with the columns that its placeholders stand for.
func (l *loader) checkKeyColumns(r Route, route string) {
	path, s := route+".store", r.Store
	if s.KeyColumn == "" && s.KeyColumns == nil && !l.bad[path+".key_columns"] {
		l.reject(path+".key_column", "is missing", "name the column that {placeholder} in match stands for, or write key_columns: {name: column} for several")
	}
	if s.KeyColumn != "" && s.KeyColumns != nil {
		l.reject(path+".key_columns", "is set together with key_column", "remove one of them")
	}
	if checkPattern(r.Match) != nil {
		return // and checkMatch says so
	}
	t, err := policy.ParseTemplate(r.Match)
	if err != nil {
		l.reject(route+".match", "is no pattern for a column: "+err.Error(), "see config.yaml of the distribution")
		l.bad[route+".match"] = true
		return
	}
	names := t.Names()
	if s.KeyColumn != "" && len(names) > 1 {
		l.reject(path+".key_column", fmt.Sprintf("is one column, and match has the placeholders %s", list(names)),
			fmt.Sprintf("write key_columns: {%s: column, …}", names[0]))
	}
	if s.KeyColumns == nil || l.bad[path+".key_columns"] {
		return
	}
	for _, name := range names {
		switch column, ok := s.KeyColumns[name]; {
		case !ok:
			l.reject(path+".key_columns", "has no column for {"+name+"} of match", "add "+name+": column")
		case !l.bad[join(path+".key_columns", name)]:
			if err := policy.CheckIdentifier(column); err != nil {
				l.reject(join(path+".key_columns", name), "is no name of a column: "+err.Error(), "write it as it stands in the catalogue, without quotes of SQL")
			}
		}
	}
	for _, name := range slices.Sorted(maps.Keys(s.KeyColumns)) {
		if !slices.Contains(names, name) {
			l.reject(join(path+".key_columns", name), "is no placeholder of match", "match has "+list(names))
		}
	}
}

func list(names []string) string { return "{" + strings.Join(names, "}, {") + "}" }

// checkEachColumnOnce reports a column that is named for two purposes.
func (l *loader) checkEachColumnOnce(s Store, path string) {
	type use struct{ key, column string }
	uses := []use{{path + ".key_column", s.KeyColumn}}
	for _, name := range slices.Sorted(maps.Keys(s.KeyColumns)) {
		uses = append(uses, use{join(path+".key_columns", name), s.KeyColumns[name]})
	}
	uses = append(uses, use{path + ".value_column", s.ValueColumn}, use{path + ".expires_column", s.ExpiresColumn}, use{path + ".updated_column", s.UpdatedColumn})
	first := map[string]string{}
	for _, u := range uses {
		if u.column == "" {
			continue
		}
		if other, taken := first[u.column]; taken {
			l.reject(u.key, fmt.Sprintf("%s is also %s", u.column, strings.TrimPrefix(other, path+".")), "name another column")
			continue
		}
		first[u.column] = u.key
	}
}

// checkColumnsOnce reports a column that two routes have: a row would have two keys, and two copies in Redis.
func (l *loader) checkColumnsOnce() {
	type column struct{ schema, table, value string }
	first := map[column]int{}
	for i, r := range l.cfg.Routes {
		schema, table, err := policy.ParseTable(r.Store.Table)
		if r.Store.Kind != "column" || r.Store.ValueColumn == "" || err != nil {
			continue
		}
		c := column{schema, table, r.Store.ValueColumn}
		if other, taken := first[c]; taken {
			l.reject(fmt.Sprintf("routes[%d].store.value_column", i), fmt.Sprintf("is also the column of routes[%d]: a row would have two keys", other),
				"remove one of the two routes")
			continue
		}
		first[c] = i
	}
}

// checkShadowed reports a route above that has some of a column's keys: a row of the column would have no key then, or
// one that is not its own.
func (l *loader) checkShadowed(i int, path string) {
	r := l.cfg.Routes[i]
	t := r.template()
	for j, above := range l.cfg.Routes[:i] {
		at := fmt.Sprintf("routes[%d]", j)
		other, isColumn := above.Match, above.Store.Kind == "column"
		if u := above.template(); u != nil {
			other = u.Glob()
		}
		if t == nil || l.bad[at] || l.bad[at+".match"] || above.Match == "" || isColumn && above.template() == nil {
			continue
		}
		switch {
		case isColumn && policy.Overlap(t.Glob(), other):
			l.reject(path+".match", fmt.Sprintf("has keys that %s above has too, and a row of each would have the same key", at),
				"give the two patterns different text before, between or behind the placeholders")
		case policy.Overlap(t.Glob(), other):
			l.reject(path+".match", fmt.Sprintf("has keys that go to %s above", at), "move this route above it")
		default:
			continue
		}
		return
	}
}
