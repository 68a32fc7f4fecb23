"""One jittable update per method with the shapes of its arguments: to lower, not to run.

No array is made. The net has a convolution, two matrices and two biases, small or large.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import kradagrad_jax as kj
from kradagrad_jax import curvature

LOSS = curvature.losses.softmax_cross_entropy()
GRADIENT = (
    *("shampoo", "kradagrad_star", "kradagrad", "soap", "kl_shampoo", "kl_soap", "sirfshampoo"),
    *("tnt", "ginger"),
)
LAYERS = (
    *("kfac", "rs_kfac", "sre_kfac", "b_kfac", "br_kfac", "bc_kfac", "brc_kfac"),
    *("ikfac", "ingd", "singd"),
)
NAMES = GRADIENT + LAYERS
SAMPLED = ("tnt", "ginger")  # these take `curvature=Samples` by default
NO_ROOTS = ("sirfshampoo", "ikfac", "ingd", "singd")  # matrix products alone


@dataclasses.dataclass(frozen=True)
class Net:
    """Sizes: images ``(batch, side, side, channels)``, a 3x3 convolution, two dense layers.

    ``depth``: further layers in the middle, all alike.
    """

    batch: int
    side: int
    channels: int
    filters: int
    hidden: int
    classes: int
    depth: int = 0
    dtype: Any = jnp.float32

    def params(self) -> dict[str, Any]:
        c, f, h, k = self.channels, self.filters, self.hidden, self.classes
        shapes = {"conv": (3, 3, c, f), "w1": (f, h), "b1": (h,), "w2": (h, k), "b2": (k,)}
        shapes |= {f"middle{i}": (h, h) for i in range(self.depth)}
        return {name: jax.ShapeDtypeStruct(s, self.dtype) for name, s in shapes.items()}

    def data(self) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        images = (self.batch, self.side, self.side, self.channels)
        return (
            jax.ShapeDtypeStruct(images, self.dtype),
            jax.ShapeDtypeStruct((self.batch,), jnp.int32),
        )


SMALL = Net(batch=4, side=4, channels=2, filters=6, hidden=8, classes=3)
HALF = dataclasses.replace(SMALL, dtype=jnp.bfloat16)
LARGE = Net(batch=128, side=8, channels=256, filters=512, hidden=1024, classes=768)
MODEL_PRECISION = jax.lax.Precision.HIGH  # tells the model's own products from all others


def model(p: dict[str, Any], x: jax.Array) -> jax.Array:
    """Convolution, mean over positions, two dense layers."""
    numbers = ("NHWC", "HWIO", "NHWC")
    x = jax.lax.conv_general_dilated(
        x, p["conv"], (1, 1), "SAME", dimension_numbers=numbers, precision=MODEL_PRECISION
    )
    x = jnp.mean(jnp.tanh(x), axis=(1, 2))
    x = jnp.tanh(jnp.matmul(x, p["w1"], precision=MODEL_PRECISION) + p["b1"][None, :])
    for name in sorted(name for name in p if name.startswith("middle")):
        x = jnp.tanh(jnp.matmul(x, p[name], precision=MODEL_PRECISION))
    return jnp.matmul(x, p["w2"], precision=MODEL_PRECISION) + p["b2"][None, :]


def key() -> jax.ShapeDtypeStruct:
    """A typed random key, abstract."""
    return jax.eval_shape(lambda: jax.random.key(0))


@functools.cache
def spec(net: Net) -> curvature.CaptureSpec:
    return curvature.inspect(model, net.params(), net.data()[0])


def rows_step(reducer: str = "raw") -> Callable[..., Any]:
    """Loss, gradient and layer statistics with sampled labels."""
    take = curvature.model_value_grad_and_curvature(model, LOSS, reducer=reducer)
    return lambda p, x, y, k: take(p, x, y, rng=k)


def loss_step(reducer: str = "kron") -> Callable[..., Any]:
    """Loss, gradient and layer statistics of the loss itself."""
    take = curvature.value_grad_and_curvature(
        lambda p, x, y: jnp.mean(LOSS.value(model(p, x), y)), reducer=reducer
    )
    return lambda p, x, y, k: take(p, x, y)


def samples_step(**options: Any) -> Callable[..., Any]:
    """Loss, gradient and sampled gradients."""
    take = curvature.sampled_gradients(model, LOSS, **options)
    return lambda p, x, y, k: take(p, x, y, rng=k)


CAPTURES = {
    "rows": rows_step("raw"),
    "grams": rows_step("kron"),
    "loss-rows": loss_step("raw"),
    "loss-grams": loss_step("kron"),
    "samples": samples_step(),
    "samples-rademacher": samples_step(kind="rademacher", num_samples=2),
}


@functools.cache
def statistics(net: Net, kind: str) -> Any:
    """What a capture hands to the optimizer, abstract."""
    return jax.eval_shape(CAPTURES[kind], net.params(), *net.data(), key())[2]


@dataclasses.dataclass(frozen=True)
class Program:
    """A method with arguments, on a net.

    Attributes:
      name: id of the tests.
      alias: name of the method.
      net: sizes and dtype of the model.
      options: arguments beside the learning rate and the spec.
    """

    name: str
    alias: str
    net: Net
    options: tuple[tuple[str, Any], ...] = ()

    def transformation(self, **more: Any) -> Any:
        rest = (spec(self.net),) if self.alias in LAYERS else ()
        return getattr(kj, self.alias)(1e-2, *rest, **dict(self.options), **more)

    def statistics(self) -> Any:
        """Abstract value of ``curvature=``; None for methods of the gradient alone."""
        if self.alias in LAYERS:
            return statistics(self.net, "rows")
        sampled = self.alias in SAMPLED and dict(self.options).get("fisher") != "empirical"
        return statistics(self.net, "samples") if sampled else None

    def build(self, **more: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """``update(gradients, state, params[, curvature])`` and the shapes of its arguments."""
        tx, params, stats = self.transformation(**more), self.net.params(), self.statistics()
        state = jax.eval_shape(tx.init, params)
        if stats is None:
            return tx.update, (params, state, params)
        return lambda g, s, p, c: tx.update(g, s, p, curvature=c), (params, state, params, stats)


def _options(alias: str, **options: Any) -> tuple[tuple[str, Any], ...]:
    own = {"batch_size": 4} if alias == "sirfshampoo" else {}
    return tuple((own | options).items())


def default(alias: str, net: Net = SMALL) -> Program:
    """A method with its default settings."""
    return Program(alias, alias, net, _options(alias))


def variant(name: str, alias: str, net: Net = SMALL, **options: Any) -> Program:
    """A method with other settings."""
    return Program(name, alias, net, _options(alias, **options))


DEFAULTS = [default(alias) for alias in NAMES]
# Eight input and eight output sizes of the small net are above rank + batch: Brand's update.
_TRACK = {"sketch": kj.Sketch(rank=2, oversampling=1, power=1)}
_STAGGER = {"timing": kj.Timing(stagger=True), "refresh_every": 3}
VARIANTS = [
    variant("shampoo-newton", "shampoo", root="newton"),
    variant("shampoo-tracked", "shampoo", root="tracked"),
    variant("shampoo-square_root", "shampoo", statistics="square_root"),
    variant("shampoo-stagger", "shampoo", **_STAGGER),
    variant("shampoo-bf16", "shampoo", HALF),
    variant("star-newton", "kradagrad_star", root="newton"),
    variant("star-exact", "kradagrad_star", form="exact"),
    variant("star-bf16", "kradagrad_star", HALF, **_STAGGER),
    variant("kradagrad-factored", "kradagrad", form="factored"),
    variant("soap-first", "soap", preset="basis_first", basis="qr", graft="adam"),
    variant("soap-tracked", "soap", HALF, basis="tracked", **_STAGGER),
    variant("tnt-empirical", "tnt", fisher="empirical"),
    variant("tnt-newton", "tnt", inverse="newton"),
    variant("ginger-empirical", "ginger", fisher="empirical"),
    variant("ginger-model", "ginger", partition="model"),
    variant("kfac-exact", "kfac", damping_rule="exact"),
    variant("kfac-square_root", "kfac", statistics="square_root"),
    variant("kfac-bf16", "kfac", HALF),
    variant("sre_kfac-power", "sre_kfac", **_TRACK),
    variant("brc_kfac-tracked", "brc_kfac", **_TRACK),
    variant("singd-bf16", "singd", HALF, structures="hierarchical:2,2", factor_dtype=jnp.bfloat16),
]
