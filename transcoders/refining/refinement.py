"""`refine`: better derivatives for dictionaries that are there, and what became of each layer."""

import copy
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch

from transcoders.dictionaries import CrossLayerTranscoder, DictionarySet, TranscoderSet, fitted, present_layers
from transcoders.dictionaries.provenance import reading_as_trained
from transcoders.errors import DictionaryError
from transcoders.evaluation.agreement import jacobian_agreement, no_agreement
from transcoders.evaluation.agreement_result import Agreement
from transcoders.evaluation.statistics import Statistics
from transcoders.language_model import LanguageModel
from transcoders.progress import progress_bar
from transcoders.refining.config import RefineConfig
from transcoders.refining.fine_tuning import FineTuning
from transcoders.refining.mirroring import firing, mirrored
from transcoders.refining.reading import Reading, Text
from transcoders.refining.skip_terms import Correction, ErrorMoments, Refinable, corrected, corrections

logger = logging.getLogger(__name__)

_HEADS = {"fvu": "FVU", "l0": "L0", "cosine": "cosine", "norm_ratio": "norm ratio"}
What = Literal["kept", "skip", "bias", "fine-tuned"]


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Of one layer, on held-out text."""

    l0: float
    """Active features per token."""
    fvu: float
    """Fraction of the variance of the write that is left unexplained."""
    cosine: float | None = None
    """Of `J_dictionary v` and `J_mlp v`, along changes of a token; None where it was not measured."""
    norm_ratio: float | None = None
    """`‖J_dictionary v‖ / ‖J_mlp v‖`."""


@dataclass(frozen=True, kw_only=True)
class RefinedLayer:
    """One layer before and after."""

    layer: int
    what: What
    """`skip`: a skip term and a bias were added; `bias`: a bias alone; `fine-tuned`: both, and it was trained on;
    `kept`: all of that made its FVU worse, so it is what it was."""
    ridge: float
    mirrored: int
    """Features that were turned round."""
    before: Quality
    after: Quality


@dataclass(frozen=True, kw_only=True)
class Refinement:
    """What `refine` came to."""

    dictionaries: Refinable
    config: RefineConfig
    corpus: str
    tokens: int
    """That the regression was on."""
    held_out_tokens: int
    layers: tuple[RefinedLayer, ...]

    def mean(self, side: Literal["before", "after"], name: str) -> float:
        """Of a figure of `Quality` over the layers that have it."""
        found = [value for each in self.layers if (value := getattr(getattr(each, side), name)) is not None]
        return sum(found) / len(found) if found else float("nan")

    def table(self) -> tuple[list[str], list[tuple[str, ...]]]:
        """Heads and rows of text: each layer's figures before and after, and in the last row their means."""
        rows = [
            (str(each.layer), *(_change(getattr(each.before, n), getattr(each.after, n), n) for n in _HEADS), each.what)
            for each in self.layers
        ]
        means = [_change(self.mean("before", name), self.mean("after", name), name) for name in _HEADS]
        return ["layer", *_HEADS.values(), "what"], [*rows, ("mean", *means, "")]

    def to_json(self) -> dict[str, Any]:
        return {
            "corpus": self.corpus, "tokens": self.tokens, "held_out_tokens": self.held_out_tokens,
            "config": self.config.to_json(), "layers": [asdict(layer) for layer in self.layers],
        }  # fmt: skip


def _change(before: float | None, after: float | None, name: str) -> str:
    form = ".1f" if name == "l0" else ".3f"
    return " → ".join("–" if value is None or value != value else format(value, form) for value in (before, after))


def refine(
    model: LanguageModel, dictionaries: DictionarySet, corpus: Text, *, bos: bool | None = None,
    progress: bool = False, **settings: Any,
) -> DictionarySet:  # fmt: skip
    """Per-layer or cross-layer transcoders that pass on small changes more as their MLPs do, without training anew.

    The error of each layer is regressed on what the layer reads: `y − ŷ ≈ x W + b`. W is added to its skip term (one is
    made where there is none) and b to `b_dec`, so that features stay as they are. Where `finetune_tokens` are given, a
    short training for the derivative follows. With `mirror` features that are on for more than this share of tokens are
    turned round before (`transcoders.refining.mirroring`). A layer whose FVU on held-out text any of these makes worse
    keeps what it had.

    `settings`: those of `RefineConfig`: `rank`, `tokens`, `ridge`, `mirror`, `finetune_tokens`, … `corpus`: what
    `train` takes, documents or rows of tokens, of which some are held out. Sums are of the positions with features,
    without massive tokens, and take `L d²` numbers. `bos`: begin rows with the beginning-of-text token; None for what
    the dictionaries were trained with. The result is in float32, or in float64 where those given are; they stay as they
    are. `refinement` tells what became of each layer.

    Raises `DictionaryError` for SAEs, for dictionaries that norm each token or belong to another model, and where
    fine-tuning cannot hold them; `InputError` where a model is too coarse for derivatives.
    """
    config = RefineConfig(**settings)
    return refinement(model, dictionaries, corpus, config, bos=bos, progress=progress).dictionaries


def refinement(
    model: LanguageModel,
    dictionaries: DictionarySet,
    corpus: Text,
    config: RefineConfig | None = None,
    *,
    bos: bool | None = None,
    progress: bool = False,
) -> Refinement:
    """`refine`, with what became of each layer on held-out text."""
    config = config or RefineConfig()
    given = refinable(fitted(dictionaries, model))
    model = reading_as_trained(model, given.provenance, bos)
    reading = Reading.of(model, given, corpus, config)
    had_skip = any(given.skip(layer) is not None for layer in range(given.n_layers))
    if config.finetune_tokens:
        FineTuning(reading, given, config, had_skip=had_skip)  # refuses now what it would refuse later
    with _Bar(progress) as bar:
        turned, counts = given, {}
        if config.mirror is not None:
            bar.begin("reading how often features fire", None)
            turned, counts = mirrored(given, firing(given, reading.batches(config.tokens)), config.mirror)
        fit, held_out = ErrorMoments(turned), ErrorMoments(turned)
        for moments, what, batches in (
            (fit, "reading", reading.batches(config.tokens)),
            (held_out, "reading held-out text", reading.held_out_batches(reading.limits)),
        ):
            bar.begin(what, config.tokens if moments is fit else reading.held_out.numel())
            for batch in batches:
                moments.add(batch)
                bar.advance(len(batch.reads))
        found = corrections(fit, held_out, rank=config.rank, ridge=config.ridge)
        stages = Stages(reading, given)
        maps = {layer: correction.map for layer, correction in found.items()}
        fitted_maps = corrected(turned, maps, skip=config.rank != 0)
        stages.offer("bias" if config.rank == 0 else "skip", fitted_maps, together=any(counts.values()))
        if config.finetune_tokens:
            tuning = FineTuning(reading, stages.dictionaries, config, had_skip=had_skip)
            bar.begin("fine-tuning", tuning.steps * config.batch)
            stages.offer("fine-tuned", tuning.run(bar.advance), together=True)
        bar.begin("measuring the derivative", None)
        return _result(stages, found, fit, config, counts)


def refinable(dictionaries: DictionarySet) -> Refinable:
    """The set as it is computed with: in float32, or in float64 where it is; `DictionaryError` for what has no part."""
    if dictionaries.kind == "sae":
        raise DictionaryError("SAEs replace no MLP, so there is no derivative to refine; give transcoders.")
    if not isinstance(dictionaries, TranscoderSet | CrossLayerTranscoder):
        raise DictionaryError(
            f"A {type(dictionaries).__name__} cannot be refined; load the dictionaries with decoders='memory'."
        )
    if any(dictionaries.norm(layer) is not None for layer in range(dictionaries.n_layers)):
        raise DictionaryError(
            "These dictionaries norm each token, which makes what a skip term adds depend on all else that is read; "
            "only dictionaries without norms can be refined."
        )
    if not present_layers(dictionaries):
        raise DictionaryError("No layer has a dictionary, so there is nothing to refine; give at least one.")
    if dictionaries.decoder_bias(0).dtype in (torch.float32, torch.float64):
        return dictionaries
    return copy.deepcopy(dictionaries).to(torch.float32)


class Stages:
    """A set that changes are offered to; a layer takes one that leaves its held-out FVU no worse than at first.

    What a fine-tuned or mirrored cross-layer transcoder writes at one layer comes from all before, so there all layers
    do or none, by their mean. Every token counts that has features, massive ones too where the dictionaries know no
    limits.
    """

    def __init__(self, reading: Reading, given: Refinable) -> None:
        self.reading, self.given, self.dictionaries = reading, given, given
        self.before = self.measured(given)
        self.fvu, self.l0 = list(self.before.fvu), list(self.before.l0)
        self.what: dict[int, What] = dict.fromkeys(present_layers(given), "kept")

    def measured(self, dictionaries: Refinable) -> Statistics:
        statistics = Statistics(dictionaries)
        like = dictionaries.decoder_bias(0)
        for reads, writes in self.reading.held_out_batches(dictionaries.provenance.site_limits):
            statistics.update(reads.to(like), writes)
        return statistics

    def offer(self, what: What, changed: Refinable, *, together: bool = False) -> None:
        """`together`: features themselves changed, of which a cross-layer transcoder's write at all layers."""
        found, first = self.measured(changed), self.before.fvu
        taken = [layer for layer in self.what if found.fvu[layer] <= first[layer]]
        if together and isinstance(changed, CrossLayerTranscoder):
            taken = list(self.what) if sum(found.fvu) <= sum(first) else []
        for layer in taken:
            self.fvu[layer], self.l0[layer], self.what[layer] = found.fvu[layer], found.l0[layer], what
        left = [layer for layer in self.what if layer not in taken]
        if left:
            named = ", ".join(map(str, left[:8])) + (", …" if len(left) > 8 else "")
            logger.warning("Layers that would be worse on held-out text keep what they had (%s): %s.", what, named)
        self.dictionaries = _chosen(changed, self.dictionaries, taken)


@torch.no_grad()
def _chosen(changed: Refinable, before: Refinable, taken: Sequence[int]) -> Refinable:
    """Some layers of the one set, the others of the other; the first one is used up."""
    if isinstance(changed, TranscoderSet):
        assert isinstance(before, TranscoderSet)
        layers = [changed[i] if i in taken else before[i] for i in range(changed.n_layers)]
        return TranscoderSet(layers, before.provenance)
    if not taken:
        return before
    for layer in set(range(changed.n_layers)) - set(taken):  # of a cross-layer transcoder these alone are by layer
        changed.b_dec[layer] = before.decoder_bias(layer)
        if changed.W_skip is not None:
            skip = before.skip(layer)
            changed.W_skip[layer] = 0.0 if skip is None else skip
    return changed


def _result(
    stages: Stages, found: dict[int, Correction], fit: ErrorMoments, config: RefineConfig, counts: dict[int, int]
) -> Refinement:
    given, made, reading = stages.given, stages.dictionaries, stages.reading
    tokens = max(moments.n for moments in fit.of_layer.values())
    passed = _agreements(reading, (given, made), config)
    before, after = ((side.fvu, side.l0) for side in (stages.before, stages))
    layers = tuple(
        RefinedLayer(
            layer=layer, what=what, ridge=found[layer].ridge, mirrored=0 if what == "kept" else counts.get(layer, 0),
            before=_quality(layer, *before, passed[0]), after=_quality(layer, *after, passed[1]),
        )
        for layer, what in stages.what.items()
    )  # fmt: skip
    record = {"corpus": reading.name, "tokens": tokens, **config.to_json()}
    record["layers"] = {str(layer.layer): layer.what for layer in layers}
    made = copy.copy(made)
    made.provenance = replace(given.provenance, config={**given.provenance.config, "refined": record}, agreement={})
    return Refinement(
        dictionaries=made.requires_grad_(False), config=config, corpus=reading.name, tokens=tokens,
        held_out_tokens=stages.before.tokens, layers=layers,
    )  # fmt: skip


def _agreements(reading: Reading, sets: Sequence[Refinable], config: RefineConfig) -> list[Agreement | None]:
    rows = reading.held_out[: max(1, config.agreement_tokens // reading.context)]
    if not config.agreement_tokens:
        return [None for _ in sets]
    if (reason := no_agreement(reading.model, sets[0])) is not None:
        logger.warning("The derivative is not measured. %s", reason)
        return [None for _ in sets]
    return [jacobian_agreement(reading.model, each, rows, seed=config.seed) for each in sets]


def _quality(layer: int, fvu: Sequence[float], l0: Sequence[float], passed: Agreement | None) -> Quality:
    natural = None if passed is None else {each.layer: each.natural for each in passed.layers}.get(layer)
    cosine, ratio = (None, None) if natural is None else (natural.cosine, natural.norm_ratio)
    return Quality(l0=l0[layer], fvu=fvu[layer], cosine=cosine, norm_ratio=ratio)


class _Bar:
    """One bar on a terminal, for one task after another."""

    def __init__(self, shown: bool) -> None:
        self._bar = progress_bar(shown=shown)
        self._task = self._bar.add_task("loading", total=None)

    def begin(self, what: str, total: int | None) -> None:
        self._bar.reset(self._task, description=what, total=total)

    def advance(self, tokens: int) -> None:
        self._bar.advance(self._task, tokens)

    def __enter__(self) -> "_Bar":
        self._bar.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._bar.__exit__(*raised)
