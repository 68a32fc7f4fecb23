"""Pure functions on one matrix: products, factorisations, roots, iterations, array updates.

Nothing here knows of optimizers or parameters. Every function takes ONE matrix and is meant to be
`vmap`ped over a stack; factorisations go through `lapack`, products through `products`.
"""

from kradagrad_jax.linalg.arrays import inverse_update as inverse_update
from kradagrad_jax.linalg.arrays import sr_update as sr_update
from kradagrad_jax.linalg.branches import when as when
from kradagrad_jax.linalg.lapack import cholesky as cholesky
from kradagrad_jax.linalg.lapack import eigh as eigh
from kradagrad_jax.linalg.lapack import qr as qr
from kradagrad_jax.linalg.lapack import qr_r as qr_r
from kradagrad_jax.linalg.lapack import svd as svd
from kradagrad_jax.linalg.lapack import triangular_inverse as triangular_inverse
from kradagrad_jax.linalg.lowrank import LowRank as LowRank
from kradagrad_jax.linalg.lowrank import brand_update as brand_update
from kradagrad_jax.linalg.lowrank import correct as correct
from kradagrad_jax.linalg.lowrank import low_rank_solve as low_rank_solve
from kradagrad_jax.linalg.lowrank import randomized_svd as randomized_svd
from kradagrad_jax.linalg.lowrank import symmetric_sketch as symmetric_sketch
from kradagrad_jax.linalg.newton import checked_positive_root as checked_positive_root
from kradagrad_jax.linalg.newton import inverse_root as inverse_root
from kradagrad_jax.linalg.products import matmul as matmul
from kradagrad_jax.linalg.products import mode_gram as mode_gram
from kradagrad_jax.linalg.products import multiply_modes as multiply_modes
from kradagrad_jax.linalg.products import symmetrize as symmetrize
from kradagrad_jax.linalg.products import unfold as unfold
from kradagrad_jax.linalg.roots import cholesky_inverse as cholesky_inverse
from kradagrad_jax.linalg.roots import damped_inverse as damped_inverse
from kradagrad_jax.linalg.roots import left_power as left_power
from kradagrad_jax.linalg.roots import powered_spectrum as powered_spectrum
from kradagrad_jax.linalg.roots import svd_power as svd_power
from kradagrad_jax.linalg.roots import svd_root as svd_root
from kradagrad_jax.linalg.roots import symmetric_power as symmetric_power
from kradagrad_jax.linalg.tracking import refine_eigenbasis as refine_eigenbasis
