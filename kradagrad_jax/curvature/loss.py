"""What every loss has: its value and number of terms, vectors with the Hessian as covariance.

See :mod:`kradagrad_jax.curvature.losses`.
"""

import abc
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from kradagrad_jax.curvature.parts import wider

Weights = Any  # array of the batch shape, or None


@dataclasses.dataclass(frozen=True)
class Loss(abc.ABC):
    """A mean over batch positions of a loss of the outputs there.

    Attributes:
      event_dims: number of last axes of z that belong to ONE loss term.
    """

    event_dims: int = 1

    @abc.abstractmethod
    def per_term(self, z: jax.Array, targets: Any) -> jax.Array:
        """Loss of every term: the batch shape of z, float32 or better."""

    @abc.abstractmethod
    def residual(self, z: jax.Array, targets: Any) -> jax.Array:
        """Gradient of every term with respect to its own outputs (not divided by M): as z."""

    @abc.abstractmethod
    def sample(self, key: jax.Array, z: jax.Array) -> jax.Array:
        """Targets drawn from the distribution that z stands for; constants to differentiation."""

    @abc.abstractmethod
    def sqrt_columns(self, z: jax.Array, targets: Any = None, weights: Weights = None) -> jax.Array:
        """Columns of a square root of the Hessians.

        Args:
          z: outputs, ``(*batch, *event)``.
          targets: needed by :func:`generic` only; other Hessians do not depend on them.
          weights: weight of each term, of the batch shape.

        Returns:
          ``(C, *z.shape)`` with ``sum_c s_c s_c^T = weight * Hessian`` of the term, for every term;
          C is the number of outputs of a term.
        """

    def value(self, z: jax.Array, targets: Any, weights: Weights = None) -> jax.Array:
        """The loss: ``sum_m w_m l_m / M`` with M of :meth:`terms`; a scalar, float32 or better."""
        z = self._outputs(z)
        losses = self.per_term(z, targets)
        if weights is None:
            return jnp.mean(losses)
        w = self._weights(z, weights)
        return jnp.sum(w * losses) / self.terms(z, w)

    def terms(self, z: jax.Array, weights: Weights = None) -> int | jax.Array:
        """Number M of loss terms: an int, or the sum of the weights (1 where that is zero)."""
        batch = self._batch(z)
        if weights is None:
            return math.prod(batch)
        total = jnp.sum(self._weights(z, weights))
        return jnp.where(total > 0, total, 1)

    def pseudo_gradient(
        self, key: jax.Array, z: jax.Array, targets: Any = None, weights: Weights = None
    ) -> jax.Array:
        """Random s of mean zero whose covariance is the weighted Hessian of every term.

        Args:
          key: random key; the same key gives the same s.
          z: outputs, ``(*batch, *event)``.
          targets: needed by :func:`generic` only.
          weights: weight of each term, of the batch shape: s is multiplied by its root.

        Returns:
          An array like z: the gradient of each term at a label drawn from the model. It is not
          divided by the number of terms.
        """
        del targets
        z = jax.lax.stop_gradient(z)
        return self._weighted(self.residual(z, self.sample(key, z)), z, weights)

    def rademacher_gradient(
        self, key: jax.Array, z: jax.Array, targets: Any = None, weights: Weights = None
    ) -> jax.Array:
        """As :meth:`pseudo_gradient`, as a sum of the columns with random signs."""
        columns = self.sqrt_columns(z, targets, weights)
        signs = jax.random.rademacher(key, (len(columns), *self._batch(z)), columns.dtype)
        return jnp.sum(columns * self._spread(signs), axis=0)

    def _batch(self, z: jax.Array) -> tuple[int, ...]:
        if z.ndim <= self.event_dims:
            raise ValueError(
                f"{type(self).__name__} got outputs of shape {z.shape}: the last {self.event_dims} "
                "axes belong to one loss term and there must be a batch axis before them; pass "
                "event_dims=0 for one output per example, or z[None] for a single example"
            )
        return z.shape[: z.ndim - self.event_dims]

    def _event(self, z: jax.Array) -> tuple[int, ...]:
        return z.shape[len(self._batch(z)) :]

    def _outputs(self, z: jax.Array) -> jax.Array:
        """z in float32 or better; refuses outputs without a batch axis."""
        self._batch(z)
        if not jnp.issubdtype(z.dtype, jnp.floating):
            raise ValueError(f"{type(self).__name__} needs real outputs, got dtype {z.dtype}")
        return z.astype(wider(z.dtype))

    def _like(self, z: jax.Array, targets: Any) -> jax.Array:
        """Targets of the shape of z, in the dtype of the arithmetic."""
        targets = jnp.asarray(targets)
        if targets.shape != z.shape:
            raise ValueError(
                f"{type(self).__name__} got targets of shape {targets.shape} for outputs of shape "
                f"{z.shape}"
            )
        return targets.astype(wider(z.dtype))

    def _weights(self, z: jax.Array, weights: Weights) -> jax.Array:
        w = jnp.asarray(weights)
        if w.shape != self._batch(z):
            raise ValueError(
                f"weights have shape {w.shape}, the loss terms of {z.shape} outputs "
                f"{self._batch(z)}"
            )
        return w.astype(wider(z.dtype))

    def _spread(self, x: jax.Array) -> jax.Array:
        """One number per term, ready to multiply the outputs."""
        return x.reshape(x.shape + (1,) * self.event_dims)

    def _weighted(self, s: jax.Array, z: jax.Array, weights: Weights) -> jax.Array:
        if weights is not None:
            s = s * self._spread(jnp.sqrt(self._weights(z, weights))).astype(s.dtype)
        return s
