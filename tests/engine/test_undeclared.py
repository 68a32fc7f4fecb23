"""Trees of stacked layers of which the layout says nothing are seen, others are left in peace."""

import jax
import pytest
from flax import linen as nn

from kradagrad_jax.engine import trees
from kradagrad_jax.engine.layout import Layout
from kradagrad_jax.engine.undeclared import undeclared_stacks
from tests.engine.planning import S, dense, gpt2


def look(params, layout=None):
    paths = trees.paths_of(params)
    shapes = [x.shape for x in jax.tree.leaves(params)]
    return undeclared_stacks(paths, shapes, trees.names_of(params), layout or Layout())


SCANNED = {"blocks": {"fc": dense(12, 768, 3072), "ln": {"scale": S(12, 768)}}, "wte": S(99, 768)}
MAXTEXT = {"blocks": {"wi": S(768, 12, 3072), "ln": {"scale": S(768, 12)}}, "wte": S(99, 768)}


def test_scanned_trees_are_seen():
    assert look(SCANNED) == [("blocks", 0, 12)]
    assert look(MAXTEXT) == [("blocks", 1, 12)]
    assert look({"params": SCANNED["blocks"]}) == [("params", 0, 12)]
    assert not look(SCANNED["blocks"]["ln"] | SCANNED["blocks"]["fc"])  # a tree has no name


def test_half_declared_stacks_are_seen():
    named = {"w": nn.Partitioned(S(12, 70, 80), ("layers", None, None)), "bias": S(12, 70)}
    assert not look({"h": named})  # a vector in any case
    assert look({"h": named | {"scale": S(12, 70)}}) == [("h", 0, 12)]


def test_declared_stacks_are_not():
    assert not look(SCANNED, Layout(stacked="blocks"))
    assert not look(SCANNED, Layout(stacked={"blocks": None}))
    assert not look(MAXTEXT, Layout(stacked=lambda path, shape: 1 if "blocks" in path else None))


@pytest.mark.parametrize(
    "params",
    [
        gpt2(2),
        {
            "conv": {"kernel": S(3, 3, 64, 64), "bias": S(64)},
            "bn": {"scale": S(64), "bias": S(64)},
            "last": {"kernel": S(3, 3, 64, 3), "bias": S(3)},
        },
        {
            "conv1": {"kernel": S(3, 16, 16), "bias": S(16)},
            "conv2": {"kernel": S(3, 3, 3, 3), "bias": S(3)},
        },
        {
            "attention": {
                **{n: {"kernel": S(768, 12, 64), "bias": S(12, 64)} for n in "qkv"},
                "out": {"kernel": S(12, 64, 768), "bias": S(768)},
            },
            "fc": dense(768, 3072),
        },
        {
            **{n: {"kernel": S(64, 8, 8), "bias": S(8, 8)} for n in "qkv"},
            "out": {"kernel": S(8, 8, 64), "bias": S(64)},
        },
        {"conv": {"kernel": S(3, 16, 16), "gain": S(3)}},
        {"table": S(1000, 64), "positions": S(1, 1000, 64)},
        {n: {"kernel": S(64, 64), "bias": S(64)} for n in ("hi", "hf", "hg", "ho")},
    ],
    ids=["gpt2", "cnn", "convs", "attention", "square attention", "gains", "embeddings", "lstm"],
)
def test_other_networks_are_not_taken_for_scanned_ones(params):
    assert look(params) == []
