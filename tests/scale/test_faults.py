"""Every alias survives bad numbers, stays finite, goes on, and counts what happened.

One test per alias: its scenarios share one compiled update.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kradagrad_jax.engine import BlockState, Timing, scale_by_blocks
from kradagrad_jax.factors.lowrank import LowRankFactor, Side
from kradagrad_jax.factors.method import BlockMethod
from tests.registry import all_finite
from tests.scale import zoo
from tests.scale.zoo import over_all

REFRESHED = {"shampoo", "kradagrad_star", "kradagrad", "rs_kfac", "sre_kfac"}
PRODUCTS = {"sirfshampoo", "ikfac", "ingd", "singd"}  # the factor is what multiplies the gradient
LATE = {"soap", "kl_shampoo", "kl_soap"}  # the first gradient makes the first basis, not a step
STILL = PRODUCTS | {"b_kfac"}  # nothing is left to precondition with: no step


def scaled(tree: Any, c: float) -> Any:
    return jax.tree.map(lambda x: x * jnp.asarray(c, x.dtype), tree)


def scaled_curvature(extra: dict[str, Any], c: float) -> dict[str, Any]:
    """The statistics of gradients that are c times as large."""
    found = extra.get("curvature")
    if hasattr(found, "scale_cotangents"):
        return {"curvature": found.scale_cotangents(c)}
    if found is None:
        return extra
    return {"curvature": type(found)(scaled(found.values, c), found.terms, found.fresh)}


def poisoned(tree: Any, value: float, rng: np.random.Generator) -> Any:
    """One entry of one leaf, drawn at random, is ``value``."""
    leaves, treedef = jax.tree.flatten(tree)
    i = rng.integers(len(leaves))
    at = tuple(rng.integers(n) for n in leaves[i].shape)
    leaves[i] = leaves[i].at[at].set(value)
    return treedef.unflatten(leaves)


def counted(before: dict[str, int], state: Any) -> dict[str, int]:
    """The counters that have changed, and by how much."""
    after = zoo.counters(state)
    return {k: after[k] - before[k] for k in before if after[k] != before[k]}


def size(updates: Any) -> float:
    return max(float(jnp.max(jnp.abs(u))) for u in jax.tree.leaves(updates))


def check_goes_on(case: zoo.Case, p: Any, state: Any, what: str) -> None:
    """The loss falls by a good deal, from where the fault has left it."""
    before = float(zoo.loss(p))
    p, state = case.train(p, state, range(20, 60))
    assert all_finite((p, state)), (case.name, what)
    assert float(zoo.loss(p)) < 0.85 * before, (case.name, what, before)


def bad_gradients(case: zoo.Case, p: Any, state: Any) -> Any:
    """NaN or infinity somewhere, at random steps: such a step changes nothing but counts."""
    rng, before = np.random.default_rng(7), zoo.counters(state)
    bad = set(rng.choice(12, 4, replace=False).tolist())
    for t in range(12):
        _, grads, extra = case.measure(p, t)
        if t in bad:
            grads = poisoned(grads, rng.choice([np.nan, np.inf, -np.inf]), rng)
        old = zoo.engine_state(zoo.copied(state))
        updates, state = case.tx.update(grads, state, p, **extra)
        assert all_finite((updates, state)), (case.name, t)
        assert (size(updates) == 0) == (t in bad), (case.name, t)
        if t in bad:
            new = zoo.engine_state(state)
            same = (old.factors, old.mu, old.nu), (new.factors, new.mu, new.nu)
            jax.tree.map(np.testing.assert_array_equal, *same)
    assert counted(before, state) == {"count": 12, "statistics": 8, "skipped": 4}
    return p, state


def bad_statistics(case: zoo.Case, p: Any, state: Any) -> Any:
    """The curvature alone is NaN: every block keeps its factor, and the step happens."""
    before = zoo.counters(state)
    for t in range(4):
        _, grads, extra = case.measure(p, t)
        extra = scaled_curvature(extra, np.nan if t % 2 else 1.0)
        updates, state = case.tx.update(grads, state, p, **extra)
        assert all_finite((updates, state)) and size(updates) > 0, (case.name, t)
    good = {"statistics": 4}
    if case.kind != "gradients":
        good = {"statistics": 2, "rejected": 2 * zoo.blocks(state)}
    assert counted(before, state) == {"count": 4} | good, case.name
    return p, state


def odd_scales(case: zoo.Case, p: Any, state: Any) -> Any:
    """Squares of 1e30 overflow: such gradients are skipped. Those of 1e-30 vanish."""
    for scale in (1e30, 1e-30):
        before = zoo.counters(state)
        for t in range(4):
            _, grads, extra = case.measure(p, t)
            extra = scaled_curvature(extra, scale)
            updates, state = case.tx.update(scaled(grads, scale), state, p, **extra)
            assert all_finite((updates, state)), (case.name, scale, t)
        other = {"skipped": 4} if scale > 1 else {"statistics": 4}
        assert counted(before, state) == {"count": 4} | other, (case.name, scale)
    return p, state


def zero_gradients(case: zoo.Case) -> Any:
    """100 steps of nothing from the start; the first real gradient moves every parameter."""
    p = zoo.params()
    state, zeros = case.tx.init(p), scaled(p, 0.0)
    extra = scaled_curvature(case.measure(p, 0)[2], 0.0)
    for _ in range(100):
        updates, state = case.tx.update(zeros, state, p, **extra)
    assert size(updates) == 0 and all_finite(state), case.name
    # nothing was seen yet, and the first statistic will be the first
    assert zoo.counters(state) == dict(zip(zoo.COUNTERS, (100, 0, 0, 0), strict=True))
    new, state, _ = case.step(p, state, 0)
    if case.name in LATE:
        new, state, _ = case.step(new, state, 1)
    moved = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), new, p)
    assert min(jax.tree.leaves(moved)) > 1e-4, (case.name, moved)
    return new, state


def one_example(step: int) -> tuple[jax.Array, jax.Array]:
    """The same example all the time: gradients and statistics of rank one."""
    del step
    return jax.tree.map(lambda v: jnp.broadcast_to(v[:1], v.shape), zoo.batch(0))


def ill_conditioned(step: int) -> tuple[jax.Array, jax.Array]:
    """Inputs from 1 to 1e-6: the condition number of their second moment is 1e12."""
    x, y = zoo.batch(step)
    return x * 10.0 ** -jnp.linspace(0, 6, x.shape[1])[None, :], y


def trained_on(data: Any, case: zoo.Case) -> Any:
    p = zoo.params()
    state = case.tx.init(p)
    for t in range(30):
        p, state, _ = case.step(p, state, t, data(t))
        assert all_finite((p, state)), (case.name, data.__name__, t)
    found = zoo.counters(state)
    assert found == dict(zip(zoo.COUNTERS, (30, 30, 0, 0), strict=True)), case.name
    return p, state


def broken(state: Any) -> Any:
    """The state with NaN for what is kept of statistics (by hand: guards keep NaN out)."""

    def nan(tree: Any) -> Any:
        return jax.tree.map(lambda x: x * jnp.nan, tree)

    def one(factor: Any) -> Any:
        if isinstance(factor, LowRankFactor):
            return LowRankFactor(*(one(side) for side in factor))
        if isinstance(factor, Side):
            if factor.m is None:
                return factor._replace(pairs=factor.pairs._replace(w=nan(factor.pairs.w)))
            return factor._replace(m=nan(factor.m))
        name = next((n for n in ("statistics", "values") if hasattr(factor, n)), None)
        if name is None:
            return nan(factor)
        return factor._replace(**{name: nan(getattr(factor, name))})

    def of_engine(x: Any) -> Any:
        own = isinstance(x, BlockState)
        return x._replace(factors={k: one(f) for k, f in x.factors.items()}) if own else x

    return jax.tree.map(of_engine, state, is_leaf=lambda x: isinstance(x, BlockState))


def broken_factors(case: zoo.Case, p: Any, state: Any) -> None:
    """Beyond repair: what preconditioned last serves on, and the loss falls all the same.

    In two steps every block undoes two statistics; besides, one refresh (where a NaN reaches it),
    or two directions where the factor itself is what multiplies the gradient: these take no step
    any more, which is counted. Ginger drops a direction that is NaN.
    """
    state, start = broken(state), float(zoo.loss(p))
    before, n = zoo.counters(state), zoo.blocks(state)
    p, state = case.train(p, state, range(6, 8))
    undone = counted(before, state).get("rejected", 0)
    if case.name in REFRESHED:
        assert undone == 3 * n, case.name
    elif case.name in PRODUCTS:
        assert undone == 4 * n, case.name
    elif case.name != "ginger":
        assert undone >= 2 * n, case.name
    p, state = case.train(p, state, range(8, 46))
    assert all_finite(p), case.name
    if case.name not in LATE:  # their momentum is in the factor and stands still with it
        assert float(zoo.loss(p)) < (1.02 if case.name in STILL else 0.9) * start, case.name
    if case.name in PRODUCTS:
        assert counted(before, state)["rejected"] == 80 * n, case.name


@over_all
def test_faults(case):
    p, state = case.train(zoo.params(), case.tx.init(zoo.params()), range(6))
    for scenario in (bad_gradients, bad_statistics, odd_scales):
        check_goes_on(case, *scenario(case, p, zoo.copied(state)), scenario.__name__)
    check_goes_on(case, *zero_gradients(case), "zero gradients")
    for data in (one_example, ill_conditioned):
        check_goes_on(case, *trained_on(data, case), data.__name__)
    broken_factors(case, p, state)


def failing(at: Any, where: str) -> BlockMethod:
    """Scales the gradient by 1 / count of the last refresh; fails at some steps, in blocks < 0."""

    def bad(mark: jax.Array, step: Any) -> jax.Array:
        return jnp.where((mark < 0) & jnp.any(step.count == jnp.asarray(at)), jnp.nan, 1.0)

    def refresh(factor: Any, step: Any) -> Any:
        mark, _ = factor
        scale = 1 / step.count.astype(mark.dtype)
        return mark, scale * (bad(mark, step) if where == "refresh" else 1.0)

    def precondition(factor: Any, g: jax.Array, step: Any) -> jax.Array:
        mark, scale = factor
        return g * scale * (bad(mark, step) if where == "direction" else 1.0)

    return BlockMethod(
        init=lambda shape, dtype: (jnp.zeros((), dtype), jnp.ones((), dtype)),
        accumulate=lambda factor, g, step: (g[0, 0], factor[1]),
        refresh=refresh,
        precondition=precondition,
    )


def scales(where: str, timing: Timing) -> tuple[list[list[float]], list[int]]:
    """Per step what each of three blocks is multiplied by, and the count of failures so far."""
    tx = scale_by_blocks(failing((3, 4), where), refresh_every=2, timing=timing)
    grads = {"a": jnp.ones((4, 3)), "b": -jnp.ones((4, 3)), "c": -jnp.ones((4, 3))}
    state, update = tx.init(grads), jax.jit(tx.update)
    seen, rejected = [], []
    for _ in range(5):
        updates, state = update(grads, state)
        seen.append([float(updates[k][0, 0] / grads[k][0, 0]) for k in grads])
        rejected.append(int(state.rejected))
    return seen, rejected


def test_a_refresh_that_fails_keeps_the_last_preconditioner_of_its_blocks():
    seen, rejected = scales("refresh", Timing())
    third, fifth = np.float32(1 / 3), np.float32(1 / 5)
    late = [third, 1.0, 1.0]
    np.testing.assert_array_equal(seen, [[1.0] * 3, [1.0] * 3, late, late, [fifth] * 3])
    assert rejected == [0, 0, 2, 2, 2]


def test_a_staggered_refresh_that_fails_is_counted_block_by_block():
    seen, rejected = scales("refresh", Timing(stagger=True))
    assert np.all(np.isfinite(seen))
    assert rejected[1] == 0 and rejected[-1] == 2  # b and c have one turn each at steps 3 and 4


def test_a_direction_that_is_not_finite_is_no_step():
    seen, rejected = scales("direction", Timing())
    third, fifth = np.float32(1 / 3), np.float32(1 / 5)
    still = [third, 0.0, 0.0]
    np.testing.assert_array_equal(seen, [[1.0] * 3, [1.0] * 3, still, still, [fifth] * 3])
    assert rejected == [0, 0, 2, 4, 4]
