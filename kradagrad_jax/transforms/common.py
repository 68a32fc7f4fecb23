"""What the transformations share: defaults, exponents, and the arguments that go to the engine."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import optax

from kradagrad_jax.engine import Graft, Layout, Timing, as_graft, scale_by_blocks
from kradagrad_jax.engine.layout import factored_modes
from kradagrad_jax.factors import BlockMethod
from kradagrad_jax.factors.numbers import is_number
from kradagrad_jax.transforms.ranges import check

ONE_SIDED = ("one_sided", "shorter", "longer", "input", "output")
LIBRARY_LAYOUT = Layout()
PUBLISHED_LAYOUT = Layout(
    block_size=128, merge="none", pieces="tail", vectors="block", max_dim=None, state_limit=None,
    biases=None,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Modes:
    """A ``Layout.modes`` that asks another one first, then the exponents.

    Attributes:
      layout: what it says of a parameter goes before.
      name: what counts where it says nothing; None: exponents that are not zero.
      kept: (number of modes, which of them have an exponent that is not zero).
    """

    layout: Layout
    name: str | None
    kept: tuple[tuple[int, tuple[bool, ...]], ...]

    @property
    def rules(self) -> Any:
        """What the patterns are checked in."""
        return self.layout.modes

    def __call__(self, path: str, shape: tuple[int, ...]) -> Any:
        said, kept = factored_modes(self.layout, path, shape), dict(self.kept).get(len(shape))
        if said is None or kept is None:
            return said or self.name or kept
        return tuple(a and b for a, b in zip(said, kept, strict=True))


def per_mode(exponent: Any, layout: Layout) -> tuple[Any, Layout]:
    """Splits an exponent into that of the factors and a layout without those of exponent 0.

    Args:
      exponent: None, a number, a tuple with one per mode, a mapping from the number of modes to
        either, or one of :data:`ONE_SIDED`.
      layout: that of the transformation; what it says of ``modes`` goes before a name.

    Returns:
      The exponent of the modes that have a factor, and the layout.

    Raises:
      ValueError: an unknown name, or 0 for all.
    """
    if isinstance(exponent, str):
        check("exponent", exponent, ONE_SIDED)
        name = "shorter" if exponent == "one_sided" else exponent
        return None, dataclasses.replace(layout, modes=Modes(layout, name, ()))
    if is_number(exponent, 0):
        raise ValueError("exponent=0 leaves no mode with a factor; leave it out for the default")
    orders = exponent if isinstance(exponent, Mapping) else {}
    if isinstance(exponent, (tuple, list)):
        orders = {len(exponent): tuple(exponent)}
    given = {k: e if isinstance(e, (tuple, list)) else (e,) * k for k, e in orders.items()}
    kept = {k: tuple(not is_number(x, 0) for x in e) for k, e in given.items()}
    kept = tuple((k, own) for k, own in sorted(kept.items()) if not all(own))
    if not kept:
        return exponent, layout
    return exponent, dataclasses.replace(layout, modes=Modes(layout, None, kept))


def diagonal_fallback(graft: Graft, fallback: Any) -> Any:
    """``"diagonal"`` spelled out: the graft's own direction, or AdaGrad's where it has none."""
    if fallback != "diagonal":
        return fallback
    return graft if graft.adaptive else Graft("adagrad")


_ENGINE = (
    "layout", "timing", "sharding", "refresh_every", "statistics_every", "refresh", "graft",
    "fallback", "beta1", "average", "factor_dtype", "mu_dtype", "approx", "joint_bias",
)  # fmt: skip


def engine_arguments(chosen: dict[str, Any]) -> dict[str, Any]:
    """The engine's arguments (of blocks or of layers) among the chosen ones, in its form."""
    own = {name: chosen[name] for name in _ENGINE if name in chosen}
    if "graft" in own:
        own["graft"] = as_graft(own["graft"])
        own["fallback"] = diagonal_fallback(own["graft"], own["fallback"])
    return own


def build(method: BlockMethod, chosen: dict[str, Any]) -> optax.GradientTransformationExtraArgs:
    """Hands a block method and the engine's share of the arguments to the engine."""
    return scale_by_blocks(method, **engine_arguments(chosen))


BLOCK_DEFAULTS: dict[str, Any] = {
    "refresh_every": 10,
    "statistics_every": 1,
    "timing": Timing(),
    "layout": LIBRARY_LAYOUT,
    "fallback": "diagonal",
    "sharding": None,
    "factor_dtype": None,
    "mu_dtype": None,
}
LAYER_DEFAULTS: dict[str, Any] = {
    "approx": "expand",
    "joint_bias": True,
    "graft": "none",
    "refresh_every": 10,
    "statistics_every": 1,
    "timing": Timing(),
    "fallback": "adam",
    "sharding": None,
    "factor_dtype": None,
}
