"""One file per method family: the ``scale_by_*`` transformations."""

from kradagrad_jax.transforms.kradagrad import scale_by_kradagrad as scale_by_kradagrad
from kradagrad_jax.transforms.kradagrad import scale_by_kradagrad_star as scale_by_kradagrad_star
from kradagrad_jax.transforms.shampoo import scale_by_shampoo as scale_by_shampoo
