# Every target works from a bare checkout: it makes .venv first. `make` lists the targets.
.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
# What `make quick` leaves out: training and attacks, deployment, and what has to wait for time-outs, restarts or chance.
NOT_QUICK := $(wildcard $(addprefix tests/,deploy $(addprefix test_,$(addsuffix .py,\
  attacks auto_attack data export hardened protocols reference system table training \
  benchmarks client fuzz hostile_machine other_servers shutdown slow_clients))))

.PHONY: help run test quick slow lint types format docs locks train check deploy-check hooks clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

.venv/serve: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e '.[cpu]'
	@touch $@

.venv/dev: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@ .venv/serve

run: .venv/serve  ## serve the shipped bundle on http://127.0.0.1:8000
	$(BIN)/carso serve

test: .venv/dev  ## run the tests, but for the slow ones
	$(BIN)/pytest

quick: .venv/dev lint types  ## lint, types, and the quick tests: no training, no deployment, under a minute
	$(BIN)/pytest --quiet $(addprefix --ignore=,$(NOT_QUICK))

slow: .venv/dev  ## run the slow tests: fuzz, memory, distributions
	$(BIN)/pytest -m slow

lint: .venv/dev  ## look for mistakes, and for code that is not formatted
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/dev  ## check the types of the service
	$(BIN)/mypy

format: .venv/dev  ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: .venv/dev  ## write docs/settings.md out of the settings
	$(BIN)/python -m carso.settings >docs/settings.md

locks:  ## write constraints.txt and the images' lock files (needs uv)
	docker/lock

train: .venv/dev  ## train the reference system into runs/mnist-conv (more than an hour on two cores)
	$(BIN)/carso-train run mnist-conv

check: .venv/dev  ## run all that CI runs
	.ci/run

deploy-check: .venv/dev  ## build and run every deployment artefact (root on Debian 12)
	tests/deploy/run --gpu --training

hooks: .venv/dev  ## run lint and types before every commit
	$(BIN)/pre-commit install

clean:  ## remove what the other targets made, but for runs/
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis
