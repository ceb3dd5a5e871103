"""`metrics.jsonl`: one line for each measurement, whole or not there."""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transcoders.files import write_error, write_file

logger = logging.getLogger(__name__)


class MetricsFile:
    """The metrics of a run, to be closed or used in a `with`.

    Lines of steps after `step`, which are about to be repeated, are cut off; so are blank lines, and what a full disk
    or a kill left of a line.
    """

    def __init__(self, path: Path, *, step: int) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
        steps = [_step(line) for line in lines]
        if broken := sum(found is None and bool(line.strip()) for line, found in zip(lines, steps, strict=True)):
            logger.warning("%s: dropped %d broken lines.", path, broken)
        kept = [line for line, found in zip(lines, steps, strict=True) if found is not None and found <= step]
        write_file(path, "".join(line + "\n" for line in kept))
        try:
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise write_error(path, error) from error

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Append a line; where the disk does not take all of it, none of it stays."""
        left, before = memoryview((json.dumps(metrics) + "\n").encode()), os.fstat(self._file.fileno()).st_size
        try:
            while left:
                left = left[self._file.write(left) or 0 :]
        except OSError as error:
            self._file.truncate(before)
            raise write_error(self.path, error) from error

    def __enter__(self) -> "MetricsFile":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()


def _step(line: str) -> int | None:
    """The step of a whole line, or None."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if isinstance(step, int) else None
