#!/bin/sh
# Installs what development and tests need and this machine lacks: redis-server and the Postgres server programs.
# With the argument `test` also a C compiler, which Go's race detector needs, and Prometheus with promtool, which judge rules and dashboard; with `clients` that and the Redis clients of
# other languages, and what runs them; with `bench` the proxies and load generators that `make bench` compares with and uses.
# Does nothing, and says nothing, when all is there. Run by `make run`, `make test`, `make clients` and `make bench`.
set -eu
for_tests=${1-}

# Go cannot be installed well by a distribution's package manager (it is usually too old), so it is only checked.
# From Go 1.21 on, any `go` fetches the version that go.mod asks for by itself, unless that was switched off.
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
wanted=$(sed -n 's/^go \([0-9.]*\).*/\1/p' "$root/go.mod")
if ! command -v go >/dev/null 2>&1; then
	echo "install-deps: Go is not installed. Version $wanted or newer is needed: https://go.dev/dl/" >&2
	exit 1
fi
if ! (cd "$root" && go list -m >/dev/null 2>&1); then
	echo "install-deps: $(GOTOOLCHAIN=local go version 2>&1) is too old, or cannot fetch Go $wanted by itself." >&2
	echo "install-deps: install Go $wanted or newer: https://go.dev/dl/" >&2
	(cd "$root" && go list -m) >&2 || true
	exit 1
fi

# The places where packages put the Postgres server; the same list as in internal/devserver/find.go.
have_postgres() {
	bindir=$(pg_config --bindir 2>/dev/null || true)
	IFS_saved=$IFS
	IFS=:
	for dir in $PATH $bindir; do
		if [ -x "$dir/postgres" ] && [ -x "$dir/initdb" ]; then
			IFS=$IFS_saved
			return 0
		fi
	done
	IFS=$IFS_saved
	for dir in /usr/lib/postgresql/*/bin /usr/pgsql-*/bin /usr/libexec/postgresql* \
		/opt/homebrew/opt/postgres*/bin /usr/local/opt/postgres*/bin \
		/opt/homebrew/bin /usr/local/bin /usr/local/pgsql/bin; do
		if [ -x "$dir/postgres" ] && [ -x "$dir/initdb" ]; then
			return 0
		fi
	done
	return 1
}

have_redis() {
	for program in redis-server valkey-server; do
		command -v "$program" >/dev/null 2>&1 && return 0
		for dir in /usr/local/sbin /usr/sbin /opt/homebrew/bin /usr/local/bin; do
			[ -x "$dir/$program" ] && return 0
		done
	done
	return 1
}

have_compiler() {
	case $for_tests in
	'' | bench) return 0 ;;
	esac
	command -v "$(cd "$root" && go env CC)" >/dev/null 2>&1
}

# missing_clients prints the Debian packages of the clients that are not there. Node.js and npm may come from elsewhere; the
# others are taken in the versions that Debian has. test/clients looks for them in the same places.
missing_clients() {
	[ "$for_tests" = clients ] || return 0
	command -v redis-cli >/dev/null 2>&1 || printf ' redis-tools'
	command -v node >/dev/null 2>&1 || printf ' nodejs'
	command -v npm >/dev/null 2>&1 || printf ' npm'
	/usr/bin/python3 -I -c 'import redis' >/dev/null 2>&1 || python3 -I -c 'import redis' >/dev/null 2>&1 ||
		printf ' python3 python3-redis'
	[ -e /usr/include/hiredis/hiredis.h ] || printf ' libhiredis-dev'
	php -r 'exit(extension_loaded("redis") ? 0 : 1);' >/dev/null 2>&1 || printf ' php-cli php-redis'
	php -r 'exit(stream_resolve_include_path("Predis/autoload.php") ? 0 : 1);' >/dev/null 2>&1 || printf ' php-predis'
	ruby -e 'require "redis"' >/dev/null 2>&1 || printf ' ruby ruby-redis'
}

# missing_judges prints the Debian package of what the tests ask about alert rules and the dashboard.
missing_judges() {
	[ "$for_tests" = test ] || return 0
	{ have_program promtool && have_program prometheus; } || printf ' prometheus'
}

# missing_peers prints the Debian packages of what `make bench` measures beside the proxy. test/bench looks in the same places.
missing_peers() {
	[ "$for_tests" = bench ] || return 0
	have_program redis-benchmark || printf ' redis-tools'
	have_program haproxy || printf ' haproxy'
	have_program nutcracker || printf ' nutcracker'
	have_program pgbench || [ -n "$(find /usr/lib/postgresql/*/bin -name pgbench 2>/dev/null)" ] || printf ' postgresql-contrib'
}

# have_program looks also where an ordinary user's PATH does not.
have_program() {
	command -v "$1" >/dev/null 2>&1 || [ -x "/usr/sbin/$1" ] || [ -x "/usr/local/sbin/$1" ]
}

redis='' postgres='' compiler='' names=''
have_redis || { redis=yes names="$names redis-server"; }
have_postgres || { postgres=yes names="$names postgres"; }
have_compiler || { compiler=yes names="$names a-C-compiler"; }
extra="$(missing_clients)$(missing_judges)$(missing_peers)"
names="$names$extra"
[ -n "$names" ] || exit 0

# as_root runs a command as root, or says what to run as root.
as_root() {
	if [ "$(id -u)" -eq 0 ]; then
		"$@"
	elif command -v sudo >/dev/null 2>&1; then
		sudo "$@"
	else
		echo "install-deps: root rights are needed and there is no sudo. Run as root:" >&2
		echo "    sh $root/scripts/install-deps.sh $for_tests" >&2
		exit 1
	fi
}

# packages prints the names that a package manager has for what is missing: $1 for Redis, $2 for Postgres, $3 for a C
# compiler.
packages() {
	[ -z "$redis" ] || printf '%s ' "$1"
	[ -z "$postgres" ] || printf '%s ' "$2"
	[ -z "$compiler" ] || printf '%s ' "$3"
}

echo "install-deps: installing$names"
# shellcheck disable=SC2046 # the lists are meant to be split into words
if command -v apt-get >/dev/null 2>&1; then
	set -- $(packages redis-server postgresql 'gcc libc6-dev') $extra
	# have_candidates reads `apt-cache policy` and tells whether all $1 packages can be had.
	have_candidates() { [ "$(grep -c 'Candidate: [0-9]')" -eq "$1" ]; }
	apt_install() {
		# RUNLEVEL=1 keeps the packages from starting services of their own; ours are private.
		as_root env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 \
			apt-get install -y -q --no-install-recommends "$@"
	}
	if [ -n "$postgres" ] && [ ! -e /etc/postgresql-common/createcluster.conf ]; then
		# Read when the server package is configured: without it Debian creates and starts a cluster for the system.
		as_root sh -c 'mkdir -p /etc/postgresql-common &&
			echo "create_main_cluster = false" >/etc/postgresql-common/createcluster.conf'
	fi
	# What the package brings itself must not ask whether to replace our file.
	apt_try() { apt_install -o Dpkg::Options::=--force-confdef -o Dpkg::Options::=--force-confold "$@"; }
	# The index needs an update when it lacks a package, or names a version that is no longer served.
	if ! apt-cache policy "$@" 2>/dev/null | have_candidates $# || ! apt_try "$@"; then
		as_root apt-get update -q
		apt_try "$@"
	fi
elif [ -n "$extra" ]; then
	echo "install-deps: these are installed on Debian and Ubuntu only. Their packages there are:$extra" >&2
	exit 1
elif command -v dnf >/dev/null 2>&1; then
	as_root dnf install -y $(packages redis 'postgresql-server postgresql-contrib' 'gcc glibc-devel')
elif command -v apk >/dev/null 2>&1; then
	as_root apk add --no-cache $(packages redis 'postgresql postgresql-contrib' 'gcc musl-dev')
elif command -v pacman >/dev/null 2>&1; then
	as_root pacman -S --needed --noconfirm $(packages redis postgresql gcc)
elif command -v brew >/dev/null 2>&1; then
	if [ -n "$compiler" ]; then
		echo "install-deps: a C compiler is needed. Run: xcode-select --install" >&2
		exit 1
	fi
	brew install $(packages redis postgresql@17 '')
else
	echo "install-deps: no package manager that we know (apt-get, dnf, apk, pacman, brew)." >&2
	echo "install-deps: install these and see that they are in PATH:$names" >&2
	exit 1
fi

failed=''
have_redis || failed="$failed redis-server"
have_postgres || failed="$failed postgres"
have_compiler || failed="$failed a-C-compiler"
failed="$failed$(missing_clients)$(missing_judges)$(missing_peers)"
if [ -n "$failed" ]; then
	echo "install-deps: installed, but not found:$failed" >&2
	exit 1
fi
