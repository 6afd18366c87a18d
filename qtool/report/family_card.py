"""The model card of a repository that holds several GGUF files of one model.

https://huggingface.co/docs/hub/model-cards#model-card-metadata
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from qtool.report.meaning import meaning
from qtool.report.model import Report
from qtool.report.summary import bits_per_weight, main_evaluation, number
from qtool.report.units import size
from qtool.store.hub import HUB_ID, LICENSE
from qtool.store.markdown import code_span, escape_markdown


class Member(NamedTuple):
    """A member of the family, and what its files are called in the repository; several if it is cut into parts."""

    report: Report
    files: tuple[str, ...]


def family_card(members: Sequence[Member], repository: str) -> str:
    """README.md: metadata, what there is to choose from, how to load it.

    Args:
        members: at least one.
        repository: "owner/name".
    """
    first = members[0].report
    title = first.base_model.rstrip("/").rpartition("/")[2] or first.base_model
    largest = max(members, key=nbytes)
    tag = largest.files[0].removesuffix(".gguf").rpartition("-")[2]
    paragraphs = [
        f"---\n{metadata(first)}\n---",
        f"# {escape_markdown(title)}, quantized",
        f"{code_span(first.base_model)} as {len(members)} GGUF files, made by qtool {first.qtool}.",
        f"`llama-cli -hf {repository}:{tag}` chats with one of them.",
        "\n".join(table(members)),
        "Divergences are from the original, nats per token; index.html shows them beside sizes.",
    ]
    return "\n\n".join(paragraphs) + "\n"


def metadata(report: Report) -> str:
    """The metadata as YAML; a base model that is no repository of the hub is left out, as the hub refuses it."""
    from huggingface_hub import ModelCardData

    known: dict[str, Any] = {key: report.license[key] for key in LICENSE if report.license.get(key)}
    if HUB_ID.fullmatch(report.base_model):
        known |= {"base_model": report.base_model, "base_model_relation": "quantized"}
    data = ModelCardData(library_name="gguf", pipeline_tag="text-generation", tags=["qtool", "gguf"], **known)
    return str(data.to_yaml()).strip()


def table(members: Sequence[Member]) -> list[str]:
    """Lines of a table, smallest file first."""
    lines = ["| file | size | bits per weight | mean KL divergence | in words |", "| --- | ---: | ---: | ---: | --- |"]
    for member in sorted(members, key=nbytes):
        found, words, kld = main_evaluation(member.report), "", ""
        if found and found.kld_mean is not None:
            kld, words = number(found.kld_mean), meaning(found.kld_mean)
            kld += f" ± {number(found.kld_error)}" if found.kld_error else ""
        names = ", ".join(f"[{escape_markdown(name)}]({name})" for name in member.files)
        bits = f"{bits_per_weight(member.report):.2f}"
        lines.append(f"| {names} | {size(nbytes(member))} | {bits} | {kld} | {words} |")
    return lines


def nbytes(member: Member) -> int:
    """Of its files."""
    return sum(file.nbytes for a in member.report.artifacts for file in a.files if file.name.endswith(".gguf"))
