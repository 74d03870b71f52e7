# The commands of this repository. `make demo` first; `make test` is what CI runs, and `make drills`.
.DEFAULT_GOAL := help
SHELL := /bin/bash
# Where Debian keeps nft, ip and sysctl; a plain `su` leaves these out.
export PATH := $(PATH):/usr/local/sbin:/usr/sbin:/sbin
BIN := .venv/bin
SOURCES := lbctl manager agent tests
# What CI drills, each with its sabotage: forwarding, the death of a node and of a manager, a switch.
DRILLS := agents-die node-dies manager-host-dies switch-restarts
DRILL_LAB := --lab ci-drills
.PHONY: help tools demo test check unit kube lab drills bench format clean

help: ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 10

tools: ## install what is missing (Debian packages, .venv)
	@bgp-lab/install-tools

demo: tools ## the whole system at work, in network namespaces, in under a minute
	@$(BIN)/lbctl demo

test: check ## everything: check, unit, kube, lab
	@$(BIN)/python -m tests.run

check: tools ## formatting, lint, strict types, import contract
	@$(BIN)/ruff format --check --quiet $(SOURCES)
	@$(BIN)/ruff check --quiet $(SOURCES)
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

unit: tools ## the pure half, in seconds
	@$(BIN)/pytest -q -n 2 tests/unit

kube: tools ## contract tests on both clusters
	@$(BIN)/pytest -q tests/kube

lab: tools ## namespaces, FRR, traffic
	@$(BIN)/pytest -q tests/lab

drills: tools ## four failure drills under traffic, then each sabotaged: those must fail (5 min)
	@trap '$(BIN)/lbctl lab down $(DRILL_LAB)' EXIT; \
	$(BIN)/lbctl lab up $(DRILL_LAB) && $(BIN)/lbctl drill run $(DRILLS) $(DRILL_LAB) || exit; \
	$(BIN)/lbctl drill run --sabotage $(DRILLS) $(DRILL_LAB); \
	code=$$?; test $$code = 1 || { echo "the sabotaged drills ended with $$code, not 1"; exit 1; }

bench: tools ## measure, and print a table
	@$(BIN)/python -m tests.bench

format: tools ## let ruff write
	@$(BIN)/ruff format $(SOURCES)
	@$(BIN)/ruff check --fix $(SOURCES)

clean: ## remove .venv and caches
	@rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist *.egg-info
