"""The engine: from a method that knows one block to an optax transformation of any model."""

from kradagrad_jax.engine.graft import Graft as Graft
from kradagrad_jax.engine.graft import as_graft as as_graft
from kradagrad_jax.engine.layers import scale_by_layers as scale_by_layers
from kradagrad_jax.engine.layout import Layout as Layout
from kradagrad_jax.engine.report import Coverage as Coverage
from kradagrad_jax.engine.report import block_factors as block_factors
from kradagrad_jax.engine.report import describe as describe
from kradagrad_jax.engine.report import diagnostics as diagnostics
from kradagrad_jax.engine.sharding import Sharding as Sharding
from kradagrad_jax.engine.state import BlockState as BlockState
from kradagrad_jax.engine.states import fit_state as fit_state
from kradagrad_jax.engine.states import state_sharding as state_sharding
from kradagrad_jax.engine.timing import Interval as Interval
from kradagrad_jax.engine.timing import Timing as Timing
from kradagrad_jax.engine.transform import scale_by_blocks as scale_by_blocks
