"""Zero-shot tasks: those of lm-eval, the user's own, and those that are made of the held-out text."""

from __future__ import annotations

import difflib
import math
import random
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import torch
from lm_eval.tasks import TaskManager

from cospadi.errors import ConfigError
from cospadi.evaluation import HELDOUT_TASKS
from cospadi.evaluation.heldout import TASK_FILES
from cospadi.evaluation.scoring import ScoringLM, offline, run_lm_eval
from cospadi.finished import Finished

# what is reported of a task that has several of these
_PRIMARY_METRICS = ("acc_norm", "acc", "exact_match", "word_perplexity", "perplexity")


# lm-eval's own, of documents that are shown before the one that is asked, and of tasks that shuffle
_FEWSHOT_SEED, _SEEDS = 1234, ((random.seed, 0), (np.random.seed, 1234), (torch.manual_seed, 1234))


def score_tasks(
    lm: ScoringLM, evaluation: Mapping[str, Any], heldout: Path | None, finished: Finished, log: Callable[[str], None]
) -> dict[str, Any]:
    """Scores of every task, one after the other; of those in `finished` what is there."""
    names, folder = evaluation["tasks"], evaluation.get("task_path")
    managers = []
    if folder is not None:
        managers.append(TaskManager(include_path=str(folder), include_defaults=False))
    known = set(managers[0].all_tasks) if managers else set()
    local = [name for name in names if name in known]
    made = [name for name in names if name in HELDOUT_TASKS and name not in known]
    public = [name for name in names if name not in known and name not in HELDOUT_TASKS]
    scores: dict[str, Any] = {}

    def run(manager: TaskManager, chosen: Sequence[str]) -> None:
        for name in chosen:
            if name not in finished:
                finished.add(name, _run_task(lm, manager, name, evaluation))
            found = finished[name].about
            for one, values in found.items():
                if "primary" in values:
                    log(f"{one}: {values['primary']} {values['metrics'][values['primary']]:.4f}")
            scores.update(found)

    if made:
        if heldout is None:
            raise ConfigError([f"evaluation.tasks: {', '.join(made)} needs a held-out text"])
        with offline():
            metadata = {"heldout": str(heldout)}
            run(TaskManager(include_path=str(TASK_FILES), include_defaults=False, metadata=metadata), made)
    if public:
        manager = TaskManager()
        unknown = [name for name in public if name not in manager.all_tasks]
        if unknown:
            raise ConfigError([_unknown_task(name, folder, [*manager.all_tasks, *known]) for name in unknown])
        run(manager, public)
    if local:
        with offline():
            run(managers[0], local)
    return scores


def _run_task(lm: ScoringLM, manager: TaskManager, name: str, evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Scores of a task, or of all tasks of a group, by name.

    As `lm_eval.simple_evaluate` does it, which would add 2 s a call for a list of the machine's software.
    """

    def load() -> dict[str, Any]:
        for plant, seed in _SEEDS:
            plant(seed)
        loaded = manager.load([name])
        for task in loaded["tasks"].values():
            if task.get_config("num_fewshot") != 0:  # where a task says none, none are shown
                task.set_config(key="num_fewshot", value=evaluation.get("num_fewshot", 0))
            task.set_fewshot_seed(seed=_FEWSHOT_SEED)
        return loaded

    def evaluated(lm: ScoringLM, **options: Any) -> dict[str, Any]:
        return lm_eval.evaluate(lm, task_dict=load(), limit=evaluation.get("limit"), log_samples=False, **options)

    scores = run_lm_eval(evaluated, lm)
    tasks = {}
    for name, values in scores["results"].items():
        metrics = {
            key.removesuffix(",none"): value
            for key, value in values.items()
            if isinstance(value, float) and math.isfinite(value) and "_stderr" not in key
        }
        primary = next((metric for metric in _PRIMARY_METRICS if metric in metrics), None)
        tasks[name] = {"metrics": metrics} | ({"primary": primary} if primary else {})
        tasks[name]["num_fewshot"] = scores["n-shot"].get(name)
        tasks[name]["documents"] = scores["n-samples"].get(name, {}).get("effective")
    return tasks


def _unknown_task(name: str, folder: str | None, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3)
    hint = f"; did you mean {', '.join(close)}?" if close else ""
    where = f" or {folder}" if folder else ""
    return f"evaluation.tasks: {name!r} is not a task of lm-eval {version('lm_eval')}{where}{hint}"
