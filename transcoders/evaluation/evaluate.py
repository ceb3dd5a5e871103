"""Evaluation of dictionaries on rows of held-out tokens.

Reconstructions in the place of what a model writes, while it runs.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transcoders.data.activations import sites_of
from transcoders.dictionaries import CrossLayerTranscoder, DictionarySet, fitted, present_layers
from transcoders.errors import InputError
from transcoders.evaluation.result import Evaluation, LayerEvaluation, ReplacedModel
from transcoders.evaluation.statistics import Statistics, alignment, reconstruct_dense
from transcoders.language_model import Hook, LanguageModel
from transcoders.sites import Site


class Splice:
    """Edits that replace the writes of some layers by what the dictionaries make of the edited model's own stream.

    A cross-layer transcoder's write at layer l' sums what the features of all layers l ≤ l' send there, each computed
    in the same pass. Positions before the first with features keep the model's own write, and so do layers without a
    dictionary. One `Splice` serves one forward pass at a time.
    """

    def __init__(self, dictionaries: DictionarySet, layers: Collection[int] | None = None) -> None:
        self.dictionaries = dictionaries
        self.layers = set(present_layers(dictionaries) if layers is None else layers)
        self._pending: dict[int, Tensor] = {}
        self._reads: dict[int, Tensor] = {}

    def edits(self) -> dict[Site, Hook]:
        """For `LanguageModel.run`."""
        edits: dict[Site, Hook] = {}
        for layer in range(self.dictionaries.n_layers):
            read, write = self.dictionaries.reads[layer], self.dictionaries.writes[layer]
            if read == write:
                edits[read] = self._both(layer)
            else:
                edits[read] = self._reader(layer)
                edits[write] = self._writer(layer)
        return edits

    def _reader(self, layer: int) -> Hook:
        def read(value: Float[Tensor, "batch pos d_model"]) -> None:
            self._receive(layer, value)

        return read

    def _writer(self, layer: int) -> Hook:
        def write(value: Float[Tensor, "batch pos d_model"]) -> Tensor | None:
            return self._emit(layer, value)

        return write

    def _both(self, layer: int) -> Hook:
        def replace(value: Float[Tensor, "batch pos d_model"]) -> Tensor | None:
            self._receive(layer, value)
            return self._emit(layer, value)

        return replace

    def _receive(self, layer: int, read: Float[Tensor, "batch pos d_model"]) -> None:
        """Encode one layer's read, and set aside what its features write to this and later layers."""
        targets = [target for target in self.dictionaries.write_layers(layer) if target in self.layers]
        if not targets:
            return
        first = self.dictionaries.write_layers(layer).start
        parts = self.dictionaries.decode_layer(layer, self.dictionaries.activations(layer, read))
        for target in targets:
            part = parts[..., target - first, :]
            self._pending[target] = self._pending[target] + part if target in self._pending else part
        if layer in self.layers:
            self._reads[layer] = read

    def _emit(self, layer: int, value: Float[Tensor, "batch pos d_model"]) -> Tensor | None:
        if layer not in self.layers:
            return None
        y = self._pending.pop(layer) + self.dictionaries.decoder_bias(layer)
        replacement = self.dictionaries.finished(layer, y, self._reads.pop(layer))
        return keep_first(value, replacement, self.dictionaries.provenance.first)


class Fixed:
    """Edits that replace the writes of some layers by given ones; the first positions keep the model's own."""

    def __init__(
        self, dictionaries: DictionarySet, writes: Float[Tensor, "layer batch pos d_model"], layers: Collection[int]
    ) -> None:
        self.edited = {dictionaries.writes[layer]: writes[layer] for layer in layers}
        self.first = dictionaries.provenance.first

    def edits(self) -> dict[Site, Hook]:
        """For `LanguageModel.run`."""
        return {site: self._writer(replacement) for site, replacement in self.edited.items()}

    def _writer(self, replacement: Float[Tensor, "batch pos d_model"]) -> Hook:
        return lambda value: keep_first(value, replacement, self.first)


def keep_first(
    value: Float[Tensor, "batch pos d_model"], replacement: Float[Tensor, "*any d_model"], first: int
) -> Float[Tensor, "batch pos d_model"]:
    """`replacement` at the positions from `first` on."""
    return torch.cat([value[:, :first], replacement.expand_as(value)[:, first:]], dim=1)


def constant(vector: Float[Tensor, "d_model"], first: int) -> Callable[[Tensor], Tensor]:
    """An edit that writes the same vector at the positions from `first` on."""
    return lambda value: keep_first(value, vector, first)


Groups = Sequence[Int[Tensor, "_ pos"]]


@torch.no_grad()
def evaluate(
    model: LanguageModel, dictionaries: DictionarySet, rows: Int[Tensor, "row pos"], *, batch_rows: int = 32
) -> Evaluation:
    """Sparsity and reconstruction of every layer, and what the model loses when its writes are replaced.

    `rows`: tokens the dictionaries were not trained on. The first position of every row is left out of all figures;
    positions before the first with features keep the model's own writes, and are left out of L0 and FVU. Losses are
    measured with each layer replaced alone, and with all of them. Layers without a dictionary are left out.

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
    groups = rows.to(model.device).split(batch_rows)
    statistics = Statistics(dictionaries)
    for group in groups:
        first = dictionaries.provenance.first
        statistics.update(*sites_of(model, group, dictionaries.reads, dictionaries.writes, first=first))
    means = statistics.mean.to(model.device, model.dtype)
    loss = _mean_loss(model, groups, {})
    evaluated = [
        _evaluate_layer(model, dictionaries, groups, layer, loss, means[layer], statistics) for layer in layers
    ]
    replaced = _evaluate_replaced(model, dictionaries, groups, loss, means)
    return Evaluation(tokens=statistics.tokens, loss=loss, layers=tuple(evaluated), replaced=replaced)


def _sequential(dictionaries: DictionarySet) -> bool:
    """Whether a layer's features are known before the later layers have run."""
    return not isinstance(dictionaries, CrossLayerTranscoder) or not dictionaries.activation.over_layers


def _evaluate_layer(
    model: LanguageModel,
    dictionaries: DictionarySet,
    groups: Groups,
    layer: int,
    loss: float,
    mean: Float[Tensor, "d_model"],
    statistics: Statistics,
) -> LayerEvaluation:
    site, first = dictionaries.writes[layer], dictionaries.provenance.first
    zero = _mean_loss(model, groups, {site: constant(torch.zeros_like(mean), first)})
    averaged = _mean_loss(model, groups, {site: constant(mean, first)})
    spliced = _compare(model, dictionaries, groups, [layer])
    return LayerEvaluation(
        layer=layer,
        l0=statistics.l0[layer],
        fvu=statistics.fvu[layer],
        cosine=statistics.cosine[layer],
        shrinkage=statistics.shrinkage[layer],
        dead=statistics.dead[layer],
        dense=statistics.dense[layer],
        firing=statistics.firing[layer],
        alignment=alignment(dictionaries, layer).summary(),
        loss_spliced=spliced.loss,
        loss_zero=zero,
        loss_mean=averaged,
        recovered_zero=_recovered(loss, spliced.loss, zero),
        recovered_mean=_recovered(loss, spliced.loss, averaged),
        top1_agreement=spliced.top1_agreement,
        kl=spliced.kl,
    )


def _evaluate_replaced(
    model: LanguageModel,
    dictionaries: DictionarySet,
    groups: Groups,
    loss: float,
    means: Float[Tensor, "layer d_model"],
) -> ReplacedModel:
    layers, first = present_layers(dictionaries), dictionaries.provenance.first
    sites = {dictionaries.writes[layer]: means[layer] for layer in layers}
    zero = _mean_loss(model, groups, {site: constant(torch.zeros_like(mean), first) for site, mean in sites.items()})
    averaged = _mean_loss(model, groups, {site: constant(mean, first) for site, mean in sites.items()})
    spliced = _compare(model, dictionaries, groups, layers)
    return ReplacedModel(
        features="replaced" if _sequential(dictionaries) else "original",
        loss=spliced.loss,
        loss_zero=zero,
        loss_mean=averaged,
        recovered_zero=_recovered(loss, spliced.loss, zero),
        recovered_mean=_recovered(loss, spliced.loss, averaged),
        top1_agreement=spliced.top1_agreement,
        kl=spliced.kl,
    )


class _Comparison(NamedTuple):
    """The model with some writes replaced, against the original."""

    loss: float
    top1_agreement: float
    kl: float


def _compare(model: LanguageModel, dictionaries: DictionarySet, groups: Groups, layers: Sequence[int]) -> _Comparison:
    total, agreeing, kl, tokens = 0.0, 0, 0.0, 0
    for group in groups:
        original, edits = _original(model, dictionaries, group, layers)
        replaced, _ = model.run(group, edits=edits)
        original, replaced = original[:, 1:].double(), replaced[:, 1:].double()
        total += float(_losses(replaced, group).sum())
        agreeing += int((original.argmax(-1) == replaced.argmax(-1)).sum())
        log_p, log_q = original.log_softmax(-1), replaced.log_softmax(-1)
        kl += float((log_p.exp() * (log_p - log_q)).sum())
        tokens += original.shape[0] * original.shape[1]
    return _Comparison(total / _predicted(groups), agreeing / tokens, kl / tokens)


def _original(
    model: LanguageModel, dictionaries: DictionarySet, group: Int[Tensor, "row pos"], layers: Sequence[int]
) -> tuple[Float[Tensor, "row pos d_vocab"], Mapping[Site, Hook]]:
    """The original's logits, and the edits that replace its writes at `layers`."""
    if _sequential(dictionaries):
        return model.run(group)[0], Splice(dictionaries, layers).edits()
    logits, cache = model.run(group, dictionaries.reads)
    reads = torch.stack([cache[site].flatten(0, 1) for site in dictionaries.reads])
    _, writes = reconstruct_dense(dictionaries, reads)
    return logits, Fixed(dictionaries, writes.unflatten(1, group.shape), layers).edits()


def _mean_loss(model: LanguageModel, groups: Groups, edits: Mapping[Site, Hook]) -> float:
    """Cross-entropy of predicting positions 2, 3, … from positions 1, 2, …"""
    total = sum(float(_losses(model.run(group, edits=edits)[0][:, 1:].double(), group).sum()) for group in groups)
    return total / _predicted(groups)


def _losses(logits: Float[Tensor, "row pos d_vocab"], group: Int[Tensor, "row _"]) -> Float[Tensor, "token"]:
    """Of logits from position 1 on."""
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), group[:, 2:].flatten().long(), reduction="none"
    )


def _predicted(groups: Groups) -> int:
    return sum(len(group) * (group.shape[1] - 2) for group in groups)


def _recovered(loss: float, spliced: float, ablated: float) -> float:
    return (ablated - spliced) / (ablated - loss) if ablated != loss else float("nan")
