"""Negative controls: other features whose change writes as much, in the same layers."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuitsae.replacement import ReplacementModel
from transcoders.errors import InputError


def written_vectors(
    model: ReplacementModel, layer: int, feature: Int[Tensor, "k"]
) -> Float[Tensor, "k write_layer d_model"]:
    """What one unit of each feature writes, by the layer it is written into."""
    dictionaries = model.dictionaries
    rows = [dictionaries.decoder_rows(layer, feature, at).detach() for at in dictionaries.write_layers(layer)]
    return torch.stack(rows, dim=1)


def matched_features(
    model: ReplacementModel,
    index: Int[Tensor, "n 2"],
    amounts: Float[Tensor, "n"],
    generator: torch.Generator,
    among: Sequence[Bool[Tensor, "_"]] | None = None,
) -> tuple[Int[Tensor, "n 2"], Float[Tensor, "n"]]:
    """As many other features (layer, feature), with amounts that write a vector of the same norm in every layer.

    In each layer, `‖Σ c_g W_dec,g‖ = ‖Σ c_f W_dec,f‖` over all that the layer's features write: a group whose members
    write in one direction gets stand-ins that are as strong together, not only one by one. Drawn without repetition
    from `among` (a mask for each layer, such as the features that fire on some text), never from the group itself.

    Raises `InputError` where a layer has too few features to draw from.
    """
    chosen, scaled = index.clone(), amounts.clone()
    for layer in index[:, 0].unique().tolist():
        here = index[:, 0] == layer
        own = index[here, 1]
        n_features = model.dictionaries.n_features(layer)
        allowed = torch.ones(n_features, dtype=torch.bool) if among is None else among[layer].cpu().clone()
        allowed[own.cpu()] = False
        pool = allowed.nonzero()[:, 0]
        if len(pool) < len(own):
            raise InputError(
                f"Layer {layer} has {len(pool)} other features to draw a control for {len(own)} from; "
                "take fewer features, or text on which more of them fire."
            )
        drawn = pool[torch.randperm(len(pool), generator=generator)[: len(own)]].to(index.device)
        original, stand_in = (
            torch.einsum("k,kwd->wd", amounts[here], written_vectors(model, layer, features)).norm()
            for features in (own, drawn)
        )
        chosen[here, 1] = drawn
        scaled[here] = amounts[here] * original / stand_in.clamp(min=1e-30)
    return chosen, scaled
