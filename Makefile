# Every target sets up .venv by itself. `make help` lists the targets.
#
#   PYTHON=python3.12      the interpreter that makes .venv (3.11 or newer)
#   TORCH='torch==2.13.0'  what pip installs as torch, with any pip options (docs/install.md)
#   WORKERS=2              processes that `make test` and `make mutants` use

PYTHON ?= python3
TORCH ?= -r requirements/torch.txt
WORKERS ?= 2
UV_VERSION := 0.13.9

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
INCOMPLETE := $(VENV)/.incomplete
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.DEFAULT_GOAL := help
.PHONY: help setup demo test mutants slow bench-quick lint format bench lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(READY) ## make .venv with the locked dependencies (every other target does it by itself)

# The lock is installed first: it holds all that torch needs besides its GPU libraries, so the step for
# torch adds only torch and, with a GPU build, exactly the GPU libraries that this build names.
# A killed pip leaves packages that look installed: what is incomplete is made anew. An error of pip
# leaves complete packages, which the next attempt keeps.
$(READY): requirements/lock.txt requirements/torch.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "VLDuet needs Python 3.11 or newer; '$(PYTHON)' is: $$($(PYTHON) --version 2>&1 | tail -1). Try: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "'$(PYTHON)' has no venv module. On Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	@echo "Setting up $(VENV); this takes a few minutes, once."
	@test ! -e $(INCOMPLETE) && $(PIP) --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@touch $(INCOMPLETE)
	@$(PIP) install --require-hashes --no-deps -r requirements/lock.txt && $(PIP) install $(TORCH) && \
	  $(PIP) install --no-deps --no-build-isolation -e . && $(PIP) check || { rm -f $(INCOMPLETE); exit 1; }
	@mv $(INCOMPLETE) $@

demo: $(READY) ## train and evaluate the default model on real data; writes runs/demo/report.html
	@$(BIN)/vlduet demo --to runs/demo

# Every worker uses one thread: with more threads than cores all of them get slower.
test: $(READY) ## run the tests
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

# Every test runs in a process of its own, with a copy of the package.
mutants: $(READY) ## apply deliberate errors to copies of the package; a test must detect each of them
	@PYTHONPATH=tests $(BIN)/python -m mutants.run --workers $(WORKERS) $(ARGS)

# The clients are installed beside the locked packages, which they do not change.
CLIENTS := $(VENV)/.clients

$(CLIENTS): requirements/clients.txt $(READY)
	@$(PIP) install --require-hashes --no-deps -r requirements/clients.txt
	@touch $@

slow: demo bench-quick $(CLIENTS) ## run the demo, small benchmarks, clients, the container's steps and long fuzzing
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -o faulthandler_timeout=3600 \
	  --slow-model runs/demo/model --fuzz-rounds 500 tests/slow tests/fuzz

lint: $(READY) ## run ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(READY) ## rewrite the code with ruff
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

# benchmarks/large.py is left out: it needs a GPU and has options of its own.
BENCHMARKS := $(filter-out benchmarks/large.py,$(wildcard benchmarks/[a-z]*.py))

bench: $(READY) ## time VLDuet against other libraries, side by side
	@for file in $(BENCHMARKS); do echo "== $$file"; $(BIN)/python $$file || exit 1; done

bench-quick: $(READY) ## the same with small inputs, to see that every benchmark runs
	@for file in $(BENCHMARKS); do echo "== $$file"; $(BIN)/python $$file --quick || exit 1; done

# Pins that still fit are kept; UPGRADE=1 renews all of them. GPU libraries belong to torch's build.
EXTRAS := train formats serve heic fast bench reference dev
COMPILE = .lock-venv/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header \
  $(EXTRAS:%=--extra %) $(if $(UPGRADE),--upgrade) pyproject.toml requirements/torch.txt

lock: ## rewrite requirements/lock.txt and clients.txt from pyproject.toml
	@test -x .lock-venv/bin/uv || $(PYTHON) -m venv --clear .lock-venv
	@.lock-venv/bin/python -m pip --disable-pip-version-check --quiet install uv==$(UV_VERSION)
	@cp requirements/lock.txt .lock-venv/lock.txt 2>/dev/null || true
	@cp requirements/clients.txt .lock-venv/clients.txt 2>/dev/null || true
	@$(COMPILE) -o .lock-venv/lock.txt
	@$(COMPILE) --extra clients --constraint .lock-venv/lock.txt -o .lock-venv/clients.txt
	@{ echo "# Written by 'make lock'. torch and its GPU libraries are left out: see docs/install.md."; \
	   awk '/^[a-zA-Z]/ {keep = !/^(torch==|triton==|cuda-|nvidia-)/} keep' .lock-venv/lock.txt; } > requirements/lock.txt
	@{ echo "# Written by 'make lock': the packages that 'make slow' needs and lock.txt has not."; \
	   awk 'NR == FNR {known[$$1]; next} /^[a-zA-Z]/ {keep = !($$1 in known)} keep' \
	     .lock-venv/lock.txt .lock-venv/clients.txt; } > requirements/clients.txt

clean: ## remove .venv and caches; runs/ and the package cache stay
	rm -rf $(VENV) .lock-venv build src/*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
