"""Programs that are not ours and compute logits from an artifact.

Shape letters: T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtool.artifact._base import Reading
from qtool.checkpoint import adapter
from qtool.checkpoint._base import QuantizedCheckpoint
from qtool.checkpoint.derived.skeleton import named_class, quiet
from qtool.checkpoint.gguf_checkpoint import GGUFCheckpoint
from qtool.errors import CheckpointError, one_line
from qtool.evaluate import gptqmodel, mlx, vllm
from qtool.evaluate.apart import folder_logits
from qtool.numerics.heap import give_back, let_go_of_files


@dataclass(frozen=True)
class Run:
    """What a program computed.

    Attributes:
        logits: float32 [T, V].
        remark: what users of the artifact have to know who want to run it there; empty: nothing.
    """

    logits: Tensor
    remark: str = ""


@dataclass(frozen=True)
class ForeignReader:
    """One of them.

    Attributes:
        package: that it comes in.
        needs: what must be installed for it, as `import` calls it.
        run: (artifact, tokens, how it is to be read) -> logits. Raises CheckpointError: it does not run.
        threshold: most weights of a model that it runs: it is to take minutes.
        memory: bytes that it takes for each weight of a model.
    """

    package: str
    needs: str
    run: Callable[[QuantizedCheckpoint, list[int], Reading], Run]
    threshold: int
    memory: int

    @property
    def installed(self) -> bool:
        """Whether it is."""
        return find_spec(self.needs) is not None

    @property
    def version(self) -> str:
        """Of its package, or of another one with the same modules."""
        try:
            return version(self.package)
        except PackageNotFoundError:
            return version(packages_distributions()[self.needs][0])


def by_llama_cpp(model: QuantizedCheckpoint, tokens: list[int], _: Reading) -> Run:
    """Runs a GGUF file in a process of its own."""
    from qtool.evaluate.llamacpp import try_file

    assert isinstance(model, GGUFCheckpoint)
    return Run(try_file(model.parts[0], tokens))


def by_transformers(model: QuantizedCheckpoint, tokens: list[int], reading: Reading) -> Run:
    """Loads a folder in transformers, which decodes it with compressed-tensors, and its adapter with PEFT."""
    from transformers import AutoModelForCausalLM

    branches = any(layer.residuals for layer in model.layers.values())
    if branches and find_spec("peft") is None:
        raise CheckpointError(f"transformers loads the adapter of {model.source} with PEFT, which is not installed")
    made: Any = named_class(dict(model.config)) or AutoModelForCausalLM
    try:
        with quiet(), redirect_stderr(StringIO()), torch.inference_mode():
            loaded, remark = load_in_transformers(made, Path(model.source), reading.dtype)
            if not branches:
                unpack_one_by_one(loaded, Path(model.source))
            else:
                loaded(input_ids=torch.tensor([tokens[:1]]))  # unpacks weights, which PEFT looks for
                loaded.load_adapter(str(Path(model.source) / adapter.FOLDER))
            logits: Tensor = loaded(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].float()
            empty(loaded)
    except Exception as error:  # code of others
        what = f"transformers cannot run {model.source}"
        raise CheckpointError(what, found=f"{type(error).__name__}: {one_line(error)}") from error
    return Run(logits, remark)


MAPPED_BYTES = 1 << 24
"""Of packed layers that are run before pages of the file which they lie in are let go of."""


def unpack_one_by_one(model: torch.nn.Module, folder: Path) -> None:
    """Has each packed layer decoded while it is run, where compressed-tensors decodes all of them first.

    That takes the memory of one matrix instead of that of a model in float32, and of a part of the file, which is
    mapped.

    Args:
        model: as it was loaded.
        folder: with its files.
    """
    at_first: Any = getattr(model, "ct_decompress_hook", None)
    if at_first is None:
        return  # nothing is packed, or this release decodes while it loads
    from compressed_tensors.compressors import decompress_module
    from compressed_tensors.quantization.utils import is_module_quantized
    from compressed_tensors.utils import get_direct_state_dict, replace_direct_state_dict

    def decode(layer: Any, _: object) -> None:
        layer.packed = get_direct_state_dict(layer)
        decompress_module(layer)

    ran = 0

    def restore(layer: Any, _: object, __: object) -> None:
        nonlocal ran
        packed = layer.__dict__.pop("packed")
        replace_direct_state_dict(layer, packed)
        ran += sum(tensor.nbytes for tensor in packed.values() if tensor is not None)
        if ran >= MAPPED_BYTES:
            let_go_of_files(folder)
            ran = 0

    at_first.remove()
    let_go_of_files(folder)  # tensors in another type than the file's are copies
    for module in filter(is_module_quantized, model.modules()):
        module.register_forward_pre_hook(decode)
        module.register_forward_hook(restore)


def empty(model: torch.nn.Module) -> None:
    """Lets go of a model's numbers: it refers to itself, so that they would stay until somebody looks for such."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.new_empty(0)
    give_back()


def by_mlx(model: QuantizedCheckpoint, tokens: list[int], _: Reading) -> Run:
    """Runs a folder in a process of its own."""
    return Run(folder_logits("mlx-lm", mlx.TRIAL, Path(model.source), tokens, mlx.SECONDS))


def by_gptqmodel(model: QuantizedCheckpoint, tokens: list[int], _: Reading) -> Run:
    """Runs a folder in a process of its own."""
    return Run(folder_logits("GPTQModel", gptqmodel.TRIAL, Path(model.source), tokens, gptqmodel.SECONDS))


def by_vllm(model: QuantizedCheckpoint, tokens: list[int], _: Reading) -> Run:
    """Runs a folder in a process of its own."""
    return Run(folder_logits("vLLM", vllm.TRIAL, Path(model.source), tokens, vllm.SECONDS))


LOSES = "transformers loads it only if its decoder of packed weights leaves {} alone, which it loses"
LOOKS = "transformers loads it only if its class leaves quantized layers as they are, whose weights it looks for"


def load_in_transformers(made: Any, folder: Path, dtype: torch.dtype) -> tuple[Any, str]:
    """A model in transformers, and what had to be done for that.

    Some of transformers' classes initialize `weight` of layers that have none once they are quantized.

    Args:
        made: the class.
        folder: where it is.
        dtype: of what is not quantized.
    """
    options = {"dtype": dtype, "device_map": "cpu"}
    with kernels_kept() as lost, by_itself():
        model, remark = load_with_weights(made, folder, options)
    if lost:
        in_one_type(model, dtype)
    what = "experts that are kept" if any("experts" in key for key in lost) else "kernels of convolutions"
    return model, "; ".join(filter(None, (remark, LOSES.format(what) if lost else "")))


def in_one_type(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Gives what is not quantized the type that was asked for: what `kernels_kept` passes on has its file's."""
    for module in model.modules():
        for parameter in () if hasattr(module, "quantization_scheme") else module.parameters(recurse=False):
            parameter.data = parameter.data.to(dtype)


@contextmanager
def by_itself() -> Iterator[None]:
    """Within the context, libraries take this process for the only one: of several, one alone runs their code."""
    found: Any = torch.distributed
    kept = found.is_initialized
    found.is_initialized = lambda: False
    try:
        yield
    finally:
        found.is_initialized = kept


@contextmanager
def kernels_kept() -> Iterator[list[str]]:
    """Within the context, transformers keeps tensors that it puts together of several and that are not quantized.

    Its decoder of packed matrices passes on what it unpacked, and nothing else. Yields what it would have lost.
    """
    from transformers.integrations import compressed_tensors as integration

    decoder = getattr(integration, "CompressedTensorsDequantize", None) or getattr(
        integration, "DecompressExperts", None
    )
    lost: list[str] = []
    if decoder is None:
        yield lost
        return
    convert = decoder.convert

    def kept(self: Any, input_dict: dict[str, Any], *others: Any, **named: Any) -> Any:
        if any(key.endswith(("_packed", "_scale")) for key in input_dict):
            return convert(self, input_dict, *others, **named)
        lost.extend(key for key in input_dict if "." in key)
        return input_dict if any("." in key for key in input_dict) else convert(self, input_dict, *others, **named)

    decoder.convert = kept
    try:
        yield lost
    finally:
        decoder.convert = convert


def load_with_weights(made: Any, folder: Path, options: Mapping[str, Any]) -> tuple[Any, str]:
    """See `load_in_transformers`."""
    from transformers import PreTrainedModel

    try:
        return made.from_pretrained(folder, **options).eval(), ""
    except AttributeError as error:
        if "object has no attribute 'weight'" not in str(error):
            raise
    kept = PreTrainedModel._initialize_weights

    def initialize(self: Any, module: Any, *others: Any) -> None:
        with suppress(AttributeError):
            kept(self, module, *others)

    PreTrainedModel._initialize_weights = initialize
    try:
        return made.from_pretrained(folder, **options).eval(), LOOKS
    finally:
        PreTrainedModel._initialize_weights = kept


READERS: Mapping[str, ForeignReader] = {
    "GPTQModel": ForeignReader("gptqmodel", "gptqmodel", by_gptqmodel, 2 * 10**9, 6),
    "llama.cpp": ForeignReader("xllamacpp", "xllamacpp", by_llama_cpp, 8 * 10**9, 2),
    "mlx-lm": ForeignReader("mlx-lm", "mlx_lm", by_mlx, 2 * 10**9, 6),
    "transformers": ForeignReader("transformers", "compressed_tensors", by_transformers, 2 * 10**9, 6),
    "vLLM": ForeignReader("vllm", "vllm", by_vllm, 2 * 10**9, 6),
}
"""By what `Artifact.reading` calls them."""
