"""Jacobian agreement: how much of a small change dictionaries pass on, patterns, norm scales and active features held.

An attribution graph adds up paths through many replaced MLPs, so it is as true as the derivatives of the replacement.
"""

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from transcoders.data.outliers import massive_tokens
from transcoders.dictionaries import DictionarySet, fitted, present_layers
from transcoders.dictionaries.held import HeldFeatures, nonlinear
from transcoders.errors import DictionaryError, InputError, ModelError
from transcoders.evaluation.agreement_result import Agreement, LayerAgreement, Passed
from transcoders.evaluation.cost import MEMORY, NUDGES, DictionarySizes, jacobian_rows_at_once
from transcoders.held import SIZE, HeldModel
from transcoders.language_model import LanguageModel
from transcoders.sites import MLP_READS, MLP_WRITES

logger = logging.getLogger(__name__)

_REACHED = 1e-3
"""Share of the largest change of a layer in a row of text below which a token counts as not reached."""


def no_agreement(model: LanguageModel, dictionaries: DictionarySet) -> str | None:
    """Why there is no Jacobian agreement of these dictionaries in this model; None where it can be measured."""
    if dictionaries.kind == "sae":
        return "SAEs rebuild what they read and replace no MLP, so there is no MLP's derivative to compare theirs with."
    for layer, (read, write) in enumerate(zip(dictionaries.reads, dictionaries.writes, strict=True)):
        if read.kind not in MLP_READS or write.kind not in MLP_WRITES or not read.layer == write.layer == layer:
            return f"The dictionary of layer {layer} reads {read} and writes {write}, so it replaces no MLP."
    if model.dtype not in (torch.float32, torch.float64):
        return f"Derivatives are differences of nearly equal runs, which {model.dtype} rounds away; they need float32."
    return nonlinear(dictionaries)


def agreement_if_any(
    model: LanguageModel, dictionaries: DictionarySet, rows: Int[Tensor, "row pos"], **how: Any
) -> Agreement | None:
    """`jacobian_agreement`, or None, with a line of the log for transcoders that have none and models without."""
    if (reason := no_agreement(model, dictionaries)) is None:
        try:
            return jacobian_agreement(model, dictionaries, rows, **how)
        except ModelError as error:
            reason = str(error)
    if dictionaries.kind != "sae":
        logger.warning("Jacobian agreement is left out: %s", reason)
    return None


@torch.no_grad()
def jacobian_agreement(
    model: LanguageModel,
    dictionaries: DictionarySet,
    rows: Int[Tensor, "row pos"],
    *,
    nudges: int = NUDGES,
    seed: int = 0,
    memory: int = MEMORY,
    advance: Callable[[float], Any] = lambda share: None,
) -> Agreement:
    """How the dictionaries answer small changes `v` of what they read, against the MLPs' own derivatives.

    `cos(J_dictionary v, J_mlp v)` and `‖J_dictionary v‖ / ‖J_mlp v‖`, per layer, over tokens. In every row of text one
    token's embedding is nudged towards that of another token of the row (natural), and an active feature of a random
    layer and token is nudged by what it writes (feature); every token that such a change reaches counts. Random changes
    are Gaussian, at every token. `J_mlp v` is a central difference of two forward passes with all patterns and norm
    scales held; `J_dictionary` is linear with the active features held, and joint over layers where features write at
    several. Positions before the first with features and tokens over a limit of the training are left out, and so are
    tokens where `J_mlp v` is less than a thousandth of the largest in the row. Layers without a dictionary pass on
    nothing, as in a graph.

    `hops`: the same changes with the dictionaries' linear map in the place of every MLP, against the model's own, by
    the number of MLPs on the way. `nudges`: of each kind, for every row. `memory`: bytes to take, roughly; the outcome
    does not depend on it. `advance` is told the share of the whole that each row of text was.

    Raises `DictionaryError` where `no_agreement` names a reason, `InputError` for rows without anything to measure.
    """
    dictionaries = fitted(dictionaries, model)
    if (reason := no_agreement(model, dictionaries)) is not None:
        raise DictionaryError(reason)
    if nudges < 1 or not len(rows) or rows.shape[1] <= dictionaries.provenance.first:
        raise InputError(
            f"nudges={nudges} in {len(rows)} rows of {rows.shape[1]} tokens measure nothing; give at least one nudge "
            f"and a row of more than {dictionaries.provenance.first} tokens."
        )
    rows = rows.to(model.device)
    dice, sums = _Dice.of(rows, dictionaries, nudges, seed), _Sums(model.n_layers)
    at_once = jacobian_rows_at_once(model, DictionarySizes.of(dictionaries), rows.shape[1], memory)
    for some in torch.arange(len(rows)).split(at_once):
        group = _Group(model, dictionaries, rows[some.to(rows.device)], dice.take(some))
        for nudge in range(nudges):
            group.natural(nudge, sums)
            group.feature(nudge, sums)
        group.random(sums)
        advance(len(some) / len(rows))
    layers = tuple(sums.layer(layer) for layer in present_layers(dictionaries))
    return Agreement(tokens=rows.numel(), nudges=nudges, layers=layers, hops=sums.hops())


class _Dice(NamedTuple):
    """All that is chosen by chance, drawn for all rows before they are split into groups."""

    where: Float[Tensor, "kind nudge row pos"]
    """The allowed position with the largest is nudged: by an embedding, by a feature."""
    which: Float[Tensor, "kind nudge row pos"]
    """The token whose embedding is taken; of the first position, the feature."""
    layer: Int[Tensor, "nudge row"]
    """Of the features."""
    seeds: Int[Tensor, "row"]
    """Of the Gaussian directions of each row."""

    @classmethod
    def of(cls, rows: Int[Tensor, "row pos"], dictionaries: DictionarySet, nudges: int, seed: int) -> "_Dice":
        generator = torch.Generator().manual_seed(seed)
        where, which = torch.rand(2, 2, nudges, *rows.shape, generator=generator)
        starts = torch.tensor([i for i in range(dictionaries.n_layers - 1) if dictionaries.n_features(i)] or [-1])
        turns = torch.arange(nudges * len(rows)).reshape(nudges, len(rows)) % len(starts)
        layer = starts[torch.randperm(len(starts), generator=generator)][turns]
        return cls(where, which, layer, torch.randint(2**62, (len(rows),), generator=generator))

    def take(self, some: Int[Tensor, "k"]) -> "_Dice":
        return _Dice(self.where[:, :, some], self.which[:, :, some], self.layer[:, some], self.seeds[some])


class _Group:
    """Some rows of text."""

    def __init__(
        self, model: LanguageModel, dictionaries: DictionarySet, rows: Int[Tensor, "row pos"], dice: _Dice
    ) -> None:
        self.rows, self.dice, self.dictionaries = rows, dice, dictionaries
        self.size = SIZE if model.dtype == torch.float32 else SIZE**2
        self.held = HeldModel(model, rows, dictionaries.reads, dictionaries.writes)
        clean, places = self.held.clean, (*dictionaries.reads, *dictionaries.writes)
        at = dict(zip(places, (*clean.reads, *clean.writes), strict=True))
        self.usable = ~massive_tokens(model, rows, dictionaries.provenance.site_limits, at)
        self.usable[:, : dictionaries.provenance.first] = False
        self.features = HeldFeatures(dictionaries, self.held.clean.reads, self.usable)
        self.each = torch.arange(len(rows), device=rows.device)

    def natural(self, nudge: int, sums: "_Sums") -> None:
        """One token's embedding becomes a little like that of another token of its row."""
        pos = self._position(0, nudge, self.usable)
        other = self.rows != self.rows[self.each, pos][:, None]
        donor = _largest(self.dice.which[0, nudge].to(self.rows.device), other)
        embed, each = torch.zeros_like(self.held.embed), self.each
        embed[each, pos] = (self.held.embed[each, donor] - self.held.embed[each, pos]) * self.usable[each, pos, None]
        changes, reached = self.held.nudge(embed, size=self.size), self._from(pos)
        start = torch.full_like(pos, -1)
        sums.add("natural", self.features.joint(changes.reads), changes.writes, reached)
        carried = self.held.through(self.features.answers(), embed)
        sums.add("carried", carried, changes.reads, reached)
        sums.add_hops(carried, changes.reads, reached, start)

    def feature(self, nudge: int, sums: "_Sums") -> None:
        """One active feature of each row writes a little more."""
        layer = self.dice.layer[nudge].to(self.rows.device)
        if int(layer.max()) < 0:
            return
        pos, written = self._written(nudge, layer)
        later = torch.arange(len(written), device=layer.device)[:, None, None] > layer[:, None]
        changes, reached = self.held.nudge(written=written, size=self.size), self._from(pos) & later
        sums.add("feature", self.features.joint(changes.reads), changes.writes, reached)
        carried = self.held.through(self.features.answers(), written=written)
        sums.add_hops(carried, changes.reads, reached, layer)

    def random(self, sums: "_Sums") -> None:
        """Gaussian changes as large as what is read."""
        reads = self.held.clean.reads
        directions = torch.empty_like(reads)
        for row, seed in enumerate(self.dice.seeds.tolist()):
            generator = torch.Generator().manual_seed(seed)
            shape = (len(reads), *reads.shape[2:])
            directions[:, row] = torch.randn(shape, generator=generator, dtype=torch.float64).to(reads)
        directions *= reads.square().mean(-1, keepdim=True).sqrt()
        sums.add("random", self.features.joint(directions), self.held.respond(directions, size=self.size), self.usable)

    def _position(self, kind: int, nudge: int, allowed: Bool[Tensor, "row pos"]) -> Int[Tensor, "row"]:
        return _largest(self.dice.where[kind, nudge].to(allowed.device), allowed)

    def _from(self, pos: Int[Tensor, "row"]) -> Bool[Tensor, "row pos"]:
        """The tokens that a change at `pos` may reach."""
        return self.usable & (torch.arange(self.rows.shape[1], device=pos.device) >= pos[:, None])

    def _written(
        self, nudge: int, layer: Int[Tensor, "row"]
    ) -> tuple[Int[Tensor, "row"], Float[Tensor, "layer row pos d_model"]]:
        """Where an active feature of each row is, and what it writes; nothing where none is active."""
        active = [held.active.unflatten(0, self.rows.shape) for held in self.features.layers]
        rows = enumerate(layer.tolist())
        pos = self._position(1, nudge, torch.stack([active[at][row].any(-1) for row, at in rows]))
        written = torch.zeros_like(self.held.clean.writes)
        for row, (at, p) in enumerate(zip(layer.tolist(), pos.tolist(), strict=True)):
            here = self.features.layers[at].feature[active[at][row, p]]
            if not len(here):
                continue
            chosen = here[int(self.dice.which[1, nudge, row, 0] * len(here))][None]
            for to in self.dictionaries.write_layers(at):
                written[to, row, p] = self.dictionaries.decoder_rows(at, chosen, to)[0]
            # As large as what is written there: a derivative has no size, and rounding would swallow a faint change.
            written[:, row, p] *= self.held.clean.writes[at, row, p].norm() / written[:, row, p].norm()
        return pos, written


def _largest(values: Float[Tensor, "row pos"], allowed: Bool[Tensor, "row pos"]) -> Int[Tensor, "row"]:
    return values.where(allowed, -1.0).argmax(-1)


class _Sums:
    """Sums over tokens of cosines and ratios, and their number, by kind of change and layer, and by start and layer."""

    def __init__(self, n_layers: int) -> None:
        self._by_kind = {kind: _zeros(n_layers) for kind in ("natural", "feature", "random", "carried")}
        self._by_start = _zeros(n_layers, n_layers)

    def add(
        self,
        kind: str,
        ours: Float[Tensor, "layer row pos d_model"],
        model: Float[Tensor, "layer row pos d_model"],
        where: Bool[Tensor, "*layer row pos"],
    ) -> None:
        self._by_kind[kind] += _compared(ours, model, where).sum(-1)

    def add_hops(
        self,
        ours: Float[Tensor, "layer row pos d_model"],
        model: Float[Tensor, "layer row pos d_model"],
        where: Bool[Tensor, "*layer row pos"],
        start: Int[Tensor, "row"],
    ) -> None:
        """`start`: the layer that each row's change starts behind, −1 for the embeddings."""
        found = _compared(ours, model, where)
        for row, begin in enumerate(start.tolist()):
            self._by_start[:, begin + 1] += found[:, :, row]

    def layer(self, layer: int) -> LayerAgreement:
        return LayerAgreement(layer=layer, **{kind: _passed(of[:, layer]) for kind, of in self._by_kind.items()})

    def hops(self) -> tuple[Passed, ...]:
        """Each start counts the same, however many rows of text it had."""
        found = []
        for hops in range(self._by_start.shape[-1]):
            starts = [_passed(sums) for sums in self._by_start.diagonal(hops, 1, 2).unbind(-1)]
            seen = [passed for passed in starts if passed is not None]
            if not seen:
                break
            cosine, ratio = (sum(getattr(p, name) for p in seen) / len(seen) for name in ("cosine", "norm_ratio"))
            found.append(Passed(cosine=cosine, norm_ratio=ratio, rows=sum(p.rows for p in seen)))
        return tuple(found)


def _zeros(*shape: int) -> Float[Tensor, "3 *_"]:
    return torch.zeros(3, *shape, dtype=torch.float64)


def _passed(sums: Float[Tensor, "3"]) -> Passed | None:
    cosine, ratio, rows = sums.tolist()
    return Passed(cosine=cosine / rows, norm_ratio=ratio / rows, rows=int(rows)) if rows else None


def _compared(
    ours: Float[Tensor, "layer row pos d_model"],
    model: Float[Tensor, "layer row pos d_model"],
    where: Bool[Tensor, "*layer row pos"],
) -> Float[Tensor, "3 layer row"]:
    """Sums over the tokens that are reached: of cosines, of ratios of norms, and of ones."""
    size, of_ours = model.norm(dim=-1), ours.norm(dim=-1)
    reached = where & (size > _REACHED * size.where(where, 0.0).amax(-1, keepdim=True))
    tiny = torch.finfo(size.dtype).tiny
    cosine = (ours * model).sum(-1) / (size * of_ours).clamp(min=tiny)
    found = torch.stack([cosine, of_ours / size.clamp(min=tiny), torch.ones_like(size)]).double()
    return found.where(reached, 0.0).sum(-1).cpu()
