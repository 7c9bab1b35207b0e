# The commands of a developer. `make help` lists them; .ci/run is what a change must pass.

GO           ?= go
# How long `make fuzz` spends on each target.
FUZZTIME     ?= 10s
# What `make test` demands of the packages that hold the promises, in percent of statements.
MIN_COVERAGE ?= 80
# How long `make soak` lasts.
SOAK         ?= 40s
# And the histories of `make chaos`.
CHAOS        ?= 3m
# How long `make model` goes on, beyond what `make test` explores.
MODEL        ?= 10m
# The name under which `make bench` writes, and QUICK=1 for its short form.
BENCH_NAME   ?= latest
QUICK        ?=
# What the image says it is, and the time of everything in it: the commit's, so that who builds it again gets the same bytes.
VERSION      ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)
REVISION     ?= $(shell git rev-parse HEAD 2>/dev/null)
SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct 2>/dev/null || echo 0)
COVERED      := policy fallback proxy

.DEFAULT_GOAL := help
.PHONY: help run build image test clients k8s compose soak chaos journey model bench compare lint fuzz deps clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

run: deps build ## start a private Redis and Postgres and the proxy in front of them
	@bin/cacheproxy dev

build: ## build bin/cacheproxy, a static binary
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '-s -w' -o bin/cacheproxy ./cmd/cacheproxy

image: ## build the container image for amd64 and arm64 in dist/image, without a container engine
	cd tools/image && SOURCE_DATE_EPOCH=$(SOURCE_DATE_EPOCH) $(GO) run . -version '$(VERSION)' -revision '$(REVISION)'

# Tests talk to real servers, whose state Go's test cache does not see: hence -count=1. The exit code goes through a file
# because a pipe in a POSIX shell answers with the code of its last command. The model explores in one goroutine, where the
# race detector finds nothing and makes it ten times slower.
test: ## run every test but soak, chaos and the journey, with the race detector; policy, fallback and proxy must be covered
	@sh scripts/install-deps.sh test
	@rm -f coverage.txt coverage.status
	@{ $(GO) test -race -count=1 -timeout=40m -cover $$($(GO) list ./... | grep -v -e /test/soak -e /test/chaos -e /test/model -e /test/journey) 2>&1; echo $$? >coverage.status; } | tee coverage.txt
	@test "$$(cat coverage.status)" = 0
	@for name in $(COVERED); do \
		awk -v name=$$name -v min=$(MIN_COVERAGE) ' \
			$$0 ~ ("[ \t]cacheproxy/" name "[ \t].*coverage: ") { \
				pkg = ($$1 == "ok") ? $$2 : $$1; \
				pct = $$0; sub(/.*coverage: /, "", pct); sub(/%.*/, "", pct); \
				found = 1; \
				if (pct + 0 < min) { print "coverage of " pkg " is " pct " %, below " min " %"; bad = 1 } \
			} \
			END { if (!found) { print "no coverage of cacheproxy/" name; bad = 1 } exit bad }' coverage.txt || exit 1; \
	done
	$(GO) test -count=1 -timeout=10m ./test/model

# A module of its own, so that the clients are no dependencies of the product. Programs wait more than they compute: eight at
# a time.
clients: ## run real Redis clients, of Go and other languages, through the built proxy
	@sh scripts/install-deps.sh clients
	cd test/clients && $(GO) test -count=1 -parallel=8 -timeout=5m .

# A module of its own, as the clients.
k8s: ## render and check deploy/k8s, and run the pod of its demo without a cluster
	@sh scripts/install-deps.sh
	cd test/deploy && $(GO) test -count=1 -timeout=10m ./k8s

compose: ## check deploy/compose, and run what it says without containers
	@sh scripts/install-deps.sh
	cd test/deploy && $(GO) test -count=1 -timeout=10m ./compose

# Alone, for it wants all of the machine.
soak: ## run 200 clients with random lives through the built proxy for SOAK, such as 1h
	@sh scripts/install-deps.sh
	SOAK=$(SOAK) $(GO) test -v -count=1 -timeout=0 ./test/soak

# Alone, as the soak. A run that takes half an hour longer than CHAOS ends itself: the test knows how long that is.
chaos: ## several sidecars under faults for CHAOS, such as 1h; what clients were told is checked for linearizability
	@sh scripts/install-deps.sh
	CHAOS=$(CHAOS) $(GO) test -v -count=1 -timeout=0 ./test/chaos

# Alone, too.
journey: ## a table of 200,000 rows goes from a column to Redis while readers and 500 writes a second never stop; seven minutes
	@sh scripts/install-deps.sh
	$(GO) test -v -count=1 -timeout=20m ./test/journey

model: ## explore the model of the protocols, without the race detector, and go on for MODEL, such as 1h
	MODEL=$(MODEL) $(GO) test -tags longer -v -count=1 -timeout=0 ./test/model

# Alone, for it wants all of the machine. It builds its own program too, so that Ctrl-C reaches it without a `go run` between.
bench: build ## measure the proxy beside Redis, HAProxy, twemproxy and Postgres; five minutes with QUICK=1
	@sh scripts/install-deps.sh bench
	$(GO) build -o bin/bench ./test/bench
	bin/bench -name $(BENCH_NAME) $(if $(QUICK),-quick)

compare: ## put two results of `make bench` beside each other: BEFORE=name, and BENCH_NAME if it is not latest
	@$(GO) build -o bin/bench ./test/bench
	@bin/bench -compare bench/$(BEFORE).json bench/$(BENCH_NAME).json

lint: ## run golangci-lint in the version that tools/go.mod pins
	$(GO) tool -modfile=tools/go.mod golangci-lint run ./...
	@for module in test/clients test/deploy tools/image; do \
		echo "golangci-lint in $$module"; \
		(cd $$module && $(GO) tool -modfile=$(CURDIR)/tools/go.mod golangci-lint run ./...) || exit 1; \
	done

fuzz: deps ## run every fuzz target for FUZZTIME
	@pkgs=$$($(GO) list ./...) || exit 1; \
	for pkg in $$pkgs; do \
		targets=$$($(GO) test -list '^Fuzz' $$pkg) || exit 1; \
		for target in $$(echo "$$targets" | grep '^Fuzz'); do \
			echo "$$pkg $$target"; \
			$(GO) test -run '^$$' -fuzz "^$$target\$$" -fuzztime $(FUZZTIME) $$pkg || exit 1; \
		done; \
	done

deps: ## install the servers that this machine lacks
	@sh scripts/install-deps.sh

clean: ## remove what builds and tests left
	rm -rf bin .tools .data dist coverage.txt coverage.status test/clients/*/node_modules
