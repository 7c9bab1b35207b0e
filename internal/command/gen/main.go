// Gen writes table_gen.go, the facts of package command: what the installed redis-server answers to COMMAND, what later
// servers answered (the files in later), and the few commands of versions that nobody had at hand (extra.go). Where two know
// a command, the first of these three wins.
//
// Run it in the package's directory, or with go generate. The same server gives the same file.
//
//	go run ./gen                              write table_gen.go
//	go run ./gen -record /path/redis-server   write what that server has beside the installed one into gen/later
package main

import (
	"context"
	"flag"
	"fmt"
	"os"

	"cacheproxy/internal/command/internal/scratch"
)

func main() {
	program := flag.String("record", "", "a later `redis-server` whose commands are recorded")
	flag.Parse()
	work := func(ctx context.Context) error { return run(ctx, "table_gen.go") }
	if *program != "" {
		work = func(ctx context.Context) error { return record(ctx, *program, "gen/later") }
	}
	if err := work(context.Background()); err != nil {
		fmt.Fprintln(os.Stderr, "gen:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, path string) error {
	server, err := scratch.Start(ctx)
	if err != nil {
		return err
	}
	defer server.Stop()
	source, err := generate(ctx, server)
	if err != nil {
		return err
	}
	return os.WriteFile(path, source, 0o644)
}

// generate returns the text of table_gen.go as the server, the records and extra.go have it.
func generate(ctx context.Context, server *scratch.Server) ([]byte, error) {
	version, err := server.Version(ctx)
	if err != nil {
		return nil, err
	}
	rows, err := ask(ctx, server)
	if err != nil {
		return nil, err
	}
	for _, name := range later {
		recorded, err := readRecord(name)
		if err != nil {
			return nil, err
		}
		rows = merge(rows, recorded)
	}
	return render(version, merge(rows, extra))
}

// ask returns the rows of a server, as it tells them.
func ask(ctx context.Context, server *scratch.Server) ([]row, error) {
	reply, err := server.Do(ctx, "command").Result()
	if err != nil {
		return nil, fmt.Errorf("ask redis for its commands: %w", err)
	}
	return readCommands(reply)
}
