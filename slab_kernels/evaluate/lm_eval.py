"""Benchmarks of the lm-evaluation-harness on a model in memory.

The harness is the package lm-eval, tested with 0.4.13. Options have its names and meanings.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from ..errors import ArgumentError, CheckpointError, MissingPackageError
from ..models.packed import check
from ..paths import expanded
from ..settings import Rule
from ..text.token_ids import check_fits
from .running import running

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FEWSHOT = Rule("worked examples ahead of each question", int, 0, optional=True)
BATCH = 8  # sequences that run together
AUTO = re.compile(r"auto(:[1-9]\d*)?")


class Scores(NamedTuple):
    """What a model has reached.

    tasks: task -> metric -> number. file: the results file that was written; None without one, or
    where the harness could not write it.
    """

    tasks: dict[str, dict[str, float]]
    file: Path | None


@dataclass(frozen=True)
class TaskRun:
    """Which tasks run, and how.

    tasks: names, groups or patterns of the harness; their data sets are downloaded by `datasets`
        unless they are local.
    task_files: a folder of task YAML files of your own, beside those of the harness.
    limit: documents of each task that are used, or below 1 the share of them; None: all.
    num_fewshot: worked examples ahead of each question; None: as the task has it.
    apply_chat_template: put questions into the tokenizer's chat template, examples as turns.
    batch_size: sequences that run together, or "auto" ("auto:4" to find it anew so often).
    output_path: where the harness writes its results file: a folder, in which it makes one for the
        model, or a name that ends in .json, to which it adds the date.

    Raises on construction: ArgumentError.
    """

    tasks: tuple[str, ...]
    task_files: Path | str | None = None
    limit: float | None = None
    num_fewshot: int | None = None
    apply_chat_template: bool = False
    batch_size: int | str = BATCH
    output_path: Path | str | None = None

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ArgumentError("no task is named; for example arc_easy and piqa")
        set_ = object.__setattr__
        set_(self, "limit", _limit(self.limit))
        set_(self, "num_fewshot", FEWSHOT.accept("num_fewshot", self.num_fewshot))
        set_(self, "batch_size", _batch_size(self.batch_size))
        for name in ("task_files", "output_path"):
            if (path := getattr(self, name)) is not None:
                set_(self, name, expanded(path))

    def check(self, tokenizer: PreTrainedTokenizerBase) -> Any:
        """Find the tasks and whatever else could fail before any model is loaded.

        Returns: the harness's TaskManager.
        Raises: MissingPackageError without lm-eval; ArgumentError for a task that is not known, a
            tokenizer without a chat template where one is asked for, and an output path that
            cannot be written.
        """
        manager = self._manager()
        for task in self.tasks:
            if not manager.match_tasks([task]):
                beside = "" if self.task_files is None else f" and to {self.task_files}"
                raise ArgumentError(
                    f"task {task!r} is unknown to lm-eval{beside}; `lm-eval ls tasks` lists them"
                )
        if self.apply_chat_template and not getattr(tokenizer, "chat_template", None):
            raise ArgumentError(
                "apply_chat_template=True needs a chat template, and the model's tokenizer has "
                "none; leave it out, or take the model's chat version"
            )
        if self.output_path is not None:
            _check_writable(Path(self.output_path))
        return manager

    def _manager(self) -> Any:
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise MissingPackageError(
                f"tasks need the package lm-eval, and it does not import here ({error}); "
                "pip install lm-eval"
            ) from error
        if self.task_files is None:
            return TaskManager()
        if not Path(self.task_files).is_dir():
            raise ArgumentError(
                f"task_files={str(self.task_files)!r} is not a folder of task files"
            )
        return TaskManager(include_path=str(self.task_files))


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    given: TaskRun,
    name: str = "",
    manager: Any = None,
) -> Scores:
    """Run the tasks, as `lm_eval.simple_evaluate` does.

    name: of the model, for the results file; default: where it was opened from. manager: what
    `given.check` has returned; by default it is asked.

    Raises: as `TaskRun.check`; CheckpointError for a packed model that transformers opened with
        random weights.
    """
    manager = manager or given.check(tokenizer)
    from lm_eval import simple_evaluate
    from lm_eval.loggers import EvaluationTracker

    def check_ids(_: nn.Module, args: tuple[torch.Tensor]) -> None:
        check_fits(args[0], model, "tasks'", tokenizer)

    path = None if given.output_path is None else str(given.output_path)
    tracker = EvaluationTracker(output_path=path)
    watch = model.get_input_embeddings().register_forward_pre_hook(check_ids)
    named = name or getattr(model.config, "_name_or_path", "") or type(model).__name__
    try:
        found = simple_evaluate(
            _harness_model(check(model), tokenizer, given.batch_size),
            model_args=f"pretrained={named}",  # What the results file says; nothing is opened.
            tasks=manager.match_tasks(list(given.tasks)),
            task_manager=manager,
            num_fewshot=given.num_fewshot,
            batch_size=given.batch_size,
            limit=given.limit,
            apply_chat_template=given.apply_chat_template,
            evaluation_tracker=tracker,
            log_samples=False,
        )
    finally:
        watch.remove()
    tasks = {task: _numbers(metrics) for task, metrics in found["results"].items()}
    return Scores(tasks, None if path is None else _written(tracker, found))


def _harness_model(model: PreTrainedModel, tokenizer: Any, batch_size: int | str) -> Any:
    """The model as the harness calls it."""
    from lm_eval.models.huggingface import HFLM

    class Named(HFLM):
        """The harness's model, whose failures name its folder."""

        def _model_call(self, *args: Any, **kwargs: Any) -> Any:
            with running(model):
                return super()._model_call(*args, **kwargs)

        def _model_generate(self, *args: Any, **kwargs: Any) -> Any:
            with running(model):
                return super()._model_generate(*args, **kwargs)

    return Named(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


def _written(tracker: Any, found: dict[str, Any]) -> Path | None:
    """Let the harness write its file, with the names that its own command line would give.

    It only logs a failure.
    """
    tracker.general_config_tracker.model_source = found["config"]["model"] = "hf"
    tracker.save_results_aggregated(results=found)
    path, date = Path(tracker.output_path), getattr(tracker, "date_id", "")
    if path.suffix == ".json":
        file = path.with_name(f"{path.stem}_{date}.json")
    else:
        file = path / tracker.general_config_tracker.model_name_sanitized / f"results_{date}.json"
    return file if file.is_file() else None


def _limit(value: Any) -> float | None:
    """Documents of each task, or a share of them below 1. Raises: ArgumentError."""
    if value is None:
        return None
    number = Rule("documents of each task", float, 0, above=True).accept("limit", value)
    if number > 1 and number != int(number):
        raise ArgumentError(
            f"limit={value} must be a whole number of documents of each task, or below 1 the share "
            "of them"
        )
    return number if number < 1 else int(number)


def _batch_size(value: Any) -> int | str:
    """Raises: ArgumentError."""
    text = str(value)
    if AUTO.fullmatch(text):
        return text
    if isinstance(value, bool) or not text.isdecimal() or not int(text):
        raise ArgumentError(
            f"batch_size={value!r} must be a number of sequences from 1 on, or auto"
        )
    return int(text)


def _check_writable(path: Path) -> None:
    """Raises: CheckpointError for an output path where no file can be made; it makes nothing."""
    folder = path.parent if path.suffix == ".json" else path
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise CheckpointError(
            f"the results cannot be written to {path}: {there} is "
            f"{'not writable' if there.is_dir() else 'a file'}; choose another output path"
        )


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """The metrics that are numbers; the harness writes "acc,none" where no filter was applied."""
    return {
        name.removesuffix(",none"): value
        for name, value in metrics.items()
        if isinstance(value, int | float)
    }
