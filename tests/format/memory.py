"""Run in a process of its own: resident memory before and after loading a packed folder.

``python memory.py PACKED RESULT``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig

import cospadi  # noqa: F401 (registers the packed classes)
from cospadi.runtime.cospadi_linear import packed_layers


def memory(field: str) -> int:
    """A figure of this process in bytes: ``VmRSS`` now, ``VmHWM`` at its highest."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def main(folder: str, result: str) -> None:
    transformers.utils.logging.disable_progress_bar()
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    with torch.no_grad():
        # what loading and computing import is there before the memory is measured
        AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=8, **small))(torch.zeros(1, 2, dtype=torch.long))
        imported = memory("VmRSS")
        model = AutoModelForCausalLM.from_pretrained(folder)
        loaded = memory("VmRSS")
        model(torch.randint(3, 390, (1, 40)))
    figures = {
        "imported": imported,
        "loaded": loaded,
        "peak": memory("VmHWM"),
        "file_bytes": sum(path.stat().st_size for path in Path(folder).glob("*.safetensors")),
        "dense_bytes": sum(4 * m.in_features * m.out_features for m in packed_layers(model).values()),
    }
    Path(result).write_text(json.dumps(figures))


if __name__ == "__main__":
    main(*sys.argv[1:])
