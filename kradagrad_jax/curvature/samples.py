"""Gradients at labels drawn from the model: the statistic of TNT and Ginger.

One forward pass serves the loss, its gradient and the samples; every sample costs one more backward
pass. A sample S is the gradient of the MEAN loss at drawn labels (no weight decay, no other
penalty): ``E[S S^T]`` is the Gauss-Newton matrix of the batch divided by its number M of loss
terms, and ``h = sqrt(M) S`` is a curvature vector, ``E[h h^T]`` being that matrix itself.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kradagrad_jax.curvature import internals
from kradagrad_jax.curvature.loss import Loss
from kradagrad_jax.curvature.parts import wider
from kradagrad_jax.engine import trees

KINDS = ("sampled", "rademacher", "per_example", "exact")


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["values", "terms", "fresh"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True, eq=False)
class Samples:
    """Sampled gradients of every parameter.

    A pytree whose arrays hang below parameter paths, not in the shape of the parameter tree: it
    passes unchanged through ``optax.chain``, ``masked``, ``partition`` and ``jit``.

    Attributes:
      values: per path ``(n, *parameter shape)``: n gradients S of the mean loss at drawn labels,
        scaled so that the mean of ``terms * S S^T`` estimates the Gauss-Newton matrix.
      terms: number M of loss terms, a float scalar.
      fresh: bool scalar, False if no samples were taken (``update_stats=False``).
    """

    values: dict[str, jax.Array]
    terms: jax.Array
    fresh: jax.Array

    def __contains__(self, path: str) -> bool:
        return path in self.values

    def gradients(self, path: str) -> jax.Array:
        """The samples S of a parameter, ``(n, *shape)``.

        Raises:
          KeyError: there are none of this path.
        """
        if path not in self.values:
            some = ", ".join(repr(p) for p in list(self.values)[:4])
            raise KeyError(
                f"the samples have no gradients of parameter '{path}' (they have {some}, ..): take "
                "them of the parameters that the optimizer gets"
            )
        return self.values[path]

    def vectors(self, path: str) -> jax.Array:
        """Curvature vectors ``h = sqrt(M) S``, ``(n, *shape)``, float32 or better."""
        x = self.gradients(path)
        x = x.astype(wider(x.dtype))
        return x * jnp.sqrt(self.terms.astype(x.dtype))

    def __add__(self, other: "Samples") -> "Samples":
        """Samples of two micro-batches together: averaged gradients, as of one larger batch."""
        total = self.terms + other.terms

        def mean(x: jax.Array, y: jax.Array) -> jax.Array:
            wide = wider(x.dtype)
            mine, theirs = (t.astype(wide) / total.astype(wide) for t in (self.terms, other.terms))
            return (mine * x.astype(wide) + theirs * y.astype(wide)).astype(x.dtype)

        values = jax.tree.map(mean, self.values, other.values)
        return Samples(values, total, self.fresh & other.fresh)

    @classmethod
    def from_gradients(cls, *gradients: Any, terms: Any = 1.0) -> "Samples":
        """Hand-made samples.

        Args:
          *gradients: n trees like the parameters.
          terms: number M of loss terms of the batch; 1 makes curvature vectors equal to gradients.

        Examples:
          >>> import jax.numpy as jnp
          >>> from kradagrad_jax.curvature.samples import Samples
          >>> Samples.from_gradients({"w": jnp.ones((4, 3))}, terms=128).vectors("w").shape
          (1, 4, 3)
        """
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *gradients)
        values = dict(zip(trees.paths_of(stacked), jax.tree.leaves(stacked), strict=True))
        return cls(values, jnp.asarray(terms, jnp.float32), jnp.ones((), bool))


def curvature_vectors(
    pullback: Callable[[jax.Array], Any],
    outputs: jax.Array,
    loss: Loss,
    key: jax.Array,
    *,
    kind: str = "sampled",
    num_samples: int = 1,
    targets: Any = None,
    weights: Any = None,
) -> Samples:
    """Samples from outputs and pullback of a model that has been run already.

    Args:
      pullback: cotangent of the outputs -> gradient tree, as ``jax.vjp`` of the model gives it (a
        tuple of one tree is unpacked).
      outputs: outputs of the model, ``(*batch, *event)``.
      loss: see :mod:`kradagrad_jax.curvature.losses`; its weights and number of terms count, its
        value does not.
      key: random key; the same key gives the same samples.
      kind: ``"sampled"``: labels drawn from the model, one batch-mean gradient per sample;
        ``"rademacher"``: columns of the Hessian's root with random signs; ``"per_example"``: one
        drawn label per example, every example a sample of its own (M samples, M backward passes);
        ``"exact"``: no draw, M*C samples that reproduce the Gauss-Newton matrix of the batch (for
        tests and small models).
      num_samples: number of draws for the first two kinds.
      targets: needed by generic losses.
      weights: weight of each loss term.

    Returns:
      :class:`Samples` in the dtypes of the gradients.

    Raises:
      ValueError: unknown kind; targets missing.
    """
    outputs = jax.lax.stop_gradient(outputs)
    cotangents = _cotangents(outputs, loss, key, kind, num_samples, targets, weights)
    terms = jnp.asarray(loss.terms(outputs, weights), jnp.float32)
    return _pulled(pullback, cotangents, terms)


def _cotangents(
    z: jax.Array, loss: Loss, key: Any, kind: str, n: int, targets: Any, weights: Any
) -> jax.Array:
    """``(n, *z.shape)`` cotangents of the sum of terms, before the division by M."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    if kind in ("sampled", "rademacher"):
        draw = loss.pseudo_gradient if kind == "sampled" else loss.rademacher_gradient
        keys = [key] if n == 1 else jax.random.split(key, n)
        return jnp.stack([draw(k, z, targets, weights) for k in keys])
    if kind == "per_example":
        columns = loss.pseudo_gradient(key, z, targets, weights)[None]
    else:
        columns = loss.sqrt_columns(z, targets, weights)
    return _one_term_each(columns, loss)


def _one_term_each(columns: jax.Array, loss: Loss) -> jax.Array:
    """Splits cotangents over the loss terms: one array per column and term, zero elsewhere.

    Every one of the n = C*M counts with weight 1/n in the mean of ``M S S^T``, hence the root of n.
    """
    batch = columns.shape[1 : columns.ndim - loss.event_dims]
    terms = math.prod(batch)
    eye = jnp.eye(terms, dtype=columns.dtype).reshape(1, terms, *batch, *(1,) * loss.event_dims)
    spread = eye * columns[:, None]
    n = len(columns) * terms
    return spread.reshape(n, *columns.shape[1:]) * jnp.sqrt(jnp.asarray(n, columns.dtype))


def _pulled(pullback: Callable[[jax.Array], Any], cotangents: jax.Array, terms: Any) -> Samples:
    def pull(s: jax.Array) -> Any:
        out = pullback(s / terms.astype(s.dtype))
        return out[0] if isinstance(out, tuple) and len(out) == 1 else out

    if len(cotangents) == 1:
        out = jax.tree.map(lambda x: x[None], pull(cotangents[0]))
    else:
        out = jax.vmap(pull)(cotangents)
    values = dict(zip(trees.paths_of(out), jax.tree.leaves(out), strict=True))
    return Samples(values, terms, jnp.ones((), bool))


def sampled_gradients(
    model_fn: Callable[..., Any],
    loss: Loss,
    *,
    kind: str = "sampled",
    num_samples: int = 1,
    has_aux: bool = False,
    axis_name: str | None = None,
) -> Callable[..., tuple[tuple[jax.Array, Any], Any, Samples | None]]:
    """Loss, gradient and samples from one forward pass.

    Args:
      model_fn: ``(params, inputs) -> outputs``, or ``(outputs, aux)`` with ``has_aux``. It is run
        once: state in ``aux`` (running averages) is updated once.
      loss: see :mod:`kradagrad_jax.curvature.losses`.
      kind, num_samples: see :func:`curvature_vectors`.
      has_aux: whether the model returns something beside its outputs.
      axis_name: mesh axis (or several) inside ``shard_map`` over which the batch is split: labels
        differ from shard to shard, and loss, gradient and samples are AVERAGED over the shards
        before anybody contracts them. Not needed under ``jit`` with sharded arrays, whose means are
        over the whole batch anyway.

    Returns:
      ``step(params, inputs, targets, *, rng, weights=None, update_stats=True)`` that returns
      ``((value, aux), grads, samples)``; wrap it in ``jit``. With a traced ``update_stats`` the
      extra backward pass runs under ``lax.cond``, and ``samples.fresh`` is its value; with False
      ``samples`` is None. Pass ``curvature=samples`` to the optimizer.

    Raises:
      ValueError: unknown kind; a kind without average together with ``axis_name``.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from kradagrad_jax.curvature import losses
      >>> from kradagrad_jax.curvature.samples import sampled_gradients
      >>> step = sampled_gradients(lambda p, x: x @ p["w"], losses.softmax_cross_entropy())
      >>> params, x, labels = {"w": jnp.ones((4, 3))}, jnp.ones((8, 4)), jnp.zeros(8, int)
      >>> (value, _), grads, samples = step(params, x, labels, rng=jax.random.key(0))
      >>> samples.gradients("w").shape
      (1, 4, 3)
    """
    if axis_name is not None and kind not in ("sampled", "rademacher"):
        raise ValueError(f"kind={kind!r} has no average over shards; leave axis_name out")

    def step(
        params: Any,
        inputs: Any,
        targets: Any,
        *,
        rng: jax.Array,
        weights: Any = None,
        update_stats: Any = True,
    ) -> tuple[tuple[jax.Array, Any], Any, Samples | None]:
        if axis_name is not None:
            params = jax.tree.map(lambda x: _vary(x, axis_name), params)
            rng = jax.random.fold_in(rng, jax.lax.axis_index(axis_name))
        z, pullback, *aux = jax.vjp(lambda p: model_fn(p, inputs), params, has_aux=has_aux)
        value, dz = jax.value_and_grad(loss.value)(z, targets, weights)
        (grads,) = pullback(dz)

        def draw() -> Samples:
            return curvature_vectors(
                pullback, z, loss, rng, kind=kind, num_samples=num_samples,
                targets=targets, weights=weights,
            )  # fmt: skip

        terms = jnp.asarray(loss.terms(z, weights), jnp.float32)
        samples = _when(update_stats, draw, grads, terms)
        if axis_name is not None:
            value, grads, samples = _averaged(axis_name, loss, z, weights, value, grads, samples)
        return (value, aux[0] if has_aux else None), grads, samples

    return step


def _when(
    update_stats: Any, draw: Callable[[], Samples], grads: Any, terms: jax.Array
) -> Samples | None:
    """Samples if they are wanted; a traced wish costs nothing where it is False."""
    if isinstance(update_stats, bool):
        return draw() if update_stats else None
    shapes = jax.eval_shape(draw)
    likes = dict(zip(trees.paths_of(grads), jax.tree.leaves(grads), strict=True))

    def none() -> dict[str, jax.Array]:
        return {
            path: jnp.broadcast_to(jnp.zeros_like(likes[path])[None], x.shape)
            for path, x in shapes.values.items()
        }

    values = jax.lax.cond(update_stats, lambda: draw().values, none)
    return Samples(values, terms, jnp.asarray(update_stats))


def _vary(x: jax.Array, axis_name: Any) -> jax.Array:
    """Marks ``x`` as different on every shard, so that its gradient stays that of the shard."""
    axes = (axis_name,) if isinstance(axis_name, str) else axis_name
    try:
        return internals.vary(x, frozenset(axes))
    except ValueError:  # an axis of vmap: its gradients are its own anyway
        return x


def _averaged(
    axis_name: Any, loss: Loss, z: jax.Array, weights: Any, value: Any, grads: Any, samples: Any
) -> tuple[jax.Array, Any, Samples | None]:
    """Means over all shards, each shard counting with its number (or weight) of loss terms."""
    mine = jnp.asarray(loss.terms(z, weights), jnp.float32)
    held = mine if weights is None else jnp.sum(weights).astype(jnp.float32)
    total = jax.lax.psum(held, axis_name)
    total = jnp.where(total > 0, total, 1)

    def mean(x: jax.Array) -> jax.Array:
        return jax.lax.psum(x * (mine / total).astype(x.dtype), axis_name)

    if samples is not None:
        samples = Samples(jax.tree.map(mean, samples.values), total, samples.fresh)
    return mean(value), jax.tree.map(mean, grads), samples
