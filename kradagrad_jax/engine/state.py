"""What every transformation of the engine keeps, and how it knows a state that is not its own."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

FORMAT = 1  # of the arrays below; a state of another format is not this package's of today


class Clock(NamedTuple):
    """What has happened to each block of a bucket so far.

    Attributes:
      statistics: ``(size,)`` int32, number of statistics that were folded in. It starts with the
        first one that is not zero.
      refreshes: ``(size,)`` int32, number of refreshes.

    Both are -1 for the zeros that fill a stack up where it is divided over devices.
    """

    statistics: jax.Array
    refreshes: jax.Array


class Kept(NamedTuple):
    """Everything that lives with the blocks of one bucket; axis 0 of every array is the block.

    Attributes:
      clock: see :class:`Clock`.
      factor: the factor of the method, stacked.
      mu: averages (or sums) of the gradient blocks; None without ``beta1``.
      nu: accumulators of squares for grafting; None where the graft has none.
    """

    clock: Clock
    factor: Any
    mu: jax.Array | None
    nu: jax.Array | None


class Moments(NamedTuple):
    """Averages and squares of the leaves without blocks, ``MaskedNode`` elsewhere; or None."""

    first: Any
    second: Any


class BlockState(NamedTuple):
    """State of every transformation that the engine builds.

    Attributes:
      count: number of updates, int32.
      skipped: number of updates whose gradient was not finite (no effect but on counts), int32.
      rejected: number of block updates or refreshes undone because they were not finite, and of
        directions not taken because they were not finite or vanished, int32.
      meaning: ``{fingerprint: format}`` of the methods in use, int32: a state of another method
        or of settings under which the arrays mean something else has other names here.
      clock: ``{bucket: Clock}``.
      mu: ``{bucket: (size, *block shape)}``, average of the gradient; None without ``beta1``.
      nu: likewise, accumulator of squares for grafting; None where the graft has none.
      factors: ``{bucket: factor stacked over the blocks of that shape}``.
      rest: :class:`Moments` of the leaves without blocks, shaped like the parameters.
      fallback: state of the user's own fallback transformation, or None.
    """

    count: jax.Array
    skipped: jax.Array
    rejected: jax.Array
    meaning: Any
    clock: Any
    mu: Any
    nu: Any
    factors: Any
    rest: Any
    fallback: Any

    def kept(self) -> dict[str, Kept]:
        """What lives with the blocks, by bucket."""
        return {
            key: Kept(
                self.clock[key],
                factor,
                None if self.mu is None else self.mu[key],
                None if self.nu is None else self.nu[key],
            )
            for key, factor in self.factors.items()
        }

    def keeping(self, kept: dict[str, Kept], **changes: Any) -> "BlockState":
        """The state with other arrays of the blocks, and other changes."""
        return self._replace(
            clock={key: k.clock for key, k in kept.items()},
            mu=None if self.mu is None else {key: k.mu for key, k in kept.items()},
            nu=None if self.nu is None else {key: k.nu for key, k in kept.items()},
            factors={key: k.factor for key, k in kept.items()},
            **changes,
        )


def counts(number: int) -> list[jax.Array]:
    """Zeros of their own: donated states must not share buffers."""
    return [jnp.zeros((), jnp.int32) for _ in range(number)]


def placeholder(mu: bool, nu: bool, first: bool, second: bool, fallback: bool) -> BlockState:
    """The state of a tree without parameters; also what optax's placeholder gets.

    One leaf that is no parameter stands for everything that depends on parameters, so that
    ``optax.tree.map_params`` (also with further trees) hands it to ``transform_non_params``. The
    arguments say which fields there are.
    """

    def slot(there: bool) -> jax.Array | None:
        return counts(1)[0] if there else None

    moments = Moments(slot(first), slot(second))
    count, skipped, rejected, meaning, clock, factors = counts(6)
    return BlockState(
        count, skipped, rejected, meaning, clock, slot(mu), slot(nu), factors, moments,
        slot(fallback),
    )  # fmt: skip


def check_meaning(names: list[str], state: BlockState) -> None:
    """Raises ValueError where the state is that of another method or of other settings."""
    if not isinstance(state, BlockState):
        raise ValueError(
            f"the optimizer state is a {type(state).__name__}, not a BlockState: it is that of "
            "another optimizer (or of another part of the chain); call init with this one"
        )
    found = sorted(state.meaning) if isinstance(state.meaning, dict) else []
    if found != sorted(names):
        raise ValueError(
            f"the optimizer state was made by {_named(found)}, this optimizer is {_named(names)}: "
            "their arrays mean different things; call init again, or use the settings of the state"
        )


def _named(names: list[str]) -> str:
    return " and ".join(repr(n) for n in sorted(names)) or "an optimizer without blocks"
