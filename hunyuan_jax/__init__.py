"""Hunyuan-Large in JAX: train it, convert its weights, run it.

Nothing heavy is imported until it is used, so that configuration errors are answered at once.
"""

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["Sampling", "from_pretrained", "load", "presets"]

_LAZY = {
    "Sampling": "hunyuan_jax.infer.settings",
    "from_pretrained": "hunyuan_jax.infer.pretrained",
    "load": "hunyuan_jax.infer.text",
    "presets": None,
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'hunyuan_jax' has no attribute {name!r}")
    module = _LAZY[name]
    return (
        importlib.import_module(f"hunyuan_jax.{name}")
        if module is None
        else getattr(importlib.import_module(module), name)
    )


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
