// Package clients runs Redis clients of many makers and languages, each with a small program of its own, against the built
// proxy, without routes and with one in phase1, and against Redis itself. What fails against Redis is a mistake of the program.
//
// It is a module of its own, so that these clients are no dependencies of the product. Run it with `make clients`. Each folder
// but step is a client; step says how a program and the test talk to each other.
package clients
