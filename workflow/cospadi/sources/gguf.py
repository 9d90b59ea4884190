"""A GGUF file becomes an ordinary Hugging Face folder in bfloat16.

transformers reads the weights; what it leaves behind is repaired here: the marks of the quantizer, float32 noise
in the config, and the pre-tokenizer, which it does not take from the file.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cospadi.errors import ArtifactError

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}

# `tokenizer.ggml.pre` names how text is cut before byte pairs are merged. transformers ignores the key, and a model fed
# with "2020" as one token where it was trained on "2", "0", "2", "0" is silently worse.
_PRE_TOKENIZERS: dict[str, dict[str, Any]] = {
    "gpt-2": _BYTE_LEVEL,
    "smollm": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, _BYTE_LEVEL]},
}
# Architectures whose tokenizer of sentence pieces transformers puts together whole: nothing to put back
_SENTENCE_PIECES = ("gemma3",)
_TOKENIZER_KEYS = tuple(f"tokenizer.ggml.{key}" for key in ("model", "pre", "add_bos_token"))


def convert_gguf(gguf_file: Path, output: Path, *, log: Callable[[str], None] = print) -> dict[str, str]:
    """Write the model of a GGUF file as a Hugging Face folder.

    Parameters
    ----------
    gguf_file : Path
    output : Path
        Folder; made here. The caller writes it through ``files.replacing``.
    log : callable

    Returns
    -------
    dict
        The text fields of the file's ``general.*`` metadata (name, licence, ...).

    Raises
    ------
    ArtifactError
        If the file cannot be read, its tokenizer is of a kind that is not known here, or the repaired tokenizer fails
        its checks.
    """
    with _parsed_once():
        return _convert(gguf_file, output, log)


@contextlib.contextmanager
def _parsed_once() -> Iterator[None]:
    """transformers parses the file, vocabulary and all, for the config, the weights and the tokenizer each, and makes
    the table of tensor names anew for every module: half the time that reading a small model takes."""
    import gguf

    kept = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    for name, make in kept.items():
        setattr(gguf, name, functools.cache(make))
    try:
        yield
    finally:
        for name, make in kept.items():
            setattr(gguf, name, make)


def _convert(gguf_file: Path, output: Path, log: Callable[[str], None]) -> dict[str, str]:
    import torch
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    try:
        fields = {
            key: field.contents()
            for key, field in GGUFReader(str(gguf_file)).fields.items()  # as transformers calls it
            if key.startswith("general.") or key in _TOKENIZER_KEYS
        }
    except (ValueError, IndexError, KeyError) as error:
        raise ArtifactError(gguf_file, f"not a complete GGUF file ({error})", "Fetch it again") from error
    pre_tokenizer = _pre_tokenizer(fields, gguf_file)

    log("converting the GGUF weights to bfloat16")
    source = {"pretrained_model_name_or_path": str(gguf_file.parent), "gguf_file": gguf_file.name}
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True), local_files_only=True
    )
    # the weights are plain now; saving must not write (or demand) anything of the quantizer
    model.hf_quantizer = None
    config = model.config
    for stray in ("quantization_config", "_model_name_or_path", "unk_token_id"):
        vars(config).pop(stray, None)
    # GGUF stores float32: 1e-5 comes back as 9.999999747378752e-06
    config.rms_norm_eps = float(str(np.float32(config.rms_norm_eps)))
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    output.mkdir(parents=True)
    model.save_pretrained(output)
    for file in output.glob("*.safetensors"):
        file.chmod(0o644)

    log("writing the tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(**source, local_files_only=True)
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(output)
    _repair_tokenizer(output, pre_tokenizer)
    begins = fields.get("tokenizer.ggml.add_bos_token", fields["tokenizer.ggml.model"] == "llama")
    _check_tokenizer(output, begins=begins, individual_digits=pre_tokenizer == _PRE_TOKENIZERS["smollm"])
    return {key.removeprefix("general."): value for key, value in fields.items() if isinstance(value, str)}


def _pre_tokenizer(fields: dict[str, Any], gguf_file: Path) -> dict[str, Any] | None:
    """The ``pre_tokenizer`` entry of ``tokenizer.json`` for what the GGUF file names; None: as transformers has it."""
    kind, name = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if kind == "llama" and fields.get("general.architecture") in _SENTENCE_PIECES:
        return None
    if kind != "gpt2" or name not in _PRE_TOKENIZERS:
        raise ArtifactError(
            gguf_file,
            f"tokenizer {kind!r} with pre-tokenizer {name!r}; known here: 'gpt2' with {', '.join(_PRE_TOKENIZERS)}; "
            f"'llama' of {', '.join(_SENTENCE_PIECES)}",
            "Take the model as a Hugging Face folder instead (model.source: hub or local)",
        )
    return _PRE_TOKENIZERS[name]


def _repair_tokenizer(folder: Path, pre_tokenizer: dict[str, Any] | None) -> None:
    if pre_tokenizer is not None:
        path = folder / "tokenizer.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        content["pre_tokenizer"] = pre_tokenizer
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    path = folder / "tokenizer_config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    for stray in ("is_local", "local_files_only", "backend"):
        content.pop(stray, None)
    # the class that every version of transformers builds from tokenizer.json as it stands
    content["tokenizer_class"] = "PreTrainedTokenizerFast"
    content["clean_up_tokenization_spaces"] = False
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _check_tokenizer(folder: Path, *, begins: bool, individual_digits: bool) -> None:
    """Load the repaired tokenizer as a user would and try it on text that shows the usual damage."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    text = "In 2020, naïve Москва cost 1234.56 €;\n\n  def f(x):\treturn x  # 東京\n"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    remedy = "Use the versions of envs/, or take the model as a Hugging Face folder (model.source: hub or local)"
    if tokenizer.decode(ids) != text:
        raise ArtifactError(folder / "tokenizer.json", f"{text!r} comes back as {tokenizer.decode(ids)!r}", remedy)
    first = tokenizer(text).input_ids[0]
    if begins and first != tokenizer.bos_token_id:
        problem = f"a text begins with token {first}, not with {tokenizer.bos_token} ({tokenizer.bos_token_id})"
        raise ArtifactError(folder / "tokenizer.json", problem, remedy)
    digits = [tokenizer.decode([token]) for token in tokenizer("1234", add_special_tokens=False).input_ids]
    if individual_digits and digits != list("1234"):
        raise ArtifactError(folder / "tokenizer.json", f"'1234' is cut into {digits}, not into digits", remedy)
