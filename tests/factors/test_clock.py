"""What a block does at its first statistics and refreshes, whenever they come."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kradagrad_jax.factors import (
    SquareRoot,
    array_method,
    gram_method,
    star_method,
)
from kradagrad_jax.factors.ginger import GingerOptions, ginger_method
from kradagrad_jax.factors.kfac import KfacOptions, kfac_method
from kradagrad_jax.factors.kradagrad import alternating_method
from kradagrad_jax.factors.lowrank import low_rank_method
from kradagrad_jax.factors.lowrank_options import LowRankOptions, Online, Sketch
from kradagrad_jax.factors.method import Grams, Step
from kradagrad_jax.factors.singd import singd_method
from kradagrad_jax.factors.sirfshampoo import sirf_method
from kradagrad_jax.factors.tnt import TntOptions, tnt_method
from tests.factors.driver import (
    SHAPE,
    drive,
    gradients,
    krad,
    normal,
    rows,
    samples,
    shampoo,
    singd,
    sirf,
)
from tests.x64 import x64


def lowrank(**kw):
    online = Online(batch_size=3, overwrite_every=2)
    sketch = Sketch(rank=4, draw=lambda k, shape, side: jnp.eye(shape[side], 10)[:, :10])
    return low_rank_method(LowRankOptions(sketch, online=online, ema=0.9, **kw))


def clocked():
    ordinary, layered = (lambda t: normal(t, SHAPE)), rows
    for root in ("eigh", "newton", "tracked"):
        yield f"shampoo {root}", gram_method(root=root, **shampoo()), ordinary
    for k in (1, 3):
        yield f"square root {k}", array_method(SquareRoot(k), **shampoo()), ordinary
    for form in ("direct", "factored", "exact", "delayed"):
        for beta2 in (1.0, 0.9):
            yield f"star {form} {beta2}", star_method(krad(form=form, beta2=beta2)), ordinary
    for form, root in (("direct", "tracked"), ("factored", "eigh"), ("exact", "eigh")):
        yield f"kradagrad {form}", alternating_method(krad(form=form, root=root)), ordinary
    for kw in ({}, {"averaging": "capped"}, {"damping_rule": "exact", "inverse": "eigh"}):
        yield f"kfac {kw}", kfac_method(KfacOptions(**kw)), layered
    yield "singd", singd_method(singd()), layered
    yield "sirf", sirf_method(sirf()), ordinary
    for kw in ({}, {"averaging": "corrected"}, {"damping_rule": "joint"}):
        yield f"tnt {kw}", tnt_method(TntOptions(**kw)), samples
    yield "ginger", ginger_method(GingerOptions()), samples
    for kw in ({"start": "counted"}, {"overwrite": True}):
        yield f"low rank {kw}", lowrank(**kw), lambda t: rows(t, (12, 11))


@pytest.mark.parametrize(("name", "method", "make"), list(clocked()))
def test_what_comes_before_the_first_statistic_changes_nothing(name, method, make):
    """Three bad statistics first; then the same run as without them, first refresh included."""
    shape = (12, 11) if name.startswith("low rank") else SHAPE

    def draw(t, lost):
        # zero, then not finite; the step is no multiple of the interval
        late = jnp.maximum(t - lost, 1)
        value = jnp.where(t == 1, 0.0, jnp.nan)
        s = jax.tree.map(lambda x: jnp.where(t > lost, x, value), make(late))
        return s, normal(late, shape, 7)

    for lost in (0, 3):
        factor, step, u, _ = drive(
            method, lambda t, n=lost: draw(t, n), 4 + lost, shape=shape, every=100
        )
        if lost == 0:
            expected = (factor, u)
    assert int(step.statistics) == 4
    assert int(step.refreshes) == (method.refresh is not None)
    for a, b in zip(*map(jax.tree.leaves, ((factor, u[3:]), expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_before_the_first_refresh_the_gradient_passes():
    for name, method, _ in clocked():
        shape = (12, 11) if name.startswith("low rank") else SHAPE
        g, zero = normal(1, shape), jnp.zeros((), jnp.int32)
        u = method.precondition(method.init(shape, jnp.float32), g, Step(zero + 1, 1, zero, zero))
        if not name.startswith("ginger"):  # no refresh makes its direction
            np.testing.assert_allclose(u, g, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("statistics_every", [1, 4, 20])
def test_every_mode_has_its_turn_however_rare_statistics_are(statistics_every):
    method = alternating_method(krad())
    steps = 3 * statistics_every + 1
    factor, *_ = drive(
        method,
        gradients(shape=(3, 4, 2)),
        steps,
        every=2,
        statistics_every=statistics_every,
        shape=(3, 4, 2),
    )
    for p in factor.preconditioners:
        assert np.abs(np.asarray(p) - np.eye(len(p))).max() > 1e-2


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_pairs_are_overwritten_at_every_second_refresh_whatever_the_phase(offset):
    """An overwritten block has the statistic of that step, one that is not keeps its update."""
    with x64():
        method = lowrank(overwrite=True)
        factor, taken = method.init((12, 11), jnp.float64), 0
        for t in range(1, 4 * 3 + offset):
            counts = (t, 3, taken + 1, max(0, -(-(t - offset) // 3)))
            step = Step(*(jnp.asarray(x, jnp.int32) for x in counts))
            before, taken = factor, taken + 1
            factor = method.accumulate(factor, rows(t, (12, 11), dtype=jnp.float64), step)
            assert np.any(factor.a.pairs.w != before.a.pairs.w)
            if t >= offset and (t - offset) % 3 == 0:
                factor = method.refresh(factor, step)
                overwritten = int(step.refreshes) in (2, 4)
                assert (int(factor.a.valid) == 4) == overwritten, t


def test_names_tell_methods_apart():
    names = [method.name for _, method, _ in clocked()]
    assert all(names)
    assert gram_method(root="eigh", **shampoo()).name == "shampoo(gram, eigh, average)"
    assert gram_method(root="eigh", **shampoo(beta2=1.0)).name == "shampoo(gram, eigh, sum)"
    assert singd_method(singd()).name == "singd(dense|dense)"
    assert kfac_method(KfacOptions()).name == "kfac(gram, cholesky, factored, full|full)"


def test_grams_are_statistics_too():
    """A layer without curvature at its first steps is not preconditioned, nor ever scaled."""
    method = kfac_method(KfacOptions(damping_rule="exact", inverse="eigh"))

    def draw(t):
        s = rows(t)
        s = Grams(s.a.T @ s.a, s.g.T @ s.g)
        return jax.tree.map(lambda x: jnp.where(t > 2, x, 0), s), normal(t, SHAPE)

    _, step, u, _ = drive(method, draw, 4, every=10)
    assert int(step.statistics) == 2 and int(step.refreshes) == 1
    np.testing.assert_array_equal(u[1], normal(2, SHAPE))
    assert np.any(u[2] != normal(3, SHAPE))
