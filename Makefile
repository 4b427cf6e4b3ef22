# make demo | test | test-slow | test-faults | test-cuda | browser | lint; PYTHON=python3.12 chooses the interpreter.
PYTHON ?= python3
VENV := .venv-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
BIN := $(VENV)/bin
DEMO := $(VENV)/.demo
DEV := $(VENV)/.dev

.PHONY: demo test test-slow test-faults test-cuda browser lint format clean

demo: $(DEMO)
	$(BIN)/python scripts/train.py --config configs/tiny.py
	$(BIN)/python scripts/plot.py runs/tiny
	$(BIN)/python scripts/evaluate.py --checkpoint runs/tiny
	$(BIN)/python scripts/generate.py --checkpoint runs/tiny --temperature 0.7 \
		--prompt "def fibonacci(n):" "class Stack:"

test: $(DEV)
	$(BIN)/python -m pytest -n 2

test-slow: $(DEV)
	$(BIN)/python -m pytest -m 'slow and not faults'

# What docs/reliability.md promises, in at most half an hour on 2 cores. Each test prints its figure.
test-faults: $(DEV)
	$(BIN)/python -m pytest -m faults tests/faults

# What XLA's CUDA compiler makes without a GPU: the 3b's step, the integrator's kernels, the memory of a
# step, decoding; test-slow includes these tests once JAX's CUDA plugin is installed.
test-cuda: $(DEV)
	$(BIN)/python -m pip install --quiet --editable '.[cuda]'
	$(BIN)/python -m pytest -m slow tests/benchmarks/test_cuda_program.py tests/model/mosaic \
		tests/planning/test_memory.py tests/sampling/test_decoding.py

# The report in a real browser; test-slow includes these tests once Chromium is installed.
browser: $(DEV)
	command -v chromium || { apt-get update && apt-get install -y chromium; }
	$(BIN)/python -m pip install --quiet --editable '.[browser]'
	$(BIN)/python -m pytest -m slow tests/report

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The demo needs neither PyTorch nor the tools of the tests.
$(DEMO): EXTRAS := plot
$(DEV): EXTRAS := dev
$(DEMO) $(DEV): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[$(EXTRAS)]'
	touch $@

clean:
	rm -rf .venv-* .pytest_cache .ruff_cache build dist *.egg-info
