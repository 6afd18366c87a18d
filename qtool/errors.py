"""Every failure that a user can cause or meet, and the exit code that tells scripts which kind it was.

    QtoolError          1  anything unexpected that qtool noticed itself
    |- UsageError       2  flags or arguments that do not fit together (Typer uses 2 as well)
    |- RecipeError      3  the recipe's text is wrong: syntax, unknown key, bad value
    |- PlanError        4  the recipe does not fit the model or the artifact
    |- CheckpointError  5  the source is missing, damaged or of an unknown kind
    |- NumericsError    6  NaN, Inf, or a matrix that no damping makes solvable
    |- StorageError     7  the output cannot be written: full disk, occupied folder
    |- VerifyError      8  an artifact read back differs from what was computed
    |- GateError        9  the measured quality misses a gate
    |- MissingExtra    10  an optional package is needed
    |- HubError        11  the model hub refused or cannot be reached
    |- StrictError     12  there would be a warning, and --strict allows none
    |- ProcessError    13  another process of the same run ended, or cannot be reached

A run that the user interrupts exits with 130; one that SIGHUP or SIGTERM ends with 129 or 143.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from errno import EDQUOT, ENOSPC

DISTRIBUTION = "qtool-ptq"
"""The name on package indexes, where `qtool` is another project."""


class QtoolError(Exception):
    """One line for the user: what is wrong, what was wanted, what was found, what to do next.

    Args:
        what: the thing that is wrong, without a full stop at the end.
        wanted: what qtool expected there.
        found: what is there instead.
        hint: the next step.
    """

    exit_code = 1

    def __init__(self, what: str, *, wanted: object = None, found: object = None, hint: str | None = None) -> None:
        clauses = [f"wanted {wanted}"] if wanted is not None else []
        clauses += [f"found {found}"] if found is not None else []
        line = what + (": " + ", ".join(clauses) if clauses else "")
        super().__init__(line + (f"; {hint}" if hint else ""))


class UsageError(QtoolError):
    """Flags or arguments that do not fit together."""

    exit_code = 2


class Problems(QtoolError):
    """Mistakes of one kind, shown together: one behind its title, several on a line each."""

    def __init__(self, problems: Sequence[str], title: str) -> None:
        self.problems = tuple(problems)
        several = f"{len(self.problems)} problems\n" + "\n".join(f"  {p}" for p in self.problems)
        Exception.__init__(self, f"{title}: {self.problems[0] if len(self.problems) == 1 else several}")


class RecipeError(Problems):
    """The recipe's text is wrong."""

    exit_code = 3


class PlanError(Problems):
    """The recipe does not fit the model or the artifact."""

    exit_code = 4


class CheckpointError(QtoolError):
    """The source is missing, damaged or of an unknown kind."""

    exit_code = 5


class NumericsError(QtoolError):
    """NaN, Inf, or a matrix that no damping makes solvable."""

    exit_code = 6


class StorageError(QtoolError):
    """The output cannot be written."""

    exit_code = 7


class VerifyError(QtoolError):
    """An artifact read back differs from what was computed."""

    exit_code = 8


class GateError(QtoolError):
    """The measured quality misses a gate."""

    exit_code = 9


class MissingExtra(QtoolError):
    """An optional package is needed."""

    exit_code = 10

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        hint = "install it with: pip install " + " ".join(repr(name) for name in packages_of(extra) or [package])
        super().__init__(f"{purpose} needs the package {package}", hint=hint)


def packages_of(extra: str) -> list[str]:
    """What an extra of this distribution requires, as pip takes it; nothing if qtool runs without being installed."""
    from importlib.metadata import PackageNotFoundError, requires  # slow, and hardly ever needed

    try:
        lines = requires(DISTRIBUTION) or []
    except PackageNotFoundError:
        return []
    parts = (line.partition(";") for line in lines)
    return [name.strip() for name, _, when in parts if f"extra=='{extra}'" in when.replace(" ", "").replace('"', "'")]


class HubError(QtoolError):
    """The model hub refused or cannot be reached."""

    exit_code = 11


class StrictError(QtoolError):
    """There would be a warning, and --strict allows none."""

    exit_code = 12


class ProcessError(QtoolError):
    """Another process of the same run ended, or cannot be reached."""

    exit_code = 13


@contextmanager
def reading(path: object) -> Iterator[None]:
    """Turns what the system says about reading `path` into a CheckpointError."""
    try:
        yield
    except OSError as error:
        where = error.filename if isinstance(error.filename, str) else path
        raise CheckpointError(f"{where} cannot be read: {error.strerror or one_line(error)}") from error


def cannot_write(path: object, error: OSError) -> StorageError:
    """What to tell when the system refuses to write: a full disk, a folder that is not ours, ...

    Args:
        path: what was to be written, if the system does not say.
        error: what the system says.
    """
    where = error.filename if isinstance(error.filename, str) else path
    full = error.errno in (ENOSPC, EDQUOT)
    hint = "free some space and run the same command again" if full else "choose another output"
    return StorageError(f"cannot write {where}: {error.strerror or one_line(error)}", hint=hint)


def suggestion(name: str, known: Sequence[str], otherwise: str | None = None) -> str:
    """Returns "did you mean X?" for a near spelling, else what else to do: choose one of the known names by default."""
    close = get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else otherwise or "known: " + ", ".join(sorted(known))


def one_line(error: BaseException) -> str:
    """What another library's error says, short enough for a line of ours."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def printable(text: str) -> str:
    """Text of a file, with escapes for what would move a terminal's cursor."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def is_utf8(text: str) -> bool:
    """False for a path whose bytes are in another encoding, which no JSON and no report can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
