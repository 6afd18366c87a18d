"""Whether a program that is not ours computes from an artifact what we compute from it, on a few tokens.

What it may differ by follows from our own logits: where it rounds inputs to 8 bits on the way, so do we for once, and
see how far that takes them. A mistake in names, orders, norms, biases or rotary embeddings takes them much farther.

Shape letters: T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from qtool.artifact._base import Artifact, Reading
from qtool.calibrate.walker import Walker
from qtool.checkpoint._base import Layer, QuantizedCheckpoint
from qtool.checkpoint.families._rope import rope_parameters
from qtool.errors import CheckpointError, VerifyError, one_line
from qtool.evaluate.readers import READERS
from qtool.evaluate.result import Proof
from qtool.formats._ggml import BlockFormat
from qtool.formats.int import Int
from qtool.limits import free_memory
from qtool.numerics.checks import finite

TOKENS = 24
LEAST = 256
"""Shortest context that llama.cpp has room for."""
FLOORS = {torch.float32: 5e-4, torch.float16: 0.01, torch.bfloat16: 0.05}
"""Of the difference, as a share of the logits: other orders of sums, and products in 16 bits."""
FACTOR = 3.0
"""How much farther than our own rounding another one may lead: its groups are other ones, and it rounds differently."""
GROUP = 32
"""Columns of an input that ggml rounds to 8 bits together, where blocks of the weight are no larger."""


def prove(
    artifact: Artifact,
    written: QuantizedCheckpoint,
    model: QuantizedCheckpoint,
    length: int | None = None,
    floor: float | None = None,
) -> Proof | None:
    """Has an artifact run by another program, if there is one for it.

    Args:
        artifact: its layout.
        written: the artifact, opened.
        model: what it was written from, with which it is compared; what was lost on the way is not in the artifact.
        length: how many tokens to run; None: a few.
        floor: instead of `FLOORS`.

    Returns:
        What was found, or why nothing was; None: nobody else reads this layout.

    Raises:
        VerifyError: it computes something else.
        CheckpointError: it does not run, and nobody else reads this layout.
    """
    reading = artifact.reading(written)
    if reading is None:
        return None
    reading = by_whom(reading)
    reader = READERS[reading.reader]
    if model.family.model_free:
        return Proof(reader=reading.reader, why_not="what the model computes is not known without its class")
    if not reader.installed:
        return Proof(reader=reading.reader, why_not=f"{reader.needs} is not installed")
    if (numbers := weights(model)) > reader.threshold:
        return Proof(reader=reading.reader, why_not=f"the model has more than {reader.threshold:.3g} weights")
    if (wanted := numbers * reader.memory) > (free := free_memory()):
        why = f"that takes about {wanted / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free"
        return Proof(reader=reading.reader, why_not=why)
    if reading.differs:
        return Proof(reader=reading.reader, why_not=reading.differs)
    rows = model.info(f"{model.family.embedding}.weight").shape[0]
    tokens = [(7 * i * i + 3 * i + 1) % rows for i in range(min(count(model, length), reading.most or LEAST))]
    try:
        ran = reader.run(written, tokens, reading)
    except CheckpointError as error:
        if len(artifact.runtimes) == 1:
            raise
        return Proof(reader=reading.reader, why_not=one_line(error))  # others may load what this one does not
    try:
        found = judged(ran.logits, model, tokens, reading, f"{reading.reader} {reader.version}", floor)
        return found.model_copy(update={"remark": ran.remark})
    except VerifyError as error:
        raise VerifyError(f"{written.source}: {error}") from error


def judged(
    found: Tensor,
    model: QuantizedCheckpoint,
    tokens: list[int],
    reading: Reading,
    reader: str,
    floor: float | None = None,
) -> Proof:
    """Compares a reader's logits with ours, and if they differ with ours rounded on the way as it rounds.

    That is in bfloat16, or with matrices in another type, or with activations out of ggml's table. Rounding so from
    layer to layer leads some models, of many blocks and coarse weights, as far as a mistake does. Both programs are
    led to the same place by it.

    Raises:
        VerifyError: they differ from both.
    """
    limits = floor or FLOORS[reading.dtype], model.family.mixture
    wanted, other = expected(model, tokens, reading)
    try:
        return compared(found, wanted, other, reader, *limits)
    except VerifyError:
        tables = reading.tables and "gelu" in str(model.config)
        if not tables and reading.dtype != torch.bfloat16 and reading.decodes is None:
            raise
        ours = in_type(model, tokens, reading.dtype, reading.decodes, tables)
        return compared(found, ours, ours + (other - wanted), reader, *limits)


class Decoding(Walker):
    """Rounds quantized matrices as decoders do that compute in the type of scales.

    Args:
        model: runs.
        dtype: that it is computed in.
        decodes: that matrices are rounded to before that; None: not at all.
        tables: whether GELU is looked up in ggml's table, of float16 by float16.
    """

    def __init__(
        self, model: QuantizedCheckpoint, dtype: torch.dtype, decodes: torch.dtype | None, tables: bool = False
    ) -> None:
        super().__init__(model, torch.device("cpu"), dtype)
        self.quantized, self.decodes, self.tables = model.layers, decodes, tables

    def load_block(self, i: int) -> nn.Module:
        """See `Walker.load_block`."""
        block = super().load_block(i)
        for module in block.modules() if self.tables else ():
            if "GELU" in type(module).__name__ and not module._forward_hooks:  # blocks are kept, and come again
                module.register_forward_pre_hook(lambda _, inputs: (inputs[0].half().float(),))
                module.register_forward_hook(lambda _, __, output: output.half().float())
        return block

    def tensor(self, name: str) -> Tensor:
        """See `Walker.tensor`."""
        return self.decoded(name, super().tensor(name))

    def part(self, name: str, start: int, stop: int) -> Tensor:
        """See `Walker.part`; rounded, if it is of a quantized matrix."""
        return self.decoded(name, super().part(name, start, stop))

    def decoded(self, name: str, found: Tensor) -> Tensor:
        """Numbers of a tensor as they are decoded."""
        rounds = self.decodes is not None and name.removesuffix(".weight") in self.quantized
        return found.to(self.decodes).to(found.dtype) if rounds else found


def in_type(
    model: QuantizedCheckpoint,
    tokens: list[int],
    dtype: torch.dtype,
    decodes: torch.dtype | None = None,
    tables: bool = False,
) -> Tensor:
    """Our logits, float32 [T, V], computed in a type, of matrices rounded to another one; see `Decoding`."""
    walker = Decoding(model, dtype, decodes, tables)
    hidden = walker.embed(torch.tensor([tokens]))
    for i in range(len(walker.blocks)):
        walker.advance(walker.load_block(i), i, hidden)
    return finite(walker.logits(hidden, 0).float(), f"logits of {model.source}")


def by_whom(reading: Reading) -> Reading:
    """The same by the other program, if that one is installed and the first is not."""
    other = reading.other and READERS[reading.other].installed and not READERS[reading.reader].installed
    return replace(reading, reader=reading.other) if other else reading


def count(model: QuantizedCheckpoint, length: int | None) -> int:
    """How many tokens are run.

    No more than a window that GGUF leaves out, and more than a short original context: llama.cpp decides by the longest
    context that it allows.
    """
    original = rope_parameters(model.family.rope(model.config)).get("original_max_position_embeddings") or LEAST
    wanted = length or (TOKENS if original >= LEAST else int(original) + 8)
    return min(wanted, model.family.gguf_window(model.config) or wanted)


def weights(model: QuantizedCheckpoint) -> int:
    """How many numbers its tensors have."""
    return sum(math.prod(model.info(name).shape) for name in model.names())


def expected(model: QuantizedCheckpoint, tokens: list[int], reading: Reading) -> tuple[Tensor, Tensor]:
    """Our logits, float32 [T, V], and the same with inputs rounded as the reader may."""
    walker = Walker(model, torch.device("cpu"), torch.float32)
    exact = walker.embed(torch.tensor([tokens]))
    other = walker.embed(torch.tensor([tokens]))
    linear = [m for found in walker.modules.values() for m in found if m.kind == "linear"]
    inputs = {m.name: eight_bits(model.layers.get(m.name)) for m in linear if m.shape[1] % GROUP == 0}
    for i in range(len(walker.blocks)):
        block = walker.load_block(i)
        walker.advance(block, i, exact)
        if reading.rounds:
            walker.advance(block, i, other, inputs if rounds(model) else {})
    if reading.rounds and not walker.around:
        walker.output_layer()  # kept for both
    logits = finite(walker.logits(exact, 0), f"logits of {model.source}")
    return logits, walker.logits(other, 0) if reading.rounds else logits


def eight_bits(layer: Layer | None) -> Layer:
    """What ggml rounds the inputs of a layer to, as a layer in its place."""
    block = layer.format.columns if layer and isinstance(layer.format, BlockFormat) else GROUP
    inputs = Int(bits=8, group=max(GROUP, block))
    return Layer(inputs, inputs)


def rounds(model: QuantizedCheckpoint) -> bool:
    """Whether some matrix is not float32, with which inputs are rounded."""
    return bool(model.layers) or any(model.info(name).dtype != torch.float32 for name in model.names())


def compared(found: Tensor, wanted: Tensor, other: Tensor, reader: str, floor: float, several: bool) -> Proof:
    """Compares logits.

    Args:
        found: the reader's.
        wanted: ours.
        other: ours with inputs rounded, see `expected`.
        reader: what made them.
        floor: see `FLOORS`.
        several: whether tokens go through some of several experts: through others, by a hair.

    Raises:
        VerifyError: they differ by more than they may.
    """
    if found.shape != wanted.shape:
        raise VerifyError(f"{reader}: wrong logits", wanted=list(wanted.shape), found=list(found.shape))
    limit = floor + FACTOR * apart(other, wanted, several)
    distance = apart(found, wanted, several)
    largest = float((found - wanted).abs().max())
    if not distance <= limit:
        what = f"{reader} computes something else than was meant"
        said = f"{distance:.2g}, and logits that differ by up to {largest:.2g}"
        hint = "this conversion is wrong; please report it with the model's config.json"
        raise VerifyError(what, wanted=f"a relative difference of at most {limit:.2g}", found=said, hint=hint)
    return Proof(reader=reader, tokens=len(wanted), distance=distance, limit=limit, largest=largest)


def apart(a: Tensor, b: Tensor, several: bool) -> float:
    """How far logits are apart, relative to those of b: of all tokens together, or of the median one."""
    centered = b - b.mean(1, keepdim=True)
    if several:
        return float(((a - b).norm(dim=1) / centered.norm(dim=1).clamp_min(1e-30)).median())
    return float((a - b).norm() / centered.norm().clamp_min(1e-30))
