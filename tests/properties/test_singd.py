"""What the specification of IKFAC, INGD and SINGD says holds, in float64 on one layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kradagrad_jax.factors.method import Grams, Rows
from kradagrad_jax.linalg.structures import structure
from tests.properties.singd_layer import (
    D_IN,
    D_OUT,
    MIXES,
    dense_of,
    grams,
    moment,
    norm,
    options,
    roots,
    run,
    update_of,
)

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
