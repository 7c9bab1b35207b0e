//go:build !wrong

package proxy

// breakRules breaks rules of the protocols where a program is built to show that the tests notice. This one is not.
func breakRules(*engine) {}
