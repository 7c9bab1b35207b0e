package main

import (
	"fmt"
	"runtime"
	"runtime/debug"

	"cacheproxy/internal/metrics"

	"github.com/spf13/cobra"
)

// version is set by the linker (-X main.version=v1.2.3).
var version = ""

func (c *cli) versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  usage(cobra.NoArgs),
		RunE: func(*cobra.Command, []string) error {
			_, err := fmt.Fprintf(c.stdout, "cacheproxy %s %s %s/%s\n", versionText(), runtime.Version(), runtime.GOOS, runtime.GOARCH)
			return err
		},
	}
}

// versionText is the version, and the revision that it was built from where the build knows it.
func versionText() string {
	b := build()
	if b.Revision == "" {
		return b.Version
	}
	return b.Version + " (" + b.Revision + ")"
}

// build is what this program was built from.
func build() metrics.Build {
	name, revision, modified := version, "", ""
	if info, ok := debug.ReadBuildInfo(); ok {
		if name == "" && info.Main.Version != "(devel)" {
			name = info.Main.Version
		}
		for _, s := range info.Settings {
			switch {
			case s.Key == "vcs.revision":
				revision = s.Value[:min(12, len(s.Value))]
			case s.Key == "vcs.modified" && s.Value == "true":
				modified = ", modified"
			}
		}
	}
	if name == "" {
		name = "devel"
	}
	if revision != "" {
		revision += modified
	}
	return metrics.Build{Version: name, Revision: revision, Go: runtime.Version()}
}
