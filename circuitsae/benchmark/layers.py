"""One layer of some dictionaries as every task sees it: what its features write, on texts and while the model runs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitsae.tasks.wording import encode
from transcoders.data.outliers import massive_tokens
from transcoders.dictionaries import DictionarySet
from transcoders.errors import InputError
from transcoders.language_model import Hook, LanguageModel
from transcoders.sites import Site

_TOKENS_AT_ONCE, _LOGITS_AT_ONCE = 4096, 1024
Change = Callable[[Tensor], Tensor]
"""Activations `[row, pos, feature]` in, what they become out."""


@dataclass(frozen=True)
class BenchmarkLayer:
    """One layer of some dictionaries.

    Activations are in units of `W_dec`: where the dictionary takes a token's norm back, they are multiplied by it, so
    that `a @ W_dec` is what the features write in the model's own units.
    """

    dictionaries: DictionarySet
    layer: int

    def __post_init__(self) -> None:
        if not 0 <= self.layer < self.dictionaries.n_layers or not self.dictionaries.n_features(self.layer):
            raise InputError(f"Layer {self.layer} has no dictionary to measure; choose another (--at-layers).")

    @property
    def read(self) -> Site:
        return self.dictionaries.reads[self.layer]

    @property
    def write(self) -> Site:
        return self.dictionaries.writes[self.layer]

    @property
    def n_features(self) -> int:
        return self.dictionaries.n_features(self.layer)

    @cached_property
    def W_dec(self) -> Float[np.ndarray, "feature d_model"]:
        """What an activation of 1 adds to the layer's own write."""
        every = torch.arange(self.n_features, device=self.dictionaries.decoder_bias(self.layer).device)
        return self.dictionaries.decoder_rows(self.layer, every, self.layer).detach().double().cpu().numpy()

    def activations(self, read: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch feature"]:
        """In units of `W_dec`; `DictionaryError` where layers cannot be encoded one at a time."""
        a = self.dictionaries.activations(self.layer, read)
        norm = self.dictionaries.norm(self.layer)
        if norm is None or not norm.is_undone:
            return a
        zeros = torch.zeros_like(read)
        return a * (norm.inverse(zeros + 1, read) - norm.inverse(zeros, read))[..., :1]

    def offset(self, read: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """What is written without features: bias, skip term, and the token's own mean where a norm has one."""
        bias = self.dictionaries.decoder_bias(self.layer).expand_as(read)
        return self.dictionaries.finished(self.layer, bias, read)

    def edits(self, change: Change, exempt: Tensor) -> dict[Site, Hook]:
        """Hooks for `LanguageModel.run`: features take the values that `change` gives them, errors stay as they are.

        What is added is `(change(a) − a) W_dec`, at every layer the features write to. `exempt`: tokens `[row, pos]`
        without features.
        """
        added: list[Tensor] = []
        targets = self.dictionaries.write_layers(self.layer)

        def see(value: Tensor) -> None:
            a = self.activations(value)
            difference = (change(a) - a).masked_fill(exempt[..., None], 0.0)
            added[:] = self.dictionaries.decode_layer(self.layer, difference).unbind(-2)

        def writer(place: int) -> Hook:
            return lambda value: value + added[place]

        def both(value: Tensor) -> Tensor:
            see(value)
            return value + added[0]

        edits: dict[Site, Hook] = {self.dictionaries.writes[at]: writer(i) for i, at in enumerate(targets)}
        if self.read == self.write:
            return edits | {self.read: both}
        return {self.read: see, **edits}


@dataclass(frozen=True)
class Rows:
    """Texts as rows of tokens, filled up at the end, where a causal model does not see it."""

    tokens: Int[Tensor, "row pos"]
    lengths: Int[Tensor, "row"]

    @classmethod
    def of(cls, ids: Sequence[list[int]], device: torch.device) -> "Rows":
        """Of texts of any lengths."""
        longest = max(map(len, ids))
        filled = torch.tensor([row + [row[-1]] * (longest - len(row)) for row in ids], device=device)
        return cls(filled, torch.tensor([len(row) for row in ids], device=device))

    @property
    def filled(self) -> Tensor:
        """Which tokens are none."""
        return torch.arange(self.tokens.shape[1], device=self.tokens.device) >= self.lengths[:, None]


def rows_of(model: LanguageModel, texts: Sequence[str]) -> list[Rows]:
    """The texts, in their order, in groups that go through the model together; cut at the model's context."""
    ids = [each.ids[: model.context] for each in encode(model, texts)]
    groups, start = [], 0
    while start < len(ids):
        end, longest = start, 0
        while end < len(ids) and max(longest, len(ids[end])) * (end + 1 - start) <= max(_TOKENS_AT_ONCE, len(ids[end])):
            longest = max(longest, len(ids[end]))
            end += 1
        groups.append(Rows.of(ids[start:end], model.device))
        start = end
    return groups


def exempt(model: LanguageModel, dictionaries: DictionarySet, rows: Rows) -> Tensor:
    """Tokens `[row, pos]` without features: before the first with any, over a limit of the training, or none at all."""
    without = rows.filled | massive_tokens(model, rows.tokens, dictionaries.provenance.site_limits)
    without[:, : dictionaries.provenance.first] = True
    return without


@dataclass(frozen=True)
class Seen:
    """What one layer did on some texts, one row for each text, in float64."""

    write: Float[np.ndarray, "text d_model"]
    """The model's own write, less what the dictionary writes without features."""
    features: Float[np.ndarray, "text feature"]
    """Activations in units of `W_dec`."""

    def __getitem__(self, chosen: np.ndarray | slice) -> "Seen":
        return Seen(self.write[chosen], self.features[chosen])

    def without(self, layer: BenchmarkLayer, chosen: Int[np.ndarray, "k"]) -> Float[np.ndarray, "text d_model"]:
        """The writes once some features are taken out, errors kept: `x − Σ_i a_i d_i`."""
        return self.write - self.features[:, chosen] @ layer.W_dec[chosen]


@torch.no_grad()
def seen_on(
    model: LanguageModel,
    layers: Sequence[BenchmarkLayer],
    texts: Sequence[str],
    spans: Sequence[tuple[int, int]] | None = None,
) -> list[Seen]:
    """Writes and activations of each layer, from one pass over the texts: the mean over a text's tokens with features.

    `spans`: the first and the last of the tokens of each text that are wanted instead. The mean is SAEBench's; as
    ablating features is linear, ablating the means is ablating every token.
    """
    sites = {site for layer in layers for site in (layer.read, layer.write)}
    parts: list[list[Seen]] = [[] for _ in layers]
    done = 0
    for rows in rows_of(model, texts):
        at = model.activations(rows.tokens, sites)
        wanted = None if spans is None else spans[done : done + len(rows.tokens)]
        done += len(rows.tokens)
        for layer, found in zip(layers, parts, strict=True):
            weight = token_shares(exempt(model, layer.dictionaries, rows), wanted)
            write = at[layer.write] - layer.offset(at[layer.read])
            features = layer.activations(at[layer.read])
            found.append(Seen(weighted(weight, write), weighted(weight, features)))
    return [Seen(*(np.concatenate(side) for side in zip(*map(_both, found), strict=True))) for found in parts]


def _both(seen: Seen) -> tuple[np.ndarray, np.ndarray]:
    return seen.write, seen.features


def token_shares(without: Tensor, spans: Sequence[tuple[int, int]] | None) -> Float[Tensor, "row pos"]:
    """The share of each token in what is kept of its text."""
    kept = (~without).double()
    if spans is not None:
        first, last = torch.tensor(spans, device=without.device).T[:, :, None]
        place = torch.arange(without.shape[1], device=without.device)
        kept = ((place >= first) & (place <= last)).double()
    return kept / kept.sum(dim=1, keepdim=True).clamp(min=1)


def weighted(weight: Float[Tensor, "row pos"], value: Float[Tensor, "row pos _"]) -> np.ndarray:
    wide = torch.promote_types(value.dtype, torch.float32)
    return torch.einsum("rp,rpd->rd", weight.to(wide), value.to(wide)).double().cpu().numpy()


@torch.no_grad()
def predictions(model: LanguageModel, rows: Rows, edits: Mapping[Site, Hook] | None = None) -> Int[Tensor, "row pos"]:
    """The likeliest next token at every position of a run, edited or not."""
    final, _ = model.run_to_unembedding(rows.tokens, edits=edits or {})
    flat = final.flatten(0, 1).split(_LOGITS_AT_ONCE)
    return torch.cat([model.logits_of(part).argmax(-1) for part in flat]).view_as(rows.tokens)
