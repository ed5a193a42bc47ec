# Everything a clone needs: `make demo` and `make test` install what is missing, once. `make help` lists the rest.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PY := $(BIN)/python
PYTEST := $(PY) -m pytest
FUZZ_CASES ?= 2000

# The environment is current when it was made for this folder, this version, this pyproject.toml and these constraints.
STAMP := $(VENV)/.stamp-$(shell { pwd; cat pyproject.toml constraints.txt; grep '^__version__' repvgg_deploy/__init__.py; } | cksum | cut -d ' ' -f 1)

.PHONY: help install demo test slow long fuzz lint format check docs bench clean
.DEFAULT_GOAL := help

help: ## what each command does
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1#\2/p' Makefile | column -t -s '#' 2>/dev/null || sed -n 's/^\([a-z]*\):.*## /  make \1   /p' Makefile

install: $(STAMP) ## make .venv with everything (once; does nothing when it is current)

$(STAMP):
	@command -v "$(PYTHON)" >/dev/null || { echo "$(PYTHON) not found: install Python 3.10 or newer, or give make PYTHON=/path/to/python" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 10) else "Python 3.10 or newer is needed, %s is %d.%d: give make PYTHON=python3.11" % (sys.executable, v[0], v[1]))'
	@$(PY) -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear $(VENV) || { echo "$(PYTHON) cannot make an environment: on Debian or Ubuntu install python3-venv" >&2; exit 1; }
	@echo 'installing into $(VENV): a few minutes, this once'
	@# torch first and by version, so that no range of another package can pull a newer CUDA build.
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt 'torch==2.13.0'
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[export,cpu,dev,docs]'
	@rm -f $(VENV)/.stamp-*
	@touch $@

demo: install ## export the trained sample, verify it, run the Engine, print and draw predictions
	$(PY) examples/demo.py

test: install ## the whole test suite, under 15 minutes on two cores
	$(PYTEST) $(PYTEST_ARGS)

slow: install ## the tests that take minutes each
	@# Python 3.14 may have no Ray yet; its test says so.
	-$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[ray]'
	$(PYTEST) -m slow $(PYTEST_ARGS)

long: install ## hours, by hand: coverage-guided fuzzing, 20,000 fuzz cases, long soaks; results in benchmarks/results/long.json
	$(PY) -m pip install --quiet --disable-pip-version-check atheris
	$(PY) -m tests.long $(LONG_ARGS)

fuzz: install ## the fuzz tests in their long form (FUZZ_CASES=2000)
	REPVGG_FUZZ_CASES=$(FUZZ_CASES) $(PYTEST) -m '' -k fuzz --timeout 1800 $(PYTEST_ARGS)

lint: install ## ruff and mypy strict
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: install ## put the code in form
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

check: lint test ## what a change must pass: lint, then test

docs: install ## build the documentation into site/, every warning an error; open site/index.html
	$(PY) -m docs.tools.make_pages
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo 'built: open site/index.html'

bench: install ## side-by-side measurements, an hour; results in benchmarks/results/ (benchmarks/gpu.py is for a machine with a GPU)
	@failed=; for program in $(filter-out benchmarks/gpu.py,$(wildcard benchmarks/*.py)); do echo "== $$program"; $(PY) "$$program" || failed="$$failed $$program"; done; \
	  [ -z "$$failed" ] || { echo "failed, or missed an aim:$$failed" >&2; exit 1; }

clean: ## remove the environment, caches and what the demo wrote
	rm -rf .venv .venv3.* .triton .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist demo site *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
