package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"cacheproxy/internal/config"
	"cacheproxy/internal/testenv"
)

func TestStaleSocket(t *testing.T) {
	s := newSite(t, "", "")
	dead, err := net.Listen("unix", s.socket)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := listen("here", "unix://"+s.socket); err == nil || !strings.Contains(err.Error(), "another process") {
		t.Errorf("a socket in use: %v", err)
	}
	dead.(*net.UnixListener).SetUnlinkOnClose(false) // as if it had been killed
	dead.Close()
	ln, err := listen("here", "unix://"+s.socket)
	if err != nil {
		t.Fatalf("a stale socket: %v", err)
	}
	ln.Close()
	if err := os.WriteFile(s.socket, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := listen("here", "unix://"+s.socket); err == nil || !strings.Contains(err.Error(), "not a socket") {
		t.Errorf("a file: %v", err)
	}
	if text, err := os.ReadFile(s.socket); err != nil || string(text) != "precious" {
		t.Errorf("the file: %q %v", text, err)
	}
}

func TestPatientListener(t *testing.T) {
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ready := make(chan struct{})
	ln := newPatient(inner, ready)
	client, err := net.Dial("tcp", inner.Addr().String()) // the kernel takes it
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	accepted := make(chan error)
	accept := func() {
		conn, err := ln.Accept()
		if err == nil {
			conn.Close()
		}
		accepted <- err
	}
	go accept()
	select {
	case err := <-accepted:
		t.Fatalf("accepted before it was ready: %v", err)
	default:
	}
	close(ready)
	if err := <-accepted; err != nil {
		t.Error(err)
	}
	ln.Close()

	never := newPatient(inner, make(chan struct{}))
	go func() {
		_, err := never.Accept()
		accepted <- err
	}()
	never.Close()
	if err := <-accepted; err == nil {
		t.Error("accepted after Close")
	}
}

// certificate writes a self-signed certificate for localhost, and returns it.
func certificate(t *testing.T, dir string, serial int64) *x509.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: "localhost"}, DNSNames: []string{"localhost"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	for name, block := range map[string]*pem.Block{"cert.pem": {Type: "CERTIFICATE", Bytes: der}, "key.pem": {Type: "EC PRIVATE KEY", Bytes: secret}} {
		if err := os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func TestTLS(t *testing.T) {
	s := newSite(t, testenv.Redis(t).URL(), "")
	first := certificate(t, s.dir, 1)
	s.write("routes: []\n")
	text, err := os.ReadFile(s.config)
	if err != nil {
		t.Fatal(err)
	}
	withTLS := strings.Replace(string(text), "listen: {", "listen: {tls: {cert_file: "+s.dir+"/cert.pem, key_file: "+s.dir+"/key.pem}, ", 1)
	if err := os.WriteFile(s.config, []byte(withTLS), 0o600); err != nil {
		t.Fatal(err)
	}
	stop := s.serve()
	ping := func(trust *x509.Certificate) error {
		roots := x509.NewCertPool()
		roots.AddCert(trust)
		conn, err := tls.Dial("unix", s.socket, &tls.Config{RootCAs: roots, ServerName: "localhost"})
		if err != nil {
			return err
		}
		defer conn.Close()
		if _, err := conn.Write([]byte("PING\r\n")); err != nil {
			return err
		}
		reply := make([]byte, 7)
		if _, err := conn.Read(reply); err != nil {
			return err
		}
		if string(reply) != "+PONG\r\n" {
			t.Errorf("PING: %q", reply)
		}
		return nil
	}
	if err := ping(first); err != nil {
		t.Fatal(err)
	}
	second := certificate(t, s.dir, 2)
	if code, body := s.post("/reload"); code != 200 {
		t.Fatalf("reload: %d %s", code, body)
	}
	if err := ping(second); err != nil {
		t.Errorf("the renewed certificate: %v", err)
	}
	if ping(first) == nil {
		t.Error("the old certificate is still shown")
	}
	if err := os.WriteFile(filepath.Join(s.dir, "key.pem"), []byte("broken"), 0o600); err != nil {
		t.Fatal(err)
	}
	if code, _ := s.post("/reload"); code == 200 {
		t.Error("a broken key was accepted")
	}
	if err := ping(second); err != nil {
		t.Errorf("after a refused reload: %v", err)
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
	if code := exitCode(s.run("serve"), &s.stderr); code != exitConfig {
		t.Errorf("exit code %d with a broken key", code)
	}
}

func TestRedisTLS(t *testing.T) {
	dir := t.TempDir()
	cert := certificate(t, dir, 1)
	if got, err := redisTLS(config.RedisTLS{}); got != nil || err != nil {
		t.Errorf("nothing: %v %v", got, err)
	}
	got, err := redisTLS(config.RedisTLS{CAFile: filepath.Join(dir, "cert.pem")})
	if err != nil || got.InsecureSkipVerify {
		t.Fatalf("ca_file: %v", err)
	}
	if _, err := cert.Verify(x509.VerifyOptions{Roots: got.RootCAs}); err != nil {
		t.Errorf("ca_file: %v", err)
	}
	if _, err := redisTLS(config.RedisTLS{CAFile: filepath.Join(dir, "key.pem")}); err == nil {
		t.Error("a file without a certificate was accepted")
	}
	if got, err := redisTLS(config.RedisTLS{InsecureSkipVerify: true}); err != nil || !got.InsecureSkipVerify {
		t.Errorf("insecure_skip_verify: %v", err)
	}
}
