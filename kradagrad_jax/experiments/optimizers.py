"""The registry of optimizers. A new one is one more :func:`register` line at the end."""

import importlib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import optax

from kradagrad_jax.experiments.names import UsageError, check_keys, lookup

# Options that are config objects of the package: a table in a TOML file becomes one of these.
_CONFIG_OBJECTS = {
    "layout": "Layout",
    "timing": "Timing",
    "graft": "Graft",
    "statistics": "SquareRoot",
}


class Optimizer(NamedTuple):
    """An entry of the registry.

    Attributes:
      target: ``"module:function"``, imported on use, or the function itself; called as
        ``function(learning_rate, **options)``.
      summary: one line for ``kradagrad-jax list``.
      defaults: options that make the entry what its name says; configs may override them.
    """

    target: str | Callable[..., optax.GradientTransformation]
    summary: str
    defaults: dict[str, Any]


OPTIMIZERS: dict[str, Optimizer] = {}


def register(
    name: str,
    target: str | Callable[..., optax.GradientTransformation],
    summary: str,
    **defaults: Any,
) -> None:
    """Adds an optimizer to the registry under ``name``."""
    OPTIMIZERS[name] = Optimizer(target, summary, defaults)


def _function(name: str) -> Callable[..., optax.GradientTransformation]:
    target = lookup(OPTIMIZERS, name, "optimizer").target
    if callable(target):
        return target
    module, attribute = target.split(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"optimizer '{name}' needs {module}.{attribute}: {error}") from error


def _config_object(option: str, value: Any) -> Any:
    if option not in _CONFIG_OBJECTS or not isinstance(value, dict):
        return value
    kind = getattr(importlib.import_module("kradagrad_jax"), _CONFIG_OBJECTS[option])
    check_keys(value, inspect.signature(kind).parameters, f"option '{option}'")
    return kind(**value)


def resolve(name: str, options: dict[str, Any]) -> Callable[[Any], optax.GradientTransformation]:
    """The optimizer as a function of its learning rate (a float, a tracer or a schedule).

    Args:
      name: key of the registry.
      options: override the entry's defaults; dicts become ``Layout``, ``Timing``, ``Graft`` or
        ``SquareRoot`` where the option is one.

    Raises:
      UsageError: unknown name or option, naming the closest known one.
    """
    function = _function(name)
    parameters = inspect.signature(function).parameters
    merged = lookup(OPTIMIZERS, name, "optimizer").defaults | options
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        check_keys(merged, list(parameters)[1:], f"optimizer '{name}'")
    arguments = {option: _config_object(option, value) for option, value in merged.items()}
    return lambda learning_rate: function(learning_rate, **arguments)


register("sgd", "optax:sgd", "SGD with heavy-ball momentum 0.9", momentum=0.9)
register("adamw", "optax:adamw", "Adam with decoupled weight decay")
register("muon", "optax.contrib:muon", "Muon on matrices, AdamW on the rest")
register("shampoo", "kradagrad_jax:shampoo", "Shampoo, Gram statistics, roots by eigh")
register(
    "shampoo_newton", "kradagrad_jax:shampoo", "Shampoo, roots by matrix products", root="newton"
)
register(
    "shampoo_sqrt",
    "kradagrad_jax:shampoo",
    "Shampoo, square-root statistics: float64 quality in float32",
    statistics="square_root",
)
register("kradagrad_star", "kradagrad_jax:kradagrad_star", "KrADagrad*: positive roots only")
register("kradagrad", "kradagrad_jax:kradagrad", "KrADagrad: one factor updated per step")
