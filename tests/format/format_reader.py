"""A reader of packed checkpoints that knows docs/format.md, safetensors and NumPy, and nothing of the package.

It refuses, with `Refused`, what the format does not allow of packed matrices, and knows nothing of the rest of a model.
"""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import ml_dtypes  # gives NumPy the bfloat16 that the safetensors front end asks for
import numpy as np
from safetensors import SafetensorError, safe_open

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
WHOLE = {f"int{bits}": bits for bits in (8, 6, 4, 3, 2)}
SHIFTED = {f"uint{bits}": bits for bits in (8, 6, 4, 3, 2)}
INTEGERS = {**WHOLE, **SHIFTED}
# states of the trellis
UNSCALED_STREAMS = {"ec": 1, "ectcq": 8, "ectcq256": 256}
SCALED_STREAMS = {f"{name}_scaled": states for name, states in UNSCALED_STREAMS.items()}
STREAMS = {**UNSCALED_STREAMS, **SCALED_STREAMS}
TRELLISES = {f"trellis{bits}": bits for bits in (4, 3, 2)}
SQUARE = ("identity", "diagonal")
BITS = {"bf16": 16, "bf14": 14, **INTEGERS, **TRELLISES, **dict.fromkeys(STREAMS, 0)}


class Refused(Exception):
    """The checkpoint is not of the format."""


def need(condition: Any, *what: Any) -> None:
    """Refuse unless `condition`."""
    if not condition:
        raise Refused(*what)


def read_checkpoint(folder: Path) -> dict[str, np.ndarray]:
    """Every matrix of the checkpoint, dense: name to float32 (d_in, d_out)."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
        tensors = read_tensors(folder)
    except (ValueError, OSError, SafetensorError, RecursionError) as error:
        raise Refused(error) from error
    need(isinstance(config, dict) and config.get("model_type") == "cospadi", "config")
    packing = config.get("quantization_config")
    need(isinstance(packing, dict) and packing.get("quant_method") == "cospadi", "quant_method")
    need(packing.keys() - {"variant"} == {"quant_method", "format_version", "weight_dtype", "matrices"}, "keys")
    need(is_whole(packing["format_version"], 1) and packing["format_version"] == 1, "version")
    need(packing["weight_dtype"] in ("BF16", "F16", "F32", "F64"), "weight_dtype")
    need(isinstance(packing.get("variant", {}), dict), "variant")
    specs = packing["matrices"]
    need(isinstance(specs, dict) and specs, "matrices")
    for name, spec in specs.items():
        need(all(step and not any(map(str.isspace, step)) for step in name.split(".")), name)
        check_spec(spec)
        if name == "model.embed_tokens":
            codes, d = spec["codes"], spec["shape"][0]
            need(spec["dictionary"]["codec"] == "identity" and codes["support"] == "dense", name)
            integers = codes["codec"] in WHOLE and d * WHOLE[codes["codec"]] % 8 == 0
            need("plus" not in spec and (integers or codes["codec"] in STREAMS), name)
    listed = [pair for name, spec in specs.items() for pair in with_parts(name, spec)]
    parts = dict(listed)
    need(len(parts) == len(listed), "two parts of one name")
    expected = set()
    for name, part in parts.items():
        tensor = part["dictionary"].get("tensor")
        if tensor is not None:
            owner = parts.get(tensor[: -len(".dictionary")])
            need(owner and owner["dictionary"] == part["dictionary"] and owner["shape"][0] == part["shape"][0], name)
            expected |= {tensor, f"{tensor}_scales"} if part["dictionary"]["codec"] in INTEGERS else {tensor}
        expected.add(f"{name}.values")
        expected |= {f"{name}.scales"} if part["codes"]["codec"] in (*INTEGERS, *SCALED_STREAMS) else set()
        expected |= {f"{name}.support"} if part["codes"]["support"] in ("bitmask", "2:4") else set()
    for name, tensor in tensors.items():
        inside = [matrix for matrix in specs if name.startswith(f"{matrix}.")]
        if name not in expected and inside:
            need(name in {f"{matrix}.bias" for matrix in inside}, "left over", name)
            need(list(tensor.shape) == [specs[name[: -len(".bias")]]["shape"][1]], name)
        # the weights of a matrix that is not listed
        need(name in expected or not name.endswith("_proj.values"), name)
    return {name: read_matrix(tensors, name, spec) for name, spec in specs.items()}


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """All tensors; those of a dtype that NumPy lacks as its name."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    need(index.exists() != single.exists(), "one of index and single file")
    files = ["model.safetensors"]
    if index.exists():
        weight_map = json.loads(index.read_bytes())
        need(isinstance(weight_map, dict), "index")
        weight_map = weight_map.get("weight_map")
        need(isinstance(weight_map, dict) and weight_map, "weight_map")
        for file in weight_map.values():
            need(isinstance(file, str) and "/" not in file and file.endswith(".safetensors"), file)
        files = sorted(set(weight_map.values()))
    tensors, where = {}, {}
    for file in files:
        with safe_open(folder / file, framework="np") as opened:
            need((opened.metadata() or {}).get("format", "pt") == "pt", "format")
            for name in opened.keys():  # noqa: SIM118 (not a dict)
                need(name not in where, name, "twice")
                view = opened.get_slice(name)
                known = view.get_dtype() in ("BF16", "F16", "F32", "F64", "U8", "I8", "I16", "U16", "I32", "BOOL")
                tensors[name] = opened.get_tensor(name) if known else np.empty(view.get_shape(), "V1")
                where[name] = file
    need(not index.exists() or where == weight_map, "index")
    return tensors


def with_parts(name: str, spec: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """A matrix and what is added to it."""
    return [(name, spec), *((f"{name}.plus.{i}", part) for i, part in enumerate(spec.get("plus", [])))]


def is_whole(value: Any, least: int, most: float = 2**31 - 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def check_spec(spec: Any, is_part: bool = False) -> None:
    """Keys, types and ranges, and what follows from the numbers of the spec alone."""
    need(isinstance(spec, dict), "spec")
    need(spec.keys() - (set() if is_part else {"plus"}) == {"shape", "dictionary", "codes"}, "keys", list(spec))
    shape, dictionary, codes = spec["shape"], spec["dictionary"], spec["codes"]
    need(isinstance(shape, list) and len(shape) == 2 and all(is_whole(n, 1) for n in shape), "shape")
    need(isinstance(dictionary, dict) and isinstance(codes, dict), "sections")
    codec, values = dictionary.get("codec"), codes.get("codec")
    need(
        isinstance(codec, str) and codec in (*BITS, *SQUARE) and codec not in (*SHIFTED, *STREAMS, *TRELLISES), "codec"
    )
    need(isinstance(values, str) and values in BITS, "codec")
    keys = {"codec", "n_atoms"} | ({"tensor"} if codec != "identity" else set())
    need(dictionary.keys() == keys | ({"group_size"} if codec in INTEGERS else set()), "keys")
    keys = {"codec", "support", "n_nonzero"}
    keys |= {"n_bytes"} if values in STREAMS else set()
    keys |= {"group_size", "n_scales"} if values in (*INTEGERS, *SCALED_STREAMS) else set()
    need(codes.keys() == keys, "keys")
    (d_in, d_out), k, n, support = shape, dictionary["n_atoms"], codes["n_nonzero"], codes["support"]
    need(is_whole(k, 1) and k * max(d_in, d_out) <= 2**48, "n_atoms")
    for number in (n, codes.get("n_scales", 0), codes.get("n_bytes", 0)):
        need(is_whole(number, 0, 2**48), "n_nonzero, n_scales, n_bytes")
    need(values not in (*STREAMS, *TRELLISES) or support == "dense", "support of a stream")
    for section in (dictionary, codes):
        need(section.get("group_size") is None or is_whole(section["group_size"], 1), "group_size")
    need(codec == "identity" or isinstance(dictionary["tensor"], str), "tensor")
    need(codec == "identity" or dictionary["tensor"].endswith(".dictionary"), "tensor")
    need(codec not in SQUARE or k == d_in, "identity or diagonal")
    if support == "mixture":
        need(values == "bf16" and codec not in SQUARE and k == n * d_out, "mixture")
    elif support == "2:4":
        need(k % 4 == 0 and 2 * n == k * d_out, "2:4")
    elif support == "dense":
        need(n == k * d_out, "dense")
    else:
        need(support == "bitmask" and n <= k * d_out, "support")
    if "plus" in spec:
        need(support != "mixture" and isinstance(spec["plus"], list) and spec["plus"], "plus")
        for part in spec["plus"]:
            check_spec(part, is_part=True)
            need(part["shape"] == shape, "shape of a part")


def read_matrix(tensors: dict[str, np.ndarray], name: str, spec: dict[str, Any], is_part: bool = False) -> np.ndarray:
    """``W = D S`` plus the other parts, float32 (d_in, d_out)."""
    check_spec(spec, is_part)
    (d_in, d_out), k, codes = spec["shape"], spec["dictionary"]["n_atoms"], spec["codes"]
    more = [read_matrix(tensors, f"{name}.plus.{i}", part, True) for i, part in enumerate(spec.get("plus", []))]
    dictionary = read_dictionary(tensors, d_in, **spec["dictionary"])
    support, n = codes["support"], codes["n_nonzero"]
    if codes["codec"] in STREAMS:
        stored = tensors.get(f"{name}.values")
        need(stored is not None and stored.dtype == np.uint8 and stored.shape == (codes["n_bytes"],), "values")
        numbers_of_steps = read_stream(stored.tobytes(), k, d_out, STREAMS[codes["codec"]])
        if codes["codec"] in SCALED_STREAMS:
            size = codes["group_size"] or k
            groups = -(-k // size)
            need(codes["n_scales"] == d_out * groups, "scales")
            scales = read_scales(tensors.get(f"{name}.scales"), (codes["n_scales"],)).reshape(d_out, groups)
            numbers_of_steps = numbers_of_steps * np.repeat(scales, size, axis=1)[:, :k].T
        return dictionary @ numbers_of_steps + sum(more)
    if codes["codec"] in TRELLISES:
        stored, bits = tensors.get(f"{name}.values"), TRELLISES[codes["codec"]]
        need(stored is not None and stored.dtype == np.uint8, "values")
        need(stored.shape == (k * -(-bits * d_out // 8) + 2 * (k + d_out) + 4,), "values")
        return dictionary @ read_trellis(stored.tobytes(), k, d_out, bits) + sum(more)
    shape = (n + codes["n_scales"],) if codes["codec"] in SHIFTED else (d_out, k) if support == "dense" else (n,)
    values = finite(numbers(tensors.get(f"{name}.values"), codes["codec"], shape))
    if support == "mixture":
        atoms = np.split(dictionary, n, axis=1)
        return sum((c * atom for c, atom in zip(values, atoms, strict=True)), sum(more))
    values, scales, bits = values.ravel(), None, None
    if codes["codec"] in INTEGERS:
        scales = read_scales(tensors.get(f"{name}.scales"), (codes["n_scales"],))
    if support != "dense":
        bits = tensors.get(f"{name}.support")
        need(bits is not None and bits.dtype == np.uint8 and bits.shape == (d_out, -(-k // 8)), "support")
    rows, taken, n_groups = np.zeros((d_out, k), np.float32), 0, 0
    size = codes.get("group_size") or k
    for column, row in enumerate(rows):
        atoms = atoms_of(None if bits is None else bits[column], k, support)
        need(taken + len(atoms) <= n, "positions")
        for first in range(0, len(atoms), size):
            group = atoms[first : first + size]
            need(scales is None or n_groups < len(scales), "scales")
            zero = values[n + n_groups] if codes["codec"] in SHIFTED else 0
            row[group] = (values[taken : taken + len(group)] - zero) * (1 if scales is None else scales[n_groups])
            taken, n_groups = taken + len(group), n_groups + 1
    need(taken == n and (scales is None or n_groups == len(scales)), "positions or scales")
    return dictionary @ rows.T + sum(more)


# By states of a trellis: whether numbers are odd in a state, and the state after a number n with half = n // 2. Of 8
# states the oldest rule; docs/format.md says it in other words, which allow the same numbers
IS_ODD = {1: lambda s: 0, 8: lambda s: s >> 2, 256: lambda s: s % 2}
AFTER = {
    1: lambda s, half: 0,
    8: lambda s, half: ((half ^ s ^ s >> 1) & 1) << 2 | s >> 1,
    256: lambda s, half: s // 2 ^ 166 * (s % 2) ^ 121 * (half % 2),
}


def read_stream(data: bytes, k: int, d_out: int, n_states: int) -> np.ndarray:
    """Codes of an entropy-coded matrix, float32 (k, d_out)."""
    trellis = n_states > 1
    need(len(data) >= 24 and zlib.crc32(data[4:]) == int.from_bytes(data[:4], "little"), "checksum")
    _, rows, columns, per_stream, exponent, first, n_buckets, n_wide, n_table = struct.unpack("<IIIHhBBHI", data[:24])
    is_deflated, per_stream = per_stream % 2, per_stream - per_stream % 2
    need((rows, columns) == (k, d_out) and n_buckets and per_stream and per_stream % 8 == 0, "header")
    need(-100 <= exponent <= 100, "exponent")
    if is_deflated:
        end = 28 + int.from_bytes(data[24:28], "little")
        need(end <= len(data), "short")
        stream = zlib.decompressobj(-15)
        try:
            beside = stream.decompress(data[28:end])
        except zlib.error as error:
            raise Refused("deflated bytes") from error
        need(stream.eof and not stream.unused_data, "deflated bytes")
        need(len(beside) == 2 * k + d_out + 5 * n_wide + n_table, "deflated bytes")
        data = data[:24] + beside + data[end:]
    at, kinds, tables = 24, 1 + trellis, []
    steps, at = data[at : at + k], at + k
    row, at = data[at : at + k], at + k
    column, at = data[at : at + d_out], at + d_out
    end = at + 5 * n_wide + n_table
    need(len(data) >= end, "short")
    wide = {}
    for _ in range(n_wide):
        wide_row, at = int.from_bytes(data[at : at + 4], "little"), at + 5
        need(max(wide, default=-1) < wide_row < k and 1 <= data[at - 1] <= 12, "wide rows")
        wide[wide_row] = data[at - 1]
    for index in range(kinds * n_buckets):
        need(at < end, "tables")
        n, at, table = data[at], at + 1, []
        for _ in range(n):
            frequency = 0
            for place in range(3):
                need(at < end, "tables")
                frequency, at = frequency | (data[at] & 127) << 7 * place, at + 1
                if data[at - 1] < 128:
                    break
            table.append(frequency)
        odd = kinds == 2 and index % 2
        pairs = [(2 * i + 1, f) for i, f in enumerate(table)] if odd else [(kinds * i, f) for i, f in enumerate(table)]
        counts = sorted({sign * number: f for number, f in pairs for sign in (-1, 1)}.items())
        need(n <= 128 and (n == 0 or sum(f for _, f in counts) == 4096), "table")
        tables.append(counts or [(int(odd), 4096)])
    need(at == end, "tables")
    n_streams = -(-k // per_stream)
    sizes = [int.from_bytes(data[end + 4 * i : end + 4 * i + 4], "little") for i in range(n_streams)]
    at = end + 4 * n_streams
    need(at + sum(sizes) == len(data) and all(size >= 32 and size % 2 == 0 for size in sizes), "streams")
    codes = np.zeros((k, d_out), np.float32)
    for index, size in enumerate(sizes):
        states = [int.from_bytes(data[at + 4 * i : at + 4 * i + 4], "little") for i in range(8)]
        word, at = at + 32, at + size
        last = min((index + 1) * per_stream, k)
        for group in range(index * per_stream, last, 8):
            lanes = range(group, min(group + 8, last))
            path = dict.fromkeys(lanes, 0)
            for j in range(d_out):
                for lane, i in enumerate(lanes):
                    bucket = min(max((row[i] + column[j] >> 3) - first, 0), n_buckets - 1)
                    slot, below, at_number = states[lane] % 4096, 0, 0
                    table = tables[kinds * bucket + IS_ODD[n_states](path[i])]
                    while slot >= below + table[at_number][1]:
                        below, at_number = below + table[at_number][1], at_number + 1
                    number, frequency = table[at_number]
                    states[lane] = frequency * (states[lane] >> 12) + slot - below
                    if states[lane] < 2**16:
                        need(word + 2 <= at, "short stream")
                        states[lane] = states[lane] << 16 | int.from_bytes(data[word : word + 2], "little")
                        word += 2
                    if i in wide:
                        half = (number >> trellis) * 2 ** wide[i] + states[lane] % 2 ** wide[i]
                        number = 2 * half + (number & 1) if trellis else half
                        states[lane] >>= wide[i]
                        if states[lane] < 2**16:
                            need(word + 2 <= at, "short stream")
                            states[lane] = states[lane] << 16 | int.from_bytes(data[word : word + 2], "little")
                            word += 2
                    path[i] = AFTER[n_states](path[i], number >> 1)
                    mantissa = round(2 ** (steps[i] % 16 / 16) * 512) / 512
                    codes[i, j] = np.float32(number) * np.float32(mantissa * 2.0 ** (exponent + steps[i] // 16))
        need(word == at and states == [2**16] * 8, "end of a stream")
    return codes


def read_trellis(data: bytes, k: int, d_out: int, bits: int) -> np.ndarray:
    """Codes of a trellis-coded matrix, float32 (k, d_out)."""
    need(zlib.crc32(data[:-4]) == int.from_bytes(data[-4:], "little"), "checksum")
    n_bytes = -(-bits * d_out // 8)
    scales = finite(np.frombuffer(data, BFLOAT16, k + d_out, k * n_bytes).astype(np.float32))
    codes = np.empty((k, d_out), np.float32)
    for i in range(k):
        first = i // 32 * 32
        n_rows = min(32, k - first)
        row = int.from_bytes(data[first * n_bytes : (first + n_rows) * n_bytes][i - first :: n_rows], "little")
        need(row >> bits * d_out == 0, "bits behind the last number of a row")
        for j in range(d_out):
            x = 17232 * ((row << 12) >> bits * (j + 1) & 4095) % 65536
            x -= 65536 * (x >= 32768)
            bend = x * x // 65536 - 4012
            value = (x * ((bend * bend + 16384) // 32768 + 5082) + 16384) // 32768
            codes[i, j] = np.float32(value) * scales[i] * scales[k + j]
    return codes


def read_dictionary(
    tensors: dict[str, np.ndarray], d_in: int, codec: str, n_atoms: int, tensor: str = "", group_size: int | None = None
) -> np.ndarray:
    """Dictionary, float32 (d_in, n_atoms)."""
    if codec == "identity":
        return np.eye(d_in, dtype=np.float32)
    if codec == "diagonal":
        return np.diag(finite(numbers(tensors.get(tensor), "bf16", d_in)))
    dictionary = finite(numbers(tensors.get(tensor), codec, (d_in, n_atoms))).reshape(d_in, n_atoms)
    if codec in INTEGERS:
        size = min(group_size or d_in, d_in)
        scales = read_scales(tensors.get(f"{tensor}_scales"), (-(-d_in // size), n_atoms))
        dictionary = dictionary * scales[np.arange(d_in) // size]
    return dictionary


def read_scales(stored: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray:
    """Scales, float32."""
    need(stored is not None and stored.dtype == BFLOAT16 and stored.shape == shape, "scales", shape)
    return finite(stored.astype(np.float32))


def atoms_of(row: np.ndarray, k: int, support: str) -> list[int]:
    """Atoms whose codes are stored, of one column."""
    if support == "dense":
        return list(range(k))
    bits = [byte >> i & 1 for byte in row.tolist() for i in range(8)]
    if support == "bitmask":
        need(not any(bits[k:]), "bits behind the last atom")
        return [i for i in range(k) if bits[i]]
    need(not any(bits[k:]), "bits behind the last pair")
    atoms = []
    for quad in range(k // 4):
        first, second = bits[4 * quad] + 2 * bits[4 * quad + 1], bits[4 * quad + 2] + 2 * bits[4 * quad + 3]
        need(first < second, "pair")
        atoms += [4 * quad + first, 4 * quad + second]
    return atoms


def numbers(stored: np.ndarray | None, codec: str, shape: int | tuple[int, ...]) -> np.ndarray:
    """Decode numbers, float32 (n,), before scaling; `shape` is a number of them, or their shape."""
    shape = (shape,) if isinstance(shape, int) else shape
    n = int(np.prod([1, *shape], dtype=object))
    need(stored is not None, "missing")
    if codec in ("bf16", "int8"):
        need(stored.dtype == {"bf16": BFLOAT16, "int8": np.int8}[codec] and stored.shape == shape, "dtype or shape")
        decoded = stored.astype(np.float32).ravel()
    else:
        bits = BITS[codec]
        need(stored.dtype == np.uint8 and stored.shape == (-(-bits * n // 8),), "dtype or shape")
        stream = np.unpackbits(stored, bitorder="little")
        need(not stream[bits * n :].any(), "bits behind the last number")
        words = stream[: bits * n].reshape(n, bits) @ (1 << np.arange(bits, dtype=np.uint32)).astype(np.uint32)
        decoded = (words << 18).view(np.float32) if codec == "bf14" else words.astype(np.float32)
        decoded = decoded - 2.0**bits * (words >> bits - 1) if codec in WHOLE else decoded
    return decoded.astype(np.float32)


def finite(decoded: np.ndarray) -> np.ndarray:
    """Numbers, none of them NaN or infinite."""
    need(np.isfinite(decoded).all(), "not finite")
    return decoded
