"""Structures by name."""

from collections.abc import Callable

from kradagrad_jax.linalg.structures.base import Structure
from kradagrad_jax.linalg.structures.bordered import Bordered, Hierarchical
from kradagrad_jax.linalg.structures.full import Dense, Triangular
from kradagrad_jax.linalg.structures.sparse import BlockDiagonal, Diagonal, Toeplitz

# name -> (constructor from sizes, default sizes)
STRUCTURES: dict[str, tuple[Callable[..., Structure], tuple[int, ...]]] = {
    "dense": (Dense, ()),
    "diagonal": (Diagonal, ()),
    "block_diagonal": (BlockDiagonal, (30,)),
    "tril": (lambda: Triangular(True), ()),
    "triu": (lambda: Triangular(False), ()),
    "tril_toeplitz": (lambda: Toeplitz(True), ()),
    "triu_toeplitz": (lambda: Toeplitz(False), ()),
    "hierarchical": (Hierarchical, (15, 15)),
    "tril_top_left_diag": (lambda k: _ranked(k, Hierarchical(0, k)), (1,)),
    "triu_top_left_diag": (lambda k: Bordered(k, False), (1,)),
    "tril_bottom_right_diag": (lambda k: Bordered(k, True), (1,)),
    "triu_bottom_right_diag": (lambda k: _ranked(k, Hierarchical(k, 0)), (1,)),
}


def _ranked(k: int, made: Structure) -> Structure:
    if k < 1:
        raise ValueError(f"rank-k structures need k >= 1, got {k}")
    return made


def structure(name: str | Structure) -> Structure:
    """The structure of a name, with its sizes after a colon.

    Args:
      name: ``"dense"``, ``"diagonal"``, ``"block_diagonal:30"``, ``"tril"``, ``"triu"``,
        ``"tril_toeplitz"``, ``"triu_toeplitz"``, ``"hierarchical:15,15"``, or one of the rank-k
        triangular ones ``"tril_top_left_diag:1"``, ``"triu_top_left_diag:1"``,
        ``"tril_bottom_right_diag:1"``, ``"triu_bottom_right_diag:1"``. The sizes shown are the
        defaults. A :class:`Structure` is returned as it is.

    Raises:
      ValueError: unknown name, or sizes that do not belong to it.

    Examples:
      >>> structure("hierarchical:2,3").numbers(10)
      49
      >>> structure("block_diagonal") == structure("block_diagonal:30")
      True
    """
    if isinstance(name, Structure):
        return name
    kind, _, text = str(name).partition(":")
    if kind not in STRUCTURES:
        raise ValueError(
            f"unknown structure {name!r}: there are {', '.join(STRUCTURES)}, some with sizes as in "
            "'hierarchical:15,15'"
        )
    make, sizes = STRUCTURES[kind]
    if text:
        try:
            given = tuple(int(part) for part in text.split(","))
        except ValueError:
            given = ()
        if len(given) != len(sizes):
            example = ":".join([kind, ",".join(map(str, sizes))]) if sizes else kind
            raise ValueError(f"structure {name!r} has the wrong sizes: write it like {example!r}")
        sizes = given
    return make(*sizes)
