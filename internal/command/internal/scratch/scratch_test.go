package scratch

import (
	"context"
	"errors"
	"os"
	"regexp"
	"testing"
)

func TestStartAndStop(t *testing.T) {
	ctx := context.Background()
	s, err := Start(ctx)
	if err != nil {
		t.Fatal(err)
	}
	version, err := s.Version(ctx)
	if err != nil || !regexp.MustCompile(`^\d+\.\d+\.\d+$`).MatchString(version) {
		t.Errorf("Version() = %q, %v", version, err)
	}
	product, err := s.Product(ctx)
	if err != nil || !regexp.MustCompile(`^(redis|valkey)-\d+\.\d+\.\d+$`).MatchString(product) {
		t.Errorf("Product() = %q, %v", product, err)
	}
	s.Stop()
	if _, err := os.Stat(s.dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("after Stop the directory is still there: %v", err)
	}
	if _, err := s.Version(ctx); err == nil {
		t.Error("a stopped server tells its version")
	}
	if _, err := s.Product(ctx); err == nil {
		t.Error("a stopped server tells its name")
	}
}

func TestStartFails(t *testing.T) {
	if s, err := StartProgram(context.Background(), "no-such-redis-server"); err == nil {
		s.Stop()
		t.Error("a program that does not exist started")
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	// true(1) ends at once and never listens.
	if _, err := StartProgram(ctx, "true"); !errors.Is(err, context.Canceled) {
		t.Errorf("a server that never listens: %v", err)
	}
	t.Setenv("TMPDIR", "/dev/null")
	if _, err := Start(context.Background()); err == nil {
		t.Error("started without a directory")
	}
}
