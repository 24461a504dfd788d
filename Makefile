# make demo | make test: make .venv when it is missing or its lock changed, then run. `make help` lists the rest.
#
# EXTRA=gpu takes requirements/gpu.txt (vLLM for NVIDIA GPUs) instead of requirements/cpu.txt; PYTHON=python3.12 another
# Python; VENV=FOLDER another place for the environment.

PYTHON ?= python3
EXTRA ?= cpu
VENV ?= .venv
UV_VERSION := 0.13.8
TORCH_INDEX := https://download.pytorch.org/whl/cpu

LOCK := requirements/$(EXTRA).txt
DEPS := $(VENV)/.dependencies-$(EXTRA)
STAMP := $(VENV)/.installed-$(EXTRA)
BIN := $(VENV)/bin
UV := $(BIN)/uv

# torch's CPU builds are not on PyPI: a local wheel folder when PIP_FIND_LINKS names one, else PyTorch's index. There the
# strategy lets each locked version come from whichever index has it. The GPU lock needs PyPI only.
ifneq ($(strip $(PIP_FIND_LINKS)),)
TORCH_SRC := $(foreach source,$(PIP_FIND_LINKS),--find-links $(source))
else ifeq ($(EXTRA),cpu)
TORCH_SRC := --extra-index-url $(TORCH_INDEX) --index-strategy unsafe-best-match
endif

# pip reads PIP_CERT, uv reads SSL_CERT_FILE: one setting serves both behind a proxy with its own authority.
ifdef PIP_CERT
ifndef SSL_CERT_FILE
export SSL_CERT_FILE := $(PIP_CERT)
endif
endif

.PHONY: help install deps demo test slow chaos fuzz bench lint types format lock wheel docs clean

help:
	@echo "make demo    the whole method on the sample world, two CPU cores"
	@echo "make test    the tests that need neither a GPU nor many minutes"
	@echo "make slow    tests that take minutes     make chaos   tests that kill processes"
	@echo "make fuzz    the property tests with examples that were never drawn before"
	@echo "make bench   every stage that has a bench against its peer; takes hours"
	@echo "make lint    ruff                        make types   pyright, strict on core, config and schemas"
	@echo "make format  let ruff rewrite            make lock    resolve requirements/*.txt again"
	@echo "make wheel   the package as a wheel in dist/    make docs   the documentation as a site in site/"
	@echo "make install the environment alone       make clean   remove caches and build leftovers, not .venv or runs"

install: $(STAMP)

# All that the package needs, without the package itself: a layer of deploy/Dockerfile.
deps: $(DEPS)

# Compiling the bytecode once saves every worker process seconds of start-up where Python may not write its cache.
# The stamps are written last, so an interrupted install is done again. uv keeps itself and pip when it syncs.
$(DEPS): $(LOCK)
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
		echo "error: $(PYTHON) is not Python 3.11, 3.12 or 3.13; name one: make PYTHON=python3.11 ..." >&2; exit 2; }
	@rm -f $(VENV)/.installed-* $(VENV)/.dependencies-*
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	$(UV) pip sync --compile-bytecode --python $(BIN)/python --build-constraints requirements/build.txt $(TORCH_SRC) $(LOCK)
	@touch $@

$(STAMP): $(DEPS)
	$(UV) pip install --python $(BIN)/python --no-deps --no-build-isolation -e .
	@touch $@

demo: $(STAMP)
	$(BIN)/python -m dpo4rec_ray run demo

# Two processes, because a test of Ray is half waiting. Files stay whole and in order: the longest come first.
TESTS_AT_ONCE ?= 2

test: $(STAMP)
	$(BIN)/python -m pytest -n $(TESTS_AT_ONCE) --dist loadfile --no-loadscope-reorder

slow: $(STAMP)
	$(BIN)/python -m pytest -m "slow and not gpu"

chaos: $(STAMP)
	$(BIN)/python -m pytest -m "chaos and not gpu"

# Files with property tests; the profile is in tests/conftest.py.
fuzz: $(STAMP)
	$(BIN)/python -m pytest --hypothesis-profile=fuzz $$(grep -rl "^from hypothesis import" tests --include="test_*.py")

bench: $(STAMP)
	$(BIN)/python benchmarks/bench.py prepare
	$(BIN)/python benchmarks/bench.py score
	$(BIN)/python benchmarks/bench.py generate
	$(BIN)/python benchmarks/bench.py dpo
	$(BIN)/python benchmarks/bench.py balance
	$(BIN)/python benchmarks/bench.py scaling
	$(BIN)/python benchmarks/bench.py serve

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Strict: a link or an anchor that leads nowhere is an error.
docs: $(STAMP)
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Versions already in a lock are kept while they still fit pyproject.toml; delete the lock to take the newest of everything.
COMPILE = UV_CUSTOM_COMPILE_COMMAND="make lock" $(UV) pip compile pyproject.toml --python $(BIN)/python --quiet \
	--python-version 3.11 --python-platform x86_64-manylinux_2_28 --no-annotate --extra demo --extra gguf --extra tracking --extra test --extra docs

lock: $(STAMP)
	$(COMPILE) --extra cpu --override requirements/overrides-cpu.txt $(TORCH_SRC) -o requirements/cpu.txt
	$(COMPILE) --extra gpu -o requirements/gpu.txt

# Built by the environment's own setuptools, from a clean build folder: an older one would put removed files into the wheel.
wheel: $(STAMP)
	rm -rf build
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

clean:
	rm -rf build dist site *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path "./.venv/*" -prune -exec rm -rf {} +
