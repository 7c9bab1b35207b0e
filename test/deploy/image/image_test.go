package image

import (
	"archive/tar"
	"bytes"
	"debug/elf"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"cacheproxy/internal/testenv"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/validate"
)

func TestMain(m *testing.M) { testenv.Main(m) }

const (
	version  = "v1.2.3"
	revision = "0123456789abcdef0123456789abcdef01234567"
	epoch    = 1_750_000_000
)

var platforms = []string{"amd64", "arm64"}

var repository, _ = filepath.Abs("../../..")

// made is the program that makes images and one that it made.
type made struct {
	bin       string
	out, said string
}

// The image is built once; each part looks at it in its own way.
func TestImage(t *testing.T) {
	m := &made{bin: filepath.Join(t.TempDir(), "image")}
	cmd := exec.Command("go", "build", "-o", m.bin, ".")
	cmd.Dir = filepath.Join(repository, "tools", "image")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	m.out, m.said = m.build(t, repository, epoch)
	t.Run("layout", m.layout)
	t.Run("tarball", m.tarball)
	t.Run("damage is found", m.damage)
	t.Run("Dockerfile", m.dockerfile)
	t.Run("wrong use", m.wrongUse)
	t.Run("roots", m.roots)
	t.Run("run", m.run)
	t.Run("reproducible", m.reproducible)
}

// build runs the program and returns the folder that it wrote.
func (m *made) build(t *testing.T, source string, at int64, args ...string) (out, said string) {
	t.Helper()
	out = filepath.Join(t.TempDir(), "out")
	cmd := exec.Command(m.bin, append([]string{"-source", source, "-out", out, "-version", version, "-revision", revision}, args...)...)
	cmd.Env = append(os.Environ(), "SOURCE_DATE_EPOCH="+strconv.FormatInt(at, 10))
	text, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	return out, string(text)
}

// tree is every file below a folder.
func tree(t *testing.T, dir string) map[string]string {
	t.Helper()
	files := map[string]string{}
	err := fs.WalkDir(os.DirFS(dir), ".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		content, err := os.ReadFile(filepath.Join(dir, path))
		files[path] = string(content)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// differing are the files that two trees do not share.
func differing(a, b map[string]string) (names []string) {
	for name := range maps.Keys(a) {
		if other, ok := b[name]; !ok || other != a[name] {
			names = append(names, name)
		}
	}
	for name := range maps.Keys(b) {
		if _, ok := a[name]; !ok {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// The same source gives the same bytes in another folder, for another user's habits and at another time.
func (m *made) reproducible(t *testing.T) {
	first := tree(t, m.out)
	copied := t.TempDir()
	copySource(t, copied)
	out := filepath.Join(t.TempDir(), "elsewhere")
	// Through a shell, which sets what a build might pick up.
	cmd := exec.Command("sh", "-c", `umask 077 && exec "$0" "$@"`, m.bin, "-source", copied, "-out", out, "-version", version, "-revision", revision)
	cmd.Env = append(os.Environ(), fmt.Sprint("SOURCE_DATE_EPOCH=", epoch), "TZ=Asia/Kathmandu", "GOFLAGS=-tags=nobody", "GOAMD64=v3", "CGO_ENABLED=1", "LC_ALL=C")
	if text, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	if names := differing(first, tree(t, out)); len(names) > 0 {
		t.Errorf("these differ: %v", names)
	}
	// The comparison finds a difference where there is one.
	later, _ := m.build(t, repository, epoch+1)
	if names := differing(first, tree(t, later)); len(names) == 0 {
		t.Error("another time makes no difference")
	}
}

// copySource copies what the build reads.
func copySource(t *testing.T, to string) {
	t.Helper()
	cmd := exec.Command("go", "list", "-deps", "-f", `{{if .Module}}{{if .Module.Main}}{{.Dir}}{{end}}{{end}}`, "./cmd/cacheproxy")
	cmd.Dir = repository
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"go.mod", "go.sum", "LICENSE"} {
		copyFile(t, filepath.Join(repository, name), filepath.Join(to, name))
	}
	for _, dir := range strings.Fields(string(out)) {
		rel, err := filepath.Rel(repository, dir)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.CopyFS(filepath.Join(to, rel), os.DirFS(dir)); err != nil && !errors.Is(err, fs.ErrExist) {
			t.Fatal(err)
		}
	}
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	content, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(to, content, 0o600); err != nil {
		t.Fatal(err)
	}
}

// images are the images of the layout by processor.
func (m *made) images(t *testing.T) map[string]v1.Image {
	t.Helper()
	dir := filepath.Join(m.out, "oci")
	index, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := validate.Index(index); err != nil {
		t.Errorf("the layout is not sound: %v", err)
	}
	outer, err := index.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	if len(outer.Manifests) != 1 || outer.Manifests[0].Annotations["org.opencontainers.image.ref.name"] != version {
		t.Fatalf("the layout holds %+v", outer.Manifests)
	}
	inner, err := index.ImageIndex(outer.Manifests[0].Digest)
	if err != nil {
		t.Fatal(err)
	}
	list, err := inner.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]v1.Image{}
	for _, one := range list.Manifests {
		if one.Platform == nil || one.Platform.OS != "linux" {
			t.Fatalf("a platform %+v", one.Platform)
		}
		if found[one.Platform.Architecture], err = inner.Image(one.Digest); err != nil {
			t.Fatal(err)
		}
	}
	if names := slices.Sorted(maps.Keys(found)); !slices.Equal(names, platforms) {
		t.Fatalf("platforms %v", names)
	}
	return found
}

// entry is a file of an image.
type entry struct {
	tar.Header
	content []byte
}

// contents are the files of an image in their order.
func contents(t *testing.T, img v1.Image) (list []entry) {
	t.Helper()
	layers, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	if len(layers) != 1 {
		t.Fatalf("%d layers", len(layers))
	}
	r, err := layers[0].Uncompressed()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	for archive := tar.NewReader(r); ; {
		h, err := archive.Next()
		if err == io.EOF {
			return list
		}
		if err != nil {
			t.Fatal(err)
		}
		content, err := io.ReadAll(archive)
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, entry{*h, content})
	}
}

func (m *made) layout(t *testing.T) {
	machines := map[string]elf.Machine{"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64}
	for arch, img := range m.images(t) {
		c, err := img.ConfigFile()
		if err != nil {
			t.Fatal(err)
		}
		if c.OS != "linux" || c.Architecture != arch || c.Created.Unix() != epoch {
			t.Errorf("%s: for %s/%s of %s", arch, c.OS, c.Architecture, c.Created)
		}
		if c.Config.User != "65532:65532" || !slices.Equal(c.Config.Entrypoint, []string{"/cacheproxy"}) || len(c.Config.Cmd)+len(c.Config.Env) > 0 {
			t.Errorf("%s: %+v", arch, c.Config)
		}
		if c.Config.Labels["org.opencontainers.image.version"] != version || c.Config.Labels["org.opencontainers.image.revision"] != revision {
			t.Errorf("%s: labels %v", arch, c.Config.Labels)
		}
		var names []string
		for _, f := range contents(t, img) {
			names = append(names, fmt.Sprintf("%s %#o", f.Name, f.Mode))
			if f.Uid+f.Gid != 0 || f.ModTime.Unix() != epoch {
				t.Errorf("%s: %s is %d:%d's, of %s", arch, f.Name, f.Uid, f.Gid, f.ModTime)
			}
			if f.Name == "cacheproxy" {
				binary, err := elf.NewFile(bytes.NewReader(f.content))
				if err != nil {
					t.Fatal(err)
				}
				libraries, _ := binary.ImportedLibraries()
				if binary.Machine != machines[arch] || binary.Section(".interp") != nil || len(libraries) > 0 {
					t.Errorf("%s: the program is for %s and needs %v", arch, binary.Machine, libraries)
				}
			}
		}
		want := []string{"LICENSE 0444", "cacheproxy 0555", "etc/ 0755", "etc/group 0444", "etc/passwd 0444",
			"etc/ssl/ 0755", "etc/ssl/certs/ 0755", "etc/ssl/certs/ca-certificates.crt 0444"}
		if !slices.Equal(names, want) {
			t.Errorf("%s: files %q", arch, names)
		}
	}
}

// An engine loads the same image from the tarball.
func (m *made) tarball(t *testing.T) {
	for arch, img := range m.images(t) {
		path := filepath.Join(m.out, "cacheproxy-linux-"+arch+".tar")
		loaded, err := tarball.ImageFromPath(path, nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := validate.Image(loaded); err != nil {
			t.Errorf("%s: %v", path, err)
		}
		in, _ := loaded.ConfigName()
		if want, _ := img.ConfigName(); in != want {
			t.Errorf("%s: another image than that of the layout", path)
		}
		manifest, err := tarball.LoadManifest(func() (io.ReadCloser, error) { return os.Open(path) })
		if err != nil || len(manifest) != 1 || !slices.Equal(manifest[0].RepoTags, []string{"cacheproxy:" + version}) {
			text, _ := json.Marshal(manifest)
			t.Errorf("%s: %v %s", path, err, text)
		}
	}
	if sizes := regexp.MustCompile(`[0-9.]+ MB to pull`).FindAllString(m.said, -1); len(sizes) != len(platforms) {
		t.Errorf("no sizes: %s", m.said)
	}
}

// A validator that accepts everything would say nothing.
func (m *made) damage(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "oci")
	if err := os.CopyFS(dir, os.DirFS(filepath.Join(m.out, "oci"))); err != nil {
		t.Fatal(err)
	}
	blobs, err := filepath.Glob(filepath.Join(dir, "blobs", "sha256", "*"))
	if err != nil {
		t.Fatal(err)
	}
	largest := slices.MaxFunc(blobs, func(a, b string) int { return int(size(t, a) - size(t, b)) })
	content, err := os.ReadFile(largest)
	if err != nil {
		t.Fatal(err)
	}
	// In the time that gzip's header holds (RFC 1952, 2.3.1): what is inside reads as before, only the digest tells. Damage inside would
	// leave behind the goroutine of validate.Index that reads the layer.
	content[4] ^= 1
	if err := os.WriteFile(largest, content, 0o600); err != nil {
		t.Fatal(err)
	}
	index, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := validate.Index(index); err == nil {
		t.Error("a damaged layer is not found")
	}
}

func size(t *testing.T, path string) int64 {
	t.Helper()
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return info.Size()
}

// The Dockerfile takes its files from the same program, and repeats the settings.
func (m *made) dockerfile(t *testing.T) {
	text, err := os.ReadFile(filepath.Join(repository, "Dockerfile"))
	if err != nil {
		t.Fatal(err)
	}
	_, last, ok := strings.Cut(string(text), "\nFROM scratch\n")
	if !ok {
		t.Fatal("the last stage is not FROM scratch")
	}
	last = strings.ReplaceAll(last, "\\\n", " ")
	img := m.images(t)["amd64"]
	c, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	entrypoint, _ := json.Marshal(c.Config.Entrypoint)
	var ports []string
	for port := range c.Config.ExposedPorts {
		ports = append(ports, strings.TrimSuffix(port, "/tcp"))
	}
	slices.Sort(ports)
	for _, want := range []string{
		"COPY --from=build /rootfs/ /", "USER " + c.Config.User, "WORKDIR " + c.Config.WorkingDir, "STOPSIGNAL " + c.Config.StopSignal,
		"ENTRYPOINT " + string(entrypoint), "EXPOSE " + strings.Join(ports, " "),
	} {
		if !slices.Contains(strings.Split(last, "\n"), want) {
			t.Errorf("no line %q", want)
		}
	}
	for name, value := range c.Config.Labels {
		switch name {
		case "org.opencontainers.image.created": // engines write it themselves
			continue
		case "org.opencontainers.image.version":
			value = "${VERSION}"
		case "org.opencontainers.image.revision":
			value = "${REVISION}"
		}
		if !strings.Contains(last, name+`="`+value+`"`) {
			t.Errorf("no label %s=%q", name, value)
		}
	}

	// What its build stage runs.
	rootfs := filepath.Join(t.TempDir(), "rootfs")
	m.build(t, repository, epoch, "-rootfs", rootfs, "-platforms", "linux/amd64")
	onDisk := tree(t, rootfs)
	for _, f := range contents(t, img) {
		info, err := os.Stat(filepath.Join(rootfs, f.Name))
		if err != nil {
			t.Error(err)
			continue
		}
		if info.Mode().Perm() != fs.FileMode(f.Mode) {
			t.Errorf("%s: mode %v", f.Name, info.Mode())
		}
		if f.Typeflag == tar.TypeReg && onDisk[f.Name] != string(f.content) {
			t.Errorf("%s: another content than in the image", f.Name)
		}
		delete(onDisk, f.Name)
	}
	if len(onDisk) > 0 {
		t.Errorf("files that the image lacks: %v", slices.Sorted(maps.Keys(onDisk)))
	}
}

func (m *made) wrongUse(t *testing.T) {
	for _, c := range []struct {
		epoch string
		args  []string
		says  string
	}{
		{"", []string{"-platforms", "darwin/arm64"}, "is no platform"},
		{"", []string{"-platforms", "linux"}, "is no platform"},
		{"", []string{"-rootfs", "/nowhere"}, "for one platform"},
		{"yesterday", nil, "SOURCE_DATE_EPOCH"},
		{"", []string{"more"}, "unexpected argument"},
		{"", []string{"-source", t.TempDir()}, "build for linux/amd64"},
	} {
		cmd := exec.Command(m.bin, append([]string{"-out", filepath.Join(t.TempDir(), "out")}, c.args...)...)
		cmd.Env = append(os.Environ(), "SOURCE_DATE_EPOCH="+c.epoch)
		out, err := cmd.CombinedOutput()
		if err == nil || !strings.Contains(string(out), c.says) {
			t.Errorf("%v: %v\n%s", c.args, err, out)
		}
	}
}
