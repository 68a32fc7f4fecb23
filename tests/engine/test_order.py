"""The order of fold, refresh, correct and apply, and every block's clock, seen by toy methods."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kradagrad_jax as kj

SHAPE = (2, 2)


class Clock(NamedTuple):
    """What a method was told, as it was told it.

    Attributes:
      folded: sum of the first entries of the statistics.
      applied: ``folded`` at the last refresh, what multiplies the gradient.
      seen: (4,): ``statistics`` and ``refreshes`` at the last fold, then at the last refresh.
      corrected: ``applied`` and first entry of the statistic at the last correction, and their
        number.
    """

    folded: jax.Array
    applied: jax.Array
    seen: jax.Array
    corrected: jax.Array


def pair(step: Any) -> jax.Array:
    return jnp.stack([step.statistics, step.refreshes]).astype(jnp.float32)


def init(shape: Any, dtype: Any) -> Clock:
    return Clock(
        jnp.zeros((), dtype), jnp.zeros((), dtype), -jnp.ones(4, dtype), jnp.zeros(3, dtype)
    )


def accumulate(factor: Clock, g: jax.Array, step: Any) -> Clock:
    return factor._replace(
        folded=factor.folded + g[0, 0],
        seen=jnp.concatenate([pair(step).astype(g.dtype), factor.seen[2:]]),
    )


def refresh(factor: Clock, step: Any) -> Clock:
    return factor._replace(
        applied=factor.folded,
        seen=jnp.concatenate([factor.seen[:2], pair(step).astype(factor.seen.dtype)]),
    )


def correct(factor: Clock, g: jax.Array, step: Any) -> Clock:
    return factor._replace(corrected=jnp.stack([factor.applied, g[0, 0], factor.corrected[2] + 1]))


def precondition(factor: Clock, g: jax.Array, step: Any) -> jax.Array:
    return g * factor.applied


METHOD = kj.BlockMethod(init, accumulate, refresh, precondition)


def run(tx: Any, grads: list[Any]) -> tuple[list[Any], list[Any]]:
    """Updates and states of all steps."""
    state, update, updates, states = tx.init(grads[0]), jax.jit(tx.update), [], []
    for g in grads:
        u, state = update(g, state)
        updates.append(u)
        states.append(state)
    return updates, states


def ones(*values: float) -> list[dict[str, jax.Array]]:
    """Gradients of one parameter, constant matrices."""
    return [{"w": jnp.full(SHAPE, float(v))} for v in values]


def clocks(state: Any) -> Clock:
    """The factors of all blocks, stacked."""
    return next(iter(state.factors.values()))


def told(states: list[Any], block: int = 0) -> list[list[int]]:
    return [np.asarray(clocks(s).seen[block]).astype(int).tolist() for s in states]


def shares(updates: list[Any], grads: list[Any], name: str = "w") -> list[float]:
    return [float(u[name][0, 0] / g[name][0, 0]) for u, g in zip(updates, grads, strict=True)]


def number(state: Any, name: str) -> int:
    return int(kj.diagnostics(state)[name])


def test_refresh_first_applies_what_this_step_has_refreshed():
    grads = ones(1, 2, 4, 8)
    updates, states = run(kj.scale_by_blocks(METHOD, refresh_every=2), grads)
    assert shares(updates, grads) == [1, 1, 7, 7]
    # at a fold the statistic under way is counted, at a refresh the refresh under way is not
    assert told(states) == [[1, 0, 1, 0], [2, 1, 1, 0], [3, 1, 3, 1], [4, 2, 3, 1]]
    assert [number(s, "refreshes") for s in states] == [1, 1, 2, 2]
    assert [number(s, "statistics") for s in states] == [1, 2, 3, 4]


def test_refresh_last_applies_what_earlier_steps_have_refreshed():
    grads = ones(1, 2, 4, 8)
    updates, states = run(kj.scale_by_blocks(METHOD, refresh_every=2, refresh="last"), grads)
    assert shares(updates, grads)[1:] == [1, 1, 7]
    assert told(states) == [[1, 0, 1, 0], [2, 1, 1, 0], [3, 1, 3, 1], [4, 2, 3, 1]]
    assert float(clocks(states[-1]).applied[0]) == 7


def test_refresh_is_first_or_last():
    with pytest.raises(ValueError, match="refresh"):
        kj.scale_by_blocks(METHOD, refresh="never").init(ones(1)[0])


@pytest.mark.parametrize("order", ["first", "last"])
def test_correct_sees_the_new_basis_and_the_statistic_of_the_step(order):
    method = METHOD._replace(correct=correct)
    tx = kj.scale_by_blocks(method, refresh_every=2, statistics_every=2, refresh=order)
    grads = ones(1, 2, 4, 8, 16)
    _, states = run(tx, grads)
    found = [np.asarray(clocks(s).corrected[0]).tolist() for s in states]
    # only steps with a statistic; there the refresh has happened
    assert found == [[1, 1, 1], [1, 1, 1], [5, 4, 2], [5, 4, 2], [21, 16, 3]]


def test_correct_is_called_where_no_refresh_is_due():
    method = METHOD._replace(correct=correct)
    _, states = run(kj.scale_by_blocks(method, refresh_every=3), ones(1, 2, 4, 8))
    found = [np.asarray(clocks(s).corrected[0]).tolist() for s in states]
    assert found == [[1, 1, 1], [1, 2, 2], [1, 4, 3], [15, 8, 4]]


def test_correct_is_applied_at_once_where_the_refresh_comes_first():
    method = METHOD._replace(
        correct=correct, precondition=lambda factor, g, step: g * factor.corrected[1]
    )
    for order, expected in (("first", [1.0, 2.0, 4.0]), ("last", [None, 1.0, 2.0])):
        grads = ones(1, 2, 4)
        updates, _ = run(kj.scale_by_blocks(method, refresh=order), grads)
        for share, value in zip(shares(updates, grads), expected, strict=True):
            assert value is None or share == value


def test_a_correction_that_is_not_finite_is_undone():
    def break_it(factor: Clock, g: jax.Array, step: Any) -> Clock:
        bad = jnp.where(g[0, 0] == 2, jnp.nan, 1.0)
        return correct(factor, g, step)._replace(applied=factor.applied * bad)

    grads = ones(1, 2, 4)
    updates, states = run(kj.scale_by_blocks(METHOD._replace(correct=break_it)), grads)
    assert shares(updates, grads) == [1, 1, 1]
    assert [number(s, "rejected") for s in states] == [0, 1, 1]


def test_a_method_without_refresh_has_none_counted():
    method = kj.BlockMethod(init, accumulate, None, lambda factor, g, step: g * factor.folded)
    grads = ones(1, 2, 4)
    updates, states = run(kj.scale_by_blocks(method, refresh_every=2), grads)
    assert shares(updates, grads) == [1, 3, 7]
    assert [number(s, "refreshes_max") for s in states] == [0, 0, 0]
    assert [number(s, "statistics") for s in states] == [1, 2, 3]
    assert [x[:2] for x in told(states)] == [[1, 0], [2, 0], [3, 0]]


def test_precondition_is_told_all_refreshes_so_far():
    method = METHOD._replace(
        precondition=lambda factor, g, step: g * (10 * step.statistics + step.refreshes)
    )
    grads = ones(1, 2, 4)
    updates, _ = run(kj.scale_by_blocks(method, refresh_every=2), grads)
    # the two clocks are those of the block, also in a function that all blocks share
    assert shares(updates, grads) == [11, 21, 32]


def test_every_block_has_a_clock():
    """The gradient of one parameter is zero for three steps: its first refresh waits for it."""
    grads = [{"a": jnp.full(SHAPE, 2.0), "b": jnp.full(SHAPE, float(t >= 3))} for t in range(6)]
    updates, states = run(kj.scale_by_blocks(METHOD, refresh_every=10), grads)
    a, b = told(states, 0), told(states, 1)
    assert a == [[t, int(t > 1), 1, 0] for t in range(1, 7)]
    assert b == [[-1] * 4] * 3 + [[1, 0, 1, 0], [2, 1, 1, 0], [3, 1, 1, 0]]
    assert [float(u["a"][0, 0]) for u in updates] == [4.0] * 6
    assert [float(u["b"][0, 0]) for u in updates] == [0, 0, 0, 1, 1, 1]
    assert [number(s, "statistics") for s in states] == [0, 0, 0, 1, 2, 3]
    assert [number(s, "statistics_max") for s in states] == [1, 2, 3, 4, 5, 6]
    assert [number(s, "refreshes") for s in states] == [0, 0, 0, 1, 1, 1]
    assert [number(s, "refreshes_max") for s in states] == [1] * 6
    assert number(states[-1], "rejected") == 0


def test_a_zero_statistic_counts_once_the_clock_runs():
    _, states = run(kj.scale_by_blocks(METHOD, refresh_every=1), ones(0, 1, 0, 0, 2))
    assert [number(s, "statistics") for s in states] == [0, 1, 2, 3, 4]
    assert [number(s, "refreshes") for s in states] == [0, 1, 2, 3, 4]


def test_a_first_statistic_whose_factor_is_not_finite_does_not_start_the_clock():
    def burst(factor: Clock, g: jax.Array, step: Any) -> Clock:
        new = accumulate(factor, g, step)
        return new._replace(folded=jnp.where(g[0, 0] == 9, jnp.inf, new.folded))

    method = METHOD._replace(accumulate=burst)
    grads = ones(9, 1, 9, 2)
    updates, states = run(kj.scale_by_blocks(method, refresh_every=10), grads)
    assert shares(updates, grads)[1:] == [1, 1, 1]
    assert [number(s, "statistics") for s in states] == [0, 1, 1, 2]
    assert [number(s, "refreshes") for s in states] == [0, 1, 1, 1]
    assert number(states[-1], "rejected") >= 1


def test_phase_and_interval_of_statistics():
    tx = kj.scale_by_blocks(METHOD, statistics_every=2, refresh_every=4, timing=kj.Timing(phase=2))
    _, states = run(tx, ones(*range(1, 9)))
    assert [number(s, "statistics") for s in states] == [0, 1, 1, 2, 2, 3, 3, 4]
    # the first at the first statistic, which is due, too; then steps 6, 10, ..
    assert [number(s, "refreshes") for s in states] == [0, 1, 1, 1, 1, 2, 2, 2]


def test_the_first_refresh_waits_for_its_step():
    tx = kj.scale_by_blocks(METHOD, refresh_every=4, timing=kj.Timing(start=3))
    _, states = run(tx, ones(*[1.0] * 9))
    assert [number(s, "refreshes") for s in states] == [0, 0, 1, 1, 2, 2, 2, 2, 3]
    assert told(states)[2] == [3, 0, 3, 0]


def test_staggered_blocks_all_start_at_their_first_statistic_and_then_take_turns():
    names = [f"p{i}" for i in range(5)]
    grads = [
        {n: jnp.full(SHAPE, float(t >= 2) if n == "p4" else 1.0) for n in names} for t in range(11)
    ]
    tx = kj.scale_by_blocks(METHOD, refresh_every=4, timing=kj.Timing(stagger=True))
    _, states = run(tx, grads)
    counted = np.array([np.asarray(clocks(s).seen[:, 3]) for s in states]).astype(int)
    assert counted[0].tolist() == [0, 0, 0, 0, -1]  # -1: none yet
    assert counted[2, 4] >= 0
    refreshed = np.diff(np.concatenate([np.full((1, 5), -1), counted]), axis=0)
    for start in (3, 7):  # every period of four steps: each block once
        np.testing.assert_array_equal(refreshed[start : start + 4].sum(axis=0), np.ones(5))
    assert refreshed[3:].sum(axis=1).max() == 2  # five blocks over four steps


def overflowing(limit: float) -> kj.BlockMethod:
    """A direction that overflows where the gradient is large."""
    return METHOD._replace(
        precondition=lambda factor, g, step: jnp.where(jnp.abs(g) > limit, jnp.inf, g)
    )


@pytest.mark.parametrize("graft", [None, "sgd", "adam"])
def test_a_direction_that_overflows_is_no_step(graft):
    """The raw gradient in its place would have another unit."""
    tx = kj.scale_by_blocks(overflowing(3.0), graft=graft)
    grads = [{"a": jnp.full(SHAPE, v), "b": jnp.ones(SHAPE)} for v in (1.0, 4.0, 2.0)]
    updates, states = run(tx, grads)
    assert [number(s, "rejected") for s in states] == [0, 1, 1]
    assert [bool(np.all(u["a"] == 0)) for u in updates] == [False, True, False]
    assert all(np.all(u["b"] > 0) for u in updates)


def vanishing() -> kj.BlockMethod:
    """A direction that is lost where the gradient is small."""
    return METHOD._replace(
        precondition=lambda factor, g, step: jnp.where(jnp.abs(g) < 1, 0.0, 2 * g)
    )


@pytest.mark.parametrize("without_refresh", [False, True])
@pytest.mark.parametrize("graft", ["none", "sgd"])
def test_a_direction_that_is_lost_counts_and_falls_back_to_the_graft(graft, without_refresh):
    method = vanishing()._replace(refresh=None) if without_refresh else vanishing()
    grads = [{"a": jnp.full(SHAPE, v), "b": jnp.full(SHAPE, 3.0)} for v in (3.0, 0.5, 0.0)]
    updates, states = run(kj.scale_by_blocks(method, graft=graft), grads)
    assert [number(s, "rejected") for s in states] == [0, 1, 1]  # nothing is lost of a zero
    full = 3.0 if graft == "sgd" else 6.0
    assert [float(u["b"][0, 0]) for u in updates] == pytest.approx([full] * 3)
    left = 0.5 if graft == "sgd" else 0.0
    assert [float(u["a"][0, 0]) for u in updates] == pytest.approx([full, left, 0.0])


def test_a_direction_of_zero_before_the_first_refresh_is_no_fault():
    """A method that has no preconditioner yet may say so."""
    tx = kj.scale_by_blocks(METHOD, timing=kj.Timing(first_refresh=3))
    _, states = run(tx, ones(1, 1, 1))
    assert [number(s, "rejected") for s in states] == [0, 0, 0]


def test_a_step_of_nan_leaves_every_clock_alone():
    grads = [*ones(1), {"w": jnp.full(SHAPE, jnp.nan)}, *ones(2)]
    updates, states = run(kj.scale_by_blocks(METHOD, refresh_every=1), grads)
    assert [number(s, "statistics") for s in states] == [1, 1, 2]
    assert [number(s, "refreshes") for s in states] == [1, 1, 2]
    assert [number(s, "skipped") for s in states] == [0, 1, 1]
    assert not np.any(updates[1]["w"])
