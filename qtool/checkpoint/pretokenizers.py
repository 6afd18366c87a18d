"""How text is split before byte-pair merges: the names that GGUF files have for it, as tokenizer.json spells it out.

GGUF stores only a name (`tokenizer.ggml.pre`), and llama.cpp knows the rules behind each
(https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp); tokenizer.json stores the rules
(https://huggingface.co/docs/tokenizers/api/pre-tokenizers). Here are those of which both sides are known to agree.
"""

from __future__ import annotations

from typing import Any

ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
CONTRACTIONS = ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
LLAMA3 = CONTRACTIONS + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + REST
QWEN2 = CONTRACTIONS + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*" + REST
CAPITALIZED, CAPITALS = rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*"
SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
TEKKEN = rf"{CAPITALIZED}|{CAPITALS}|\p{{N}}|{SIGNS}{REST}"
GPT4O = rf"{CAPITALIZED}{ENDINGS}?|{CAPITALS}{ENDINGS}?|\p{{N}}{{1,3}}|{SIGNS}{REST}"


def _split(regex: str) -> list[dict[str, Any]]:
    """Pieces by a regular expression, whose bytes are then spelled as printable characters."""
    return [
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
    ]


GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
RULES: dict[str, tuple[list[dict[str, Any]], bool | None]] = {
    "gpt-2": ([GPT2], False),
    "smollm": ([{"type": "Digits", "individual_digits": True}, GPT2], False),
    "llama-bpe": (_split(LLAMA3), True),
    "smaug-bpe": (_split(LLAMA3), False),
    "qwen2": (_split(QWEN2), False),
    "tekken": (_split(TEKKEN), True),
    "gpt-4o": (_split(GPT4O), None),
}
"""GGUF's name -> (pre-tokenizers in sequence, whether a word that is a token is not merged step by step).

None: either, since merging leads there; so it is in vocabularies that were made for tiktoken.
"""


LISTED = """
a.x-4.0 afmoe bailingmoe bailingmoe2 bloom chameleon chatglm-bpe codeshell command-r dbrx deepseek-coder deepseek-llm
deepseek-r1-qwen deepseek-v3 default exaone exaone-moe exaone4 falcon falcon-h1 falcon3 gigachat glm4 gpt-2 gpt-4o
gpt3-finnish granite-docling grok-2 hunyuan hunyuan-dense jais jais-2 jina-de jina-es jina-v1-en jina-v2-code
jina-v2-de jina-v2-es joyai-llm kanana2 kimi-k2 kormo lfm2 llada-moe llama-bpe llama-v3 llama3 llama4 megrez mellum
midm-2.0 minerva-7b minimax-m2 modern-bert mpt olmo phi-2 pixtral poro-chat qwen2 qwen35 refact roberta-bpe seed-coder
smaug-bpe smollm solar-open stablelm2 starcoder superbpe tekken trillion viking youtu
"""
NAMES = frozenset(LISTED.split())
"""What llama.cpp calls ways to split text; a file with another name is not loaded."""


def identify(tokenizer: dict[str, Any]) -> str | None:
    """GGUF's name for the pre-tokenizer of a tokenizer.json with byte-level BPE; None if it has none that is known."""
    found = [_essence(step) for step in _steps(tokenizer.get("pre_tokenizer"))]
    ignore_merges = bool(tokenizer["model"].get("ignore_merges"))
    for name, (steps, ignores) in RULES.items():
        if found == [_essence(step) for step in steps] and ignores in (ignore_merges, None):
            return name
    return None


def _steps(component: Any) -> list[dict[str, Any]]:
    """The parts of nested sequences, in order."""
    if not isinstance(component, dict):
        return []
    if component.get("type") != "Sequence":
        return [component]
    return [step for part in component.get("pretokenizers", []) for step in _steps(part)]


def _essence(step: dict[str, Any]) -> tuple[object, ...]:
    """What of a step decides about pieces.

    Cutting matches out is the same as removing what is not matched, because these expressions match everything;
    `trim_offsets` is only about positions.
    """
    kind = step.get("type")
    if kind == "Split":
        isolated = (step.get("behavior"), step.get("invert")) in (("Isolated", False), ("Removed", True))
        return kind, step.get("pattern"), isolated
    if kind == "ByteLevel":
        return kind, step.get("add_prefix_space"), step.get("use_regex", True)
    return kind, step.get("individual_digits")
