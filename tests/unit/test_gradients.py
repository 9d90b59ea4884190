"""Gradients, chunk by chunk in reverse: against autograd through the whole model, and the metric made of them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest

from cospadi.calibration import windows
from cospadi.calibration.collect import collect
from cospadi.calibration.gradients import collect_gradients, sampling_draws
from cospadi.calibration.walk import read_windows
from cospadi.structure import inspect_model

SAMPLES, LENGTH, BATCH = 6, 24, 2
CHUNKS = {"one": [range(4)], "three": [range(1), range(1, 3), range(3, 4)]}


def write_windows(path: Path, seed: int = 42) -> Path:
    draw = np.random.default_rng(0)
    mask = np.ones((SAMPLES, LENGTH), np.uint8)
    mask[1, 15:] = 0
    mask[4, :5] = 0  # pads on the left
    windows.write_windows(path, draw.integers(0, 390, (SAMPLES, LENGTH), np.int32), mask, seed=seed)
    return path


def backward(model: Path, folder: Path, chunks: list[range], *, seed: int = 42, **changes) -> SimpleNamespace:
    """Both passes over a model, chunk by chunk: forward for the hidden states, then back."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = SimpleNamespace(windows=write_windows(folder / "calibration.h5", seed), folder=folder, model=model)
    paths.structure = inspect_model(model)
    common = {"batch_tokens": BATCH * LENGTH, "dtype": "float32", "log": lambda line: None, **changes}

    def named(kind: str, chunk: range) -> Path:
        return folder / f"{kind}_{chunk.start}.h5"

    for before, chunk in zip([None, *chunks], chunks, strict=False):
        collect(
            model,
            paths.structure,
            paths.windows,
            chunk,
            hidden_in=before and named("hidden", before),
            rows_out=named("rows", chunk),
            hidden_out=named("hidden", chunk),
            mode="stream",
            **common,
        )
    for index in reversed(range(len(chunks))):
        chunk = chunks[index]
        behind = chunks[index + 1] if index + 1 < len(chunks) else None
        collect_gradients(
            model,
            paths.structure,
            paths.windows,
            chunk,
            hidden_in=named("hidden", chunks[index - 1]) if index else None,
            gradient_in=behind and named("gradient", behind),
            moments_out=named("moments", chunk),
            gradient_out=named("gradient", chunk),
            **common,
        )
    paths.moments = [named("moments", chunk) for chunk in chunks]
    return paths


def moments_of(paths: SimpleNamespace) -> dict[str, dict[str, np.ndarray]]:
    found = {}
    for path in paths.moments:
        with h5py.File(path) as file:
            for layer in file.values():
                for key in layer:
                    found[key] = {name: array[:] for name, array in layer[key].items()} | dict(layer[key].attrs)
    return found


def of_whole_model(paths: SimpleNamespace) -> dict[str, dict[str, np.ndarray]]:
    """The same by one backward pass through the whole model, in float64."""
    import torch
    from transformers import AutoModelForCausalLM

    read = read_windows(paths.windows, paths.structure["vocab_size"])
    ids, mask = torch.from_numpy(read.input_ids), torch.from_numpy(read.attention_mask)
    model = AutoModelForCausalLM.from_pretrained(paths.model, dtype=torch.float64).eval()
    names = [m["name"] for layer in paths.structure["layers"] for s in layer["sites"] for m in s["matrices"]]
    seen = {}
    for name in names:

        def hook(module, inputs, output, name=name):
            output.retain_grad()
            seen[name] = inputs[0].detach(), output

        model.get_submodule(name).register_forward_hook(hook)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    reached = logits.detach().softmax(-1).cumsum(-1)
    labels = (reached < torch.from_numpy(sampling_draws(read))[..., None]).sum(-1)
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    (losses * mask.flatten()).sum().backward()
    found = {}
    for name, (rows, output) in seen.items():
        rows, gradients = rows[mask.bool()].numpy(), output.grad[mask.bool()].numpy()
        gram = (rows * np.square(gradients).sum(1, keepdims=True)).T @ rows
        found[name] = {"gram": gram, "squares": np.square(gradients).sum(0), "n_tokens": len(rows)}
    return found


@pytest.mark.parametrize("chunks", list(CHUNKS))
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_chunk_by_chunk_is_autograd_of_the_whole_model(tiny_model, tmp_path, family, chunks):
    paths = backward(tiny_model(family, dtype="float32"), tmp_path / chunks, CHUNKS[chunks])
    found, expected = moments_of(paths), of_whole_model(paths)
    assert found.keys() == expected.keys() and len(found) == 4 * 7
    for name, one in found.items():
        assert one["n_tokens"] == expected[name]["n_tokens"] == SAMPLES * LENGTH - 9 - 5
        for key in ("gram", "squares"):
            # float32 rounds at 1e-7; some fifty operations in a row, and squares, are within a thousand of that
            np.testing.assert_allclose(one[key], expected[name][key], rtol=1e-4, atol=1e-4 * expected[name][key].max())
