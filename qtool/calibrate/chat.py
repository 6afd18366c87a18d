"""Chats as people keep them, brought to one form and laid out by a model's own template.

A template is a program that comes with the model, so it runs in a process of its own, with limits; see `child`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from qtool.calibrate.child import Child
from qtool.errors import CheckpointError, one_line

Turn = dict[str, Any]
"""A message: `role` and `content`, text both, and what else the template may ask for."""

SECONDS = 10.0
"""For one conversation; templates take milliseconds."""
START = 60.0
"""More for the first, which waits for imports."""

ROLES = {
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bot", "model"), "assistant"),
    **dict.fromkeys(("observation", "function", "function_response"), "tool"),
}
"""Who speaks in rows of ShareGPT's kind, in the words of chat templates."""

PAIRS = (
    (("instruction", "input", "context"), ("output", "response", "completion")),
    (("prompt", "question", "query"), ("completion", "response", "answer", "output")),
)
"""Fields that ask, all of which count, and fields that answer, of which the first that there is."""

KEPT = ("tool_calls", "tool_call_id", "name")
"""What a message may have beside its text."""

PROGRAM = """
import json
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
tokenizer = None
for line in sys.stdin:
    asked = json.loads(line)
    try:
        if tokenizer is None:
            tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), **asked["special"])
            tokenizer.chat_template = asked["template"]
        said = ["", tokenizer.apply_chat_template(asked["turns"], tokenize=False)]
    except BaseException as error:
        said = [" ".join(str(error).split())[:200] or type(error).__name__, ""]
    print(json.dumps(said), flush=True)
"""


class ChatTemplate:
    """Lays conversations out as a tokenizer's template wants them; also a context manager.

    Args:
        tokenizer: has the template, and the special tokens that it names.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.child: Child | None = None

    def __enter__(self) -> ChatTemplate:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.child:
            self.child.__exit__(kind, error, tb)
            self.child = None

    def lay_out(self, turns: list[Turn], where: str) -> str:
        """One text of a conversation.

        Raises:
            CheckpointError: there is no template, or it fails, takes too long, or makes too much of it.
        """
        what = f"the chat template cannot lay out {where}"
        try:
            template = self.tokenizer.get_chat_template()
        except Exception as error:  # its own checks raise several kinds
            raise CheckpointError(what, found=one_line(error)) from error
        started = self.child is not None
        child = self.child = self.child or Child(PROGRAM, what)
        child.what = what
        asked = {"turns": turns, "template": template, "special": spelled(self.tokenizer.special_tokens_map)}
        try:
            wrong, text = child.ask(asked, SECONDS if started else START)
        except CheckpointError:
            self.__exit__(None, None, None)  # what does not answer gets no other question
            raise
        if wrong:
            raise CheckpointError(what, found=wrong)
        return str(text)


def spelled(special: Mapping[str, Any]) -> dict[str, Any]:
    """Special tokens by name, as text."""
    return {
        name: [str(token) for token in value] if isinstance(value, list | tuple) else str(value)
        for name, value in special.items()
    }


def turns_of(messages: list[Any], where: str) -> list[Turn]:
    """The turns of {role, content} or {from, value} messages.

    Raises:
        CheckpointError: something else is among them.
    """
    turns = []
    for message in messages:
        fields = message if isinstance(message, dict) else {}
        role, content = fields.get("role", fields.get("from")), text_of(fields.get("content", fields.get("value")))
        kept = {name: fields[name] for name in KEPT if fields.get(name)}
        if content is None and kept.get("tool_calls"):
            content = ""
        if not isinstance(role, str) or content is None:
            raise CheckpointError(f"a message of {where}", wanted="text as role and content", found=str(message)[:100])
        turns.append({"role": ROLES.get(role, role), "content": content, **kept})
    return turns


def text_of(content: Any) -> str | None:
    """The text of a message's content: itself, or all of its parts that are text; None: there is none."""
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        return "".join(texts) if texts else None
    return content if isinstance(content, str) else None


def pair_of(row: Mapping[str, Any], where: str) -> list[Turn] | None:
    """The turns of a row that keeps what is asked and what is answered apart; None: it does not."""
    for asking, answering in PAIRS:
        asked = [row[field] for field in asking if row.get(field)]
        answer = next((row[field] for field in answering if row.get(field)), None)
        if asked and answer is not None:
            if all(isinstance(part, list) for part in (*asked, answer)):
                return turns_of([message for part in (*asked, answer) for message in part], where)
            if all(isinstance(part, str) for part in (*asked, answer)):
                return [{"role": "user", "content": "\n\n".join(asked)}, {"role": "assistant", "content": answer}]
    return None
