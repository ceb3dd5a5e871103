"""What the decoders alone say of features: their direct effect on the logits, and which of them point the same way."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from transcoders.dictionaries import DictionarySet
from transcoders.language_model import LanguageModel

_POST_NORMS = {"mlp_out": "ln2_post", "attn_out": "ln1_post"}
_DIRECT = ("resid_pre", "resid_mid", "resid_post", "mlp_out", "attn_out")
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
        name = _POST_NORMS.get(kind)
        post = f"blocks.{at}.{name}" if name is not None and hasattr(model.bridge.blocks[at], name) else None
        total += rows if post is None else linear_part(model, post)(rows)
    return total


def linear_part(model: LanguageModel, norm: str) -> Callable[[Tensor], Tensor]:
    """A norm at scale 1, without its bias: centring, where it centres, and its weights."""
    owner: object = model.bridge
    for name in norm.split("."):
        owner = owner[int(name)] if name.isdigit() else getattr(owner, name)  # pyright: ignore[reportIndexIssue]

    def apply(x: Tensor) -> Tensor:
        with model.bridge.hooks(fwd_hooks=[(f"{norm}.hook_scale", lambda value, hook: torch.ones_like(value))]):
            zero = owner(torch.zeros_like(x[None, :1]))  # pyright: ignore[reportCallIssue]
            return (owner(x[None]) - zero)[0]  # pyright: ignore[reportCallIssue]

    return apply


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
    final, k = linear_part(model, "ln_final"), min(k, model.d_vocab)
    top, bottom = [], []
    for rows in directions.split(_ROWS):
        logits = final(rows) @ model.W_U
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
