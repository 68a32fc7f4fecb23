"""Losses that are likelihoods: labels drawn from the model, square roots of the Hessian.

A loss object takes the outputs z of a model, ``(*batch, *event)``. Every batch position is one loss
term l_m; the loss is their (weighted) mean. Curvature needs vectors s with ``E[s s^T] = H_m``, the
Hessian of l_m at z: for the negative log-likelihood of an exponential family in its natural
parameter these are the gradients of l_m at labels drawn from the model.

Objects are frozen and hashable (static arguments of ``jit``). Arithmetic is in float32 or better;
vectors come back in the dtype of z, ready to be the cotangent of the model's outputs.

References:
  Martens, `natural gradient <https://arxiv.org/abs/1412.1193>`_, 2014, sections 9 and 10.
"""

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kradagrad_jax.curvature.loss import Loss, Weights
from kradagrad_jax.linalg import eigh


@dataclasses.dataclass(frozen=True)
class SoftmaxCrossEntropy(Loss):
    """See :func:`softmax_cross_entropy`."""

    def _probabilities(self, z: jax.Array, targets: Any) -> jax.Array:
        targets = jnp.asarray(targets)
        if jnp.issubdtype(targets.dtype, jnp.floating):
            return self._like(z, targets)
        if targets.shape != self._batch(z):
            raise ValueError(
                f"labels have shape {targets.shape}, logits {z.shape}: expected {self._batch(z)}"
            )
        return jax.nn.one_hot(targets, z.shape[-1], dtype=self._outputs(z).dtype)

    def per_term(self, z: jax.Array, targets: Any) -> jax.Array:
        t = self._probabilities(z, targets)
        return -jnp.sum(t * jax.nn.log_softmax(self._outputs(z)), axis=-1)

    def residual(self, z: jax.Array, targets: Any) -> jax.Array:
        t = self._probabilities(z, targets)
        total = jnp.sum(t, axis=-1, keepdims=True)
        return (jax.nn.softmax(self._outputs(z)) * total - t).astype(z.dtype)

    def sample(self, key: jax.Array, z: jax.Array) -> jax.Array:
        return jax.random.categorical(key, jax.lax.stop_gradient(self._outputs(z)))

    def sqrt_columns(self, z: jax.Array, targets: Any = None, weights: Weights = None) -> jax.Array:
        del targets
        p = jax.nn.softmax(self._outputs(z))
        eye = jnp.eye(z.shape[-1], dtype=p.dtype).reshape(-1, *(1,) * (z.ndim - 1), z.shape[-1])
        columns = jnp.moveaxis(jnp.sqrt(p), -1, 0)[..., None] * (eye - p[None])
        return self._weighted(columns, z, weights).astype(z.dtype)


@dataclasses.dataclass(frozen=True)
class _Elementwise(Loss):
    """A loss that sums over outputs: its Hessian is diagonal."""

    @abc.abstractmethod
    def _root(self, z: jax.Array) -> jax.Array:
        """Square root of the diagonal of the Hessian, like z."""

    def sqrt_columns(self, z: jax.Array, targets: Any = None, weights: Weights = None) -> jax.Array:
        del targets
        root = self._weighted(self._root(self._outputs(z)), z, weights)
        event = self._event(z)
        size = math.prod(event)
        eye = jnp.eye(size, dtype=root.dtype)
        eye = eye.reshape(size, *(1,) * len(self._batch(z)), *event)
        return (eye * root[None]).astype(z.dtype)

    def rademacher_gradient(
        self, key: jax.Array, z: jax.Array, targets: Any = None, weights: Weights = None
    ) -> jax.Array:
        del targets
        root = self._weighted(self._root(self._outputs(z)), z, weights)
        return (root * jax.random.rademacher(key, z.shape, root.dtype)).astype(z.dtype)


@dataclasses.dataclass(frozen=True)
class SigmoidBinaryCrossEntropy(_Elementwise):
    """See :func:`sigmoid_binary_cross_entropy`."""

    def per_term(self, z: jax.Array, targets: Any) -> jax.Array:
        t, z = self._like(z, targets), self._outputs(z)
        losses = jax.nn.softplus(z) - z * t
        return jnp.sum(losses.reshape(*self._batch(z), -1), axis=-1)

    def residual(self, z: jax.Array, targets: Any) -> jax.Array:
        return (jax.nn.sigmoid(self._outputs(z)) - self._like(z, targets)).astype(z.dtype)

    def sample(self, key: jax.Array, z: jax.Array) -> jax.Array:
        p = jax.nn.sigmoid(jax.lax.stop_gradient(self._outputs(z)))
        return jax.random.bernoulli(key, p).astype(z.dtype)

    def _root(self, z: jax.Array) -> jax.Array:
        return jnp.sqrt(jax.nn.sigmoid(z) * jax.nn.sigmoid(-z))


@dataclasses.dataclass(frozen=True)
class SquaredError(_Elementwise):
    """See :func:`squared_error`."""

    c: float = 1.0

    def per_term(self, z: jax.Array, targets: Any) -> jax.Array:
        difference = self._outputs(z) - self._like(z, targets)
        squares = jnp.square(difference).reshape(*self._batch(z), -1)
        return 0.5 * self.c * jnp.sum(squares, axis=-1)

    def residual(self, z: jax.Array, targets: Any) -> jax.Array:
        return (self.c * (self._outputs(z) - self._like(z, targets))).astype(z.dtype)

    def sample(self, key: jax.Array, z: jax.Array) -> jax.Array:
        z = jax.lax.stop_gradient(self._outputs(z))
        return z + jax.random.normal(key, z.shape, z.dtype) / math.sqrt(self.c)

    def pseudo_gradient(
        self, key: jax.Array, z: jax.Array, targets: Any = None, weights: Weights = None
    ) -> jax.Array:
        # without the detour z - (z + noise), which costs digits where z is large
        del targets
        x = self._outputs(z)
        noise = -math.sqrt(self.c) * jax.random.normal(key, z.shape, x.dtype)
        return self._weighted(noise, z, weights).astype(z.dtype)

    def _root(self, z: jax.Array) -> jax.Array:
        return jnp.full_like(z, math.sqrt(self.c))


@dataclasses.dataclass(frozen=True)
class Generic(Loss):
    """See :func:`generic`."""

    fn: Callable[[jax.Array, Any], jax.Array] = dataclasses.field(kw_only=True)
    max_outputs: int = 64

    def _mapped(self, f: Callable[..., Any], z: jax.Array, targets: Any) -> Any:
        """``f(z_m, target_m)`` for every term, in a flat stack."""
        batch = self._batch(z)
        if targets is None:
            raise ValueError("the Hessian of a generic loss may depend on the targets: pass them")
        n = math.prod(batch)
        flat = jax.tree.map(
            lambda t: jnp.asarray(t).reshape(n, *np.shape(t)[len(batch) :]), targets
        )
        return jax.vmap(f)(self._outputs(z).reshape(n, *self._event(z)), flat)

    def per_term(self, z: jax.Array, targets: Any) -> jax.Array:
        return self._mapped(self.fn, z, targets).reshape(self._batch(z))

    def residual(self, z: jax.Array, targets: Any) -> jax.Array:
        return self._mapped(jax.grad(self.fn), z, targets).reshape(z.shape).astype(z.dtype)

    def sample(self, key: jax.Array, z: jax.Array) -> jax.Array:
        raise NotImplementedError(
            "a generic loss is no likelihood to draw from; use pseudo_gradient or sqrt_columns"
        )

    def sqrt_columns(self, z: jax.Array, targets: Any = None, weights: Weights = None) -> jax.Array:
        size = math.prod(self._event(z))
        if size > self.max_outputs:
            raise ValueError(
                f"a generic loss decomposes a Hessian of {size} outputs per term, more than "
                f"max_outputs={self.max_outputs}; raise it, or write a loss with a known root"
            )

        def root(x: jax.Array, target: Any) -> jax.Array:
            hessian = jax.hessian(self.fn)(x, target).reshape(size, size)
            w, v = eigh(hessian)
            return (v * jnp.sqrt(jnp.maximum(w, 0))[None, :]).T

        columns = self._mapped(root, z, targets)  # (terms, C, outputs)
        columns = jnp.moveaxis(columns, 1, 0).reshape(size, *z.shape)
        return self._weighted(columns, z, weights).astype(z.dtype)

    def pseudo_gradient(
        self, key: jax.Array, z: jax.Array, targets: Any = None, weights: Weights = None
    ) -> jax.Array:
        z = jax.lax.stop_gradient(z)
        return self.rademacher_gradient(key, z, targets, weights)


def softmax_cross_entropy() -> SoftmaxCrossEntropy:
    """Cross-entropy of logits ``(*batch, classes)``.

    Targets are integer labels of the batch shape, or probabilities of the shape of the logits.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from kradagrad_jax.curvature import losses
      >>> loss = losses.softmax_cross_entropy()
      >>> z = jnp.zeros((2, 4))
      >>> round(float(loss.value(z, jnp.array([0, 3]))), 4), loss.terms(z)
      (1.3863, 2)
      >>> loss.pseudo_gradient(jax.random.key(0), z).shape
      (2, 4)
    """
    return SoftmaxCrossEntropy()


def sigmoid_binary_cross_entropy(event_dims: int = 1) -> SigmoidBinaryCrossEntropy:
    """Cross-entropy of independent bits, SUMMED over the outputs of a term.

    Args:
      event_dims: how many last axes of the logits belong to one term; 0 for logits ``(batch,)``,
        or where the loss is the mean over outputs, too.
    """
    return SigmoidBinaryCrossEntropy(event_dims)


def squared_error(c: float = 1.0, event_dims: int = 1) -> SquaredError:
    """``c / 2`` times the squared error summed over the outputs of a term: a Gaussian.

    Args:
      c: inverse variance. ``1``: half the sum of squares; ``2``: the sum of squares; ``2 / K``: the
        mean of squares over K outputs.
      event_dims: how many last axes belong to one term; 0 for outputs ``(batch,)``.

    Raises:
      ValueError: ``c`` is not positive.
    """
    if not c > 0:
        raise ValueError(f"squared_error needs c > 0, got {c}")
    return SquaredError(event_dims, c)


def generic(
    fn: Callable[[jax.Array, Any], jax.Array], event_dims: int = 1, max_outputs: int = 64
) -> Generic:
    """Any loss that is convex in the outputs of a term.

    Args:
      fn: ``(z_m, target_m) -> scalar`` for ONE term; its Hessian is decomposed per term.
      event_dims: how many last axes of the outputs belong to one term.
      max_outputs: largest number of outputs per term.

    Returns:
      A loss whose ``pseudo_gradient`` and ``sqrt_columns`` need the targets. Negative eigenvalues
      of a Hessian count as zero.
    """
    return Generic(event_dims, max_outputs, fn=fn)
