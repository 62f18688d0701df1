# The commands of this repository. `make help` lists them.

GO      ?= go
TOOL    := $(GO) tool -modfile=tools/go.mod
BIN     := bin/hallmark
# The race detector and PKCS #11 need a C compiler; without one the tests run
# without them.
RACE    := $(shell command -v gcc >/dev/null 2>&1 && echo -race)
FUZZTIME ?= 60s

.PHONY: help
help: ## list the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

.PHONY: build
build: ## build bin/hallmark, one static binary
	@CGO_ENABLED=0 $(GO) build -trimpath -o $(BIN) .

.PHONY: build-pkcs11
build-pkcs11: ## build it with PKCS #11, which takes a C compiler
	@CGO_ENABLED=1 $(GO) build -trimpath -tags pkcs11 -o $(BIN) .

.PHONY: run
run: build ## a trust domain on this machine, with an identity for you
	@$(BIN) dev

# Many tests wait for seconds to pass, so that more of them run at once than there
# are processors. "make check" vets.
.PHONY: test
test: test-system test-pkcs11 test-packages ## all tests; installs what they need (as root, with apt)

# What runs the binary, built as it is for users: the race detector would see the
# test alone, and make each start of a command four times as slow.
.PHONY: test-system
test-system: test-deps
	CGO_ENABLED=0 $(GO) test -vet=off -timeout 14m -p 2 -parallel 4 ./test/... ./pkg/cli

.PHONY: test-packages
test-packages: test-deps
	$(GO) test $(RACE) -vet=off -timeout 14m -p 3 -parallel 4 $$($(GO) list ./... | grep -v '/hallmark/test\|/pkg/cli$$')

.PHONY: test-pkcs11
test-pkcs11: test-deps
	$(if $(RACE),$(GO) test $(RACE) -vet=off -tags pkcs11 -run 'PKCS11|TestEveryKeyManager/pkcs11' ./server/authority ./server)

.PHONY: test-deps
test-deps:
	@test/install

# Kubernetes must know its own version.
KUBERNETES_VERSION = $(shell $(GO) -C tools/kubernetes list -m -f '{{.Version}}' k8s.io/kubernetes)
KUBERNETES_FLAGS = -s -w -X k8s.io/component-base/version.gitVersion=$(KUBERNETES_VERSION) \
	-X k8s.io/component-base/version.gitMajor=$(word 1,$(subst ., ,$(KUBERNETES_VERSION:v%=%))) \
	-X k8s.io/component-base/version.gitMinor=$(word 2,$(subst ., ,$(KUBERNETES_VERSION:v%=%)))

.PHONY: kubernetes
kubernetes: test-deps ## pods, nodes and users of a real Kubernetes; builds that first (as root)
	@mkdir -p bin/kubernetes
	$(GO) -C tools/kubernetes build -trimpath -ldflags='$(KUBERNETES_FLAGS)' -o $(CURDIR)/bin/kubernetes/ \
		k8s.io/kubernetes/cmd/kube-apiserver k8s.io/kubernetes/cmd/kubelet k8s.io/kubernetes/cmd/kubectl
	HALLMARK_KUBERNETES=$(CURDIR)/bin/kubernetes $(GO) test -count=1 -timeout 10m -run 'TestAReal' -v ./test

.PHONY: relying-parties
relying-parties: test-deps ## libraries of Node take our tokens; needs node 20 and npm (as root)
	@command -v node npm >/dev/null || { echo "node and npm are missing; run: apt-get install nodejs npm"; exit 1; }
	@mkdir -p bin/relyingparty && cp test/relyingparty/node/* bin/relyingparty/
	npm ci --prefix bin/relyingparty --no-audit --no-fund --ignore-scripts
	HALLMARK_RELYING_PARTIES=$(CURDIR)/bin/relyingparty $(GO) test -count=1 -run 'TestLibrariesOfNode' -v ./test/relyingparty

.PHONY: race
race: test-deps ## all tests under the race detector; takes half an hour
	$(GO) test -race -timeout 40m -p 2 ./...

.PHONY: bridges
bridges: test-deps ## three levels of servers; haproxy and PostgreSQL under load (as root)
	HALLMARK_LONG=1 $(GO) test -count=1 -timeout 14m -run 'TestNested|TestServersThat|TestPostgreSQL|TestFederation' -v ./test

.PHONY: soak
soak: build test-deps ## ten minutes of one-minute SVIDs under mTLS, with crashes; fifty killed servers
	HALLMARK_LONG=1 HALLMARK_SOAK=10m $(GO) test -count=1 -timeout 20m -run 'TestSeparateProcesses|TestKilledServer' -v ./test

.PHONY: chaos
chaos: build test-deps ## three servers, and all that happens to servers, twenty times (as root)
	HALLMARK_CHAOS=20,30s $(GO) test -count=1 -timeout 3h -run 'TestChaos' -v ./test

.PHONY: churn
churn: test-deps ## 2,000 processes on few PIDs and 200 containers come and go (as root)
	HALLMARK_CHURN=2000,200 $(GO) test -count=1 -timeout 20m -run 'TestNo(Process|Container)GetsAnothersIdentity' -v ./test

.PHONY: bench
bench: build ## benchmarks; docs/performance.md explains them
	$(GO) test -run '^$$' -bench . -benchtime 2s -timeout 30m ./test/bench ./server/... ./agent/... ./attestors/...

.PHONY: fuzz
fuzz: ## every fuzz target, FUZZTIME each (default 60s)
	@test/fuzz $(FUZZTIME)

# Built as the binary is, and PKCS #11 as the tests are, so that one build serves
# both.
.PHONY: check
check: export CGO_ENABLED = 0
check: vet ## formatting, vet, staticcheck, generated code
	$(TOOL) staticcheck ./...

.PHONY: vet
vet: export CGO_ENABLED = 0
vet:
	@test -z "$$(gofmt -l $$(git ls-files '*.go'))" || { echo "not formatted; run: gofmt -w"; gofmt -l $$(git ls-files '*.go'); exit 1; }
	$(GO) vet ./...
	$(if $(RACE),CGO_ENABLED=1 $(GO) vet $(RACE) -tags pkcs11 ./server/authority ./server/kms ./server)
	@test/generated

.PHONY: generate
generate: ## make the code in proto/, conf/schema and the reference in docs anew
	$(TOOL) buf lint
	$(TOOL) buf generate
	$(GO) run ./docs/gen
