"""Every alias at its default preset, on two non-square layers whose statistics are made by hand.

One array of rows per step holds layer inputs, output gradients, and output gradients at drawn
labels; gradients and curvature are products of them, so that no model has to run. Aliases are found
in the package: a new one is in all tests that run over these.
"""

import dataclasses
import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kradagrad_jax as kj
from kradagrad_jax import curvature
from kradagrad_jax.curvature.samples import Samples

ROWS = 4
SHAPES = {"one": (7, 5), "two": (5, 3)}
WIDTH = sum(m + n for m, n in SHAPES.values())  # of inputs and output gradients
DRAWN = sum(n for _, n in SHAPES.values())
NAMES = sorted(
    name.removeprefix("scale_by_")
    for name in dir(kj)
    if name.startswith("scale_by_") and name not in ("scale_by_blocks", "scale_by_layers")
)
Tree = Any


def params(dtype: Any = jnp.float32) -> Tree:
    rng = np.random.default_rng(0)
    return {
        name: {
            "kernel": jnp.asarray(rng.normal(size=(m, n)), dtype),
            "bias": jnp.asarray(rng.normal(size=n), dtype),
        }
        for name, (m, n) in SHAPES.items()
    }


@functools.cache
def spec() -> curvature.CaptureSpec:
    """Of the two layers; online low-rank methods want the number of rows."""
    layers = [
        curvature.Layer.dense(f"{name}/kernel", shape, bias=f"{name}/bias")
        for name, shape in SHAPES.items()
    ]
    return dataclasses.replace(curvature.CaptureSpec.from_layers(layers), examples=ROWS)


def _cut(rows: jax.Array) -> dict[str, tuple[jax.Array, jax.Array, jax.Array]]:
    """Per layer inputs, output gradients and drawn output gradients, divided by the root of n."""
    sizes = [s for shape in SHAPES.values() for s in shape] + [n for _, n in SHAPES.values()]
    parts = jnp.split(rows / ROWS**0.5, np.cumsum(sizes)[:-1].tolist(), axis=1)
    k = 2 * len(SHAPES)
    return {name: (parts[2 * i], parts[2 * i + 1], parts[k + i]) for i, name in enumerate(SHAPES)}


def _gradient(a: jax.Array, g: jax.Array) -> Tree:
    return {
        "kernel": jnp.matmul(a.T, g, precision="highest"),
        "bias": jnp.sum(g, axis=0) / ROWS**0.5,
    }


@dataclasses.dataclass(frozen=True)
class Default:
    """An alias with nothing but what it requires.

    Attributes:
      name: of the alias.
      kind: of its statistics: ``"gradients"``, ``"layers"`` or ``"samples"``.
    """

    name: str
    kind: str

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What it requires beside the learning rate."""
        wanted = inspect.signature(getattr(kj, self.name)).parameters
        options = {"batch_size": ROWS} if "batch_size" in wanted else {}
        return (spec(),) if self.kind == "layers" else (), options

    def make(self, rate: Any = 1.0, **changes: Any) -> optax.GradientTransformationExtraArgs:
        """The alias."""
        own, options = self.arguments()
        return getattr(kj, self.name)(rate, *own, **options | changes)

    def twin(self, **changes: Any) -> optax.GradientTransformationExtraArgs:
        """The `scale_by_*` transformation."""
        own, options = self.arguments()
        return getattr(kj, f"scale_by_{self.name}")(*own, **options | changes)

    def measured(self, rows: jax.Array) -> tuple[Tree, dict[str, Any]]:
        """Gradients and extra arguments of one step.

        Args:
          rows: ``(ROWS, WIDTH + DRAWN)``: inputs and output gradients layer by layer, then the
            output gradients at drawn labels.
        """
        cut = _cut(rows)
        grads = {name: _gradient(a, g) for name, (a, g, _) in cut.items()}
        if self.kind == "gradients":
            return grads, {}
        if self.kind == "samples":
            drawn = {name: _gradient(a, d) for name, (a, _, d) in cut.items()}
            return grads, {"curvature": Samples.from_gradients(drawn, terms=ROWS)}
        own = {f"{name}/kernel": (a, g) for name, (a, g, _) in cut.items()}
        return grads, {"curvature": curvature.Curvature.from_rows(own, spec())}


def _default(name: str) -> Default:
    wanted = inspect.signature(getattr(kj, f"scale_by_{name}")).parameters
    if "fisher" in wanted:
        return Default(name, "samples")
    return Default(name, "layers" if "spec" in wanted else "gradients")


DEFAULTS = [_default(name) for name in NAMES]


def over(*kinds: str):
    """Parametrisation over the aliases (of these kinds); tests of one alias share a worker."""
    chosen = [d for d in DEFAULTS if not kinds or d.kind in kinds]
    marked = [pytest.param(d, id=d.name, marks=pytest.mark.xdist_group(d.name)) for d in chosen]
    return pytest.mark.parametrize("alias", marked)


def diagnostics(state: Any) -> dict[str, float]:
    """The engine's counters as numbers."""
    return {name: float(x) for name, x in kj.diagnostics(state).items()}
