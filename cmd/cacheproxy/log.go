package main

import (
	"io"
	"io/fs"
	"os"

	"cacheproxy/internal/config"
	"cacheproxy/internal/said"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
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
	info, err := f.Stat()
	return err == nil && info.Mode()&fs.ModeCharDevice != 0
}
