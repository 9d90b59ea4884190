"""Plan of a run that trains models from scratch: its stages, which models it trains, what a job takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from cospadi.plan.names import filled
from cospadi.report.training import training_message
from cospadi.stages import Jobs, Stage, Staged, fetch_text, report, table_of
from cospadi.training.config import EXPERIMENTS
from cospadi.work import FORWARD, GPU_FORWARD, MEBI, Cost, Work

_TEXT = Work(1800 * MEBI, 180)


def _with_language(benchmarks: str) -> Callable[[TrainingPlan], Iterator[Jobs]]:
    """One job where language models are trained."""
    return lambda plan: iter([Jobs(1, benchmarks)] if "language" in plan.experiments else [])


def _train(plan: TrainingPlan) -> Iterator[Jobs]:
    for name, settings in plan.experiments.items():
        for variant in settings["variants"]:
            benchmarks = f"train_model/{name}/{variant}/*.tsv"
            wildcards = SimpleNamespace(experiment=name, trained=variant)
            yield Jobs(len(plan.config["training"]["seeds"]), benchmarks, wildcards, f"{name}/{variant}")


def _work(plan: TrainingPlan, wildcards: Any) -> Work:
    """Forward and backward passes of all steps; weights, gradients and AdamW's moments, and what the blocks and the
    logits keep for the backward pass."""
    settings = plan.experiments[wildcards.experiment]
    sizes = settings["model"]
    hidden, vocabulary = sizes["hidden_size"], settings.get("vocabulary", 10)
    block = 4 * hidden**2 + 3 * hidden * sizes["intermediate_size"]
    length = settings["length"] if wildcards.experiment == "language" else (8 // settings["patch"]) ** 2 + 1
    parameters, tokens = sizes["layers"] * block + vocabulary * hidden, settings["batch_size"] * length
    kept = 40 * sizes["layers"] * (hidden + sizes["intermediate_size"]) + 16 * vocabulary
    flops = 8 * parameters * tokens * settings["steps"]
    return Work(2000 * MEBI + 16 * parameters + tokens * kept, 15, Cost({FORWARD: flops}), Cost({GPU_FORWARD: flops}))


STAGES = table_of(
    fetch_text(_with_language("fetch_text/*.tsv"), "articles, parted into those to train on and held-out ones"),
    Stage(
        name="tokenizer",
        rule="train_tokenizer",
        result="a tokenizer made from the text",
        only="language",
        after=("text",),
        jobs=_with_language("train_tokenizer.tsv"),
        work=_TEXT,
        code=("cospadi.training.text",),
    ),
    Stage(
        name="tokens",
        rule="tokenize_text",
        result="the text as two streams of tokens",
        only="language",
        after=("text", "tokenizer"),
        jobs=_with_language("tokenize_text.tsv"),
        work=_TEXT,
        code=("cospadi.training.text",),
    ),
    Stage(
        name="train",
        rule="train_model",
        result="a model of each variant and seed, its loss curve",
        after=("tokenizer", "tokens"),
        jobs=_train,
        work=_work,
        code=("cospadi.training.train",),
        threads="train",
        uses_gpu=True,
    ),
    Stage(
        name="materialise",
        rule="materialise",
        result="the same as an ordinary model",
        only="asked for",
        after=("train",),
        jobs=lambda plan: iter(()),  # only where it is asked for
        work=_work,
        code=("cospadi.training.models",),
    ),
    Stage(
        name="summarize",
        rule="summarize_training",
        result="table and loss curves",
        after=("train",),
        code=("cospadi.report.training",),
    ),
    report("summarize"),
)


class TrainingPlan(Staged):
    """The jobs of a run that trains models from scratch.

    Parameters
    ----------
    config : mapping
        Complete, from `runs.check_run`.

    Attributes
    ----------
    experiments : dict
        ``language`` and ``vision``, those that the config asks for, to their settings.
    """

    stages = STAGES

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        training = config["training"]
        self.experiments = {name: training[name] for name in EXPERIMENTS if training[name] is not None}

    def text_file(self, part: str) -> str:
        """``calibration.jsonl``, which models are trained on, or ``heldout.jsonl``."""
        return f"resources/text/{self.config['text']['name']}/{part}.jsonl"

    def settings(self, experiment: str) -> dict[str, Any]:
        """Settings that decide how the models of an experiment are trained, without its variants."""
        return {key: value for key, value in self.experiments[experiment].items() if key != "variants"}

    def trained(self, pattern: str) -> list[str]:
        """`pattern` with ``{experiment}``, ``{trained}`` and ``{seed}`` filled in, for every model."""
        return [
            filled(pattern, experiment=name, trained=variant, seed=str(seed))
            for name, settings in self.experiments.items()
            for variant in settings["variants"]
            for seed in self.config["training"]["seeds"]
        ]

    def closing_message(self) -> str:
        """What the console shows at the end of a run; nothing where it made no table."""
        return training_message(Path(self.results)) if self.has_written("training.json") else ""
