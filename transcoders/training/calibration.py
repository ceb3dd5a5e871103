"""TopK dictionaries as JumpReLU ones, which every format holds, and what that changes, measured on other text."""

import copy
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor

from transcoders.data import ActivationBatch, held_out_rows, open_corpus, sites_of, take_rows
from transcoders.data.corpora import CorpusSource
from transcoders.dictionaries import CrossLayerTranscoder, DictionarySet, SAESet, TranscoderSet
from transcoders.dictionaries.provenance import reading_as_trained
from transcoders.errors import DictionaryError
from transcoders.evaluation.statistics import Statistics
from transcoders.language_model import LanguageModel
from transcoders.training.export import Folded, fold_topk


@dataclass(frozen=True)
class CalibratedLayer:
    """Active features of a token and the share of variance left unexplained, with TopK and with the threshold."""

    layer: int
    l0_before: float
    l0_after: float
    fvu_before: float
    fvu_after: float


@torch.no_grad()
def calibrate_topk(
    model: LanguageModel,
    dictionaries: DictionarySet,
    corpus: CorpusSource,
    *,
    tokens: int = 8192,
    context: int = 128,
    bos: bool | None = None,
) -> tuple[Folded, list[CalibratedLayer]]:
    """The dictionaries with thresholds in the place of TopK, and what that changes; those given stay as they are.

    The thresholds are those of `fold_topk` on about `tokens` tokens of the corpus's training documents; L0 and FVU are
    measured on as many of the held-out ones, both at the positions with features. Texts begin with BOS as in the
    dictionaries' training, or as `bos` says.
    Raises `DictionaryError` for dictionaries of another model, and where an activation is no TopK.
    """
    if not isinstance(dictionaries, TranscoderSet | CrossLayerTranscoder | SAESet):
        raise DictionaryError(f"A {type(dictionaries).__name__} cannot be calibrated; load it with decoders='memory'.")
    dictionaries.check_fits(model)
    model, text = reading_as_trained(model, dictionaries.provenance, bos), open_corpus(corpus)
    context = min(context, model.context)
    rows = take_rows(
        model, text.training(), rows=-(-tokens // context), context=context, separator=text.separator_or(None)
    )
    reads = _activations(model, dictionaries, rows).reads.transpose(0, 1)
    folded = fold_topk(copy.deepcopy(dictionaries), reads.to(dictionaries.decoder_bias(0)))
    config = {**folded.provenance.config, "calibrated": {"corpus": text.name, "tokens": reads.shape[1]}}
    folded.provenance = replace(folded.provenance, config=config, agreement={})
    others = held_out_rows(model, text, tokens=tokens, context=context)
    before, after = (_measured(model, each, others) for each in (dictionaries, folded))
    layers = range(dictionaries.n_layers)
    return folded, [CalibratedLayer(i, before.l0[i], after.l0[i], before.fvu[i], after.fvu[i]) for i in layers]


def _measured(model: LanguageModel, dictionaries: Folded, rows: Int[Tensor, "row pos"]) -> Statistics:
    statistics = Statistics(dictionaries)
    for group in rows.split(32):
        reads, writes = _activations(model, dictionaries, group)
        statistics.update(reads.to(dictionaries.decoder_bias(0)), writes)
    return statistics


def _activations(model: LanguageModel, dictionaries: Folded, rows: Int[Tensor, "row pos"]) -> ActivationBatch:
    """At the positions with features."""
    source = dictionaries.provenance
    return sites_of(model, rows, dictionaries.reads, dictionaries.writes, first=source.first, limits=source.site_limits)
