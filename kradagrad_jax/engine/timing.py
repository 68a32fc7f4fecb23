"""When statistics are taken, when preconditioners are refreshed, when they are first used."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Interval = int | jax.Array | Callable[[jax.Array], Any]


@dataclasses.dataclass(frozen=True)
class Timing:
    """The finer points of the schedule. Steps ``t`` count from 1.

    Attributes:
      start: first step whose gradient is preconditioned; before it the graft's direction is used.
      ramp: number of steps after ``start`` over which the preconditioned direction is blended in.
      first_refresh: first step at which there may be a refresh; ``None`` means ``start``. A block
        has its first refresh at the first step from then on at which it has a statistic, later
        ones at ``(t - phase) % refresh_every == 0``.
      phase: statistics are due at ``(t - phase) % statistics_every == 0``; a block that got none
        when the first were due (a gradient that was zero or not finite) takes the next there is.
        With the default of 1 the very first step takes statistics and refreshes.
      stagger: refresh 1/refresh_every of the blocks at every step instead of all at once, so that
        no step is a spike. Needs a fixed integer ``refresh_every``.
    """

    start: int = 1
    ramp: int = 0
    first_refresh: int | None = None
    phase: int = 1
    stagger: bool = False

    def __post_init__(self):
        if self.ramp < 0:
            raise ValueError(f"Timing.ramp must be at least 0, got {self.ramp}")


class Now(NamedTuple):
    """The scalars of one update.

    Attributes:
      count: number of the step, from 1 (int32).
      accepted: number of steps whose gradient was finite, at least 1 (int32).
      usable: whether that of this step is.
      fresh: whether there are statistics at this step; a bool where that is known while tracing.
      refresh_every: steps between refreshes (int, or int32).
      statistics_every: steps between statistics, likewise.
    """

    count: jax.Array
    accepted: jax.Array
    usable: jax.Array
    fresh: jax.Array | bool
    refresh_every: jax.Array | int
    statistics_every: jax.Array | int


def interval_at(every: Interval, count: jax.Array) -> jax.Array | int:
    """The interval at this step, at least 1; a Python int where it is one."""
    value = every(count) if callable(every) else every
    if isinstance(value, (int, np.integer)):
        if value < 1:
            raise ValueError(f"intervals are counted in steps, at least 1; got {value}")
        return int(value)
    return jnp.maximum(jnp.asarray(value).astype(jnp.int32), 1)


def statistics_due(count: jax.Array, every: jax.Array | int, timing: Timing) -> jax.Array | bool:
    """Whether statistics are taken at step ``count``."""
    if isinstance(every, int) and every == 1:
        return True
    return (count - timing.phase) % every == 0


def statistics_overdue(
    count: jax.Array, every: jax.Array | int, timing: Timing
) -> jax.Array | bool:
    """Whether the step at which the first statistics were due has passed."""
    return count > (timing.phase - 1) % every + 1


def may_refresh(count: jax.Array, timing: Timing) -> jax.Array:
    """Whether the step of the first refresh has come."""
    return count >= (timing.start if timing.first_refresh is None else timing.first_refresh)


def refresh_due(count: jax.Array, every: jax.Array | int, timing: Timing) -> jax.Array | bool:
    """Whether all preconditioners are refreshed at step ``count``.

    One that has not been refreshed yet does not wait for this.
    """
    return may_refresh(count, timing) & ((count - timing.phase) % every == 0)


def blend(count: jax.Array, timing: Timing) -> jax.Array | None:
    """Share of the preconditioned direction in the step, ``None`` where it is always 1."""
    if timing.start <= 1 and timing.ramp == 0:
        return None
    share = (count - timing.start + 1).astype(jnp.float32) / (timing.ramp + 1)
    return jnp.clip(share, 0.0, 1.0)


def stagger_table(costs: list[tuple[int, float]], every: int) -> list[np.ndarray]:
    """Spreads blocks over the steps of a refresh period.

    Args:
      costs: per bucket its number of blocks and the cost of refreshing one.
      every: the period.

    Returns:
      Per bucket an ``(every, width)`` int32 table of the blocks due at each phase, padded with -1.
    """
    load = np.zeros(every)
    slots: list[list[list[int]]] = [[[] for _ in range(every)] for _ in costs]
    for bucket in sorted(range(len(costs)), key=lambda i: -costs[i][1]):
        size, cost = costs[bucket]
        width = -(-size // every)
        for block in range(size):
            free = [p for p in range(every) if len(slots[bucket][p]) < width]
            phase = min(free, key=lambda p: (load[p], p))
            slots[bucket][phase].append(block)
            load[phase] += cost
    tables = []
    for per_phase in slots:
        width = max(len(p) for p in per_phase)
        tables.append(np.array([p + [-1] * (width - len(p)) for p in per_phase], np.int32))
    return tables
