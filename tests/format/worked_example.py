"""The worked example of docs/format.md; run as a script to write it there again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from format_reader import read_matrix

from cospadi.formats.factorization import Factorization

BEGIN = "<!-- worked example: begin -->\n"
END = "<!-- worked example: end -->"


def worked_example() -> str:
    """Every byte of one matrix of shape (3, 4) with 10 atoms, with every value codec."""
    dictionary = np.zeros((3, 10), np.float32)
    dictionary[:, 0], dictionary[:, 8], dictionary[:, 9] = [1, 0, 0], [0, 1, 0.5], [-2, 0, 0.25]
    codes = np.zeros((10, 4), np.float32)
    codes[0, 0], codes[9, 0] = 1.0, -0.5
    codes[8, 1] = 3.0
    codes[0, 3], codes[8, 3], codes[9, 3] = 1.375, 1 / 3, -40.0
    lines = []
    for codec in ("bf16", "bf14", "int8", "int4"):
        rounding = "truncate" if codec.startswith("bf") else "nearest"
        made = Factorization(dictionary, codes, value_codec=codec, rounding=rounding)
        tensors, spec = made.pack("m")
        lines += [f"With `codec` `{codec}` the spec is", "", "```json", json.dumps(spec), "```", ""]
        lines += ["| tensor | dtype, shape | bytes (hex) |", "|---|---|---|"]
        for name, tensor in tensors.items():
            if codec != "bf16" and name not in ("m.values", "m.scales"):
                continue
            data = tensor.tobytes().hex(" ")
            kind = {"bfloat16": "BF16", "uint8": "U8", "int8": "I8"}[tensor.dtype.name]
            lines.append(f"| `{name}` | {kind} {tuple(tensor.shape)} | `{data}` |")
        weight = read_matrix({name: np.asarray(tensor) for name, tensor in tensors.items()}, "m", spec)
        rows = ", ".join("[" + ", ".join(f"{value:g}" for value in row) + "]" for row in weight)
        stored = made.quantized()
        values = ", ".join(f"{value:g}" for value in stored.codes.T[stored.mask.T])
        lines += ["", f"Values: {values}. `W = D S` = [{rows}].", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    path = Path(__file__).parents[2] / "docs" / "format.md"
    head, _, rest = path.read_text().partition(BEGIN)
    path.write_text(f"{head}{BEGIN}{worked_example()}{END}{rest.partition(END)[2]}")
