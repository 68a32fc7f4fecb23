"""Second-order optimizers for JAX as optax gradient transformations."""

from kradagrad_jax.alias import b_kfac as b_kfac
from kradagrad_jax.alias import bc_kfac as bc_kfac
from kradagrad_jax.alias import br_kfac as br_kfac
from kradagrad_jax.alias import brc_kfac as brc_kfac
from kradagrad_jax.alias import ginger as ginger
from kradagrad_jax.alias import ikfac as ikfac
from kradagrad_jax.alias import ingd as ingd
from kradagrad_jax.alias import kfac as kfac
from kradagrad_jax.alias import kl_shampoo as kl_shampoo
from kradagrad_jax.alias import kl_soap as kl_soap
from kradagrad_jax.alias import kradagrad as kradagrad
from kradagrad_jax.alias import kradagrad_star as kradagrad_star
from kradagrad_jax.alias import rs_kfac as rs_kfac
from kradagrad_jax.alias import shampoo as shampoo
from kradagrad_jax.alias import singd as singd
from kradagrad_jax.alias import sirfshampoo as sirfshampoo
from kradagrad_jax.alias import soap as soap
from kradagrad_jax.alias import sre_kfac as sre_kfac
from kradagrad_jax.alias import tnt as tnt
from kradagrad_jax.engine import BlockState as BlockState
from kradagrad_jax.engine import Graft as Graft
from kradagrad_jax.engine import Layout as Layout
from kradagrad_jax.engine import Sharding as Sharding
from kradagrad_jax.engine import Timing as Timing
from kradagrad_jax.engine import describe as describe
from kradagrad_jax.engine import diagnostics as diagnostics
from kradagrad_jax.engine import fit_state as fit_state
from kradagrad_jax.engine import scale_by_blocks as scale_by_blocks
from kradagrad_jax.engine import scale_by_layers as scale_by_layers
from kradagrad_jax.engine import state_sharding as state_sharding
from kradagrad_jax.factors import KronFactor as KronFactor
from kradagrad_jax.factors import SquareRoot as SquareRoot
from kradagrad_jax.factors.lowrank_options import Online as Online
from kradagrad_jax.factors.lowrank_options import Sketch as Sketch
from kradagrad_jax.factors.method import BlockMethod as BlockMethod
from kradagrad_jax.factors.method import Grams as Grams
from kradagrad_jax.factors.method import Rows as Rows
from kradagrad_jax.factors.method import Step as Step
from kradagrad_jax.linalg.structures import Structure as Structure
from kradagrad_jax.linalg.structures import structure as structure
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

__version__ = "0.1.0"
