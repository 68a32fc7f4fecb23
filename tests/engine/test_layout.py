"""What the engine says about its layout."""

import jax
import jax.numpy as jnp

import kradagrad_jax as kj


def tree():
    shapes = {
        "w": (7, 5),
        "k": (3, 2, 2, 5),
        "v": (9,),
        "scalar": (),
        "one": (1,),
        "row": (1, 6),
        "stacked": (3, 4, 5),
        "empty": (0, 3),
    }
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return {n: jax.random.normal(k, s) for (n, s), k in zip(shapes.items(), keys, strict=True)}


def test_blocks_come_first_mode_slowest():
    params = {"w": jnp.arange(35.0).reshape(7, 5)}
    layout = kj.Layout(block_size=4, pieces="tail")
    state = kj.scale_by_shampoo(layout=layout, beta1="none", graft="none").init(params)
    from kradagrad_jax.engine import block_factors

    shapes = [
        tuple(s.shape[0] for s in f.statistics) for f in block_factors(state, params, layout)["w"]
    ]
    assert shapes == [(4, 4), (4, 1), (3, 4), (3, 1)]


def test_describe_names_every_parameter():
    tx = kj.shampoo(0.1, layout=kj.Layout(block_size=4, stacked="stacked"))
    found = kj.describe(tx, tree())
    assert [name for row in found.rows for name in row.paths] == sorted(tree())
    treated = {row.paths[0]: (row.treated, row.blocks, row.why) for row in found.rows}
    assert treated["stacked"] == ("4x5, 3 stacked", "3 of 4x2 + 3 of 4x3", "")
    assert treated["k"][:2] == ("6x10", "4 of 3x3 + 2 of 3x4")
    for name, why in {"v": "vector", "scalar": "scalar", "row": "vector", "empty": "empty"}.items():
        assert treated[name] == ("adam", "-", why)
    assert all(name in str(found) for name in tree())
    assert str(kj.describe(tx, jax.eval_shape(tree))) == str(found)
