"""Refreshes of many blocks, a part after the other, are those of all at once."""

import jax
import numpy as np
import pytest

import kradagrad_jax as kj
from kradagrad_jax.engine import refresh
from tests.registry import grads_at, params_like


@pytest.mark.parametrize("size", [20, 24], ids=["the last part overlaps", "even parts"])
@pytest.mark.parametrize("root", ["eigh", "newton", "tracked"])
def test_in_parts(root, size, monkeypatch):
    params = params_like({"w": (4 * size, 4), "v": (3, 4)})
    tx = kj.scale_by_shampoo(root=root, refresh_every=2, layout=kj.Layout(block_size=4))

    def run():
        state, update = tx.init(params), jax.jit(lambda g, s: tx.update(g, s))
        for t in range(4):
            updates, state = update(grads_at(params, t), state)
        return updates, state

    whole = run()
    monkeypatch.setattr(refresh, "PART", 1)
    calls = []
    inner = refresh._changed
    monkeypatch.setattr(refresh, "_changed", lambda *a: calls.append(0) or inner(*a))
    parts = run()
    assert calls
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), whole, parts)
