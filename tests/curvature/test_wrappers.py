"""`curvature=` reaches an optimizer through optax's wrappers, a TrainState and jit."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from kradagrad_jax import curvature
from tests.curvature import flax_models, zoo


def toy():
    """Leaves the gradients alone and adds up the traces of the input factors that it saw."""

    def update(grads, state, params=None, *, curvature=None, **extra):
        del params, extra
        if curvature is None:
            return grads, state
        seen = sum(jnp.trace(curvature.grams(p.path).a[0]) for p in curvature.spec.layers)
        return grads, {"seen": state["seen"] + seen}

    return optax.GradientTransformationExtraArgs(lambda params: {"seen": jnp.zeros(())}, update)


def total(state):
    return sum(
        float(x) for x in jax.tree.leaves(state) if jnp.shape(x) == () and x.dtype.kind == "f"
    )


WRAPPERS = {
    "chain": lambda: optax.chain(optax.clip(1.0), toy()),
    "partition": lambda: optax.partition(
        {"a": toy(), "b": optax.sgd(0.1)}, {"w1": "a", "b1": "b", "w2": "a", "b2": "b"}
    ),
    "masked": lambda: optax.masked(toy(), {"w1": True, "b1": False, "w2": True, "b2": False}),
    "multi_steps": lambda: optax.MultiSteps(toy(), 1),
    "apply_if_finite": lambda: optax.apply_if_finite(toy(), 2),
    "flatten": lambda: optax.chain(optax.scale(2.0), optax.masked(toy(), True)),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_optax_wrappers_deliver_curvature(name):
    loss, params, batch = zoo.mlp()
    tx = WRAPPERS[name]()
    tx = tx.gradient_transformation() if name == "multi_steps" else tx
    step = curvature.value_grad_and_curvature(loss)

    @jax.jit
    def train(params, state, x):
        _, grads, curv = step(params, x)
        updates, state = tx.update(grads, state, params, curvature=curv)
        return optax.apply_updates(params, updates), state, curv

    _, state, curv = train(params, tx.init(params), *batch)
    wanted = sum(float(jnp.trace(curv.grams(p.path).a[0])) for p in curv.spec.layers)
    assert total(state) == pytest.approx(wanted, rel=1e-4)


def test_train_state_passes_curvature_on():
    model, x = nn.Dense(3), jnp.ones((4, 2))
    params = model.init(jax.random.key(0), x)["params"]
    TrainState = curvature.train_state_class()
    state = TrainState.create(apply_fn=model.apply, params=params, tx=toy())
    step = curvature.value_grad_and_curvature(
        lambda p, x: jnp.mean(model.apply({"params": p}, x) ** 2)
    )

    @jax.jit
    def train(state, x):
        _, grads, curv = step(state.params, x)
        return state.apply_gradients(grads=grads, curvature=curv)

    after = train(state, x)
    assert after.step == 1 and float(after.opt_state["seen"]) == pytest.approx(3.0)
    assert after.tx is state.tx
    plain = TrainState.create(apply_fn=model.apply, params=params, tx=optax.sgd(0.1))
    assert plain.apply_gradients(grads=params).step == 1
    assert curvature.train_state_class() is TrainState


def test_nnx_optimizer_passes_curvature_on():
    model = flax_models.NnxCNN(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, toy(), wrt=nnx.Param)
    step = curvature.nnx_value_grad_and_curvature(lambda m, x: jnp.mean(m(x) ** 2))

    @nnx.jit
    def train(model, optimizer, x):
        _, grads, curv = step(model, x)
        optimizer.update(model, grads, curvature=curv)

    train(model, optimizer, jnp.ones((3, 6, 6, 2)))
    assert total(nnx.state(optimizer)) > 0


def test_donated_parameters_and_state():
    loss, params, batch = zoo.mlp()
    params = jax.tree.map(lambda p: p + 0.0, params)
    step = curvature.value_grad_and_curvature(loss)

    @partial(jax.jit, donate_argnums=0)
    def train(params, x):
        _, grads, curv = step(params, x)
        return jax.tree.map(lambda p, g: p - g, params, grads), curv.grams("w1").a

    new, a = train(params, *batch)
    assert np.all(np.isfinite(a)) and new["w1"].shape == (4, 6)
