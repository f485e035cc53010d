# The project's commands. `make` alone lists them, and there are twelve at most:
# what is only a step of another is not a target of its own. All of them work on
# a clean clone on a machine that has Go, git and make: tools are built from
# pinned modules into bin/, nothing is expected to be installed.

SHELL       := bash
.SHELLFLAGS := -eu -o pipefail -c
MAKEFLAGS   += --no-builtin-rules
.DEFAULT_GOAL := help

MODULE  := vault-plugin-secrets-openai
VERSION ?= v0.1.0-dev
SUITE   ?= all
RUN     ?= .
PKG     ?=

# The race detector needs cgo and with it a C compiler, which Go alone does not
# bring. Without one the tests still run, and say what they did without.
RACE := $(if $(shell command -v $$(go env CC)),-race)

LINT    := bin/golangci-lint
ACTIONS := bin/actionlint
VULN    := bin/govulncheck

# How the plugin is compiled, wherever it is going to run: static, and the same
# bytes from the same sources in any folder, whatever the environment asks of Go
# (tools/release sets the same).
GO_BUILD := CGO_ENABLED=0 GOAMD64=v1 GOARM64=v8.0 GOFLAGS=-mod=readonly GOEXPERIMENT= GOFIPS140=off GOWORK=off \
	go build -trimpath -ldflags "-s -w -X $(MODULE).version=$(VERSION)"

.PHONY: help demo dev test bench build image release lint fuzz vuln clean

help: ## This list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 16

demo: ## The life of a key, on a real Vault: the simulator, or OpenAI if OPENAI_ADMIN_KEY and OPENAI_PROJECT_ID are set
	@go run ./test/demo

dev: ## The demo's environment, configured and left running until Ctrl-C
	@go run ./test/demo -dev

# Everything runs even if an early part fails, so that one run shows all that is
# wrong; the count stays the last line, and the exit status covers all of it.
# With several servers the tests' package is named with its server, since the
# count knows tests by their names.
test: ## Format, vet, lint, unit and integration tests (a part: SUITE=unit or integration, RUN=regexp; VAULT_VERSION=oldest, all or such as 1.19.4; SUITE=unit PKG=. RUN=regexp for one package at once, without the race detector)
	@if [ -n '$(PKG)' ]; then exec go test -run '$(RUN)' '$(PKG)'; fi; \
	go build -buildvcs=false -o bin/tally ./test/tally; failed=0; \
	if [ '$(SUITE)' = all ]; then $(MAKE) --no-print-directory lint || failed=1; fi; \
	if [ -z '$(RACE)' ]; then echo "no C compiler: the tests run without the race detector"; fi; \
	if [ '$(SUITE)' != unit ]; then servers=$$(scripts/vault.sh) || exit 1; fi; \
	{ rc=0; \
	  if [ '$(SUITE)' != integration ]; then \
	    go test -json $(RACE) -run '$(RUN)' -timeout 20m ./... || rc=1; \
	    (cd tools/release && go test -json -run '$(RUN)' ./...) || rc=1; fi; \
	  if [ '$(SUITE)' != unit ]; then while IFS= read -r VAULT_BIN; do export VAULT_BIN; \
	    go test -json $(RACE) -run '$(RUN)' -skip '^TestWorld|OnTheModel$$' -tags integration -count=1 -timeout 20m ./test/integration/... ./test/simulation | \
	      sed "s|\"Package\":\"[^\"]*|& (on $${VAULT_BIN##*/})|" || rc=1; done <<<"$$servers"; fi; \
	  exit $$rc; } | bin/tally || failed=1; \
	exit $$failed

bench: ## The engine measured beside one that does nothing, on a real Vault: a table, and dist/bench.json (BENCH='-only issue,raft' for a part, BENCH=-profile, BENCH=-help)
	@go run ./test/bench $(BENCH)

build: ## The plugin, into bin/ (VERSION=vX.Y.Z sets what it says it is)
	$(GO_BUILD) -o bin/$(MODULE) ./cmd/$(MODULE)

# The image's date is the commit's, so that it does not depend on when it is
# made; the commit is told by a label and not by Go's version-control stamp, which
# differs where a file lies beside the sources.
ARCH ?= $(shell go env GOARCH)
DIST ?= dist
image: export SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct 2>/dev/null || echo 0)
image: ARCHIVE = $(DIST)/$(MODULE)_$(VERSION:v%=%)_linux_$(ARCH).oci.tar
image: ## The container image, into dist/ and into Docker where it runs (VERSION=, ARCH=arm64); nothing is pulled
	@GOOS=linux GOARCH=$(ARCH) $(GO_BUILD) -buildvcs=false -o $(DIST)/linux_$(ARCH)/$(MODULE) ./cmd/$(MODULE)
	@cd tools/release && GOOS= GOARCH= go run ./image -binary $(abspath $(DIST)/linux_$(ARCH)/$(MODULE)) -version $(VERSION) -arch $(ARCH) \
	  -revision "$$(git rev-parse HEAD 2>/dev/null)$$(git status --porcelain --untracked-files=normal 2>/dev/null | sed -n '1s/.*/-dirty/p')" \
	  -o $(abspath $(ARCHIVE))
	@echo "$(ARCHIVE)"
	@if [ "$$(docker version -f '{{.Server.Arch}}' 2>/dev/null)" = $(ARCH) ]; then \
	  docker load -q -i $(ARCHIVE); docker image inspect -f '{{.Id}}' $(MODULE):$(VERSION:v%=%); \
	  else echo "not loaded: no Docker engine for $(ARCH) answers"; fi

release: ## All binaries, SBOMs and sums, into dist/ (VERSION=vX.Y.Z; COSIGN_KEY or GPG_KEY signs)
	@cd tools/release && GOOS= GOARCH= go run . -root ../.. -version '$(VERSION)'

lint: $(LINT) $(ACTIONS) ## Format check, go vet, the order of the files, golangci-lint, actionlint and shellcheck (FIX=1 repairs what it can)
	@$(if $(FIX),$(LINT) fmt)
	@failed=0; \
	unformatted=$$(gofmt -l .); if [ -n "$$unformatted" ]; then echo "Not formatted (make lint FIX=1):"; echo "$$unformatted"; failed=1; fi; \
	go vet -tags integration,live,bench ./... || failed=1; \
	go run ./tools/layout || failed=1; \
	for module in . tools/release; do \
	  (cd $$module && $(CURDIR)/$(LINT) run --allow-serial-runners $(if $(FIX),--fix) ./...) || failed=1; done; \
	$(ACTIONS) .github/workflows/*.yml || failed=1; \
	if command -v shellcheck >/dev/null; then shellcheck -x .ci/run scripts/*.sh || failed=1; \
	else echo "shellcheck is not installed: the scripts were not checked"; fi; \
	exit $$failed

fuzz: ## The simulated world for an hour (WORLD=10m for less), and every fuzz target for 30 s (FUZZTIME=2m for longer)
	go test ./test/simulation -run '^TestWorld$$' -timeout 0 -for $${WORLD:-1h} -v
	@grep -rHoE '^func Fuzz[A-Za-z0-9_]+' --include='*_test.go' . | sort | while IFS=: read -r file func; do \
	  name=$${func#func }; echo "== $$name ($$(dirname "$$file"))"; \
	  go test -run '^$$' -fuzz "^$$name\$$" -fuzztime $${FUZZTIME:-30s} "$$(dirname "$$file")"; \
	done

vuln: $(VULN) ## Known vulnerabilities in what the plugin is built from, but for those that tools/vuln accepts (asks vuln.go.dev)
	@$(VULN) -format json ./... | go run ./tools/vuln

clean: ## Remove bin/ (with the Vault server that was built, if one was) and dist/
	rm -rf bin dist

# Tools live in modules of their own, so that their few hundred dependencies are
# not ours (and actionlint's YAML not golangci-lint's). They are rebuilt when the pins move.
$(LINT): tools/lint/go.mod
	@echo "Building golangci-lint from tools/lint (a few minutes, once)"
	@cd tools/lint && go build -buildvcs=false -o ../../$@ github.com/golangci/golangci-lint/v2/cmd/golangci-lint

$(ACTIONS): tools/actionlint/go.mod
	@cd tools/actionlint && go build -buildvcs=false -o ../../$@ github.com/rhysd/actionlint/cmd/actionlint

$(VULN): tools/lint/go.mod
	@cd tools/lint && go build -buildvcs=false -o ../../$@ golang.org/x/vuln/cmd/govulncheck
