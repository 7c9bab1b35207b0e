// Package command knows Redis's commands: what each is called, what it may do, and which of its arguments are
// keys. It opens no socket and keeps no state; everything it says about a command can be asked of a real server
// (COMMAND, COMMAND GETKEYSANDFLAGS), and its tests do ask.
//
// A command passes through the package like this:
//
//	info := command.Resolve(args)                // "CONFIG GET x" is config|get, "nonsense" is nil
//	keys, ok := command.Keys(info, args, keys[:0])
//
// Read table.go first (what is known of a command and how it is found), then keys.go (where its keys stand).
// table_gen.go holds the facts. The generator in gen reads them from an installed redis-server and adds the commands of later
// servers: those that were recorded from one (gen/later), and a few kept by hand (gen/extra.go). A command that is in none is
// unknown here, which is a safe answer: the caller asks the server.
package command

//go:generate go run ./gen
