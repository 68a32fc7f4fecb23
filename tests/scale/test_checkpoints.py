"""States that are saved, restored, carried by flax's and optax's classes, and donated."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kradagrad_jax import curvature
from tests.registry import assert_close, assert_equal, types
from tests.scale import zoo
from tests.scale.zoo import over_all, over_families, over_stored

ROOT = Path(__file__).resolve().parents[2]
STEPS = 5
# a first Gram of deficient rank: rounding chooses the basis of its null space, and Adam steps in it
ARBITRARY = {"soap", "kl_soap"}


def saved(folder, tree):
    ocp = pytest.importorskip("orbax.checkpoint", reason="orbax is not installed")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, tree)


def restored(folder, target):
    ocp = pytest.importorskip("orbax.checkpoint", reason="orbax is not installed")
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder, target)


@over_stored
def test_a_resumed_run_is_the_uninterrupted_one(case, tmp_path):
    """To the bit: Orbax, pickle and flax's serialization, into the state of a new optimizer."""
    serialization = pytest.importorskip("flax.serialization", reason="flax is not installed")
    p = zoo.params()
    p, state = case.train(p, case.tx.init(p), range(STEPS))
    saved(tmp_path / "run", (p, state))
    files = pickle.dumps((p, state)), serialization.to_bytes((p, state))
    kept = zoo.copied((p, state))
    uninterrupted = case.train(p, state, range(STEPS, 2 * STEPS))
    fresh = (zoo.params(), case.make().init(zoo.params()))  # knows nothing of the run
    runs = [
        restored(tmp_path / "run", jax.eval_shape(lambda: fresh)),
        pickle.loads(files[0]),
        serialization.from_bytes(fresh, files[1]),
    ]
    for run in runs:
        assert_equal(run, kept)
        # not committed to a device, as at first: the compiled update is the same
        run = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), run)
        assert types(run) == types(kept)
        assert_equal(case.train(*run, range(STEPS, 2 * STEPS)), uninterrupted)


def check_in_a_new_process(cases, folder):
    """Nothing but the checkpoint is needed: no key, counter or cache of the first process."""
    expected = {}
    for case in cases:
        p = zoo.params()
        p, state = case.train(p, case.tx.init(p), range(STEPS))
        saved(folder / case.name, (p, state))
        p, state = case.train(p, state, range(STEPS, 2 * STEPS))
        expected[case.name] = jax.tree.leaves((p, state))
    arguments = [str(folder), str(STEPS), str(2 * STEPS), *(c.name for c in cases)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    subprocess.run(
        [sys.executable, "-m", "tests.scale.resume_script", *arguments],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, check=True,
    )  # fmt: skip
    for name, leaves in expected.items():
        found = pickle.loads((folder / f"{name}.pickle").read_bytes())
        for a, b in zip(found, leaves, strict=True):
            np.testing.assert_array_equal(a, np.asarray(b), err_msg=name)


def test_a_new_process_goes_on_to_the_bit(tmp_path):
    """With the method whose sketches are random: their keys come from the counters."""
    check_in_a_new_process([c for c in zoo.CASES if c.name == "brc_kfac"], tmp_path)


@pytest.mark.slow
def test_a_new_process_goes_on_to_the_bit_with_every_alias(tmp_path):
    check_in_a_new_process(zoo.CASES, tmp_path)


@over_all
def test_linen_train_state_and_donation(case):
    """The numbers of the plain loop; buffers of the old state are really given up."""
    pytest.importorskip("flax", reason="flax is not installed")
    p, state = zoo.params(), case.tx.init(zoo.params())
    TrainState = curvature.train_state_class()
    carried = TrainState.create(apply_fn=zoo.model, params=p, tx=case.tx)
    for t in range(3):
        _, grads, extra = case.measure(carried.params, t)
        before = jax.tree.leaves(carried.opt_state)
        carried = carried.apply_gradients(grads=grads, **extra)
        assert all(x.is_deleted() for x in before)
        p, state, _ = case.step(p, state, t)
    assert_equal(carried.params, p)
    assert_equal(carried.opt_state, state)
    assert carried.step == 3


def nnx_net(p):
    """The net as an nnx module with the given parameters, their paths being the same."""
    from flax import nnx

    class Dense(nnx.Module):
        def __init__(self, values):
            self.kernel, self.bias = nnx.Param(values["kernel"]), nnx.Param(values["bias"])

    class Net(nnx.Module):
        def __init__(self):
            self.dense0, self.dense1 = Dense(p["dense0"]), Dense(p["dense1"])
            self.scale = nnx.Param(p["scale"])

    return Net()


@over_families
def test_nnx_optimizer_and_multi_steps(case):
    """Two micro-steps are one step with the mean gradient and the LAST curvature."""
    nnx = pytest.importorskip("flax.nnx", reason="flax is not installed")
    p = zoo.params()
    several = optax.MultiSteps(case.make(), 2)
    update = jax.jit(several.update, compiler_options=zoo.QUICK)
    tx = optax.GradientTransformationExtraArgs(several.init, update)
    net = nnx_net(p)
    optimizer = nnx.Optimizer(net, tx, wrt=nnx.Param)
    structure = jax.tree.structure(nnx.state(net, nnx.Param))
    state = case.tx.init(p)
    for t in range(4):
        _, grads, extra = case.measure(p, t)
        as_state = jax.tree.unflatten(structure, jax.tree.leaves(grads))
        old = jax.tree.leaves(zoo.copied(nnx.state(net, nnx.Param)))
        optimizer.update(net, as_state, **extra)
        ours = jax.tree.leaves(nnx.state(net, nnx.Param))
        if t % 2 == 0:
            first = grads
            assert_equal(ours, old)
            continue
        mean = jax.tree.map(lambda a, b: (a + b) / 2, first, grads)
        updates, state = case.tx.update(mean, state, p, **extra)
        p = optax.apply_updates(p, updates)
        if case.name not in ARBITRARY:
            assert_close(ours, jax.tree.leaves(p), rtol=1e-2, atol=1e-3)
    held = nnx.as_pure(optimizer.opt_state) if hasattr(nnx, "as_pure") else optimizer.opt_state
    assert int(held.gradient_step) == 2
    assert zoo.counters(state)["count"] == zoo.counters(held)["count"] == 2


def test_nnx_model_with_a_list_of_layers():
    """Integers in paths."""
    nnx = pytest.importorskip("flax.nnx", reason="flax is not installed")
    case = next(c for c in zoo.CASES if c.name == "shampoo")

    class Model(nnx.Module):
        def __init__(self, rngs):
            layers = [nnx.Linear(4, 4, rngs=rngs), nnx.Linear(4, 3, rngs=rngs)]
            self.layers = getattr(nnx, "List", list)(layers)  # flax 0.11 takes lists

        def __call__(self, x):
            return self.layers[1](jnp.tanh(self.layers[0](x)))

    x, y = zoo.batch(0)
    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, case.make(), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda m: zoo.LOSS.value(m(x[:, :4]), y))(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(10)]
    assert losses[-1] < 0.9 * losses[0]
