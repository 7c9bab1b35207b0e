package policy

import (
	"errors"
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"
)

// maxIdentifier is the longest name, in bytes, that Postgres keeps; it cuts longer ones.
const maxIdentifier = 63

// ParseTable reads the name of a table as an operator writes it: schema.table, each as it stands in the catalogue, or in
// double quotes if it holds a dot or a quote (doubled there). Without a schema it is public. Nothing is folded to lower case.
func ParseTable(text string) (schema, table string, err error) {
	var names []string
	rest := text
	for {
		var name string
		if strings.HasPrefix(rest, `"`) {
			var b strings.Builder
			i := 1
			for ; ; i++ {
				if i == len(rest) {
					return "", "", errors.New("a quote is never closed")
				}
				if rest[i] == '"' {
					if i+1 == len(rest) || rest[i+1] != '"' {
						break
					}
					i++
				}
				b.WriteByte(rest[i])
			}
			name, rest = b.String(), rest[i+1:]
			if rest != "" && rest[0] != '.' {
				return "", "", errors.New("something follows a closing quote")
			}
		} else {
			end := strings.IndexByte(rest, '.')
			if end < 0 {
				end = len(rest)
			}
			name, rest = rest[:end], rest[end:]
		}
		if err := CheckIdentifier(name); err != nil {
			return "", "", err
		}
		names = append(names, name)
		if rest == "" {
			break
		}
		rest = rest[1:]
	}
	switch len(names) {
	case 1:
		return "public", names[0], nil
	case 2:
		return names[0], names[1], nil
	}
	return "", "", errors.New("it has more than a schema and a table")
}

// CheckIdentifier says why name cannot be that of a schema, a table or a column.
func CheckIdentifier(name string) error {
	switch {
	case name == "":
		return errors.New("a name is empty")
	case len(name) > maxIdentifier:
		return fmt.Errorf("a name has %d bytes; Postgres keeps %d", len(name), maxIdentifier)
	case !utf8.ValidString(name) || strings.ContainsFunc(name, unicode.IsControl):
		return errors.New("a name is not UTF-8, or holds a control character")
	}
	return nil
}
