"""Reconstruction and sparsity on the model's own activations, added up batch by batch in float64.

How well each feature's encoder points along what it writes.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from transcoders.dictionaries import CrossLayerTranscoder, DictionarySet
from transcoders.evaluation.result import DENSE_RATE, AlignmentSummary, FiringHistogram
from transcoders.evaluation.splice import sequential

_TINY = 1e-12
_FEATURES_AT_ONCE = 4096


class Alignment(NamedTuple):
    """Of the features of one layer."""

    product: Float[Tensor, "feature"]
    """The alignment score `⟨w_enc, v⟩`, in the coordinates of training where the dictionaries record them."""
    cosine: Float[Tensor, "feature"]
    """`⟨w_enc, v⟩ / (‖w_enc‖ ‖v‖)`, zero where one of them is zero; beside the score, as norms do not count in it."""

    def summary(self) -> AlignmentSummary:
        return AlignmentSummary(
            product=float(self.product.mean()),
            product_sd=float(self.product.std(correction=0)),
            product_bimodality=bimodality(self.product),
            cosine=float(self.cosine.mean()),
            cosine_below_half=float((self.cosine < 0.5).double().mean()),
            cosine_bimodality=bimodality(self.cosine),
        )


def alignment(dictionaries: DictionarySet, layer: int) -> Alignment:
    """Encoder against decoder, for every feature of a layer: the score `⟨w_enc, v⟩`, and the cosine.

    `v` is the decoder of an SAE or a transcoder. Of a cross-layer transcoder it is `Σ_l' W_dec[l→l']`, what the feature
    has added to the residual stream after the last layer, a generalisation of ours. Aligned training keeps the product
    at one in the coordinates of training, so recorded factors are divided out: `w_enc / s_l` and `t_l' W_dec[l→l']`.

    A cosine near zero is one sign of a feature whose direction of reading has nothing to do with what it writes. The
    score depends on norms too: dictionaries with the same cosines have other scores where encoders are longer.

    Source: Brzozowski & Chung 2026, *Aligned Training* (arXiv 2605.18629), whose alignment score is the inner product.
    """
    features = torch.arange(dictionaries.n_features(layer), device=dictionaries.decoder_bias(layer).device)
    blocks = [_alignment(dictionaries, layer, block) for block in features.split(_FEATURES_AT_ONCE)]
    return Alignment(*(torch.cat(side) for side in zip(*blocks, strict=True)))


def _alignment(dictionaries: DictionarySet, layer: int, features: Int[Tensor, "k"]) -> Alignment:
    factors = getattr(dictionaries.provenance, "normalisation", {})
    ones = [1.0] * dictionaries.n_layers
    read, write = factors.get("read", ones), factors.get("write", ones)
    encoder = dictionaries.encoder_rows(layer, features).double() / read[layer]
    written = torch.zeros_like(encoder)
    for target in dictionaries.write_layers(layer):
        written += write[target] * dictionaries.decoder_rows(layer, features, target).double()
    product = (encoder * written).sum(dim=1)
    norms = encoder.norm(dim=1) * written.norm(dim=1)
    return Alignment(product=product, cosine=torch.where(norms > _TINY, product / norms.clamp(min=_TINY), 0.0))


def bimodality(values: Float[Tensor, "n"] | Sequence[float]) -> float:
    """Sarle's coefficient `(g₁² + 1) / g₂`, with skewness g₁ and kurtosis g₂ (a normal distribution's is 3).

    1 for two equal values, 5/9 for a uniform distribution, 1/3 for a normal one. Skewed distributions with a single
    mode reach above 5/9 too, so it is a hint to look at the histogram. NaN where all values are equal.

    Source: Pfister et al. 2013, *Good things peak in pairs: a note on the bimodality coefficient*.
    """
    x = torch.as_tensor(values, dtype=torch.float64)
    centred = x - x.mean()
    variance = float(centred.square().mean())
    if variance < _TINY:
        return float("nan")
    skewness = float(centred.pow(3).mean()) / variance**1.5
    return (skewness**2 + 1) / (float(centred.pow(4).mean()) / variance**2)


class Statistics:
    """Running sums over tokens, for each layer, of writes y and reconstructions ŷ."""

    def __init__(self, dictionaries: DictionarySet) -> None:
        self.dictionaries = dictionaries
        n, d = dictionaries.n_layers, dictionaries.d_model
        self.tokens = self.massive = 0
        self._sum, self._sum_hat = (torch.zeros(n, d, dtype=torch.float64) for _ in range(2))
        self._squares, self._squares_hat, self._products, self._squared_error, self._cosines = (
            torch.zeros(n, dtype=torch.float64) for _ in range(5)
        )
        self._massive_sum = torch.zeros(n, d, dtype=torch.float64)
        self._massive_squares, self._massive_error = (torch.zeros(n, dtype=torch.float64) for _ in range(2))
        self._fired = [torch.zeros(dictionaries.n_features(layer), dtype=torch.int64) for layer in range(n)]

    def update(self, reads: Float[Tensor, "token layer d_model"], writes: Float[Tensor, "token layer d_model"]) -> None:
        self.update_by_layer(list(reads.unbind(1)), list(writes.unbind(1)))

    def update_by_layer(
        self,
        reads: Sequence[Float[Tensor, "token d_model"]],
        writes: Sequence[Float[Tensor, "token d_model"]],
        massive: Bool[Tensor, "token"] | None = None,
    ) -> None:
        """The same of one tensor for each layer; where they can be encoded apart, no two are at the same time.

        Tokens that are `massive` count in `fvu_all` alone.
        """
        out = torch.zeros(len(writes[0]), dtype=torch.bool) if massive is None else massive.cpu()
        kept = ~out if bool(out.any()) else slice(None)  # a view where it can be
        self.massive += int(out.sum())
        self.tokens += int((~out).sum())
        for layer, (activations, y_hat) in enumerate(reconstruct(self.dictionaries, reads)):
            y, y_hat = writes[layer].cpu().double(), y_hat.cpu().double()
            self._add(layer, y[kept], y_hat[kept])
            self._add_massive(layer, y[out], y_hat[out])
            self._fired[layer] += (activations > 0)[kept].sum(dim=0).cpu()

    def _add_massive(
        self, layer: int, y: Float[Tensor, "token d_model"], y_hat: Float[Tensor, "token d_model"]
    ) -> None:
        self._massive_sum[layer] += y.sum(dim=0)
        self._massive_squares[layer] += y.square().sum()
        self._massive_error[layer] += (y - y_hat).square().sum()

    def _add(self, layer: int, y: Float[Tensor, "token d_model"], y_hat: Float[Tensor, "token d_model"]) -> None:
        self._sum[layer] += y.sum(dim=0)
        self._sum_hat[layer] += y_hat.sum(dim=0)
        self._squares[layer] += y.square().sum()
        self._squares_hat[layer] += y_hat.square().sum()
        self._products[layer] += (y * y_hat).sum()
        self._squared_error[layer] += (y - y_hat).square().sum()
        self._cosines[layer] += torch.nn.functional.cosine_similarity(y, y_hat, dim=-1).sum()

    @property
    def mean(self) -> Float[Tensor, "layer d_model"]:
        """Mean write μ."""
        return self._sum / self.tokens

    @property
    def fvu(self) -> list[float]:
        """`Σ ‖y − ŷ‖² / Σ ‖y − μ‖²`."""
        return _unexplained(self._squared_error, self._squares, self._sum, self.tokens).tolist()

    @property
    def fvu_all(self) -> list[float]:
        """The same with the massive tokens, reconstructed as if they had features."""
        return _unexplained(
            self._squared_error + self._massive_error,
            self._squares + self._massive_squares,
            self._sum + self._massive_sum,
            self.tokens + self.massive,
        ).tolist()

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
    def alive(self) -> list[Bool[Tensor, "feature"]]:
        """Which features of each layer fired at all."""
        return [fired > 0 for fired in self._fired]

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


def unexplained(
    writes: Float[Tensor, "layer token d_model"], errors: Float[Tensor, "layer token d_model"]
) -> Float[Tensor, "layer"]:
    """FVU of each layer, `Σ ‖e‖² / Σ ‖y − μ‖²`, from what is written and what of it is not reconstructed."""
    y, e = writes.double(), errors.double()
    return _unexplained(e.square().sum((1, 2)), y.square().sum((1, 2)), y.sum(1), y.shape[1])


def _unexplained(
    squared_error: Float[Tensor, "layer"],
    squares: Float[Tensor, "layer"],
    total: Float[Tensor, "layer d_model"],
    tokens: int,
) -> Float[Tensor, "layer"]:
    """The same from sums over tokens: `Σ ‖e‖²`, `Σ ‖y‖²` and `Σ y`."""
    return squared_error / (squares - (total / tokens).square().sum(1) * tokens)


def reconstruct(
    dictionaries: DictionarySet, reads: Sequence[Float[Tensor, "token d_model"]]
) -> Iterator[tuple[Float[Tensor, "token _"], Float[Tensor, "token d_model"]]]:
    """Activations and reconstruction of one layer after the other, through dense products: for many tokens at once.

    Only where features of all layers compete (TopK over layers) are the activations of all of them held together.
    """
    if not sequential(dictionaries):
        assert isinstance(dictionaries, CrossLayerTranscoder)
        stacked = torch.stack(list(reads))
        activations = dictionaries.encode_dense(stacked)
        yield from zip(activations, dictionaries.decode_dense(activations, stacked), strict=True)
        return
    pending: dict[int, Tensor] = {}
    for layer, read in enumerate(reads):
        a = dictionaries.activations(layer, read)
        targets = dictionaries.write_layers(layer)
        for target, part in zip(targets, dictionaries.decode_layer(layer, a).unbind(-2), strict=True):
            pending[target] = pending[target] + part if target in pending else part
        y = pending.pop(layer) + dictionaries.decoder_bias(layer)
        yield a, dictionaries.finished(layer, y, read)


def reconstruct_dense(
    dictionaries: DictionarySet, reads: Float[Tensor, "layer token d_model"]
) -> tuple[list[Float[Tensor, "token _"]], Float[Tensor, "layer token d_model"]]:
    """`reconstruct` of all layers together."""
    activations, writes = zip(*reconstruct(dictionaries, list(reads)), strict=True)
    return list(activations), torch.stack(writes)
