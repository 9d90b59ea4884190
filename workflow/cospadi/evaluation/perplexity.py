"""Perplexity on held-out text: the local task ``heldout`` of lm-eval, for any window."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager

from cospadi.errors import ArtifactError
from cospadi.evaluation.heldout import TASK_FILES
from cospadi.evaluation.scoring import ScoringLM, run_lm_eval


def perplexity(lm: ScoringLM, heldout: Path, options: Mapping[str, Any], pieces: Sequence[str]) -> dict[str, Any]:
    vocabulary = lm.model.get_input_embeddings().num_embeddings
    tokens = [lm.tok_encode(piece) for piece in pieces]
    highest = max(map(max, tokens))
    if highest >= vocabulary:
        raise ArtifactError(
            lm.folder,
            f"the tokenizer gives token {highest}, the model knows {vocabulary}",
            "Tokenizer and weights are of different models; fetch the model again",
        )
    metadata = {"heldout": str(heldout), "max_tokens": options["max_tokens"], "window": options["window"]}
    manager = TaskManager(include_path=str(TASK_FILES), include_defaults=False, metadata=metadata)
    # simple_evaluate would add 2 s a call for a list of the machine's software, and nothing to the numbers
    scores = run_lm_eval(lm_eval.evaluate, lm, task_dict=manager.load(["heldout"]), log_samples=True)
    n_tokens = sum(map(len, tokens))
    loglikelihood = sum(sample["filtered_resps"][0] for sample in scores["samples"]["heldout"])
    return {
        "word": scores["results"]["heldout"]["word_perplexity,none"],
        "token": math.exp(-loglikelihood / n_tokens),
        "bits_per_byte": scores["results"]["heldout"]["bits_per_byte,none"],
        "tokens": n_tokens,
        "words": sum(len(piece.split()) for piece in pieces),
        "bytes": sum(len(piece.encode()) for piece in pieces),
        "pieces": len(pieces),
        "max_tokens": options["max_tokens"],
        "window": options["window"],
    }
