"""Checkpoint: put packed matrices into a Hugging Face folder, count its bytes, write it dense again.

Tensors are read and written a shard at a time, without torch. The format is described in docs/format.md.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from cospadi.budget import dense_nbytes
from cospadi.calibration.moments import read_head_moments
from cospadi.cards import packed_card
from cospadi.embeddings import NEAREST, embeddings_of, pack_embedding
from cospadi.errors import ArtifactError, CospadiError, listed
from cospadi.files import (
    SAFETENSORS_DTYPES,
    ModelFolder,
    TensorFile,
    data_files,
    explaining,
    read_json,
    replacing,
    write_json,
)
from cospadi.formats.factorization import Factorization, dictionary_names, read_specs, tensor_names, unpack
from cospadi.learning import FORMAT_VERSION as CODES_VERSION
from cospadi.provenance import CALIBRATION, check_provenance, fingerprint
from cospadi.runtime.cospadi_checksums import CHECKSUMS, checksum_faults, write_checksums
from cospadi.runtime.cospadi_format import (
    AUTO_MAP,
    EMBEDDING,
    FORMAT_VERSION,
    HEAD,
    LOAD_HINT,
    MODEL_TYPE,
    WEIGHT_DTYPES,
    UnreadableError,
    all_parts,
    config_faults,
    content_faults,
    in_one_line,
    read_headers,
    stored_faults,
)
from cospadi.runtime.cospadi_registry import CODECS
from cospadi.structure import PROJECTIONS
from cospadi.tokenizer import check_equal, class_to_store, has_tokenizer, load_tokenizer

MAX_SHARD_BYTES = 5 * 2**30

_RUNTIME = Path(__file__).parent / "runtime"
_REMEDY = "Delete it and run again"
_FOLDER_REMEDY = "Name a folder written by assemble_model; if this is one, fetch or assemble it again"


def assemble(
    model_folder: str | Path,
    codes_files: Iterable[str | Path],
    output: str | Path,
    *,
    variant: Mapping[str, Any],
    embedding_bits: float = 16,
    embedding_method: str = NEAREST,
    head: str | Path | None = None,
    calibration: Mapping[str, Any] | None = None,
    card: Mapping[str, Any] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write the model of `model_folder` with the matrices of `codes_files` packed, as a Hugging Face folder.

    Everything else, biases and tied heads included, is copied as it is. The folder holds the code that loads it.

    Parameters
    ----------
    model_folder : path-like
        Hugging Face folder of the dense model.
    codes_files : iterable of path-like
        Safetensors written by `quantization.quantize_unit`: packed tensors, specs in the header's ``matrices``.
    output : path-like
        Folder to write; whole or not at all.
    variant : mapping
        Method and options the codes were made with; kept in ``config.json``.
    embedding_bits : int
        A number of the embedding and of a head of its own (`embeddings.pack_embedding`); 16, as they are.
    embedding_method : str
        Who rounds them, one of `embeddings.ROUNDINGS`.
    head : path-like, optional
        What `calibration.head.measure_head` wrote, for methods that ask what errors cost.
    calibration : mapping, optional
        What `head` has to be of (`activations.calibration_of`).
    card : mapping, optional
        Measured figures for the model card, label to value.
    max_shard_bytes : int
        Largest size of a weight file; a single larger tensor gets a file of its own.

    Raises
    ------
    ArtifactError
        If tensors are missing, of a wrong size, or do not fit the dense model.
    """
    base = ModelFolder(model_folder)
    if "quantization_config" in base.config:
        raise ArtifactError(
            base.path / "config.json", "the model is quantized already", "Start from the model's unquantized weights"
        )
    if not isinstance(base.config.get("model_type"), str):
        raise ArtifactError(base.path / "config.json", "it names no model_type", "Fetch the model again")
    specs, sources = _read_codes(codes_files)
    tied = set()
    if embedding_bits < 16:
        belongs = {"fingerprint": fingerprint(base), **(calibration or {})}
        moments = None if head is None else read_head_moments(head, belongs)
        for name in embeddings_of(base):
            arrays, specs[name] = pack_embedding(base, name, embedding_bits, embedding_method, moments)
            sources |= {part: StoredTensor.made(part, array) for part, array in arrays.items()}
        tied = {f"{HEAD}.weight"} - {f"{name}.weight" for name in specs}  # where a file has it twice
    dtypes = {_check_target(base, name, spec) for name, spec in specs.items()}
    packed_into = _placement(specs)

    tensors = []
    for name in base.weight_map:
        if name in packed_into:
            tensors += [sources[part] for part in packed_into[name]]
        elif name not in tied:
            tensors.append(StoredTensor.of(base.file_of(name), name))

    config = {key: value for key, value in base.config.items() if key != "transformers_version"}
    config |= {
        "model_type": MODEL_TYPE,
        "base_model_type": base.config["model_type"],
        "architectures": ["CospadiForCausalLM"],
        "base_architectures": base.config.get("architectures"),
        "auto_map": AUTO_MAP,
        "transformers_weights": LOAD_HINT,
        "quantization_config": {
            "quant_method": MODEL_TYPE,
            "format_version": FORMAT_VERSION,
            # where the dense weights had several dtypes, the dense folder gets the one that holds all
            "weight_dtype": dtypes.pop() if len(dtypes) == 1 else "F32",
            "variant": dict(variant),
            "matrices": specs,
        },
    }
    with replacing(output) as folder:
        folder.mkdir()
        _write_shards(folder, tensors, max_shard_bytes)
        write_json(folder / "config.json", config)
        _copy_files(base.path, folder)
        _keep_tokenizer(base.path, folder)
        for file in sorted(_RUNTIME.glob("*.py")):
            if file.name != "__init__.py":
                shutil.copyfile(file, folder / file.name)
        write_checksums(folder)
        weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        packing, name = config["quantization_config"], Path(output).resolve().name
        (folder / "README.md").write_text(packed_card(base, name, packing, target_bytes(folder), weights, card))


def check_codes(
    model_folder: str | Path,
    codes_files: Iterable[str | Path],
    targets: Sequence[str] | None,
    calibration: Mapping[str, Any] | None = None,
) -> None:
    """Refuse codes that are not all of one variant of this model, before they are assembled.

    Parameters
    ----------
    model_folder : path-like
        Hugging Face folder of the dense model.
    codes_files : iterable of path-like
        Written by `quantization.quantize_unit`.
    targets : sequence of str or None
        Projections that the variant factorizes; None: all.
    calibration : mapping, optional
        What they have to be of (`activations.calibration_of`); without it, all of the same.

    Raises
    ------
    ArtifactError
        If a file is of another model, version, variant or calibration, or a matrix is in none of them.
    """
    base = ModelFolder(model_folder)
    belongs = {"format_version": CODES_VERSION, "fingerprint": fingerprint(base), **(calibration or {})}
    there: set[str] = set()
    for path in codes_files:
        file = TensorFile(path, _REMEDY)
        header = file.metadata
        check_provenance(path, header, belongs, _REMEDY)
        # of one variant and one calibration: as in the first file
        belongs |= {key: header.get(key) for key in ("settings", "codes", *CALIBRATION)}
        there |= {*read_specs(file, CODECS, _REMEDY), *header.get("kept_dense", ())}
    wanted = {
        name.removesuffix(".weight")
        for name in base.weight_map
        if name.endswith(".weight") and name.split(".")[-2] in (targets or PROJECTIONS)
    }
    if wanted - there:
        raise ArtifactError("codes", f"no file has the codes of {listed(sorted(wanted - there))}", _REMEDY)


def target_bytes(folder: str | Path) -> dict[str, Any]:
    """Bytes of the packed matrices, from the headers of the weight files.

    Parameters
    ----------
    folder : path-like
        As written by `assemble`.

    Returns
    -------
    dict
        ``nbytes`` and ``dense_nbytes`` (bfloat16) of all matrices, ``ratio`` removed, and ``matrices``: the same for
        each, where a matrix counts its part of a shared dictionary. Embedding and head are none of them.
    """
    model, packing = open_packed(folder)
    specs = matrices_of(packing)
    sharers = Counter(part for spec in specs.values() for part in dictionary_names(spec))
    matrices = {}
    for name, spec in specs.items():
        nbytes = sum(model.file_of(part).nbytes(part) / sharers.get(part, 1) for part in tensor_names(name, spec))
        matrices[name] = _byte_count(nbytes, dense_nbytes(*spec["shape"]))
    parts = {part for name, spec in specs.items() for part in tensor_names(name, spec)}
    total = _byte_count(
        sum(model.file_of(part).nbytes(part) for part in parts), sum(m["dense_nbytes"] for m in matrices.values())
    )
    return {**total, "matrices": matrices}


def densify(packed_folder: str | Path, output: str | Path, *, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write a packed checkpoint as an ordinary dense folder of its base family.

    ``W = D S`` is computed in float32 and rounded once, to the dtype of the base model's weights.

    Parameters
    ----------
    packed_folder : path-like
        As written by `assemble`, or by ``save_pretrained`` of a model loaded from there.
    output : path-like
        Folder to write; whole or not at all.
    max_shard_bytes : int
        Largest size of a weight file.

    Raises
    ------
    ArtifactError
        If the folder is none that could be loaded.
    """
    model, packing = open_packed(packed_folder)
    check_loads(model.path)
    specs = packing["matrices"]
    packed = {part for name, spec in specs.items() for part in tensor_names(name, spec)}
    tensors = [StoredTensor.of(model.file_of(name), name) for name in model.weight_map if name not in packed]
    tensors += [dense_weight(model, packing, matrix) for matrix in specs]
    write_folder(output, dense_config(model), tensors, base=model.path, max_shard_bytes=max_shard_bytes)


def verify(folder: str | Path) -> dict[str, int]:
    """Compare every byte of a packed checkpoint's weight files with its checksums, and all of it with docs/format.md.

    Parameters
    ----------
    folder : path-like
        As written by `assemble`, or by ``save_pretrained`` of a model loaded from there.

    Returns
    -------
    dict
        ``files``, ``tensors`` and ``nbytes`` (of the tensors) that were compared.

    Raises
    ------
    ArtifactError
        Naming the weight file and the tensors whose bytes are not those that were written.
    """
    path = Path(folder)
    if not path.is_dir():
        raise ArtifactError(path, "the folder does not exist", "Name a folder written by assemble_model")
    faults = checksum_faults(path)
    if faults:
        raise ArtifactError(path, in_one_line(faults), _FOLDER_REMEDY)
    model, _ = open_packed(path)
    return {
        "files": len(set(model.weight_map.values())),
        "tensors": len(model.weight_map),
        "nbytes": sum(model.file_of(name).nbytes(name) for name in model.weight_map),
    }


def write_folder(
    output: str | Path,
    config: Mapping[str, Any],
    tensors: Sequence[StoredTensor],
    *,
    base: Path,
    texts: Mapping[str, str] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a Hugging Face folder that needs no code of ours; whole or not at all.

    Parameters
    ----------
    output : path-like
    config : mapping
        Content of ``config.json``.
    tensors : sequence of StoredTensor
        In the order of the files.
    base : Path
        Folder that tokenizer, generation settings and licences are copied from.
    texts : mapping, optional
        Name and content of other text files.
    max_shard_bytes : int
        Largest size of a weight file.
    """
    with replacing(output) as folder:
        folder.mkdir()
        _write_shards(folder, tensors, max_shard_bytes)
        write_json(folder / "config.json", config)
        _copy_files(base, folder)
        for name, text in (texts or {}).items():
            (folder / name).write_text(text)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor to be written: its array is made when its shard is."""

    name: str
    nbytes: int
    read: Callable[[], np.ndarray]

    @classmethod
    def of(cls, file: TensorFile, name: str) -> StoredTensor:
        return cls(name, file.nbytes(name), functools.partial(file.read, name))

    @classmethod
    def made(cls, name: str, array: np.ndarray) -> StoredTensor:
        return cls(name, array.nbytes, lambda: array)


def _read_codes(codes_files: Iterable[str | Path]) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """Specs of all matrices, and every packed tensor."""
    specs: dict[str, Any] = {}
    sources: dict[str, StoredTensor] = {}
    for path in codes_files:
        file = TensorFile(path, _REMEDY)
        found = read_specs(file, CODECS, _REMEDY)
        for name in found.keys() & specs.keys():
            raise ArtifactError(path, f"{name} is in another codes file too", "Remove codes of an earlier grouping")
        faults = content_faults(all_parts(found), file.read)
        if faults:
            raise ArtifactError(path, in_one_line(faults), _REMEDY)
        specs |= found
        names = (part for name, spec in found.items() for part in tensor_names(name, spec))
        sources |= {part: StoredTensor.of(file, part) for part in names}
    if not specs:
        raise ArtifactError("codes", "no codes file was given, or none has a matrix", "Name at least one")
    return specs, sources


def _check_target(base: ModelFolder, name: str, spec: Mapping[str, Any]) -> str:
    """Dtype of the dense weight that a packed matrix replaces."""
    weight = f"{name}.weight"
    entry = base.file_of(weight).entries[weight]
    if entry["shape"] != spec["shape"][::-1]:
        raise ArtifactError(
            base.path,
            f"{weight} has shape {entry['shape']}, the codes are for {spec['shape'][::-1]}",
            "The codes belong to another model: delete them and run again",
        )
    if entry["dtype"] not in WEIGHT_DTYPES:
        raise ArtifactError(
            base.path,
            f"{weight} has dtype {entry['dtype']}; allowed: {', '.join(WEIGHT_DTYPES)}",
            "Start from the model's unquantized weights",
        )
    return entry["dtype"]


def _placement(specs: Mapping[str, Any]) -> dict[str, list[str]]:
    """Packed tensors in the place of each dense weight; a shared dictionary comes with the first that uses it."""
    placed: set[str] = set()
    placement = {}
    for name, spec in specs.items():
        placement[f"{name}.weight"] = [part for part in tensor_names(name, spec) if part not in placed]
        placed.update(placement[f"{name}.weight"])
    return placement


def open_packed(folder: str | Path) -> tuple[ModelFolder, dict[str, Any]]:
    """A packed folder whose specs and weight files are as docs/format.md says, and its ``quantization_config``."""
    path = Path(folder)
    config = read_json(path / "config.json", _FOLDER_REMEDY)
    faults = config_faults(config)
    if faults:
        raise ArtifactError(path / "config.json", in_one_line(faults), _FOLDER_REMEDY)
    packing = config["quantization_config"]
    try:
        faults = stored_faults(packing["matrices"], read_headers(path))
    except UnreadableError as error:
        raise ArtifactError(path, str(error), _FOLDER_REMEDY) from error
    if faults:
        raise ArtifactError(path, in_one_line(faults), _FOLDER_REMEDY)
    return ModelFolder(path), packing


def matrices_of(packing: Mapping[str, Any]) -> dict[str, Any]:
    """Specs of a ``quantization_config`` but for those of embedding and head."""
    return {name: spec for name, spec in packing["matrices"].items() if name not in (EMBEDDING, HEAD)}


def dense_weight(model: ModelFolder, packing: Mapping[str, Any], matrix: str) -> StoredTensor:
    """A packed matrix multiplied out, in the dtype that the weights had; computed when it is written."""
    spec, dtype = packing["matrices"][matrix], SAFETENSORS_DTYPES[packing["weight_dtype"]]
    read = functools.partial(_dense_weight, model, matrix, spec, dtype)
    return StoredTensor(f"{matrix}.weight", math.prod(spec["shape"]) * dtype.itemsize, read)


def check_loads(folder: Path) -> None:
    """Refuse what the loader refuses: tensors of the rest of the model that are missing, or of another shape."""
    # which the rest of this module does without; importing it registers our classes
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    try:
        config = CONFIG_MAPPING[MODEL_TYPE].from_pretrained(folder)
        vars(config).pop("auto_map", None)  # the package's own code is meant
        with explaining(folder):
            AutoModelForCausalLM.from_pretrained(folder, config=config, device_map="meta")
    except (OSError, ValueError) as error:
        raise ArtifactError(folder, str(error).removeprefix(f"{folder}: "), _FOLDER_REMEDY) from error


def dense_config(model: ModelFolder) -> dict[str, Any]:
    """``config.json`` of a packed folder as the base family has it."""
    config = dict(model.config)
    config["model_type"] = config.pop("base_model_type")
    config["architectures"] = config.pop("base_architectures")
    for key in ("auto_map", "transformers_weights", "quantization_config", "transformers_version"):
        config.pop(key, None)
    return config


def packed_factors(model: ModelFolder, matrix: str, spec: Mapping[str, Any]) -> Factorization:
    """Factors of a matrix of a packed folder."""
    parts = {part: model.read(part) for part in tensor_names(matrix, spec)}
    return unpack(parts, spec, matrix, source=model.path, remedy=_FOLDER_REMEDY)


def _dense_weight(model: ModelFolder, matrix: str, spec: Mapping[str, Any], dtype: np.dtype) -> np.ndarray:
    return np.ascontiguousarray(packed_factors(model, matrix, spec).reconstruct().T.astype(dtype))


def _byte_count(nbytes: float, dense: int) -> dict[str, float]:
    return {"nbytes": nbytes, "dense_nbytes": dense, "ratio": 1 - nbytes / dense}


def _write_shards(folder: Path, tensors: Sequence[StoredTensor], max_shard_bytes: int) -> None:
    from huggingface_hub import split_state_dict_into_shards_factory

    by_name = {tensor.name: tensor for tensor in tensors}
    split = split_state_dict_into_shards_factory(
        by_name,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    for file_name, names in split.filename_to_tensors.items():
        arrays = {name: np.ascontiguousarray(by_name[name].read()) for name in names}
        (folder / file_name).touch()
        mode = (folder / file_name).stat().st_mode  # safetensors makes files that only their owner reads
        # loaders of other tools look for the format in the header
        safetensors.numpy.save_file(arrays, folder / file_name, {"format": "pt"})
        (folder / file_name).chmod(mode)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": dict(sorted(split.tensor_to_filename.items()))}
        write_json(folder / "model.safetensors.index.json", index)


def _copy_files(source: Path, folder: Path) -> None:
    """Copy what lies beside the weights; settings that name code of the folder are copied without that."""
    for file in data_files(source):
        if file.name == CHECKSUMS:  # of other weight files
            continue
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / file, folder / file)
        if file.suffix == ".json":
            settings = _settings(folder / file)
            if "auto_map" in settings:
                del settings["auto_map"]
                write_json(folder / file, settings)


def _settings(file: Path) -> dict[str, Any]:
    """Content of a JSON file if that is an object; not every vocabulary is."""
    try:
        content = json.loads(file.read_text())
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _keep_tokenizer(base: Path, folder: Path) -> None:
    """Say which class the tokenizer has: transformers takes it from the model type, which is another now."""
    if not has_tokenizer(base):
        return
    file = folder / "tokenizer_config.json"
    settings = _settings(file) if file.exists() else {}
    write_json(file, settings | {"tokenizer_class": class_to_store(load_tokenizer(base))})
    check_equal(folder, base)


def main(arguments: Sequence[str] | None = None) -> str | None:
    """``python -m cospadi.checkpoint verify FOLDER``: what was verified in one line, or the text of the error."""
    parser = argparse.ArgumentParser(prog="python -m cospadi.checkpoint")
    parser.add_argument("command", choices=["verify"], help="compare a packed checkpoint with its checksums")
    parser.add_argument("folder", help="folder of the checkpoint, results/<run>/<variant>/model")
    folder = parser.parse_args(arguments).folder
    try:
        found = verify(folder)
    except CospadiError as error:
        return str(error)
    print(f"{folder}: {found['files']} files, {found['tensors']} tensors, {found['nbytes']:,} bytes are as written")
    return None


if __name__ == "__main__":
    sys.exit(main())
