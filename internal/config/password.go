package config

import (
	"errors"
	"sync"

	"go.uber.org/zap"
)

// Password returns what reads the first line of a password file, for whoever opens a connection: a password that was changed in the
// file is then used without a restart. setting names the file in the log. The result is nil if path is empty, and may be called from
// any goroutine.
//
// A file that is missing, or empty because somebody is writing it, is no reason to lose a store: the password that was read last is
// returned, or "" before there is any, which stands for the one that Load has put into the URL. What is wrong is logged once, until the
// file is right again.
func Password(setting, path string, log *zap.Logger) func() string {
	if path == "" {
		return nil
	}
	p := &passwordFile{setting: setting, path: path, log: log}
	return p.read
}

type passwordFile struct {
	// Static.
	setting, path string
	log           *zap.Logger

	mu   sync.Mutex
	last string // guarded by mu: the last that the file has held
	bad  string // guarded by mu: what was wrong with it at the last look, "" if nothing
}

var errEmptyPassword = errors.New("the first line of the file is empty")

func (p *passwordFile) read() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := ""
	text, err := readBounded(p.path)
	if err == nil {
		if now = firstLine(text); now == "" {
			err = errEmptyPassword
		}
	}
	if err != nil {
		if bad := reason(err); bad != p.bad {
			p.bad = bad
			p.log.Warn("a password file cannot be used; the password that was read last is kept",
				zap.String("setting", p.setting), zap.String("reason", bad))
		}
		return p.last
	}
	if p.bad != "" {
		p.bad = ""
		p.log.Info("the password file can be used again", zap.String("setting", p.setting))
	}
	p.last = now
	return now
}
