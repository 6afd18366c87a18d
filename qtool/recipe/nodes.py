"""YAML text -> a tree of plain values, each of which knows where it was written.

Only what a recipe needs of YAML 1.1 is accepted: mappings with distinct words as keys, lists, strings, numbers,
booleans and null. Anchors, tags and merge keys are refused, and so are large or deep documents, so that no text takes
long to read.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qtool.errors import printable
from qtool.problems import Keys, dotted

LARGEST = 1 << 18
"""Bytes of YAML; a rule for each of 3000 layers fits."""
DEEPEST = 16
LONGEST_LINE = 600
"""Characters of a problem that are shown."""
SCALARS = frozenset({"str", "int", "float", "bool", "null"})
STAR = 'a pattern that begins with * needs quotes, as in match: "*"'
BROKEN = object()
"""Stands for a value that was reported already."""


@dataclass
class Node:
    """A value of the document.

    Attributes:
        value: mappings and lists hold nodes.
        where: "file.yaml:12", or the flag that set it.
    """

    value: Any
    where: str

    def plain(self) -> Any:
        """The value without positions; lists become tuples, as pydantic's strict mode wants."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        return tuple(node.plain() for node in self.value) if isinstance(self.value, list) else self.value

    def at(self, path: Keys) -> Node:
        """The node at a path that exists."""
        node = self
        for key in path:
            node = node.value[key]
        return node


class NodeReader:
    """Reads documents and gathers what is wrong in them.

    Attributes:
        problems: complete lines for the user.
    """

    def __init__(self) -> None:
        self.problems: list[str] = []
        self._constructor = yaml.constructor.SafeConstructor()

    def read(self, path: Path) -> Node:
        """Reads a file; whatever cannot be used is reported and left out."""
        try:
            with path.open("rb") as file:
                content = file.read(LARGEST + 1)
            if len(content) > LARGEST:
                self.report(str(path), (), f"wanted at most {LARGEST >> 10} KiB of YAML, found more")
            else:
                return self.parse(content.decode(), lambda line: f"{path}:{line + 1}")
        except OSError as error:
            self.report(str(path), (), f"cannot be read: {error.strerror}")
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start)
            self.report(f"{path}:{line + 1}", (), f"wanted UTF-8, found byte 0x{content[error.start]:02x}")
        return Node(BROKEN, str(path))

    def parse(self, text: str, where: Callable[[int], str]) -> Node:
        """Reads a document; whatever cannot be used is reported and left out.

        Args:
            text: YAML.
            where: what messages call a line of it, the first one being 0.
        """
        try:
            if refused := _refusal(text):
                line, reason = refused
                self.report(where(line), (), reason)
                return Node(BROKEN, where(line))
            root = yaml.compose(text, Loader=yaml.SafeLoader)
            return self._build(root, (), where, where(root.start_mark.line)) if root else Node(None, where(0))
        except yaml.reader.ReaderError as error:
            line = text.count("\n", 0, error.position)
            self.report(where(line), (), f"YAML does not allow the character {chr(error.character)!r}")
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = mark.line
            self.report(where(line), (), f"no valid YAML: {error.problem}{_syntax_hint(text, mark)}")
        except (ValueError, OverflowError) as error:  # an escape such as "\UFFFFFFFF" is no character
            line = 0
            self.report(where(line), (), f"no valid YAML: {error}")
        return Node(BROKEN, where(line))

    def _build(self, node: yaml.Node, path: Keys, where: Callable[[int], str], place: str) -> Node:
        """The node at a path. `place` is where its key stands, which is where a reader looks for it."""
        if isinstance(node, yaml.MappingNode):
            return Node(self._mapping(node, path, where), place)
        if isinstance(node, yaml.SequenceNode):
            items = enumerate(node.value)
            return Node([self._build(n, (*path, i), where, where(n.start_mark.line)) for i, n in items], place)
        return Node(self._scalar(node, path, place), place)

    def _mapping(self, node: yaml.MappingNode, path: Keys, where: Callable[[int], str]) -> dict[str, Node]:
        found: dict[str, Node] = {}
        for key_node, value_node in node.value:
            place = where(key_node.start_mark.line)
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag.rpartition(":")[2] != "str":
                written = repr(key_node.value)[:40] if isinstance(key_node, yaml.ScalarNode) else "something else"
                self.report(place, path, f"wanted a word as key, found {written}")
                continue
            key = self._scalar(key_node, path, place)
            if key in found:
                self.report(place, (*path, key), f"this key stands at {found[key].where} already; remove one of them")
            elif key is not BROKEN:
                found[key] = self._build(value_node, (*path, key), where, place)
        return found

    def _scalar(self, node: yaml.ScalarNode, path: Keys, place: str) -> Any:
        kind = node.tag.rpartition(":")[2]
        if kind not in SCALARS:
            self.report(place, path, f"wanted text or a number, found a YAML {kind}; put it in quotes")
            return BROKEN
        try:
            value = self._constructor.construct_object(node)
            if isinstance(value, str):
                value.encode()  # half of a surrogate pair cannot be written anywhere
        except ValueError as error:
            self.report(place, path, f"{node.value[:40]!r} cannot be read: {error}")
            return BROKEN
        if isinstance(value, int | float) and not abs(value) < 2**64:
            self.report(place, path, f"wanted a finite number below 2^64, found {node.value[:40]}")
            return BROKEN
        return value

    def report(self, place: str, path: Keys, text: str) -> None:
        """Notes a problem.

        Args:
            place: where it stands.
            path: the value that it is about.
            text: what is wrong.
        """
        line = f"{place}: {dotted(path)}: {text}" if path else f"{place}: {text}"
        line = line if len(line) <= LONGEST_LINE else line[:LONGEST_LINE] + "..."
        self.problems.append(printable(line))


def _refusal(text: str) -> tuple[int, str] | None:
    """(line, reason) of the first thing in the text that recipes do not use of YAML."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            return event.start_mark.line, f"{STAR}; YAML aliases are not used in recipes"
        if getattr(event, "anchor", None):
            return event.start_mark.line, "YAML anchors are not used in recipes; write the value out, or use extends:"
        if getattr(event, "tag", None):
            return event.start_mark.line, f"YAML tags are not used in recipes, found {event.tag[:40]}"
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > DEEPEST:
                return event.start_mark.line, f"wanted at most {DEEPEST} levels of nesting"
        depth -= isinstance(event, yaml.CollectionEndEvent)
    return None


def _syntax_hint(text: str, mark: yaml.Mark) -> str:
    """What usually causes a syntax error on that line."""
    lines = text.splitlines()
    line = lines[mark.line] if mark.line < len(lines) else ""
    if "\t" in line[: mark.column + 1]:
        return "; YAML indents with spaces, found a tab"
    return f"; {STAR}" if re.search(r"[-:,{[]\s*\*", line) else ""
