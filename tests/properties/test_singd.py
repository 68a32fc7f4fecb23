"""What the specification of IKFAC, INGD and SINGD says holds, in float64 on one layer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kradagrad_jax.factors.method import Grams, Rows, Step
from kradagrad_jax.factors.singd import SingdOptions, singd_method
from kradagrad_jax.linalg.structures import structure
from tests.x64 import x64

D_IN, D_OUT = 6, 4
MIXES = [
    ("dense", "dense"), ("dense", "diagonal"), ("hierarchical:2,2", "triu_toeplitz"),
    ("tril_toeplitz", "block_diagonal:3"), ("triu_top_left_diag:2", "tril"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def double():
    with x64():
        yield


def options(names=("dense", "dense"), ikfac=False, **others):
    others = {"damping": 0.1, "lr_cov": 0.1, "riemannian_momentum": 0.0} | others
    pair = (structure(names[0]), structure(names[1]))
    return SingdOptions(structures=pair, adaptive=not ikfac, **others)


def moment(seed, d, scale=1.0):
    x = np.random.default_rng(seed).normal(size=(3 * d, d))
    return scale * x.T @ x / len(x)


def grams(steps, varying=False, d_in=D_IN, d_out=D_OUT):
    """(U, G) of every step, stacked."""
    seeds = [10 * t * varying for t in range(steps)]
    a = np.stack([moment(s + 1, d_in) for s in seeds])
    return Grams(jnp.asarray(a), jnp.asarray(np.stack([moment(s + 2, d_out) for s in seeds])))


def at(t):
    count = jnp.asarray(t, jnp.int32) + 1
    return Step(count, count, 1, count == 1)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("dtype",))
def run(o, statistics, start=None, dtype=jnp.float64):
    """Factors after every step, stacked."""
    method = singd_method(o)
    shape = (statistics.a.shape[-1], statistics.g.shape[-1])
    first = method.init(shape, dtype) if start is None else start

    def step(factor, now):
        t, s = now
        factor = method.accumulate(factor, s, at(t))
        return factor, factor

    return jax.lax.scan(step, first, (jnp.arange(len(statistics.a)), statistics))[1]


def dense_of(o, factors, t=-1):
    """K and C after step t as dense numpy arrays."""
    pick = [jax.tree.map(lambda x: x[t], x) for x in (factors.k, factors.c)]
    return [np.asarray(s.to_dense(x)) for s, x in zip(o.structures, pick, strict=True)]


def roots(names=("dense", "dense"), steps=1, varying=False, **others):
    o = options(names, **others)
    return dense_of(o, run(o, grams(steps, varying)))


def norm(x):
    return float(np.linalg.norm(x))


# 1, 2: against K-FAC


def test_one_ikfac_step_is_kfac_to_second_order():
    """The difference is -3 b^2 K m^2 K^T + O(b^3)."""
    s, u, lam, last = moment(5, D_IN), moment(1, D_IN), 0.1, None
    k = np.linalg.inv(np.linalg.cholesky(s + lam * np.eye(D_IN))).T
    m = 0.5 * (k.T @ u @ k + lam * k.T @ k - np.eye(D_IN))
    for b in (0.1, 0.05, 0.025):
        o = options(ikfac=True, lr_cov=b)
        start = singd_method(o).init((D_IN, D_OUT), jnp.float64)._replace(k=jnp.asarray(k))
        new = dense_of(o, run(o, grams(1), start))[0]
        exact = np.linalg.inv((1 - b) * s + b * u + lam * np.eye(D_IN))
        difference = (new @ new.T - exact) / b**2
        gap = norm(difference + 3 * k @ m @ m @ k.T)
        assert last is None or 0.35 < gap / last < 0.65
        last = gap


def kfac(b, lam, batches):
    s = (1 - lam) * np.eye(D_IN)
    for u in batches:
        s = (1 - b) * s + b * u
        yield s


def test_ikfac_tracks_kfac():
    """From K = I, which is S = (1 - lam) I: O(b^2) after ten steps, O(b) over a horizon b t = 2."""
    fixed, horizon = [], []
    for b in (0.1, 0.05, 0.025):
        for steps, errors, power in ((10, fixed, 2), (round(2 / b), horizon, 1)):
            o = options(ikfac=True, lr_cov=b)
            batches = grams(steps, varying=True)
            new = dense_of(o, run(o, batches))[0]
            *_, s = kfac(b, 0.1, np.asarray(batches.a))
            exact = np.linalg.inv(s + 0.1 * np.eye(D_IN))
            errors.append(norm(new @ new.T - exact) / b**power)
    for errors in (fixed, horizon):
        assert max(errors) < 2 * min(errors)


@pytest.mark.parametrize("b", [0.05, 0.5])
def test_ikfac_stays_below_kfac(b):
    """K K^T <= (S + lam I)^-1 at every step."""
    batches = grams(100, varying=True)
    o = options(ikfac=True, lr_cov=b)
    factors = run(o, batches)
    for t, s in enumerate(kfac(b, 0.1, np.asarray(batches.a))):
        k = np.asarray(factors.k[t])
        exact = np.linalg.inv(s + 0.1 * np.eye(D_IN))
        assert np.linalg.eigvalsh(k @ k.T - exact)[-1] < 1e-12 * norm(exact)


# 3: fixed points


@pytest.mark.parametrize("b", [0.1, 0.5, 1.0])
def test_fixed_point_of_ikfac(b):
    k, _ = roots(ikfac=True, lr_cov=b, steps=400)
    u = moment(1, D_IN) + 0.1 * np.eye(D_IN)
    assert norm(k @ k.T @ u - np.eye(D_IN)) < 1e-13


def objective(k, c, lam=0.1):
    """tr((U x G + lam I) S) - logdet S, and its first term."""
    s, r, u, g = k @ k.T, c @ c.T, moment(1, D_IN), moment(2, D_OUT)
    trace = np.trace(u @ s) * np.trace(g @ r) + lam * np.trace(s) * np.trace(r)
    logs = D_OUT * np.linalg.slogdet(s)[1] + D_IN * np.linalg.slogdet(r)[1]
    return trace - logs, trace


FIXED = ["dense", "tril", "hierarchical:2,2", "tril_top_left_diag:1", "block_diagonal:2",
         "tril_toeplitz", "diagonal"]  # fmt: skip


def test_fixed_points_of_singd():
    """P(K^T E K) = I with E from the traces of the other factor; dense is the best, as is tril."""
    values = {}
    for name in FIXED:
        k, c = roots((name, name), steps=800, lr_cov=0.3)
        u, g, lam = moment(1, D_IN), moment(2, D_OUT), 0.1
        for root, other, own, partner in ((k, c, u, g), (c, k, g, u)):
            e = np.trace(partner @ other @ other.T) * own
            e = (e + lam * np.trace(other @ other.T) * np.eye(len(own))) / len(partner)
            projected = structure(name).project_dense(jnp.asarray(root.T @ e @ root))
            assert norm(structure(name).to_dense(projected) - np.eye(len(own))) < 1e-12
            if name in ("dense", "tril"):
                assert norm(np.linalg.inv(root @ root.T) - e) < 1e-12
        values[name], trace = objective(k, c)
        assert abs(trace - D_IN * D_OUT) < 1e-11
    assert abs(values["dense"] - values["tril"]) < 1e-10
    assert all(values["dense"] < values[n] - 1e-3 for n in FIXED[2:])


# 4, 5, 6, 7, 8: symmetries and equalities


@pytest.mark.parametrize("names", MIXES, ids="|".join)
@pytest.mark.parametrize("normalize", ["none", "frobenius"])
def test_the_momenta_have_equal_means(names, normalize):
    others = {"riemannian_momentum": 0.6, "normalize_lr_cov": normalize, "lr_cov": 0.05}
    o = options(names, **others)
    factors = run(o, grams(6, varying=True))
    means = [
        jax.vmap(s.average)(m)
        for s, m in zip(o.structures, (factors.m_k, factors.m_c), strict=True)
    ]
    np.testing.assert_allclose(means[0], means[1], rtol=1e-12, atol=1e-14)


def test_scale_of_the_curvature():
    """(U, G) -> (c U, G / c) changes nothing, but for IKFAC."""
    s = grams(5, varying=True)
    moved = Grams(3 * s.a, s.g / 3)
    for ikfac in (False, True):
        o = options(ikfac=ikfac)
        pairs = zip(dense_of(o, run(o, s)), dense_of(o, run(o, moved)), strict=True)
        gaps = [norm(x - y) / norm(x) for x, y in pairs]
        assert max(gaps) > 1e-2 if ikfac else max(gaps) < 1e-14


def update_of(names, s, gradient, **others):
    o = options(names, **others)
    factor = jax.tree.map(lambda x: x[-1], run(o, s))
    return np.asarray(singd_method(o).precondition(factor, jnp.asarray(gradient), at(0)))


def test_rotations_of_dense_factors():
    rng, s = np.random.default_rng(0), grams(5, varying=True)
    q, p = (np.linalg.qr(rng.normal(size=(d, d)))[0] for d in (D_IN, D_OUT))
    moved, m = Grams(q @ s.a @ q.T, p @ s.g @ p.T), rng.normal(size=(D_IN, D_OUT))
    for ikfac in (False, True):
        u = update_of(("dense", "dense"), s, m, ikfac=ikfac)
        v = update_of(("dense", "dense"), moved, q @ m @ p.T, ikfac=ikfac)
        assert norm(v - q @ u @ p.T) < 1e-13 * norm(u)


@pytest.mark.parametrize(
    "name,mirrored",
    [("tril_toeplitz", "triu_toeplitz"), ("tril", "triu"),
     ("tril_top_left_diag:2", "triu_bottom_right_diag:2"),
     ("tril_bottom_right_diag:2", "triu_top_left_diag:2")],
)  # fmt: skip
def test_reversal_of_the_indices(name, mirrored):
    s, m = grams(4, varying=True), np.random.default_rng(0).normal(size=(D_IN, D_OUT))
    moved = Grams(s.a[:, ::-1, ::-1], s.g[:, ::-1, ::-1])
    u = update_of((name, name), s, m)
    v = update_of((mirrored, mirrored), moved, m[::-1, ::-1])
    assert norm(v[::-1, ::-1] - u) < 1e-13 * norm(u)


def test_equal_structures():
    s, m = grams(5, varying=True), np.random.default_rng(0).normal(size=(D_IN, D_OUT))
    for one, other in (("block_diagonal:9", "dense"), ("block_diagonal:1", "diagonal"),
                       ("hierarchical:0,0", "diagonal"), ("hierarchical:9,3", "dense"),
                       ("triu_top_left_diag:9", "dense")):  # fmt: skip
        u, v = update_of((one, one), s, m), update_of((other, other), s, m)
        assert norm(u - v) < 1e-14 * norm(u)


@pytest.mark.parametrize("name", ["diagonal", "block_diagonal:2"])
def test_sparse_is_dense_on_projected_statistics(name):
    s, m, kind = grams(5, varying=True), np.ones((D_IN, D_OUT)), structure(name)
    moved = Grams(*(jax.vmap(lambda x: kind.to_dense(kind.project_dense(x)))(x) for x in s))
    for ikfac in (False, True):
        u = update_of((name, name), s, m, ikfac=ikfac)
        v = update_of(("dense", "dense"), moved, m, ikfac=ikfac)
        assert norm(u - v) < 1e-14 * norm(u)


def test_triangles_against_dense():
    """K K^T of full triangles is that of dense to O(b^2), of Toeplitz ones to O(b) only."""
    gaps = {}
    for b in (0.1, 0.05):
        k, _ = roots(steps=1, lr_cov=b)
        for name in ("tril", "triu", "tril_toeplitz"):
            r, _ = roots((name, name), steps=1, lr_cov=b)
            gaps[name, b] = norm(r @ r.T - k @ k.T)
    for name, power in (("tril", 2), ("triu", 2), ("tril_toeplitz", 1)):
        assert abs(np.log2(gaps[name, 0.1] / gaps[name, 0.05]) - power) < 0.3


# 10, 11: what the preconditioner is


@pytest.mark.parametrize("names", MIXES, ids="|".join)
def test_the_preconditioner_is_positive(names):
    s, m = grams(4, varying=True), np.random.default_rng(0).normal(size=(D_IN, D_OUT))
    k, c = roots(names, steps=4, varying=True)
    expected = norm(k.T @ m @ c) ** 2
    assert abs(np.sum(m * update_of(names, s, m)) - expected) < 1e-13 * expected
    assert min(abs(np.linalg.det(k)), abs(np.linalg.det(c))) > 1e-8


def test_dense_factors_are_symmetric_at_the_first_refresh_only():
    k, _ = roots(steps=2, varying=True)
    first, _ = roots()
    assert norm(first - first.T) < 1e-15 < 1e-6 < norm(k - k.T)


@pytest.mark.parametrize("names", MIXES, ids="|".join)
def test_rows_are_their_grams(names):
    rng = np.random.default_rng(0)
    rows = Rows(
        jnp.asarray(rng.normal(size=(3, 8, D_IN))), jnp.asarray(rng.normal(size=(3, 8, D_OUT)))
    )
    sums = Grams(*(jnp.swapaxes(x, 1, 2) @ x for x in rows))
    m = rng.normal(size=(D_IN, D_OUT))
    u, v = update_of(names, rows, m), update_of(names, sums, m)
    assert norm(u - v) < 1e-13 * norm(u)


# the scalar model of divergence, and low precision


@pytest.mark.parametrize("b", [0.01, 0.1, 0.5])
def test_where_it_diverges(b):
    """Stable below a curvature of 1 + 4 / b at the identity, unstable above."""
    ends = []
    for x in (0.99 * (1 + 4 / b), 1.01 * (1 + 4 / b)):
        s = Grams(jnp.full((3000, 1, 1), x), jnp.ones((3000, 1, 1)))
        o = options(ikfac=True, lr_cov=b, damping=0.0)
        ends.append(float(run(o, s).k[-1, 0, 0]) ** 2 * x)
    assert abs(ends[0] - 1) < 1e-6
    assert not abs(ends[1] - 1) < 1e-6


def test_the_frobenius_clamp_bounds_the_factors():
    """Rank-one curvature 1e4 * ones at d = 64: the entry clamp lets K grow, this one does not."""
    d = 64
    s = Grams(jnp.full((300, d, d), 1e4), jnp.ones((300, 1, 1)))
    for kind in ("frobenius", "max_entry"):
        o = options(ikfac=True, lr_cov=0.1, damping=0.1, normalize_lr_cov=kind)
        assert np.all(np.abs(run(o, s).k) < 10) == (kind == "frobenius")


@pytest.mark.parametrize(
    "dtype,b,low,high",
    [(jnp.float32, 0.1, 0, 1e-5), (jnp.bfloat16, 1.0, 1e-3, 0.1), (jnp.bfloat16, 0.1, 1e-3, 0.1),
     (jnp.bfloat16, 0.01, 0.1, 1.0)],
)  # fmt: skip
def test_precision_of_the_inverse(dtype, b, low, high):
    """bfloat16 factors freeze early for a small factor step; nothing is ever non-finite."""
    d, steps = 32, round(20 / b)
    q = np.linalg.qr(np.random.default_rng(0).normal(size=(d, d)))[0]
    u = (q * np.logspace(0, -4, d)) @ q.T
    s = Grams(jnp.broadcast_to(u, (steps, d, d)), jnp.ones((steps, 1, 1)))
    o = options(ikfac=True, lr_cov=b, damping=1e-2)
    k = np.asarray(run(o, s, dtype=dtype).k[-1], np.float64)
    exact = np.linalg.inv(u + 1e-2 * np.eye(d))
    error = norm(k @ k.T - exact) / norm(exact)
    assert low <= error < high


def test_second_order():
    """K (I - b m + (b m)^2 / 2) is the exponential up to O(b^3)."""
    gaps = []
    for b in (0.1, 0.05):
        k, _ = roots(ikfac=True, lr_cov=b, second_order=True)
        m = 0.5 * (moment(1, D_IN) - 0.9 * np.eye(D_IN))
        w, v = np.linalg.eigh(m)
        gaps.append(norm(k - (v * np.exp(-b * w)) @ v.T))
    assert 6.5 < gaps[0] / gaps[1] < 9.5
