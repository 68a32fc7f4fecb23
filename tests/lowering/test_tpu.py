"""Programs compiled for TPU v5e, without a TPU; `make lowering` installs what it takes."""

import importlib.util
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import kradagrad_jax as kj
from kradagrad_jax import linalg
from tests.lowering import ahead, programs

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: make lowering"
    ),
    pytest.mark.slow,
    pytest.mark.xdist_group("tpu"),
]
HIGHEST = {"highest,highest"}
EIGH, CHOLESKY, QR = "EighTpu", "Cholesky", "QrDecompositionBlock"
KERNELS = {
    **{name: {EIGH} for name in ("shampoo", "kradagrad_star", "kradagrad")},
    **{name: {CHOLESKY} for name in ("kfac", "tnt")},
    **{name: set() for name in programs.NO_ROOTS},
    "sre_kfac": {EIGH, QR},
    **{name: {EIGH, CHOLESKY, QR} for name in ("ginger", "rs_kfac", *ahead.BRAND)},  # svd takes all
}


@pytest.fixture(scope="module")
def devices():
    quiet = {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # another process may be compiling, too
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    }
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    return topologies.get_topology_desc(topology_name="v5e:2x2", platform="tpu").devices


@pytest.mark.parametrize("program", ahead.PROGRAMS, ids=lambda program: program.name)
def test_every_method(program, devices, record_property):
    text = ahead.compile_for(devices[0], program, record_property, "TPU v5e")
    assert set(ahead.precisions(text)) == HIGHEST
    assert ahead.calls(text) & {EIGH, CHOLESKY, QR} == KERNELS[program.alias]


@pytest.mark.parametrize("program", ahead.VARIANTS, ids=lambda program: program.name)
def test_variants(program, devices, record_property):
    text = ahead.compile_for(devices[0], program, record_property, "TPU v5e")
    assert set(ahead.precisions(text)) == HIGHEST


def test_large_eigendecompositions_are_made_of_small_ones(devices, record_property):
    stack = jax.ShapeDtypeStruct((2, 348, 348), jnp.float32)
    stack = ahead.on(jax.sharding.SingleDeviceSharding(devices[0]), stack)
    lowered = jax.jit(jax.vmap(linalg.eigh)).lower(stack)
    text = ahead.timed(lowered, record_property, "eigh of 348", "TPU v5e")
    assert ahead.calls(text) & {EIGH, CHOLESKY, QR} == {EIGH}
    assert set(ahead.precisions(text)) == HIGHEST


@pytest.mark.parametrize("alias", ["shampoo", "kradagrad_star", "kfac", "tnt", "singd"])
def test_training_step_on_four_devices(alias, devices, record_property):
    """Capture, update and new parameters with a batch that is split over the devices."""
    mesh = Mesh(np.array(devices), ("data",))
    program = programs.default(alias, ahead.DEEP)
    split = {"sharding": kj.Sharding("data", mesh=mesh)} if hasattr(kj, "Sharding") else {}
    tx = program.transformation(**split)
    kind = "samples" if alias in programs.SAMPLED else "rows"
    capture, gets = programs.CAPTURES[kind], program.statistics() is not None

    def step(params, state, x, y, key):
        _, grads, statistics = capture(params, x, y, key)
        more = {"curvature": statistics} if gets else {}
        updates, state = tx.update(grads, state, params, **more)
        return optax.apply_updates(params, updates), state

    params = program.net.params()
    everywhere = NamedSharding(mesh, PartitionSpec())
    shared = ahead.on(everywhere, (params, jax.eval_shape(tx.init, params)))
    batch = ahead.on(NamedSharding(mesh, PartitionSpec("data")), program.net.data())
    key = ahead.on(everywhere, programs.key())
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(*shared, *batch, key)
    text = ahead.timed(lowered, record_property, alias, "TPU v5e, step on 4")
    found = ahead.precisions(text)
    assert set(found) == HIGHEST | {"high,high"}  # the latter is the model's own
    assert "all-reduce" in text  # the gradients' mean
    if split:  # four blocks of 96 by 96: one per device, whose result the others are sent
        assert "all-gather" in text
        kernels = [line for line in text.splitlines() if EIGH in line or CHOLESKY in line]
        assert all("[4,96,96]" not in line for line in kernels)
