"""Reconstruction and sparsity on the model's own activations, added up batch by batch in float64."""

import torch
from jaxtyping import Float
from torch import Tensor

from transcoders.dictionaries import CrossLayerTranscoder, DictionarySet


class Statistics:
    """Running sums over tokens, for each layer."""

    def __init__(self, dictionaries: DictionarySet) -> None:
        self.dictionaries = dictionaries
        n, d = dictionaries.n_layers, dictionaries.d_model
        self.tokens = 0
        self._sum = torch.zeros(n, d, dtype=torch.float64)
        self._sum_of_squares = torch.zeros(n, dtype=torch.float64)
        self._squared_error = torch.zeros(n, dtype=torch.float64)
        self._fired = [torch.zeros(dictionaries.n_features(layer), dtype=torch.int64) for layer in range(n)]

    def update(self, reads: Float[Tensor, "token layer d_model"], writes: Float[Tensor, "token layer d_model"]) -> None:
        activations, reconstruction = reconstruct_dense(self.dictionaries, reads.transpose(0, 1))
        exact = writes.double().cpu()
        self.tokens += len(exact)
        self._sum += exact.sum(dim=0)
        self._sum_of_squares += exact.square().sum(dim=(0, 2))
        error = writes.transpose(0, 1).double() - reconstruction.double()
        self._squared_error += error.square().sum(dim=(1, 2)).cpu()
        for fired, dense in zip(self._fired, activations, strict=True):
            fired += (dense > 0).sum(dim=0).cpu()

    @property
    def mean(self) -> Float[Tensor, "layer d_model"]:
        """Mean write."""
        return self._sum / self.tokens

    @property
    def fvu(self) -> list[float]:
        variance = self._sum_of_squares - self.tokens * self.mean.square().sum(dim=1)
        return (self._squared_error / variance).tolist()

    @property
    def l0(self) -> list[float]:
        return [float(fired.sum()) / self.tokens for fired in self._fired]

    @property
    def dead(self) -> list[float]:
        return [float((fired == 0).float().mean()) for fired in self._fired]


def reconstruct_dense(
    dictionaries: DictionarySet, reads: Float[Tensor, "layer token d_model"]
) -> tuple[list[Float[Tensor, "token _"]], Float[Tensor, "layer token d_model"]]:
    """Activations of each layer and the reconstruction, through dense products: for many tokens at once."""
    if isinstance(dictionaries, CrossLayerTranscoder):  # TopK needs all layers together
        a = dictionaries.encode_dense(reads)
        return list(a), dictionaries.decode_dense(a, reads)
    activations = [dictionaries.activations(layer, read) for layer, read in enumerate(reads)]
    writes = [dictionaries.decoder_bias(layer).expand_as(read) for layer, read in enumerate(reads)]
    for layer, a in enumerate(activations):
        targets = dictionaries.write_layers(layer)
        for target, part in zip(targets, dictionaries.decode_layer(layer, a).unbind(-2), strict=True):
            writes[target] = writes[target] + part
        if (skip := dictionaries.skip(layer)) is not None:
            writes[layer] = writes[layer] + reads[layer] @ skip
    return activations, torch.stack(writes)
