"""Packed folders of every family, made once a session from codes files written by hand."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the reader and writer of these tests


@dataclass(frozen=True)
class Packed:
    """Folders of one model: as it was, its codes, packed, and dense again."""

    base: Path
    codes: Path
    packed: Path
    dense: Path


@pytest.fixture(scope="session")
def packed_model(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Packed]:
    """Factory ``packed_model(family, *, dtype="float32") -> Packed``; never write into its folders."""
    from format_writer import PACKINGS, matrices_of, write_codes

    from cospadi.checkpoint import assemble, densify

    made: dict[tuple[str, str], Packed] = {}

    def make(family: str, *, dtype: str = "float32") -> Packed:
        if (family, dtype) not in made:
            base = tiny_model(family, dtype=dtype)
            shapes = matrices_of(base)
            if family == "gemma3_text":
                shapes = {name: shape for name, shape in shapes.items() if "layers.3" not in name}
            root = tmp_path_factory.mktemp(f"{family}-{dtype}")
            folders = Packed(base, root / "all.codes.safetensors", root / f"{family}-packed", root / f"{family}-dense")
            write_codes(folders.codes, shapes, **PACKINGS[family])
            assemble(
                base,
                [folders.codes],
                folders.packed,
                variant={"method": "by hand"},
                card={"word perplexity": 12.5},
                max_shard_bytes=100_000 if family == "llama" else 2**30,
            )
            densify(folders.packed, folders.dense)
            made[family, dtype] = folders
        return made[family, dtype]

    return make
