"""A narrow dictionary and what a wider one has found beside it, as one dictionary that can be used as any other."""

from typing import TypeVar

import torch
from torch import Tensor

from transcoders.dictionaries import SAE, JumpReLU, ReLU, SAESet, SparseDictionary, Transcoder, TranscoderSet
from transcoders.errors import DictionaryError
from transcoders.evaluation.matching import best_cosines
from transcoders.evaluation.splitting import CONNECTED_ABOVE

S = TypeVar("S", TranscoderSet, SAESet)


@torch.no_grad()
def superset(narrow: S, wide: S, *, above: float = CONNECTED_ABOVE) -> S:
    """In each layer the features of the narrow dictionary, then the novel ones of the wide one.

    `y = a_narrow W_narrow + Σ_{j novel} a_j w_j + b_narrow (+ x W_skip)`; j is novel where
    `max_i cos(w_i, w_j) ≤ above`, as in `stitch`, which measures what each of them adds. Every feature keeps the
    activation that it has in its own dictionary.

    Raises `DictionaryError` for dictionaries of other sites, that norm each token, or whose features compete (TopK and
    the like): these have no activation of their own; a BatchTopK is saved with thresholds, and has.

    Source: Leask et al. 2025, *Sparse Autoencoders Do Not Find Canonical Units of Analysis*, section 4.
    """
    if narrow.kind != wide.kind or (narrow.reads, narrow.writes) != (wide.reads, wide.writes):
        raise DictionaryError(
            f"Dictionaries of one kind and of the same sites make a superset; got {narrow.kind} of {narrow.n_layers} "
            f"layers from {narrow.reads[0]}, and {wide.kind} of {wide.n_layers} from {wide.reads[0]}."
        )
    layers = [_together(*pair, above) for pair in zip(narrow.layers, wide.layers, strict=True)]
    return type(narrow)(layers, narrow.provenance).requires_grad_(False)  # pyright: ignore[reportArgumentType]


def _together(narrow: SparseDictionary, wide: SparseDictionary, above: float) -> SparseDictionary:
    if narrow.norm is not None or wide.norm is not None:
        raise DictionaryError(f"The dictionary of {narrow.read} norms each token; a superset of it is not made.")
    novel = torch.arange(wide.n_features)
    if narrow.n_features and wide.n_features:
        similarity, _ = best_cosines(wide.W_dec, narrow.W_dec)
        novel = (similarity <= above).nonzero().flatten()
    weights = {
        "W_enc": torch.cat([narrow.W_enc, wide.W_enc[:, novel]], dim=1),
        "b_enc": torch.cat([narrow.encoder_bias, wide.encoder_bias[novel]]),
        "W_dec": torch.cat([narrow.W_dec, wide.W_dec[novel]]),
        "b_dec": narrow.b_dec.clone(),
        "W_skip": None if narrow.W_skip is None else narrow.W_skip.clone(),
    }
    activation = JumpReLU(torch.cat([_thresholds(narrow), _thresholds(wide)[novel]]))
    if isinstance(narrow, SAE):
        return SAE(**weights, activation=activation, site=narrow.read)
    return Transcoder(**weights, activation=activation, read=narrow.read, write=narrow.writes[0])


def _thresholds(dictionary: SparseDictionary) -> Tensor:
    match dictionary.activation:
        case JumpReLU(threshold=threshold):
            return threshold.detach()
        case ReLU():
            return torch.zeros_like(dictionary.b_enc)
        case other:
            raise DictionaryError(
                f"Features of a {other.name} dictionary compete for their places, so that none can be taken out of it; "
                "give dictionaries of ReLU or JumpReLU, which BatchTopK becomes when it is saved."
            )
