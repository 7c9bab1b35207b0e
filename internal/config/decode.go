package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
)

// notSupported is said of what the design has and this version lacks: to know it and refuse it is kinder than to call it unknown.
const notSupported = "not supported by this version"

// readFile decodes the file's text over the defaults. The routes stay behind in l.routes until the
// layers above the file have had their say about the defaults that routes share.
func (l *loader) readFile(text []byte) {
	dec := yaml.NewDecoder(bytes.NewReader(text))
	var doc yaml.Node
	switch err := dec.Decode(&doc); {
	case errors.Is(err, io.EOF):
		return // an empty file, or comments only: the defaults
	case err != nil:
		l.syntax(text, err)
		return
	}
	if err := dec.Decode(new(yaml.Node)); err == nil {
		l.report(origin{file: l.file}, "", "holds more than one YAML document", "remove all but one, and the --- between them")
	} else if !errors.Is(err, io.EOF) {
		l.syntax(text, err)
	}
	root := resolve(doc.Content[0])
	if root.Tag == "!!null" && root.Kind == yaml.ScalarNode {
		return
	}
	l.mapping(root, reflect.ValueOf(l.cfg).Elem(), "")
}

var syntaxLine = regexp.MustCompile(`^line (\d+): `)

// syntax reports what the YAML parser could not read. It stops at its first error, so this is the
// only kind of mistake that hides others.
func (l *loader) syntax(text []byte, err error) {
	what := strings.TrimPrefix(err.Error(), "yaml: ")
	at := origin{file: l.file}
	if m := syntaxLine.FindStringSubmatch(what); m != nil {
		at.line, _ = strconv.Atoi(m[1])
		what = what[len(m[0]):]
	}
	remedy := "check the indentation, the colons and the quotes here and on the line above"
	if bytes.Contains(text, []byte("\n\t")) {
		remedy = "indent with spaces, YAML allows no tabs"
	}
	l.report(at, "", "not YAML: "+what, remedy)
}

// resolve follows an alias to what it stands for.
func resolve(n *yaml.Node) *yaml.Node {
	for n.Kind == yaml.AliasNode {
		n = n.Alias
	}
	return n
}

// describe names a node's kind as an operator would.
func describe(n *yaml.Node) string {
	switch n.Kind {
	case yaml.MappingNode:
		return "a section"
	case yaml.SequenceNode:
		return "a list"
	}
	return "a single value"
}

// mapping decodes the section n into the struct v. The depth of the recursion is that of the struct,
// whatever anchors and aliases the file plays with.
func (l *loader) mapping(n *yaml.Node, v reflect.Value, path string) {
	if n.Kind != yaml.MappingNode {
		l.report(l.at(n), path, "is "+describe(n)+" and should be a section of keys", "write key: value lines, indented, below it")
		l.bad[path] = true
		return
	}
	fields := fieldsOf(v.Type())
	seen := map[string]int{}
	var strangers [][2]*yaml.Node
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, value := n.Content[i], resolve(n.Content[i+1])
		at := join(path, key.Value)
		if first, twice := seen[key.Value]; twice {
			l.report(l.at(key), at, fmt.Sprintf("is set twice, first on line %d", first), "remove one")
			continue
		}
		seen[key.Value] = key.Line
		f, ok := fields[key.Value]
		if !ok {
			strangers = append(strangers, [2]*yaml.Node{key, value})
			continue
		}
		l.field(f, value, v.FieldByIndex(f.Index), at)
	}
	for _, s := range strangers {
		l.unknown(s[0], path, fields)
	}
}

// field decodes one key's value.
func (l *loader) field(f reflect.StructField, value *yaml.Node, into reflect.Value, path string) {
	switch {
	case f.Type == wordsType:
		l.words(value, into, path)
	case f.Type.Kind() == reflect.Slice:
		l.routes = value
	case f.Type.Kind() == reflect.Map:
		l.names(value, into, path)
	case f.Type.Kind() == reflect.Struct:
		if value.Tag != "!!null" { // a section whose keys are all commented out
			l.mapping(value, into, path)
		}
	case value.Kind != yaml.ScalarNode:
		l.report(l.at(value), path, "is "+describe(value)+" and should be a single value", "write it on one line as "+path[strings.LastIndexByte(path, '.')+1:]+": value")
		l.bad[path] = true
	default:
		l.assign(f, into, path, scalar{value.Value, value.ShortTag()}, l.at(value))
	}
}

var wordsType = reflect.TypeFor[[]string]()

// words decodes a list of single values. What they must be is said by check.
func (l *loader) words(n *yaml.Node, into reflect.Value, path string) {
	l.origins[path] = l.at(n)
	if n.Kind != yaml.SequenceNode {
		what, remedy := "is "+describe(n)+" and should be a list", "write it in brackets, as in [a, b], or one - entry on each line"
		if n.Tag == "!!null" {
			what, remedy = "has no value", "write [] for none, or remove the key to get the default"
		}
		l.report(l.at(n), path, what, remedy)
		l.bad[path] = true
		return
	}
	list := []string{}
	for i, entry := range n.Content {
		entry = resolve(entry)
		at := fmt.Sprintf("%s[%d]", path, i)
		l.origins[at] = l.at(entry)
		if entry.Kind != yaml.ScalarNode || entry.Tag == "!!null" {
			l.report(l.at(entry), at, "is not a single value", "write one command, or remove the entry")
			l.bad[at] = true
		}
		list = append(list, entry.Value)
	}
	into.Set(reflect.ValueOf(list))
}

// names decodes a section whose keys the operator chooses.
func (l *loader) names(n *yaml.Node, into reflect.Value, path string) {
	l.origins[path] = l.at(n)
	if n.Kind != yaml.MappingNode {
		l.report(l.at(n), path, "is "+describe(n)+" and should be a section of keys", "write {name: column} with one for each placeholder")
		l.bad[path] = true
		return
	}
	out := map[string]string{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, value := n.Content[i], resolve(n.Content[i+1])
		at := join(path, key.Value)
		if _, twice := out[key.Value]; twice {
			l.report(l.at(key), at, "is set twice", "remove one")
			continue
		}
		l.origins[at] = l.at(key)
		if value.Kind != yaml.ScalarNode || value.Tag == "!!null" {
			l.report(l.at(value), at, "is no name of a column", "write the column's name behind it")
			l.bad[at] = true
		}
		out[key.Value] = value.Value
	}
	into.Set(reflect.ValueOf(out))
}

// assign parses one value into its field, or reports why it cannot be.
func (l *loader) assign(f reflect.StructField, into reflect.Value, path string, s scalar, at origin) {
	l.origins[path] = at
	v, bad := parse(f, s)
	if bad != nil {
		l.report(at, path, bad.problem, bad.remedy)
		l.bad[path] = true
		return
	}
	delete(l.bad, path)
	into.Set(v)
}

// decodeRoutes decodes the list of routes, each over the rules that routes share.
func (l *loader) decodeRoutes(n *yaml.Node) {
	l.cfg.Routes = []Route{}
	if n.Kind != yaml.SequenceNode {
		remedy := "write one - name: … entry for each route"
		what := "is " + describe(n) + " and should be a list"
		if n.Tag == "!!null" {
			what, remedy = "has no value", "write routes: [] for none, or remove the key to get the default route"
		}
		l.report(l.at(n), "routes", what, remedy)
		return
	}
	for i, entry := range n.Content {
		entry = resolve(entry)
		path := fmt.Sprintf("routes[%d]", i)
		l.origins[path] = l.at(entry)
		r := newRoute(l.cfg.Default)
		l.mapping(entry, reflect.ValueOf(&r).Elem(), path)
		l.cfg.Routes = append(l.cfg.Routes, r)
	}
}

// unknown reports a key that no setting has: as misspelt, as misplaced, or as unknown altogether.
func (l *loader) unknown(key *yaml.Node, path string, siblings map[string]reflect.StructField) {
	full := join(path, key.Value)
	if key.Value == "<<" {
		l.report(l.at(key), full, "merge keys are not supported", "write the keys out; what routes share goes under default:")
		return
	}
	remedy := "remove it; config.yaml of the distribution lists every setting"
	if name := didYouMean(key.Value, slices.Sorted(maps.Keys(siblings))); name != "" {
		remedy = "did you mean " + join(path, name) + "?"
	} else if elsewhere := l.elsewhere(key.Value); elsewhere != "" {
		remedy = "did you mean " + elsewhere + "?"
	}
	l.report(l.at(key), full, "unknown key", remedy)
}

// elsewhere returns the only setting of that name, wherever it is, or "".
func (l *loader) elsewhere(name string) string {
	found := ""
	for path := range settings(reflect.ValueOf(l.cfg).Elem()) {
		if path[strings.LastIndexByte(path, '.')+1:] == name {
			if found != "" {
				return ""
			}
			found = path
		}
	}
	return found
}

// at is the place of a node in the file.
func (l *loader) at(n *yaml.Node) origin { return origin{file: l.file, line: n.Line} }

func join(path, key string) string {
	if path == "" {
		return key
	}
	return path + "." + key
}
