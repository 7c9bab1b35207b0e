package proxy

import (
	"strings"

	cmdtab "cacheproxy/internal/command"
	"cacheproxy/policy"
)

// denyTargets are the rows of the command table as the rules of commands.deny see them. Static.
var denyTargets = func() []policy.DenyTarget {
	rows := cmdtab.All()
	targets := make([]policy.DenyTarget, len(rows))
	for i, info := range rows {
		targets[i] = policy.DenyTarget{Name: info.Name, Categories: info.ACL.Words(), Words: info.Name == "debug"}
	}
	return targets
}()

// SetDeny replaces the rules of commands.deny. A command that is under way is not called back.
func (s *Server) SetDeny(entries []string) error { return s.e.setDeny(entries) }

func (e *engine) setDeny(entries []string) error {
	d, err := policy.NewDeny(entries, denyTargets)
	if err == nil {
		e.deny.Store(d)
	}
	return err
}

// denial is the answer to a command that commands.deny forbids, nil to any other. It is asked of every command: one that has a
// row and passes costs a look into a slice.
func (s *session) denial(sl *slot) *refusal {
	d := s.e.deny.Load()
	if sl.info != nil && sl.info.ID() >= 0 {
		switch d.Row(sl.info.ID()) {
		case policy.Allowed:
			return nil
		case policy.Denied:
			return deniedBy(sl.info.Name, d.RuleOf(sl.info.ID()))
		}
	}
	var word []byte
	if len(sl.args) > 1 {
		word = sl.args[1]
	}
	rule := d.Find(sl.args[0], word)
	if rule == "" {
		return nil
	}
	name := brief(sl.args[0])
	if sl.info != nil && sl.info.ID() >= 0 {
		name += "|" + brief(word) // the word was why
	}
	return deniedBy(name, rule)
}

func deniedBy(name, rule string) *refusal {
	return &refusal{"DENIED", name + " is denied by the proxy's setting commands.deny (" + rule + ")"}
}

// brief is the beginning of one of the client's own words: longer than any command's name, and no more.
func brief(word []byte) string { return strings.ToLower(printable(word[:min(len(word), 64)])) }

// refuse answers a denied command in its place; false: it must wait for that.
func (s *session) refuse(sl *slot, why *refusal) bool {
	switch {
	case s.relay != nil && s.relay.stream:
		s.cutOff() // no replica says this, and there are no replies among what comes
		return false
	case s.walls > 0:
		return false // MULTI may be among them
	case s.tx != nil:
		s.tx.dirty = true // as after any other command that cannot be queued
	}
	s.e.stats.denied.Add(1)
	s.answerClear(sl, why)
	return true
}
