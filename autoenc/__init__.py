"""Phase-by-phase hyperparameter sweeps for PyTorch autoencoders. Importing this loads neither torch nor ray."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autoenc.checkpoint import load_model
    from autoenc.config import load_config

__version__ = "0.1.0"
__all__ = ["load_config", "load_model"]


def __getattr__(name: str) -> Any:
    if name == "load_model":
        from autoenc.checkpoint import load_model
        return load_model
    if name == "load_config":
        from autoenc.config import load_config
        return load_config
    raise AttributeError(f"module 'autoenc' has no attribute {name!r}")
