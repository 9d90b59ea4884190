"""The whole workflow on a tiny model of other families; Llama's is in test_run.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from .conftest import check_finished


@pytest.mark.parametrize(
    ("family", "changes"),
    [("qwen2", {}), ("qwen3", {}), ("gemma3_text", {"layer_types": ["sliding_attention", "full_attention"]})],
)
def test_other_families(new_run: Callable, family, changes):
    run = new_run(family, num_hidden_layers=2, **changes)
    run.config["variants"] = {"cospadi-20": run.config["variants"]["cospadi-20"]}
    run.config["evaluation"]["generate"] = None
    run.config["calibration"]["blocks_per_job"] = 1
    run.snakemake()
    check_finished(run, ["cospadi-20"])
