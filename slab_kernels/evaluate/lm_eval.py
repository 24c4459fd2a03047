"""Benchmarks of the lm-evaluation-harness on a model in memory.

The harness is the package lm-eval, tested with 0.4.13.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import ArgumentError, MissingPackageError
from ..models.packed import check
from ..paths import expanded
from ..settings import Rule
from ..text.token_ids import check_fits
from .running import running

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LIMIT = Rule("documents of each task", int, 1, optional=True)
BATCH = 8  # sequences that run together


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: list[str],
    task_files: Path | str | None = None,
    limit: int | None = None,
) -> dict[str, dict[str, Any]]:
    """Task -> metric -> number, as `lm_eval.simple_evaluate` reports them.

    Args:
        tasks: names, groups or patterns of the harness; their data sets are downloaded by
            `datasets` unless they are local.
        task_files: a folder of task YAML files of your own, beside those of the harness.
        limit: documents of each task that are used; None: all.

    Raises: MissingPackageError without lm-eval, ArgumentError for a task that is not known,
        CheckpointError for a packed model that transformers opened with random weights.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MissingPackageError(
            f"tasks need the package lm-eval, and it does not import here ({error}); "
            "pip install lm-eval"
        ) from error
    task_files = None if task_files is None else expanded(task_files)
    limit = LIMIT.accept("limit", limit)
    if task_files is not None and not task_files.is_dir():
        raise ArgumentError(f"task_files={str(task_files)!r} is not a folder of task files")
    manager = TaskManager(include_path=None if task_files is None else str(task_files))
    for task in tasks:
        if not manager.match_tasks([task]):
            beside = "" if task_files is None else f" and to {task_files}"
            raise ArgumentError(
                f"task {task!r} is unknown to lm-eval{beside}; `lm-eval ls tasks` lists them"
            )

    class Named(HFLM):
        """The harness's model, whose failures name its folder."""

        def _model_call(self, *args: Any, **kwargs: Any) -> Any:
            with running(model):
                return super()._model_call(*args, **kwargs)

        def _model_generate(self, *args: Any, **kwargs: Any) -> Any:
            with running(model):
                return super()._model_generate(*args, **kwargs)

    def check_ids(_: nn.Module, args: tuple[torch.Tensor]) -> None:
        check_fits(args[0], model, "tasks'", tokenizer)

    harness_model = Named(pretrained=check(model), tokenizer=tokenizer, batch_size=BATCH)
    watch = model.get_input_embeddings().register_forward_pre_hook(check_ids)
    try:
        found = simple_evaluate(
            harness_model,
            tasks=manager.match_tasks(tasks),
            task_manager=manager,
            limit=limit,
            bootstrap_iters=0,
            log_samples=False,
        )
    finally:
        watch.remove()
    return {task: _numbers(metrics) for task, metrics in found["results"].items()}


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """The metrics that are numbers; the harness writes "acc,none" where no filter was applied."""
    return {
        name.removesuffix(",none"): value
        for name, value in metrics.items()
        if isinstance(value, int | float)
    }
