package main

import (
	"bytes"
	"encoding/pem"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/crypto/x509roots/fallback/bundle"
)

// program is the binary's name in the image.
const program = "cacheproxy"

// file is one of the image. All belong to root, so that the program cannot change them.
type file struct {
	name    string
	mode    fs.FileMode
	content []byte
}

// rootfs is everything in the image, the folders before what they hold. There is no /tmp: the program writes no file.
func rootfs(o request, p v1.Platform) ([]file, error) {
	binary, err := compile(o, p)
	if err != nil {
		return nil, err
	}
	license, err := os.ReadFile(filepath.Join(o.source, "LICENSE"))
	if err != nil {
		return nil, err
	}
	return []file{
		{"LICENSE", 0o444, license},
		{program, 0o555, binary},
		{"etc", fs.ModeDir | 0o755, nil},
		// Drivers ask who runs them, and take a user's name from there where a URL names none.
		{"etc/group", 0o444, fmt.Appendf(nil, "root:x:0:\nnonroot:x:%s:\n", nobody)},
		{"etc/passwd", 0o444, fmt.Appendf(nil, "root:x:0:0:root:/:/sbin/nologin\nnonroot:x:%s:%s:nonroot:/:/sbin/nologin\n", nobody, nobody)},
		{"etc/ssl", fs.ModeDir | 0o755, nil},
		{"etc/ssl/certs", fs.ModeDir | 0o755, nil},
		{"etc/ssl/certs/ca-certificates.crt", 0o444, roots()},
	}, nil
}

// roots are the certificates that Mozilla trusts without a condition, as of the version that go.mod pins.
//
// They are a file and not part of the program (x509roots/fallback): every start, and every probe that runs the program, would
// parse them, and a company's own authority can be mounted in place of a file. They come from a module and not from the machine
// that builds, so that they are the same everywhere. What may sign only until some day is left out: a file cannot say that.
func roots() []byte {
	var b bytes.Buffer
	for root := range bundle.Roots() {
		if root.Constraint == nil {
			// A bytes.Buffer takes everything, and a block without headers has nothing to refuse.
			_ = pem.Encode(&b, &pem.Block{Type: "CERTIFICATE", Bytes: root.Certificate})
		}
	}
	return b.Bytes()
}

// compile builds the program for a platform.
func compile(o request, p v1.Platform) ([]byte, error) {
	dir, err := os.MkdirTemp("", "cacheproxy-image-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	binary := filepath.Join(dir, program)
	// Without -buildvcs=false the bytes would depend on whether there is a repository around the source.
	cmd := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w -X main.version="+o.version, "-o", binary, "./cmd/cacheproxy")
	cmd.Dir = o.source
	// Who builds may have tuned Go for themselves; the image is the same all the same.
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS="+p.OS, "GOARCH="+p.Architecture,
		"GOFLAGS=", "GOEXPERIMENT=", "GOAMD64=v1", "GOARM64=v8.0", "GOWORK=off")
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build for %s: %w\n%s", p, err, out)
	}
	return os.ReadFile(binary)
}
