"""Structured matrices against dense arithmetic, and their projections against least squares."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from kradagrad_jax.linalg.structures import STRUCTURES, Dense, structure
from tests.linalg.matrices import _equations as equations
from tests.x64 import x64

NAMES = [
    "dense", "diagonal", "block_diagonal:1", "block_diagonal:3", "tril", "triu",
    "tril_toeplitz", "triu_toeplitz", "hierarchical:2,2", "hierarchical:0,0", "hierarchical:3,1",
    "tril_top_left_diag:1", "tril_top_left_diag:2", "triu_top_left_diag:2",
    "tril_bottom_right_diag:2", "triu_bottom_right_diag:1", "triu_bottom_right_diag:3",
]  # fmt: skip
SIZES = (7,)  # also 1, 2 and 5 in the golden file of the structures
CASES = [(name, d) for name in NAMES for d in SIZES]


def symmetric(rng, d):
    m = rng.normal(size=(d, d))
    return m + m.T


def basis(s, d):
    """The structure's basis: one dense matrix per stored number."""
    vector, back = ravel_pytree(s.identity(d, jnp.float64))
    return np.asarray(jax.jit(jax.vmap(lambda row: s.to_dense(back(row))))(jnp.eye(len(vector))))


def least_squares(s, m):
    """The member N that minimises ||(N + N^T)/2 - M||_F, of least norm where there are several."""
    b = basis(s, len(m))
    system = ((b + b.transpose(0, 2, 1)) / 2).reshape(len(b), -1).T
    x = np.linalg.lstsq(system, m.reshape(-1), rcond=None)[0]
    return np.tensordot(x, b, 1)


def close(ours, expected):
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-12 * (1 + np.abs(expected).max()))


def everything(s, m1, m2, x):
    """All operations on one pair of matrices of a structure, dense, with what they should be."""
    k, n = s.project_dense(m1), s.project_dense(m2)
    k, n = s.matmul(k, n), s.matmul(n, k)  # not symmetric
    dense, other, eye = s.to_dense(k), s.to_dense(n), s.identity(len(m1), m1.dtype)
    u, dot = jnp.arange(1.0, len(m1) + 1), jnp.matmul
    again = s.to_dense(s.project_dense(m1))
    pairs = [
        (s.to_dense(eye), jnp.eye(len(m1))),
        (s.to_dense(s.matmul(k, n)), dot(dense, other)),
        (s.apply(k, x), dot(dense, x)),
        (s.apply_transposed(k, x), dot(dense.T, x)),
        (s.apply_square(k, x), dot(dense, dot(dense.T, x))),
        (s.to_dense(s.subtract_identity(k)), dense - jnp.eye(len(m1))),
        (s.average(k), jnp.trace(dense) / len(m1)),
        (s.frobenius(k), jnp.linalg.norm(dense)),
        (s.max_entry(k), jnp.max(jnp.abs(dense))),
        (s.to_dense(s.project_dense((again + again.T) / 2)), again),
    ]
    projected = [
        (s.to_dense(s.project_dense(m1)), m1),
        (s.to_dense(s.project_gram(x)), dot(x, x.T)),
        (s.to_dense(s.ktk(k)), dot(dense.T, dense)),
        (s.to_dense(s.project_congruence(k, m1)), dot(dense.T, dot(m1, dense))),
        (s.to_dense(s.project_congruence(k, u)), dot(dense.T, u[:, None] * dense)),
    ]
    return pairs, projected


@pytest.mark.parametrize("name,d", CASES, ids=lambda x: str(x))
def test_against_dense_arithmetic(name, d):
    """Projections against least squares; they keep the trace."""
    s, rng = structure(name), np.random.default_rng(d)
    with x64():
        given = [jnp.asarray(x) for x in (symmetric(rng, d), symmetric(rng, d))]
        x = jnp.asarray(rng.normal(size=(d, 3)))
        pairs, projected = jax.jit(everything, static_argnums=0)(s, *given, x)
        for ours, expected in pairs:
            close(ours, expected)
        for ours, matrix in projected:
            matrix = np.asarray(matrix)
            close(ours, least_squares(s, matrix))
            close(np.trace(ours), np.trace(matrix))


FORMULAS = {
    "dense": lambda d: d * d,
    "diagonal": lambda d: d,
    "block_diagonal:30": lambda d: d // 30 * 900 + (d % 30) ** 2,
    "tril": lambda d: d * (d + 1) // 2,
    "triu": lambda d: d * (d + 1) // 2,
    "tril_toeplitz": lambda d: d,
    "triu_toeplitz": lambda d: d,
    "hierarchical:15,10": lambda d: 26 * d - 150 - 25,
    "tril_top_left_diag:2": lambda d: 3 * d - 2,
    "triu_top_left_diag:2": lambda d: 3 * d - 2,
    "tril_bottom_right_diag:2": lambda d: 3 * d - 2,
    "triu_bottom_right_diag:2": lambda d: 3 * d - 2,
}


def test_every_structure_has_its_formula():
    assert {name.partition(":")[0] for name in FORMULAS} == set(STRUCTURES)


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("d", [64, 75, 90])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_state_bytes(name, d, dtype):
    """Exactly the published numbers are stored, and nothing of size zero."""
    s = structure(name)
    assert s.numbers(d) == FORMULAS[name](d)
    leaves = jax.tree.leaves(s.identity(d, dtype))
    assert sum(x.nbytes for x in leaves) == FORMULAS[name](d) * jnp.dtype(dtype).itemsize
    assert all(x.size for x in leaves)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("d", [1, 2, 4])
def test_no_array_of_size_zero(name, d):
    assert all(x.size for x in jax.tree.leaves(structure(name).identity(d, jnp.float32)))
    if d == 1:
        assert structure(name).numbers(1) == 1


HALF = [
    "dense",
    "diagonal",
    "tril",
    "triu_toeplitz",
    "hierarchical:2,2",
    "tril_bottom_right_diag:2",
]
SPARSE = [n for n in NAMES if n not in ("dense", "tril", "triu")]


@pytest.mark.parametrize("name", SPARSE)
def test_sparse_structures_form_no_dense_matrix(name):
    d, n, s = 400, 3, structure(name)

    def operations(k, x):
        h = s.subtract_identity(s.project_gram(s.apply_transposed(k, x)))
        k = s.matmul(s.ktk(k), h)
        return s.apply_square(k, x), s.average(k), s.frobenius(k), s.max_entry(k)

    def start():
        return s.identity(d, jnp.float32)

    for jaxpr in (
        jax.make_jaxpr(operations)(start(), jnp.ones((d, n))),
        jax.make_jaxpr(start)(),
    ):
        sizes = [v.aval.size for e in equations(jaxpr) for v in e.outvars]
        assert max(sizes) < d * d / 10


@pytest.mark.parametrize("name", HALF)
def test_bfloat16_stays_bfloat16(name):
    """Every stored or applied number keeps its dtype; values are those of float32, rounded."""
    s, d = structure(name), 7
    x = jnp.asarray(np.random.default_rng(0).normal(size=(d, 4)), jnp.float32)
    k32 = s.project_gram(x)
    k = s.project_gram(x.astype(jnp.bfloat16))
    pairs = [
        (k, k32),
        (s.ktk(k), s.ktk(k32)),
        (s.matmul(k, k), s.matmul(k32, k32)),
        (s.subtract_identity(k), s.subtract_identity(k32)),
        (s.apply_square(k, x.astype(jnp.bfloat16)), s.apply_square(k32, x)),
    ]
    for ours, wide in pairs:
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(wide), strict=True):
            assert a.dtype == jnp.bfloat16 and b.dtype == jnp.float32
            a = a.astype(jnp.float32)
            assert jnp.max(jnp.abs(a - b)) <= 0.1 * jnp.max(jnp.abs(b))
    assert s.average(k).dtype == s.frobenius(k).dtype == s.max_entry(k).dtype == jnp.float32


def test_structures_are_hashable_and_have_names():
    for name in NAMES:
        assert structure(name) == structure(structure(name).name) == structure(structure(name))
        assert hash(structure(name)) == hash(structure(name))
    assert len({structure(name) for name in NAMES}) == len(NAMES)
    assert structure("dense") == Dense()


@pytest.mark.parametrize(
    "name",
    ["tridiagonal", "dense:2", "hierarchical:2", "hierarchical:a,b", "block_diagonal:0",
     "tril_top_left_diag:0", "triu_top_left_diag:0", "hierarchical:-1,2", "triu:"],
)  # fmt: skip
def test_unknown_structures_are_refused(name):
    if name == "triu:":
        assert structure(name) == structure("triu")
        return
    with pytest.raises(ValueError, match=r"structure|needs"):
        structure(name)
