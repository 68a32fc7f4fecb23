"""One or two sentences on what a table shows, computed from it."""

import math

from kradagrad_jax.experiments.summary import Row, Table

_SAME = 0.05  # losses this close, relatively, count as equal


def _close(a: Row, b: Row) -> bool:
    return abs(a.loss - b.loss) <= _SAME * min(a.loss, b.loss)


def _listed(items: list[str]) -> str:
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def _precision(table: Table) -> str:
    """Which optimizers end at the same loss in float32 as in float64."""
    pairs: dict[str, dict[str, Row]] = {}
    for row in table.rows:
        if math.isfinite(row.loss):
            pairs.setdefault(row.series.optimizer, {})[row.series.dtype] = row
    same, other = [], []
    for pair in pairs.values():
        if len(pair) < 2:
            continue
        low, high = pair["float32"], pair["float64"]
        name = low.series.label.removesuffix(", float32")
        if _close(low, high):
            same.append(f"'{name}'")
        else:
            other.append(f"'{name}' ({low.loss:.3g} instead of {high.loss:.3g})")
    out = []
    if same:
        out.append(f"Float32 gets within {_SAME:.0%} of float64 with {_listed(same)}.")
    if other:
        out.append(f"{'It' if same else 'Float32'} does not with {_listed(other)}.")
    return " ".join(out)


def _time(row: Row, base: Row, target: float) -> str:
    """How ``row`` and ``base`` got to the target, which both reached."""
    assert row.seconds is not None and base.seconds is not None
    text = (
        f"{row.series.label} reaches {target:.4g} in {row.steps:.0f} updates instead of "
        f"{base.steps:.0f}, {'and' if row.seconds <= base.seconds else 'but'} in "
        f"{row.seconds:.2f} s instead of {base.seconds:.2f}"
    )
    if row.update_ms and base.update_ms:
        text += f": its update alone costs {row.update_ms:.2f} ms, not {base.update_ms:.2f}"
    return text


def _race(table: Table, ended: list[Row]) -> str:
    """Who got lowest, and who reached the baseline's loss in the fewest updates."""
    base, best = table.rows[0], min(ended, key=lambda row: row.loss)
    text = f"{best.series.label} ends lowest, at {best.loss:.4g}"
    if best is not base and math.isfinite(base.loss):
        text += f", where {base.series.label} ends at {base.loss:.4g}"
    if base.steps is None:
        return text + "."
    rivals = [(r.steps, r) for r in ended if r.steps is not None and r.steps < base.steps]
    if not rivals:
        return (
            f"{text}. Nothing gets to {table.target:.4g} in fewer updates than {base.series.label}."
        )
    quickest = min(rivals, key=lambda rival: rival[0])[1]
    return f"{text}. {_time(quickest, base, table.target)}."


def reading(table: Table) -> str:
    """How to read a table, in words.

    Empty where fewer than two rows have a finite loss.
    """
    ended = [row for row in table.rows if math.isfinite(row.loss)]
    if len(ended) < 2:
        return ""
    text = f"Lower loss is better. {_precision(table) or _race(table, ended)}"
    return f"{table.variant}: {text}" if table.variant else text
