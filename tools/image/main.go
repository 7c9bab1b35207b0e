// Command image builds the container image of cacheproxy without a container engine. Read build in this file first, then
// rootfs.go, which says what is in it.
//
// It is a module of its own, so that what writes images is no dependency of the product. Run it with `make image`. The same
// commit and version of Go give the same bytes, whoever builds, where and when: nothing in the image is taken from the machine.
package main

import (
	"archive/tar"
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// nobody is who the program runs as: the uid and gid that images without a shell use, above those that hosts give to people.
const nobody = "65532"

func main() {
	o, err := options(os.Args[1:], os.Getenv, os.Stderr)
	if err == nil {
		err = build(o)
	}
	switch {
	case errors.Is(err, flag.ErrHelp):
	case err != nil:
		fmt.Fprintln(os.Stderr, "image:", err)
		os.Exit(1)
	}
}

// request is what to build.
type request struct {
	source    string        // the repository
	out       string        // where the image goes; what was there is replaced
	rootfs    string        // where the bare files go instead, for a Dockerfile; "" is no such place
	platforms []v1.Platform // linux, one for each processor
	version   string        // what `cacheproxy version` says
	revision  string        // the commit
	created   time.Time     // the commit's time, which all files have
	stdout    io.Writer
}

func options(args []string, getenv func(string) string, stderr io.Writer) (request, error) {
	o := request{stdout: os.Stdout}
	flags := flag.NewFlagSet("image", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.StringVar(&o.source, "source", "../..", "the repository")
	flags.StringVar(&o.out, "out", "../../dist/image", "the folder to write; what is there is replaced")
	flags.StringVar(&o.rootfs, "rootfs", "", "write the files of the image to this folder, and no image; for one platform")
	platforms := flags.String("platforms", "linux/amd64,linux/arm64", "what to build for")
	flags.StringVar(&o.version, "version", "devel", "the version")
	flags.StringVar(&o.revision, "revision", "", "the commit")
	if err := flags.Parse(args); err != nil {
		return o, err
	}
	if flags.NArg() > 0 {
		return o, fmt.Errorf("unexpected argument %q", flags.Arg(0))
	}
	for text := range strings.SplitSeq(*platforms, ",") {
		p, err := v1.ParsePlatform(text)
		if err != nil || p.OS != "linux" || p.Architecture == "" || p.Variant != "" {
			return o, fmt.Errorf("%q is no platform such as linux/amd64", text)
		}
		o.platforms = append(o.platforms, *p)
	}
	if o.rootfs != "" && len(o.platforms) != 1 {
		return o, errors.New("-rootfs is for one platform")
	}
	var seconds int64
	if text := getenv("SOURCE_DATE_EPOCH"); text != "" {
		var err error
		if seconds, err = strconv.ParseInt(text, 10, 64); err != nil || seconds < 0 {
			return o, errors.New("SOURCE_DATE_EPOCH is not a number of seconds since 1970")
		}
	}
	o.created = time.Unix(seconds, 0).UTC()
	return o, nil
}

// build writes an OCI layout with one index for all platforms, which registries take, and for each platform a tarball, which
// `docker load` and `podman load` take.
func build(o request) error {
	if o.rootfs != "" {
		return buildRootfs(o)
	}
	if err := os.RemoveAll(o.out); err != nil {
		return err
	}
	index := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	for _, p := range o.platforms {
		files, err := rootfs(o, p)
		if err != nil {
			return err
		}
		img, err := image(o, p, files)
		if err != nil {
			return err
		}
		index = mutate.AppendManifests(index, mutate.IndexAddendum{Add: img, Descriptor: v1.Descriptor{Platform: &p}})
		if err := writeTarball(o, p, img); err != nil {
			return err
		}
	}
	dir := filepath.Join(o.out, "oci")
	path, err := layout.Write(dir, empty.Index)
	if err != nil {
		return err
	}
	if err := path.AppendIndex(index, layout.WithAnnotations(map[string]string{"org.opencontainers.image.ref.name": o.version})); err != nil {
		return err
	}
	digest, err := index.Digest()
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(o.stdout, "%s: cacheproxy %s for %d platforms, %s\n", dir, o.version, len(o.platforms), digest)
	return err
}

// image is the files as an image for one platform.
func image(o request, p v1.Platform, files []file) (v1.Image, error) {
	content, err := archive(files, o.created)
	if err != nil {
		return nil, err
	}
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(content)), nil
	}, tarball.WithMediaType(types.OCILayer))
	if err != nil {
		return nil, err
	}
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	img, err = mutate.Append(img, mutate.Addendum{Layer: layer, History: v1.History{
		Created: v1.Time{Time: o.created}, CreatedBy: "make image",
	}})
	if err != nil {
		return nil, err
	}
	config, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	config = config.DeepCopy()
	config.OS, config.Architecture, config.Created = p.OS, p.Architecture, v1.Time{Time: o.created}
	config.Config = v1.Config{
		Entrypoint:   []string{"/" + program},
		User:         nobody + ":" + nobody,
		WorkingDir:   "/",
		StopSignal:   "SIGTERM",
		ExposedPorts: map[string]struct{}{"6380/tcp": {}, "9180/tcp": {}},
		Labels: map[string]string{
			"org.opencontainers.image.title":       "cacheproxy",
			"org.opencontainers.image.description": "A Redis-compatible sidecar that falls back to Postgres JSONB",
			"org.opencontainers.image.licenses":    "Apache-2.0",
			"org.opencontainers.image.version":     o.version,
			"org.opencontainers.image.revision":    o.revision,
			"org.opencontainers.image.created":     o.created.Format(time.RFC3339),
		},
	}
	return mutate.ConfigFile(img, config)
}

// archive is the files as a tar.
func archive(files []file, at time.Time) ([]byte, error) {
	var content bytes.Buffer
	w := tar.NewWriter(&content)
	for _, f := range files {
		h := &tar.Header{Name: f.name, Mode: int64(f.mode.Perm()), Typeflag: tar.TypeReg, Size: int64(len(f.content)), ModTime: at}
		if f.mode.IsDir() {
			h.Name, h.Typeflag = f.name+"/", tar.TypeDir
		}
		if err := w.WriteHeader(h); err != nil {
			return nil, err
		}
		if _, err := w.Write(f.content); err != nil {
			return nil, err
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return content.Bytes(), nil
}

func writeTarball(o request, p v1.Platform, img v1.Image) error {
	tag, err := name.NewTag("cacheproxy:" + o.version)
	if err != nil {
		return err
	}
	path := filepath.Join(o.out, fmt.Sprintf("cacheproxy-%s-%s.tar", p.OS, p.Architecture))
	if err := os.MkdirAll(o.out, 0o755); err != nil {
		return err
	}
	if err := tarball.WriteToFile(path, tag, img); err != nil {
		return err
	}
	layers, err := img.Layers()
	if err != nil {
		return err
	}
	var packed int64
	for _, l := range layers {
		size, err := l.Size()
		if err != nil {
			return err
		}
		packed += size
	}
	_, err = fmt.Fprintf(o.stdout, "%s: %.1f MB to pull\n", path, float64(packed)/1e6)
	return err
}

// buildRootfs writes the files as they are.
func buildRootfs(o request) error {
	files, err := rootfs(o, o.platforms[0])
	if err != nil {
		return err
	}
	if err := os.RemoveAll(o.rootfs); err != nil {
		return err
	}
	if err := os.MkdirAll(o.rootfs, 0o755); err != nil {
		return err
	}
	for _, f := range files {
		path := filepath.Join(o.rootfs, f.name)
		if f.mode.IsDir() {
			err = os.Mkdir(path, f.mode.Perm())
		} else {
			err = os.WriteFile(path, f.content, f.mode.Perm())
		}
		if err == nil {
			err = os.Chmod(path, f.mode.Perm()) // whatever the umask
		}
		if err != nil {
			return err
		}
	}
	return nil
}
