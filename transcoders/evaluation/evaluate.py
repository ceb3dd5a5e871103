"""Evaluation of dictionaries on rows of held-out tokens, within a budget of memory.

Two passes over the rows: one for the statistics, whose means the second one needs, in which the model runs with layers
replaced. A layer that is replaced alone changes nothing before it, so the model goes on from its block.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from rich.progress import Progress, TaskID
from torch import Tensor

from transcoders.data.outliers import activations_and_massive, massive_tokens
from transcoders.dictionaries import DictionarySet, fitted, present_layers
from transcoders.errors import InputError
from transcoders.evaluation.agreement import agreement_if_any
from transcoders.evaluation.comparing import Original, Sums, next_tokens
from transcoders.evaluation.cost import (
    JACOBIAN_TOKENS,
    MEMORY,
    NUDGES,
    VARIANTS,
    DictionarySizes,
    jacobian_passes,
    positions_at_once,
    rows_at_once,
)
from transcoders.evaluation.result import Evaluation, LayerEvaluation, ReplacedModel, with_agreement
from transcoders.evaluation.splice import Splice, in_the_place, sequential
from transcoders.evaluation.statistics import Statistics, alignment, reconstruct
from transcoders.language_model import Hook, LanguageModel
from transcoders.progress import progress_bar
from transcoders.sites import Site
from transcoders.starting import streams_before

By = Literal["spliced", "zero", "mean"]


class _Key(NamedTuple):
    """Which layer is replaced (None: all of them), and by what."""

    layer: int | None
    by: By


class _Group(NamedTuple):
    """The original on some rows."""

    final: Float[Tensor, "row pos _"]
    """What the unembedding reads."""
    streams: Mapping[int, Float[Tensor, "row pos d_model"]]
    """The residual stream before each block that a run can begin at."""
    rebuilt: Mapping[int, Float[Tensor, "row pos d_model"]]
    """Each layer's reconstruction."""


@torch.no_grad()
def evaluate(
    model: LanguageModel,
    dictionaries: DictionarySet,
    rows: Int[Tensor, "row pos"],
    *,
    loss_tokens: int | None = None,
    jacobian_tokens: int = JACOBIAN_TOKENS,
    memory: int = MEMORY,
    progress: bool = False,
) -> Evaluation:
    """Sparsity and reconstruction of every layer, and what the model loses when its writes are replaced.

    `rows`: tokens the dictionaries were not trained on. The first position of every row is left out of all figures;
    positions before the first with features keep the model's own writes, and are left out of L0 and FVU; so do tokens
    that exceed a limit of the training, with which FVU is given beside. Losses are measured with each layer replaced
    alone, and with all of them. Layers without a dictionary are left out.

    `loss_tokens`: how many of the tokens losses, agreement and KL are measured on, in rows spread evenly over all;
    None for all of them. `jacobian_tokens`: the same of Jacobian agreement (`jacobian_agreement`), 0 for none; SAEs
    have none. `memory`: bytes to take beside model and dictionaries, though never less than one row needs;
    `evaluation_cost` says what will be taken. `progress`: show a bar, or lines where there is no terminal.

    Loss recovered is `(L_ablated − L_spliced) / (L_ablated − L)` with zeros or the mean write as ablation; agreement
    compares `argmax` of the next-token distributions p (original) and q (replaced), and KL is `Σ p log(p / q)`.

    Raises `InputError` for rows that have nothing to measure, `DictionaryError` for dictionaries of another model.

    Source: Bricken et al. 2023, *Towards Monosemanticity* (loss recovered); Karvonen et al. 2025, *SAEBench*.
    """
    dictionaries = fitted(dictionaries, model)
    layers, least = present_layers(dictionaries), max(3, dictionaries.provenance.first + 1)
    if not layers:
        raise InputError("No layer has a dictionary, so there is nothing to measure; give at least one.")
    if rows.shape[1] < least:
        raise InputError(f"Rows of {rows.shape[1]} tokens have nothing to measure; give at least {least} tokens a row.")
    if jacobian_tokens < 0:
        raise InputError(
            f"jacobian_tokens={jacobian_tokens} is no number of tokens; give 0 to leave them out, or more."
        )
    rows = rows.to(model.device)
    some = _spread(rows, loss_tokens)
    at_once = rows_at_once(model, DictionarySizes.of(dictionaries), rows.shape[1], memory)
    steps = len(rows.split(at_once)) + len(some.split(at_once)) * 2 * VARIANTS * (len(layers) + 1)
    nudged = None if dictionaries.kind == "sae" or not jacobian_tokens else _spread(rows, jacobian_tokens)
    nudging = 0 if nudged is None else jacobian_passes(NUDGES) * len(nudged.split(at_once))
    with progress_bar(shown=progress) as bar:
        task = bar.add_task("evaluating", total=steps + nudging)
        statistics = _statistics(model, dictionaries, rows.split(at_once), (bar, task))
        losses = _Losses(model, dictionaries, statistics.mean.to(model.device, model.dtype), some[:1])
        for group in some.split(at_once):
            losses.update(group, positions_at_once(model, memory), (bar, task))
        agreement = None
        if nudged is not None:
            agreement = agreement_if_any(
                model, dictionaries, nudged, memory=memory, advance=lambda share: bar.advance(task, share * nudging)
            )
    evaluated = tuple(_layer(layer, statistics, losses, dictionaries) for layer in layers)
    features = "replaced" if sequential(dictionaries) else "original"
    replaced = ReplacedModel(features=features, loss=losses.loss(_Key(None, "spliced")), **losses.figures(None))
    return Evaluation(
        tokens=statistics.tokens, massive=statistics.massive, loss_tokens=losses.tokens, loss=losses.original,
        layers=with_agreement(evaluated, agreement), replaced=replaced, agreement=agreement,
    )  # fmt: skip


def _spread(rows: Int[Tensor, "row pos"], tokens: int | None) -> Int[Tensor, "_ pos"]:
    """About as many tokens, in whole rows evenly spread over all."""
    if tokens is None:
        return rows
    if tokens < 1:
        raise InputError(f"loss_tokens={tokens} leaves nothing to measure; give at least 1, or None for all tokens.")
    count = min(len(rows), -(-tokens // rows.shape[1]))
    return rows[torch.arange(count, device=rows.device) * len(rows) // count]


def _statistics(
    model: LanguageModel,
    dictionaries: DictionarySet,
    groups: Sequence[Int[Tensor, "_ pos"]],
    bar: tuple[Progress, TaskID],
) -> Statistics:
    statistics, first = Statistics(dictionaries), dictionaries.provenance.first
    for group in groups:
        sides, limits = (dictionaries.reads, dictionaries.writes), dictionaries.provenance.site_limits
        at, massive = activations_and_massive(model, group, {*sides[0], *sides[1]}, limits)
        reads, writes = ([at[site][:, first:].flatten(0, 1) for site in side] for side in sides)
        statistics.update_by_layer(reads, writes, massive[:, first:].flatten())
        bar[0].advance(bar[1])
    return statistics


class _Losses:
    """What the model loses, summed over groups of rows."""

    def __init__(
        self,
        model: LanguageModel,
        dictionaries: DictionarySet,
        means: Float[Tensor, "layer d_model"],
        row: Int[Tensor, "1 pos"],
    ) -> None:
        """`row`: to see whether the model can be run from a block on."""
        self.model, self.dictionaries, self.means = model, dictionaries, means
        self.layers = present_layers(dictionaries)
        self.starts = list(streams_before(model, {dictionaries.writes[layer].layer for layer in self.layers}, row))
        self.sums: dict[_Key | None, Sums] = defaultdict(Sums)
        self.tokens = self.predicted = 0

    def update(self, rows: Int[Tensor, "row pos"], at_once: int, bar: tuple[Progress, TaskID]) -> None:
        """Run the model on `rows` with everything that is to be replaced, and compare `at_once` positions a time."""
        group = self._original(rows)
        finals: dict[_Key, Tensor] = {}
        massive = massive_tokens(self.model, rows, self.dictionaries.provenance.site_limits)
        for key, edits in self._replacements(group.rebuilt, massive):
            start = max((k for k in group.streams if k <= min(site.layer for site in edits)), default=0)
            final, _ = self.model.run_to_unembedding(rows, edits=edits, start=start, stream=group.streams.get(start))
            finals[key] = _compared(final)
            bar[0].advance(bar[1])
        original, targets = _compared(group.final), next_tokens(rows)[:, 1:].flatten()
        del group
        for chosen in torch.arange(len(targets), device=targets.device).split(at_once):
            self._compare(original[chosen], targets[chosen], {key: final[chosen] for key, final in finals.items()})
            bar[0].advance(bar[1], len(finals) * len(chosen) / len(targets))
        self.tokens += len(targets)
        self.predicted += rows.shape[0] * (rows.shape[1] - 2)

    def _original(self, rows: Int[Tensor, "row pos"]) -> _Group:
        before = {start: Site(start - 1, "resid_post") for start in self.starts}
        final, at = self.model.run_to_unembedding(rows, {*self.dictionaries.reads, *before.values()})
        reads = [at[site].flatten(0, 1) for site in self.dictionaries.reads]
        rebuilt = {layer: y for layer, (_, y) in enumerate(reconstruct(self.dictionaries, reads))}
        kept = {layer: rebuilt[layer].unflatten(0, rows.shape) for layer in self.layers}
        return _Group(final, {start: at[site] for start, site in before.items()}, kept)

    def _replacements(
        self, rebuilt: Mapping[int, Float[Tensor, "row pos d_model"]], massive: Bool[Tensor, "row pos"]
    ) -> Iterator[tuple[_Key, Mapping[Site, Hook]]]:
        """Each layer alone, and all of them, by reconstruction, zeros and mean."""
        first, writes = self.dictionaries.provenance.first, self.dictionaries.writes
        replacements: dict[By, Any] = {"spliced": rebuilt, "zero": torch.zeros_like(self.means), "mean": self.means}
        for by, values in replacements.items():
            edits = {layer: {writes[layer]: in_the_place(values[layer], first, massive)} for layer in self.layers}
            for layer, edit in edits.items():
                yield _Key(layer, by), edit
            if by == "spliced" and sequential(self.dictionaries):
                yield _Key(None, by), Splice(self.dictionaries, self.layers, massive).edits()
            else:
                yield _Key(None, by), {site: hook for edit in edits.values() for site, hook in edit.items()}

    def _compare(
        self,
        original: Float[Tensor, "token _"],
        targets: Int[Tensor, "token"],
        finals: Mapping[_Key, Float[Tensor, "token _"]],
    ) -> None:
        model = Original(self.model.logits_of(original), targets)
        self.sums[None] += Sums(model.loss)
        for key, final in finals.items():
            logits = self.model.logits_of(final)
            self.sums[key] += model.against(logits) if key.by == "spliced" else Sums(model.loss_of(logits))

    @property
    def original(self) -> float:
        """Cross-entropy per token of the untouched model."""
        return self.sums[None].loss / self.predicted

    def loss(self, key: _Key) -> float:
        return self.sums[key].loss / self.predicted

    def figures(self, layer: int | None) -> dict[str, float]:
        """Of one layer replaced, or of all."""
        spliced, zero, mean = (self.loss(_Key(layer, by)) for by in ("spliced", "zero", "mean"))
        found = self.sums[_Key(layer, "spliced")]
        return {
            "loss_zero": zero,
            "loss_mean": mean,
            "recovered_zero": _recovered(self.original, spliced, zero),
            "recovered_mean": _recovered(self.original, spliced, mean),
            "top1_agreement": found.agreeing / self.tokens,
            "kl": found.kl / self.tokens,
        }


def _compared(final: Float[Tensor, "row pos _"]) -> Float[Tensor, "token _"]:
    """At the positions whose predictions are compared: all but the first."""
    return final[:, 1:].flatten(0, 1)


def _layer(layer: int, statistics: Statistics, losses: _Losses, dictionaries: DictionarySet) -> LayerEvaluation:
    return LayerEvaluation(
        layer=layer,
        l0=statistics.l0[layer],
        fvu=statistics.fvu[layer],
        fvu_all=statistics.fvu_all[layer],
        cosine=statistics.cosine[layer],
        shrinkage=statistics.shrinkage[layer],
        dead=statistics.dead[layer],
        dense=statistics.dense[layer],
        firing=statistics.firing[layer],
        alignment=alignment(dictionaries, layer).summary(),
        loss_spliced=losses.loss(_Key(layer, "spliced")),
        **losses.figures(layer),
    )


def _recovered(loss: float, spliced: float, ablated: float) -> float:
    return (ablated - spliced) / (ablated - loss) if ablated != loss else float("nan")
