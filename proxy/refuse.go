package proxy

import (
	"fmt"

	"cacheproxy/policy"
)

// refusal is a clear no: an error line whose first word is a code (P9). Outcomes are counted by code.
type refusal struct {
	code string
	text string
}

// isRefusal tells that a reply is one of ours.
func isRefusal(reply []byte) bool {
	if !isError(reply) {
		return false
	}
	switch string(errorCode(reply)) {
	case "UNAVAILABLE", "UNCERTAIN", "DENIED", "NOTJSON":
		return true
	}
	return false
}

func (c *refusal) reply(b []byte) []byte { return appendError(b, c.code+" "+c.text) }

// unavailable: the store that could decide cannot be asked; nothing was changed.
func unavailable(r *policy.Route, why string) *refusal {
	if r == nil {
		return &refusal{"UNAVAILABLE", why}
	}
	return &refusal{"UNAVAILABLE", fmt.Sprintf("%s (route %s, %s)", why, r.Name, r.Phase)}
}

// uncertain: the command was sent and no answer came; it may have run (P5).
func uncertain(r *policy.Route, why string) *refusal {
	if r == nil {
		return &refusal{"UNCERTAIN", why + "; the command may have run and was not repeated"}
	}
	return &refusal{"UNCERTAIN", fmt.Sprintf("%s; the command may have run and was not repeated (route %s, %s)", why, r.Name, r.Phase)}
}
