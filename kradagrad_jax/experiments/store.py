"""What a comparison leaves on disk: a log that grows by lines, and results written at the end."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kradagrad_jax.experiments.names import UsageError

LOG, RESULTS, PLOT = "log.jsonl", "results.json", "plot.png"


def jsonable(value: Any) -> Any:
    """Non-finite numbers become None: JSON has none."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    return value


class Store:
    """The folder of a comparison.

    Args:
      folder: made where absent.
      resume: keep what the log holds.
      overwrite: throw it away.

    Raises:
      UsageError: the log has finished runs and neither is said.
    """

    def __init__(self, folder: Path, *, resume: bool, overwrite: bool):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._log = folder / LOG
        finished = sum(1 for _ in self.events("run"))
        if overwrite or not finished:
            if not resume:
                self._log.unlink(missing_ok=True)
        elif not resume:
            raise UsageError(
                f"{folder} holds {finished} finished runs: --resume goes on from them, "
                "--overwrite starts anew, --output FOLDER goes elsewhere"
            )
        self._end_last_line()

    def _end_last_line(self) -> None:
        """A line that a crash cut short must not swallow the next one."""
        if self._log.is_file() and not self._log.read_bytes().endswith(b"\n"):
            with self._log.open("a", encoding="utf-8") as file:
                file.write("\n")

    def log(self, event: str, **fields: Any) -> None:
        """Appends a line; it is on disk when this returns."""
        line = json.dumps({"event": event} | jsonable(fields), allow_nan=False)
        with self._log.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def events(self, event: str) -> Iterator[dict[str, Any]]:
        """The logged lines of one kind; lines that were cut short are passed over."""
        if not self._log.is_file():
            return
        for line in self._log.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            if entry.get("event") == event:
                yield entry

    def write_results(self, results: dict[str, Any]) -> Path:
        """Replaces the results file in one go."""
        path, new = self.folder / RESULTS, self.folder / (RESULTS + ".new")
        new.write_text(json.dumps(jsonable(results), indent=1, allow_nan=False) + "\n", "utf-8")
        new.replace(path)
        return path
