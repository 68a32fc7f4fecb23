"""Sampled gradients: one forward pass, the right covariance, averages over devices."""

import itertools
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kradagrad_jax.curvature import losses
from kradagrad_jax.curvature.samples import Samples, curvature_vectors, sampled_gradients
from tests import flags
from tests.x64 import x64

ROOT = Path(__file__).resolve().parents[2]
SOFTMAX = losses.softmax_cross_entropy()
KEY = jax.random.key(3)


@pytest.fixture(autouse=True)
def double():
    with x64(), jax.numpy_dtype_promotion("strict"):
        yield


def problem(n=6, seed=0):
    rng = np.random.default_rng(seed)
    params = {"w": jnp.asarray(rng.normal(size=(4, 5))), "b": jnp.asarray(rng.normal(size=3))}
    params["v"] = jnp.asarray(rng.normal(size=(5, 3)))
    return params, jnp.asarray(rng.normal(size=(n, 4))), jnp.asarray(rng.integers(0, 3, n))


def model(params, x):
    return jnp.tanh(x @ params["w"]) @ params["v"] + params["b"]


def flat(samples):
    """Curvature vectors as rows ``(n, parameters)``."""
    paths = sorted(samples.values)
    return np.concatenate(
        [samples.vectors(p).reshape(len(samples.vectors(p)), -1) for p in paths], 1
    )


def gauss_newton(params, x, weights=None):
    """``sum_m w_m J_m^T H_m J_m / M`` of the batch, from dense Jacobians."""
    jacobian = jax.jacobian(lambda p: model(p, x))(params)
    j = np.concatenate([jacobian[p].reshape(len(x), 3, -1) for p in sorted(params)], 2)
    p = np.asarray(jax.nn.softmax(model(params, x)))
    h = np.stack([np.diag(q) - np.outer(q, q) for q in p])
    w = np.ones(len(x)) if weights is None else np.asarray(weights)
    return np.einsum("m,mci,mcd,mdj->ij", w, j, h, j) / w.sum()


def test_loss_and_gradient_are_those_of_autodiff():
    params, x, labels = problem()
    step = sampled_gradients(lambda p, x: (model(p, x), {"n": len(x)}), SOFTMAX, has_aux=True)
    (value, aux), grads, samples = step(params, x, labels, rng=KEY)
    assert aux == {"n": 6} and samples.terms == 6 and samples.fresh
    expected = jax.value_and_grad(lambda p: SOFTMAX.value(model(p, x), labels))(params)
    assert float(value) == pytest.approx(float(expected[0]), rel=1e-14)
    for path, g in expected[1].items():
        np.testing.assert_allclose(grads[path], g, atol=1e-15)
        assert samples.gradients(path).shape == (1, *g.shape)


def test_a_sample_is_the_gradient_at_drawn_labels():
    params, x, labels = problem()
    _, _, samples = sampled_gradients(model, SOFTMAX)(params, x, labels, rng=KEY)
    drawn = SOFTMAX.sample(KEY, model(params, x))
    expected = jax.grad(lambda p: SOFTMAX.value(model(p, x), drawn))(params)
    for path, g in expected.items():
        np.testing.assert_allclose(samples.gradients(path)[0], g, atol=1e-15)


def test_the_forward_pass_runs_once():
    """Products in the program: 2 forward, 3 per backward pass (none for the inputs x)."""
    params, x, labels = problem()
    step = sampled_gradients(model, SOFTMAX)
    program = str(jax.make_jaxpr(lambda k: step(params, x, labels, rng=k))(KEY))
    assert program.count("dot_general[") == 2 + 3 + 3
    assert program.count("tanh") == 1


def test_keys_decide():
    params, x, labels = problem()
    step = jax.jit(sampled_gradients(model, SOFTMAX, num_samples=2))
    first, again, other = (step(params, x, labels, rng=k)[2] for k in (KEY, KEY, jax.random.key(4)))
    np.testing.assert_array_equal(flat(first), flat(again))
    assert np.abs(flat(first) - flat(other)).max() > 1e-3
    assert np.abs(flat(first)[0] - flat(first)[1]).max() > 1e-3


@pytest.mark.parametrize("weights", [None, (1.0, 0.0, 2.0, 0.5, 1.0, 0.0)], ids=str)
def test_exact_samples_are_the_gauss_newton_matrix(weights):
    params, x, labels = problem()
    weights = None if weights is None else jnp.asarray(weights)
    step = sampled_gradients(model, SOFTMAX, kind="exact")
    h = flat(step(params, x, labels, rng=KEY, weights=weights)[2])
    assert h.shape[0] == 6 * 3
    np.testing.assert_allclose(h.T @ h / len(h), gauss_newton(params, x, weights), atol=1e-14)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("sampled", {"num_samples": 40}), ("rademacher", {"num_samples": 40}), ("per_example", {})],
)
def test_the_mean_over_draws_tends_to_the_gauss_newton_matrix(kind, options):
    params, x, labels = problem()
    step = sampled_gradients(model, SOFTMAX, kind=kind, **options)
    keys = jax.random.split(KEY, 200)
    drawn = jax.jit(jax.vmap(lambda k: step(params, x, labels, rng=k)[2]))(keys)
    h = np.concatenate([flat(jax.tree.map(lambda a, i=i: a[i], drawn)) for i in range(200)])
    expected = gauss_newton(params, x)
    error = np.abs(h.T @ h / len(h) - expected).max() / np.abs(expected).max()
    assert error < (0.05 if options else 0.1)


def test_p15_all_labels_of_a_small_model():
    """E[S] = 0, and the contractions of S are partial traces of the Fisher matrix over B."""
    rng = np.random.default_rng(1)
    w, x = jnp.asarray(rng.normal(size=(4, 3))), jnp.asarray(rng.normal(size=(2, 4)))
    p = np.asarray(jax.nn.softmax(x @ w))
    mean, left, right = np.zeros((4, 3)), np.zeros((4, 4)), np.zeros((3, 3))
    for labels in itertools.product(range(3), repeat=2):
        s = np.asarray(jax.grad(lambda w, t: SOFTMAX.value(x @ w, t))(w, jnp.array(labels)))
        chance = p[0, labels[0]] * p[1, labels[1]]
        mean, left = mean + chance * s, left + chance * s @ s.T
        right = right + chance * s.T @ s
    h = np.stack([np.diag(q) - np.outer(q, q) for q in p])
    fisher = np.einsum("mi,mk,mcd->icdk", x, x, h).transpose(0, 1, 3, 2) / 2
    assert np.abs(mean).max() < 1e-15
    np.testing.assert_allclose(left, np.einsum("icjc->ij", fisher) / 2, atol=1e-15)
    np.testing.assert_allclose(right, np.einsum("icid->cd", fisher) / 2, atol=1e-15)


def test_no_samples_where_none_are_wanted():
    params, x, labels = problem()
    step = sampled_gradients(model, SOFTMAX, num_samples=2)
    assert step(params, x, labels, rng=KEY, update_stats=False)[2] is None
    gated = jax.jit(lambda wish: step(params, x, labels, rng=KEY, update_stats=wish))
    on, off = gated(True), gated(False)
    np.testing.assert_array_equal(on[1]["w"], off[1]["w"])
    assert on[2].fresh and not off[2].fresh
    np.testing.assert_allclose(flat(on[2]), flat(step(params, x, labels, rng=KEY)[2]), atol=1e-15)
    assert not flat(off[2]).any()


def test_micro_batches_add_up():
    params, x, _ = problem(9)
    z, pullback = jax.vjp(lambda p: model(p, x), params)
    s = SOFTMAX.pseudo_gradient(KEY, z)
    whole = Samples.from_gradients(pullback(s / 9)[0], terms=9)
    parts = []
    for piece in (np.s_[:4], np.s_[4:]):
        pull = jax.vjp(lambda p, i=piece: model(p, x[i]), params)[1]
        n = len(s[piece])
        parts.append(Samples.from_gradients(pull(s[piece] / n)[0], terms=n))
    both = parts[0] + parts[1]
    assert both.terms == 9
    np.testing.assert_allclose(flat(both), flat(whole), atol=1e-14)


def test_half_precision_models():
    params, x, labels = problem()
    params, x = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (params, x))
    (value, _), grads, samples = sampled_gradients(model, SOFTMAX)(params, x, labels, rng=KEY)
    assert value.dtype == jnp.float32
    assert {a.dtype for a in jax.tree.leaves((grads, samples.values))} == {jnp.dtype(jnp.bfloat16)}


def test_errors_say_what_to_do():
    params, x, labels = problem()
    with pytest.raises(ValueError, match="kind must be one of"):
        sampled_gradients(model, SOFTMAX, kind="all")(params, x, labels, rng=KEY)
    with pytest.raises(ValueError, match="leave axis_name out"):
        sampled_gradients(model, SOFTMAX, kind="exact", axis_name="d")
    with pytest.raises(KeyError, match="no gradients of parameter 'x'"):
        Samples.from_gradients({"w": x}).gradients("x")
    with pytest.raises(ValueError, match="pass them"):
        curvature_vectors(lambda s: {"z": s}, x, losses.generic(lambda z, t: z @ z), KEY)


def test_shards_give_the_same_statistics_as_one_device():
    """Eight simulated devices, in a process of their own."""
    environment = flags.simulating(8) | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.curvature.shards_script"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
