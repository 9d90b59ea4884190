"""The formats of numbers and positions that this code knows: a line each, in the order in which messages name them.

Whatever is not here is refused by name. The compiled kernels know some of them; plain torch computes with the others.
"""

from __future__ import annotations

from .cospadi_bf14 import Bf14
from .cospadi_diagonal import Diagonal
from .cospadi_entropy import CODES, Entropy
from .cospadi_integers import WIDTHS, Integers, Shifted
from .cospadi_supports import Bitmask, Dense, Mixture, Pairs, Support
from .cospadi_trellis import Trellis
from .cospadi_values import Bf16, Codec, Float32

# whose numbers follow no code, or one of so many states
_STREAMS = {"ec": None, "ectcq": CODES[8], "ectcq256": CODES[256]}

CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (
        Bf16(),
        Bf14(),
        Diagonal(),
        *(Integers(bits) for bits in WIDTHS),
        *(Shifted(bits) for bits in WIDTHS),
        *(Entropy(name, code) for name, code in _STREAMS.items()),
        *(Entropy(f"{name}_scaled", code, scaled=True) for name, code in _STREAMS.items()),
        *(Trellis(bits) for bits in (4, 3, 2)),
    )
}

# of the files between learning and packing, which are no checkpoints
FACTOR_CODECS: dict[str, Codec] = {**CODECS, Float32.name: Float32()}

SUPPORTS: dict[str, Support] = {
    support.name: support
    for support in (
        Bitmask(),
        Dense(),
        Pairs(),  # 2:4
        Mixture(),
    )
}
