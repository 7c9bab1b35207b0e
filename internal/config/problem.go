package config

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
)

// The names that stand in Problem.File for values that no file holds.
const (
	inEnvironment = "environment"
	onCommandLine = "command line"
	byDefault     = "defaults"
)

// Problem is one mistake in a configuration.
type Problem struct {
	// File is the file as it was named to Load, or "environment", "command line" or "defaults".
	File string
	// Line is the line in File; 0 where there is none.
	Line int
	// Key is the path of the setting (routes[0].ttl), or the variable or flag that set it. It is
	// empty if the mistake concerns the file as a whole.
	Key string
	// Problem says what is wrong, Remedy what to write instead. Neither holds a secret.
	Problem string
	Remedy  string
}

// String is the problem on one line: file:line: key: what is wrong; remedy.
func (p Problem) String() string {
	var b strings.Builder
	b.WriteString(p.File)
	if p.Line > 0 {
		fmt.Fprintf(&b, ":%d", p.Line)
	}
	b.WriteString(": ")
	if p.Key != "" {
		b.WriteString(p.Key + ": ")
	}
	b.WriteString(p.Problem)
	if p.Remedy != "" {
		b.WriteString("; " + p.Remedy)
	}
	return b.String()
}

// Error is what Load returns when it refuses a configuration: all mistakes, those of the file first,
// in the order of its lines.
type Error struct {
	Problems []Problem
}

// Error prints one problem per line.
func (e *Error) Error() string {
	lines := make([]string, len(e.Problems))
	for i, p := range e.Problems {
		lines[i] = p.String()
	}
	return strings.Join(lines, "\n")
}

// sortProblems puts the file before the environment before the command line, each in its own order.
func sortProblems(ps []Problem) {
	layer := func(p Problem) int {
		switch p.File {
		case inEnvironment:
			return 1
		case onCommandLine:
			return 2
		case byDefault:
			return 3
		}
		return 0
	}
	slices.SortStableFunc(ps, func(a, b Problem) int {
		return cmp.Or(cmp.Compare(layer(a), layer(b)), cmp.Compare(a.Line, b.Line))
	})
}

// didYouMean returns the candidate that word was probably meant to be: the nearest one within reach
// of a typing mistake, or the one that word shortens or lengthens. If several are as near it returns
// "", because a wrong guess is worse than none.
func didYouMean(word string, candidates []string) string {
	best, bestDistance := "", max(1, len(word)/3)+1
	word = strings.ToLower(word)
	for _, c := range candidates {
		lower := strings.ToLower(c)
		d := distance(word, lower)
		if min(len(word), len(lower)) >= 3 && (strings.HasPrefix(word, lower) || strings.HasPrefix(lower, word)) {
			d = min(d, 1)
		}
		switch {
		case d < bestDistance:
			best, bestDistance = c, d
		case d == bestDistance:
			best = ""
		}
	}
	return best
}

// distance is the Levenshtein distance of two short words.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			substitute := diagonal
			if a[i] != b[j] {
				substitute++
			}
			diagonal = row[j+1]
			row[j+1] = min(substitute, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}

// anyOf joins words as a sentence would: "a, b or c".
func anyOf(words []string) string {
	if len(words) < 2 {
		return strings.Join(words, "")
	}
	last := len(words) - 1
	return strings.Join(words[:last], ", ") + " or " + words[last]
}
