package config

import (
	"context"
	"crypto/sha256"
	"fmt"
	"path/filepath"
	"time"

	"github.com/fsnotify/fsnotify"
	"go.uber.org/zap"
)

const (
	// settle is how long a file must have kept its content before it is loaded. Shorter might catch an
	// editor between truncating and writing, and an empty file is a valid configuration; longer only delays a reload.
	settle = 150 * time.Millisecond
	// retry is how often a directory that went away is looked for.
	retry = time.Second
)

// Watch calls reload, on the caller's goroutine, each time the content of the file at path has changed
// and settled. It returns when ctx ends, with nil and everything stopped; any other return is an error to
// set the watch up. What the file holds when Watch begins counts as known.
//
// It watches the directory and not the file, because a file is seldom changed where it is: editors
// rename a new one over it, and Kubernetes swaps the symbolic link ..data, through which the path
// leads, for one to a new directory. A watch on the file would die with the first such change. Events
// are not asked what they mean, they only prompt a look at the content.
func Watch(ctx context.Context, path string, log *zap.Logger, reload func()) error {
	w, err := newWatch(path, log, reload)
	if err != nil {
		return err
	}
	defer w.fs.Close() // waits for the watcher's own goroutine
	w.run(ctx)
	return nil
}

// watch is what Watch knows of the file. The goroutine of Watch owns it.
type watch struct {
	// static
	path   string
	dir    string
	log    *zap.Logger
	reload func()
	fs     *fsnotify.Watcher
	timer  *time.Timer // ends a settle

	known   [sha256.Size]byte // of the content that was loaded last
	seen    [sha256.Size]byte // of the content at the last look
	looking bool              // from the first event to the look that finds the content settled
	missing bool              // the last look found no file; said once
}

func newWatch(path string, log *zap.Logger, reload func()) (*watch, error) {
	fw, err := fsnotify.NewWatcher()
	if err != nil {
		return nil, fmt.Errorf("watch the configuration: %w", err)
	}
	w := &watch{path: path, dir: filepath.Dir(path), log: log, reload: reload, fs: fw, timer: time.NewTimer(settle)}
	w.timer.Stop()
	if err := fw.Add(w.dir); err != nil {
		fw.Close()
		return nil, fmt.Errorf("watch the configuration's directory: %w", err)
	}
	// After Add, or a change between the two would go unseen.
	if w.known, err = digest(path); err != nil {
		w.missing = true
	}
	return w, nil
}

// run waits for events until ctx ends.
func (w *watch) run(ctx context.Context) {
	defer w.timer.Stop()
	var lost <-chan time.Time // ticks while the directory is gone
	for {
		select {
		case <-ctx.Done():
			return
		case event := <-w.fs.Events:
			if event.Name == w.dir && (event.Has(fsnotify.Remove) || event.Has(fsnotify.Rename)) {
				w.log.Warn("the directory of the configuration is gone, waiting for it")
				_ = w.fs.Remove(w.dir) // or a renamed directory would be watched under its new name
				lost = time.After(retry)
				continue
			}
			w.prompt()
		case err := <-w.fs.Errors:
			w.log.Warn("watching the configuration", zap.Error(err))
			w.prompt() // the error may stand for events that were dropped
		case <-lost:
			lost = nil
			if w.fs.Add(w.dir) != nil {
				lost = time.After(retry)
				continue
			}
			w.prompt()
		case <-w.timer.C:
			if w.look() {
				w.timer.Reset(settle)
			}
		}
	}
}

// prompt begins to look, unless a look is due anyway. It does not put that one off: events that never
// end, from other files of a busy directory, must not delay a reload for ever.
func (w *watch) prompt() {
	if !w.looking {
		w.looking = true
		w.timer.Reset(settle)
	}
}

// look reads the file and reloads it if its content is new and has not changed since the last look.
// It returns whether to look again.
func (w *watch) look() (again bool) {
	sum, err := digest(w.path)
	if err != nil {
		if !w.missing {
			w.log.Warn("the configuration cannot be read, what was loaded stays", zap.String("reason", reason(err)))
		}
		w.missing, w.looking, w.seen = true, false, [sha256.Size]byte{}
		return false
	}
	w.missing = false
	switch sum {
	case w.known: // changed back, or touched
		w.seen, w.looking = sum, false
		return false
	case w.seen:
		w.known, w.looking = sum, false
		w.reload()
		return false
	}
	w.seen = sum
	return true
}

func digest(path string) ([sha256.Size]byte, error) {
	text, err := readBounded(path)
	if err != nil {
		return [sha256.Size]byte{}, err
	}
	return sha256.Sum256(text), nil
}
