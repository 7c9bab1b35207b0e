//go:build linux

package main

import (
	"bytes"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"
)

// tick is the unit of times in /proc/<pid>/stat: USER_HZ, which is 100 on every machine that Go runs on.
const tick = 10 * time.Millisecond

// cpu is the CPU time that a process has taken, with the threads it has ended.
func cpu(pid int) (time.Duration, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	return parseStat(b)
}

func parseStat(b []byte) (time.Duration, error) {
	// pid (name) state …: the name may hold anything, so count from its last parenthesis. utime is the 14th field, stime the next.
	fields := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	if len(fields) < 13 {
		return 0, fmt.Errorf("/proc stat has %d fields", len(fields))
	}
	user, err := strconv.ParseInt(fields[11], 10, 64)
	if err != nil {
		return 0, err
	}
	system, err := strconv.ParseInt(fields[12], 10, 64)
	return time.Duration(user+system) * tick, err
}

// rss is a process's resident memory in MiB.
func rss(pid int) (float64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	return parseRSS(string(b))
}

func parseRSS(status string) (float64, error) {
	_, rest, _ := strings.Cut(status, "\nVmRSS:")
	fields := strings.Fields(rest)
	if len(fields) < 2 || fields[1] != "kB" {
		return 0, fmt.Errorf("/proc status has no VmRSS")
	}
	kb, err := strconv.ParseFloat(fields[0], 64)
	return kb / 1024, err
}

// meter takes the CPU time of a target's proxy and of Redis.
type meter struct {
	proxy, redis         int // pids; 0: there is no proxy
	proxyFirst, redisFst time.Duration
}

func (s *stack) meter(target string) (*meter, error) {
	m := &meter{proxy: s.pids[target], redis: s.redis.PID()}
	var err error
	m.proxyFirst, m.redisFst, err = m.read()
	return m, err
}

func (m *meter) read() (proxy, redis time.Duration, err error) {
	if m.proxy != 0 {
		if proxy, err = cpu(m.proxy); err != nil {
			return 0, 0, err
		}
	}
	redis, err = cpu(m.redis)
	return proxy, redis, err
}

// stop notes in run what n commands have cost, each.
func (m *meter) stop(run *Run, n int) error {
	proxy, redis, err := m.read()
	run.ProxyCPU = float64((proxy - m.proxyFirst).Microseconds()) / float64(n)
	run.RedisCPU = float64((redis - m.redisFst).Microseconds()) / float64(n)
	return err
}
