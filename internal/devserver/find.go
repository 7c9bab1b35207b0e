package devserver

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"time"
)

// MissingError says that a server program is not installed. Its text names the command that installs it.
type MissingError struct {
	// Program is "redis-server" or "postgres".
	Program string
}

// Error names the program and, for each package manager we know, the command that brings it.
func (e *MissingError) Error() string {
	var b strings.Builder
	b.WriteString(e.Program)
	b.WriteString(" was not found in PATH nor where packages put it; install it with one of")
	for _, how := range installCommands[e.Program] {
		b.WriteString("\n  ")
		b.WriteString(how)
	}
	return b.String()
}

var installCommands = map[string][]string{
	"redis-server": {
		"apt-get install -y --no-install-recommends redis-server",
		"dnf install -y redis",
		"apk add redis",
		"pacman -S --needed redis",
		"brew install redis",
	},
	"postgres": {
		"apt-get install -y --no-install-recommends postgresql",
		"dnf install -y postgresql-server postgresql-contrib",
		"apk add postgresql postgresql-contrib",
		"pacman -S --needed postgresql",
		"brew install postgresql@17",
	},
}

// Find returns the path of a server program, "redis-server" or "postgres". It looks in PATH, then where packages
// put servers that they keep out of PATH. For postgres it takes only a folder that also holds initdb. The error is a
// *MissingError.
func Find(program string) (string, error) {
	names := []string{program}
	switch program {
	case "redis-server":
		// Distributions that dropped Redis ship its fork, which takes the same flags.
		names = append(names, "valkey-server")
	case "postgres":
		return findPostgres()
	}
	for _, name := range names {
		for _, dir := range append(pathDirs(), "/usr/local/sbin", "/usr/sbin", "/opt/homebrew/bin", "/usr/local/bin") {
			if path := filepath.Join(dir, name); executable(path) {
				return path, nil
			}
		}
	}
	return "", &MissingError{Program: program}
}

func findPostgres() (string, error) {
	dirs := pathDirs()
	if dir := pgConfigBindir(); dir != "" {
		dirs = append(dirs, dir)
	}
	for _, pattern := range []string{
		"/usr/lib/postgresql/*/bin",       // Debian, Ubuntu
		"/usr/pgsql-*/bin",                // the PostgreSQL project's own RPMs
		"/usr/libexec/postgresql*",        // Alpine
		"/opt/homebrew/opt/postgres*/bin", // Homebrew on Apple silicon
		"/usr/local/opt/postgres*/bin",    // Homebrew on Intel
	} {
		found, _ := filepath.Glob(pattern) // the only error is a malformed pattern, and these are constants
		sort.Slice(found, func(i, j int) bool { return version(found[i]) > version(found[j]) })
		dirs = append(dirs, found...)
	}
	dirs = append(dirs, "/opt/homebrew/bin", "/usr/local/bin", "/usr/local/pgsql/bin")
	for _, dir := range dirs {
		if path := filepath.Join(dir, "postgres"); executable(path) && executable(filepath.Join(dir, "initdb")) {
			return path, nil
		}
	}
	return "", &MissingError{Program: "postgres"}
}

// pathDirs leaves out relative entries of PATH: what they name depends on where we happen to stand.
func pathDirs() []string {
	var dirs []string
	for _, dir := range filepath.SplitList(os.Getenv("PATH")) {
		if filepath.IsAbs(dir) {
			dirs = append(dirs, dir)
		}
	}
	return dirs
}

// pgConfigBindir asks pg_config where the server programs are; "" when there is no usable answer.
func pgConfigBindir() string {
	// pg_config prints a constant. A second is generous; a wrapper script that hangs must not hang us.
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, "pg_config", "--bindir").Output()
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(out))
}

// version is the first number in a path, so that of several installed majors the newest is taken.
func version(path string) float64 {
	start := strings.IndexAny(path, "0123456789")
	if start < 0 {
		return 0
	}
	end := start
	for end < len(path) && (path[end] == '.' || path[end] >= '0' && path[end] <= '9') {
		end++
	}
	v, err := strconv.ParseFloat(path[start:end], 64)
	if err != nil {
		return 0
	}
	return v
}

func executable(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0
}
