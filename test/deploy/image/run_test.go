package image

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"cacheproxy/internal/testenv"

	"github.com/redis/go-redis/v9"
)

// patience bounds what should take milliseconds.
const patience = time.Minute

// unpacked is the image's files in a folder, as a node unpacks them.
type unpacked struct {
	dir string
}

// unpack unpacks the image for this machine's processor.
func (m *made) unpack(t *testing.T) unpacked {
	t.Helper()
	img, ok := m.images(t)[runtime.GOARCH]
	if !ok {
		t.Fatalf("there is no image for %s", runtime.GOARCH)
	}
	// Below a folder that everybody may enter, which t.TempDir is not.
	dir, err := os.MkdirTemp("", "cacheproxy-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, f := range contents(t, img) {
		path := filepath.Join(dir, f.Name)
		if f.FileInfo().IsDir() {
			err = os.Mkdir(path, 0o755)
		} else {
			err = os.WriteFile(path, f.content, 0o600)
		}
		if err == nil {
			err = os.Chmod(path, f.FileInfo().Mode().Perm())
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return unpacked{dir}
}

// add puts a file beside those of the image, as a mount does.
func (u unpacked) add(t *testing.T, name, content string) {
	t.Helper()
	path := filepath.Join(u.dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(path); err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil { //nolint:gosec // the image's user must read it
		t.Fatal(err)
	}
}

// command is the image's program with nothing around it but the image's files, as the user of the image. Root really becomes
// that user; anybody else is it in a user namespace.
func (u unpacked) command(env []string, args ...string) *exec.Cmd {
	cmd := exec.Command("/cacheproxy", args...)
	cmd.Env = env
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: u.dir}
	if os.Geteuid() == 0 {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: 65532, Gid: 65532}
	} else {
		cmd.SysProcAttr.Cloneflags = syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 65532, HostID: os.Geteuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 65532, HostID: os.Getegid(), Size: 1}}
	}
	return cmd
}

// output runs a command to its end.
func (u unpacked) output(env []string, args ...string) (string, int) {
	cmd := u.command(env, args...)
	out, err := cmd.CombinedOutput()
	if cmd.ProcessState == nil {
		return err.Error(), -1
	}
	return string(out), cmd.ProcessState.ExitCode()
}

// The program of the image runs as the image's user, with nothing but the image's files: it says its version, checks a
// configuration, serves, answers the probe and stops, and writes nothing.
func (m *made) run(t *testing.T) {
	u := m.unpack(t)
	if out, code := u.output(nil, "version"); code != 0 || !strings.Contains(out, "cacheproxy "+version+" ") {
		t.Fatalf("version: %d %s", code, out)
	}
	if out, code := u.output(nil, "healthcheck"); code != 1 {
		t.Errorf("healthcheck with nobody there: %d %s", code, out)
	}
	clients, observe := testenv.FreePort(t), testenv.FreePort(t)
	config := fmt.Sprintf(`
listen: {address: "127.0.0.1:%d"}
observe: {address: "127.0.0.1:%d"}
admin: {address: ""}
routes: [{name: user, match: "user:*", phase: phase1}]
`, clients, observe)
	u.add(t, "etc/cacheproxy/config.yaml", config)
	u.add(t, "etc/cacheproxy/bad.yaml", config+"journal: {pole: 1s}\n")
	env := []string{"CACHEPROXY_CONFIG=/etc/cacheproxy/config.yaml", "REDIS_URL=" + testenv.Redis(t).URL(), "DATABASE_URL=" + testenv.PostgresServer(t).URL("postgres")}
	if out, code := u.output(env, "check", "--config", "/etc/cacheproxy/bad.yaml"); code != 78 || !strings.Contains(out, "journal.pole") {
		t.Errorf("check of a mistake: %d %s", code, out)
	}
	if out, code := u.output(env, "check"); code != 0 {
		t.Fatalf("check: %d %s", code, out)
	}

	before := tree(t, u.dir)
	cmd := u.command(env)
	log := &testenv.Output{}
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		_ = cmd.Wait() // how it ended is in ProcessState
		close(ended)
	}()
	defer func() {
		_ = cmd.Process.Kill() // usually it has ended
		<-ended
		if t.Failed() {
			t.Log(log.Tail(4000))
		}
	}()
	waitFor(t, "the proxy starts", func() bool {
		resp, err := http.Get(fmt.Sprintf("http://127.0.0.1:%d/startupz", observe))
		if err != nil {
			return false
		}
		resp.Body.Close()
		return resp.StatusCode == http.StatusOK
	})
	http.DefaultClient.CloseIdleConnections()
	if status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", cmd.Process.Pid)); err != nil || os.Geteuid() == 0 && !bytes.Contains(status, []byte("Uid:\t65532\t65532\t65532\t65532\n")) {
		t.Errorf("it runs as another user: %v\n%s", err, status)
	}
	client := redis.NewClient(&redis.Options{Addr: fmt.Sprintf("127.0.0.1:%d", clients), DisableIdentity: true})
	defer client.Close()
	if err := client.Set(context.Background(), "user:1", `{"a":1}`, 0).Err(); err != nil {
		t.Error(err)
	}
	if got, err := client.Get(context.Background(), "user:1").Result(); err != nil || got != `{"a":1}` {
		t.Errorf("%q, %v", got, err)
	}
	if out, code := u.output(env, "healthcheck"); code != 0 {
		t.Errorf("healthcheck: %d %s", code, out)
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	select {
	case <-ended:
	case <-time.After(patience):
		t.Fatal("the program does not end")
	}
	if code := cmd.ProcessState.ExitCode(); code != 0 {
		t.Errorf("exit code %d", code)
	}
	if names := differing(before, tree(t, u.dir)); len(names) > 0 {
		t.Errorf("it wrote %v", names)
	}
}

// The certificates in the image are what TLS to the stores is checked against, and others can be mounted in their place.
func (m *made) roots(t *testing.T) {
	u := m.unpack(t)
	const at = "etc/ssl/certs/ca-certificates.crt"
	shipped, err := os.ReadFile(filepath.Join(u.dir, at))
	if err != nil {
		t.Fatal(err)
	}
	names, count := map[string]bool{}, 0
	for rest := shipped; ; count++ {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		names[cert.Subject.CommonName] = cert.IsCA
	}
	if count < 80 || !names["ISRG Root X1"] || !names["DigiCert Global Root G2"] || !names["Amazon Root CA 1"] {
		t.Errorf("%d roots: %v", count, names)
	}

	cert, key := selfSigned(t)
	dir := t.TempDir()
	certFile, keyFile := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	for path, content := range map[string]string{certFile: cert, keyFile: key} {
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	port := testenv.FreePort(t)
	testenv.Redis(t, "--tls-port", fmt.Sprint(port), "--tls-cert-file", certFile, "--tls-key-file", keyFile, "--tls-auth-clients", "no")
	u.add(t, "config.yaml", "routes: []\n")
	env := []string{fmt.Sprintf("REDIS_URL=rediss://127.0.0.1:%d/0", port)}
	if out, code := u.output(env, "check"); code != 3 || !strings.Contains(out, "certificate") {
		t.Errorf("a certificate that nobody trusts: %d %s", code, out)
	}
	u.add(t, at, cert)
	if out, code := u.output(env, "check"); code != 0 {
		t.Errorf("a certificate that is mounted: %d %s", code, out)
	}
}

// selfSigned is a certificate for 127.0.0.1 that vouches for itself, and its key.
func selfSigned(t *testing.T) (cert, key string) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "cacheproxy test"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	encode := func(kind string, der []byte) string {
		return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
	}
	return encode("CERTIFICATE", der), encode("PRIVATE KEY", secret)
}

func waitFor(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("in vain: %s", what)
		}
	}
}
