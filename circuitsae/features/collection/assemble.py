"""From what was gathered to a set of cards: compact arrays, and every token's text once.

What the decoders alone say of features: their direct effect on the logits, and which of them point the same way.
"""

import platform
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitsae.features.card_files import narrow
from circuitsae.features.cards import TOP, FeatureCards
from circuitsae.features.collection.config import CollectConfig
from circuitsae.features.collection.examples import NO_TOKEN, Entries, Payload
from circuitsae.features.collection.state import Collected
from transcoders.dictionaries import DictionarySet
from transcoders.dictionaries.fingerprint import dictionary_fingerprint
from transcoders.language_model import LanguageModel

_POST_NORMS = {"mlp_out": "ln2_post", "attn_out": "ln1_post"}
_DIRECT = ("resid_pre", "resid_mid", "resid_post", "mlp_out", "mlp_added", "attn_out", "attn_added")
_ROWS = 512
_ALL_LAYERS_UP_TO = 65_536
"""Features of all layers together up to which each is compared with all others, not only with its own layer's."""


class Ranked(NamedTuple):
    """For each feature, what ranks highest."""

    index: Int[np.ndarray, "feature k"]  # pyright: ignore[reportIncompatibleMethodOverride]
    """−1 for none."""
    value: Float[np.ndarray, "feature k"]


def written_directions(
    model: LanguageModel, dictionaries: DictionarySet, layer: int
) -> Float[Tensor, "feature d_model"] | None:
    """What one unit of each feature adds to the residual stream: the sum over the layers it writes to.

    Where a norm follows the MLP (Gemma), through its linear part. None for sites that are not part of the stream.
    """
    features = torch.arange(dictionaries.n_features(layer), device=model.device)
    total = torch.zeros(len(features), model.d_model, dtype=model.dtype, device=model.device)
    for at in dictionaries.write_layers(layer):
        kind = dictionaries.writes[at].kind
        if kind not in _DIRECT:
            return None
        rows = dictionaries.decoder_rows(layer, features, at).to(total)
        post = model.parts.blocks[at].norm(_POST_NORMS[kind]) if kind in _POST_NORMS else None
        total += rows if post is None else post.linear(rows)
    return total


@torch.no_grad()
def direct_logits(
    model: LanguageModel, dictionaries: DictionarySet, layer: int, k: int
) -> tuple[Ranked, Ranked] | None:
    """The tokens whose logits one unit of each feature raises most, and those it lowers most.

    `norm(Σ_l' W_dec[l→l']) W_U`, with the final norm's linear part at scale 1, less the mean over the vocabulary, which
    changes no probability. The path through later layers is left out. None where features do not write to the stream.
    """
    directions = written_directions(model, dictionaries, layer)
    if directions is None:
        return None
    final, k = model.parts.final_norm, min(k, model.d_vocab)
    top, bottom = [], []
    for rows in directions.split(_ROWS):
        logits = (rows if final is None else final.linear(rows)) @ model.W_U
        logits = logits - logits.mean(1, keepdim=True)
        top.append(logits.topk(k))
        bottom.append(logits.topk(k, largest=False))
    return _ranked(top), _ranked(bottom)


@torch.no_grad()
def nearest(model: LanguageModel, dictionaries: DictionarySet, k: int) -> Ranked:
    """The features whose written directions have the largest cosine with each feature's; numbered through all layers.

    Beyond 65,536 features, only those of the same layer are compared.
    """
    layers = range(dictionaries.n_layers)
    directions = [written_directions(model, dictionaries, layer) for layer in layers]
    sizes = [dictionaries.n_features(layer) for layer in layers]
    # A site outside the stream has no common coordinates with others: its layer is compared with nothing.
    units = [
        torch.zeros(n, model.d_model, device=model.device) if d is None else torch.nn.functional.normalize(d.float())
        for d, n in zip(directions, sizes, strict=True)
    ]
    groups = [torch.cat(units)] if sum(sizes) <= _ALL_LAYERS_UP_TO else units
    first, found = 0, []
    for group in groups:
        for start in range(0, len(group), _ROWS):
            cosine = group[start : start + _ROWS] @ group.T
            rows = torch.arange(len(cosine), device=cosine.device)
            cosine[rows, rows + start] = -1
            best = cosine.topk(min(k, len(group)))
            found.append((best.values, torch.where(best.values > 0, best.indices + first, -1)))
        first += len(group)
    return _ranked([(v.clamp(min=0), i) for v, i in found])


def _ranked(parts: list) -> Ranked:
    value, index = (torch.cat([part[i] for part in parts]) for i in (0, 1))
    return Ranked(index.cpu().numpy(), value.float().cpu().numpy())


def assemble(
    model: LanguageModel, dictionaries: DictionarySet, collected: Collected, config: CollectConfig, corpus: str
) -> FeatureCards:
    """The cards of what was collected."""
    statistics = collected.statistics
    arrays = {
        "count": statistics.count,
        "mean": (statistics.sum / np.maximum(statistics.count, 1)).astype(np.float32),
        "max": statistics.max,
        "histogram": statistics.histogram,
    }
    arrays |= _examples(collected, config)
    for name, ranked in _logits(model, dictionaries, config.logits).items():
        arrays |= {f"{name}_token": ranked.index, f"{name}_value": ranked.value}
    together = Ranked(*collected.together.neighbours(statistics.count, config.neighbours))
    for name, ranked in (("neighbour", together), ("nearest", nearest(model, dictionaries, config.neighbours))):
        arrays |= {f"{name}_index": ranked.index, f"{name}_score": ranked.value}
    vocabulary = _number_tokens(arrays)
    widths = [dictionaries.n_features(layer) for layer in range(dictionaries.n_layers)]
    manifest: dict[str, Any] = {
        "model": model.name,
        "model_fingerprint": model.fingerprint(),
        "kind": dictionaries.kind,
        "widths": widths,
        "dictionary": dictionary_fingerprint(dictionaries),
        "corpus": corpus,
        "tokens_seen": collected.tokens,
        "dead": [int((part == 0).sum()) for part in np.split(statistics.count, np.cumsum(widths)[:-1])],
        "cofiring": "exact" if collected.together.exact else "sketches",
        "settings": {name: getattr(config, name) for name in config.__dataclass_fields__ if name != "save_every"},
        "versions": {"python": platform.python_version(), **{p: version(p) for p in ("torch", "numpy")}},
        "vocabulary": [model.token_string(int(token)) for token in vocabulary],
    }
    return FeatureCards(manifest, {name: narrow(name, array) for name, array in arrays.items()}, {})


def _examples(collected: Collected, config: CollectConfig) -> dict[str, np.ndarray]:
    """Top examples of each feature, then those of its strata from the highest down that are not among them."""
    top, top_payload = collected.top.kept.entries()
    sample, sample_payload = collected.strata.kept.entries()
    feature = np.concatenate([top.group, sample.group // config.strata])
    stratum = np.concatenate([np.full(len(top.group), TOP), sample.group % config.strata])
    payload = {name: np.concatenate([top_payload[name], sample_payload[name]]) for name in top_payload}
    keep = np.concatenate([np.ones(len(top.group), bool), ~_among(sample, config.strata, top)])
    order = np.flatnonzero(keep)
    # Of a stratum the strongest first; ties by text, as kept.
    rank = np.where(stratum == TOP, -config.strata, -stratum)
    order = order[np.lexsort((order, -payload["value"][order], rank[order], feature[order]))]
    payload, feature = _rows(payload, order), feature[order]
    n = len(collected.statistics.count)
    return {
        "example_start": np.searchsorted(feature, np.arange(n + 1)),
        "example_tokens": payload["tokens"],
        "example_share": payload["activations"] / collected.statistics.max[feature, None],
        "example_stratum": stratum[order],
    }


def _rows(payload: Payload, which: np.ndarray) -> Payload:
    return {name: values[which] for name, values in payload.items()}


def _among(sample: Entries, strata: int, top: Entries) -> np.ndarray:
    """Which of the sampled contexts are top examples of their feature too."""
    names = np.dtype([("feature", np.int64), ("key", np.uint64)])
    own, others = np.empty(len(sample.group), names), np.empty(len(top.group), names)
    own["feature"], own["key"] = sample.group // strata, sample.key
    others["feature"], others["key"] = top.group, top.key
    return np.isin(own, others)


def _logits(model: LanguageModel, dictionaries: DictionarySet, k: int) -> dict[str, Ranked]:
    sides: tuple[list[Ranked], list[Ranked]] = ([], [])
    for layer in range(dictionaries.n_layers):
        found = direct_logits(model, dictionaries, layer, k)
        if found is None:
            none = np.zeros((dictionaries.n_features(layer), min(k, model.d_vocab)))
            found = (Ranked((none + NO_TOKEN).astype(np.int64), none),) * 2
        for side, ranked in zip(sides, found, strict=True):
            side.append(ranked)
    joined = [Ranked(*(np.concatenate(parts) for parts in zip(*side, strict=True))) for side in sides]
    return {"top": joined[0], "bottom": joined[1]}


def _number_tokens(arrays: dict[str, np.ndarray]) -> Int[np.ndarray, "text"]:
    """Replace token ids by 1 + their place among those in use, 0 for none; returns those in use."""
    names = ("example_tokens", "top_token", "bottom_token")
    used = np.unique(np.concatenate([arrays[name].ravel() for name in names]))
    used = used[used != NO_TOKEN]
    for name in names:
        ids = arrays[name]
        arrays[name] = np.where(ids == NO_TOKEN, 0, np.searchsorted(used, ids) + 1)
    return used
