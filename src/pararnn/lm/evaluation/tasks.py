"""Runs tasks of the harness by name."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from pararnn._whole import check_whole
from pararnn.lm.data.errors import RunError
from pararnn.lm.evaluation.harness import HarnessModel


def run_tasks(
    model: HarnessModel,
    tasks: Sequence[str],
    *,
    task_folder: str | Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """Evaluate tasks.

    Args:
        model: The model.
        tasks: Names of tasks or groups, `*` in them as in file names.
        task_folder: Folder of further tasks, YAML files as the harness defines them.
        num_fewshot: Solved examples before each question; None for the task's own number.
        limit: Questions per task, from its beginning; None for all.

    Returns:
        The results of `lm_eval.simple_evaluate`; `lm_eval.utils.make_table` prints them.

    Raises:
        TypeError: num_fewshot or limit is no whole number.
        RunError: A task is unknown, the folder does not exist, or a task's data cannot be had.
    """
    numbers = {"num_fewshot": num_fewshot, "limit": limit}
    check_whole(**{name: number for name, number in numbers.items() if number is not None})
    if task_folder is not None and not Path(task_folder).is_dir():
        raise RunError(f"{task_folder} is no folder; name one that holds the tasks' YAML files.")
    manager = TaskManager(include_path=None if task_folder is None else str(task_folder))
    for name in tasks:
        if not manager.match_tasks([name]):
            nearest = difflib.get_close_matches(name, manager.all_tasks, n=1, cutoff=0.0)[0]
            raise RunError(
                f"there is no task {name!r}; perhaps you meant {nearest!r}. lm_eval ls tasks lists "
                "those of the harness; --task-folder adds your own."
            )
    try:
        results = simple_evaluate(
            model,
            tasks=manager.match_tasks(list(tasks)),
            task_manager=manager,
            num_fewshot=num_fewshot,
            limit=limit,
            batch_size=model.batch_size,
        )
    except OSError as error:
        raise RunError(
            f"the data of {', '.join(tasks)} cannot be had: {error}. The harness loads it from the "
            "Hugging Face hub or, once loaded, from its cache."
        ) from error
    return results
