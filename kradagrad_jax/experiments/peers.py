"""Optimizers of other packages, imported on use.

An attribute that cannot be had raises the error of the package's own import.
"""

import contextlib
import functools
import importlib
import io
from collections.abc import Callable
from typing import Any

import optax

_SOURCES = {
    "psgdax_kron": ("psgdax", "kron"),
    "distributed_kron": ("distributed_kron", "kron"),
    "psgd_jax_kron": ("psgd_jax.kron", "kron"),
}


def _quiet(function: Callable[..., optax.GradientTransformation]) -> Callable[..., Any]:
    """The same optimizer without what its ``init`` prints."""

    @functools.wraps(function)
    def build(learning_rate: Any, **options: Any) -> optax.GradientTransformationExtraArgs:
        tx = optax.with_extra_args_support(function(learning_rate, **options))

        def init(params: Any) -> Any:
            with contextlib.redirect_stdout(io.StringIO()):
                return tx.init(params)

        return optax.GradientTransformationExtraArgs(init, tx.update)

    return build


def __getattr__(name: str) -> Callable[..., Any]:
    if name not in _SOURCES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    module, attribute = _SOURCES[name]
    return _quiet(getattr(importlib.import_module(module), attribute))
