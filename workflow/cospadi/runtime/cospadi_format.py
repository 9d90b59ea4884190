"""The checkpoint format in one place: its names, its numbers, and what makes a packed matrix valid (docs/format.md).

Whatever reads packed matrices asks here first: the loader, `densify`, `assemble`, `unpack`. NumPy and safetensors are
enough. Faults come back as sentences; whoever asked knows the file they belong to, and raises.

There are two levels. `packing_faults`, `matrices_faults` and `header_faults` need the specs and the headers of the
weight files, so they come before any tensor is read; `content_faults` reads what the rest of the code relies on.
"""

from __future__ import annotations

import functools
import json
import math
import re
import reprlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from .cospadi_registry import CODECS, SUPPORTS
from .cospadi_values import Codec

MODEL_TYPE = "cospadi"
FORMAT_VERSION = 1

# The oldest version that loads a packed folder, with this package and without
TRANSFORMERS = "5.0"

AUTO_MAP = {
    "AutoConfig": "configuration_cospadi.CospadiConfig",
    "AutoModelForCausalLM": "modeling_cospadi.CospadiForCausalLM",
}

# Stands in config.json where transformers looks for a weight file's name. A loader that does not know this format (say,
# `LlamaForCausalLM.from_pretrained`) stops on it with this text; without it, it would start with random weights.
LOAD_HINT = "packed checkpoint: use AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)"

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

# of the dense weights, in safetensors' words
WEIGHT_DTYPES = ("BF16", "F16", "F32", "F64")


_SCALES = CODECS["bf16"]

# the dictionary that is not there: the atoms are the inputs
IDENTITY = "identity"

# What a file calls the embedding and the head, with ``.weight`` behind where they are dense
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"

# No size is larger, and no factor has more numbers: what is computed from them fits 64 bits everywhere
_MOST = 2**31 - 1
_MOST_NUMBERS = 2**48

_MODULE = re.compile(r"[^.\s]+(\.[^.\s]+)*")

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring = 3, 120


def parts_of(name: str, spec: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The factors that are summed for a matrix: name of each, the matrix's own first, to its spec."""
    plus = {f"{name}.plus.{index}": part for index, part in enumerate(spec.get("plus", ()))}
    return {name: spec, **plus}


def all_parts(matrices: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """`parts_of` of every matrix."""
    return {part: spec for matrix in matrices.items() for part, spec in parts_of(*matrix).items()}


def stored_tensors(
    name: str, part: Mapping[str, Any], codecs: Mapping[str, Any] = CODECS
) -> dict[str, tuple[str, tuple[int, ...], Any]]:
    """The tensors that one part of a matrix is read from.

    Parameters
    ----------
    name : str
        Of the matrix, or of the part that is added to it.
    part : mapping
        A valid spec; its ``plus`` are parts of their own.
    codecs : mapping
        Name to codec.

    Returns
    -------
    dict
        Full name of each tensor, dictionary first, to what it is of the part (``"dictionary"``,
        ``"dictionary_scales"``, ``"values"``, ``"scales"``, ``"support"``), its shape, and its codec: None of scales
        (bfloat16) and support (bytes).
    """
    (d_in, d_out), dictionary, codes = part["shape"], part["dictionary"], part["codes"]
    k, support = dictionary["n_atoms"], SUPPORTS[codes["support"]]
    tensors: dict[str, tuple[str, tuple[int, ...], Any]] = {}
    if dictionary["codec"] != IDENTITY:
        tensor, codec = dictionary["tensor"], codecs[dictionary["codec"]]
        tensors[tensor] = ("dictionary", codec.shape(codec.numbers_of_dictionary(d_in, k)), codec)
        if codec.scaled:
            n_blocks = -(-d_in // (dictionary["group_size"] or d_in))
            tensors[f"{tensor}_scales"] = ("dictionary_scales", (n_blocks, k), None)
    codec = codecs[codes["codec"]]
    numbers = support.shape_of_values(k, d_out, codes["n_nonzero"])
    tensors[f"{name}.values"] = ("values", codec.shape_of_codes(numbers, codes), codec)
    if codec.scaled:
        tensors[f"{name}.scales"] = ("scales", (codes["n_scales"],), None)
    if support.is_stored:
        tensors[f"{name}.support"] = ("support", support.shape(k, d_out), None)
    return tensors


def block_of(section: Mapping[str, Any], most: int) -> int:
    """Numbers under one scale, by a valid section ``dictionary`` or ``codes``, of rows of `most` numbers.

    The file may say more, up to any number: what is computed with that would overflow, or be as many times repeated.
    """
    return min(section.get("group_size") or most, most)


def config_faults(config: Mapping[str, Any]) -> list[str]:
    """What is wrong with a ``config.json``, but for the base model's part of it."""
    faults = packing_faults(config.get("quantization_config"))
    if not faults and config.get("model_type") != MODEL_TYPE:
        faults = [f"model_type is {_shown(config.get('model_type'))}, expected {MODEL_TYPE!r}"]
    for key in ("dtype", "torch_dtype"):  # which transformers stumbles over before the model is asked
        if not isinstance(config.get(key), str | None):
            faults.append(f"{key} is {_shown(config[key])}, expected the name of a dtype")
    return faults


def packing_faults(packing: Any) -> list[str]:
    """What is wrong with a ``quantization_config``."""
    method = packing.get("quant_method") if isinstance(packing, Mapping) else None
    if method != MODEL_TYPE or "matrices" not in packing:
        return [f"config.json has no quantization_config of a packed checkpoint (quant_method {_shown(method)})"]
    version = packing.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        return [
            f"format_version {_shown(version)} is not known; this code reads {FORMAT_VERSION}. Load it with the code "
            "that came with it (trust_remote_code=True, without importing cospadi), or install a newer cospadi"
        ]
    keys = ("quant_method", "format_version", "weight_dtype", "matrices")
    faults = _key_faults(packing, "quantization_config", keys, ("variant",))
    if "weight_dtype" in packing and packing["weight_dtype"] not in WEIGHT_DTYPES:
        faults.append(f"weight_dtype is {_shown(packing['weight_dtype'])}; allowed: {', '.join(WEIGHT_DTYPES)}")
    if not isinstance(packing.get("variant", {}), Mapping):
        faults.append(f"variant is {_shown(packing['variant'])}, expected an object")
    return faults + matrices_faults(packing["matrices"])


def matrices_faults(matrices: Any, codecs: Mapping[str, Codec] = CODECS) -> list[str]:
    """What is wrong with the specs of all matrices, each alone and with the dictionaries they share."""
    if not isinstance(matrices, Mapping) or not matrices:
        return [f"matrices is {_shown(matrices)}, expected an object with the spec of at least one matrix"]
    faults = [f"{_shown(name)} is no module path" for name in matrices if not _is_module(name)]
    faults += [f"{name}: {fault}" for name, spec in matrices.items() for fault in spec_faults(spec, codecs)]
    if not faults and EMBEDDING in matrices:
        faults = [f"{EMBEDDING}: {fault}" for fault in embedding_faults(matrices[EMBEDDING], codecs)]
    if faults:
        return faults
    parts = all_parts(matrices)
    if len(parts) < sum(1 + len(spec.get("plus", ())) for spec in matrices.values()):
        return ["two matrices, or parts of sums, have one name"]
    for name, part in parts.items():
        dictionary = part["dictionary"]
        if dictionary["codec"] != IDENTITY:
            tensor = dictionary["tensor"]
            owner = parts.get(tensor.removesuffix(".dictionary"))
            if owner is None:
                faults.append(f"{name}: its dictionary is {tensor}, which belongs to no packed matrix")
            elif owner["dictionary"] != dictionary or owner["shape"][0] != part["shape"][0]:
                faults.append(
                    f"{name}: its dictionary is {tensor}, whose owner has another: {_shown(owner['dictionary'])} for "
                    f"{owner['shape'][0]} inputs, here {_shown(dictionary)} for {part['shape'][0]}"
                )
    return faults


def spec_faults(spec: Any, codecs: Mapping[str, Codec] = CODECS, *, is_part: bool = False) -> list[str]:
    """What is wrong with the spec of one matrix, or of one part that is added to a matrix."""
    if is_part and isinstance(spec, Mapping) and "plus" in spec:
        return ["what is added is no sum itself"]
    faults = _key_faults(spec, "its spec", ("shape", "dictionary", "codes"), () if is_part else ("plus",))
    if faults:
        return faults
    shape, dictionary, codes = spec["shape"], spec["dictionary"], spec["codes"]
    if not isinstance(shape, (list, tuple)) or len(shape) != 2 or not all(_is_size(size) for size in shape):
        faults.append(f"shape is {_shown(shape)}, expected two whole numbers, (d_in, d_out), each from 1")
    faults += _dictionary_faults(dictionary, codecs) + _codes_faults(codes, codecs)
    if not faults:
        faults = _size_faults(spec, codecs)
    if "plus" in spec:
        faults += _plus_faults(spec, codecs)
    if not faults:
        faults = [
            f"plus.{index}: shape {part['shape']} is not the matrix's, {shape}"
            for index, part in enumerate(spec.get("plus", ()))
            if list(part["shape"]) != list(shape)
        ]
    return faults


def embedding_faults(spec: Mapping[str, Any], codecs: Mapping[str, Codec] = CODECS) -> list[str]:
    """What keeps a valid spec from being an embedding's, a column of which is a token and read for itself."""
    codes, hidden_size = spec["codes"], spec["shape"][0]
    codec = codecs[codes["codec"]]
    plain = spec["dictionary"]["codec"] == IDENTITY and codes["support"] == "dense" and "plus" not in spec
    integers = codec.scaled and not codec.shifted and not codec.whole
    if not plain or not (integers or codec.variable):
        return [
            f"an embedding is integers under scales or a stream, and no codec {codes['codec']!r} of support "
            f"{codes['support']!r}"
        ]
    if not codec.variable and hidden_size * codec.bits % 8:
        return [f"{hidden_size} numbers of {codec.bits} bits are no whole bytes"]
    return []


def _dictionary_faults(dictionary: Any, codecs: Mapping[str, Codec]) -> list[str]:
    codec = dictionary.get("codec") if isinstance(dictionary, Mapping) else None
    if codec != IDENTITY:
        faults = _codec_faults(dictionary, "its dictionary", codecs)
        if not faults and not codecs[codec].in_dictionaries:
            faults = [f"codec {codec!r} is one of codes, not of dictionaries"]
        if faults:
            return faults
    keys = ["codec", "n_atoms"]
    if codec != IDENTITY:
        # `group_size` is the file's word for the size of a block; the library's groups are of layers
        keys += ["tensor", "group_size"] if codecs[codec].scaled else ["tensor"]
    faults = _key_faults(dictionary, "its dictionary", keys)
    if not faults and not _is_size(dictionary["n_atoms"]):
        faults.append(f"n_atoms is {_shown(dictionary['n_atoms'])}, expected a whole number from 1")
    if (
        not faults
        and "tensor" in keys
        and not (isinstance(dictionary["tensor"], str) and dictionary["tensor"].endswith(".dictionary"))
    ):
        faults.append(f"dictionary.tensor is {_shown(dictionary['tensor'])}, which belongs to no packed matrix")
    return faults + _block_faults(dictionary, "dictionary", keys)


def _codes_faults(codes: Any, codecs: Mapping[str, Codec]) -> list[str]:
    faults = _codec_faults(codes, "its codes", codecs)
    if not faults and not codecs[codes["codec"]].in_codes:
        faults = [f"codec {codes['codec']!r} is one of dictionaries, not of codes"]
    if faults:
        return faults
    keys = ["codec", "support", "n_nonzero", *codecs[codes["codec"]].keys]
    faults = _key_faults(codes, "its codes", keys)
    if faults:
        return faults
    if not isinstance(codes["support"], str) or codes["support"] not in SUPPORTS:
        faults.append(f"support {_shown(codes['support'])} is not known; this code reads {', '.join(SUPPORTS)}")
    for key in ("n_nonzero", "n_scales", "n_bytes"):
        if key in keys and not _is_size(codes[key], least=0, most=_MOST_NUMBERS):
            faults.append(f"{key} is {_shown(codes[key])}, expected a whole number from 0")
    return faults + _block_faults(codes, "codes", keys)


def _codec_faults(section: Any, what: str, codecs: Mapping[str, Codec]) -> list[str]:
    if not isinstance(section, Mapping) or "codec" not in section:
        return _key_faults(section, what, ("codec",))
    codec = section["codec"]
    if not isinstance(codec, str) or codec not in codecs:
        return [f"codec {_shown(codec)} is not known; this code reads {', '.join(codecs)}"]
    return []


def _block_faults(section: Mapping[str, Any], what: str, keys: Sequence[str]) -> list[str]:
    size = section.get("group_size")
    if "group_size" in keys and size is not None and not _is_size(size):
        return [f"{what}.group_size is {_shown(size)}, expected null or a whole number from 1"]
    return []


def _size_faults(spec: Mapping[str, Any], codecs: Mapping[str, Codec]) -> list[str]:
    """What does not fit, in a spec whose values are right one by one."""
    (d_in, d_out), dictionary, codes = spec["shape"], spec["dictionary"], spec["codes"]
    k = dictionary["n_atoms"]
    if max(d_in, d_out) * k > _MOST_NUMBERS:
        return [f"{k} atoms for shape ({d_in}, {d_out}) are more than any file holds"]
    faults = []
    if dictionary["codec"] == IDENTITY and k != d_in:
        faults.append(f"{k} atoms in an identity dictionary of {d_in} inputs")
    elif dictionary["codec"] != IDENTITY and codecs[dictionary["codec"]].diagonal:
        mixes = SUPPORTS[codes["support"]].mixes
        if mixes or k != d_in:
            faults.append(f"{k} atoms{' to mix' * mixes} in a diagonal dictionary of {d_in} inputs")
    if codecs[codes["codec"]].whole and SUPPORTS[codes["support"]].is_stored:
        faults.append(f"codec {codes['codec']!r} is for support 'dense', not {codes['support']!r}")
    return faults + SUPPORTS[codes["support"]].size_faults(spec, codecs[codes["codec"]])


def _plus_faults(spec: Mapping[str, Any], codecs: Mapping[str, Codec]) -> list[str]:
    plus, codes = spec["plus"], spec["codes"]
    if not isinstance(plus, (list, tuple)) or not plus:
        return [f"plus is {_shown(plus)}, expected a list of at least one spec"]
    faults = [
        f"plus.{index}: {fault}" for index, part in enumerate(plus) for fault in spec_faults(part, codecs, is_part=True)
    ]
    support = codes.get("support") if isinstance(codes, Mapping) else None
    if isinstance(support, str) and support in SUPPORTS and SUPPORTS[support].mixes:
        faults.append("a mixture has nothing added to it: it is itself the part that is added")
    return faults


def header_faults(
    matrices: Mapping[str, Any], entries: Mapping[str, tuple[str, Sequence[int]]], codecs: Mapping[str, Codec] = CODECS
) -> list[str]:
    """What the headers of the weight files say against the specs.

    Parameters
    ----------
    matrices : mapping
        Specs that `matrices_faults` finds nothing against.
    entries : mapping
        Every tensor of the files to its dtype, in safetensors' words, and shape.
    """
    faults, expected = [], set()
    for name, part in all_parts(matrices).items():
        for tensor, (kind, shape, codec) in stored_tensors(name, part, codecs).items():
            if tensor in expected:  # shared
                continue
            expected.add(tensor)
            dtype = codec.dtype if codec else "U8" if kind == "support" else _SCALES.dtype
            if tensor not in entries:
                faults.append(f"tensor {tensor} is missing")
                continue
            found, found_shape = entries[tensor]
            if found != dtype:
                faults.append(f"{tensor} has dtype {found}, expected {dtype}")
            elif tuple(found_shape) != shape:
                faults.append(f"{tensor} has shape {tuple(found_shape)}, expected {shape}")
    for name, (_, shape) in entries.items():
        if name in expected:
            continue
        owner = next((module for module in _above(name) if module in matrices), None)
        if owner is not None and name != f"{owner}.bias":
            faults.append(f"{name} belongs to a packed matrix but is none of its tensors")
        elif owner is not None and list(shape) != [matrices[owner]["shape"][1]]:
            faults.append(f"{name} has shape {tuple(shape)}, expected ({matrices[owner]['shape'][1]},)")
    return faults


def content_faults(
    parts: Mapping[str, Mapping[str, Any]],
    read: Callable[[str], np.ndarray],
    codecs: Mapping[str, Codec] = CODECS,
    besides: Collection[str] = (),
) -> list[str]:
    """What is wrong inside the tensors of parts whose specs and headers are right.

    Parameters
    ----------
    parts : mapping
        As `all_parts` or `parts_of` give them.
    read : callable
        ``read(tensor) -> array`` of the dtype and shape in the header; bfloat16 as any two-byte dtype.
    besides : collection of str
        Tensors that are looked at elsewhere.

    Returns
    -------
    list of str
        Support bits that do not fit the number of values or scales; pairs that name no two atoms in order; bits
        set where nothing is stored; values and scales that are NaN or infinite.
    """
    faults: list[str] = []
    seen = set(besides)
    for name, part in parts.items():
        for tensor, (kind, _, codec) in stored_tensors(name, part, codecs).items():
            if tensor in seen:  # shared, too
                continue
            seen.add(tensor)
            if kind == "support":
                support = SUPPORTS[part["codes"]["support"]]
                faults += support.content_faults(name, part, read(tensor), codecs[part["codes"]["codec"]])
            elif codec is not None and codec.whole:
                shape = (part["dictionary"]["n_atoms"], part["shape"][1])
                faults += [f"{tensor} {fault}" for fault in codec.faults_of(read(tensor), shape)]
            elif codec is None or codec.stream or not codec.scaled:  # other integers are right whatever they are
                (d_in, _), k = part["shape"], part["dictionary"]["n_atoms"]
                n = part["codes"]["n_nonzero"]
                if kind == "dictionary":
                    n = math.prod(codec.numbers_of_dictionary(d_in, k))
                n += part["codes"]["n_scales"] if kind == "values" and codec.shifted else 0
                found = (codec or _SCALES).faults(read(tensor), n)
                faults += [f"{tensor} {fault}" for fault in found]
    return faults


@dataclass(frozen=True)
class Stored:
    """Where a tensor is: file, dtype in safetensors' words, shape, first byte in the file, number of bytes."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def read(self, mapped: np.ndarray) -> np.ndarray:
        """Its part of the mapped file: integers of one byte in their shape, others as unsigned ones of their size."""
        if not self.nbytes:
            return np.zeros(self.shape, np.uint8)
        size = self.nbytes // math.prod(self.shape)
        kind = np.int8 if self.dtype == "I8" else np.dtype(f"<u{size}")
        return mapped[self.offset : self.offset + self.nbytes].view(kind).reshape(self.shape)


class UnreadableError(Exception):
    """A weight file or the index is damaged or missing; `kind` is the system's word for it."""

    def __init__(self, problem: str, kind: type[OSError] = OSError) -> None:
        self.kind = kind
        super().__init__(problem)


def read_headers(folder: str | Path, weights: str = WEIGHTS, index: str = INDEX) -> dict[str, Stored]:
    """Every tensor of a folder's weight files, from their headers.

    Raises
    ------
    UnreadableError
        If a file is missing, damaged or cut short, or the index names other tensors than the files hold.
    """
    folder = Path(folder)
    has_index, has_one = (folder / index).is_file(), (folder / weights).is_file()
    if has_index and has_one:
        raise UnreadableError(f"it holds both {weights} and {index}: which of them counts is not known")
    if not has_index:
        if not has_one:
            raise UnreadableError(f"it holds neither {weights} nor {index}", FileNotFoundError)
        return read_header(folder / weights)
    content = read_object(folder / index)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UnreadableError(f"{index}: weight_map is {_shown(weight_map)}, expected an object of tensors and files")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise UnreadableError(f"{index}: {name} is in {_shown(file)}, which is no name of a safetensors file")
    stored: dict[str, Stored] = {}
    for file in sorted(set(weight_map.values())):
        if not (folder / file).is_file():
            raise UnreadableError(f"{file}, which {index} names, does not exist", FileNotFoundError)
        for name, tensor in read_header(folder / file).items():
            if weight_map.get(name) != file:
                raise UnreadableError(f"{file} holds {name}, which {index} has in {_shown(weight_map.get(name))}")
            stored[name] = tensor
    lost = sorted(weight_map.keys() - stored.keys())
    if lost:
        raise UnreadableError(f"tensor {lost[0]} is missing: {index} has it in {weight_map[lost[0]]}, which does not")
    return stored


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is no number of JSON")
    return number


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds one object.

    Raises
    ------
    UnreadableError
        If it is missing, no JSON, or another value.
    """
    try:
        value = json.loads(path.read_bytes(), parse_constant=_finite, parse_float=_finite)
    except FileNotFoundError as error:
        raise UnreadableError(f"{path.name} does not exist", FileNotFoundError) from error
    except (ValueError, RecursionError) as error:
        raise UnreadableError(f"{path.name} is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise UnreadableError(f"{path.name} holds {_shown(value)}, expected an object")
    return value


def read_header(path: Path) -> dict[str, Stored]:
    """Every tensor of one weight file; raises `UnreadableError`."""
    try:
        with safe_open(path, framework="np"):  # checks offsets, shapes and the file's length
            pass
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, ValueError, RecursionError) as error:
        raise UnreadableError(f"{path.name} is damaged or cut short ({error})") from error
    metadata = header.pop("__metadata__", None) or {}
    if metadata.get("format", "pt") != "pt":
        raise UnreadableError(f"{path.name}: its format is {_shown(metadata['format'])}, expected 'pt'")
    return {
        name: Stored(
            path,
            entry["dtype"],
            tuple(entry["shape"]),
            8 + length + entry["data_offsets"][0],
            entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for name, entry in header.items()
    }


def stored_faults(
    matrices: Mapping[str, Any], stored: Mapping[str, Stored], besides: Collection[str] = ()
) -> list[str]:
    """What is wrong with the tensors of a folder: their headers, and where those are right, their contents.

    `besides` are tensors whose contents are looked at elsewhere.
    """
    faults = header_faults(matrices, {name: (tensor.dtype, tensor.shape) for name, tensor in stored.items()})
    return faults or content_faults(all_parts(matrices), reader(stored), besides=besides)


def reader(stored: Mapping[str, Stored]) -> Callable[[str], np.ndarray]:
    """What reads a tensor of a folder by its name, from files that are mapped; who writes into one has a copy."""
    # once: a map of each tensor takes as long as looking at it
    mapped = functools.cache(lambda file: np.asarray(np.memmap(file, np.uint8, "c")))
    return lambda name: stored[name].read(mapped(stored[name].file))


def in_one_line(faults: Sequence[str]) -> str:
    """The first faults, and how many there are."""
    return "; ".join(faults[:5]) + (f"; and {len(faults) - 5} more" if len(faults) > 5 else "")


def _key_faults(section: Any, what: str, needed: Sequence[str], optional: Sequence[str] = ()) -> list[str]:
    if not isinstance(section, Mapping):
        return [f"{what} is {_shown(section)}, expected an object"]
    unknown = sorted(_shown(key).strip("'") for key in section.keys() - {*needed, *optional})
    faults = [f"{what} has {', '.join(unknown)}, which is not known"] if unknown else []
    missing = [key for key in needed if key not in section]
    return faults + ([f"{what} lacks {', '.join(missing)}"] if missing else [])


def _is_size(value: Any, least: int = 1, most: int = _MOST) -> bool:
    # JSON's true would pass for 1
    return type(value) is int and least <= value <= most


def _is_module(name: Any) -> bool:
    return isinstance(name, str) and _MODULE.fullmatch(name) is not None


def _above(name: str) -> list[str]:
    """Modules that a tensor's name is inside of, innermost first."""
    pieces = name.split(".")
    return [".".join(pieces[:end]) for end in range(len(pieces) - 1, 0, -1)]


def _shown(value: Any) -> str:
    """A value of a file as an error shows it: short, whatever it is."""
    return _SHORT.repr(value)
