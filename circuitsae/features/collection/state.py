"""What a run of `collect` holds between chunks, and the file that a killed run goes on from."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from circuitsae.features.card_files import read_arrays, write_arrays
from circuitsae.features.collection.cofiring import cofiring
from circuitsae.features.collection.examples import (
    Chunk,
    StratifiedExamples,
    TopExamples,
    examples_arrays,
    restore_examples,
)
from circuitsae.features.collection.statistics import Statistics
from transcoders.errors import FileFormatError, InputError

STATE = "unfinished.npz"


class Collected:
    """All that is gathered of `n` features; its size depends on `n` alone."""

    def __init__(self, n: int, *, top: int, strata: int, per_stratum: int, window: int, seed: int) -> None:
        self.statistics = Statistics(n)
        self.top = TopExamples(n, top, window)
        self.strata = StratifiedExamples(n, strata, per_stratum, window, seed)
        self.together = cofiring(n, seed=seed)
        self.rows = 0
        """Rows of the corpus that are counted."""
        self.tokens = 0

    def update(self, chunk: Chunk, tokens: int) -> None:
        """Count a chunk that holds `tokens` tokens with features."""
        growth = self.statistics.update(chunk.firing)
        self.top.update(chunk)
        self.strata.update(chunk, self.statistics.max, growth)
        self.together.update(chunk.firing, self.rows * chunk.rows.shape[1], chunk.rows.size)
        self.rows += len(chunk.rows)
        self.tokens += tokens

    def save(self, folder: Path, identity: dict[str, Any]) -> None:
        """Write the state, whole or not at all; `identity` says what it is the state of."""
        text = np.frombuffer(json.dumps(identity, sort_keys=True).encode(), np.uint8)
        write_arrays(folder / STATE, {**self._arrays(), "identity": text}, compressed=False)

    def restore(self, folder: Path, identity: dict[str, Any]) -> None:
        """Go on from the state in a folder.

        Raises `InputError` where it is the state of another run, and `FileFormatError` where it is damaged.
        """
        arrays = read_arrays(folder / STATE)
        try:
            found = json.loads(arrays["identity"].tobytes())
            if found != json.loads(json.dumps(identity)):
                other = sorted(key for key in identity if found.get(key) != json.loads(json.dumps(identity[key])))
                raise InputError(
                    f"{folder / STATE} is of a run with another {', '.join(other) or 'version'}; finish that run with "
                    "its own settings, or start anew with resume=False (--no-resume)."
                )
            self.statistics.restore(arrays)
            restore_examples(self.top, self.strata, arrays)
            self.together.restore(arrays)
            self.rows, self.tokens = arrays["progress"].tolist()
        except InputError:
            raise
        except (KeyError, AttributeError, TypeError, ValueError) as error:
            raise FileFormatError(
                f"{folder / STATE} is no state of a run ({error}); start anew with resume=False (--no-resume)."
            ) from error

    def _arrays(self) -> dict[str, np.ndarray]:
        progress = {"progress": np.array([self.rows, self.tokens])}
        return self.statistics.arrays() | examples_arrays(self.top, self.strata) | self.together.arrays() | progress
