"""One pass over rows of one prompt that are in several regimes, for devices that wait for every launch of a kernel.

A pass in one regime costs as many launches whatever its rows; claims about edges are made in a dozen regimes. Here what
a row's regime holds is put in its place by a mask over rows, one operation where a pass of one regime has one too. The
price is work for rows whose MLPs are held beside such whose are not, so these two kinds go in passes of their own, as
do rows that begin at other blocks. On a CPU, where work is what costs, each regime has its own passes (`run_reads`).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from circuitsae.interventions import passes
from circuitsae.interventions.forward import ANSWERS, HELD_MLPS, Forward, Regime, layer_of, rows_at_once
from circuitsae.interventions.hooks import Tables
from circuitsae.interventions.intervene import ReadChunk
from circuitsae.interventions.passes import by_first_position, read_from
from circuitsae.interventions.prompts import Recording
from circuitsae.interventions.writers import Shares
from circuitsae.replacement import ReplacementModel
from transcoders.errors import InputError
from transcoders.language_model import Hook


@torch.no_grad()
def run_mixed(
    model: ReplacementModel,
    prompt: Recording,
    shares: Shares,
    regimes: Sequence[Regime],
    *,
    memory: int | None = None,
) -> Iterator[ReadChunk]:
    """What is read under alternative i in `regimes[i]`, as many of them a pass as fit, those of all regimes together.

    Raises `InputError` for a regime in which features are recomputed, whose rows go in passes of their own.
    """
    if any(regime.mlps == "features" for regime in regimes):
        raise InputError("Rows with mlps='features' cannot be mixed with others; run them with run_reads.")
    number = {regime: i for i, regime in enumerate(dict.fromkeys(regimes))}
    kinds = np.array([number[regime] for regime in regimes], dtype=int)
    idle, starts = np.array([regime.mlps in HELD_MLPS for regime in regimes], dtype=bool), np.array(shares.starts)
    families = [
        (first, rows[family[rows]])
        for first, rows in by_first_position(prompt, shares, passes.worth_launches(model.model))
        for family in (idle, ~idle)
    ]
    for first, alike in families:
        order = alike[np.argsort(starts[alike], kind="stable")]
        size = rows_at_once(model, len(prompt), Regime(), memory, logits=False, first=first)
        for begin in range(0, len(order), size):
            rows = order[begin : begin + size]
            start = int(starts[rows].min())
            rows = rows[np.argsort(kinds[rows], kind="stable")]
            groups = _groups([regimes[row] for row in rows])
            forward = Mixed(model, prompt, shares.tables(rows.tolist(), first), groups, first)
            yield ReadChunk(rows.tolist(), *read_from(forward, start))


@dataclass(frozen=True)
class Group:
    """Rows next to each other, in one regime."""

    regime: Regime
    rows: slice


def _groups(regimes: Sequence[Regime]) -> list[Group]:
    ends = [row for row in range(1, len(regimes)) if regimes[row] != regimes[row - 1]]
    bounds = zip([0, *ends], [*ends, len(regimes)], strict=True)
    return [Group(regimes[first], slice(first, last)) for first, last in bounds]


class Mixed(Forward):
    """The hooks of one pass over rows of one prompt, in groups of one regime each; features are changed in none."""

    def __init__(
        self, model: ReplacementModel, prompt: Recording, tables: Tables, groups: Sequence[Group], first: int = 0
    ) -> None:
        super().__init__(model, [prompt] * groups[-1].rows.stop, tables, groups[0].regime, first)
        self.groups = groups
        self._masks: dict[tuple[object, ...], Tensor] = {}

    # what is held

    def held(self) -> dict[str, Callable[[], Tensor]]:
        constants = self.prompts[0].trace.frozen.constants
        names = [name for name in constants if any(group.regime.holds(name) for group in self.groups)]
        return {name: self._when_needed(name) for name in names}

    def _hold(self, name: str, clean: Callable[[], Tensor]) -> Hook:
        """One choice by row, and by head where some heads are let go."""
        heads = [()] * len(self.groups)
        if name.endswith("hook_pattern"):
            heads = [tuple(group.regime.live_heads(layer_of(name))) for group in self.groups]
        holds = [group.regime.holds(name) for group in self.groups]
        if all(holds) and not any(heads):
            return lambda _: clean()
        mask = self._mask(holds, heads, self.model.model.n_heads if any(heads) else 1)

        def hold(value: Tensor) -> Tensor:
            held = clean()
            return torch.where(mask.reshape(*mask.shape, *[1] * (held.ndim - 2)), held, value)

        return hold

    def _mask(self, holds: Sequence[bool], heads: Sequence[tuple[int, ...]], n_heads: int) -> Bool[Tensor, "row head"]:
        """By row and head whether it is held; put on the device once for all places that have the same."""
        key = (tuple(holds), tuple(heads), n_heads)
        if key not in self._masks:
            mask = np.zeros((len(self.prompts), n_heads), dtype=bool)
            for group, held, live in zip(self.groups, holds, heads, strict=True):
                mask[group.rows] = held
                mask[group.rows, list(live)] = False
            self._masks[key] = torch.from_numpy(mask).to(self.prompts[0].trace.errors.device)
        return self._masks[key]

    def _idles(self, layer: int) -> bool:
        return all(group.regime.mlp(layer) in HELD_MLPS for group in self.groups)

    # what the MLPs read and write

    def _encode(self, layer: int) -> Hook:
        answering = [group.rows for group in self.groups if group.regime.mlp(layer) in ANSWERS]

        def encode(read: Tensor) -> None:
            self.read[layer] = read
            for rows in answering:
                self._answer(layer, read[rows] - self.prompts[0].trace.frozen.reads.by_layer[layer, self.first :])

        return encode

    def _stand_in(self, layer: int, mlp_out: Tensor) -> Tensor:
        modes = [group.regime.mlp(layer) for group in self.groups]
        held = [mode in HELD_MLPS for mode in modes]
        first = [not kept and group.regime.first != "live" for group, kept in zip(self.groups, held, strict=True)]
        answering = [(group.rows, mode) for group, mode in zip(self.groups, modes, strict=True) if mode in ANSWERS]
        if not any(held) and not any(first) and not answering:
            return mlp_out
        out = self._clean(layer)
        if not all(held):
            mask = self._mask(held, [()] * len(held), 1)[..., None]
            if any(first):
                mask = mask | (self._mask(first, [()] * len(first), 1)[..., None] & self._exact)
            out = torch.where(mask, out, mlp_out)
        if not answering:
            return out
        out = out.clone(memory_format=torch.contiguous_format)
        for number, (rows, mode) in enumerate(answering):
            for written in self._written[layer][number :: len(answering)]:
                out[rows] += ANSWERS[mode] * written
        return out
