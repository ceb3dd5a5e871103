"""Reconstruction and sparsity on the model's own activations, added up batch by batch in float64."""

import torch
from jaxtyping import Float
from torch import Tensor

from transcoders.dictionaries import CrossLayerTranscoder, DictionarySet
from transcoders.evaluation.result import DENSE_RATE, FiringHistogram


class Statistics:
    """Running sums over tokens, for each layer, of writes y and reconstructions ŷ."""

    def __init__(self, dictionaries: DictionarySet) -> None:
        self.dictionaries = dictionaries
        n, d = dictionaries.n_layers, dictionaries.d_model
        self.tokens = 0
        self._sum, self._sum_hat = (torch.zeros(n, d, dtype=torch.float64) for _ in range(2))
        self._squares, self._squares_hat, self._products, self._squared_error, self._cosines = (
            torch.zeros(n, dtype=torch.float64) for _ in range(5)
        )
        self._fired = [torch.zeros(dictionaries.n_features(layer), dtype=torch.int64) for layer in range(n)]

    def update(self, reads: Float[Tensor, "token layer d_model"], writes: Float[Tensor, "token layer d_model"]) -> None:
        activations, reconstruction = reconstruct_dense(self.dictionaries, reads.transpose(0, 1))
        y, y_hat = writes.transpose(0, 1).double().cpu(), reconstruction.double().cpu()
        self.tokens += y.shape[1]
        self._sum += y.sum(dim=1)
        self._sum_hat += y_hat.sum(dim=1)
        self._squares += y.square().sum(dim=(1, 2))
        self._squares_hat += y_hat.square().sum(dim=(1, 2))
        self._products += (y * y_hat).sum(dim=(1, 2))
        self._squared_error += (y - y_hat).square().sum(dim=(1, 2))
        self._cosines += torch.nn.functional.cosine_similarity(y, y_hat, dim=-1).sum(dim=1)
        for fired, dense in zip(self._fired, activations, strict=True):
            fired += (dense > 0).sum(dim=0).cpu()

    @property
    def mean(self) -> Float[Tensor, "layer d_model"]:
        """Mean write μ."""
        return self._sum / self.tokens

    @property
    def fvu(self) -> list[float]:
        """`Σ ‖y − ŷ‖² / Σ ‖y − μ‖²`."""
        variance = self._squares - self.tokens * self.mean.square().sum(dim=1)
        return (self._squared_error / variance).tolist()

    @property
    def cosine(self) -> list[float]:
        """Mean over tokens of `cos(y, ŷ)`; zero where one of them is zero."""
        return (self._cosines / self.tokens).tolist()

    @property
    def shrinkage(self) -> list[float]:
        """The relative reconstruction bias `γ = Σ ‖ŷ − μ‖² / Σ ⟨ŷ − μ, y − μ⟩`.

        It minimises `Σ ‖y − μ − (ŷ − μ)/γ‖²`: one where reconstructions have the right size, below one where they are
        shrunk. A departure from the source: the mean is taken off, since a large mean, which the bias reconstructs,
        would hide what the features shrink.

        Source: Rajamanoharan et al. 2024, *Improving Dictionary Learning with Gated Sparse Autoencoders*, section 5.2.
        """
        mean = self.mean
        squares = self._squares_hat - 2 * (mean * self._sum_hat).sum(1) + self.tokens * mean.square().sum(1)
        products = self._products - (mean * self._sum_hat).sum(1)
        return (squares / products).tolist()

    @property
    def l0(self) -> list[float]:
        """Mean number of active features."""
        return [float(fired.sum()) / self.tokens for fired in self._fired]

    @property
    def dead(self) -> list[float]:
        """Share of features that never fired."""
        return [float((fired == 0).double().mean()) for fired in self._fired]

    @property
    def dense(self) -> list[float]:
        """Share of features that fired on more than `DENSE_RATE` of the tokens."""
        return [float((rate > DENSE_RATE).double().mean()) for rate in self.rates]

    @property
    def rates(self) -> list[Float[Tensor, "feature"]]:
        """Share of the tokens that each feature fired on."""
        return [fired.double() / self.tokens for fired in self._fired]

    @property
    def firing(self) -> list[FiringHistogram]:
        return [FiringHistogram.of(rate.tolist()) for rate in self.rates]


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
