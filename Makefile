# Two commands: `make demo` shows what lazyfs does, `make test` checks it. Both install what they need on Debian 12:
# packages that are missing, and a virtual environment in .venv. Run as root, or as a user who may sudo.

PYTHON ?= python3
# One part after another: what only computes, then the fault matrix, which is promised to take less than five minutes, then
# the rest (with some tests of fuse and system that have rows in the matrix, too). Daemons and faults wait more than they compute, so more are at work than there are processors; a file stays
# with one worker, in the order of tests/conftest.py: by itself xdist begins with files of many tests, and ends with a slow
# one alone. `make rest TESTS=tests/fuse` for some of them.
SPREAD ?= -n 6 --dist loadfile --no-loadscope-reorder
UNITS ?= -n 4 --dist loadfile -p no:cacheprovider tests/unit
TESTS ?= tests/faults tests/fuse tests/system
# With bytecode of the tests themselves: each worker of each part reads all of them.
PYTEST = $(SUDO) env -u PYTHONDONTWRITEBYTECODE "PATH=$$PATH" CI=true .venv/bin/python -m pytest -q
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)
PIP = .venv/bin/python -m pip install --quiet --disable-pip-version-check
PATH := $(PATH):/usr/sbin:/sbin
export PATH

.PHONY: demo test units matrix rest lint bytecode venv debs dist sbom clean help

help:
	@echo 'make demo    start a real image lazily and by a full pull, behind a slow link, and compare (IMAGE=… for another one)'
	@echo 'make test    types, lint and every test'
	@echo 'make lint    types and lint alone        make units   make matrix   make rest   a part of the tests alone'
	@echo 'make venv    the virtual environment alone    make debs    the Debian packages alone'
	@echo 'make dist    a wheel and its bill of materials, in dist/   make sbom    the bill of materials alone (CycloneDX)'
	@echo 'make clean   remove what the others made'

demo: bytecode
	$(SUDO) env "PATH=$$PATH" "IMAGE=$(IMAGE)" .venv/bin/python -m perf.demo

# A failure of one does not end the others.
test: bytecode
	@$(MAKE) --no-print-directory --keep-going -j2 --output-sync=line lint units; computed=$$?; \
	  $(MAKE) --no-print-directory --keep-going matrix rest && exit $$computed

units: bytecode
	$(PYTEST) $(UNITS)

matrix: bytecode
	$(PYTEST) $(SPREAD) -m matrix tests/faults

rest: bytecode
	$(PYTEST) $(SPREAD) -m 'not matrix' $(TESTS)

# An installed lazyfs has its bytecode; this tree gets it here, also where PYTHONDONTWRITEBYTECODE is set: without it half
# of a daemon's start is compiling, and the tests start some thousand processes.
bytecode: venv
	.venv/bin/python -m compileall -q lazyfs indexer snapshotter tests perf

lint: venv
	.venv/bin/ruff check lazyfs indexer snapshotter tests perf .ci/sbom.py
	.venv/bin/ruff format --check lazyfs indexer snapshotter tests perf .ci/sbom.py
	.venv/bin/mypy -p lazyfs -p indexer -p snapshotter -p perf
	.venv/bin/mypy .ci/sbom.py

venv: debs .venv/stamp

debs:
	@SUDO="$(SUDO)" PYTHON="$(PYTHON)" .ci/debs

# Nothing comes from an index that .ci/lock has not pinned with its hashes: first what builds, then what is needed, then
# this tree itself, which fetches nothing any more. pip is the one that Python brings along.
.venv/stamp: pyproject.toml .ci/build-requirements.txt .ci/requirements.txt
	@command -v $(PYTHON) >/dev/null || { echo "lazyfs needs Python 3.11 or newer, and $(PYTHON) is not installed: set PYTHON=…" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "lazyfs needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) -V 2>&1): set PYTHON=python3.11 or newer" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(PIP) --require-hashes --only-binary :all: --report .venv/build-report.json -r .ci/build-requirements.txt
	$(PIP) --require-hashes --no-build-isolation --report .venv/report.json -r .ci/requirements.txt
	$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

sbom: venv
	.venv/bin/python .ci/sbom.py dist/lazyfs.cdx.json

dist: sbom
	.venv/bin/python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation -w dist .

clean:
	$(SUDO) rm -rf .venv .demo .pytest_cache .hypothesis .mypy_cache .ruff_cache build dist *.egg-info
	$(SUDO) find . -name __pycache__ -type d -prune -exec rm -rf {} +
