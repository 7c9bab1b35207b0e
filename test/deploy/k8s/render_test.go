package k8s

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"cacheproxy/internal/testenv"

	"sigs.k8s.io/kustomize/api/krusty"
	"sigs.k8s.io/kustomize/kyaml/filesys"
	"sigs.k8s.io/yaml"
)

func TestMain(m *testing.M) { testenv.Main(m) }

const manifests = "../../../deploy/k8s"

// render is what `kubectl kustomize` prints.
func render(dir string) (string, error) {
	options := krusty.MakeDefaultOptions()
	options.Reorder = krusty.ReorderOptionLegacy // as the command has it: what others need comes first
	resources, err := krusty.MakeKustomizer(options).Run(filesys.MakeFsOnDisk(), dir)
	if err != nil {
		return "", err
	}
	text, err := resources.AsYaml()
	return string(text), err
}

// overlay renders a kustomization of the test's own beside files of its own. BASE in it is deploy/k8s.
func overlay(t *testing.T, kustomization string, files map[string]string) (string, error) {
	t.Helper()
	dir, err := filepath.EvalSymlinks(t.TempDir()) // or a relative path would not lead back
	if err != nil {
		t.Fatal(err)
	}
	root, err := filepath.Abs(manifests)
	if err != nil {
		t.Fatal(err)
	}
	if root, err = filepath.EvalSymlinks(root); err != nil {
		t.Fatal(err)
	}
	base, err := filepath.Rel(dir, root)
	if err != nil {
		t.Fatal(err)
	}
	write := func(name, text string) {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(strings.ReplaceAll(text, "BASE", base)), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("kustomization.yaml", kustomization)
	for name, text := range files {
		write(name, text)
	}
	return render(dir)
}

// documents are the parts of a stream.
func documents(text string) (docs []string) {
	for doc := range strings.SplitSeq("\n"+text, "\n---\n") {
		if strings.TrimSpace(doc) != "" {
			docs = append(docs, doc)
		}
	}
	return docs
}

// Where there is a kubectl it renders the same as the library. Which versions of it know components is its own affair; one that does is asked.
func TestKubectl(t *testing.T) {
	path, err := exec.LookPath("kubectl")
	if err != nil {
		t.Log("there is no kubectl here; the library alone has rendered")
		return
	}
	for _, name := range []string{"base", "overlays/demo"} {
		dir := filepath.Join(manifests, name)
		var stderr bytes.Buffer
		cmd := exec.Command(path, "kustomize", dir)
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		if err != nil {
			t.Errorf("%s: %v\n%s", name, err, stderr.String())
			continue
		}
		ours, err := render(dir)
		if err != nil {
			t.Fatal(err)
		}
		if err := same(ours, string(out)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// same compares two streams by what they say.
func same(a, b string) error {
	x, y := documents(a), documents(b)
	if len(x) != len(y) {
		return fmt.Errorf("%d and %d objects", len(x), len(y))
	}
	for i := range x {
		var p, q any
		if err := yaml.Unmarshal([]byte(x[i]), &p); err != nil {
			return err
		}
		if err := yaml.Unmarshal([]byte(y[i]), &q); err != nil {
			return err
		}
		if !reflect.DeepEqual(p, q) {
			return fmt.Errorf("these differ:\n%s\n---\n%s", x[i], y[i])
		}
	}
	return nil
}
