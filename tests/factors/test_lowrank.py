"""RS-KFAC and the Brand K-FACs on one layer (float64)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kradagrad_jax as kj
from kradagrad_jax.curvature import CaptureSpec, Curvature, Layer
from kradagrad_jax.factors.lowrank import low_rank_method, solve_side
from kradagrad_jax.factors.lowrank_options import LowRankOptions, Online, Sketch
from kradagrad_jax.factors.method import Rows, Step
from tests.x64 import x64

N, SHAPE = 4, (24, 20)


def step(k, interval=1):
    count = jnp.asarray(k + 1, jnp.int32)
    return Step(count, interval, count, jnp.asarray(-(-k // interval), jnp.int32))


def rows(k, n=N, shape=SHAPE):
    rng = np.random.default_rng(k)
    return Rows(*(jnp.asarray(rng.normal(size=(n, d))) for d in shape))


def run(o, steps, make=rows, interval=1):
    method = low_rank_method(o)
    factor = method.init(SHAPE, jnp.float64)
    accumulate, refresh = jax.jit(method.accumulate), jax.jit(method.refresh)
    history = []
    for k in range(steps):
        factor = accumulate(factor, make(k), step(k, interval))
        if k % interval == 0:
            factor = refresh(factor, step(k, interval))
        history.append(factor)
    return method, history


def average(ema, batches, start=0.0):
    d = batches[0].shape[1]
    m = start * np.eye(d)
    for x in batches:
        m = ema * m + (1 - ema) * np.asarray(x.T @ x)
    return m


def matrix(side):
    return np.asarray((side.pairs.u * side.pairs.w) @ side.pairs.u.T)


ONLINE = Online(batch_size=N, overwrite_every=2, correct_every=2, corrected_share=0.5)
B = LowRankOptions(Sketch(rank=8, oversampling=4, power=2), start="counted", online=ONLINE, ema=0.9)


def test_online_pairs_are_the_average_while_nothing_was_cut():
    """P4: as long as n k <= r; the inverse is then the dense one."""
    with x64():
        _, history = run(B, 2)
        exact = average(0.9, [rows(k).a for k in range(2)])
        np.testing.assert_allclose(matrix(history[-1].a), exact, atol=1e-13)
        x = jnp.asarray(np.random.default_rng(5).normal(size=(24, 3)))
        o = B._replace(continuation=False)
        damping = 0.1 * float(history[-1].a.pairs.w[0]) + 0.9**2
        np.testing.assert_allclose(
            solve_side(o, history[-1].a, x, step(1)),
            np.linalg.solve(exact + damping * np.eye(24), x),
            rtol=1e-10,
        )


def test_what_was_cut_explains_the_difference():
    """P2 and P3: M - M~ = rho (E + T), so M~ is below M in the Loewner order."""
    with x64():
        _, history = run(B, 12)
        error = np.zeros((24, 24))
        before = np.zeros((24, 24))
        for k, factor in enumerate(history):
            pairs = history[k - 1].a.pairs if k else factor.a.pairs
            kept = np.asarray((pairs.u[:, :8] * pairs.w[:8]) @ pairs.u[:, :8].T) if k else 0.0
            error = 0.9 * (error + before - kept)
            before = matrix(factor.a)
            exact = average(0.9, [rows(i).a for i in range(k + 1)])
            np.testing.assert_allclose(exact - before, error, atol=1e-13)
            assert np.linalg.eigvalsh(exact - before)[0] > -1e-13


def test_pure_online_updates_allocate_nothing_quadratic():
    """No array of size d x d, in the state or anywhere in the program."""
    d, r, n = 60, 8, 4
    layer = Layer.dense("w", (d, d))
    spec = CaptureSpec.from_layers([layer])
    tx = kj.b_kfac(0.1, spec, sketch=Sketch(rank=r), online=Online(batch_size=n))
    params = {"w": jnp.ones((d, d))}
    state = tx.init(params)
    biggest = max(x.size for x in jax.tree.leaves(state))
    assert biggest == d * (r + n)

    method = low_rank_method(LowRankOptions(Sketch(rank=r), online=Online(batch_size=n)))
    factor = method.init((d, d), jnp.float32)
    inner = jax.make_jaxpr(lambda f: method.accumulate(f, Rows(*2 * [jnp.ones((n, d))]), step(0)))
    for eqn in _equations(inner(factor).jaxpr):
        assert all(v.aval.size < d * d for v in eqn.outvars), eqn


def _equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _equations(inner)


def test_overwriting_gives_the_pairs_of_a_sketch():
    """P10: at an overwrite step the pairs are those of the dense average; others are online."""
    with x64():
        o = B._replace(overwrite=True)
        _, history = run(o, 5, interval=1)
        plain = low_rank_method(o._replace(online=None, overwrite=False))
        side = history[2].a  # k = 2 is the first multiple of the period
        assert int(side.valid) == 8
        again = plain.refresh(
            type(history[2])(*(s._replace(pairs=s.pairs._replace(
                w=s.pairs.w[:8], u=s.pairs.u[:, :8])) for s in history[2])), step(2),
        )  # fmt: skip
        np.testing.assert_allclose(matrix(side), matrix(again.a), atol=1e-12)
        assert int(history[3].a.valid) == 8 + N
        np.testing.assert_allclose(side.m, average(0.9, [rows(k).a for k in range(3)]), atol=1e-13)


def test_corrections_reduce_the_error():
    with x64():
        _, plain = run(B, 11)
        _, corrected = run(B._replace(correct=True), 11)
        exact = average(0.9, [rows(k).a for k in range(11)])
        errors = [np.linalg.norm(exact - matrix(h[-1].a)) for h in (plain, corrected)]
        assert errors[1] < errors[0]


def test_full_rank_is_the_dense_inverse():
    """P7: sketches of rank >= d."""
    with x64():
        o = LowRankOptions(Sketch(rank=30), ema=0.9, continuation=False)
        method, history = run(o, 3)
        g = np.random.default_rng(9).normal(size=SHAPE)
        weights = 0.9 ** np.arange(3)[::-1]
        sides = []
        for i in range(2):
            m = sum(w * np.asarray(rows(k)[i].T @ rows(k)[i]) for k, w in enumerate(weights))
            m = m / weights.sum()
            sides.append(np.linalg.inv(m + 0.1 * np.linalg.eigvalsh(m)[-1] * np.eye(len(m))))
        ours = method.precondition(history[-1], jnp.asarray(g), step(2))
        np.testing.assert_allclose(ours, sides[0] @ g @ sides[1], rtol=1e-9)


def test_identity_start_is_the_zero_start_plus_damping():
    """P14."""
    with x64():
        identity = LowRankOptions(Sketch(rank=30), start="identity", continuation=False)
        counted = identity._replace(start="counted")
        a, b = run(identity, 4)[1][-1].a.m, run(counted, 4)[1][-1].a
        np.testing.assert_allclose(a, b.m + 0.95**4 * np.eye(24), atol=1e-14)


def test_scale_only_scales():
    """P11: without the identity the direction does not depend on the size of the statistics."""
    with x64():
        o = B._replace(start="corrected")
        scaled = lambda k: Rows(3 * rows(k).a, rows(k).g)  # noqa: E731
        g = jnp.asarray(np.random.default_rng(9).normal(size=SHAPE))
        (method, a), (_, b) = run(o, 6), run(o, 6, scaled)
        u, v = (method.precondition(h[-1], g, step(5)) for h in (a, b))
        np.testing.assert_allclose(9 * v, u, rtol=1e-9)


def test_ranks_may_change_without_new_shapes():
    with x64():
        schedule = Sketch(rank=8, power=2, rank_schedule=lambda k: jnp.where(k < 2, 8, 5))
        for online in (None, ONLINE):
            o = LowRankOptions(schedule, online=online, ema=0.9)
            _, history = run(o, 3)
            side = history[-1].a
            assert side.pairs.w.shape == history[0].a.pairs.w.shape
            used = 5 if online is None else 5 + N
            assert int(side.valid) == used
            assert not side.pairs.w[used:].any()


def test_applicability_is_judged_per_side():
    o = B._replace(sketch=Sketch(rank=17))
    factor = low_rank_method(o).init((24, 20), jnp.float32)
    assert factor.a.m is None and factor.a.pairs.u.shape == (24, 21)
    assert factor.g.m is not None and factor.g.pairs.u.shape == (20, 17)


def test_messages():
    with pytest.raises(ValueError, match=r"Sketch.rank must be an integer >= 1"):
        Sketch(rank=0)
    with pytest.raises(ValueError, match=r"Online.truncate"):
        Online(truncate="never")
    spec = CaptureSpec.from_layers([Layer.dense("w", (30, 30))])
    with pytest.raises(ValueError, match="batch_size"):
        kj.b_kfac(0.1, spec, sketch=Sketch(rank=4))
    tx = kj.b_kfac(0.1, spec, sketch=Sketch(rank=4), online=Online(batch_size=3))
    params = {"w": jnp.ones((30, 30))}
    curvature = Curvature.from_rows({"w": (jnp.ones((5, 30)), jnp.ones((5, 30)))}, spec)
    with pytest.raises(ValueError, match="set up for 3 rows"):
        tx.update(params, tx.init(params), params, curvature=curvature)
    with pytest.raises(TypeError, match=r"b_kfac.*unexpected keyword argument 'rank'"):
        kj.b_kfac(0.1, spec, rank=4)
