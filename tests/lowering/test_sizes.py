"""The largest factorisations that default settings put on a TPU, for layers of a large net.

XLA's `eigh` is one kernel up to 256 on TPU; above, it is a recursive program that takes minutes to
compile, and `svd` stands on it. The numbers are those of the table in docs/lowering.md.
"""

import jax
import pytest

from kradagrad_jax.linalg import lapack
from tests.lowering import programs

SPECTRAL = ("eigh", "svd")
OTHERS = ("qr", "cholesky")


def equations(jaxpr, platform):
    """All equations of a program that lowering for one platform would keep."""
    for equation in jaxpr.eqns:
        yield equation
        for name, value in equation.params.items():
            chosen = equation.params.get("branches_platforms") if name == "branches" else None
            if chosen is not None:
                default = len(chosen) - 1
                own = (i for i, names in enumerate(chosen) if names and platform in names)
                value = value[next(own, default)]
            for inner in jax.tree.leaves(value, is_leaf=_is_program):
                if _is_program(inner):
                    yield from equations(getattr(inner, "jaxpr", inner), platform)


def _is_program(x):
    return hasattr(x, "eqns") or hasattr(x, "jaxpr")


def largest(program, platform):
    """Per factorisation the largest size: columns of the matrix."""
    update, arguments = program.build()
    jaxpr = jax.make_jaxpr(update)(*arguments).jaxpr
    sizes = {}
    for equation in equations(jaxpr, platform):
        name = equation.primitive.name
        if name in SPECTRAL + OTHERS:
            sizes[name] = max(sizes.get(name, 0), equation.invars[0].aval.shape[-1])
    return sizes


SKETCH = {"svd": 230, "qr": 230}
# rank 220 and 128 rows: 348 in one piece elsewhere, four blocks of 87 on a TPU
BRAND = {"eigh": 2 * 87, "qr": 348, "svd": 230}
EXPECTED = {
    "shampoo": {"eigh": 256},
    "kradagrad_star": {"eigh": 256},
    "kradagrad": {"eigh": 256},
    "soap": {"eigh": 256, "qr": 256},
    "kl_shampoo": {"eigh": 256, "qr": 256},
    "kl_soap": {"eigh": 256, "qr": 256},
    "sirfshampoo": {},
    "tnt": {"cholesky": 1024},
    "ginger": {"svd": 5},
    "kfac": {"cholesky": 2304},
    "rs_kfac": SKETCH,
    "sre_kfac": {"eigh": 230, "qr": 230},
    "b_kfac": BRAND,
    "br_kfac": BRAND,
    "bc_kfac": BRAND,
    "brc_kfac": BRAND,
    "ikfac": {},
    "ingd": {},
    "singd": {},
}


@pytest.mark.parametrize("alias", programs.NAMES)
def test_no_large_eigendecompositions(alias):
    sizes = largest(programs.default(alias, programs.LARGE), "tpu")
    assert sizes == EXPECTED[alias]
    assert all(sizes.get(name, 0) <= lapack.LARGEST for name in SPECTRAL)


def test_other_platforms_take_them_in_one_piece():
    assert largest(programs.default("b_kfac", programs.LARGE), "cuda")["eigh"] == 220 + 128
