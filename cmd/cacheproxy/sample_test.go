package main

import (
	"encoding/json"
	"net/http"
	"testing"
	"time"

	"cacheproxy/internal/testenv"
	"cacheproxy/proxy"
)

// verify.sample is 0 without a file's word, and taken over by a running process.
func TestSampleIsReloaded(t *testing.T) {
	s := newSite(t, testenv.Redis(t).URL(), testenv.Postgres(t))
	s.write(routes)
	stop := s.serve()
	checked := func() (n int64) {
		var st proxy.Stats
		if err := json.Unmarshal([]byte(s.do("CACHEPROXY", "STATS")), &st); err != nil {
			t.Fatal(err)
		}
		for _, r := range st.Routes {
			n += r.Verified
		}
		return n
	}
	s.do("SET", "user:1", "v")
	for range 100 {
		s.do("GET", "user:1")
	}
	if n := checked(); n != 0 {
		t.Errorf("%d hits were compared", n)
	}
	s.write(routes + "verify: {sample: 100%}\n")
	if code, body := s.post("/reload"); code != http.StatusOK {
		t.Fatalf("reload: %d %s", code, body)
	}
	for end := time.Now().Add(30 * time.Second); checked() == 0; time.Sleep(10 * time.Millisecond) {
		s.do("GET", "user:1") // one whose copies cannot be had in time is dropped
		if time.Now().After(end) {
			t.Fatalf("no hit is compared: %s", s.do("CACHEPROXY", "STATS"))
		}
	}
	if s.stderr.has("take effect at the next start") {
		t.Error("verify.sample waits for a restart")
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
}
