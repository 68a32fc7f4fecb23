"""One file per method family: the ``scale_by_*`` transformations."""

from kradagrad_jax.transforms.ginger import scale_by_ginger as scale_by_ginger
from kradagrad_jax.transforms.kfac import adapt_damping as adapt_damping
from kradagrad_jax.transforms.kfac import scale_by_kfac as scale_by_kfac
from kradagrad_jax.transforms.kl_shampoo import scale_by_kl_shampoo as scale_by_kl_shampoo
from kradagrad_jax.transforms.kl_shampoo import scale_by_kl_soap as scale_by_kl_soap
from kradagrad_jax.transforms.kradagrad import scale_by_kradagrad as scale_by_kradagrad
from kradagrad_jax.transforms.kradagrad import scale_by_kradagrad_star as scale_by_kradagrad_star
from kradagrad_jax.transforms.lowrank import scale_by_b_kfac as scale_by_b_kfac
from kradagrad_jax.transforms.lowrank import scale_by_bc_kfac as scale_by_bc_kfac
from kradagrad_jax.transforms.lowrank import scale_by_br_kfac as scale_by_br_kfac
from kradagrad_jax.transforms.lowrank import scale_by_brc_kfac as scale_by_brc_kfac
from kradagrad_jax.transforms.lowrank import scale_by_rs_kfac as scale_by_rs_kfac
from kradagrad_jax.transforms.lowrank import scale_by_sre_kfac as scale_by_sre_kfac
from kradagrad_jax.transforms.rounding import (
    apply_updates_stochastically as apply_updates_stochastically,
)
from kradagrad_jax.transforms.shampoo import scale_by_shampoo as scale_by_shampoo
from kradagrad_jax.transforms.singd import scale_by_ikfac as scale_by_ikfac
from kradagrad_jax.transforms.singd import scale_by_ingd as scale_by_ingd
from kradagrad_jax.transforms.singd import scale_by_singd as scale_by_singd
from kradagrad_jax.transforms.sirfshampoo import scale_by_sirfshampoo as scale_by_sirfshampoo
from kradagrad_jax.transforms.soap import scale_by_soap as scale_by_soap
from kradagrad_jax.transforms.tnt import scale_by_tnt as scale_by_tnt
from kradagrad_jax.transforms.tnt_tools import tnt_rates as tnt_rates
from kradagrad_jax.transforms.tnt_tools import tnt_warm_start as tnt_warm_start
