"""The edits of many alternatives as few tensor operations: one table per layer of features and per hook."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitsae.interventions.compiling import Edits, VectorEdit


@dataclass(frozen=True)
class FeatureTable:
    """One layer's features that change, each once: `a ← scale·a + shift`."""

    row: Int[Tensor, "n"]
    pos: Int[Tensor, "n"]
    index: Int[Tensor, "n"]
    scale: Float[Tensor, "n"]
    shift: Float[Tensor, "n"]

    def changed(self, value: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        return self.scale * value + self.shift


@dataclass(frozen=True)
class VectorTable:
    """One round of changes at a place: no (row, position, head) twice."""

    row: Int[Tensor, "n"]
    pos: Int[Tensor, "n"]
    head: Int[Tensor, "n"] | None
    scale: Float[Tensor, "n 1"]
    shift: Float[Tensor, "n _"]

    @property
    def at(self) -> tuple[Tensor, ...]:
        return (self.row, self.pos) if self.head is None else (self.row, self.pos, self.head)

    def apply(self, value: Tensor) -> Tensor:
        changed = value.clone()
        changed[self.at] = self.scale * value[self.at] + self.shift
        return changed


def feature_tables(rows: Sequence[Edits]) -> dict[int, FeatureTable]:
    """The tables of every layer in which a feature changes; several changes of one feature become one."""
    parts = [(row, edit) for row, edits in enumerate(rows) for edit in edits.features]
    if not parts:
        return {}
    row = torch.cat([torch.full_like(edit.index[:, 0], number) for number, edit in parts])
    layer_of, pos_of, index_of = torch.cat([edit.index for _, edit in parts]).unbind(1)
    where = torch.stack([layer_of, row, pos_of, index_of], dim=1)
    scale, shift = (torch.cat([getattr(edit, name) for _, edit in parts]) for name in ("scale", "shift"))
    unique, scale, shift = _compose(where, scale, shift)
    tables = {}
    for layer in unique[:, 0].unique().tolist():
        here = unique[:, 0] == layer
        _, row, pos, index = unique[here].unbind(1)
        tables[layer] = FeatureTable(row, pos, index, scale[here], shift[here])
    return tables


def _compose(where: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One affine map for each distinct row of `where`: the later of two is applied to the result of the earlier."""
    unique, group = where.unique(dim=0, return_inverse=True)
    if len(unique) == len(where):
        return where, scale, shift
    order = group.argsort(stable=True)
    starts = torch.zeros(len(unique), dtype=torch.long, device=where.device)
    starts[1:] = torch.bincount(group, minlength=len(unique)).cumsum(0)[:-1]
    turn = torch.empty_like(group)
    turn[order] = torch.arange(len(group), device=where.device) - starts[group[order]]
    total_scale, total_shift = torch.ones_like(scale[: len(unique)]), torch.zeros_like(shift[: len(unique)])
    for number in range(int(turn.max()) + 1):
        now = turn == number
        at = group[now]
        total_scale[at] = scale[now] * total_scale[at]
        total_shift[at] = scale[now] * total_shift[at] + shift[now]
    return unique, total_scale, total_shift


def vector_tables(rows: Sequence[Edits]) -> dict[str, list[VectorTable]]:
    """For every place, rounds in the order of each alternative's own changes."""
    rounds: dict[str, list[list[tuple[int, VectorEdit]]]] = defaultdict(list)
    for row, edits in enumerate(rows):
        seen: dict[str, int] = defaultdict(int)
        for edit in edits.vectors:
            number, seen[edit.place] = seen[edit.place], seen[edit.place] + 1
            if number == len(rounds[edit.place]):
                rounds[edit.place].append([])
            rounds[edit.place][number].append((row, edit))
    return {place: [_table(members) for members in turns] for place, turns in rounds.items()}


def _table(members: Sequence[tuple[int, VectorEdit]]) -> VectorTable:
    row = torch.cat([torch.full_like(edit.pos, number) for number, edit in members])
    shift = torch.cat([edit.shift for _, edit in members])
    scale = torch.cat([torch.full_like(edit.shift[:, :1], edit.scale) for _, edit in members])
    has_heads = members[0][1].head >= 0
    head = torch.cat([torch.full_like(edit.pos, edit.head) for _, edit in members]) if has_heads else None
    return VectorTable(row, torch.cat([edit.pos for _, edit in members]), head, scale, shift)
