# csi-qcow2. Bare `make` lists the targets.
#
# Everything here needs Go and Debian's packages of hack/packages, which
# `make deps` (and whatever needs them) installs when they are missing.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

BIN     := bin/csi-qcow2
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo development)
# Stamp the revision where git can say it; a tree that git distrusts still builds.
VCS     := $(shell git rev-parse HEAD >/dev/null 2>&1 && echo auto || echo false)

FUZZ ?= .
T    ?= 30s

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: build
build: ## build the static bin/csi-qcow2
	CGO_ENABLED=0 go build -trimpath -buildvcs=$(VCS) -ldflags '-s -w -X main.version=$(VERSION)' -o $(BIN) ./cmd/csi-qcow2

.PHONY: demo
demo: ## show the whole life of a volume on this machine; ARGS='--keep --device fuse'
	@hack/deps.sh demo
	@echo 'building $(BIN)' && $(MAKE) --no-print-directory -s build
	@GOROOT="$$(go env GOROOT)" $(BIN) demo $(ARGS)

.PHONY: test
test: ## everything that must hold, from a fresh machine; installs what is missing
	@hack/deps.sh demo test
	@hack/test.sh

.PHONY: test-race
test-race: ## unit tests under the race detector (part of test)
	@hack/deps.sh demo test
	@hack/test.sh unit

.PHONY: test-kernel
test-kernel: ## the kernel's nbd driver in a small virtual machine (part of test)
	@hack/deps.sh demo test
	@hack/test.sh kernel

.PHONY: test-restart
test-restart: ## kill the node process N=200 times under load, in that machine
	@hack/deps.sh demo test
	@N='$(N)' hack/test.sh restart

.PHONY: sanity
sanity: ## csi-sanity against the real process with real devices (part of test)
	@hack/deps.sh demo test
	@hack/test.sh sanity

.PHONY: test-demo
test-demo: ## the demo, and the demo interrupted at many points (part of test)
	@hack/deps.sh demo test
	@hack/test.sh demo

.PHONY: test-crash
test-crash: ## power losses, kills and faults, N=20000 states each (part of test)
	@hack/deps.sh demo test
	@N='$(N)' hack/test.sh crash

.PHONY: test-sabotage
test-sabotage: ## break one rule of the code at a time: the tests must notice (part of test)
	@hack/deps.sh demo test
	@hack/test.sh sabotage

.PHONY: test-e2e
test-e2e: ## the driver on a real Kubernetes of one node; PARTS='build up readme deploy test suite down'
	@hack/e2e.sh $(PARTS)

.PHONY: test-dashboard
test-dashboard: ## the Grafana dashboard against Grafana's schema; needs npm
	@deploy/monitoring/grafana/check.sh

.PHONY: manifests
manifests: ## render and check deploy/kubernetes (part of test)
	@hack/test.sh manifests

.PHONY: lint
lint: ## go vet, staticcheck, gofmt and the house rules (part of test)
	@hack/test.sh lint

.PHONY: fmt
fmt: ## format the Go files that git knows
	@git ls-files '*.go' | xargs -r gofmt -w

.PHONY: bench
bench: ## compare with the peers, write bench/RESULTS.md; ARGS='-pairs 9 -run REGEXP -resume'
	@hack/deps.sh demo test
	@go run ./bench -record $(ARGS)

.PHONY: bench-stall
bench-stall: ## how long a snapshot of a full 2 TiB image keeps writers waiting; needs 8 GiB in /dev/shm
	@hack/deps.sh demo test
	@go run ./bench/stall $(ARGS)

.PHONY: bench-go
bench-go: ## run Go's benchmarks: time, bytes and allocations per operation
	go test -run '^$$' -bench . -benchmem ./...

.PHONY: fuzz
fuzz: ## run each fuzz target for T=30s; FUZZ=regexp picks some
	@hack/fuzz.sh '$(FUZZ)' '$(T)'

.PHONY: deps
deps: ## install Debian's packages of hack/packages that are missing
	@hack/deps.sh demo test

.PHONY: clean
clean: ## remove what was built
	rm -rf bin
