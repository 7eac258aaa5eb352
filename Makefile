# Every target works from a bare checkout: it makes .venv first. `make` lists the targets.
.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help run test train check deploy-check format clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

.venv/serve: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e .
	@touch $@

.venv/dev: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@ .venv/serve

run: .venv/serve  ## serve the shipped bundle on http://127.0.0.1:8000
	$(BIN)/carso-serve

test: .venv/dev  ## run the tests
	$(BIN)/pytest

train: .venv/dev  ## train the reference system into runs/mnist-fcn (an hour on two cores)
	$(BIN)/carso-train run mnist-fcn

check: .venv/dev  ## run all that CI runs: lint, types, tests
	.ci/run

deploy-check: .venv/dev  ## build and run every deployment artefact (root on Debian 12)
	tests/deploy/run --gpu --training

format: .venv/dev  ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove what the other targets made, but for runs/
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis
