package config

import (
	"context"
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"go.uber.org/goleak"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience is how long a test waits for what must happen. It bounds a failure, not a success.
const patience = 30 * time.Second

// reloads are the contents that were found by each reload.
type reloads chan string

// next waits for the next reload and holds its content against want.
func (r reloads) next(t *testing.T, want string) {
	t.Helper()
	select {
	case got := <-r:
		if got != want {
			t.Fatalf("reloaded %q, want %q", got, want)
		}
	case <-time.After(patience):
		t.Fatalf("%q was never reloaded", want)
	}
}

// startWatch watches path until the test ends. Every change after its return is seen.
func startWatch(t *testing.T, path string) (reloads, *observer.ObservedLogs) {
	t.Helper()
	core, logs := observer.New(zapcore.DebugLevel)
	seen := make(reloads, 100)
	w, err := newWatch(path, zap.New(core), func() {
		text, err := os.ReadFile(path)
		if err != nil {
			text = []byte(err.Error())
		}
		seen <- string(text)
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		w.run(ctx)
	}()
	t.Cleanup(func() {
		cancel()
		<-done
		if err := w.fs.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
		if len(seen) > 0 {
			t.Errorf("reloaded once more: %q", <-seen)
		}
	})
	return seen, logs
}

func put(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func rename(t *testing.T, from, to string) {
	t.Helper()
	if err := os.Rename(from, to); err != nil {
		t.Fatal(err)
	}
}

func TestWatchOverwrite(t *testing.T) {
	path := write(t, "a: 1")
	seen, _ := startWatch(t, path)
	for _, text := range []string{"a: 2", "a: 3"} {
		put(t, path, text)
		seen.next(t, text)
	}
	// The same content again is no change; the next one is, and nothing comes between.
	put(t, path, "a: 3")
	put(t, filepath.Join(filepath.Dir(path), "neighbour"), "unrelated")
	put(t, path, "a: 4")
	seen.next(t, "a: 4")
}

// TestWatchRename is how editors save: a new file takes the old one's place.
func TestWatchRename(t *testing.T) {
	path := write(t, "a: 1")
	seen, _ := startWatch(t, path)
	for _, text := range []string{"a: 2", "a: 3"} {
		put(t, path+".swp", text)
		rename(t, path, path+"~")
		rename(t, path+".swp", path)
		seen.next(t, text)
	}
}

// TestWatchKubernetes is how the kubelet updates a ConfigMap (its AtomicWriter): config.yaml is a link
// to ..data/config.yaml, ..data one to a directory, and an update renames a new ..data over the old.
func TestWatchKubernetes(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, DefaultPath)
	data := filepath.Join(dir, "..data")
	version := 0
	update := func(text string) {
		old, _ := os.Readlink(data)
		version++
		name := fmt.Sprintf("..2026_11_23_%d", version)
		if err := os.Mkdir(filepath.Join(dir, name), 0o755); err != nil {
			t.Fatal(err)
		}
		put(t, filepath.Join(dir, name, DefaultPath), text)
		if err := os.Symlink(name, data+"_tmp"); err != nil {
			t.Fatal(err)
		}
		rename(t, data+"_tmp", data)
		if old == "" {
			if err := os.Symlink(filepath.Join("..data", DefaultPath), path); err != nil {
				t.Fatal(err)
			}
		} else if err := os.RemoveAll(filepath.Join(dir, old)); err != nil {
			t.Fatal(err)
		}
	}
	update("a: 1")
	seen, _ := startWatch(t, path)
	for _, text := range []string{"a: 2", "a: 3", "a: 4"} {
		update(text)
		seen.next(t, text)
	}
}

// TestWatchDirectoryReplaced is how some tools deploy: the whole directory is exchanged.
func TestWatchDirectoryReplaced(t *testing.T) {
	base := t.TempDir()
	dir := filepath.Join(base, "etc")
	path := filepath.Join(dir, DefaultPath)
	for _, d := range []string{dir, filepath.Join(base, "next")} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	put(t, path, "a: 1")
	put(t, filepath.Join(base, "next", DefaultPath), "a: 2")
	seen, logs := startWatch(t, path)
	rename(t, dir, filepath.Join(base, "old"))
	rename(t, filepath.Join(base, "next"), dir)
	seen.next(t, "a: 2")
	if logs.FilterMessageSnippet("directory").Len() == 0 {
		t.Error("the loss of the directory was not logged")
	}
	put(t, filepath.Join(base, "old", DefaultPath), "a: stale")
	put(t, path, "a: 3")
	seen.next(t, "a: 3")
}

// TestLook holds the rule that a content is loaded when it is new and was found twice, without a
// clock: each line is one look.
func TestLook(t *testing.T) {
	path := write(t, "a: 1")
	core, logs := observer.New(zapcore.DebugLevel)
	loaded := 0
	w := watch{path: path, log: zap.New(core), reload: func() { loaded++ }, known: sha256.Sum256([]byte("a: 1"))}
	const absent = "absent"
	for i, step := range []struct {
		content string
		again   bool
		loaded  int
	}{
		{"a: 1", false, 0}, // touched
		{"", true, 0},      // truncated, an editor is about to write
		{"a: 2", true, 0},
		{"a: 2", false, 1},
		{"a: 3", true, 1},
		{"a: 2", false, 1}, // changed back
		{"a: 3", true, 1},  // must settle anew
		{absent, false, 1},
		{absent, false, 1},
		{"a: 3", true, 1}, // as above
		{"a: 3", false, 2},
	} {
		if step.content == absent {
			_ = os.Remove(path)
		} else {
			put(t, path, step.content)
		}
		w.looking = true
		if again := w.look(); again != step.again || w.looking != step.again || loaded != step.loaded {
			t.Errorf("look %d (%q): again %v, looking %v, loaded %d", i, step.content, again, w.looking, loaded)
		}
	}
	if n := logs.Len(); n != 1 {
		t.Errorf("%d lines were logged about one absence", n)
	}
}

func TestWatchEnds(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := Watch(ctx, filepath.Join(t.TempDir(), "absent.yaml"), zap.NewNop(), func() {}); err != nil {
		t.Errorf("a file that does not exist yet: %v", err)
	}
	if err := Watch(ctx, filepath.Join(t.TempDir(), "absent", "config.yaml"), zap.NewNop(), func() {}); err == nil {
		t.Error("a directory that does not exist was watched")
	}
}
