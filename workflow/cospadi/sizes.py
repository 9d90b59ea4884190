"""Numbers of bytes, as people write them."""

from __future__ import annotations

import math
import re

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def nbytes_of(text: str) -> int:
    """Bytes of ``96MB``, ``1.5 GiB`` and the like, as the config's schema allows them; rounded down."""
    number, unit = re.fullmatch(r"([0-9.]+) ?([A-Za-z]+)", text).groups()
    return math.floor(float(number) * UNITS[unit])
