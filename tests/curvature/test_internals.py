"""JAX's internals are read in one module; evaluation of a trace changes nothing."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp

import kradagrad_jax.curvature as package
from kradagrad_jax import curvature
from kradagrad_jax.curvature import internals
from tests.curvature import zoo

FORBIDDEN = re.compile(
    r"jax\._src|jax\.extend|jax\.core|\.eqns\b|get_bind_params|make_jaxpr|\.aval\b"
)


def test_internals_are_read_in_one_module():
    for file in Path(package.__file__).parent.glob("*.py"):
        found = FORBIDDEN.findall(file.read_text())
        assert not found or file.name == "internals.py", f"{file.name}: {found}"


def test_trace_inlines_calls_and_keeps_blocks():
    loss, params, batch = zoo.scanned_remat()
    leaves = jax.tree.leaves((params, batch))
    tree = jax.tree.structure((params, batch))

    def flat(*values):
        params, batch = tree.unflatten(values)
        return [jax.jit(loss)(params, *batch)]

    graph = internals.trace(flat, leaves)
    names = [node.name for node in graph.block.walk()]
    assert "scan" in names and not {"jit", "pjit"} & set(names)
    assert any(name in internals.REMAT for name in names)
    outer = [node.index for node in graph.block.walk()]
    assert sorted(outer) == list(range(graph.nodes))


def test_registered_dataclasses_are_parameters():
    """Models in the style of equinox: attributes as path names, weights on the left."""

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Dense:
        weight: jax.Array
        bias: jax.Array

        def __call__(self, x):
            return self.weight @ x + self.bias

    model = {"layers": [Dense(jnp.ones((5, 4)), jnp.ones(5)), Dense(jnp.ones((3, 5)), jnp.ones(3))]}

    def loss(model, x):
        first, second = model["layers"]
        return zoo.square(jax.vmap(lambda u: second(jnp.tanh(first(u))))(x))

    spec = curvature.inspect(loss, model, jnp.ones((6, 4)))
    assert [layer.path for layer in spec.layers] == ["layers/0/weight", "layers/1/weight"]
    assert spec.layer("layers/0/weight").bias == "layers/0/bias"
    residuals = curvature.check(loss, model, jnp.ones((6, 4)), verbose=False)
    assert max(residuals.values()) < 1e-6
    assert len(residuals) == 2
