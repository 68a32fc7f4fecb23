"""The lines under ``Examples:`` of all docstrings, one text per kind of statistics."""

from typing import NamedTuple


class Example(NamedTuple):
    """Lines of a docstring with ``{tx}`` in them, and what an optimizer in them has to be given."""

    text: str
    arguments: str = ""

    def of_transformation(self, name: str) -> str:
        """The lines for a ``scale_by_*`` transformation."""
        tx = f"optax.chain(kj.{name}({self.arguments}), optax.scale(-1e-2))"
        return self.text.format(tx=tx)

    def of_optimizer(self, name: str) -> str:
        """The lines for a complete optimizer."""
        given = ", ".join(x for x in ("1e-2", self.arguments, "weight_decay=1e-4") if x)
        return self.text.format(tx=f"kj.{name}({given})")


GRADIENTS = Example("""\
  >>> import jax, jax.numpy as jnp, optax
  >>> import kradagrad_jax as kj
  >>> params = {{"w": jnp.ones((4, 3)), "b": jnp.zeros(3)}}
  >>> tx = {tx}
  >>> state = tx.init(params)
  >>> grads = jax.grad(lambda p: jnp.sum((p["w"] + p["b"]) ** 2))(params)
  >>> updates, state = tx.update(grads, state, params)
  >>> params = optax.apply_updates(params, updates)""")
MEANS = GRADIENTS._replace(arguments="batch_size=4")
LAYERS = Example(
    """\
  >>> import jax, jax.numpy as jnp, optax
  >>> import kradagrad_jax as kj
  >>> from kradagrad_jax import curvature
  >>> params = {{"w": jnp.ones((4, 3)), "b": jnp.zeros(3)}}
  >>> x = jax.random.normal(jax.random.key(0), (8, 4))
  >>> loss = lambda p, x: jnp.mean((x @ p["w"] + p["b"]) ** 2)
  >>> spec = curvature.inspect(loss, params, x)
  >>> tx = {tx}
  >>> state = tx.init(params)
  >>> step = curvature.value_grad_and_curvature(loss, reducer="raw")
  >>> value, grads, curv = step(params, x)
  >>> updates, state = tx.update(grads, state, params, curvature=curv)
  >>> params = optax.apply_updates(params, updates)""",
    "spec",
)
SAMPLES = Example("""\
  >>> import jax, jax.numpy as jnp, optax
  >>> import kradagrad_jax as kj
  >>> from kradagrad_jax.curvature import losses, sampled_gradients
  >>> params, x, labels = {{"w": jnp.ones((4, 3))}}, jnp.ones((8, 4)), jnp.zeros(8, int)
  >>> step = sampled_gradients(lambda p, x: x @ p["w"], losses.softmax_cross_entropy())
  >>> tx = {tx}
  >>> state = tx.init(params)
  >>> (value, aux), grads, samples = step(params, x, labels, rng=jax.random.key(0))
  >>> updates, state = tx.update(grads, state, params, curvature=samples)
  >>> params = optax.apply_updates(params, updates)""")
