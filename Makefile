# make demo    make .venv, install, compile the digits example on real data, print the table, write the report
# make test    make .venv, install, lint, type-check, test
# make dev     the same environment with the package in editable mode

PYTHON ?= python3
BIN := .venv/bin
SOURCES := $(shell find slrc/ passes backends -name '*.py' -o -name '*.j2' -o -name '*.txt' -o -name '*.cpp' -o -name '*.h' -o -name '*.map')
JOBS ?= 2

.PHONY: demo test dev lint clean

demo: .venv/package
	$(BIN)/slrc compile examples/digits.py --pattern channel --sparsity 0.5 --epochs 5 --target ort --threads 1 \
	    --out build/digits --overwrite

test: lint
	$(BIN)/pytest -n $(JOBS) --dist worksteal

lint: .venv/package
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p slrc

dev: .venv/dependencies
	$(BIN)/pip install --quiet --no-deps --editable .

clean:
	rm -rf .venv build dist *.egg-info

.venv/dependencies: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet '.[dev]'
	touch $@

# The tests run against the installed package, not the working tree.
.venv/package: .venv/dependencies $(SOURCES)
	$(BIN)/pip install --quiet --no-deps --force-reinstall .
	touch $@
