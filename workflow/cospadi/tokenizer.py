"""Tokenizer: how a model's folder turns text into ids, the same for calibration, evaluation and generated text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cospadi.errors import ArtifactError
from cospadi.files import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json")

# leading and double spaces, digits, words that are cut, other scripts, special tokens in the text
_PROBES = (
    "The old river crosses 1234 villages.",
    " a  b\n\n c\td",
    "",
    "<s>x</s> y <|endoftext|>z",
    "naïve café Größe",
    "東京 и Москва",
    "'ll don't WE'RE",
)


def has_tokenizer(folder: str | Path) -> bool:
    """Whether a folder holds the files of a tokenizer."""
    return any((Path(folder) / name).exists() for name in TOKENIZER_FILES)


def has_chat_template(folder: str | Path) -> bool:
    """Whether a folder says how messages become text."""
    folder, settings = Path(folder), Path(folder, "tokenizer_config.json")
    files = any((folder / name).exists() for name in ("chat_template.jinja", "chat_template.json"))
    return files or (settings.exists() and bool(read_json(settings).get("chat_template")))


def load_tokenizer(
    folder: str | Path, remedy: str = "Fetch the model again, with its tokenizer"
) -> PreTrainedTokenizerBase:
    """The tokenizer that ``AutoTokenizer`` gives to whoever uses the model; code of the folder is never run.

    Raises
    ------
    ArtifactError
        If there is none, or it is damaged or needs code of its own.
    """
    from transformers import AutoTokenizer

    folder = Path(folder)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever its many parsers raise
        file = next((folder / name for name in TOKENIZER_FILES if (folder / name).exists()), folder)
        raise ArtifactError(file, f"no usable tokenizer ({error})", remedy) from error


def class_to_store(tokenizer: PreTrainedTokenizerBase) -> str:
    """``tokenizer_class`` that gives this tokenizer in a folder whose ``model_type`` transformers does not know."""
    name = type(tokenizer).__name__
    # made from another library where that is installed; tokenizer.json gives the same without
    return "TokenizersBackend" if name == "MistralCommonBackend" else name


def check_equal(folder: str | Path, other: str | Path) -> None:
    """Require two folders to give equal ids.

    Raises
    ------
    ArtifactError
        Naming the first text that gives others.
    """
    first, second = load_tokenizer(other), load_tokenizer(folder)
    for text in _PROBES:
        expected, found = (tokenizer(text, verbose=False).input_ids for tokenizer in (first, second))
        if expected != found:
            raise ArtifactError(
                folder,
                f"its tokenizer ({type(second).__name__}) gives {found} for {text!r}, that of {other} "
                f"({type(first).__name__}) {expected}",
                "Set tokenizer_class in tokenizer_config.json of the latter to the class that it is meant for",
            )
