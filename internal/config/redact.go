package config

import (
	"reflect"
	"slices"
	"strings"
)

// hidden stands where a secret was.
const hidden = "xxxxx"

// Redacted is a copy fit for printing: the same configuration without its secrets. yaml.Marshal
// writes it as a file that Load would read.
func (c *Config) Redacted() *Config {
	copied := *c
	copied.Routes, copied.Commands.Deny = slices.Clone(c.Routes), slices.Clone(c.Commands.Deny)
	for _, s := range settings(reflect.ValueOf(&copied).Elem()) {
		switch s.field.Tag.Get("secret") {
		case "text":
			if s.value.String() != "" {
				s.value.SetString(hidden)
			}
		case "url":
			s.value.SetString(redactURL(s.value.String()))
		}
	}
	copied.leaveOut()
	return &copied
}

// leaveOut takes out the passwords that stand in files.
func (c *Config) leaveOut() {
	if c.Listen.PasswordFile != "" {
		c.Listen.Password = ""
	}
	if c.Redis.PasswordFile != "" {
		c.Redis.URL = splitURL(c.Redis.URL).without()
	}
	if c.Postgres.PasswordFile != "" {
		c.Postgres.URL = splitURL(c.Postgres.URL).without()
	}
}

// redactURL hides the password of a URL and every parameter that may be one. It must not fail, so it
// cuts the text itself, and hides a text whole if it cannot tell where the password ends.
func redactURL(raw string) string {
	if raw == "" {
		return ""
	}
	scheme, rest, ok := strings.Cut(raw, "://")
	if !ok {
		return hidden
	}
	authority, _, _ := strings.Cut(rest, "/")
	at := strings.LastIndexByte(authority, '@') + 1 // what stands before it are the credentials
	location, query, hasQuery := strings.Cut(rest[at:], "?")
	credentials := rest[:at]
	if strings.Contains(credentials, "?") || strings.Contains(location, "@") {
		return scheme + "://" + hidden
	}
	if user, _, hasPassword := strings.Cut(credentials, ":"); hasPassword {
		credentials = user + ":" + hidden + "@"
	}
	if hasQuery {
		query = "?" + redactQuery(query)
	}
	return scheme + "://" + credentials + location + query
}

func redactQuery(query string) string {
	params := strings.Split(query, "&")
	for i, p := range params {
		name, _, _ := strings.Cut(p, "=")
		for _, word := range []string{"pass", "secret", "token"} {
			if strings.Contains(strings.ToLower(name), word) {
				params[i] = name + "=" + hidden
			}
		}
	}
	return strings.Join(params, "&")
}
