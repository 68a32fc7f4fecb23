"""Tasks, training loop and command line for comparing optimizers.

Needs the extra ``experiments`` (``pip install 'kradagrad-jax[experiments]'``). Nothing in the rest
of the package imports this one.
"""
