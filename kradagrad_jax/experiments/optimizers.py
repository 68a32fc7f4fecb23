"""The registry of optimizers. A new one is one more :func:`register` line at the end."""

import dataclasses
import importlib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import optax

from kradagrad_jax.experiments.names import UsageError, check_keys, lookup
from kradagrad_jax.experiments.statistics import Capture

# Options that are config objects of the package: a table in a TOML file becomes one of these.
_CONFIG_OBJECTS = {
    "layout": "Layout",
    "timing": "Timing",
    "graft": "Graft",
    "statistics": "SquareRoot",
    "sketch": "Sketch",
    "online": "Online",
}


class Optimizer(NamedTuple):
    """An entry of the registry.

    Attributes:
      target: ``"module:function"``, imported on use, or the function itself; called as
        ``function(learning_rate, **options)``.
      summary: one line for ``kradagrad-jax list``.
      defaults: options that make the entry what its name says; configs may override them.
      capture: statistics beside the gradient; None: it needs none.
      package: PyPI's name of an optional package that it comes from; "" for what is always there.
    """

    target: str | Callable[..., optax.GradientTransformation]
    summary: str
    defaults: dict[str, Any]
    capture: Capture | None = None
    package: str = ""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """An optimizer but for its learning rate.

    Attributes:
      function: called as ``function(learning_rate, **options)``.
      options: its other arguments.
      capture: statistics beside the gradient, or None.
    """

    function: Callable[..., optax.GradientTransformation]
    options: dict[str, Any]
    capture: Capture | None = None

    @property
    def wants_spec(self) -> bool:
        """Whether it has to know the layers of the model."""
        return self.capture is not None and self.capture.kind == "layers"

    def __call__(self, learning_rate: Any, spec: Any = None) -> optax.GradientTransformation:
        """The optimizer for a learning rate (a float, a tracer or a schedule)."""
        layers = {"spec": spec} if self.wants_spec else {}
        return self.function(learning_rate, **layers, **self.options)


OPTIMIZERS: dict[str, Optimizer] = {}


def register(
    name: str,
    target: str | Callable[..., optax.GradientTransformation],
    summary: str,
    capture: Capture | None = None,
    package: str = "",
    **defaults: Any,
) -> None:
    """Adds an optimizer to the registry under ``name``."""
    OPTIMIZERS[name] = Optimizer(target, summary, defaults, capture, package)


def absent(name: str) -> str:
    """Why an optimizer of an optional package cannot be used here, in one line; "" if it can."""
    if not lookup(OPTIMIZERS, name, "optimizer").package:
        return ""
    try:
        _function(name)
    except UsageError as error:
        return str(error)
    return ""


def _function(name: str) -> Callable[..., optax.GradientTransformation]:
    entry = lookup(OPTIMIZERS, name, "optimizer")
    if callable(entry.target):
        return entry.target
    module, attribute = entry.target.split(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:
        # packages made for another jax fail in any way when they are imported
        if not (entry.package or isinstance(error, (ImportError, AttributeError))):
            raise
        needed = f"the package {entry.package}" if entry.package else f"{module}.{attribute}"
        raise UsageError(f"optimizer '{name}' needs {needed}: {error}") from error


def _config_object(option: str, value: Any) -> Any:
    if option not in _CONFIG_OBJECTS or not isinstance(value, dict):
        return value
    kind = getattr(importlib.import_module("kradagrad_jax"), _CONFIG_OBJECTS[option])
    check_keys(value, inspect.signature(kind).parameters, f"option '{option}'")
    return kind(**value)


def resolve(name: str, options: dict[str, Any]) -> Recipe:
    """The optimizer as a function of its learning rate.

    Args:
      name: key of the registry.
      options: override the entry's defaults; dicts become ``Layout``, ``Timing``, ``Graft``,
        ``SquareRoot``, ``Sketch`` or ``Online`` where the option is one. ``capture`` is a table of
        changes to the statistics that the entry takes (:class:`Capture`).

    Raises:
      UsageError: unknown name or option, naming the closest known one.
    """
    function, entry = _function(name), lookup(OPTIMIZERS, name, "optimizer")
    parameters = inspect.signature(function).parameters
    merged = entry.defaults | options
    capture = _capture(name, entry, merged.pop("capture", {}), merged.get("statistics_every"))
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        known = [p for p in list(parameters)[1:] if p != "spec"]
        check_keys(merged, known, f"optimizer '{name}'")
    arguments = {option: _config_object(option, value) for option, value in merged.items()}
    return Recipe(function, arguments, capture)


def _capture(name: str, entry: Optimizer, changes: dict[str, Any], every: Any) -> Capture | None:
    if entry.capture is None:
        if changes:
            raise UsageError(f"optimizer '{name}' takes no statistics beside the gradient")
        return None
    check_keys(changes, [f.name for f in dataclasses.fields(Capture)], f"capture of '{name}'")
    taken = dataclasses.replace(entry.capture, **changes)
    return dataclasses.replace(taken, every=every) if isinstance(every, int) else taken


register("sgd", "optax:sgd", "SGD with heavy-ball momentum 0.9", momentum=0.9)
register("adamw", "optax:adamw", "Adam with decoupled weight decay")
register(
    "sign_momentum", "optax:lion", "Sign of an average of gradients", b1=0.9, b2=0.9,
    weight_decay=0.0,
)  # fmt: skip
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
_FISHER, _ROWS = Capture("layers"), Capture("layers", reducer="raw")
register("kfac", "kradagrad_jax:kfac", "K-FAC, Fisher sampled from the model", _FISHER)
register(
    "kfac_sqrt", "kradagrad_jax:kfac", "K-FAC, square-root statistics", _ROWS,
    statistics="square_root",
)  # fmt: skip
register("rs_kfac", "kradagrad_jax:rs_kfac", "RS-KFAC: randomised low-rank factors", _FISHER)
register("sre_kfac", "kradagrad_jax:sre_kfac", "SRE-KFAC: with a symmetric sketch", _FISHER)
register("b_kfac", "kradagrad_jax:b_kfac", "B-KFAC: low-rank factors updated online", _ROWS)
register("br_kfac", "kradagrad_jax:br_kfac", "B-R-KFAC: with randomised SVDs", _ROWS)
register("bc_kfac", "kradagrad_jax:bc_kfac", "B-KFAC-C: with light corrections", _ROWS)
register("brc_kfac", "kradagrad_jax:brc_kfac", "B-R-KFAC-C: with both", _ROWS)
_EMPIRICAL = Capture("layers", fisher="empirical", reducer="raw")
register("ikfac", "kradagrad_jax:ikfac", "IKFAC: K-FAC's inverses by matrix products", _EMPIRICAL)
register("ingd", "kradagrad_jax:ingd", "INGD: inverse-free natural gradient", _EMPIRICAL)
register("singd", "kradagrad_jax:singd", "SINGD: INGD with structured factors", _EMPIRICAL)
register(
    "sirfshampoo", "kradagrad_jax:sirfshampoo", "SIRFShampoo: no root, no inverse", batch_size=100
)
_SAMPLES = Capture("samples")
register("tnt", "kradagrad_jax:tnt", "TNT: Fisher factors from sampled gradients", _SAMPLES)
register(
    "tnt_ef", "kradagrad_jax:tnt", "TNT-EF: the same of gradients alone",
    fisher="empirical", damping=1.0,
)  # fmt: skip
register("ginger", "kradagrad_jax:ginger", "Ginger: low-rank Gauss-Newton at linear cost", _SAMPLES)
_PEERS = "kradagrad_jax.experiments.peers"
register("psgd_kron", f"{_PEERS}:psgdax_kron", "PSGD, Kronecker factors", package="psgdax")
register(
    "distributed_kron", f"{_PEERS}:distributed_kron", "PSGD, Kronecker factors",
    package="distributed-kron",
)  # fmt: skip
register("psgd_jax_kron", f"{_PEERS}:psgd_jax_kron", "PSGD, Kronecker factors", package="psgd-jax")
