# samepage: `make help` lists what can be made. Every target does its own set-up.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
export PYTHON

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
STAMPS := $(VENV)/stamps
# More at once are hardly quicker: the daemons that they start need the processors, too.
TEST_JOBS ?= $(shell nproc)
# So many tests that fail may pass by being run once more, alone.
TEST_AGAIN ?= 0
SOAK_SECONDS ?= 600
CHAOS_SECONDS ?= 600
CHAOS_SEED ?=
BENCH_LINES ?= bench/results/last.jsonl
BENCH_PICTURE ?= bench/results/last.png
IMAGE_CACHE ?= $(abspath .cache/images)
PACKAGING := pyproject.toml hatch_build.py
GENERATED := samepage/v1 samepage/kubelet
PROTOS = $(sort $(wildcard $(GENERATED:%=proto/%/*.proto)))
# What protoc writes, in a form that `make proto-check` can send elsewhere.
PROTOC = PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m grpc_tools.protoc -Iproto

KUBE_SOURCE := tests/kube/binaries
# Kept outside of the checkout, one folder a version: building it takes ten minutes.
KUBE_CACHE ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/samepage/kubernetes
KUBE_FLAGS := $(foreach part,Version=v1.36.3 Major=1 Minor=36,-X k8s.io/component-base/version.git$(part))
KUBE_BINARIES = $(KUBE_CACHE)/$(shell cat $(KUBE_SOURCE)/go.* <(echo '$(KUBE_FLAGS)') | sha256sum | cut -c 1-12)

# Where there is no Go, the tests of the Go client are skipped.
GO ?= $(firstword $(shell command -v go) $(wildcard /usr/local/go/bin/go))
GO_BIN := $(abspath $(VENV))/go/bin
GO_CLIENT := tests/clients/go
GO_PACKAGE := samepage.example/client

.PHONY: help
help: ## Show this help
	@echo "samepage: identical memory, stored once. Targets:"
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-14s %s\n", $$1, $$2}'

.PHONY: demo
demo: $(STAMPS)/services native ## Two hosts on this machine share the memory of six workers
	@echo "==> samepage demo $(DEMO_ARGS)"
	@$(BIN)/samepage demo $(DEMO_ARGS)

.PHONY: test
test: $(STAMPS)/dev $(STAMPS)/system-test native native-test test-tools ## Run every test (PYTEST_ARGS="-k share" for some)
	@echo "==> running the Python tests"
	@tools/run-tests $(BIN)/python $(TEST_AGAIN) -n $(TEST_JOBS) --dist loadfile \
	    --no-loadscope-reorder --max-worker-restart 0 $(PYTEST_ARGS)

.PHONY: test-tools
test-tools: $(STAMPS)/checkov $(if $(GO),go-client $(STAMPS)/chart-tools) ## Install the programs that tests use

.PHONY: lint
lint: $(STAMPS)/dev ## Check style (ruff)
	@echo "==> checking style"
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

.PHONY: format
format: $(STAMPS)/dev ## Rewrite the Python sources in the project's style
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .

.PHONY: types
types: $(STAMPS)/dev ## Check types (mypy --strict)
	@echo "==> checking types"
	@$(BIN)/mypy

.PHONY: proto
proto: $(STAMPS)/dev ## Generate the Python code of proto/
	@echo "==> generating $(GENERATED:%=src/%)"
	@$(PROTOC) --python_out=src --grpc_python_out=src --mypy_out=src --mypy_grpc_out=src \
	    $(PROTOS:proto/%=%)

.PHONY: proto-check
proto-check: $(STAMPS)/dev ## Check that the generated code is what proto/ gives
	@echo "==> checking the generated code"
	@out=$$(mktemp -d); trap 'rm -rf "$$out"' EXIT; \
	$(PROTOC) --python_out="$$out" --grpc_python_out="$$out" --mypy_out="$$out" \
	    --mypy_grpc_out="$$out" $(PROTOS:proto/%=%); \
	for package in $(GENERATED); do \
	    diff -r -x __pycache__ -x __init__.py "$$out/$$package" "src/$$package" \
	        || { echo "src/$$package differs from proto/: run 'make proto'" >&2; exit 1; }; \
	done

.PHONY: go-client
go-client: $(STAMPS)/go-client ## Build the Go client of the tests, generated from proto/, and grpcurl

.PHONY: configs
configs: $(STAMPS)/dev ## Write deploy/config/*.toml from the services' settings
	@$(BIN)/python tools/sample-configs

.PHONY: configs-check
configs-check: $(STAMPS)/dev ## Check that deploy/config/*.toml say every setting
	@echo "==> checking the sample configurations"
	@$(BIN)/python tools/sample-configs --check

.PHONY: images
images: ## Build the container images, with buildah or docker (see tools/images)
	@tools/images

.PHONY: image-test
image-test: $(STAMPS)/dev local-images ## Build the images without a registry, and try them
	@$(BIN)/python -m pytest tests/images $(PYTEST_ARGS)

.PHONY: local-images
local-images: $(STAMPS)/system-images $(IMAGE_CACHE)/base.tar
	@IMAGE_BASE_TAR=$(IMAGE_CACHE)/base.tar tools/images

$(IMAGE_CACHE)/base.tar: tools/image-base | $(STAMPS)/system-images
	@echo "==> making a root file system of Debian"
	@mkdir -p $(@D) && tools/image-base $@

.PHONY: image-requirements
image-requirements: $(STAMPS)/venv ## Write down the newest versions of what the images hold
	@out=$$(mktemp -d); trap 'rm -rf "$$out"' EXIT; $(PYTHON) -m venv "$$out/venv"; \
	"$$out/venv/bin/pip" --disable-pip-version-check --quiet install '.[services]'; \
	{ echo "# What the images are built from: written by 'make image-requirements'."; \
	"$$out/venv/bin/pip" freeze --exclude samepage --exclude setuptools; } > deploy/images/requirements.txt

.PHONY: chart-docs
chart-docs: $(STAMPS)/dev ## Write the chart's schema and README table from its values.yaml
	@$(BIN)/python tools/chart-docs

.PHONY: chart-docs-check
chart-docs-check: $(STAMPS)/dev ## Check that the chart's schema and README are what values.yaml gives
	@echo "==> checking the chart's schema and README"
	@$(BIN)/python tools/chart-docs --check

.PHONY: manifests
manifests: $(STAMPS)/chart-tools ## Write deploy/k8s from the chart
	@tools/manifests $(GO_BIN)/helm

.PHONY: manifests-check
manifests-check: $(STAMPS)/chart-tools ## Check that deploy/k8s is what the chart gives
	@echo "==> checking the manifests"
	@tools/manifests $(GO_BIN)/helm --check

.PHONY: native
native: $(STAMPS)/system-build ## Build libsamepage
	@$(MAKE) -C native --silent

.PHONY: native-test
native-test: $(STAMPS)/system-build ## Run the C library's own tests
	@echo "==> running the C tests"
	@$(MAKE) -C native --silent --jobs=$(TEST_JOBS) test | tee $(STAMPS)/native-test.log
	@if [ -n "$${SAMEPAGE_NO_SKIPS:-}" ] && grep -q '^SKIP' $(STAMPS)/native-test.log; then \
	    $(PYTHON) tests/needs.py; fi

.PHONY: bench
bench: $(STAMPS)/bench native ## Measure, side by side with the peers (BENCH_ARGS="ksm --runs 1", --help)
	@mkdir -p $(dir $(BENCH_LINES)) && $(BIN)/python -m bench run $(BENCH_ARGS) | tee $(BENCH_LINES)

.PHONY: bench-plot
bench-plot: $(STAMPS)/dev ## Draw what `make bench` measured last, into BENCH_PICTURE
	@$(BIN)/python -m bench plot $(BENCH_LINES) $(BENCH_PICTURE)
	@echo "==> $(BENCH_PICTURE)"

.PHONY: model
model: $(STAMPS)/dev native ## Hold 5,000 random programs to a model (PYTEST_ARGS as for test)
	@SAMEPAGE_MODEL_PROGRAMS=5000 SAMEPAGE_MODEL_SECONDS=7200 \
	    $(BIN)/python -m pytest tests/model $(PYTEST_ARGS)

.PHONY: soak
soak: $(STAMPS)/dev native ## Ten minutes of everything at once (SOAK_SECONDS=600): nothing may grow
	@SAMEPAGE_SOAK_SECONDS=$(SOAK_SECONDS) $(BIN)/python -m pytest -s tests/soak

.PHONY: chaos
chaos: $(STAMPS)/dev $(STAMPS)/system-test native ## Let hosts, links and services fail at random (CHAOS_SECONDS=600, CHAOS_SEED=)
	@SAMEPAGE_CHAOS_SECONDS=$(CHAOS_SECONDS) SAMEPAGE_CHAOS_SEED=$(CHAOS_SEED) \
	    $(BIN)/python -m pytest -s tests/chaos $(PYTEST_ARGS)

.PHONY: kube-test
kube-test: $(STAMPS)/dev $(STAMPS)/system-kube $(STAMPS)/chart-tools local-images ## Install the chart on a real Kubernetes, and use it
	@$(MAKE) $(KUBE_BINARIES)/kubernetes-built
	@echo "==> the chart on a real Kubernetes, from $(KUBE_BINARIES)"
	@SAMEPAGE_KUBE_BINARIES=$(KUBE_BINARIES) $(BIN)/python -m pytest tests/kube/test_kube.py $(PYTEST_ARGS)

.PHONY: pods-test
pods-test: $(STAMPS)/dev $(STAMPS)/system-pods $(STAMPS)/chart-tools local-images ## Use the chart's pods without a control plane, by podman
	@echo "==> the chart's pods, without a Kubernetes"
	@$(BIN)/python -m pytest tests/kube/test_pods.py $(PYTEST_ARGS)

.PHONY: kube-ci
kube-ci: $(if $(wildcard $(KUBE_BINARIES)/kubernetes-built),kube-test,pods-test) ## kube-test where its Kubernetes is built already, else pods-test

.PHONY: build
build: $(STAMPS)/dev ## Build the wheel and the source archive into dist/
	@$(PIP) install build && $(BIN)/python -m build --outdir dist

.PHONY: setup
setup: $(STAMPS)/dev $(STAMPS)/system-test native ## Set up everything for development, in .venv

.PHONY: clean
clean: ## Remove all that was built or installed here
	@if [ -f native/Makefile ]; then $(MAKE) -C native clean; fi
	@rm -rf "$(VENV)" dist native/build $(GO_CLIENT)/pb .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find src services tests bench -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

$(STAMPS)/system-%: tools/system-packages
	@tools/system-packages $*
	@mkdir -p $(@D) && touch $@

$(STAMPS)/go-tools: tests/clients/tools/go.mod tests/clients/tools/go.sum
	@echo "==> building grpcurl and protoc's plugins for Go"
	@mkdir -p $(GO_BIN) $(@D)
	@GOBIN=$(GO_BIN) CGO_ENABLED=0 $(GO) -C tests/clients/tools install -ldflags='-s -w' tool
	@touch $@

# Built once, for some ten minutes, and kept over `make clean`.
%/kubernetes-built:
	@echo "==> building Kubernetes into $(@D)"
	@mkdir -p $(@D)
	@GOBIN=$(@D) CGO_ENABLED=0 $(GO) -C $(KUBE_SOURCE) install -p 2 \
	    -ldflags='-s -w $(KUBE_FLAGS)' tool
	@touch $@

# The Kubernetes version that helm takes when it sees no cluster.
HELM_FLAGS := $(foreach part,Major=1 Minor=36,-X helm.sh/helm/v3/pkg/chartutil.k8sVersion$(part) \
    -X helm.sh/helm/v3/pkg/lint/rules.k8sVersion$(part))
$(STAMPS)/chart-tools: deploy/helm/tools/go.mod deploy/helm/tools/go.sum
	@echo "==> building helm and kustomize"
	@mkdir -p $(GO_BIN) $(@D)
	@GOBIN=$(GO_BIN) CGO_ENABLED=0 $(GO) -C deploy/helm/tools install -ldflags='-s -w $(HELM_FLAGS)' tool
	@touch $@

# In an environment of its own: it pins many packages.
$(STAMPS)/checkov: | $(STAMPS)/venv
	@echo "==> installing checkov into $(VENV)/checkov"
	@$(PYTHON) -m venv $(VENV)/checkov
	@$(VENV)/checkov/bin/pip --disable-pip-version-check --quiet install 'checkov>=3.2'
	@touch $@

# Go's package of a file is said here, so that proto/ needs to know nothing of Go.
GO_PROTOS := samepage/v1/arenas.proto samepage/v1/scanner.proto
GO_OPTIONS := module=$(GO_PACKAGE) $(GO_PROTOS:%=M%=$(GO_PACKAGE)/pb)
$(STAMPS)/go-client: $(STAMPS)/dev $(STAMPS)/go-tools $(GO_PROTOS:%=proto/%) \
    $(GO_CLIENT)/go.mod $(GO_CLIENT)/go.sum $(GO_CLIENT)/main.go
	@echo "==> building the Go client"
	@PATH="$(GO_BIN):$$PATH" $(BIN)/python -m grpc_tools.protoc -Iproto \
	    --go_out=$(GO_CLIENT) $(GO_OPTIONS:%=--go_opt=%) \
	    --go-grpc_out=$(GO_CLIENT) $(GO_OPTIONS:%=--go-grpc_opt=%) $(GO_PROTOS)
	@CGO_ENABLED=0 $(GO) -C $(GO_CLIENT) build -buildvcs=false -ldflags='-s -w' -o $(GO_BIN)/client .
	@touch $@

$(STAMPS)/venv: | $(STAMPS)/system-build
	@echo "==> making a virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install --upgrade 'pip>=25.1'
	@mkdir -p $(@D) && touch $@

$(STAMPS)/services: $(STAMPS)/venv $(PACKAGING)
	@echo "==> installing samepage and its services into $(VENV)"
	@$(PIP) install --editable '.[services]'
	@touch $@

$(STAMPS)/bench: $(STAMPS)/dev
	@echo "==> installing what is measured against into $(VENV)"
	@$(PIP) install --group bench
	@touch $@

$(STAMPS)/dev: $(STAMPS)/services
	@echo "==> installing the tools for tests, lint and types into $(VENV)"
	@$(PIP) install --group dev
	@touch $@
