package k8s

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"cacheproxy/internal/testenv"

	"sigs.k8s.io/kustomize/kustomize/v5/commands/build"
	"sigs.k8s.io/kustomize/kyaml/filesys"
)

func TestMain(m *testing.M) { testenv.Main(m) }

const manifests = "../../../deploy/k8s"

// render is what `kubectl kustomize` prints: this is the command that kubectl has under that name.
func render(dir string) (string, error) {
	var out strings.Builder
	cmd := build.NewCmdBuild(filesys.MakeFsOnDisk(), build.MakeHelp("kubectl", "kustomize"), &out)
	cmd.SilenceErrors = true
	cmd.SetArgs([]string{dir})
	err := cmd.Execute()
	return out.String(), err
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
