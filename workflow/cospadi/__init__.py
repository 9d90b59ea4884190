"""CoSpaDi Workflow: compress large language models after training, without training.

Importing this package registers its checkpoint format with transformers (as soon as that is imported), so
``AutoModelForCausalLM.from_pretrained(folder)`` loads a packed checkpoint without ``trust_remote_code``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    from cospadi.api import factorize
    from cospadi.checkpoint import verify
    from cospadi.formats.factorization import Factorization
    from cospadi.solvers.coding import dict_learning, sparse_encode

__version__ = "0.1.0"
__all__ = ["Factorization", "dict_learning", "factorize", "sparse_encode", "verify"]

# Loaded on first use: a stage pays only for what it needs
_LAZY = {
    "Factorization": "cospadi.formats.factorization",
    "dict_learning": "cospadi.solvers.coding",
    "factorize": "cospadi.api",
    "sparse_encode": "cospadi.solvers.coding",
    "verify": "cospadi.checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])


@wrapt.when_imported("transformers")
def _register_checkpoint_format(transformers: Any) -> None:
    # not from the modelling module, which may be what imports transformers
    from cospadi.runtime.configuration_cospadi import register

    register()
