"""Every update and every capture lowers for CPU, CUDA and TPU, with full-precision products.

The setting has no effect on a CPU, where tests of numbers therefore cannot see it; in the text it
can be read. On a TPU a product without it is rounded to bfloat16, on a GPU to TF32.
"""

import re

import jax
import pytest
from jax import export as jax_export

from tests.lowering import programs

PLATFORMS = ("cpu", "cuda", "tpu")
MODEL = "HIGH, HIGH"  # of the model's own products in the programs of captures
OURS = "HIGHEST, HIGHEST"


def export(function, arguments):
    """The exported program, checked against the shapes that tracing gives, and its text."""
    exported = jax_export.export(jax.jit(function), platforms=PLATFORMS)(*arguments)
    assert exported.platforms == PLATFORMS
    expected = jax.tree.leaves(jax.eval_shape(function, *arguments))
    found = [(x.shape, x.dtype) for x in exported.out_avals]
    assert found == [(x.shape, x.dtype) for x in expected]
    return exported.mlir_module()


def precisions(text):
    """The precisions of the operands of every matrix product and convolution."""
    lines = [x for x in text.splitlines() if re.search(r"stablehlo\.(dot_general|convolution)", x)]
    # a product says `precision = [HIGH, HIGH]`, a convolution `#stablehlo<precision HIGH>` twice
    return [", ".join(re.findall(r"\b(?:DEFAULT|HIGH|HIGHEST)\b", x)) for x in lines]


@pytest.mark.parametrize(
    "program", programs.DEFAULTS + programs.VARIANTS, ids=lambda program: program.name
)
def test_updates(program):
    with jax.default_matmul_precision("bfloat16"):  # what a caller may have set
        found = precisions(export(*program.build()))
    assert found and set(found) == {OURS}


@pytest.mark.parametrize("net", [programs.SMALL, programs.HALF], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", programs.CAPTURES)
def test_captures(name, net):
    """The model asks for another precision, and keeps it; second moments have the highest."""
    arguments = (net.params(), *net.data(), programs.key())
    found = precisions(export(programs.CAPTURES[name], arguments))
    assert found.count(MODEL) >= 3 * 3  # forward and backward pass of three layers, at the least
    # a convolution and two matrices have six second moments, on three platforms
    assert found.count(OURS) == (18 if "grams" in name else 0)
    assert set(found) <= {MODEL, OURS}
