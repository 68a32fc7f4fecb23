"""Structured square matrices: subspaces that products do not leave, with cheap operations."""

from kradagrad_jax.linalg.structures.base import Stored as Stored
from kradagrad_jax.linalg.structures.base import Structure as Structure
from kradagrad_jax.linalg.structures.bordered import Bordered as Bordered
from kradagrad_jax.linalg.structures.bordered import Hierarchical as Hierarchical
from kradagrad_jax.linalg.structures.full import Dense as Dense
from kradagrad_jax.linalg.structures.full import Triangular as Triangular
from kradagrad_jax.linalg.structures.names import STRUCTURES as STRUCTURES
from kradagrad_jax.linalg.structures.names import structure as structure
from kradagrad_jax.linalg.structures.sparse import BlockDiagonal as BlockDiagonal
from kradagrad_jax.linalg.structures.sparse import Diagonal as Diagonal
from kradagrad_jax.linalg.structures.sparse import Toeplitz as Toeplitz
