"""Layer inputs and output gradients of any JAX loss, without registration."""

from kradagrad_jax.curvature import losses as losses
from kradagrad_jax.curvature.accumulate import accumulate_curvature as accumulate_curvature
from kradagrad_jax.curvature.capture import inspect as inspect
from kradagrad_jax.curvature.capture import value_grad_and_curvature as value_grad_and_curvature
from kradagrad_jax.curvature.check import check as check
from kradagrad_jax.curvature.container import Curvature as Curvature
from kradagrad_jax.curvature.fisher import (
    model_value_grad_and_curvature as model_value_grad_and_curvature,
)
from kradagrad_jax.curvature.flax_nnx import (
    nnx_value_grad_and_curvature as nnx_value_grad_and_curvature,
)
from kradagrad_jax.curvature.layout import Layer as Layer
from kradagrad_jax.curvature.reducers import Reducer as Reducer
from kradagrad_jax.curvature.samples import Samples as Samples
from kradagrad_jax.curvature.samples import curvature_vectors as curvature_vectors
from kradagrad_jax.curvature.samples import sampled_gradients as sampled_gradients
from kradagrad_jax.curvature.spec import CaptureSpec as CaptureSpec
from kradagrad_jax.curvature.spec import LeafSpec as LeafSpec
from kradagrad_jax.curvature.train_state import train_state_class as train_state_class
