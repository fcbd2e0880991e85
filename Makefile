# Every command works on a fresh clone: what it needs is installed into .venv first.
PYTHON ?= python3
BIN := .venv/bin
# One more than there are cores: some tests wait for processes that they started.
WORKERS ?= $(shell $(PYTHON) -c "import os; print(1 + os.cpu_count())")

PYTEST = $(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
MKDOCS = $(BIN)/mkdocs build --strict --quiet
# The core: what one edit of fedrot or of the kernels' PyTorch path breaks first.
CORE := tests/adapters tests/ranks tests/methods tests/report tests/server tests/kernels --ignore=tests/kernels/triton

.PHONY: simulate test test-fast test-exhaustive sanitize lint docs clean

simulate: .venv/simulate
	$(BIN)/fedrot compare

test: .venv/test,docs
	$(PYTEST) -m "not exhaustive"
	$(MKDOCS)

test-fast: .venv/test
	$(PYTEST) -m "not slow" $(CORE)

test-exhaustive: .venv/test
	$(BIN)/pytest -m exhaustive tests/kernels

# The compiled library with the address and undefined-behaviour sanitizers, over its tests.
SANITIZED = build/sanitized/_native.so
sanitize: .venv/test
	mkdir -p $(dir $(SANITIZED))
	g++ -O1 -g -std=c++17 -fPIC -shared -pthread -fsanitize=address,undefined -fno-sanitize-recover=all \
		fedrot_kernels/native_backend/native.cpp -o $(SANITIZED)
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
		OMP_NUM_THREADS=1 FEDROT_NATIVE=$(abspath $(SANITIZED)) $(BIN)/pytest -q tests/kernels/test_native.py \
		tests/kernels/test_native_consensus.py tests/kernels/test_whole_model.py tests/kernels/test_errors.py \
		tests/kernels/test_native_least_error.py tests/kernels/test_stream_library.py tests/kernels/test_streams.py \
		tests/kernels/test_distances.py

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy fedrot fedrot_kernels

docs: .venv/docs
	$(MKDOCS)

clean:
	rm -rf .venv build dist site *.egg-info

# One extra, or several with commas between them, which builds the compiled library once. pip would compile Python files on one
# core; some of them are templates, which cannot be compiled.
comma := ,
.venv/%: setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e ".[$*]"
	$(BIN)/python -m compileall -qq -j 0 .venv/lib || true
	touch $@ $(addprefix .venv/,$(subst $(comma), ,$*))
