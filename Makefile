# `make run` on a fresh clone makes .venv from requirements.lock and brings the default collection up to date.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: run run-all test lint ui schedule gpu-check bench soak clean
.DEFAULT_GOAL := run

run: .venv/stamp          # one good model of each family on Fashion-MNIST
	@$(BIN)/genus run $(ARGS)

run-all: .venv/stamp      # every model of params.yaml
	@$(BIN)/genus run --all $(ARGS)

test: .venv/stamp
	$(BIN)/python -m pytest $(ARGS)

lint: .venv/stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

ui: .venv/stamp           # MLflow: runs, sample grids, registry
	@$(BIN)/genus ui

schedule: .venv/stamp     # nightly, on changed data, or by hand, until Ctrl-C
	@$(BIN)/genus schedule $(ARGS)

gpu-check: .venv/stamp    # one line where there is no GPU
	@$(BIN)/genus gpu-check

bench: .venv/stamp        # the slow measurements, one script each
	@for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

soak: .venv/stamp         # the slow tests; then kill -9, 50 times: nothing may be lost, changed or left running
	$(BIN)/python -m pytest -m slow
	@$(BIN)/python -m tests.survive.soak $(ARGS)

clean:                    # what a run can make again; data/raw, the DVC cache, the tracking store and what waits for it stay
	rm -rf logs reports data/processed data/origin data/judge data/quarantine .pytest_cache .mypy_cache .ruff_cache
	find models -mindepth 1 -maxdepth 1 ! -name none -exec rm -rf {} +
	@test ! -d .genus || find .genus -mindepth 1 -maxdepth 1 ! -name runs -exec rm -rf {} +

# A half-made environment has no stamp and is made anew.
.venv/stamp: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Genus needs Python 3.11 or newer: make PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@
