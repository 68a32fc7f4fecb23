"""The tasks: their data, losses and batches, and the synthetic problem's recipe."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kradagrad_jax.experiments import quadratic, tasks
from kradagrad_jax.experiments.optimizers import resolve
from kradagrad_jax.experiments.training import Program, float64_mode


@pytest.fixture
def x64():
    with float64_mode(True):
        yield


def test_epochs_are_permutations():
    order = tasks.shuffled(10, 3)
    batches = order(0, 7)
    assert batches.shape == (7, 3)
    for epoch in (batches[:3], batches[3:6]):
        assert len(set(epoch.ravel())) == 9
    assert np.array_equal(batches, order(0, 7))
    assert not np.array_equal(batches, order(1, 7))


@pytest.mark.parametrize(("name", "count"), [("digits", 26122), ("digits_autoencoder", 38416)])
def test_image_tasks(name, count):
    task = tasks.make_task(name, {})
    params, images = task.setup(0)
    assert sum(p.size for p in jax.tree.leaves(params)) == count
    batch = jnp.asarray(task.order(0, 1)[0])
    grads = jax.grad(task.loss)(params, images, batch)
    assert all(float(jnp.linalg.norm(g)) > 0 for g in jax.tree.leaves(grads))
    chance = {"digits": np.log(10), "digits_autoencoder": np.log(2)}[name]
    assert 0.9 * chance < float(task.evaluate(params, images)["loss"]) < 1.5 * chance


def test_autoencoder_is_mirrored():
    params, _ = tasks.make_task("digits_autoencoder", {}).setup(0)
    widths = [
        layer["kernel"].shape
        for half in ("encoder", "decoder")
        for _, layer in sorted(params[half].items())
    ]
    encoder = [(64, 128), (128, 64), (64, 32), (32, 16)]
    assert widths == encoder + [(n, m) for m, n in reversed(encoder)]


def test_spectrum_of_the_quadratic():
    a, b, x = quadratic.problem(0, 64, 8)
    for matrix in (a, b):
        w = np.linalg.eigvalsh(matrix)
        assert w[-1] == pytest.approx(10) and w[0] == pytest.approx(1e-9, rel=1e-3)
    assert x.dtype == np.float32
    assert np.sum(quadratic.spectrum(64, 8) > 1) > np.sum(quadratic.spectrum(64, 2) > 1)


def test_gradient_of_the_quadratic_is_exact_and_float32(x64):
    task = tasks.make_task("quadratic", {"n": 8, "q": 2})
    params, data = task.setup(3)
    grad = jax.grad(task.loss)(params, data, None)["x"]
    x = np.asarray(params["x"], np.float64)
    exact = 2 * np.asarray(data["a"]) @ x @ np.asarray(data["b"])
    assert grad.dtype == jnp.float32
    np.testing.assert_allclose(grad, exact, rtol=3e-7, atol=1e-7 * np.abs(exact).max())


def test_overwriting_nesterov():
    tx = quadratic.overwriting_nesterov(0.9)
    m, state = 0.0, tx.init(jnp.zeros(()))
    for u in (1.0, -2.0, 0.5):
        update, state = tx.update(jnp.asarray(u), state)
        for _ in range(2):
            m = 0.9 * m + u
        assert float(update) == pytest.approx(m, rel=1e-6)


def test_float64_mode_is_restored_after_an_error():
    before = jax.config.read("jax_enable_x64")
    with pytest.raises(RuntimeError), float64_mode(not before):
        assert jax.config.read("jax_enable_x64") != before
        raise RuntimeError
    assert jax.config.read("jax_enable_x64") == before


def test_training_equals_a_plain_loop(x64):
    task = tasks.make_task("quadratic", {"n": 5, "momentum": 0.0})
    points = list(Program(task, resolve("adamw", {}), 5, 2).train(1, 0.1))
    assert [p.step for p in points] == [0, 2, 4, 5]
    params, data = task.setup(1)
    tx = optax.adamw(0.1)
    state, losses = tx.init(params), []
    for _ in range(5):
        loss, grads = jax.value_and_grad(task.loss)(params, data, None)
        losses.append(float(loss))
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert points[-1].metrics["loss"] == pytest.approx(float(task.loss(params, data)), rel=1e-5)
    assert points[1].train_loss == pytest.approx(np.mean(losses[:2]), rel=1e-5)


def test_schedules_end_at_zero(x64):
    task = tasks.make_task("quadratic", {"n": 3, "momentum": 0.0})
    final = {}
    for kind in ("constant", "linear", "cosine"):
        points = list(Program(task, resolve("sgd", {}), 50, 50, kind).train(0, 1e-4))
        final[kind] = points[-1].metrics["loss"]
    assert final["constant"] < final["cosine"]
    assert final["constant"] < final["linear"]


def test_diverged_runs_stop(x64):
    task = tasks.make_task("quadratic", {"n": 4})
    points = list(Program(task, resolve("sgd", {}), 2000, 100).train(0, 10.0))
    assert points[-1].step < 2000
    assert not points[-1].finite and all(p.finite for p in points[:-1])
