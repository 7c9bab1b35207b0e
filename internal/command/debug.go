package command

import (
	"slices"
	"strings"
)

// debugWords are the subcommands of DEBUG in Redis 7.0 to 8.6 and Valkey 9.1, those included that its HELP keeps to itself.
// DEBUG is no container: its subcommands have no rows, and an unknown one is answered by DEBUG.
var debugWords = strings.Fields(`
	aof-flush-sleep asm-failpoint asm-trim-method assert change-repl-id client-enforce-reply-list client-eviction
	close-cluster-link-on-packet-drop clusterlink config-rewrite-force-all crash-and-recover
	delay-rdb-client-free-second dict-resizing digest digest-value disable-cluster-random-ping
	disable-cluster-reconnection drop-cluster-packet-filter error force-free-primary-async force-tls-write-error
	hashtable-can-abort-shrink help htstats htstats-key internal_secret keysizes-hist-assert leak listpack loadaof log
	mallctl mallctl-str mark-internal-client object oom panic pause-after-fork pause-cron populate protect-client protocol
	quicklist quicklist-packed-threshold reload repl-pause replicate reply-copy-avoidance replybuffer restart script sdslen
	segfault set-active-expire set-allow-access-expired set-disable-deny-scripts set-skip-checksum-validation sleep
	slotmigration stringmatch-test structsize ziplist`)

// DebugWords returns the known subcommands of DEBUG.
func DebugWords() []string { return slices.Clone(debugWords) }
