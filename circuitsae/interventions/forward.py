"""One forward pass that carries many alternatives, each in a row of the batch, in one of several regimes."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuitsae.interventions.changes import Contribution, Intervention
from circuitsae.interventions.hooks import Edits, FeatureTable, Tables
from circuitsae.interventions.prompts import ERRORS, MIDDLE, Recording, error_place, write_place
from circuitsae.patterns import when_needed
from circuitsae.replacement import ReplacementModel
from transcoders.devices import free_memory
from transcoders.errors import DictionaryError, InputError
from transcoders.language_model import Hook, in_the_middle
from transcoders.sites import Site

RegimeName = Literal[
    "frozen", "linear", "graph", "direct", "frozen-replacement", "replacement", "frozen-attention", "model"
]
MLPs = Literal["constant", "linear", "features", "errors", "live"]
Held = Literal["frozen", "live"]


@dataclass(frozen=True, kw_only=True)
class Regime:
    """What is held at its clean value, and what is recomputed.

    Where autoencoders are spliced in, `mlps`, `first` and `until` say what is at their sites, and no MLP is held: with
    x what comes to a site, `live` is x itself, `constant` its clean value (every other site is held as well), and
    `features` is decode(encode(x)) plus the clean run's error. A change of a feature adds Δa·W_dec to it. Sites without
    an autoencoder are as they come.
    """

    mlps: MLPs = "live"
    """`constant`: clean outputs (a skip term stays live). `linear`: these, and the active features answer what they
    read with a slope of one; none switches. `features`: the dictionary's features, recomputed layer by layer, plus the
    clean run's errors; at positions without features the model's own MLPs. `errors`: the model's own MLPs, less what
    the active features would answer in `linear`; of transcoders alone. `live`: the model's own MLPs."""
    patterns: Held | frozenset[tuple[int, int]] = "live"
    """Attention patterns; or the heads (layer, head) whose patterns are live, all others held."""
    norms: Held | frozenset[str] = "live"
    """Norm scales, the final norm's included; or the ones (hooks) that are live, all others held."""
    first: Held = "live"
    """What is written at positions without features by the model's own MLPs, or by what features stand for; a graph
    holds it (a skip term stays live)."""
    until: int | None = None
    """With features: they stand in for the MLPs of layers below this one; from it on the model's own MLPs run."""

    def __post_init__(self) -> None:
        for name, kinds in (("mlps", MLPs), ("patterns", Held), ("norms", Held), ("first", Held)):
            value = getattr(self, name)
            if not isinstance(value, frozenset) and value not in get_args(kinds):
                raise InputError(f"{name}={value!r} is none of {', '.join(get_args(kinds))}.")
        if self.until is not None and (self.mlps != "features" or self.until < 0):
            raise InputError(
                f"until={self.until} is the layer at which the model's own MLPs take over from features; give a number "
                f"from 0 on, with mlps='features' (these are {self.mlps!r}), such as in the regime 'replacement'."
            )

    def mlp(self, layer: int) -> MLPs:
        """What stands in the place of one layer's MLP."""
        return "live" if self.until is not None and layer >= self.until else self.mlps

    def holds(self, name: str) -> bool:
        """Whether the pattern or scale at a hook is held, of patterns that of a head at least."""
        if name.endswith("hook_pattern"):
            return self.patterns != "live"
        return name not in self.norms if isinstance(self.norms, frozenset) else self.norms == "frozen"

    def live_heads(self, layer: int) -> list[int]:
        """The heads of a layer that are let go where others are held."""
        return sorted(head for at, head in self.patterns if at == layer) if isinstance(self.patterns, frozenset) else []


REGIMES: dict[RegimeName, Regime] = {
    "frozen": Regime(mlps="constant", patterns="frozen", norms="frozen"),
    "linear": Regime(mlps="linear", patterns="frozen", norms="frozen"),
    "graph": Regime(patterns="frozen", norms="frozen", first="frozen"),
    "direct": Regime(mlps="constant"),
    "frozen-replacement": Regime(mlps="features", patterns="frozen", norms="frozen"),
    "replacement": Regime(mlps="features"),
    "frozen-attention": Regime(patterns="frozen"),
    "model": Regime(),
}


def regime_named(regime: str | Regime, until: int | None = None) -> Regime:
    """The regime of a name, with `until` in it where one is given. Raises `InputError` for an unknown name."""
    if isinstance(regime, str):
        if regime not in REGIMES:
            raise InputError(f"Unknown regime {regime!r}; the regimes are {', '.join(REGIMES)}.")
        regime = REGIMES[regime]
    return regime if until is None else replace(regime, until=until)


MEMORY = 256 * 2**20
"""Bytes that one forward pass may take, roughly, on a CPU."""
MOST = 4 * 2**30
"""On a CUDA device: half of what is free, and no more than this, beyond which rows gain nothing by their number and
begin at an earlier block than they need to. An estimate, not measured."""
SCORES = 5
"""Arrays of the size of an attention pattern that are alive at once while one is computed (measured)."""
FINAL = "unembed.hook_in"
HELD_MLPS = ("constant", "linear")
"""Without anything of the model's own MLPs."""
ANSWERS = {"linear": 1, "errors": -1}
"""Whether what active features answer is added or taken away."""

Alternative = Sequence[Intervention | Contribution]


def pass_memory(device: torch.device, memory: int | None = None) -> int:
    """Bytes of one forward pass: what was asked for, or what suits the device."""
    return min(free_memory(device, 2 * MEMORY) // 2, MOST) if memory is None else memory


def rows_at_once(
    model: ReplacementModel, length: int, regime: Regime, memory: int | None, *, logits: bool = True, first: int = 0
) -> int:
    """How many rows a forward pass of about `memory` bytes can hold, to the logits or up to the unembedding.

    Of a pass at the positions from `first` on, those before have keys, values and what was read.
    """
    memory = pass_memory(model.model.device, memory)
    if memory < 1:
        raise InputError(f"memory={memory} bytes hold nothing; give more.")
    lm = model.model
    per_token = 2 * lm.d_vocab * logits + (12 + lm.n_layers) * lm.d_model + SCORES * lm.n_heads * length
    if regime.mlps == "features":
        widest = max(model.dictionaries.n_features(layer) for layer in range(lm.n_layers))
        per_token += 2 * widest + lm.n_layers * lm.d_model
    per_row = per_token * (length - first) + 3 * lm.n_layers * lm.d_model * first
    return max(1, memory // (per_row * lm.dtype.itemsize))


class Forward:
    """The hooks of one forward pass over rows of one length, at the positions from `first` on."""

    def __init__(
        self, model: ReplacementModel, prompts: Sequence[Recording], tables: Tables, regime: Regime, first: int = 0
    ) -> None:
        if model.spliced and regime.mlps == "errors":
            raise InputError("mlps='errors' is for transcoders; what lies between autoencoders is 'live'.")
        self.model, self.prompts, self.regime, self.first = model, prompts, regime, first
        self.features, self.vectors = tables
        self.declared: dict[int, Tensor] = {}
        """By layer, what was added on purpose where its dictionary writes."""
        self._written: dict[int, list[Tensor]] = defaultdict(list)
        self._sparse: dict[int, list[tuple[FeatureTable, int, Tensor]]] = defaultdict(list)
        self.read: dict[int, Tensor] = {}
        """By layer, what its dictionary reads: an autoencoder, before anything is changed at its site."""

    def hooks(self, peek: Mapping[str, Hook] | None = None) -> dict[str, Hook]:
        """One hook for each place where something is held, read or changed; those of `peek` come before all others."""
        steps: dict[str, list[Hook]] = defaultdict(list, {name: [hook] for name, hook in (peek or {}).items()})
        for name, clean in self.held().items():
            steps[name].append(self._hold(name, clean))
        layers, spliced = range(self.model.model.n_layers), self.model.spliced
        for layer in layers:
            if layer in spliced:
                steps[write_place(self.model, layer)].append(self._encode(layer))
            if layer not in self.model.passed:
                steps[write_place(self.model, layer)].append(self._write(layer))
        for place, rounds in self.vectors.items():
            if not place.startswith(ERRORS):
                steps[place] += [table.apply for table in rounds]
        for place in [place for place in steps if place.startswith(MIDDLE)]:
            self._change_middle(steps, layer_of(place), steps.pop(place))
        for layer in (layer for layer in layers if layer not in spliced):
            steps[self.model.read_hooks[layer]].append(self._encode(layer))
        return {name: _chain(several) for name, several in steps.items()}

    # what is held

    def held(self) -> dict[str, Callable[[], Tensor]]:
        """The clean patterns and norm scales that the regime holds, by hook, each when it is needed."""
        constants = self.prompts[0].trace.frozen.constants
        return {name: self._when_needed(name) for name in constants if self.regime.holds(name)}

    def _when_needed(self, name: str) -> Callable[[], Tensor]:
        value = {id(p.trace): when_needed(p.trace.frozen.constants, name) for p in self.prompts}
        return lambda: self.by_row(lambda p: value[id(p.trace)]()[0])

    def _hold(self, name: str, clean: Callable[[], Tensor]) -> Hook:
        """The hook that holds a pattern or scale, but for the heads that are let go."""
        live = self.regime.live_heads(layer_of(name)) if name.endswith("hook_pattern") else []
        return _constant_but(live, clean)

    @property
    def idle(self) -> list[int]:
        """The layers whose MLPs need not run: clean outputs stand in the place of theirs."""
        spliced = self.model.spliced
        return [layer for layer in range(self.model.model.n_layers) if layer not in spliced and self._idles(layer)]

    def _idles(self, layer: int) -> bool:
        return self.regime.mlp(layer) in HELD_MLPS

    def by_row(self, value: Callable[[Recording], Tensor]) -> Tensor:
        """A value `[…, pos, _]` of each row's prompt, stacked; not copied where all rows have one prompt."""
        trace = self.prompts[0].trace
        if all(p.trace is trace for p in self.prompts):
            found = value(self.prompts[0])[..., self.first :, :]
            return found[None].expand(len(self.prompts), *found.shape)
        return torch.stack([value(p)[..., self.first :, :] for p in self.prompts])

    # features

    def _encode(self, layer: int) -> Hook:
        """Where its dictionary reads: which of this layer's features change by how much, and what they write later."""
        dictionaries, mode = self.model.dictionaries, self.regime.mlp(layer)
        table = self.features.get(layer)

        def encode(read: Tensor) -> None:
            self.read[layer] = read
            active = None
            if mode in ANSWERS:
                self._answer(layer, read - self.by_row(lambda p: p.trace.frozen.reads.by_layer[layer]))
            if mode == "features":
                active = dictionaries.activations(layer, read)
                written = dictionaries.decode_layer(layer, active).unbind(-2)
                for at, out in zip(dictionaries.write_layers(layer), written, strict=True):
                    self._written[at].append(out)
            if table is not None:
                if active is not None:
                    value = active[table.row, table.pos, table.index]
                else:
                    value = self._values(layer, table, read, mode)
                for at in dictionaries.write_layers(layer):
                    self._sparse[at].append((table, layer, table.changed(value) - value))

        return encode

    def _answer(self, layer: int, moved: Float[Tensor, "row pos d_model"]) -> None:
        """What the active features of a layer write later for what they read beyond the clean run's."""
        dictionaries = self.model.dictionaries
        written = {at: torch.zeros_like(moved) for at in dictionaries.write_layers(layer)}
        for prompt, rows in self._by_prompt:
            pos, feature, none = prompt.active(self.first)[layer]
            if not len(pos):
                continue
            here = (slice(None), pos) if rows is None else (rows[:, None], pos)
            encoders = dictionaries.encoder_rows(layer, feature.flatten()).detach().unflatten(0, feature.shape)
            answer = torch.einsum("rpd,pmd->rpm", moved[here], encoders).masked_fill(none, 0)
            for at, out in written.items():
                decoders = dictionaries.decoder_rows(layer, feature.flatten(), at).detach()
                out[here] = torch.einsum("rpm,pmd->rpd", answer, decoders.unflatten(0, feature.shape))
        for at, out in written.items():
            self._written[at].append(out)

    @cached_property
    def _by_prompt(self) -> list[tuple[Recording, Int[Tensor, "n"] | None]]:
        """Each prompt with its rows; None of the only one's, which are all."""
        rows: dict[int, tuple[Recording, list[int]]] = {}
        for row, prompt in enumerate(self.prompts):
            rows.setdefault(id(prompt.trace), (prompt, []))[1].append(row)
        device, alone = self.prompts[0].trace.errors.device, len(rows) == 1
        return [(prompt, None if alone else torch.tensor(own, device=device)) for prompt, own in rows.values()]

    def _values(self, layer: int, table: FeatureTable, read: Tensor, mode: str) -> Float[Tensor, "n"]:
        """The activations that the changes start from: clean ones, or those of this run."""
        if mode == "live" and self._encodes_by_layer:
            tokens, which = torch.stack([table.row, table.pos], dim=1).unique(dim=0, return_inverse=True)
            active = self.model.dictionaries.activations(layer, read[tokens[:, 0], tokens[:, 1]])
            return active[which, table.index]
        value = torch.zeros_like(table.scale)
        for row in table.row.unique().tolist():
            here = table.row == row
            index = torch.stack([torch.full_like(table.pos, layer), table.pos, table.index], dim=1)
            value[here] = self.prompts[row].activations(index[here])
        return value

    @cached_property
    def _encodes_by_layer(self) -> bool:
        """False for TopK over layers, where no layer can be encoded alone; changes then start from the clean run."""
        try:
            self.model.dictionaries.activations(0, self.prompts[0].trace.errors[0, :1])
        except DictionaryError:
            return False
        return True

    # what the MLPs write

    def _write(self, layer: int) -> Hook:
        def write(mlp_out: Tensor) -> Tensor:
            base = self._stand_in(layer, mlp_out)
            out = self._add_features(layer, base)
            out = self._add_errors(layer, out)
            self.declared[layer] = out - base
            return out

        return write

    def _stand_in(self, layer: int, mlp_out: Tensor) -> Tensor:
        """What the regime puts in the place of the MLP's output, before anything is changed."""
        mode, dictionaries = self.regime.mlp(layer), self.model.dictionaries
        if mode == "live" and self.regime.first == "live":
            return mlp_out
        if mode == "live":
            return torch.where(self._exact, self._clean(layer), mlp_out)
        if mode == "errors":
            return mlp_out - sum(self._written[layer])
        if mode == "constant":
            return self._clean(layer)
        if mode == "linear":
            return self._clean(layer) + sum(self._written[layer])
        skip = dictionaries.skip(layer)
        out = dictionaries.decoder_bias(layer) + sum(self._written[layer])
        if skip is not None:
            out = out + self.read[layer] @ skip
        out = out + self.by_row(lambda p: p.trace.errors[layer])
        return torch.where(self._exact, mlp_out if self.regime.first == "live" else self._clean(layer), out)

    @property
    def _exact(self) -> Bool[Tensor, "row pos 1"]:
        """Positions without features."""
        return self.by_row(lambda p: p.trace.exact[:, None])

    def _clean(self, layer: int) -> Tensor:
        """The clean MLP output; a skip term is a path, and stays live."""
        out = self.by_row(lambda p: p.trace.frozen.writes.mlp_out[layer])
        if (skip := self.model.dictionaries.skip(layer)) is None:
            return out
        return out + (self.read[layer] - self.by_row(lambda p: p.trace.frozen.reads.by_layer[layer])) @ skip

    def _add_features(self, layer: int, out: Tensor) -> Tensor:
        for table, read_layer, change in self._sparse[layer]:
            rows = self.model.dictionaries.decoder_rows(read_layer, table.index, layer).detach()
            out = out.index_put((table.row, table.pos), rows * change[:, None], accumulate=True)
        return out

    def _add_errors(self, layer: int, out: Tensor) -> Tensor:
        if (place := error_place(layer)) not in self.vectors:
            return out
        clean = self.by_row(lambda p: p.trace.errors[layer])
        changed = clean
        for table in self.vectors[place]:
            changed = table.apply(changed)
        return out + changed - clean

    def _change_middle(self, steps: dict[str, list[Hook]], layer: int, changes: Sequence[Hook]) -> None:
        before, added = (self.model.model.hook(Site(layer, kind)) for kind in ("resid_pre", "attn_added"))
        note, change = in_the_middle(_chain(changes))
        steps[before].append(note)
        steps[added].append(change)


def layer_of(name: str, otherwise: int = -1) -> int:
    """The block that a hook belongs to; `otherwise` for one outside the blocks (the final norm)."""
    return int(name.split(".")[1]) if name.startswith(("blocks.", MIDDLE)) else otherwise


def first_block(edits: Edits) -> int:
    """The first block in which something changes, and 0 for what lies outside the blocks."""
    places = [edit.place.replace(ERRORS, MIDDLE) for edit in edits.vectors]
    layers = [layer for table in edits.features for layer in table.index[:, 0].tolist()]
    return min([*layers, *(layer_of(place, 0) for place in places)], default=0)


def _constant_but(live: Sequence[int], clean: Callable[[], Tensor]) -> Hook:
    """The clean value in the place of every head's but the live ones'."""
    return partial(_held_but, live, clean) if live else lambda _: clean()


def _held_but(live: Sequence[int], clean: Callable[[], Tensor], value: Tensor) -> Tensor:
    held = clean().clone()
    held[:, live] = value[:, live]
    return held


def _chain(steps: Sequence[Hook]) -> Hook:
    """Several hooks of one place, one after the other."""
    return partial(_in_turn, steps)


def _in_turn(steps: Sequence[Hook], value: Tensor) -> Tensor:
    for step in steps:
        changed = step(value)
        value = value if changed is None else changed
    return value
