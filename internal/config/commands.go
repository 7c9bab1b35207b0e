package config

import (
	"fmt"
	"slices"
	"strings"

	"cacheproxy/internal/command"
	"cacheproxy/policy"
)

// ownCommand is answered by the proxy and may be denied too.
const ownCommand = "cacheproxy"

const denyForms = "write a command (shutdown), a subcommand (module|load) or an ACL category (\"@dangerous\")"

// checkDeny reports the entries of commands.deny that deny nothing: a misspelt one would leave open what it was meant to
// close. Commands of modules, which have a dot in their name, and globs may mean what this version does not know.
func (l *loader) checkDeny() {
	if l.bad["commands.deny"] {
		return
	}
	for i, entry := range l.cfg.Commands.Deny {
		if at := fmt.Sprintf("commands.deny[%d]", i); !l.bad[at] {
			l.refuse(at, checkDenyEntry(entry))
		}
	}
}

func checkDenyEntry(entry string) *mistake {
	r, err := policy.ParseDenyRule(entry)
	if err != nil {
		return &mistake{fmt.Sprintf("%q %v", entry, err), denyForms}
	}
	if r.Glob() {
		return nil
	}
	if category := r.Category(); category != "" {
		if slices.Contains(command.Categories(), category) {
			return nil
		}
		remedy := "ACL CAT of a Redis lists the categories"
		if near := didYouMean(category, command.Categories()); near != "" {
			remedy = "did you mean \"@" + near + "\"?"
		}
		return &mistake{fmt.Sprintf("%q is no ACL category", "@"+category), remedy}
	}
	name, sub, joined := strings.Cut(r.String(), "|")
	if strings.Contains(name, ".") || name == ownCommand {
		return nil // a module's: its subcommands are not known either
	}
	known := command.Lookup([]byte(name))
	switch {
	case known == nil:
		return unknownCommand(name, commandNames(func(n string) (string, bool) { return n, !strings.Contains(n, "|") }), "")
	case !joined:
		return nil
	}
	subs := commandNames(func(n string) (string, bool) { return strings.CutPrefix(n, name+"|") })
	if name == "debug" {
		subs = command.DebugWords()
	}
	if len(subs) == 0 {
		return &mistake{fmt.Sprintf("%q: %s has no subcommands", r, name), "write " + name + " to deny it whatever its arguments"}
	}
	if slices.Contains(subs, sub) {
		return nil
	}
	return unknownCommand(sub, subs, name+"|")
}

// unknownCommand is the mistake of an entry whose last word is none of those known.
func unknownCommand(word string, known []string, before string) *mistake {
	remedy := denyForms + fmt.Sprintf("; if a newer server has it, make it a glob: %q", before+word[:len(word)-1]+"["+word[len(word)-1:]+"]")
	if near := didYouMean(word, known); near != "" {
		remedy = "did you mean " + before + near + "?"
	}
	return &mistake{fmt.Sprintf("%q is no command that is known, so it would deny nothing", before+word), remedy}
}

// commandNames returns what keep makes of the names in the command table.
func commandNames(keep func(name string) (string, bool)) []string {
	var names []string
	for _, info := range command.All() {
		if name, ok := keep(info.Name); ok {
			names = append(names, name)
		}
	}
	return names
}
