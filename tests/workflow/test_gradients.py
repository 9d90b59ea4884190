"""A run whose metric is the loss's gradients, from config to report."""

import json

import h5py
import pytest

from cospadi.methods import METHODS

from .conftest import Run, tiny_config


@pytest.fixture(scope="module")
def run(snapshot, tiny_model, articles, tmp_path_factory):
    """Every method with the gradients as its metric, on a model of chunks of two layers."""
    folder = tmp_path_factory.mktemp("gradients")
    config = tiny_config(tiny_model("llama"), articles)
    few = {"cospadi": {"max_iter": 3}, "geopair": {"max_iter": 2}, "hybrid": {"max_iter": 1}}
    config["variants"] = {
        name: {"method": name, "ratio": 0.3, "metric": "gradients", **few.get(name, {})} for name in METHODS
    }
    config["layers_per_job"] = 4
    config["evaluation"] = {"perplexity": {"max_tokens": 200, "window": 64}, "generate": None}
    done = Run(folder, config, snapshot)
    done.snakemake()
    return done


def test_every_method_works_in_the_metric_of_the_gradients(run):
    summary = json.loads((run.results / "summary.json").read_text())
    print(summary.keys())
    assert run.planned() == {}
