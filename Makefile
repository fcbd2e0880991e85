# Two commands do everything on a fresh machine: `make simulate` and `make test`. Both install into .venv first.
PYTHON ?= python3
BIN := .venv/bin
# One more than there are cores: some tests wait for processes that they started.
WORKERS ?= $(shell $(PYTHON) -c "import os; print(1 + os.cpu_count())")

.PHONY: simulate test lint clean

simulate: .venv/simulate
	$(BIN)/fedrot compare

test: .venv/test
	$(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy fedrot fedrot_kernels

clean:
	rm -rf .venv build *.egg-info

.venv/%: setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$*]"
	touch $@
