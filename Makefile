# The project's commands; `make` alone lists them. There are at most twelve: a step of
# another target is not a target. All of them work in a clean clone with only Go, git and
# make installed: tools are built from pinned modules into bin/.

SHELL       := bash
.SHELLFLAGS := -eu -o pipefail -c
MAKEFLAGS   += --no-builtin-rules
.DEFAULT_GOAL := help

MODULE  := vault-plugin-secrets-openai
VERSION ?= v0.1.0-dev
SUITE   ?= all
RUN     ?= .
PKG     ?=

LINT    := bin/golangci-lint
ACTIONS := bin/actionlint
VULN    := bin/govulncheck

PROGRAMS ?= $(MODULE) openai-broker

# The build for all platforms: static and reproducible, independent of the folder and of
# Go's environment variables (tools/release sets the same).
GO_BUILD := CGO_ENABLED=0 GOAMD64=v1 GOARM64=v8.0 GOFLAGS=-mod=readonly GOEXPERIMENT= GOFIPS140=off GOWORK=off \
	go build -trimpath -ldflags "-s -w -X $(MODULE).version=$(VERSION) -X $(MODULE)/broker.version=$(VERSION)"

.PHONY: help demo dev test bench build image release lint fuzz vuln clean

help: ## Print this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 16

demo: ## Walk through the lifecycle of a key on a real Vault, with the simulator, or with OpenAI if OPENAI_ADMIN_KEY and OPENAI_PROJECT_ID are set
	@go run ./test/demo

dev: ## Start the demo's environment, configured, until Ctrl-C
	@go run ./test/demo -dev

test: ## Run the format check, vet, linters, unit and integration tests (select with SUITE=unit or integration, RUN=regexp, VAULT_VERSION=oldest, all or a version; PKG=. RUN=regexp runs only the tests of one package, without the race detector)
	@MAKE='$(MAKE_COMMAND)' SUITE='$(SUITE)' RUN='$(RUN)' PKG='$(PKG)' scripts/test.sh

bench: ## Benchmark the engine against an empty one on a real Vault: a table, and dist/bench.json (BENCH='-only issue,raft' for a part, BENCH=-profile, BENCH=-help)
	@go run ./test/bench $(BENCH)

build: ## Build the plugin and openai-broker into bin/ (VERSION=vX.Y.Z sets their version)
	@for program in $(PROGRAMS); do echo "bin/$$program"; $(GO_BUILD) -o bin/$$program ./cmd/$$program; done

# The image's date is that of the commit, so that the build is reproducible; the commit is
# in a label instead of Go's version-control stamp, which changes with untracked files.
ARCH ?= $(shell go env GOARCH)
DIST ?= dist
image: export SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct 2>/dev/null || echo 0)
image: ## Build the container images into dist/, and load them into Docker if available (VERSION=, ARCH=arm64); pulls nothing
	@revision="$$(git rev-parse HEAD 2>/dev/null)$$(git status --porcelain --untracked-files=normal 2>/dev/null | sed -n '1s/.*/-dirty/p')"; \
	docker="$$(docker version -f '{{.Server.Arch}}' 2>/dev/null || true)"; \
	for program in $(PROGRAMS); do \
	  archive=$(DIST)/$${program}_$(VERSION:v%=%)_linux_$(ARCH).oci.tar; \
	  GOOS=linux GOARCH=$(ARCH) $(GO_BUILD) -buildvcs=false -o $(DIST)/linux_$(ARCH)/$$program ./cmd/$$program; \
	  (cd tools/release && GOOS= GOARCH= go run ./image -name $$program -binary $(abspath $(DIST))/linux_$(ARCH)/$$program -version $(VERSION) \
	    -arch $(ARCH) -revision "$$revision" -o $(abspath $(DIST))/$${archive##*/}); \
	  echo "$$archive"; \
	  if [ "$$docker" = $(ARCH) ]; then docker load -q -i $$archive; docker image inspect -f '{{.Id}}' $$program:$(VERSION:v%=%); \
	  else echo "not loaded: no Docker engine for $(ARCH) available"; fi; \
	done

release: ## Build all binaries, SBOMs and checksums into dist/ (VERSION=vX.Y.Z; COSIGN_KEY or GPG_KEY signs)
	@cd tools/release && GOOS= GOARCH= go run . -root ../.. -version '$(VERSION)'

lint: $(LINT) $(ACTIONS) ## Run the format check, go vet, tools/layout, golangci-lint, actionlint and shellcheck (FIX=1 fixes what it can)
	@$(if $(FIX),$(LINT) fmt)
	@failed=0; \
	unformatted=$$(gofmt -l .); if [ -n "$$unformatted" ]; then echo "Not formatted (make lint FIX=1):"; echo "$$unformatted"; failed=1; fi; \
	go vet -tags integration,live,bench ./... || failed=1; \
	go run ./tools/layout || failed=1; \
	for module in . tools/release; do \
	  (cd $$module && $(CURDIR)/$(LINT) run --allow-serial-runners $(if $(FIX),--fix) ./...) || failed=1; done; \
	$(ACTIONS) .github/workflows/*.yml || failed=1; \
	if command -v shellcheck >/dev/null; then shellcheck -x .ci/run scripts/*.sh || failed=1; \
	else echo "shellcheck is not installed; scripts not checked"; fi; \
	exit $$failed

fuzz: ## Run the simulated world for an hour (WORLD=10m for less), and every fuzz target for 30 s (FUZZTIME=2m for longer)
	go test ./test/simulation -run '^TestWorld$$' -timeout 0 -for $${WORLD:-1h} -v
	@grep -rHoE '^func Fuzz[A-Za-z0-9_]+' --include='*_test.go' . | sort | while IFS=: read -r file func; do \
	  name=$${func#func }; echo "== $$name ($$(dirname "$$file"))"; \
	  go test -run '^$$' -fuzz "^$$name\$$" -fuzztime $${FUZZTIME:-30s} "$$(dirname "$$file")"; \
	done

vuln: $(VULN) ## Check for known vulnerabilities that tools/vuln does not accept (queries vuln.go.dev)
	@$(VULN) -format json ./... | go run ./tools/vuln

clean: ## Remove bin/ (including a built Vault server) and dist/
	rm -rf bin dist

# Tools have their own modules, so that their dependencies are separate from the plugin's
# and from each other. They are rebuilt when their pins change.
$(LINT): tools/lint/go.mod
	@echo "Building golangci-lint from tools/lint (a few minutes, once)"
	@cd tools/lint && go build -buildvcs=false -o ../../$@ github.com/golangci/golangci-lint/v2/cmd/golangci-lint

$(ACTIONS): tools/actionlint/go.mod
	@cd tools/actionlint && go build -buildvcs=false -o ../../$@ github.com/rhysd/actionlint/cmd/actionlint

$(VULN): tools/lint/go.mod
	@cd tools/lint && go build -buildvcs=false -o ../../$@ golang.org/x/vuln/cmd/govulncheck
