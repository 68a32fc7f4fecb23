"""What a method has to say about ONE block; the engine does the rest."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

Factor = Any  # any pytree of arrays without a batch axis


class Step(NamedTuple):
    """Traced scalars that a block method may use.

    ``count`` and ``interval`` are the same for all blocks, the other two are the block's own clock:
    it starts with the first statistic that is not zero and gives a finite factor. What a method
    does at certain statistics or refreshes only belongs into :func:`kradagrad_jax.linalg.when`.

    Attributes:
      count: step number, from 1 (int32).
      interval: steps between refreshes (int or int32).
      statistics: how many statistics this block has accepted, in ``accumulate`` the one that is
        being folded in included (int32).
      refreshes: how often this block was refreshed before: 0 in its first refresh (int32).
    """

    count: jax.Array
    interval: jax.Array | int
    statistics: jax.Array
    refreshes: jax.Array


class Rows(NamedTuple):
    """Statistic of a layer as rows: its factors are ``A = a.T @ a`` and ``G = g.T @ g``.

    Attributes:
      a: ``(n, d_in)`` layer inputs, one row per position, divided by the root of their number;
        with a joint bias ``(n, d_in + 1)``, the last column standing for the constant input 1.
      g: ``(n, d_out)`` output gradients, scaled so that ``g.T @ g`` is the factor of the mean loss.

    Rows of zeros count for nothing: layers of equal shape are stacked by padding.
    """

    a: jax.Array
    g: jax.Array


class Grams(NamedTuple):
    """Statistic of a layer as the two factors of its Kronecker product.

    Attributes:
      a: ``(d_in, d_in)`` second moment of the inputs (``d_in + 1`` with a joint bias), or its
        diagonal ``(d_in,)``.
      g: ``(d_out, d_out)`` second moment of the output gradients, or its diagonal ``(d_out,)``.
    """

    a: jax.Array
    g: jax.Array


class BlockMethod(NamedTuple):
    """A preconditioner of one block as pure functions, as GradientTransformation is for a tree.

    None of them sees a batch axis: the engine maps them over the stack of blocks of a bucket.

    Attributes:
      init: ``(shape, dtype) -> factor``: any pytree of arrays (nothing of size zero). With
        ``partial`` it is ``(shape, dtype, factored)``.
      accumulate: ``(factor, statistic, step) -> factor``. The statistic is the gradient block
        unless the engine is given another source; :class:`Rows` or :class:`Grams` for layers.
        The first statistic of a block is never zero; one that gives a factor that is not finite
        is dropped.
      refresh: ``(factor, step) -> factor``: the expensive recomputation, never called before the
        first statistic. None: the method has none.
      precondition: ``(factor, gradient, step) -> block``: the preconditioned gradient block.
      refresh_cost: ``shape -> float``: relative cost of one refresh, for staggering.
      correct: ``(factor, statistic, step) -> factor``: folds the statistic a second time, after
        the refreshes of the step. None: the method does not.
      name: method and those of its settings that change what the arrays of a factor mean, for
        checkpoints.
      partial: whether ``init`` takes ``factored``, one bool per mode of the block: modes without
        a factor are None in the factor, take no memory and are left alone.
    """

    init: Callable[..., Factor]
    accumulate: Callable[[Factor, Any, Step], Factor]
    refresh: Callable[[Factor, Step], Factor] | None
    precondition: Callable[[Factor, jax.Array, Step], jax.Array]
    refresh_cost: Callable[[tuple[int, ...]], float] = lambda shape: float(sum(n**3 for n in shape))
    correct: Callable[[Factor, Any, Step], Factor] | None = None
    name: str = ""
    partial: bool = False
