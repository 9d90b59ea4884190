"""Methods: what a variant of the config calls ``method``.

A method turns one weight and its whitening into a `Factorization` within a ratio. Adding one means one module
in this folder and one line in `METHODS`; its options appear in the config's schema and documentation by themselves.
"""

from __future__ import annotations

from cospadi.methods import basis_sharing, compot, cospadi, masa, svd_llm
from cospadi.methods.base import Method

METHODS: dict[str, Method] = {
    method.name: method for method in (cospadi.METHOD, svd_llm.METHOD, compot.METHOD, basis_sharing.METHOD, masa.METHOD)
}

__all__ = ["METHODS", "Method"]
