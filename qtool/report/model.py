"""The report's data model: versioned JSON first; Markdown and HTML are rendered from it and hold nothing else."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from qtool.evaluate.result import Evaluation, Proof, TaskEvaluation
from qtool.methods._base import Course

Count = Annotated[int, Field(gt=0, lt=2**63)]
Size = Annotated[int, Field(ge=0, lt=2**63)]
Index = Annotated[int, Field(ge=0, lt=2**20)]
Amount = Annotated[float, Field(ge=0, lt=2**63)]
Bits = Annotated[float, Field(gt=2**-20, lt=2**20)]


class Entry(BaseModel):
    """Part of a report; unknown keys are errors, so that an older reader never misreads a newer file."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class LayerEntry(Entry):
    """One module of the model, quantized or kept.

    Attributes:
        name, role, block, shape: as in the plan.
        format, method, activations: labels; None where kept.
        bits_per_weight, nbytes: of the stored matrix, parameters included.
        weight_error_db: 10 log10(|W|^2 / |W - W_hat|^2), dB; infinite where exact; None where kept.
        output_error_db: 10 log10(|X W^T|^2 / |X (W - W_hat)^T|^2), dB, with the inputs X of calibration as they arrive
            behind quantized layers; None where nothing was measured.
        target_error_db: the same with X (T - W_hat)^T below, where the method aimed at T, which makes up for what
            layers before did to X; None where it aimed at W itself. Methods are compared by `output_error_db`.
        tokens: how many calibrated it; 0 without data.
        fallback: what was done instead of what the recipe asked, and why.
        seconds: solving it and measuring its error.
        expert: index of its expert in a mixture; None: every token goes through it.
    """

    name: str
    role: str
    block: Index | None
    shape: tuple[Count, Count]
    format: str | None
    method: str | None
    activations: str | None
    bits_per_weight: Bits
    nbytes: Size
    weight_error_db: float | None
    output_error_db: float | None
    tokens: Size
    fallback: str | None
    seconds: Amount
    expert: Index | None = None
    target_error_db: float | None = None


class CourseEntry(Entry):
    """How far a training had come.

    Attributes:
        step: steps, or epochs, that had been taken; 0: the start.
        training: loss on samples that it learned from, of the state at that step or, for epochs, on the way there; None
            where it was not measured.
        held_out: loss on the others, of the state at that step.
    """

    step: Size
    training: float | None
    held_out: float


def course_entries(course: Course) -> tuple[CourseEntry, ...]:
    """A training as a report holds it, to six digits."""
    return tuple(
        CourseEntry(step=step, training=None if seen is None else float(f"{seen:.6g}"), held_out=float(f"{unseen:.6g}"))
        for step, seen, unseen in course
    )


class BlockEntry(Entry):
    """What a method that solves decoder blocks as a whole says of one.

    Attributes:
        block: its index.
        method: its name.
        losses: what it measured, by name: before and after, on samples that it learned from and on others.
        course: both losses between; empty if nothing was trained.
    """

    block: Index
    method: str
    losses: dict[str, float]
    course: tuple[CourseEntry, ...] = ()


class CacheEntry(Entry):
    """What rounding its KV cache does to the attention of a decoder block, measured on some calibration tokens.

    Attributes:
        block: its index.
        keys, values: labels of their formats.
        scores_error_db: 10 log10(|P|^2 / |P - P_hat|^2) of softmax weights P, dB.
        outputs_error_db: the same of what attention gives to the output projection.
    """

    block: Index
    keys: str
    values: str
    scores_error_db: float
    outputs_error_db: float


class FinishEntry(Entry):
    """What a stage behind the last block did.

    Attributes:
        name: of the stage; the recipe has its options.
        changed: matrices and other tensors in which it replaced numbers.
        about: what it measured.
        course: of what it trained, epoch by epoch; empty if it trains nothing.
    """

    name: str
    changed: Size
    about: dict[str, float | str]
    course: tuple[CourseEntry, ...] = ()


class AllocationEntry(Entry):
    """How a budget was divided. Divergences are measured on calibration samples that were held out.

    Attributes:
        wanted: the budget in words: "120.0 MB", "4.25 bits per weight", "a KL divergence of 0.02".
        limit: bytes that the artifact's files of tensors may have; None: as few as the divergence allows.
        nbytes: that they have at most.
        kld, kld_error: mean KL divergence from the original, nats per token, and its standard error.
        uniform: what it was compared with: the best plan that nobody allocated and that is no larger; None: none is.
        uniform_nbytes, uniform_kld, uniform_kld_error: the same of that.
        fell_back: whether that was better, and was taken.
        carried_out: whether divergences are of what methods made of both plans, rather than of rounded models.
        beside: what the answer has of what else was limited, and the limits.
        tried: plans that were measured.
        samples, held_out: sequences that scores and divergences were measured on.
    """

    wanted: str
    limit: Size | None
    nbytes: Size
    kld: float
    kld_error: float
    uniform: str | None = None
    uniform_nbytes: Size | None = None
    uniform_kld: float | None = None
    uniform_kld_error: float | None = None
    fell_back: bool = False
    carried_out: bool = False
    beside: dict[str, tuple[float, float]] = {}
    tried: Size
    samples: Size
    held_out: Size


class FileEntry(Entry):
    """A written file."""

    name: str
    nbytes: Size
    sha256: str


class ArtifactEntry(Entry):
    """A written artifact.

    Attributes:
        kind, path, files, runtimes: its layout, folder, files, and who reads them.
        verified: whether it was read back and equals what was computed.
        proof: what another program computes from it; None: nobody else reads this layout, or nobody was asked.
    """

    kind: str
    path: str
    files: tuple[FileEntry, ...]
    runtimes: tuple[str, ...]
    verified: bool
    proof: Proof | None = None


class StageEntry(Entry):
    """Time and the process's peak resident memory so far, at the end of a stage."""

    name: str
    seconds: Amount
    peak_bytes: Size


class ProfileEntry(Entry):
    """What a part of the work on one block took.

    Attributes:
        part: its name.
        calls: how often it was begun.
        host_seconds: over all threads, without parts within.
        device_seconds: that a CUDA device worked for it.
    """

    part: str
    calls: Size
    host_seconds: Amount
    device_seconds: Amount


class Report(Entry):
    """Everything a run did.

    Attributes:
        version: of this model; grows when a field changes its meaning. In version 1 `output_error_db` was measured
            against the method's target, where that was not the original.
        qtool: program version.
        recipe_name, recipe: the recipe's name and its full content after `extends` and `--set`.
        source, source_fingerprint, source_bytes, parameters: the model that went in.
        calibration: token source, samples, length and token count; empty without data.
        other_bytes: tensors that are no module (norms, biases), as stored.
        limited_blocks: blocks that were quantized in a smoke run; None for a whole run.
        base_model, license: of the source, as the model card says it: the hub's metadata.
        repository: where the result was to be uploaded.
        run: hash of what identifies the run: model, recipe, calibration, program.
        allocation: how the recipe's budget was divided; None without one.
        kv_cache: of each decoder block; empty if the cache is left alone, or no tokens were run.
        blocks: what methods that solve blocks measured.
        profile: where one block's seconds went, if that was asked.
        finish: stages behind the last block. Errors of layers are those before them.
        tasks: of lm-evaluation-harness, that `eval --tasks --update` added.
        environment: versions of python and packages, cpu, threads, device.
    """

    version: int = 2
    qtool: str
    recipe_name: str
    recipe: dict[str, object]
    source: str
    source_fingerprint: str
    source_bytes: Count
    parameters: Count
    calibration: dict[str, object]
    limited_blocks: Size | None
    layers: tuple[LayerEntry, ...]
    artifacts: tuple[ArtifactEntry, ...]
    stages: tuple[StageEntry, ...]
    evaluations: tuple[Evaluation, ...]
    tasks: tuple[TaskEvaluation, ...] = ()
    warnings: tuple[str, ...]
    environment: dict[str, str]
    other_bytes: Size = 0
    kv_cache: tuple[CacheEntry, ...] = ()
    blocks: tuple[BlockEntry, ...] = ()
    finish: tuple[FinishEntry, ...] = ()
    profile: tuple[ProfileEntry, ...] = ()
    run: str = ""
    base_model: str = ""
    license: dict[str, str] = {}
    repository: str = ""
    allocation: AllocationEntry | None = None
