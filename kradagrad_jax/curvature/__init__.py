"""Layer inputs and output gradients of any JAX loss, without registration."""

from kradagrad_jax.curvature.container import Curvature as Curvature
from kradagrad_jax.curvature.layout import Layer as Layer
from kradagrad_jax.curvature.spec import CaptureSpec as CaptureSpec
from kradagrad_jax.curvature.spec import LeafSpec as LeafSpec
