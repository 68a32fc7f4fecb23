"""Block methods: init, accumulate, refresh and precondition of ONE block, without batch axes."""

from kradagrad_jax.factors.gram import SquareRoot as SquareRoot
from kradagrad_jax.factors.gram import array_method as array_method
from kradagrad_jax.factors.gram import gram_method as gram_method
from kradagrad_jax.factors.krad import krad_factored as krad_factored
from kradagrad_jax.factors.krad import krad_step as krad_step
from kradagrad_jax.factors.kradagrad import KradOptions as KradOptions
from kradagrad_jax.factors.kradagrad import alternating_method as alternating_method
from kradagrad_jax.factors.kradagrad import star_method as star_method
from kradagrad_jax.factors.kron import KronFactor as KronFactor
from kradagrad_jax.factors.method import BlockMethod as BlockMethod
from kradagrad_jax.factors.method import Step as Step
