# The two commands that a new user needs: make demo, make test.

VENV ?= .venv
PYTHON ?= python3
PYTEST_ARGS ?= -n logical --maxprocesses 4
DEMO_ARGS ?=

RUN = "$(VENV)/bin/python"
INSTALL = bash scripts/install.sh "$(VENV)" "$(PYTHON)"

.DEFAULT_GOAL := help
.PHONY: help demo test gpu-check lint format install-demo install-dev typing-folder clean distclean

help: ## show this
	@echo 'make TARGET [VENV=folder] [PYTHON=interpreter]'
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo '  VENV    the environment to use, made when it is not there (.venv). To use one that has the torch of'
	@echo '          your choice, say a CUDA build: make test VENV="$$VIRTUAL_ENV". Its torch is never replaced.'
	@echo '  PYTHON  what a new environment is made with, 3.11 or newer (python3)'

demo: install-demo ## plan for a small model, train it, compare prediction and measurement; leaves demo/
	@$(RUN) scripts/demo.py $(DEMO_ARGS)

test: install-dev ## run the tests (PYTEST_ARGS='tests/runtime/data -x' for some of them)
	@$(RUN) -m pytest $(PYTEST_ARGS)

gpu-check: install-dev ## prove plans on this machine's GPU, at most ten minutes; leaves gpu-check.json and .txt
	@$(RUN) -m pytest tests/gpu -q
	@$(RUN) -m meft.runtime.cli.profile gpu-check -o gpu-check.json

lint: install-dev typing-folder ## check style and types
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@MYPYPATH=build/typing $(RUN) -m mypy -p meft
	@MYPYPATH=build/typing $(RUN) -m mypy scripts

format: install-dev ## put the code into its usual form
	@$(RUN) -m ruff check --fix .
	@$(RUN) -m ruff format .

# A type checker does not see the editable installation's mapping of folders to packages; this folder shows it.
typing-folder:
	@mkdir -p build/typing/meft
	@for file in __init__.py run.py py.typed; do ln -sfn "$(CURDIR)/meft/$$file" build/typing/meft/$$file; done
	@for package in planner runtime profiles; do ln -sfn "$(CURDIR)/$$package" build/typing/meft/$$package; done

install-demo:
	@$(INSTALL) demo

install-dev:
	@$(INSTALL) dev

clean: ## remove what was generated (demo/, build/, caches); the environment stays
	rm -rf demo build meft.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -prune -exec rm -rf {} +

distclean: clean ## remove .venv too, and what the demo left in the cache folder
	rm -rf .venv
	@$(PYTHON) scripts/remove_cache.py
