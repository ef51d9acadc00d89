# make demo | make test | make check: each creates .venv first if it is not there.
PYTHON ?= python3
PY := .venv/bin/python
STAMP := .venv/.installed
export ATROUS_STORAGE ?= $(CURDIR)/runs

.PHONY: demo test check format clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    install, then train the whole lineage on drawn pictures (CPU, 5 to 12 minutes)"
	@echo "make test    install, then run the tests"
	@echo "make check   install, then format, lint, types, import rules, spelling"

demo: $(STAMP)
	$(PY) -m orchestrator run jobs/demo.yaml

test: $(STAMP)
	$(PY) -m pytest tests/unit -n 2 --dist loadfile
	$(PY) -m pytest tests/cluster

check: $(STAMP)
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(PY) -c "from importlinter.cli import lint_imports_command; lint_imports_command()" --no-cache
	$(PY) -m codespell_lib

format: $(STAMP)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

clean:
	rm -rf .venv runs
