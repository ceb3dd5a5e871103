"""Interventions as tables of numbers, `v ← αv + β`, and the tables of many alternatives as few tensor operations."""

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitsae.interventions.changes import (
    Add,
    Contribution,
    Intervention,
    Mean,
    Operation,
    Patch,
    Replace,
    ReplaceToken,
    Resample,
    Scale,
    Set,
    Value,
    Zero,
)
from circuitsae.interventions.prompts import (
    EMBED,
    Library,
    Recording,
    error_place,
    mlp_place,
    site_place,
    write_place,
    z_hook,
)
from circuitsae.interventions.targets import MLP, Error, Feature, Features, Head, Places, Stream, Target, Token
from transcoders.errors import InputError
from transcoders.sites import Site, SiteKind

On = Literal["all", "prompt", "new"]


@dataclass(frozen=True)
class Window:
    """The absolute positions of one forward pass; with a KV cache, the new ones only."""

    start: int
    stop: int
    growing: bool = False
    """While generating: positions beyond the prompt are yet to come."""
    on: On = "all"
    """Where an intervention on every position acts: also on the prompt's own positions, on these only, on new ones."""


@dataclass(frozen=True)
class FeatureEdits:
    """`a ← scale·a + shift` of features; positions count from the window's start."""

    index: Int[Tensor, "n 3"]
    scale: Float[Tensor, "n"]
    shift: Float[Tensor, "n"]


@dataclass(frozen=True)
class VectorEdit:
    """`v ← scale·v + shift` at some positions of one place."""

    place: str
    pos: Int[Tensor, "k"]
    scale: float
    shift: Float[Tensor, "k _"]
    head: int = -1


@dataclass
class Edits:
    """All changes of one alternative, in their order."""

    features: list[FeatureEdits] = field(default_factory=list)
    vectors: list[VectorEdit] = field(default_factory=list)


def compile_edits(
    interventions: Iterable[Intervention | Contribution],
    prompt: Recording,
    library: Library,
    window: Window | None = None,
) -> Edits:
    """The tables of one alternative on one prompt. Raises `InputError` for what the model or the prompt has not."""
    compiler = _Compiler(prompt, library, window or Window(0, len(prompt)))
    for intervention in interventions:
        if isinstance(intervention, Contribution):
            compiler.contribution(intervention)
        else:
            compiler.intervention(intervention)
    return compiler.edits


class _Compiler:
    def __init__(self, prompt: Recording, library: Library, window: Window) -> None:
        self.prompt, self.library, self.window = prompt, library, window
        self.model = prompt.model
        self.like = prompt.trace.errors
        self.edits = Edits()

    # by target

    def intervention(self, it: Intervention) -> None:
        if isinstance(it.operation, ReplaceToken) and not isinstance(it.target, Token):
            raise InputError(f"{it}: only a token can be replaced by a token; take Token(at) for the target.")
        if isinstance(it.operation, Replace):
            self._replace(it.target, it.operation)
        elif isinstance(it.target, Feature | Features):
            self._features(it.target, it.operation)
        else:
            self._vector(it.target, it.operation)

    def contribution(self, added: Contribution) -> None:
        pos = torch.tensor([added.pos], device=self.like.device)
        for layer, vector in zip(added.layers, added.vectors.to(self.like), strict=True):
            place = EMBED if layer < 0 else write_place(self.model, layer)
            self.edits.vectors.append(VectorEdit(place, pos, 1.0, vector[None]))

    def _features(self, target: Feature | Features, operation: Operation) -> None:
        index, source_at = self._feature_index(target)
        if not len(index):
            return
        if isinstance(operation, Zero | Scale):
            scale, shift = (operation.factor if isinstance(operation, Scale) else 0.0), self.like.new_zeros(len(index))
        elif isinstance(operation, Set | Add):
            scale = float(isinstance(operation, Add))
            shift = self._numbers(operation.value, index, target)
        elif isinstance(operation, Mean):
            scale, shift = 0.0, operation.means.activations(self.prompt, index)
        else:
            source = self._source(operation)
            there = self._aligned(source_at, operation, source, index[:, 1].tolist())
            elsewhere = torch.stack([index[:, 0], torch.tensor(there, device=index.device), index[:, 2]], dim=1)
            scale, shift = 0.0, source.activations(elsewhere)
        self._add_features(index, scale, shift)

    def _replace(self, target: Target, operation: Replace) -> None:
        if not isinstance(target, Feature):
            raise InputError(f"{target}: only a feature can be replaced by a feature.")
        index, _ = self._feature_index(target)
        by = Feature(operation.by.layer, operation.by.index, tuple(index[:, 1].tolist()))
        if operation.by.at is not None and self.prompt.positions(operation.by.at) != index[:, 1].tolist():
            raise InputError(f"{operation.by}: it is put where the feature it replaces was; leave out its `at`.")
        if not len(index):
            return
        other, _ = self._feature_index(by)
        if operation.value is None:
            value = self.prompt.activations(index)
        else:
            value = self._numbers(operation.value, index, target)
        self._add_features(index, 0.0, torch.zeros_like(value))
        self._add_features(other, 0.0, value)

    def _vector(self, target: Error | Token | Head | MLP | Stream, operation: Operation) -> None:
        place, head = self._place(target)
        chosen = self._positions(target, self.model.first if isinstance(target, Error) else 0)
        if not chosen:
            return
        width = self._width(place)
        scale, shift = 0.0, self.like.new_zeros(len(chosen), width)
        if isinstance(operation, Scale):
            scale = operation.factor
        elif isinstance(operation, Set | Add):
            shift = self._vectors(operation.value, chosen, target)
            if head >= 0 and shift.shape[1] == self.model.model.d_model != width:
                self._head_output(target, operation, chosen, shift)
                return
            if shift.shape[1] != width:
                raise InputError(f"{target}: its value has {width} numbers at a position; got {shift.shape[1]}.")
            scale = float(isinstance(operation, Add))
        elif not isinstance(operation, Zero):
            shift = self._looked_up(target, operation, place, head, chosen)
        self._add_vector(place, chosen, scale, shift, head)

    def _head_output(self, target: Target, operation: Set | Add, chosen: list[int], shift: Tensor) -> None:
        """A vector of d_model numbers is a head's output after W_O: it enters where the attention's output does."""
        assert isinstance(target, Head)
        if isinstance(operation, Set):
            self._vector(target, Zero())
        self._add_vector(self.model.model.hook(Site(target.layer, "attn_out")), chosen, 1.0, shift)

    # values

    def _looked_up(self, target: Target, operation: Operation, place: str, head: int, chosen: list[int]) -> Tensor:
        """What stands at a place in another prompt, or on average."""
        assert not isinstance(target, Features)
        if isinstance(operation, Mean):
            found = operation.means.vector(self.prompt, place, chosen)
        else:
            source = self._source(operation)
            there = self._aligned(target.at, operation, source, chosen)
            value = source.vector(place)
            if max(there) >= len(value):
                raise InputError(f"Position {max(there)} is beyond the source prompt's {len(value)} tokens.")
            found = value[there]
        return found if head < 0 else found[:, head]

    def _source(self, operation: Operation) -> Recording:
        """The prompt whose values are taken."""
        if isinstance(operation, Patch):
            return self.library[operation.source]
        if isinstance(operation, ReplaceToken):
            token = operation.token
            token = self.model.model.token_id(token) if isinstance(token, str) else token
            return self.library[torch.full_like(self.prompt.trace.tokens, token)]
        assert isinstance(operation, Resample)
        own = self.prompt.trace.tokens
        others = [p for p in operation.prompts if not torch.equal(self.library.tokens(p), own)]
        if not others:
            raise InputError("Resample has no prompt but the one it changes; give others.")
        # A seed of text is hashed the same way in every process.
        return self.library[random.Random(f"{operation.seed}:{own.tolist()}").choice(others)]

    def _aligned(self, at: Places, operation: Operation, source: Recording, chosen: list[int]) -> list[int]:
        """The positions of the source that stand for the chosen ones."""
        if isinstance(operation, Patch) and operation.at is not None:
            at = operation.at
        elif not _names_roles(at):
            return chosen
        found = source.positions(at) or []
        if len(found) != len(chosen):
            raise InputError(f"{len(found)} positions of the source prompt ({at!r}) cannot stand for {len(chosen)}.")
        return found

    def _numbers(self, value: Value, index: Int[Tensor, "n 3"], target: Target) -> Float[Tensor, "n"]:
        """A feature's value: one number, or one for each position."""
        given = torch.as_tensor(value, dtype=self.like.dtype, device=self.like.device)
        if given.ndim > 1 or (given.ndim == 1 and len(given) != len(index)):
            raise InputError(
                f"{target}: a feature takes one number, or one for each of {len(index)} positions; "
                f"got shape {tuple(given.shape)}."
            )
        return given.expand(len(index)).clone()

    def _vectors(self, value: Value, chosen: list[int], target: Target) -> Float[Tensor, "k _"]:
        given = torch.as_tensor(value, dtype=self.like.dtype, device=self.like.device)
        if given.ndim not in (1, 2) or (given.ndim == 2 and len(given) != len(chosen)):
            raise InputError(
                f"{target}: its value is a vector, or one for each of {len(chosen)} positions; "
                f"got shape {tuple(given.shape)}."
            )
        return given.expand(len(chosen), given.shape[-1])

    # places

    def _place(self, target: Error | Token | Head | MLP | Stream) -> tuple[str, int]:
        if isinstance(target, Token):
            return EMBED, -1
        self._check_layer(target.layer)
        match target:
            case Error(layer):
                self._check_error(target)
                return error_place(layer), -1
            case MLP(layer):
                return mlp_place(self.model, layer), -1
            case Head(layer, head):
                if not 0 <= head < (n_heads := self.model.model.n_heads):
                    raise InputError(f"There is no head {head}; {self.model.model.name} has 0 to {n_heads - 1}.")
                return z_hook(layer), head
            case Stream(layer, kind):
                return self._stream(target, layer, kind), -1

    def _check_error(self, target: Error) -> None:
        if target.layer in self.model.passed:
            site = self.model.dictionaries.writes[target.layer]
            raise InputError(f"{target}: layer {target.layer} has no autoencoder; change {site} as a Stream instead.")

    def _stream(self, target: Stream, layer: int, kind: SiteKind) -> str:
        if kind == "attn_z":
            raise InputError(f"{target}: heads are changed one by one; take Head({layer}, HEAD).")
        if kind == "resid_mid":
            self.prompt.check_mid(layer)
        return site_place(self.model.model, target.site)

    def _check_layer(self, layer: int) -> None:
        if not 0 <= layer < self.model.model.n_layers:
            last = self.model.model.n_layers - 1
            raise InputError(f"There is no layer {layer}; {self.model.model.name} has layers 0 to {last}.")

    def _width(self, place: str) -> int:
        return self.prompt.vector(place).shape[-1]

    def _positions(self, target: Feature | Error | Token | Head | MLP | Stream, first: int) -> list[int]:
        """Absolute positions within the window."""
        here = range(self.window.start, self.window.stop)
        found = self.prompt.positions(target.at)
        if found is None:
            return [p for p in here if p >= first and self._acts_on(p)]
        if not self.window.growing and max(found, default=0) >= here.stop:
            raise InputError(f"{target}: position {max(found)} is beyond the prompt's {len(self.prompt)} tokens.")
        return [p for p in found if p in here]

    def _acts_on(self, pos: int) -> bool:
        is_new = pos >= len(self.prompt)
        return self.window.on == "all" or is_new == (self.window.on == "new")

    def _feature_index(self, target: Feature | Features) -> tuple[Int[Tensor, "n 3"], Places]:
        """Layer, absolute position and number of each feature."""
        device = self.like.device
        if isinstance(target, Features):
            index, at = target.index.to(device), None
            index = index[(index[:, 1] >= self.window.start) & (index[:, 1] < self.window.stop)]
        else:
            positions = self._positions(target, self.model.first)
            if self.prompt.positions(target.at) is None:
                positions = [pos for pos in positions if pos not in self.prompt.trace.massive]
            rows = [(target.layer, pos, target.index) for pos in positions]
            index, at = torch.tensor(rows, dtype=torch.long, device=device).reshape(-1, 3), target.at
        if not len(index):
            return index, at
        for layer in {target.layer} if isinstance(target, Feature) else set(index[:, 0].tolist()):
            self._check_layer(layer)
            n_features, last = self.model.dictionaries.n_features(layer), int(index[index[:, 0] == layer][:, 2].max())
            if not 0 <= last < n_features:
                there = f"0 to {n_features - 1}" if n_features else "none"
                raise InputError(f"There is no feature {layer}.{last}; layer {layer} has {there}.")
        if (pos := int(index[:, 1].min())) < (first := self.model.first):
            raise InputError(f"{target}: position {pos} has no features; choose positions from {first} on.")
        if massive := sorted(set(index[:, 1].tolist()) & set(self.prompt.trace.massive)):
            raise InputError(
                f"{target}: position {massive[0]} has no features, as its activations are outliers that were left out "
                "in the dictionaries' training; choose another position."
            )
        return index, at

    def _add_features(self, index: Int[Tensor, "n 3"], scale: float, shift: Float[Tensor, "n"]) -> None:
        local = index - torch.tensor([0, self.window.start, 0], device=index.device)
        self.edits.features.append(FeatureEdits(local, torch.full_like(shift, scale), shift.to(self.like)))

    def _add_vector(self, place: str, chosen: list[int], scale: float, shift: Tensor, head: int = -1) -> None:
        pos = torch.tensor(chosen, device=self.like.device) - self.window.start
        self.edits.vectors.append(VectorEdit(place, pos, scale, shift.to(self.like), head))


def _names_roles(at: Places) -> bool:
    return isinstance(at, str) or (isinstance(at, tuple) and any(isinstance(place, str) for place in at))


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


class Tables(NamedTuple):
    """All that the rows of a pass change: by layer its features, by place rounds of vectors."""

    features: dict[int, FeatureTable]
    vectors: dict[str, list[VectorTable]]

    @classmethod
    def of(cls, rows: Sequence[Edits]) -> "Tables":
        """Of each row's changes."""
        return cls(feature_tables(rows), vector_tables(rows))


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
