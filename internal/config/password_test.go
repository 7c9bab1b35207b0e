package config

import (
	"os"
	"path/filepath"
	"testing"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
)

// What a password file says at the moment counts, and while it says nothing, what it said last. That is logged once.
func TestPasswordIsReadAnew(t *testing.T) {
	if Password("redis.password_file", "", zap.NewNop()) != nil {
		t.Error("there is something to read without a file")
	}
	path := filepath.Join(t.TempDir(), "password")
	holds := func(text string) func() {
		return func() {
			if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	gone := func() {
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
	const cannot, can = "a password file cannot be used; the password that was read last is kept", "the password file can be used again"
	core, logs := observer.New(zapcore.DebugLevel)
	read := Password("redis.password_file", path, zap.New(core))
	for _, c := range []struct {
		name         string
		now          func()
		want         string
		says, reason string
	}{
		{"no file yet", func() {}, "", cannot, "no such file or directory"},
		{"a file", holds("first\nsecond line\n"), "first", can, ""},
		{"another password", holds("second\r\n"), "second", "", ""},
		{"no file any more", gone, "second", cannot, "no such file or directory"},
		{"an empty file", holds("\nthird\n"), "second", cannot, "the first line of the file is empty"},
		{"a password again", holds("fourth"), "fourth", can, ""},
	} {
		c.now()
		for range 3 {
			if got := read(); got != c.want {
				t.Errorf("%s: read %q, want %q", c.name, got, c.want)
			}
		}
		said := logs.TakeAll()
		if c.says == "" && len(said) == 0 {
			continue
		}
		if len(said) != 1 || said[0].Message != c.says || said[0].ContextMap()["setting"] != "redis.password_file" {
			t.Errorf("%s: logged %+v", c.name, said)
		} else if reason, _ := said[0].ContextMap()["reason"].(string); reason != c.reason {
			t.Errorf("%s: the reason is %q, want %q", c.name, reason, c.reason)
		}
	}
}

// A password that was changed in its file waits for no restart; one that was changed where it stands in the configuration does.
func TestDiffOfPasswords(t *testing.T) {
	with := func(password string, inFiles bool) *Config {
		c := Defaults()
		c.Listen.Password = password
		c.Redis.URL, c.Postgres.URL = "redis://:"+password+"@127.0.0.1:6379/0", "postgres://app:"+password+"@127.0.0.1/app"
		if inFiles {
			c.Listen.PasswordFile, c.Redis.PasswordFile, c.Postgres.PasswordFile = "/a", "/b", "/c"
		}
		return &c
	}
	before := with("one", true)
	if got := Diff(before, with("two", true)); got != nil {
		t.Errorf("in files: %v", got)
	}
	if before.Listen.Password != "one" || before.Redis.URL != with("one", true).Redis.URL {
		t.Error("the comparison has changed what it compares")
	}
	if got := Diff(with("one", false), with("two", false)); len(got) != 3 {
		t.Errorf("in the configuration: %v", got)
	}
}
