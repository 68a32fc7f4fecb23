"""Looking things up by name, with errors that say what to do instead."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


class UsageError(ValueError):
    """A mistake of the user; the command line prints it without a traceback."""


def suggestion(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'adamw'?"``, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""


def lookup(table: Mapping[str, T], name: str, what: str) -> T:
    """``table[name]``.

    Raises:
      UsageError: unknown name; lists the known ones and the closest.
    """
    if name in table:
        return table[name]
    raise UsageError(
        f"unknown {what} '{name}'{suggestion(name, table)} (known: {', '.join(sorted(table))})"
    )


def check_keys(given: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    """Raises UsageError for keys of ``given`` that are not in ``known``."""
    known = list(known)
    for key in given:
        if key not in known:
            raise UsageError(
                f"{where} has no option '{key}'{suggestion(key, known)} "
                f"(known: {', '.join(known) or 'none'})"
            )
