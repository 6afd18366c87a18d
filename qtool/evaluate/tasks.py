"""Tasks of lm-evaluation-harness, https://github.com/EleutherAI/lm-evaluation-harness, with a model and its baseline.

The harness brings questions, prompts and metrics; how likely a continuation is says one of our backends. Tasks that
have the model write text are refused: what is measured here is what quantization does to its probabilities.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from qtool.calibrate.tokenizer import load_tokenizer
from qtool.checkpoint._base import Checkpoint
from qtool.errors import MissingExtra, UsageError, one_line
from qtool.evaluate.continuations import Request, Scorer
from qtool.evaluate.result import TaskScore

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

LONGEST = 2048
"""Tokens of a request, where the model does not say how many it takes."""


class Asked(NamedTuple):
    """What is to be done.

    Attributes:
        tasks: names of the harness's tasks, or paths of their YAML files.
        fewshot: examples in front of each question; None: as many as the task says.
        limit: questions of each task; None: all.
    """

    tasks: tuple[str, ...]
    fewshot: int | None
    limit: int | None


class Answers(NamedTuple):
    """How a model did in one task: mean of each metric, its standard error, and each question's value."""

    means: dict[str, tuple[float, float | None]]
    samples: dict[str, list[float]]
    higher_is_better: dict[str, bool]


def harness_version() -> str:
    """The release that is installed. Raises MissingExtra."""
    return str(harness().__version__)


def harness() -> Any:
    """The package. Raises MissingExtra: it is not installed."""
    try:
        import lm_eval
    except ImportError:
        raise MissingExtra("lm-eval", "tasks", "eval --tasks") from None
    return lm_eval


def answers(model: Checkpoint, score: Scorer, asked: Asked) -> dict[str, Answers]:
    """Has a model answer.

    Args:
        model: whose tokenizer is used.
        score: runs it.
        asked: tasks.

    Returns:
        By task; groups of tasks are taken apart.

    Raises:
        MissingExtra: the harness is not installed.
        UsageError: no such task, its data cannot be read, or it has the model write text.
        CheckpointError: the model has no tokenizer.
    """
    evaluate, adapter = harness().simple_evaluate, adapted(model, score)
    with quiet():
        loaded = loaded_tasks(asked.tasks)
        wanted = {"num_fewshot": asked.fewshot, "limit": asked.limit, "bootstrap_iters": 0}
        found = evaluate(adapter, tasks=loaded, task_manager=task_manager(), **wanted)
    return {name: answers_of(found, name) for name in found["samples"]}


def task_names(asked: Asked) -> tuple[str, ...]:
    """What groups and files of tasks come to. Raises MissingExtra, UsageError: see `answers`."""
    harness()
    with quiet():
        return tuple(task.task_name for task in loaded_tasks(asked.tasks))


@cache
def task_manager() -> Any:
    """The harness's index of its tasks, thousands of files: reading them takes longer than small tasks do."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def loaded_tasks(names: Sequence[str]) -> list[Any]:
    """The harness's tasks, with their data. Raises UsageError: see `answers`."""
    try:
        tasks = task_manager().load(list(names))["tasks"]
    except (OSError, ValueError, KeyError, ImportError) as error:
        hint = "name tasks of lm-evaluation-harness, or the YAML file of one; their data comes from the hub"
        raise UsageError("--tasks cannot be loaded", found=one_line(error), hint=hint) from error
    for name, task in tasks.items():
        if task.get_config("output_type") == "generate_until":
            wanted = "tasks that score given answers"
            raise UsageError("--tasks", wanted=wanted, found=f"{name}, in which the model writes text")
    return list(tasks.values())


def answers_of(found: Mapping[str, Any], name: str) -> Answers:
    """One task's part of what the harness returns."""
    results, samples = found["results"][name], found["samples"][name]
    better = found["higher_is_better"].get(name, {})
    means, values, higher = {}, {}, {}
    for key, value in results.items():
        metric, _, how = key.partition(",")
        if not how or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = results.get(f"{metric}_stderr,{how}")
        means[metric] = float(value), float(error) if isinstance(error, int | float) else None
        higher[metric] = better.get(metric) is not False
        own = [sample.get(metric) for sample in sorted(samples, key=lambda s: s["doc_id"])]
        if all(isinstance(x, int | float) for x in own):
            values[metric] = [float(x) for x in own]
    return Answers(means, values, higher)


def compared(task: str, own: Answers, base: Answers | None) -> Iterator[TaskScore]:
    """A model's scores in a task, each beside the baseline's; differences are of the same questions."""
    for metric, (value, error) in own.means.items():
        ours = own.samples.get(metric, [])
        theirs = base.samples.get(metric, []) if base else []
        differences = [a - b for a, b in zip(ours, theirs, strict=False)] if len(ours) == len(theirs) else []
        if error is None and len(ours) > 1:
            error = standard_error(ours)
        yield TaskScore(
            task=task,
            metric=metric,
            higher_is_better=own.higher_is_better[metric],
            samples=len(ours),
            value=value,
            error=error,
            base=base.means[metric][0] if base else None,
            difference=statistics.fmean(differences) if differences else None,
            difference_error=standard_error(differences) if len(differences) > 1 else None,
        )


def standard_error(values: Sequence[float]) -> float:
    """Of their mean."""
    return statistics.stdev(values) / math.sqrt(len(values))


def longest(model: Checkpoint) -> int:
    """Tokens that a request may have."""
    found = model.config.get("max_position_embeddings")
    return found if isinstance(found, int) and found > 0 else LONGEST


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps the harness and the library that reads its data from logging; what goes wrong is raised."""
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    disable_progress_bar()
    try:
        yield
    finally:
        enable_progress_bar()
        logging.disable(before)


def adapted(model: Checkpoint, score: Scorer) -> Any:
    """A model as the harness wants one; it is spoken to as the harness speaks to transformers' models."""
    from lm_eval.api.model import TemplateLM

    most, tokenizer = longest(model), load_tokenizer(model)

    class Adapter(TemplateLM):  # type: ignore[misc]
        @property
        def eot_token_id(self) -> int:
            return int(tokenizer.eos_token_id or 0)

        @property
        def prefix_token_id(self) -> int:
            return int(self.eot_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id)

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
            return encoded(tokenizer, string, add_special_tokens)

        def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
            return list(super().loglikelihood(requests, disable_tqdm=True))

        def _loglikelihood_tokens(self, requests: list[Any], **_: object) -> list[tuple[float, bool]]:
            outcomes = score([request(before, behind, most) for _, before, behind in requests])
            return [(o.log_probability, o.greedy) for o in outcomes]

        def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
            texts = [windows(encoded(tokenizer, r.args[0], None), self.prefix_token_id, most) for r in requests]
            outcomes = iter(score([window for own in texts for window in own]))
            return [math.fsum(next(outcomes).log_probability for _ in own) for own in texts]

        def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
            raise UsageError("--tasks", wanted="tasks that score given answers", found="one that has text written")

    return Adapter()


def encoded(tokenizer: Any, text: str, special: bool | None) -> list[int]:
    """Token ids.

    Args:
        tokenizer: of the model.
        text: to encode.
        special: whether to begin with BOS; None: if the tokenizer does, and the text has not.
    """
    if special is None and tokenizer.bos_token and text.startswith(tokenizer.bos_token):
        special = False
    more = {} if special is None else {"add_special_tokens": special}
    return list(tokenizer.encode(text, **more))


def windows(tokens: list[int], first: int, most: int) -> list[Request]:
    """A whole text behind a first token, in parts that a model takes in."""
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    found = map(make_disjoint_window, get_rolling_token_windows(tokens, first, most, 1))
    return [request(before, behind, most) for before, behind in found]


def request(before: Sequence[int], behind: Sequence[int], most: int) -> Request:
    """A continuation behind the end of its context that a model takes in."""
    tokens = (*before, *behind)[-(most + 1) :]
    return Request(tokens, max(1, len(tokens) - len(behind)))
