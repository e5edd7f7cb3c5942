# make train: the default recipe on the data that ships · make test · make test-all · make lint · make bench · make soak · make docs
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# The one place that chooses the PyTorch build: CUDA where there is an NVIDIA driver, else the CPU build that CI pins.
ifeq ($(wildcard /dev/nvidiactl),)
TORCH := --constraint constraints-cpu.txt
TORCH_INDEX := --retries 1 --extra-index-url https://download.pytorch.org/whl/cpu
endif

SOAK_MINUTES ?= 15

.PHONY: train test test-all lint bench soak docs clean

train: $(VENV)/.train
	$(BIN)/fastvlp train

# One process for each core: tests compute on one thread.
PYTEST := $(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist worksteal

test: $(VENV)/.dev
	$(PYTEST)

test-all: $(VENV)/.dev
	$(PYTEST) -m 'slow or not slow'

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks run --all
	$(BIN)/python -m benchmarks report

soak: $(VENV)/.dev
	$(BIN)/python -m benchmarks soak --minutes $(SOAK_MINUTES)

docs: $(VENV)/.dev
	$(BIN)/python -m benchmarks report
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

$(VENV)/.train: pyproject.toml constraints-cpu.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and f"fastvlp needs Python 3.10 or newer and got {sys.version.split()[0]}: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) torch $(TORCH) $(TORCH_INDEX)
	$(PIP) --editable '.[train]' $(TORCH)
	touch $@

# The benchmarks' rivals must not replace the PyTorch that was chosen.
$(VENV)/.dev: $(VENV)/.train
	$(PIP) --editable '.[train,bench,dev,docs]' $(TORCH) torch==$$($(BIN)/python -c 'import torch; print(torch.__version__)')
	touch $@

clean:
	rm -rf $(VENV) build site *.egg-info
