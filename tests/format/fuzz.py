"""Random damage to packed folders, codes files and run configs, and what every reader makes of it.

A case is a number: the same number gives the same damage. It is a finding if a reader

- ends the process, or does not end in time (`crash`, `hang`);
- fails with an error that is not the package's own, or that does not name the folder (`error`);
- accepts what another refuses (`disagreement`): loader, `densify`, `unpack`, `assemble`, and the independent reader;
- gives other numbers than the independent reader (`wrong`), by plain torch or by the compiled kernel.

``python fuzz.py [--cases N] [--minutes M] [--first N] [--asan] [--every]`` prints the findings. Cases run in processes
of their own, with the kernel under AddressSanitizer where asked for and gcc has it. It tries the code that Python
imports, so ``PYTHONPATH=<another checkout>/workflow`` tries another one with the same cases.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

SECONDS_A_CASE = 20  # of the processor, so that a busy machine makes no hang
MEMORY = 12 * 2**30
WIDTHS = {"BF16": 2, "F16": 2, "I16": 2, "U16": 2, "F32": 4, "I32": 4, "U8": 1, "I8": 1, "BOOL": 1, "F64": 8, "I64": 8}

# codec and support of the codes, codec of the dictionary, atoms, group size, where the dictionary is
KINDS = {
    "0.self_attn.q_proj": ("bf16", "bitmask", "bf16", 13, None, None),
    "0.self_attn.k_proj": ("int8", "bitmask", "bf16", 13, 16, "0.self_attn.q_proj"),
    "0.self_attn.v_proj": ("int8", "bitmask", "int8", 10, 16, None),
    "0.self_attn.o_proj": ("int4", "2:4", "bf16", 12, 16, None),
    "0.mlp.gate_proj": ("bf14", "bitmask", "int4", 9, 16, None),
    "0.mlp.up_proj": ("int8", "dense", "int4", 9, 16, "0.mlp.gate_proj"),
    "0.mlp.down_proj": ("bf14", "2:4", "identity", 0, None, None),
    "1.self_attn.q_proj": ("bf16", "mixture", "int8", 2, 16, None),
    "1.self_attn.k_proj": ("trellis3", "dense", "identity", 0, None, None),  # with a mixture added
    "1.self_attn.v_proj": ("uint3", "dense", "diagonal", 0, 9, None),
    "1.self_attn.o_proj": ("bf16", "bitmask", "identity", 0, None, None),
    "1.mlp.gate_proj": ("bf16", "dense", "bf14", 7, None, None),
    "1.mlp.up_proj": ("int3", "bitmask", "int6", 18, 3, None),
    "1.mlp.down_proj": ("ectcq256", "dense", "identity", 0, None, None),
}
SIZES = {"hidden_size": 36, "intermediate_size": 28, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"num_key_value_heads": 1, "head_dim": 16, "vocab_size": 40, "max_position_embeddings": 32}
# the folders that are damaged: name, bytes of a weight file, bits of the embedding and who rounds it
SEEDS = [("one", 2**30, 16, "rtn"), ("three", 12_000, 6, "rtn"), ("coded", 2**30, 4.5, "ectcq")]


def make_seeds(root: Path) -> None:
    """The sound folders that are damaged, and their base and codes."""
    import safetensors.numpy
    import torch
    from format_writer import random_matrix, write_head
    from transformers import AutoConfig, AutoModelForCausalLM

    from cospadi.checkpoint import assemble

    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **SIZES, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(root / "base")
    tensors, specs = {}, {}
    for short, (codec, support, dictionary, k, group_size, owner) in KINDS.items():
        name = f"model.layers.{short}"
        draw = np.random.default_rng([0, zlib.crc32(name.encode())])  # the same whatever else there is
        d_out, d_in = model.get_parameter(f"{name}.weight").shape
        owner = None if owner is None else f"model.layers.{owner}"
        made, specs[name] = random_matrix(
            draw, d_in, d_out, k, codec, support, dictionary, name, owner, group_size=group_size
        )
        tensors |= made
        if short == "1.self_attn.k_proj":
            made, part = random_matrix(draw, d_in, d_out, 2, "bf16", "mixture", "int4", f"{name}.plus.0")
            specs[name]["plus"] = [part]
            tensors |= made
    header = {"cospadi": json.dumps({"format_version": 1, "matrices": specs})}
    safetensors.numpy.save_file(tensors, root / "codes.safetensors", header)
    head = write_head(root / "base", root / "head.h5")
    for name, size, bits, method in SEEDS:
        how = {"embedding_bits": bits, "embedding_method": method, "head": head, "max_shard_bytes": size}
        assemble(root / "base", [root / "codes.safetensors"], root / name, variant={"ratio": 0.2}, **how)


class Folder:
    """A packed folder in memory, to be damaged and written."""

    def __init__(self, path: Path) -> None:
        self.config: Any = json.loads((path / "config.json").read_text())
        self.text: dict[str, bytes] = {}  # files whose bytes were damaged
        index = path / "model.safetensors.index.json"
        self.index: Any = json.loads(index.read_text()) if index.exists() else None
        self.files = {file.name: read_file(file) for file in sorted(path.glob("*.safetensors"))}
        self.packed = True  # whether the damage is to something that the independent reader knows of

    def names(self) -> list[tuple[str, str]]:
        """File and name of every tensor; those of packed matrices are half of what is drawn from it, or more."""
        return [(file, name) for file, (header, _) in self.files.items() for name in header if name != "__metadata__"]

    def write(self, path: Path) -> None:
        path.mkdir()
        (path / "config.json").write_bytes(self.text.get("config.json", json.dumps(self.config).encode()))
        if self.index is not None:
            name = "model.safetensors.index.json"
            (path / name).write_bytes(self.text.get(name, json.dumps(self.index).encode()))
        for name, content in self.files.items():
            write_file(path / name, *content)
            if name in self.text:
                (path / name).write_bytes(self.text[name])


def read_file(path: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Header and bytes of the tensors of a safetensors file."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    found = {}
    for name, entry in header.items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            found[name] = data[8 + length + first : 8 + length + last]
    return header, found


def write_file(path: Path, header: dict[str, Any], tensors: dict[str, bytes]) -> None:
    """Inverse of `read_file`; offsets follow from the bytes, but where the header's entry says ``"as it is"``."""
    out, at = {}, 0
    for name, entry in header.items():
        if isinstance(entry, dict) and name in tensors and not entry.get("as it is"):
            entry = {**entry, "data_offsets": [at, at + len(tensors[name])]}
        out[name] = (
            {key: value for key, value in entry.items() if key != "as it is"} if isinstance(entry, dict) else entry
        )
        at += len(tensors.get(name, b""))
    text = json.dumps(out).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(tensors[n] for n in header if n in tensors))


def paths_of(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Where every value inside a JSON value is."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield (*path, key)
        yield from paths_of(child, (*path, key))


def value_at(value: Any, path: tuple) -> Any:
    for key in path:
        value = value[key]
    return value


HOSTILE = [None, True, False, -1, 0, 1, 2, 3, 8, 64, 2**31, 2**63, 2**64, 10**30, -(10**30), 1.0, 64.0, 0.5, 1e308]
HOSTILE += [
    float("nan"),
    float("inf"),
    "",
    "bf16",
    "identity",
    "diagonal",
    "mixture",
    "dense",
    "2:4",
    "64",
    "x" * 300,
    "\0",
    "..",
    "a.b",
]
HOSTILE += [[], {}, [1], [[]], {"a": 1}, [None, None], [36, 36]]


def damage_json(draw: random.Random, root: Any, path: tuple) -> None:
    """Change what is at `path` inside a JSON value, or beside it."""
    parent, key = value_at(root, path[:-1]), path[-1]
    old = parent[key]
    kind = draw.randrange(8)
    if kind == 0:
        del parent[key]
    elif kind == 1 and isinstance(parent, dict):
        parent[draw.choice(["side", "extra", "plus", "group_size", "n_scales", "tensor", ""])] = draw.choice(HOSTILE)
    elif kind == 2:
        parent[key] = copy.deepcopy(value_at(root, draw.choice(list(paths_of(root)))))
    elif isinstance(old, int) and not isinstance(old, bool) and kind < 6:
        parent[key] = draw.choice(
            [old + 1, old - 1, 2 * old, -old, old // 2, float(old), str(old), old + 8, old * 2**32]
        )
    elif isinstance(old, str) and kind < 5:
        parent[key] = draw.choice(
            [
                old + "x",
                old[:-1],
                old.upper(),
                draw.choice(["int8", "int4", "int3", "uint3", "uint4", "bf16", "bf14", "float32"]),
            ]
        )
    else:
        parent[key] = copy.deepcopy(draw.choice(HOSTILE))


def damage_spec(draw: random.Random, folder: Folder) -> None:
    paths = [path for path in paths_of(folder.config) if path[0] == "quantization_config"]
    inner = [path for path in paths if len(path) > 3]
    damage_json(draw, folder.config, draw.choice(inner if draw.random() < 0.9 else paths))


def damage_model_config(draw: random.Random, folder: Folder) -> None:
    paths = [path for path in paths_of(folder.config) if path[0] != "quantization_config"]
    damage_json(draw, folder.config, draw.choice(paths))
    folder.packed = False


def damage_text(draw: random.Random, folder: Folder) -> None:
    names = ["config.json", *(["model.safetensors.index.json"] if folder.index is not None else [])]
    good = json.dumps(folder.config).encode()
    bad = [
        b"",
        b"[]",
        b"null",
        b"3",
        b'"x"',
        b"{",
        b"\xff\xfe",
        good[:-7],
        b"[" * 100_000,
        b'{"a": ' + b"9" * 5000 + b"}",
    ]
    folder.text[draw.choice(names)] = draw.choice(bad)


def damage_index(draw: random.Random, folder: Folder) -> None:
    if folder.index is None:
        folder.index = draw.choice([[], {"weight_map": {}}, {}])
    elif draw.random() < 0.3:
        folder.index["weight_map"] = draw.choice([[], None, {}, 3, "x", {"a": "b"}, {"a": "../one/model.safetensors"}])
    else:
        path = draw.choice([path for path in paths_of(folder.index) if path[0] == "weight_map"])
        folder.packed = len(path) == 1 or is_packed(folder, path[-1])
        files = list(folder.files)
        if len(path) == 2 and draw.random() < 0.5:
            folder.index["weight_map"][path[-1]] = draw.choice(files)
        else:
            damage_json(draw, folder.index, path)


def is_packed(folder: Folder, name: str) -> bool:
    return str(name).rsplit(".", 1)[-1] in ("values", "support", "scales", "dictionary", "dictionary_scales")


def draw_tensor(draw: random.Random, folder: Folder) -> tuple[str, str]:
    names = folder.names()
    packed = [pair for pair in names if is_packed(folder, pair[1])]
    file, name = draw.choice(packed if draw.random() < 0.9 else names)
    folder.packed = folder.packed and is_packed(folder, name)
    return file, name


def damage_header(draw: random.Random, folder: Folder) -> None:
    file, name = draw_tensor(draw, folder)
    header, _ = folder.files[file]
    entry = header[name]
    if draw.random() < 0.2:
        header["__metadata__"] = draw.choice([{}, {"format": "pt", "a": "b"}, {"format": "tf"}, {"format": 3}, [], "x"])
    else:
        entry["as it is"] = draw.random() < 0.5
        damage_json(draw, header, draw.choice([(name, key) for key in ("dtype", "shape", "data_offsets")]))


def damage_file(draw: random.Random, folder: Folder) -> None:
    file = draw.choice(list(folder.files))
    header, tensors = folder.files[file]
    with tempfile.TemporaryDirectory() as scratch:
        write_file(Path(scratch, file), header, tensors)
        data = bytearray(Path(scratch, file).read_bytes())
    kind = draw.randrange(5)
    if kind == 0:
        data = data[: draw.randrange(len(data))]
    elif kind == 1:
        data += bytes(draw.randrange(1, 40))
    elif kind == 2:
        data[:8] = draw.choice([0, 1, 7, 2**20, 2**40, 2**63, len(data)]).to_bytes(8, "little")
    elif kind == 3:
        length = int.from_bytes(data[:8], "little")
        data[draw.randrange(8, 8 + length)] = draw.randrange(256)
        folder.packed = False
    else:
        data = bytearray(draw.choice([b"", b"\0" * 8, b"{}", bytes(100)]))
    folder.text[file] = bytes(data)


def damage_tensors(draw: random.Random, folder: Folder) -> None:
    """Whole tensors: lost, renamed, doubled, of another dtype or shape; the file stays a sound one."""
    file, name = draw_tensor(draw, folder)
    header, tensors = folder.files[file]
    entry, shape = header[name], header[name]["shape"]
    width = WIDTHS[entry["dtype"]]
    kind = draw.randrange(6)
    if kind == 0:
        del header[name], tensors[name]
    elif kind == 1:
        new = draw.choice([f"{name}x", name.replace("layers.0", "layers.7"), name.rsplit(".", 1)[0] + ".weight"])
        folder.packed = folder.packed and "weight" not in new
        header[new], tensors[new] = header.pop(name), tensors.pop(name)
        name, old = new, name
        if folder.index is not None and draw.random() < 0.8:
            folder.index["weight_map"][new] = folder.index["weight_map"].pop(old, file)
    elif kind == 2:
        other = draw.choice(list(folder.files))
        new = draw.choice(
            [name, f"{name}_scales", name.rsplit(".", 1)[0] + ".bias", name.rsplit(".", 1)[0] + ".plus.3.values"]
        )
        if new.endswith(".bias"):
            folder.packed = False  # whether the model has one, its family knows
        folder.files[other][0].setdefault(new, copy.deepcopy(entry))
        folder.files[other][1].setdefault(new, tensors[name])
        if folder.index is not None and draw.random() < 0.8:
            folder.index["weight_map"].setdefault(new, other)
    elif kind == 3:
        entry["dtype"] = draw.choice([dtype for dtype, size in WIDTHS.items() if size == width])
    elif kind == 4:
        n = int(np.prod(shape))
        entry["shape"] = draw.choice([[n], [1, n], [*shape, 1], shape[::-1], [n, 1]])
    else:  # a row more or less, and the spec may go along
        step = draw.choice([-1, 1])
        row = len(tensors[name]) // max(1, shape[0] if shape else 1)
        if shape and shape[0] + step >= 0:
            entry["shape"] = [shape[0] + step, *shape[1:]]
            tensors[name] = (
                tensors[name][: max(0, len(tensors[name]) - row)] if step < 0 else tensors[name] + bytes(row)
            )
            matrix, _, part = name.rpartition(".")
            spec = folder.config["quantization_config"]["matrices"]
            spec = spec.get(matrix) if isinstance(spec, dict) else None
            key = {"values": "n_nonzero", "scales": "n_scales"}.get(part)
            if isinstance(spec, dict) and key and draw.random() < 0.7 and isinstance(spec.get("codes"), dict):
                spec["codes"][key] = entry["shape"][0]


def damage_bytes(draw: random.Random, folder: Folder) -> None:
    """Bits of one tensor; of a support more often than of another."""
    names = folder.names()
    supports = [pair for pair in names if pair[1].endswith(".support")]
    file, name = draw.choice(supports) if draw.random() < 0.5 and supports else draw_tensor(draw, folder)
    header, tensors = folder.files[file]
    data = bytearray(tensors[name])
    if not data:
        return
    kind = draw.randrange(4)
    if kind == 0:
        for _ in range(draw.choice([1, 1, 2, 20])):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif kind == 1:
        first = draw.randrange(len(data))
        last = min(len(data), first + draw.choice([1, 2, 8, 10**6]))
        data[first:last] = bytes([draw.choice([0, 0xFF, 0x44, 0x7F])]) * (last - first)
    elif kind == 2:  # NaN or infinity of bfloat16
        at = draw.randrange(max(1, len(data) // 2)) * 2
        data[at : at + 2] = draw.choice([b"\xc0\x7f", b"\x80\x7f", b"\x80\xff", b"\xff\xff"])[: len(data) - at]
    else:  # the bits behind the last number, atom or pair
        row = len(data) // max(1, header[name]["shape"][0]) if name.endswith("support") else len(data)
        data[row - 1] ^= 0x80
    tensors[name] = bytes(data)


DAMAGE: list[tuple[Callable[[random.Random, Folder], None], int]] = [
    (damage_spec, 10),
    (damage_bytes, 6),
    (damage_tensors, 6),
    (damage_header, 3),
    (damage_model_config, 2),
    (damage_index, 2),
    (damage_text, 1),
    (damage_file, 1),
]


def damaged(case: int, seeds: Path) -> tuple[Folder, str]:
    """The folder of a case, and what was done to it."""
    draw = random.Random(case)
    folder = Folder(seeds / draw.choice([name for name, *_ in SEEDS]))
    chosen = draw.choices(*zip(*DAMAGE, strict=True), k=draw.choice([1, 1, 1, 2]))
    done = []
    for damage in chosen:
        try:
            damage(draw, folder)
            done.append(damage.__name__)
        except (LookupError, TypeError, AttributeError, ValueError):  # what an earlier damage left has no such place
            done.append(f"{damage.__name__} (in vain)")
    return folder, ", ".join(done)


class Findings(list):
    """What is wrong with one case."""

    def note(self, kind: str, what: str) -> None:
        self.append({"kind": kind, "what": what[:600]})


def outcome(findings: Findings, who: str, allowed: tuple[type, ...], named: str, call: Callable[[], Any]) -> Any:
    """What a reader gives; None if it refused, in the right way or not."""
    try:
        return call()
    except Exception as error:
        if not isinstance(error, allowed):
            findings.note("error", f"{who}: {type(error).__name__}: {error}")
        elif named not in str(error):
            findings.note("error", f"{who} does not name {named!r}: {type(error).__name__}: {error}")
        return None


def check_folder(case: int, seeds: Path, scratch: Path) -> Findings:
    """One damaged folder through every reader."""
    from format_reader import Refused, read_checkpoint, read_matrix, read_tensors

    from cospadi.checkpoint import densify
    from cospadi.errors import CospadiError
    from cospadi.formats.factorization import unpack
    from cospadi.runtime.modeling_cospadi import CospadiForCausalLM

    findings = Findings()
    folder, done = damaged(case, seeds)
    path = scratch / f"case-{case}"
    folder.write(path)
    try:
        try:
            expected, why = read_checkpoint(path), ""
        except Refused as error:
            expected, why = None, str(error)
        model = outcome(
            findings, "loader", (OSError, ValueError), path.name, lambda: CospadiForCausalLM.from_pretrained(path)
        )
        dense = path.parent / f"{path.name}-dense"
        densified = outcome(findings, "densify", (CospadiError,), path.name, lambda: densify(path, dense) or True)
        accepted = {"loader": model is not None, "densify": densified is not None}
        if folder.packed or expected is None:
            accepted["independent reader"] = expected is not None
        if len(set(accepted.values())) > 1 and not any(finding["kind"] == "error" for finding in findings):
            findings.note("disagreement", f"{accepted} {why}")
        if expected is not None and model is not None:
            compare_products(findings, model, expected)
        if expected is not None and densified:
            compare_dense(findings, dense, expected)
        # matrix by matrix, whatever the rest of the folder is
        try:
            specs = folder.config["quantization_config"]["matrices"].items()
            tensors = read_tensors(path)
        except (Exception, Refused):
            specs = ()
        for name, spec in specs:
            try:
                weight = read_matrix(tensors, name, spec)
            except Refused:
                weight = None
            before = len(findings)
            factors = outcome(
                findings, "unpack", (CospadiError,), name, lambda name=name, spec=spec: unpack(tensors, spec, name)
            )
            if (factors is None) != (weight is None) and len(findings) == before:
                findings.note("disagreement", f"unpack of {name}: {factors is not None}, reader: {weight is not None}")
            elif factors is not None and not near(factors.reconstruct(), weight, size_of(factors)):
                findings.note("wrong", f"unpack of {name}")
        left = [file.name for file in scratch.iterdir() if file.name not in (path.name, dense.name)]
        if left or (densified is None and dense.exists()):
            findings.note("error", f"left behind: {left}")
    finally:
        for left in scratch.iterdir():
            shutil.rmtree(left, ignore_errors=True)
    for finding in findings:
        finding["what"] = f"[{done}] {finding['what']}"
    return findings


def near(found: np.ndarray, expected: np.ndarray, size: np.ndarray) -> bool:
    """Equal up to float32 rounding of sums of that size; where those overflow, anything is."""
    with np.errstate(all="ignore"):
        limit = 1e-5 * np.asarray(size, np.float64) + 1e-30
        error = np.abs(np.asarray(found, np.float64) - np.asarray(expected, np.float64))
        return bool(((error <= limit) | ~np.isfinite(limit) | (limit > 1e30)).all())


def size_of(factors: Any) -> np.ndarray:
    """``|D| |S|``, the sum of the parts'."""
    from dataclasses import replace

    with np.errstate(all="ignore"):
        parts = [replace(part, plus=()) for part in (factors, *factors.plus)]
        absolute = [
            replace(
                part,
                codes=np.abs(part.codes).astype(np.float64),
                dictionary=None if part.dictionary is None else np.abs(part.dictionary).astype(np.float64),
            )
            for part in parts
        ]
        return sum(part.reconstruct() for part in absolute)


def compare_products(findings: Findings, model: Any, expected: dict[str, np.ndarray]) -> None:
    """Products of every layer by the kernel for few and many rows, and by plain torch, with the reader's weights."""
    import torch

    from cospadi.runtime import cospadi_products

    kernel = cospadi_products.kernel
    with torch.no_grad(), np.errstate(all="ignore"):
        for name, weight in expected.items():
            layer = model.get_submodule(name)
            if name == "model.embed_tokens":
                found = layer(torch.arange(weight.shape[1]))
                rounded = 1 if found.dtype == torch.float32 else 2**10  # config.json may say another dtype
                if not near(found.float().numpy().T, weight, rounded * np.abs(weight)):
                    findings.note("wrong", "rows of the embedding")
                continue
            rows = torch.eye(len(weight))
            bias = 0 if layer.bias is None else layer.bias.float()
            size = sum(
                (lambda atoms, codes, layer=part: mixed(layer, atoms, codes))(*part.factors(torch.float64))
                for part in (layer, *getattr(layer, "plus", ()))
            )
            found = {}
            for way, function in (("torch", lambda: None), ("kernel", kernel)):
                cospadi_products.kernel = function
                try:
                    found[f"{way}, many rows"] = layer(rows) - bias
                    pieces = [layer(piece.clone()) - bias for piece in rows.split(3)]
                    found[f"{way}, few rows"] = torch.cat(pieces)
                except Exception as error:
                    findings.note("error", f"product of {name} by {way}: {type(error).__name__}: {error}")
                finally:
                    cospadi_products.kernel = kernel
            for way, product in found.items():
                if not near(product.numpy(), weight, size.numpy()):
                    findings.note("wrong", f"product of {name} by {way}")


def mixed(layer: Any, atoms: Any, codes: Any) -> Any:
    """``|D| |S|`` of one part, float64 (d_in, d_out)."""
    if layer.spec["codes"]["support"] == "mixture":
        return (atoms.abs().reshape(len(atoms), len(codes), -1) * codes.abs()[None, :, None]).sum(1)
    return codes.abs().T if atoms is None else atoms.abs() @ codes.abs().T


def compare_dense(findings: Findings, dense: Path, expected: dict[str, np.ndarray]) -> None:
    from cospadi.files import ModelFolder

    folder = ModelFolder(dense)
    for name, weight in expected.items():
        found = folder.read(f"{name}.weight").astype(np.float64).T
        # of a sum of large terms that cancel only the loader's comparison knows the size
        scale = np.abs(weight).max(initial=0) + 1e-30
        rounding = {"BF16": 2**-7, "F16": 2**-9}.get(
            folder.file_of(f"{name}.weight").entries[f"{name}.weight"]["dtype"], 1e-4
        )
        with np.errstate(all="ignore"):
            if np.isfinite(scale) and scale < 1e4 and np.abs(found - weight).max(initial=0) > rounding * max(scale, 1):
                findings.note("wrong", f"dense weight of {name}")


def check_codes(case: int, seeds: Path, scratch: Path) -> Findings:
    """A damaged codes file through `assemble`; what it accepts is a sound folder."""
    from format_reader import Refused, read_checkpoint

    from cospadi.checkpoint import assemble
    from cospadi.errors import CospadiError

    findings = Findings()
    folder, done = damaged(case, seeds)
    header, tensors = {}, {}
    for file_header, file_tensors in folder.files.values():
        for name in file_tensors:
            if is_packed(folder, name):
                header[name], tensors[name] = file_header[name], file_tensors[name]
    try:
        matrices = folder.config["quantization_config"]["matrices"]
    except (LookupError, TypeError):
        matrices = None
    header = {"__metadata__": {"cospadi": json.dumps({"format_version": 1, "matrices": matrices})}, **header}
    codes = scratch / f"codes-{case}.safetensors"
    write_file(codes, header, tensors)
    output = scratch / "packed"
    made = outcome(
        findings, "assemble", (CospadiError,), "", lambda: assemble(seeds / "base", [codes], output, variant={}) or True
    )
    if made:
        try:
            read_checkpoint(output)
        except Refused as error:
            findings.note("disagreement", f"assemble wrote what the independent reader refuses: {error}")
    elif output.exists():
        findings.note("error", "assemble left a folder behind")
    for left in scratch.iterdir():
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    for finding in findings:
        finding["what"] = f"[{done}] {finding['what']}"
    return findings


def check_run_config(case: int, seeds: Path, scratch: Path) -> Findings:
    """A damaged run config through `check_config`, ten times."""
    from cospadi.config import check_config
    from cospadi.errors import ConfigError

    findings = Findings()
    draw = random.Random(case)
    for _ in range(10):
        config = yaml.safe_load((HERE.parents[1] / "config.yaml").read_text())
        path = draw.choice(list(paths_of(config)))
        damage_json(draw, config, path)
        if draw.random() < 0.3:
            damage_json(draw, config, draw.choice(list(paths_of(config))))
        before = len(findings)
        outcome(findings, "check_config", (ConfigError,), "", lambda config=config: check_config(config))
        for finding in findings[before:]:
            finding["what"] = f"[{'.'.join(map(str, path))}] {finding['what']}"
    return findings


CHECKS = [check_folder] * 8 + [check_codes] * 2 + [check_run_config]


def run_cases(seeds: Path, first: int, last: int, report: Path) -> None:
    """In a process of its own: a line a case, written before and after it."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process, whatever hangs
    if "libasan" not in os.environ.get("LD_PRELOAD", ""):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity(50)
    transformers.utils.logging.disable_progress_bar()
    if "libasan" in os.environ.get("LD_PRELOAD", ""):
        from cospadi.runtime import cospadi_compiler

        for flags in cospadi_compiler.FLAGS.values():
            flags += ["-fsanitize=address", "-g"]
    with open(report, "a") as lines, tempfile.TemporaryDirectory() as scratch:
        for case in range(first, last):
            lines.write(json.dumps({"case": case}) + "\n")
            lines.flush()
            signal.setitimer(signal.ITIMER_PROF, SECONDS_A_CASE)
            check = CHECKS[random.Random(-case - 1).randrange(len(CHECKS))]
            findings = check(case, seeds, Path(scratch))
            signal.setitimer(signal.ITIMER_PROF, 0)
            lines.write(json.dumps({"case": case, "done": True, "findings": findings}) + "\n")
            lines.flush()


def sanitizer() -> str | None:
    """What to load first for gcc's AddressSanitizer; None where there is none."""
    compiler = shutil.which("gcc")
    if compiler is None:
        return None
    paths = []
    for name in ("libasan.so", "libstdc++.so.6"):  # the latter, because the former looks for exceptions of C++ at once
        found = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=False)
        paths.append(Path(found.stdout.strip()))
    return " ".join(map(str, paths)) if all(path.is_absolute() and path.exists() for path in paths) else None


def fuzz(
    root: Path, first: int, cases: int, *, seconds: float = float("inf"), asan: bool = False, batch: int = 150
) -> tuple[int, list[dict[str, Any]]]:
    """Run cases from `first` on; how many there were, and the findings."""
    seeds = root / "seeds"
    if not seeds.exists():
        seeds.mkdir(parents=True)
        make_seeds(seeds)
    # Python's small objects stay out of the sanitizer's way; torch's leaks are not ours
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(root / "cache")}
    if asan:
        environment |= {"LD_PRELOAD": sanitizer(), "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1"}
    findings: list[dict[str, Any]] = []
    start, at, last = time.monotonic(), first, first + cases
    while at < last and time.monotonic() - start < seconds:
        report = root / f"report-{at}.jsonl"
        report.unlink(missing_ok=True)
        command = [
            sys.executable,
            str(Path(__file__).resolve()),
            "--child",
            str(seeds),
            str(at),
            str(min(last, at + batch)),
        ]
        done = subprocess.run(
            [*command, str(report)],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        lines = [json.loads(line) for line in report.read_text().splitlines()] if report.exists() else []
        if not lines:
            raise RuntimeError(f"the process of the cases did not start: {done.stderr[-3000:]}")
        for line in lines:
            findings += [{"case": line["case"], **finding} for finding in line.get("findings", ())]
        at = lines[-1]["case"] + 1
        if "done" not in lines[-1]:
            kind = "hang" if done.returncode == -signal.SIGPROF else "crash"
            findings.append({"case": at - 1, "kind": kind, "what": f"exit {done.returncode} {done.stderr[-1500:]}"})
    return at - first, findings


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--minutes", type=float, help="go on for so long, whatever the number of cases")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--asan", action="store_true", help="the kernel under AddressSanitizer, if gcc has it")
    parser.add_argument("--every", action="store_true", help="print every finding, not three of a kind")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        seeds, first, last, report = options.child
        run_cases(Path(seeds), int(first), int(last), Path(report))
        return 0
    asan = options.asan and sanitizer() is not None
    if options.asan and not asan:
        print("without AddressSanitizer: gcc has none here")
    with tempfile.TemporaryDirectory() as root:
        cases = 10**9 if options.minutes else options.cases
        seconds = 60 * options.minutes if options.minutes else float("inf")
        n, findings = fuzz(Path(root), options.first, cases, seconds=seconds, asan=asan)
    kinds = Counter(finding["kind"] for finding in findings)
    shown: Counter[str] = Counter()
    for finding in findings:
        shown[finding["kind"]] += 1
        if options.every or shown[finding["kind"]] <= 3:
            print(f"case {finding['case']}: {finding['kind']}: {finding['what']}")
    bad = len({finding["case"] for finding in findings})
    print(f"{n} cases from {options.first}, {bad} of them with findings: {dict(kinds) or 'none'}")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
