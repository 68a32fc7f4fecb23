"""flax's optimizers and training state, and states that are saved and restored."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.registry import (
    assert_equal,
    compiled,
    grads_at,
    over_aliases,
    params_like,
)

pytestmark = pytest.mark.lenient_promotion  # flax promotes on its own
SAVED = ["shampoo", "shampoo-fold", "kradagrad_star", "star-delayed", "kradagrad"]


def after_three_steps(name):
    params = params_like()
    tx, init, update = compiled(name)
    state = init(params)
    for t in range(3):
        _, state = update(grads_at(params, t), state, params)
    return params, tx, update, state


def assert_continues(params, update, state, restored):
    """Same tree, same bits, and the same next step."""
    assert_equal(restored, state)
    grads = grads_at(params, 3)
    assert_equal(update(grads, restored, params), update(grads, state, params))


@pytest.mark.parametrize("name", SAVED)
def test_pickle(name):
    params, _, update, state = after_three_steps(name)
    assert_continues(params, update, state, pickle.loads(pickle.dumps(state)))


@pytest.mark.parametrize("name", SAVED)
def test_flax_serialization(name):
    serialization = pytest.importorskip("flax.serialization", reason="flax is not installed")
    params, tx, update, state = after_three_steps(name)
    data = serialization.to_bytes(state)
    restored = serialization.from_bytes(tx.init(params), data)
    assert_continues(params, update, state, jax.tree.map(jnp.asarray, restored))


@pytest.mark.parametrize("name", SAVED)
def test_orbax(name, tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint", reason="orbax is not installed")
    params, tx, update, state = after_three_steps(name)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, tx.init(params))
        restored = checkpointer.restore(tmp_path / "state", target)
    assert_continues(params, update, state, restored)


def regression(model, x, y):
    return jnp.mean((model(x) - y) ** 2)


@over_aliases
def test_nnx_optimizer(entry):
    """The same parameters as pure optax gives, for a model with a list of layers."""
    nnx = pytest.importorskip("flax.nnx", reason="flax is not installed")

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs), nnx.Linear(4, 3, rngs=rngs)])

        def __call__(self, x):
            return self.layers[1](jnp.tanh(self.layers[0](x)))

    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((8, 4), (8, 3)))
    model = Model(nnx.Rngs(0))
    graph, pure = nnx.split(model)
    params = nnx.as_pure(pure) if hasattr(nnx, "as_pure") else pure.to_pure_dict()
    optimizer = nnx.Optimizer(model, entry.make(), wrt=nnx.Param)
    tx = entry.make()
    state = tx.init(params)
    update = jax.jit(tx.update)
    losses = []
    for _ in range(4):
        loss, grads = nnx.value_and_grad(regression)(model, x, y)
        optimizer.update(model, grads, curvature=None)
        losses.append(float(loss))
        g = jax.grad(lambda p: regression(nnx.merge(graph, p), x, y))(params)
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
    ours = [np.asarray(v) for v in jax.tree.leaves(nnx.state(model, nnx.Param))]
    theirs = [np.asarray(v) for v in jax.tree.leaves(params)]
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    assert losses[-1] < losses[0]


@over_aliases
def test_linen_train_state(entry):
    nn = pytest.importorskip("flax.linen", reason="flax is not installed")
    from flax.training.train_state import TrainState

    model = nn.Sequential([nn.Dense(4), jnp.tanh, nn.Dense(3)])
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((8, 4), (8, 3)))
    params = model.init(jax.random.key(0), x)["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=entry.make())

    @jax.jit
    def step(state):
        loss, grads = jax.value_and_grad(
            lambda p: jnp.mean((state.apply_fn({"params": p}, x) - y) ** 2)
        )(state.params)
        return state.apply_gradients(grads=grads), loss

    losses = []
    for _ in range(10):
        state, loss = step(state)
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    assert step._cache_size() <= 2  # flax's own step counter starts as a Python integer
