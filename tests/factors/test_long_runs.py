"""Long runs and rare inputs, on one block driven as the engine promises to drive a method."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kradagrad_jax.factors import (
    KradOptions,
    SquareRoot,
    array_method,
    gram_method,
    moving,
    star_method,
)
from kradagrad_jax.factors.ginger import GingerOptions, ginger_method
from kradagrad_jax.factors.kfac import KfacOptions, kfac_method
from kradagrad_jax.factors.kradagrad import alternating_method
from kradagrad_jax.factors.lowrank import low_rank_method
from kradagrad_jax.factors.lowrank_options import LowRankOptions, Online, Sketch
from kradagrad_jax.factors.method import Grams, Rows, Step
from kradagrad_jax.factors.singd import SingdOptions, singd_method
from kradagrad_jax.factors.sirfshampoo import SirfOptions, sirf_method
from kradagrad_jax.factors.tnt import TntOptions, tnt_method
from kradagrad_jax.linalg.structures import structure
from tests.x64 import x64

SHAPE = (5, 4)


def finite(tree):
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in leaves]))


def chosen(take, new, old):
    return jax.tree.map(lambda n, o: jnp.where(take, n, o), new, old)


def drive(method, draw, steps, *, shape=SHAPE, every=1, statistics_every=1, dtype=jnp.float32):
    """Final factor and step, directions of all steps, and rejections.

    ``draw``: step from 1 -> (statistic, gradient).
    """

    def one(carry, t):
        factor, taken, refreshed, bad = carry
        statistic, g = draw(t)
        parts = [jnp.any(x != 0) for x in jax.tree.leaves(statistic)]
        due = ((t - 1) % statistics_every == 0) & ((taken > 0) | jnp.all(jnp.stack(parts)))
        new = method.accumulate(factor, statistic, Step(t, every, taken + 1, refreshed))
        good = finite(new)
        factor = chosen(due & good, new, factor)
        taken, bad = taken + (due & good), bad + (due & ~good)
        if method.refresh is not None:
            refresh = method.refresh
            due = (taken > 0) & ((refreshed == 0) | ((t - 1) % every == 0))
            step = Step(t, every, taken, refreshed)
            new = jax.lax.cond(due, lambda f: refresh(f, step), lambda f: f, factor)
            good = finite(new)
            factor = chosen(good, new, factor)
            refreshed, bad = refreshed + (due & good), bad + (due & ~good)
        u = method.precondition(factor, g, Step(t, every, taken, refreshed))
        return (factor, taken, refreshed, bad), u

    zero = jnp.zeros((), jnp.int32)

    @jax.jit
    def run():
        start = (method.init(shape, dtype), zero, zero, zero)
        return jax.lax.scan(one, start, jnp.arange(1, steps + 1, dtype=jnp.int32))

    (factor, taken, refreshed, bad), u = run()
    return factor, Step(jnp.asarray(steps), every, taken, refreshed), u, int(bad)


def normal(t, shape, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.fold_in(jax.random.key(seed), t), shape, dtype)


def gradients(scale=1.0, shape=SHAPE, dtype=jnp.float32):
    def draw(t):
        g = scale * normal(t, shape, dtype=dtype)
        return g, g

    return draw


def rows(t, shape=SHAPE, n=3, dtype=jnp.float32):
    a, g = (normal(t, (n, d), seed, dtype) for seed, d in enumerate(shape, 1))
    return Rows(a, g)


def layer(shape=SHAPE, n=3, dtype=jnp.float32):
    def draw(t):
        s = rows(t, shape, n, dtype)
        return s, s.a.T @ s.g

    return draw


def samples(t):
    return normal(t, (2, *SHAPE), 3)


def cosine(a, b):
    a, b = (np.asarray(x, np.float64).reshape(-1) for x in (a, b))
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def shampoo(**kw):
    base = {
        "beta2": 0.9, "damping": 1e-6, "damping_rule": "relative", "initial": 0.0,
        "exponent": None, "bias_correction": True,
    }  # fmt: skip
    return base | kw


def krad(**kw):
    base = {
        "form": "direct", "bound": "sym", "initial": 1.0, "initial_scale": "gradient",
        "damping": 0.0, "beta2": 1.0, "exponent": None, "root": "eigh", "root_damping": 0.0,
    }  # fmt: skip
    return KradOptions(**(base | kw))


def sirf(lr_cov=0.6, names="dense", **kw):
    return SirfOptions(
        lambda dims: tuple(structure(names) for _ in dims),
        lambda order: (None,) * order,
        damping=1e-4,
        lr_cov=lr_cov,
        **({"riemannian_momentum": 0.0} | kw),
    )


SINGD = {
    "damping": 3e-5,
    "lr_cov": 0.8,
    "riemannian_momentum": 0.0,
    "normalize_lr_cov": "frobenius",
}


def singd(names="dense", **kw):
    return SingdOptions(structures=(structure(names),) * 2, **(SINGD | kw))


# ---- factors that run away from each other


def balanced_cases():
    for names in ("dense", "diagonal", "tril_toeplitz", "hierarchical:2,1"):
        yield f"singd {names}", singd_method(singd(names)), True
    half = singd(factor_dtypes=(jnp.bfloat16, jnp.float32))
    yield "singd bfloat16", singd_method(half), True
    yield "sirf", sirf_method(sirf()), False
    yield "sirf diagonal", sirf_method(sirf(names="diagonal")), False


@pytest.mark.parametrize(("name", "method", "layered"), list(balanced_cases()))
def test_roots_stay_in_balance(name, method, layered):
    shape = (16, 3)

    def draw(t):
        # unequal scales on the two sides, and few rows
        s = rows(t, shape, 4)
        s = Rows(s.a * jnp.linspace(0.3, 3, 16), s.g * jnp.asarray([1.0, 0.3, 0.1]))
        g = s.a.T @ s.g
        return (s if layered else g), g

    factor, _, u, bad = drive(method, draw, 10_000, shape=shape)
    assert bad == 0
    roots = (factor.k, factor.c) if layered else factor.roots
    sizes = [np.sqrt(sum(np.sum(np.square(np.asarray(x, np.float64))) for x in jax.tree.leaves(r)))
             for r in roots]  # fmt: skip
    assert abs(np.log10(sizes[0] / sizes[1])) < 2, sizes

    def later(t):
        return draw(t + 8_000)

    _, _, v, _ = drive(method, later, 2_000, shape=shape)
    assert cosine(u[-1], v[-1]) > 0.99


@pytest.mark.parametrize("names", ["dense", "diagonal"])
@pytest.mark.parametrize("layered", [True, False])
def test_balance_changes_no_direction(monkeypatch, layered, names):
    def draw(t):
        s = rows(t, (16, 3), 4)
        s = Rows(s.a * 30, s.g * 0.01)
        g = s.a.T @ s.g
        return (s if layered else g), g

    def method():
        o = singd(names, riemannian_momentum=0.5) if layered else sirf(names=names)
        return singd_method(o) if layered else sirf_method(o)

    factor, _, u, _ = drive(method(), draw, 600, shape=(16, 3))
    monkeypatch.setattr(moving, "balanced", lambda structures, roots: tuple(roots))
    other, _, v, _ = drive(method(), draw, 600, shape=(16, 3))
    assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (factor, other)), strict=True))
    np.testing.assert_allclose(u, v, rtol=1e-5, atol=1e-5 * float(jnp.max(jnp.abs(v))))


def test_balance_keeps_a_product_of_any_number_of_roots():
    s = structure("dense")
    roots = [2.0**e * jnp.eye(3) for e in (40, -3, -11, 7)]
    out = moving.balanced([s] * 4, roots)
    sizes = np.log2([float(x[0, 0]) for x in out])
    assert np.sum(sizes) == 33 and np.ptp(sizes) <= 2
    same = moving.balanced([s] * 2, [roots[1], jnp.full((3, 3), jnp.nan)])
    np.testing.assert_array_equal(same[0], roots[1])


# ---- decay


@pytest.mark.parametrize("beta2", [0.9, 0.99])
@pytest.mark.parametrize("form", ["exact", "factored", "direct", "delayed"])
def test_a_dead_row_does_not_harm_the_others(form, beta2):
    method = star_method(krad(form=form, beta2=beta2, initial_scale="absolute"))

    def draw(t, dead=True):
        g = normal(t, (4, 4))
        g = jnp.concatenate([g[:2], jnp.zeros((1, 4)), g[2:]]) if dead else g
        return g, g

    factor, _, u, bad = drive(method, draw, 20_000, every=50)
    _, _, v, _ = drive(method, lambda t: draw(t, False), 20_000, shape=(4, 4), every=50)
    assert bad == 0
    live = u[-1][jnp.asarray([0, 1, 3, 4])]
    np.testing.assert_allclose(live, v[-1], rtol=1e-3, atol=1e-3)
    x = np.asarray(factor.statistics[0], np.float64)
    x = x @ x.T if form in ("exact", "factored") else x
    np.testing.assert_allclose(x[2, 2], 1, rtol=1e-4)  # back at its start
    assert np.linalg.eigvalsh(x)[0] > 0


@pytest.mark.parametrize("form", ["exact", "factored", "direct"])
def test_alternating_form_forgets_towards_its_start(form):
    method = alternating_method(krad(form=form, beta2=0.95))

    def draw(t):
        g = normal(t, SHAPE).at[2].set(0) * 1e-3
        return g, g

    factor, _, u, bad = drive(method, draw, 20_000, every=50)
    assert bad == 0 and np.all(np.isfinite(u)) and np.any(u[-1] != 0)
    assert factor.starts is not None
    x = np.asarray(factor.statistics[0], np.float64)
    x = x @ x.T if form != "direct" else x
    np.testing.assert_allclose(x[2, 2], factor.starts[0], rtol=1e-3)


def test_decay_is_that_of_the_inverse():
    """B <- b B + (1 - b) / l I + U U^T, to rounding (exact) or second order in 1 - b (direct)."""
    with x64():
        b, scale = 0.95, 0.5
        exact = star_method(krad(form="exact", beta2=b, initial=scale, initial_scale="absolute"))
        factor, *_ = drive(exact, gradients(dtype=jnp.float64), 30, dtype=jnp.float64)
        total = np.eye(5) / scale
        for t in range(1, 31):
            g = np.asarray(normal(t, SHAPE, dtype=jnp.float64))
            total = b * total + (1 - b) / scale * np.eye(5) + g @ g.T
        k = np.asarray(factor.statistics[0])
        np.testing.assert_allclose(k @ k.T, np.linalg.inv(total), rtol=1e-10, atol=1e-14)


def test_statistics_without_decay_keep_no_start():
    assert star_method(krad()).init(SHAPE, jnp.float32).starts is None
    assert star_method(krad(beta2=0.9)).init(SHAPE, jnp.float32).starts is not None


@pytest.mark.parametrize("scale", ["gradient", "absolute"])
@pytest.mark.parametrize("form", ["direct", "delayed"])
def test_damping_never_stops_small_gradients(form, scale):
    start = 1e6 if scale == "absolute" else 1.0
    method = star_method(krad(form=form, damping=1e-4, initial_scale=scale, initial=start))
    factor, _, u, bad = drive(method, gradients(1e-3), 300, every=10)
    assert bad == 0 and np.all(np.isfinite(u))
    assert np.all(np.linalg.norm(u.reshape(300, -1), axis=1) > 0)
    for x in factor.statistics:
        assert np.linalg.eigvalsh(np.asarray(x, np.float64))[0] > 0


def test_scaled_damping_does_not_depend_on_the_scale_of_the_loss():
    with x64():
        method = star_method(krad(damping=1e-2))
        u, v = (
            drive(method, gradients(c, dtype=jnp.float64), 20, dtype=jnp.float64)[2]
            for c in (1.0, 1e-5)
        )
        np.testing.assert_allclose(v, u, rtol=1e-9)


# ---- the block's own clock


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


# ---- roots and factorisations


@pytest.mark.parametrize("rule", ["relative", "pseudo"])
def test_tracked_roots_of_rank_deficient_statistics(rule):
    with x64():
        options = shampoo(damping=0.0, damping_rule=rule)

        def draw(t):
            basis = jnp.asarray(np.linalg.qr(np.random.default_rng(0).normal(size=(5, 2)))[0])
            g = basis @ normal(1 + t // 40, (2, 4), dtype=jnp.float64)
            return g, g

        found = [
            drive(gram_method(root=root, **options), draw, 60, every=2, dtype=jnp.float64)
            for root in ("eigh", "tracked")
        ]
        assert [x[3] for x in found] == [0, 0]
        if rule == "pseudo":
            np.testing.assert_allclose(found[1][2][:40], found[0][2][:40], rtol=1e-6, atol=1e-8)
        assert np.all(np.isfinite(found[1][2]))


@pytest.mark.parametrize("seed", range(3))
def test_near_rank_one_factors_of_size_1024_are_inverted(seed):
    rng = np.random.default_rng(seed)
    base = rng.normal(size=(1, 1024))
    a = base + 1e-4 * rng.normal(size=(64, 1024))
    s = Rows(jnp.asarray(a, jnp.float32), jnp.asarray(rng.normal(size=(64, 2)), jnp.float32))
    method = kfac_method(KfacOptions(damping=1e-12))
    step = Step(*(jnp.asarray(x, jnp.int32) for x in (1, 1, 1, 0)))
    factor = jax.jit(method.accumulate)(method.init((1024, 2), jnp.float32), s, step)
    factor = jax.jit(method.refresh)(factor, step)
    assert finite(factor)
    assert np.linalg.eigvalsh(np.asarray(factor.inverses[0], np.float64))[0] > 0


# ---- modes without a factor, exponents per mode


def partial_methods():
    for root in ("eigh", "tracked"):
        yield f"gram {root}", gram_method(root=root, **shampoo(exponent=0.5))
    yield "array", array_method(SquareRoot(2), **shampoo(exponent=0.5))
    for form in ("direct", "factored", "exact", "delayed"):
        yield form, star_method(krad(form=form, exponent=0.5, beta2=0.9))
    yield "alternating", alternating_method(krad())


@pytest.mark.parametrize(("name", "method"), list(partial_methods()))
@pytest.mark.parametrize("mode", [0, 1])
def test_one_sided_is_two_sided_with_the_identity(name, method, mode):
    """All modes but one are left alone; their entries in the factor are None."""
    assert method.partial
    has = tuple(i == mode for i in range(2))
    one_sided = method._replace(init=lambda shape, dtype: method.init(shape, dtype, has))
    factor, step, u, bad = drive(one_sided, gradients(), 7)
    assert bad == 0
    assert factor.statistics[1 - mode] is None and factor.preconditioners[1 - mode] is None
    g = gradients()(7)[1]
    if name != "alternating":  # whose statistics depend on the other mode
        both, *_ = drive(method, gradients(), 7)
        for a, b in zip(*(jax.tree.leaves(f.preconditioners[mode]) for f in (factor, both)),
                        strict=True):  # fmt: skip
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(u[-1], method.precondition(factor, g, step), rtol=1e-5, atol=1e-5)
    assert np.abs(np.asarray(u[-1] - g)).max() > 1e-2


def test_one_sided_sirfshampoo_and_tnt():
    with x64():
        has = (True, False)
        method = sirf_method(sirf())
        part = method._replace(init=lambda shape, dtype: method.init(shape, dtype, has))
        draw = gradients(dtype=jnp.float64)
        factor, *_ = drive(part, draw, 5, dtype=jnp.float64)
        assert factor.roots[1] is None
        root = np.eye(5)
        for t in range(1, 6):
            y = root.T @ np.asarray(draw(t)[0])
            m = 0.5 * (y @ y.T * 5 / 20 + 1e-4 * root.T @ root - np.eye(5))
            root = root @ (np.eye(5) - 0.6 / max(1, np.linalg.norm(m)) * m)
        np.testing.assert_allclose(factor.roots[0], root, rtol=1e-10, atol=1e-12)

        # an isotropic mode: c / (c + damping) of what the factor alone would do
        method = tnt_method(TntOptions(damping=0.1))
        step = Step(*(jnp.asarray(x, jnp.int32) for x in (1, 1, 1, 0)))
        s, g = normal(1, (3, 5, 4), dtype=jnp.float64), normal(2, SHAPE, dtype=jnp.float64)
        factor = method.accumulate(method.init(SHAPE, jnp.float64, has), s, step)
        u = method.precondition(method.refresh(factor, step), g, step)
        gram = np.einsum("nij,nkj->ik", s, s) / 3 / 4
        c = np.sqrt(np.trace(gram) / 5)
        left = gram * c * 5 / np.trace(gram)
        np.testing.assert_allclose(
            u, np.linalg.solve(left + 0.1 * np.eye(5), g) / (c + 0.1), rtol=1e-10
        )


@pytest.mark.parametrize(
    "make",
    [
        lambda e: gram_method(root="eigh", **shampoo(exponent=e)),
        lambda e: array_method(SquareRoot(), **shampoo(exponent=e)),
        lambda e: star_method(krad(exponent=e)),
    ],
)
def test_a_tuple_of_exponents_is_the_scalar_option(make):
    forms = [None, 0.25, (0.25, 0.25), (None, 0.25), {2: (0.25, 0.25)}, {3: 1.0}]
    found = [drive(make(e), gradients(), 5)[2] for e in forms]
    for u in found[1:]:
        np.testing.assert_array_equal(u, found[0])
    with pytest.raises(ValueError, match="names 3 modes, a block has 2"):
        make((0.1, 0.2, 0.3)).init(SHAPE, jnp.float32)


def test_a_mode_of_exponent_zero_has_no_factor():
    method = gram_method(root="eigh", **shampoo(exponent=(0.5, 0)))
    factor = method.init(SHAPE, jnp.float32)
    assert [x is None for x in factor.statistics] == [False, True]


def test_transposing_the_gradient_and_the_exponents_transposes_the_direction():
    with x64():

        def turned(t):
            g = gradients(dtype=jnp.float64)(t)[0].T
            return g, g

        for exponent in ((0.5, 0.25), (0.5, 0)):
            a = gram_method(root="eigh", **shampoo(exponent=exponent))
            b = gram_method(root="eigh", **shampoo(exponent=exponent[::-1]))
            u = drive(a, gradients(dtype=jnp.float64), 6, dtype=jnp.float64)[2]
            v = drive(b, turned, 6, shape=SHAPE[::-1], dtype=jnp.float64)[2]
            np.testing.assert_allclose(np.swapaxes(v, 1, 2), u, rtol=1e-9, atol=1e-12)


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
