"""The command ``kradagrad-jax``: list, run, compare, benchmark."""

import sys

USAGE = """usage: kradagrad-jax COMMAND ...

  list                        tasks and optimizers
  run TASK OPTIMIZER [...]    train once; 'run --help' lists the options
  compare CONFIG.toml [...]   several optimizers, learning rates and seeds: table and plot;
                              'compare CONFIG.toml --help' lists what can be overridden
  benchmark CONFIG.toml [...] the same runs as a race: steps and seconds to the loss of the first
                              optimizer, as ratios; also as a page (--page FILE.md) and CSV
"""


def _needs_extra(error: ModuleNotFoundError) -> str:
    return (
        f"module '{error.name}' is missing; the command needs the extra 'experiments': "
        "pip install 'kradagrad-jax[experiments]'"
    )


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    try:
        return _dispatch(arguments[0], arguments[1:])
    except ModuleNotFoundError as error:
        message = _needs_extra(error)
    except ValueError as error:
        from kradagrad_jax.experiments.names import UsageError

        if not isinstance(error, UsageError):
            raise
        message = str(error)
    print(f"kradagrad-jax: {message}", file=sys.stderr)
    return 2


def _dispatch(command: str, rest: list[str]) -> int:
    from kradagrad_jax.experiments import commands
    from kradagrad_jax.experiments.names import lookup

    known = {
        "list": commands.list_names,
        "run": commands.run,
        "compare": commands.compare,
        "benchmark": commands.benchmark,
    }
    return lookup(known, command, "command")(rest)


if __name__ == "__main__":
    sys.exit(main())
