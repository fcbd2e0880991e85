# Every command works on a fresh clone: what it needs is installed into .venv first.
PYTHON ?= python3
BIN := .venv/bin
# One more than there are cores: some tests wait for processes that they started.
WORKERS ?= $(shell $(PYTHON) -c "import os; print(1 + os.cpu_count())")

PYTEST = $(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
MKDOCS = $(BIN)/mkdocs build --strict --quiet
# The core: what one edit of fedrot or of the kernels' PyTorch path breaks first.
CORE := tests/adapters tests/ranks tests/methods tests/report tests/server tests/kernels --ignore=tests/kernels/triton

.PHONY: simulate test test-fast test-exhaustive lint docs clean

simulate: .venv/simulate
	$(BIN)/fedrot compare

test: .venv/test .venv/docs
	$(PYTEST) -m "not exhaustive"
	$(MKDOCS)

test-fast: .venv/test
	$(PYTEST) -m "not slow" $(CORE)

test-exhaustive: .venv/test
	$(BIN)/pytest -m exhaustive tests/kernels

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy fedrot fedrot_kernels

docs: .venv/docs
	$(MKDOCS)

clean:
	rm -rf .venv build dist site *.egg-info

.venv/%: setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$*]"
	touch $@
