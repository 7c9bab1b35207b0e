package main

import (
	"io"
	"os"

	"cacheproxy/internal/config"
	"cacheproxy/internal/said"
	"cacheproxy/internal/view"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"golang.org/x/term"
)

// newLogger writes to w at a level that can be changed while it is in use.
func newLogger(cfg config.Log, w io.Writer) (*zap.Logger, zap.AtomicLevel) {
	level := zap.NewAtomicLevelAt(zapLevel(cfg.Level))
	enc := zap.NewProductionEncoderConfig()
	enc.EncodeTime = zapcore.ISO8601TimeEncoder
	enc.EncodeDuration = zapcore.StringDurationEncoder
	encoder := zapcore.NewJSONEncoder(enc)
	if cfg.Format == "console" || cfg.Format == "auto" && isTerminal(w) {
		enc.EncodeLevel = zapcore.CapitalLevelEncoder
		encoder = zapcore.NewConsoleEncoder(enc)
	}
	core := zapcore.NewCore(encoder, zapcore.Lock(zapcore.AddSync(w)), level)
	return zap.New(said.Core(core, ownEvents...)), level
}

// ownEvents are lines that somebody has asked for each time, as often as that may be within a minute.
var ownEvents = []string{"the configuration was reloaded", "phase changed"}

// zapLevel translates a word that the configuration has checked.
func zapLevel(word string) zapcore.Level {
	level, err := zapcore.ParseLevel(word)
	if err != nil {
		return zapcore.InfoLevel
	}
	return level
}

func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	return term.IsTerminal(int(f.Fd()))
}

// columnsOf returns what tells the width of the terminal that w is, nil if it is none.
func columnsOf(w io.Writer) func() int {
	if !isTerminal(w) {
		return nil
	}
	return func() int {
		width, _ := view.Size(w.(*os.File))
		return width
	}
}
