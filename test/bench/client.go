//go:build linux

package main

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"time"
)

// client is a connection that speaks RESP, for what redis-benchmark cannot do.
type client struct {
	net.Conn
	rd  *bufio.Reader
	buf []byte
}

func dial(addr string) (*client, error) {
	nc, err := net.DialTimeout("tcp", addr, patience)
	if err != nil {
		return nil, err
	}
	return &client{Conn: nc, rd: bufio.NewReaderSize(nc, 64<<10)}, nil
}

// dialAll makes n connections that have been used. They are closed by the function that is returned.
func dialAll(addr string, n int, key string) (all []*client, closeAll func(), err error) {
	closeAll = func() {
		for _, c := range all {
			c.Close() //nolint:errcheck // it was only read from
		}
	}
	for range n {
		c, err := dial(addr)
		if err == nil {
			all = append(all, c)
			err = c.gets(key)
		}
		if err != nil {
			closeAll()
			return nil, nil, err
		}
	}
	return all, closeAll, nil
}

func (c *client) add(args ...string) {
	c.buf = append(c.buf, '*')
	c.buf = strconv.AppendInt(c.buf, int64(len(args)), 10)
	for _, a := range args {
		c.buf = append(c.buf, "\r\n$"...)
		c.buf = strconv.AppendInt(c.buf, int64(len(a)), 10)
		c.buf = append(append(c.buf, "\r\n"...), a...)
	}
	c.buf = append(c.buf, "\r\n"...)
}

func (c *client) flush() error {
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	_, err := c.Write(c.buf)
	c.buf = c.buf[:0]
	return err
}

// reply reads one reply without elements. An error and the lack of a value are errors.
func (c *client) reply() error {
	line, err := c.rd.ReadSlice('\n')
	if err != nil {
		return err
	}
	text := strings.TrimSpace(string(line))
	switch {
	case text == "":
		return fmt.Errorf("an empty reply")
	case text[0] == '-':
		return fmt.Errorf("the reply is %s", text)
	case text == "$-1":
		return fmt.Errorf("the reply is nil where there is a value")
	case text[0] == '$':
		n, err := strconv.Atoi(text[1:])
		if err != nil {
			return err
		}
		_, err = c.rd.Discard(n + 2)
		return err
	}
	return nil
}

// gets asks for keys in one pipeline.
func (c *client) gets(keys ...string) error {
	for _, k := range keys {
		c.add("GET", k)
	}
	return c.replies(len(keys))
}

// replies sends what was added and reads n replies.
func (c *client) replies(n int) error {
	if err := c.flush(); err != nil {
		return err
	}
	for range n {
		if err := c.reply(); err != nil {
			return err
		}
	}
	return nil
}

// info asks for a number that INFO tells.
func (c *client) info(section, name string) (int64, error) {
	c.add("INFO", section)
	if err := c.flush(); err != nil {
		return 0, err
	}
	head, err := c.rd.ReadString('\n')
	if err != nil {
		return 0, err
	}
	n, err := strconv.Atoi(strings.TrimSpace(strings.TrimPrefix(head, "$")))
	if err != nil {
		return 0, err
	}
	b := make([]byte, n+2)
	if _, err := io.ReadFull(c.rd, b); err != nil {
		return 0, err
	}
	_, rest, _ := strings.Cut(string(b), "\n"+name+":")
	v, _, _ := strings.Cut(rest, "\r")
	return strconv.ParseInt(v, 10, 64)
}

// prefix is of a target's keys. Who does not route shares them with Redis.
func prefix(target string) string {
	switch target {
	case phase1, phase2, phase3:
		return target + ":"
	}
	return "direct:"
}

// pattern is a key for redis-benchmark, which puts a random number in its place.
func pattern(target string, size int) string {
	return fmt.Sprintf("%s%06d:__rand_int__", prefix(target), size)
}

func keyOf(target string, size, i int) string {
	return fmt.Sprintf("%s%06d:%012d", prefix(target), size, i)
}

// value is a JSON document of n bytes, which Postgres keeps as JSONB.
func value(n int) string {
	const head, tail = `{"name": "analysis", "score": 4711, "text": "`, `"}`
	return head + strings.Repeat("v", n-len(head)-len(tail)) + tail
}
