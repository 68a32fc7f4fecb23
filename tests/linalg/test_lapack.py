import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from kradagrad_jax import linalg
from tests import flags
from tests.linalg.matrices import with_spectrum

N = 4
WEIGHTS = np.random.default_rng(9).normal(size=(N, N))


def weighted(x):
    return jnp.sum(x * jnp.asarray(WEIGHTS).astype(x.dtype))


def eigh_sum(a):
    w, v = linalg.eigh(a)
    return weighted(linalg.matmul(v * jnp.sin(w)[None, :], v.T)) + jnp.sum(w**3)


def svd_sum(a):
    u, s, vt = linalg.svd(a)
    return weighted(linalg.matmul(u * jnp.sin(s)[None, :], vt)) + jnp.sum(s**3)


def qr_sum(a):
    r = linalg.qr_r(jnp.concatenate([a, 2.0 * a[:2] + 1.0]))
    return weighted(jnp.abs(r))


SUMS = {  # compiled once each: op-by-op execution would compile every small operation
    "eigh": jax.jit(eigh_sum),
    "svd": jax.jit(svd_sum),
    "qr_r": jax.jit(qr_sum),
    "cholesky": jax.jit(lambda a: weighted(linalg.cholesky(a))),
    "upper": jax.jit(lambda a: weighted(jnp.sin(linalg.triangular_inverse(a)))),
    "lower": jax.jit(lambda a: weighted(jnp.sin(linalg.triangular_inverse(a, lower=True)))),
}
every_sum = pytest.mark.parametrize("f", SUMS.values(), ids=SUMS.keys())
FUNCTIONS = (linalg.eigh, linalg.svd, linalg.qr_r, linalg.cholesky, linalg.triangular_inverse)
every_function = pytest.mark.parametrize("f", FUNCTIONS, ids=lambda f: f.__name__)


def definite(*stack):
    a = np.random.default_rng(3).normal(size=(*stack, N, N))
    return jnp.asarray(a @ np.swapaxes(a, -1, -2) + np.eye(N))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-6), ("float64", 1e-14)])
def test_factors_multiply_back(double, dtype, tolerance):
    a = np.random.default_rng(0).normal(size=(40, 24)).astype(dtype)
    gram = a.T @ a / 40
    square = a[:24]
    w, v = linalg.eigh(jnp.asarray(gram))
    u, s, vt = linalg.svd(jnp.asarray(square))
    r = linalg.qr_r(jnp.asarray(a))
    lower = linalg.cholesky(jnp.asarray(gram))
    upper = np.triu(square) + 5 * np.eye(24, dtype=dtype)
    pairs = [
        ((v * w[None, :]) @ v.T, gram),
        (v.T @ v, np.eye(24)),
        ((u * s[None, :]) @ vt, square),
        (r.T @ r / 40, gram),
        (lower @ lower.T, gram),
        (linalg.triangular_inverse(jnp.asarray(upper)) @ upper, np.eye(24)),
        (linalg.triangular_inverse(jnp.asarray(upper.T), lower=True) @ upper.T, np.eye(24)),
    ]
    for result, expected in pairs:
        assert result.dtype == dtype
        np.testing.assert_allclose(result, expected, rtol=0, atol=20 * tolerance)
    assert np.all(np.diff(w) >= 0) and np.all(np.diff(s) <= 0)
    np.testing.assert_array_equal(np.tril(r, -1), 0)


def test_triangular_inverse_reads_one_triangle(double):
    a = jnp.asarray(np.random.default_rng(0).normal(size=(5, 5))) + 4.0 * jnp.eye(5)
    for lower, triangle in ((False, jnp.triu), (True, jnp.tril)):
        inverse = linalg.triangular_inverse(a, lower=lower)
        np.testing.assert_array_equal(inverse, triangle(inverse))
        np.testing.assert_allclose(inverse @ triangle(a), np.eye(5), atol=1e-14)


def test_eigh_takes_the_symmetric_part(double):
    a = jnp.asarray(np.random.default_rng(0).normal(size=(5, 5)))
    np.testing.assert_allclose(linalg.eigh(a)[0], np.linalg.eigvalsh((a + a.T) / 2), atol=1e-14)


@every_sum
def test_stacks_of_stacks(double, f):
    a = definite(2, 3)
    expected = [[f(matrix) for matrix in row] for row in a]
    np.testing.assert_allclose(jax.jit(jax.vmap(jax.vmap(f)))(a), expected, rtol=1e-12)


@pytest.mark.parametrize("f", [SUMS["eigh"], SUMS["qr_r"]])
def test_operands_without_the_batch_axis(double, f):
    a, b = definite(), jnp.arange(3.0)
    np.testing.assert_allclose(jax.vmap(lambda x: f(a) + x)(b), f(a) + b, rtol=1e-14)
    gradient = jax.jit(jax.grad(lambda a, x: f(a) * x))
    stack = jax.vmap(gradient, in_axes=(None, 0))(a, b)
    np.testing.assert_allclose(stack[2], 2.0 * stack[1], rtol=1e-12)
    np.testing.assert_allclose(stack[1], gradient(a, 1.0), rtol=1e-12)


@every_sum
def test_derivatives_of_both_modes(double, f):
    stacked = jax.jit(lambda a: jnp.sum(jax.vmap(f)(a)))
    check_grads(stacked, (definite(3),), order=1, modes=("fwd", "rev"), rtol=1e-5)


def test_second_derivatives(double):
    check_grads(
        jax.jit(jax.grad(eigh_sum)), (definite(),), order=1, modes=("fwd", "rev"), rtol=1e-4
    )


@every_sum
def test_gradient_of_a_stack_is_the_stack_of_gradients(double, f):
    a = definite(3)
    gradient = jax.jit(jax.grad(f))
    expected = [gradient(matrix) for matrix in a]
    inside = jax.jit(jax.vmap(gradient))(a)
    np.testing.assert_allclose(inside, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("f", [SUMS["eigh"], SUMS["svd"], SUMS["qr_r"]])
@pytest.mark.parametrize("kind", ["zero", "identity", "rank one", "clustered"])
def test_derivatives_are_finite_where_none_exists(f, kind):
    matrices = {
        "zero": np.zeros((N, N)),
        "identity": np.eye(N),
        "rank one": np.ones((N, N)),
        "clustered": with_spectrum(np.array([1.0, 1.0, 2.0, 2.0])),
    }
    gradient = jax.jit(jax.grad(f))(jnp.asarray(matrices[kind], jnp.float32))
    assert jnp.all(jnp.isfinite(gradient))


def test_derivatives_of_invariants_at_equal_eigenvalues(double):
    gradient = jax.jit(jax.grad(lambda a: jnp.sum(linalg.eigh(a)[0] ** 3)))(2.0 * jnp.eye(3))
    np.testing.assert_allclose(gradient, 12.0 * np.eye(3), rtol=1e-14)
    gradient = jax.jit(jax.grad(lambda a: jnp.sum(linalg.svd(a)[1] ** 3)))(2.0 * jnp.eye(3))
    np.testing.assert_allclose(gradient, 12.0 * np.eye(3), rtol=1e-14)


@every_function
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_bad_matrices_return_at_once_and_spoil_nothing_else(f, value):
    """LAPACK's divide-and-conquer SVD never returns from an infinity."""
    stack = jnp.stack([jnp.eye(3), jnp.eye(3).at[0, 0].set(value)])
    for out in jax.tree.leaves(jax.jit(jax.vmap(f))(stack)):
        assert jnp.all(jnp.isfinite(out[0])) and jnp.all(jnp.isnan(out[1]))


@every_function
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.int32])
def test_other_dtypes_are_refused_while_tracing(f, dtype):
    with pytest.raises(TypeError, match=f"{f.__name__} needs float32 or float64"):
        jax.eval_shape(f, jax.ShapeDtypeStruct((3, 3), dtype))


@every_function
def test_shapes_are_checked_while_tracing(f):
    with pytest.raises(ValueError, match=r"jax\.vmap"):
        jax.eval_shape(f, jax.ShapeDtypeStruct((2, 3, 3), jnp.float32))
    with pytest.raises(ValueError, match=f.__name__):
        jax.eval_shape(f, jax.ShapeDtypeStruct((3, 4), jnp.float32))


@every_sum
def test_lowers_for_every_platform(f):
    stack = jax.ShapeDtypeStruct((3, N, N), jnp.float32)
    program = jax.jit(jax.grad(lambda a: jnp.sum(jax.vmap(f)(a))))
    for platforms in (["cpu"], ["cuda"], ["tpu"]):
        assert jax.export.export(program, platforms=platforms)(stack).out_avals[0].shape == (
            3,
            N,
            N,
        )


def test_loops_on_cpu_and_stays_batched_elsewhere():
    traced = jax.jit(jax.vmap(linalg.cholesky)).trace(jnp.ones((3, N, N)))
    cpu = traced.lower(lowering_platforms=("cpu",)).as_text()
    tpu = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "stablehlo.while" in cpu and "stablehlo.while" not in tpu
    calls = [line for line in cpu.splitlines() if "lapack_spotrf" in line]
    assert calls and all(f"tensor<{N}x{N}xf32>" in line for line in calls)
    assert "tensor<3x4x4xf32>" in tpu


CONCURRENT_STACKS = """
import jax, jax.numpy as jnp
from kradagrad_jax import linalg
a = jax.random.normal(jax.random.key(0), (4, 4, 128, 128))
stacks = tuple(a @ jnp.swapaxes(a, -1, -2) + jnp.eye(128))
for f in (linalg.eigh, linalg.svd, linalg.qr_r, linalg.cholesky, linalg.triangular_inverse):
    step = jax.jit(lambda xs: [jax.tree.leaves(jax.vmap(f)(x))[-1] @ x for x in xs])
    for _ in range(30):
        jax.block_until_ready(step(stacks))
print("finished")
"""


def test_concurrent_stacks_do_not_hang():
    """Four independent stacks at once: hangs on two cores with `vmap` of the plain functions."""
    environment = flags.default_environment()
    environment.pop("NPROC", None)
    environment |= {"OPENBLAS_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-c", CONCURRENT_STACKS]
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.stdout.strip() == "finished", result.stderr[-2000:]
