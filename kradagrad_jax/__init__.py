"""Second-order optimizers for JAX as optax gradient transformations."""

from kradagrad_jax.alias import b_kfac as b_kfac
from kradagrad_jax.alias import bc_kfac as bc_kfac
from kradagrad_jax.alias import br_kfac as br_kfac
from kradagrad_jax.alias import brc_kfac as brc_kfac
from kradagrad_jax.alias import kfac as kfac
from kradagrad_jax.alias import kradagrad as kradagrad
from kradagrad_jax.alias import kradagrad_star as kradagrad_star
from kradagrad_jax.alias import rs_kfac as rs_kfac
from kradagrad_jax.alias import shampoo as shampoo
from kradagrad_jax.alias import sre_kfac as sre_kfac
from kradagrad_jax.engine import BlockState as BlockState
from kradagrad_jax.engine import Graft as Graft
from kradagrad_jax.engine import Layout as Layout
from kradagrad_jax.engine import Timing as Timing
from kradagrad_jax.engine import describe as describe
from kradagrad_jax.engine import scale_by_blocks as scale_by_blocks
from kradagrad_jax.engine import scale_by_layers as scale_by_layers
from kradagrad_jax.factors import KronFactor as KronFactor
from kradagrad_jax.factors import SquareRoot as SquareRoot
from kradagrad_jax.factors.lowrank_options import Online as Online
from kradagrad_jax.factors.lowrank_options import Sketch as Sketch
from kradagrad_jax.factors.method import BlockMethod as BlockMethod
from kradagrad_jax.factors.method import Grams as Grams
from kradagrad_jax.factors.method import Rows as Rows
from kradagrad_jax.factors.method import Step as Step
from kradagrad_jax.transforms import adapt_damping as adapt_damping
from kradagrad_jax.transforms import scale_by_b_kfac as scale_by_b_kfac
from kradagrad_jax.transforms import scale_by_bc_kfac as scale_by_bc_kfac
from kradagrad_jax.transforms import scale_by_br_kfac as scale_by_br_kfac
from kradagrad_jax.transforms import scale_by_brc_kfac as scale_by_brc_kfac
from kradagrad_jax.transforms import scale_by_kfac as scale_by_kfac
from kradagrad_jax.transforms import scale_by_kradagrad as scale_by_kradagrad
from kradagrad_jax.transforms import scale_by_kradagrad_star as scale_by_kradagrad_star
from kradagrad_jax.transforms import scale_by_rs_kfac as scale_by_rs_kfac
from kradagrad_jax.transforms import scale_by_shampoo as scale_by_shampoo
from kradagrad_jax.transforms import scale_by_sre_kfac as scale_by_sre_kfac

__version__ = "0.1.0"
