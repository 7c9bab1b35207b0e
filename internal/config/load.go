package config

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"reflect"
	"strings"

	"go.yaml.in/yaml/v3"
)

// maxFile bounds what is read of a file that someone names by mistake.
const maxFile = 4 << 20

// DefaultPath is the file that is read if nobody names one and it exists.
const DefaultPath = "config.yaml"

// Option adds a layer above the file and the variables that Load knows.
type Option func(*loader)

// Override sets one setting from a flag, above all other layers. The value is text as the file would
// hold it; source is the flag, and problems name it.
func Override(source, key, value string) Option {
	return func(l *loader) { l.overrides = append(l.overrides, override{source, key, value}) }
}

// Environ tells Load the whole environment (os.Environ), so that it can refuse a CACHEPROXY_…
// variable that it does not know. Variables that Kubernetes makes up for a Service of that name
// (CACHEPROXY_SERVICE_HOST and its kin) are let pass.
func Environ(environ []string) Option {
	return func(l *loader) { l.environ = environ }
}

type override struct{ source, key, value string }

// Path returns the file that Load should read and Watch should watch: the one that the flag names, or
// CACHEPROXY_CONFIG, or config.yaml in the working directory if there is one, or none ("").
func Path(flag string, env func(string) (string, bool)) string {
	if flag != "" {
		return flag
	}
	if path, _ := env(fileVariable); path != "" {
		return path
	}
	if _, err := os.Stat(DefaultPath); err == nil {
		return DefaultPath
	}
	return ""
}

// Load reads the file, lays the environment and the options over it and checks the whole. An empty
// path reads no file; see Path. A nil env is an empty environment; otherwise os.LookupEnv fits. A variable that is
// set and empty counts as not set.
//
// The error is an *Error with every problem found. The files that settings name (certificates,
// passwords) are opened here, so that a reload which names a missing one is refused.
func Load(path string, env func(string) (string, bool), options ...Option) (*Config, error) {
	cfg := Defaults()
	l := &loader{
		cfg:     &cfg,
		file:    path,
		origins: map[string]origin{},
		bad:     map[string]bool{},
	}
	for _, o := range options {
		o(l)
	}
	if path != "" {
		if text, err := readBounded(path); err != nil {
			l.report(origin{file: path}, "", "cannot be read: "+reason(err), "name a readable file with --config or "+fileVariable)
		} else {
			l.readFile(text)
		}
	}
	pattern := "*"
	if env != nil {
		pattern = l.readEnvironment(env)
	}
	l.refuseStrangers()
	for _, o := range l.overrides {
		l.set(o.key, o.value, origin{file: onCommandLine, name: o.source})
	}
	// Only now is it known what routes inherit.
	if l.routes != nil {
		l.decodeRoutes(l.routes)
	} else {
		cfg.Routes = []Route{defaultRoute(cfg.Default, pattern)}
	}
	l.check()
	if len(l.problems) > 0 {
		sortProblems(l.problems)
		return nil, &Error{Problems: l.problems}
	}
	return &cfg, nil
}

// loader is one call of Load.
type loader struct {
	cfg  *Config
	file string

	overrides []override
	environ   []string

	routes  *yaml.Node        // the list of routes, decoded last; nil if the file has none
	origins map[string]origin // where each setting that is not a default comes from
	bad     map[string]bool   // settings that could not be read; nothing more is said of them

	problems []Problem
}

// origin is where a value stands.
type origin struct {
	file string
	line int
	// name is the variable or flag, which problems then name in place of the key.
	name string
}

// set assigns a text from outside the file to a setting.
func (l *loader) set(key, text string, at origin) {
	var keys []string
	for path, s := range settings(reflect.ValueOf(l.cfg).Elem()) {
		if s.field.Type.Kind() == reflect.Slice {
			continue // lists are only for the file
		}
		if path == key {
			l.assign(s.field, s.value, path, scalar{text: text}, at)
			return
		}
		keys = append(keys, path)
	}
	remedy := "config.yaml of the distribution lists every setting"
	if near := didYouMean(key, keys); near != "" {
		remedy = "did you mean " + near + "?"
	}
	l.report(at, key, "no setting is called "+key, remedy)
}

// report adds a problem with the value that stands at a place.
func (l *loader) report(at origin, key, problem, remedy string) {
	if at.name != "" {
		key = at.name
	}
	l.problems = append(l.problems, Problem{File: at.file, Line: at.line, Key: key, Problem: problem, Remedy: remedy})
}

// reject reports a setting by its key, wherever its value comes from. A setting that could not even
// be read has its problem already.
func (l *loader) reject(key, problem, remedy string) {
	if l.bad[key] {
		return
	}
	at, ok := l.origins[key]
	if !ok {
		at.file = cmp.Or(l.file, byDefault)
	}
	l.report(at, key, problem, remedy)
}

// given reports whether some layer sets the key.
func (l *loader) given(key string) bool {
	_, ok := l.origins[key]
	return ok
}

// readBounded reads a file that should be small. It refuses pipes and terminals, on which it could
// wait for ever and which cannot be read a second time.
func readBounded(path string) ([]byte, error) {
	info, err := os.Stat(path)
	switch {
	case err != nil:
		return nil, err
	case info.IsDir():
		return nil, errors.New("is a directory")
	case !info.Mode().IsRegular() && path != os.DevNull:
		return nil, errors.New("is not a regular file")
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err == nil && len(text) > maxFile {
		err = fmt.Errorf("is larger than %d MiB", maxFile>>20)
	}
	return text, err
}

// reason is an error of the file system without the path, which the problem's own words name.
func reason(err error) string {
	if pathErr, ok := errors.AsType[*fs.PathError](err); ok {
		err = pathErr.Err
	}
	return err.Error()
}

// firstLine is a secret as files hold it: without the newline that editors add.
func firstLine(text []byte) string {
	line, _, _ := bytes.Cut(text, []byte("\n"))
	return strings.TrimSuffix(string(line), "\r")
}
