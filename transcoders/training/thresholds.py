"""TopK replaced by a threshold after training."""

import torch
from jaxtyping import Float
from torch import Tensor

from transcoders.dictionaries import Activation, CrossLayerTranscoder, JumpReLU, SAESet, TopK, TranscoderSet
from transcoders.errors import DictionaryError

Folded = TranscoderSet | CrossLayerTranscoder | SAESet


@torch.no_grad()
def fold_topk(dictionaries: Folded, reads: Float[Tensor, "layer token d_model"]) -> Folded:
    """Replace TopK, in place, by the threshold that leaves k features active per token on average.

    The threshold is estimated on `reads`: one for each layer, or a single one where TopK ranks all layers together.
    Afterwards a layer's features depend on that layer alone, so they can be computed while the model runs.
    """
    if isinstance(dictionaries, CrossLayerTranscoder):
        k = _k(dictionaries.activation)
        threshold = _threshold(dictionaries.pre_activations_dense(reads), k * reads.shape[1])
        dictionaries.activation = JumpReLU(torch.full_like(dictionaries.b_enc, threshold)).requires_grad_(False)
        return dictionaries
    for layer, dictionary in enumerate(dictionaries.layers):
        k = _k(dictionary.activation)
        threshold = _threshold(dictionaries.pre_activations(layer, reads[layer]), k * reads.shape[1])
        dictionary.activation = JumpReLU(torch.full_like(dictionary.b_enc, threshold)).requires_grad_(False)
    return dictionaries


def _k(activation: Activation) -> int:
    if not isinstance(activation, TopK):
        raise DictionaryError(f"Only TopK is replaced by a threshold; these dictionaries have {activation.name!r}.")
    return activation.k


def _threshold(h: Tensor, count: int) -> float:
    """The value that `count` positive pre-activations exceed; zero where there are not that many."""
    flat = h.flatten()
    if count >= len(flat):
        return 0.0
    return max(0.0, float(flat.kthvalue(len(flat) - count).values))
