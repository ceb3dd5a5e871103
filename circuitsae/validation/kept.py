"""Measured effects on disk, until all are there: a validation that was ended goes on with those that are missing.

An effect is a function of the weights, of the prompt, of what is added where, of what is held meanwhile and of what is
read. A hash of these tells where it lies, so that another graph, or other settings, find nothing of it.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float

from circuitsae.interventions import Recording, Regime, RegimeName
from circuitsae.interventions.forward import regime_named
from circuitsae.interventions.writers import Shares, Writers
from circuitsae.replacement import ReplacementModel
from transcoders.dictionaries.fingerprint import dictionary_fingerprint
from transcoders.files import short_hash, write_file


class Kept:
    """Effects in a folder, one file for each list of alternatives in one regime."""

    def __init__(self, folder: Path, model: ReplacementModel) -> None:
        self.folder = folder
        self._model = f"{model.model.fingerprint()} {dictionary_fingerprint(model.dictionaries)} {model.model.dtype}"
        self._model += f" {model.model.device} {torch.get_num_threads()}"  # which round differently

    def of(
        self, prompt: Recording, writers: Writers, read: Sequence[torch.Tensor], memory: int | None
    ) -> Callable[[Sequence[tuple[Shares, RegimeName | Regime]]], str]:
        """The key of effects on what is `read`, by the lists of alternatives of some writers."""
        tensors = [prompt.trace.tokens, writers.vectors, *read]
        arrays = [tensor.detach().cpu().double().numpy() for tensor in tensors]
        common = short_hash([self._model, repr(memory), *_bytes([*arrays, writers.pos, writers.vector])])

        def key(asked: Sequence[tuple[Shares, RegimeName | Regime]]) -> str:
            said = repr([_said(regime_named(regime)) for _, regime in asked])
            return short_hash(
                [common, said, *_bytes([a for shares, _ in asked for a in (shares.which, shares.factor)])]
            )

        return key

    def get(self, key: str, shape: tuple[int, int]) -> Float[np.ndarray, "alternative target"] | None:
        """What is kept, if it is whole and of this shape."""
        try:
            found = np.load(self._place(key), allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        return found if found.shape == shape and found.dtype == np.float64 else None

    def put(self, key: str, effects: Float[np.ndarray, "alternative target"]) -> None:
        """Keep it, whole or not at all."""
        content = io.BytesIO()
        np.save(content, effects, allow_pickle=False)
        write_file(self._place(key), content.getvalue())

    def _place(self, key: str) -> Path:
        return self.folder / f"{key}.npy"


def _bytes(arrays: Sequence[np.ndarray]) -> Iterator[str | bytes]:
    for array in arrays:
        yield f"{array.shape} {array.dtype}"
        yield np.ascontiguousarray(array).tobytes()


def _said(regime: Regime) -> list[str]:
    """What is held and what is live, sets in an order that does not change from one process to the next."""
    return [
        f"{name}={sorted(map(repr, value)) if isinstance(value, frozenset) else value!r}"
        for name, value in vars(regime).items()
    ]
