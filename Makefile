PYTHON ?= python3
BIN := .venv/bin
SOURCES := $(shell find slrc/ passes backends -name '*.py' -o -name '*.j2' -o -name '*.txt' -o -name '*.cpp' -o -name '*.h' -o -name '*.map')
JOBS ?= $(shell n=$$(nproc 2> /dev/null || echo 2); echo $$((n < 8 ? n : 8)))
EXAMPLES ?= 560
CASES ?= 20000
PYTEST := $(BIN)/pytest -n $(JOBS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help demo test fuzz lint results tables dev clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-7s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: .venv/package ## make .venv, install, compile the digits example on real data, print the table, write the report
	$(BIN)/slrc compile examples/digits.py --pattern channel --sparsity 0.5 --epochs 5 --target ort --threads 1 \
	    --out demo --overwrite

test: lint ## make .venv, install, lint, type-check, test the installed package
	$(PYTEST)

fuzz: .venv/package ## random graphs and layers, many more than `make test` draws: EXAMPLES=5000 CASES=1000000 SLRC_SEED=random
	SLRC_FUZZ=$(CASES) SLRC_EXAMPLES=$(EXAMPLES) $(PYTEST) -m fuzz

lint: .venv/package ## ruff and mypy alone
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p slrc

tables: .venv/package ## write the tables and the picture of README.md and docs/ from benchmarks/results
	$(BIN)/python benchmarks/tables.py
	$(BIN)/python docs/images/make.py

results: .venv/package ## list the measured rows of benchmarks/results and say which are out of date
	$(BIN)/python benchmarks/results.py

dev: .venv/dependencies ## the same .venv with the package in editable mode
	$(BIN)/pip install --quiet --no-deps --editable .

clean: ## remove .venv and what was built
	rm -rf .venv build demo dist *.egg-info

.venv/dependencies: pyproject.toml
	@echo "installing what slrc needs into .venv: some minutes"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet '.[dev]'
	touch $@

# The tests run against the installed package, not the working tree.
.venv/package: .venv/dependencies $(SOURCES)
	$(BIN)/pip install --quiet --no-deps --force-reinstall .
	touch $@
