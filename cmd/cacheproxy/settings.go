package main

import (
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"cacheproxy/internal/config"
	"cacheproxy/internal/metrics"

	"go.uber.org/zap"
)

// source is where the configuration of a process comes from.
type source struct {
	path string // the file; "" is none
	load func() (*config.Config, error)
}

// settings are the configuration in force and the way to a newer one.
type settings struct {
	from  source
	level zap.AtomicLevel
	now   atomic.Pointer[config.Config]
	done  atomic.Pointer[metrics.Reloads] // what became of reloads; a reload may take long, and nobody waits for it to ask

	mu      sync.Mutex // one reload at a time
	pending []string   // guarded by mu: settings that wait for a restart
	told    []string   // guarded by mu: those that were logged
}

func newSettings(cfg *config.Config, from source, level zap.AtomicLevel) *settings {
	s := &settings{from: from, level: level}
	s.done.Store(&metrics.Reloads{LastSuccess: time.Now()})
	s.now.Store(cfg)
	return s
}

// current is the configuration in force. It must not be changed.
func (s *settings) current() *config.Config { return s.now.Load() }

// reload loads the configuration, has apply take over what may fail, and puts the rest in force. The caller holds mu.
func (s *settings) reload(apply func(*config.Config) error) error {
	if s.from.path == "" {
		return errNoFile
	}
	next, err := s.from.load()
	if err == nil {
		err = apply(next)
	}
	done := *s.done.Load()
	defer func() { s.done.Store(&done) }()
	if done.LastFailed = err != nil; err != nil {
		done.Failed++
		return err
	}
	done.Succeeded++
	done.LastSuccess = time.Now()
	s.pending = config.Diff(s.current(), next)
	s.level.SetLevel(zapLevel(next.Log.Level))
	inForce := *s.current()
	inForce.Default, inForce.Routes = next.Default, next.Routes
	inForce.Commands, inForce.Log.Level = next.Commands, next.Log.Level
	inForce.Health.ReadyRequires = next.Health.ReadyRequires
	s.now.Store(&inForce)
	return nil
}

// reloaded tells what has become of the configuration.
func (s *settings) reloaded() metrics.Reloads { return *s.done.Load() }

// restart returns the settings that wait for a restart, nil if these have been told before. The caller holds mu.
func (s *settings) restart() []string {
	if slices.Equal(s.pending, s.told) {
		return nil
	}
	s.told = s.pending
	return s.pending
}
