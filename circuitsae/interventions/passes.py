"""Passes that begin where rows begin to differ from the clean run: at a block, and at a position.

Below the first block that a row changes the clean stream stands. Attention looks back only, so before the first
position that it changes the clean run's keys and values do, and nothing there is computed.
"""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitsae.interventions.forward import REGIMES, Forward
from circuitsae.interventions.hooks import Tables
from circuitsae.interventions.prompts import Recording
from circuitsae.interventions.writers import Changes
from transcoders.devices import line_of
from transcoders.language_model import LanguageModel

WORTH = 1024
"""Rows have passes of their own if these leave out this many tokens (`benchmarks/passes.py`)."""


def worth_launches(model: LanguageModel) -> int:
    """The same where rows of all regimes share passes, for a device that waits for launches: as many tokens as are
    worked on in a block while it waits, by the table of devices.
    """
    return round(line_of(model.device).launch_work / (12 * model.d_model**2))


def first_positions(pos: Int[np.ndarray, "row"], length: int, worth: int) -> Int[np.ndarray, "row"]:
    """From which position on each row is run, at most the first that it changes: few different ones.

    What is left of the prompt is halved from one to the next, and rows too few for passes of their own join those
    that begin before.
    """
    cuts = [0]
    while length - cuts[-1] > 1:
        cuts.append(length - (length - cuts[-1]) // 2)
    group = np.searchsorted(cuts, pos, side="right") - 1
    for number in range(len(cuts) - 1, 0, -1):
        rows = group == number
        if rows.sum() * (cuts[number] - cuts[number - 1]) < worth:
            group[rows] = number - 1
    return np.array(cuts)[group]


def by_first_position(prompt: Recording, changes: Changes, worth: int) -> Iterator[tuple[int, Int[np.ndarray, "k"]]]:
    """The rows that are run from each position on."""
    first = first_positions(np.asarray(changes.firsts), len(prompt), worth)
    for position in np.unique(first).tolist():
        if not goes_on(prompt, position):
            first[first == position] = 0
    for position in np.unique(first).tolist():
        yield position, np.flatnonzero(first == position)


def goes_on(prompt: Recording, first: int) -> bool:
    """Whether the model goes on from position `first` as it did in the clean run, found out once.

    It does not where it keeps no keys and values, or a window of them only.
    """
    if first and first not in prompt.past:
        try:
            clean = _is_clean(prompt, first)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, IndexError, AttributeError, TypeError):  # as models without a cache do
            clean = False
        if not clean:
            prompt.past[first] = None
    return not first or prompt.past[first] is not None


def _is_clean(prompt: Recording, first: int) -> bool:
    """Computes the keys and values before `first`, and runs the rest with nothing held, and with all that can be."""
    model, clean = prompt.model.model, prompt.trace.frozen.reads.final
    prompt.past[first] = model.new_cache()
    model.run_hooked(prompt.trace.tokens[None, :first], past=prompt.past[first])
    most = torch.finfo(clean.dtype).eps ** 0.5 * float(clean.abs().max())
    for regime in ("model", "frozen"):
        _, final = read_from(Forward(prompt.model, [prompt], Tables.of([]), REGIMES[regime], first), 0)
        if not float((final[0] - clean).abs().max()) <= most:
            return False
    return True


def read_from(
    forward: Forward, start: int
) -> tuple[Float[Tensor, "row layer pos d_model"], Float[Tensor, "row pos d_model"]]:
    """What is read, and what the unembedding reads, in a pass over rows of one prompt that begins at a block.

    Where the model cannot be run from there on, it begins at the first. What is not run is as in the clean run.
    """
    model, prompt, count, first = forward.model, forward.prompts[0], len(forward.prompts), forward.first
    start = start if start and start in prompt.streams else 0
    stream = prompt.streams[start][:, first:].expand(count, -1, -1) if start else None
    tokens = prompt.trace.tokens[first:].expand(count, -1)
    past = model.model.parts.repeated(prompt.past[first], count) if first else None
    with model.model.parts.silent_mlps(forward.idle):
        found, _ = model.model.run_to_unembedding(tokens, start=start, stream=stream, held=forward.hooks(), past=past)
    clean = prompt.trace.frozen.reads
    reads, final = (value.expand(count, *value.shape).clone() for value in (clean.by_layer, clean.final))
    final[:, first:] = found
    for layer, read in forward.read.items():
        reads[:, layer, first:] = read
    return reads, final
