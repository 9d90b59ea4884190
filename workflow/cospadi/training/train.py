"""Training one model from scratch: a small Llama on text, or a small ViT on scikit-learn's digits.

For the same seed every variant of an experiment sees the same batches in the same order, and takes the same steps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.utils.data import Dataset
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from cospadi.errors import ArtifactError, NumericalError
from cospadi.files import TensorFile, replacing, write_json
from cospadi.training.models import attention_parameters, keep_coefficients, low_rank_attention, share_attention

FORMAT_VERSION = 1
_CURVE_WINDOWS = 128  # held-out windows that are scored along the way; at the end all are

Settings = Mapping[str, Any]
Log = Callable[[str], None]


def train_language(
    tokens: str | Path,
    tokenizer: str | Path,
    settings: Settings,
    variant: Settings,
    *,
    seed: int,
    model_out: str | Path,
    history_out: str | Path,
    device: str = "cpu",
    log: Log = print,
) -> dict[str, Any]:
    """Train a Llama with the attention of `variant` and score it on the held-out tokens.

    Parameters
    ----------
    tokens : path-like
        From `text.tokenize`.
    tokenizer : path-like
        Folder of the tokenizer; written beside the weights.
    settings : mapping
        The config's ``training.language``.
    variant : mapping
        One of its variants: ``attention`` and what belongs to it.
    seed : int
        Of weights and batches.
    model_out : path-like
        Hugging Face folder; atoms are stored once, and nothing that only training needs.
    history_out : path-like
        JSON: curves, held-out loss and perplexity, parameters, seconds.
    device : {"cpu", "cuda"}
    log : callable

    Returns
    -------
    dict
        What was written to `history_out`.

    Raises
    ------
    ArtifactError
        If the tokens are missing, damaged, or too few for one window.
    NumericalError
        If the loss is not finite.
    """
    file = TensorFile(tokens)
    windows = {part: _windows(file, part, settings["length"]) for part in ("training", "heldout")}
    torch.manual_seed(seed)
    model = build_language(settings, variant, vocabulary=file.metadata["vocabulary"])
    every = math.ceil(len(windows["heldout"]) / _CURVE_WINDOWS)
    curve = windows["heldout"][::every]
    trainer, history = _train(
        model, settings, _Windows(windows["training"]), _Windows(curve), seed=seed, device=device, log=log
    )
    loss = _finite(trainer.evaluate(_Windows(windows["heldout"]))["eval_loss"])
    history |= {"heldout_loss": loss, "perplexity": math.exp(loss), "heldout_tokens": windows["heldout"].size}
    log(f"held-out perplexity {history['perplexity']:.2f}")
    return _write(model, history, model_out, history_out, PreTrainedTokenizerFast.from_pretrained(tokenizer))


def train_vision(
    settings: Settings,
    variant: Settings,
    *,
    seed: int,
    model_out: str | Path,
    history_out: str | Path,
    device: str = "cpu",
    log: Log = print,
) -> dict[str, Any]:
    """Train a ViT with the attention of `variant` on scikit-learn's digits and score it on those held out.

    A third of the 1797 images of 8 x 8 pixels, the same for every seed, is held out.

    Parameters and return value are those of `train_language`, without text; the history has ``accuracy`` in place of
    ``perplexity``.

    Raises
    ------
    NumericalError
        If the loss is not finite.
    """
    train, heldout = _digits()
    torch.manual_seed(seed)
    model = build_vision(settings, variant)
    trainer, history = _train(model, settings, train, heldout, seed=seed, device=device, log=log)
    result = trainer.predict(heldout)
    accuracy = float((result.predictions.argmax(1) == result.label_ids).mean())
    history |= {
        "heldout_loss": _finite(result.metrics["test_loss"]),
        "accuracy": accuracy,
        "heldout_images": len(heldout),
    }
    log(f"held-out accuracy {accuracy:.4f}")
    return _write(model, history, model_out, history_out)


def build_language(settings: Settings, variant: Settings, *, vocabulary: int) -> PreTrainedModel:
    """A new Llama of the sizes in `settings`, with the attention of `variant`; random by torch's generator."""
    sizes = settings["model"]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["intermediate_size"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        num_key_value_heads=variant.get("kv_heads", sizes["heads"]),
        max_position_embeddings=settings["length"],
        initializer_range=sizes["initializer_range"],
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return _with_attention(LlamaForCausalLM(config), variant)


def build_vision(settings: Settings, variant: Settings) -> PreTrainedModel:
    """A new ViT for the digits of the sizes in `settings`, with the attention of `variant`."""
    sizes = settings["model"]
    config = ViTConfig(
        image_size=8,
        patch_size=settings["patch"],
        num_channels=1,
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["intermediate_size"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        initializer_range=sizes["initializer_range"],
        num_labels=10,
    )
    return _with_attention(ViTForImageClassification(config), variant)


def _with_attention(model: PreTrainedModel, variant: Settings) -> PreTrainedModel:
    kind = variant["attention"]
    if kind in ("masa", "sequential", "cyclic"):
        coefficients = variant["coefficients"] if kind == "masa" else kind
        atoms = dict.fromkeys(variant["projections"], variant["atoms"])
        return share_attention(model, atoms=atoms, coefficients=coefficients)
    if kind == "low_rank":
        return low_rank_attention(model, rank=dict.fromkeys(variant["projections"], variant["rank"]))
    return model  # dense, or gqa, which is in the config of the model


def _train(
    model: PreTrainedModel, settings: Settings, training: Dataset, heldout: Dataset, *, seed: int, device: str, log: Log
) -> tuple[Trainer, dict[str, Any]]:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    steps = settings["steps"]
    progress = _Progress(log)
    arguments = TrainingArguments(
        output_dir="unused",  # nothing is saved by the trainer itself
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=device == "cpu",
        tf32=True if device == "cuda" else None,
        seed=seed,
        data_seed=seed,
        max_steps=steps,
        per_device_train_batch_size=settings["batch_size"],
        per_device_eval_batch_size=4 * settings["batch_size"],
        dataloader_drop_last=True,
        dataloader_pin_memory=device == "cuda",
        learning_rate=settings["learning_rate"],
        weight_decay=settings["weight_decay"],
        adam_beta2=0.95,
        max_grad_norm=1.0,
        warmup_steps=round(settings["warmup"] * steps),
        lr_scheduler_type="cosine",
        logging_steps=max(1, steps // 40),
        eval_strategy="steps",
        eval_steps=max(1, steps // settings["evaluations"]),
    )
    trainer = Trainer(model, arguments, train_dataset=training, eval_dataset=heldout, callbacks=[progress])
    trainer.remove_callback(transformers.PrinterCallback)
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    trainer.remove_callback(progress)  # the curves end here
    history = {
        "format_version": FORMAT_VERSION,
        "seed": seed,
        "steps": steps,
        "training": progress.training,
        "heldout": progress.heldout,
        "seconds": seconds,
        "device": device,
        "parameters": model.num_parameters(),
        "attention_parameters": attention_parameters(model),
    }
    return trainer, history


class _Progress(TrainerCallback):
    """Keeps the curves, ``[step, loss]`` each, and logs them; stops at a loss that is not finite."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self.training: list[list[float]] = []
        self.heldout: list[list[float]] = []
        self.started = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        for key, curve in (("loss", self.training), ("eval_loss", self.heldout)):
            if key in (logs or {}):
                curve.append([state.global_step, _finite(logs[key])])
                seconds = time.perf_counter() - self.started
                what = "loss" if key == "loss" else "held-out loss"
                self.log(f"step {state.global_step}/{state.max_steps} {what} {logs[key]:.4f} {seconds:.1f}s")


class _Windows(Dataset):
    """Windows of tokens (n, length) as a causal language model takes them."""

    def __init__(self, windows: np.ndarray) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(self.windows[index])
        return {"input_ids": ids, "labels": ids}


class _Images(Dataset):
    """Images (n, 1, 8, 8) with their digits."""

    def __init__(self, images: np.ndarray, digits: np.ndarray) -> None:
        self.images, self.digits = images, digits

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": torch.from_numpy(self.images[index]), "labels": torch.tensor(self.digits[index])}


def _windows(file: TensorFile, part: str, length: int) -> np.ndarray:
    """Consecutive windows (n, length) int64 of a stream; the tokens behind the last whole one are left out."""
    stream = file.read(part)
    count = len(stream) // length
    if count == 0:
        raise ArtifactError(file.path, f"{part}: {len(stream)} tokens, but a window has {length}", "Give more text")
    return stream[: count * length].reshape(count, length).astype(np.int64)


def _digits() -> tuple[_Images, _Images]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    images = (data.images[:, None] / 8 - 1).astype(np.float32)  # grey levels 0 to 16
    parts = train_test_split(images, data.target, test_size=1 / 3, random_state=0, stratify=data.target)
    return _Images(parts[0], parts[2]), _Images(parts[1], parts[3])


def _finite(loss: float) -> float:
    if not math.isfinite(loss):
        raise NumericalError(f"the loss is {loss}: lower learning_rate")
    return loss


def _write(
    model: PreTrainedModel,
    history: dict[str, Any],
    model_out: str | Path,
    history_out: str | Path,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> dict[str, Any]:
    if hasattr(model.config, "shared_attention"):
        keep_coefficients(model)
    with replacing(model_out) as temporary:
        model.to("cpu").save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
    history["kept_parameters"] = model.num_parameters()
    write_json(history_out, history)
    return history
