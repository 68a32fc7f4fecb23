"""One file per method family: the ``scale_by_*`` transformations."""

from kradagrad_jax.transforms.kfac import adapt_damping as adapt_damping
from kradagrad_jax.transforms.kfac import scale_by_kfac as scale_by_kfac
from kradagrad_jax.transforms.kradagrad import scale_by_kradagrad as scale_by_kradagrad
from kradagrad_jax.transforms.kradagrad import scale_by_kradagrad_star as scale_by_kradagrad_star
from kradagrad_jax.transforms.lowrank import scale_by_b_kfac as scale_by_b_kfac
from kradagrad_jax.transforms.lowrank import scale_by_bc_kfac as scale_by_bc_kfac
from kradagrad_jax.transforms.lowrank import scale_by_br_kfac as scale_by_br_kfac
from kradagrad_jax.transforms.lowrank import scale_by_brc_kfac as scale_by_brc_kfac
from kradagrad_jax.transforms.lowrank import scale_by_rs_kfac as scale_by_rs_kfac
from kradagrad_jax.transforms.lowrank import scale_by_sre_kfac as scale_by_sre_kfac
from kradagrad_jax.transforms.shampoo import scale_by_shampoo as scale_by_shampoo
