// Package compose loads deploy/compose as strictly as Compose does, holds it to what it promises, and runs what it says: Redis by its own
// command line and the proxy with its own configuration.
package compose
