package main

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"cacheproxy/internal/config"
	"cacheproxy/internal/said"
)

// listeners are the open addresses of a process; admin is nil if there is none.
type listeners struct{ clients, observe, admin net.Listener }

// addresses are where they are, with the port that the system chose where the configuration left it to.
type addresses struct{ clients, observe, admin string }

// listenAll opens all addresses of cfg, or none.
func listenAll(cfg *config.Config) (*listeners, error) {
	var ls listeners
	for _, a := range []struct {
		to               *net.Listener
		setting, address string
	}{
		{&ls.clients, "listen.address", cfg.Listen.Address},
		{&ls.observe, "observe.address", cfg.Observe.Address},
		{&ls.admin, "admin.address", cfg.Admin.Address},
	} {
		if a.address == "" {
			continue
		}
		ln, err := listen(a.setting, a.address)
		if err != nil {
			ls.close()
			return nil, err
		}
		*a.to = ln
	}
	return &ls, nil
}

func (ls *listeners) close() {
	for _, ln := range []net.Listener{ls.clients, ls.observe, ls.admin} {
		if ln != nil {
			ln.Close() //nolint:errcheck // nobody has connected
		}
	}
}

func (ls *listeners) addresses() addresses {
	at := addresses{clients: ls.clients.Addr().String(), observe: ls.observe.Addr().String()}
	if ls.admin != nil {
		at.admin = ls.admin.Addr().String()
	}
	return at
}

// listen opens an address of the configuration, host:port or unix:///path. setting names it in errors.
func listen(setting, address string) (net.Listener, error) {
	network := "tcp"
	if path, ok := strings.CutPrefix(address, "unix://"); ok {
		network, address = "unix", path
		if err := removeStale(path); err != nil {
			return nil, fmt.Errorf("%s: %w", setting, err)
		}
	}
	ln, err := net.Listen(network, address)
	switch {
	case errors.Is(err, syscall.EADDRINUSE) && network == "tcp":
		_, port, _ := net.SplitHostPort(address)
		return nil, fmt.Errorf("%s: %s is in use; stop what listens there (`ss -ltnp sport = :%s` names it) or choose another address", setting, address, port)
	case errors.Is(err, syscall.EADDRINUSE):
		return nil, fmt.Errorf("%s: %s exists; remove it or choose another path", setting, address)
	case err != nil:
		return nil, fmt.Errorf("%s: %w", setting, err)
	}
	return ln, nil
}

// askTime is how long a process may take to accept on its socket. It is on this machine: the kernel answers.
const askTime = time.Second

// removeStale removes the socket file of a process that was killed. One that somebody listens on, and a file that is no
// socket, stay where they are.
func removeStale(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if info.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("%s exists and is not a socket; choose another path", path)
	}
	conn, err := net.DialTimeout("unix", path, askTime)
	if err == nil {
		conn.Close() //nolint:errcheck // nothing was sent
		return fmt.Errorf("%s is in use by another process; stop it or choose another path", path)
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return err
	}
	return os.Remove(path)
}

// patient is a listener whose first client waits until ready is closed.
type patient struct {
	net.Listener
	ready <-chan struct{}

	closing sync.Once
	closed  chan struct{}
}

func newPatient(ln net.Listener, ready <-chan struct{}) *patient {
	return &patient{Listener: ln, ready: ready, closed: make(chan struct{})}
}

func (l *patient) Accept() (net.Conn, error) {
	select {
	case <-l.ready:
	case <-l.closed:
		return nil, net.ErrClosed
	}
	return l.Listener.Accept()
}

func (l *patient) Close() error {
	l.closing.Do(func() { close(l.closed) })
	return l.Listener.Close()
}

// certificates are the TLS settings of the listener. They are read again at a reload, so that a certificate can be
// renewed in place.
type certificates struct {
	from    config.TLS
	current atomic.Pointer[tls.Config]
}

func newCertificates(from config.TLS) (*certificates, error) {
	c := &certificates{from: from}
	return c, c.read()
}

// read reads the files. After an error what was read before stays in force.
func (c *certificates) read() error {
	cert, err := tls.LoadX509KeyPair(c.from.CertFile, c.from.KeyFile)
	if err != nil {
		return said.Because("listen.tls: cert_file and key_file are no pair of PEM files", err)
	}
	t := &tls.Config{MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{cert}}
	if c.from.ClientCAFile != "" {
		if t.ClientCAs, err = certPool("listen.tls.client_ca_file", c.from.ClientCAFile); err != nil {
			return err
		}
		t.ClientAuth = tls.RequireAndVerifyClientCert
	}
	c.current.Store(t)
	return nil
}

// wrap makes ln speak TLS. Every handshake takes the certificate that is current then.
func (c *certificates) wrap(ln net.Listener) net.Listener {
	return tls.NewListener(ln, &tls.Config{
		MinVersion:         tls.VersionTLS12,
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) { return c.current.Load(), nil },
	})
}

func certPool(setting, path string) (*x509.CertPool, error) {
	pem, err := os.ReadFile(path)
	if err != nil {
		return nil, said.Because(setting, err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, said.Sentence(setting + ": the file holds no PEM certificate")
	}
	return pool, nil
}

// redisTLS is what redis.tls adds to a rediss:// URL; nil is nothing.
func redisTLS(from config.RedisTLS) (*tls.Config, error) {
	if from.CAFile == "" && !from.InsecureSkipVerify {
		return nil, nil
	}
	t := &tls.Config{MinVersion: tls.VersionTLS12, InsecureSkipVerify: from.InsecureSkipVerify}
	if from.CAFile != "" {
		pool, err := certPool("redis.tls.ca_file", from.CAFile)
		if err != nil {
			return nil, err
		}
		t.RootCAs = pool
	}
	return t, nil
}
