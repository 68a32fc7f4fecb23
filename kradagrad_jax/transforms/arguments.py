"""Signature, documentation and checks of all transformations, from one description of each.

A transformation is written as a function of the values that were chosen; its arguments are the keys
of its recommended preset. The docstring describes those of its own, others are described here, and
:func:`transformation` makes the public function.
"""

import dataclasses
import difflib
import inspect
import re
import textwrap
from collections.abc import Callable
from typing import Any, NamedTuple

import optax

from kradagrad_jax.transforms.examples import GRADIENTS, Example
from kradagrad_jax.transforms.ranges import RANGES, Check, check

OFF = "none"  # what turns an argument off whose default is on
_SHARED = """
  spec: what :func:`kradagrad_jax.curvature.inspect` says of the model.
  beta1: decay of the bias-corrected average of gradients that is preconditioned in place of the
    gradient (as Adam's); 0 turns it off in effect, ``"none"`` also saves its memory.
  exponent: overrides the size of the exponents above, in which k counts the modes with a factor: a
    positive number; a tuple with one per mode (0: the mode has no factor, no state, no cost); a
    mapping from the number of modes to either; ``"one_sided"`` (1/2 on the shorter mode alone; also
    ``"longer"``, ``"input"``, ``"output"``).
  lr_cov: the factor step, below 1: a number or a schedule of the step (from 0).
  riemannian_momentum: decay of the momentum of the factors. A plain 0: no memory for it.
  approx: ``"expand"`` or ``"reduce"`` (arXiv 2311.00636) for weights used at several positions;
    statistics of ``reducer="kron_reduce"`` are of the second kind.
  joint_bias: treat a layer's bias as a row of its weight; False: leave it to the fallback.
  fisher: ``"model"``: sampled gradients; ``"empirical"``: the gradient itself in their place, which
    needs nothing else, and is biased towards it.
  fisher_scale: multiplies every statistic.
  rms_clip: largest root mean square of a layer's update (arXiv 2206.15397: 0.07); ``"none"``: no
    bound.
  graft: where the length of the step comes from: ``"none"`` (its own), ``"sgd"``, ``"adagrad"``,
    ``"rmsprop"``, ``"adam"``, or a :class:`Graft`.
  layout: how parameters are cut into blocks, see :class:`Layout`.
  refresh_every: steps between recomputations of what is made of the statistics: an int, a traced
    int, or a function of the count.
  statistics_every: steps between statistics, likewise; at other steps they are ignored.
  timing: start, ramp, phases, staggering, see :class:`Timing`.
  sharding: devices over which factors and work are divided, see :class:`Sharding`. None: none.
  fallback: for parameters without factors: ``"identity"``; a graft kind, whose direction is the
    step; or a GradientTransformation with positive sign. For methods of gradients alone also
    ``"diagonal"``: the direction of the graft, or of AdaGrad.
  factor_dtype: dtype of the factors. None: float32, or float64 for float64 parameters.
  mu_dtype: dtype of the average of gradients. None: as ``factor_dtype``.
"""
_TITLES = ("Args", "Returns", "Raises", "Examples", "References")
_RAISES = """\
  TypeError: an argument that does not exist.
  ValueError: an unknown preset or choice, a number outside of its range."""

Chosen = dict[str, Any]
Build = Callable[[Chosen], optax.GradientTransformationExtraArgs]
Public = Callable[..., optax.GradientTransformationExtraArgs]


class Declaration(NamedTuple):
    """What is known of the arguments of a transformation."""

    presets: dict[str, dict[str, Any]]  # values by name of the preset
    entries: dict[str, str]  # documentation of every argument, in order
    checks: dict[str, Check]  # what values must be, see :func:`check`
    off: tuple[str, ...]  # arguments for which :data:`OFF` stands for None
    positional: bool  # whether ``spec`` comes first and may be given by position
    sections: dict[str, str]  # of the docstring, without ``Args``
    example: Example  # for ``Examples``

    def signature(self) -> inspect.Signature:
        """All arguments; None stands for the value of the preset."""
        first = ["spec"] if self.positional else []
        rest = [name for name in self.entries if name not in [*first, "preset"]]
        parameter = inspect.Parameter
        keywords = [
            parameter(name, parameter.KEYWORD_ONLY, default=default)
            for name, default in [("preset", "recommended"), *((name, None) for name in rest)]
        ]
        spec = [parameter(name, parameter.POSITIONAL_OR_KEYWORD) for name in first]
        return inspect.Signature(
            spec + keywords, return_annotation=optax.GradientTransformationExtraArgs
        )

    def choose(self, options: dict[str, Any]) -> Chosen:
        """The preset's values, overridden by every option that is not None; all are checked.

        Options that neither names are None. ``given`` holds the names of those that were given.

        Raises:
          ValueError: unknown preset or choice, a number outside of its range.
        """
        preset = options.get("preset", "recommended")
        if preset not in self.presets:
            raise ValueError(f"preset must be one of {sorted(self.presets)}, got {preset!r}")
        given = {k: v for k, v in options.items() if v is not None and k != "preset"}
        chosen = dict.fromkeys(self.entries) | self.presets[preset] | given
        off = [n for n in self.off if isinstance(chosen[n], str) and chosen[n] == OFF]
        chosen |= dict.fromkeys(off)
        for name, must in self.checks.items():
            if chosen.get(name) is not None:
                check(name, chosen[name], must)
        return chosen | {"given": frozenset(given)}


def transformation(
    presets: dict[str, dict[str, Any]],
    *,
    layers: bool = False,
    like: Public | None = None,
    without: str = "",
    off: str = "",
    example: Example = GRADIENTS,
    **checks: Check,
) -> Callable[[Build], Public]:
    """Makes the public function of a transformation from a function of the chosen values.

    Args:
      presets: values of arguments, by name of the preset; ``"recommended"`` names all arguments.
      layers: ``spec`` comes first, is required, and may be given by position.
      like: a transformation whose docstring holds for this one as well, as far as it says nothing
        else.
      without: names in the preset that are no arguments.
      off: names of arguments that ``"none"`` turns off.
      example: of its use.
      **checks: what arguments must be, beside :data:`RANGES`.

    Returns:
      A decorator: the function that it returns has the arguments' names as signature, which
      ``optax.inject_hyperparams`` reads, a complete docstring, and its ``declaration``.

    Raises:
      ValueError: the docstring describes what is no argument.
    """

    def declare(build: Build) -> Public:
        head, sections = _sections(build.__doc__ or "")
        own = _entries(sections.pop("Args", ""))
        parent = None if like is None else declaration_of(like)
        texts = _COMMON | (parent.entries if parent else {}) | own
        positional = parent.positional if parent else layers
        names = [*["spec"] * positional, "preset", *presets["recommended"]]
        names = [name for name in names if name not in without.split()]
        first = [name for name in (parent.entries if parent else own) if name in names]
        # without docstrings (python -OO) the order is another one, and no more than that
        entries = {name: texts.get(name, "") for name in [*names[:positional], *first, *names]}
        if not own.keys() <= entries.keys():
            raise ValueError(f"{build.__name__} has no arguments {own.keys() - entries.keys()}")
        declaration = Declaration(
            presets,
            entries,
            {n: c for n, c in RANGES.items() if n in entries}
            | (parent.checks if parent else {})
            | checks,
            (*off.split(), *(parent.off if parent else ())),
            positional,
            (parent.sections if parent else {}) | sections,
            parent.example if parent else example,
        )
        return _public(build, head, declaration)

    return declare


def _public(build: Build, head: str, declaration: Declaration) -> Public:
    name, signature = build.__name__, declaration.signature()

    def scale_by(*args: Any, **options: Any) -> optax.GradientTransformationExtraArgs:
        return build(declaration.choose(bound(name, signature, args, options)))

    scale_by.__name__ = scale_by.__qualname__ = name
    scale_by.__module__ = build.__module__
    scale_by.__doc__ = _docstring(name, head, declaration, signature)
    scale_by.__signature__ = signature  # type: ignore[attr-defined]
    scale_by.declaration = declaration  # type: ignore[attr-defined]
    return scale_by


def declaration_of(scale_by: Public) -> Declaration:
    """That of a function which :func:`transformation` made."""
    return scale_by.declaration  # type: ignore[attr-defined]


def bound(
    name: str, signature: inspect.Signature, args: tuple[Any, ...], options: dict[str, Any]
) -> dict[str, Any]:
    """The arguments of a call by name.

    Raises:
      TypeError: they do not fit the signature; names the function and the nearest argument.
    """
    for option in options:
        if option not in signature.parameters:
            near = difflib.get_close_matches(option, signature.parameters, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {list(signature.parameters)}"
            raise TypeError(f"{name}() got an unexpected keyword argument {option!r}; {hint}")
    try:
        return signature.bind(*args, **options).arguments
    except TypeError as error:
        raise TypeError(f"{name}(): {error}") from None


def _sections(doc: str) -> tuple[str, dict[str, str]]:
    """What comes before the sections of a docstring, and these by title."""
    parts = re.split(rf"^({'|'.join(_TITLES)}):\n", inspect.cleandoc(doc), flags=re.MULTILINE)
    texts = [text.rstrip() for text in parts]
    return texts[0], dict(zip(texts[1::2], texts[2::2], strict=True))


def _entries(text: str) -> dict[str, str]:
    """Documentation of arguments by name."""
    parts = re.split(r"^  (\w+):(?= )", text, flags=re.MULTILINE)
    return {n: f"  {n}:{t.rstrip()}" for n, t in zip(parts[1::2], parts[2::2], strict=True)}


_COMMON = _entries(_SHARED)


def _docstring(name: str, head: str, d: Declaration, signature: inspect.Signature) -> str:
    arguments = [_argument(n, d.entries[n], d.presets) for n in signature.parameters]
    raises = "\n".join(x for x in (_RAISES, d.sections.get("Raises", "")) if x)
    sections = d.sections | {
        "Args": "\n".join(arguments),
        "Raises": raises,
        "Examples": d.example.of_transformation(name),
    }
    return "\n\n".join([head, *(f"{title}:\n{sections.get(title)}" for title in _TITLES)]) + "\n"


def _argument(name: str, text: str, presets: dict[str, dict[str, Any]]) -> str:
    """An argument's documentation, with the values that the presets give it."""
    if name == "preset":
        return f"{text}\n    Arguments that are given override the preset."
    shown = {preset: _shown(values[name]) for preset, values in presets.items() if name in values}
    usual = shown.get("recommended", "None")
    others = [f"{preset}: ``{x}``" for preset, x in shown.items() if x != usual]
    if usual == "None" and not others:
        return text
    said = "; ".join([f"Recommended: ``{usual}``", *others]) + "."
    lines = textwrap.wrap(said, 96, initial_indent=" " * 4, subsequent_indent=" " * 4)
    return "\n".join([text, *lines])


def _shown(value: Any) -> str:
    """A value as it is written; of a configuration object what is not its default."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        own = [
            f"{f.name}={getattr(value, f.name)!r}"
            for f in dataclasses.fields(value)
            if getattr(value, f.name) != f.default
        ]
        return f"{type(value).__name__}({', '.join(own)})"
    return value.__name__ if callable(value) else repr(value)
