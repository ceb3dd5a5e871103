"""The weights in training: every kind as one stack of layers, on normalised activations."""

import copy
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from transcoders.dictionaries import Activation, JumpReLU, TopK
from transcoders.errors import DictionaryError
from transcoders.kernels import ActiveFeatures, cross_layer_decode, dense_cross_layer_decode, host
from transcoders.kernels.ranked import keep_of_all, keep_of_rows
from transcoders.training import low_rank
from transcoders.training.activations import BatchTopK, Gated
from transcoders.training.distributed import ALONE, World

_PIECE = 2**16
"""Numbers in a piece of the weights."""
_NOT_STACKED = ("W_dec.", "W_later.", "b_dec", "W_skip")


class TrainingParameters(nn.Module):
    """All layers of one kind. `W_dec[l]` is `[feature, span, d_model]`: what layer l writes to layers l … l + span − 1.

    The span is one for SAEs and transcoders, and reaches the last layer for a cross-layer transcoder. Encoders and
    decoders are stored feature by feature, so that what an active feature touches lies together. With `W_later`, all
    layers but the last have decoders of low rank, `W_dec[l]` `[feature, 1, d_model + rank]` (`low_rank`).
    """

    W_enc: Float[Tensor, "layer feature d_model"]
    W_skip: Float[Tensor, "layer d_model _"] | None
    """The skip term's map; with a rank of its own the first of its two factors."""
    W_skip_out: Float[Tensor, "layer rank d_out"] | None
    """The second one."""

    def __init__(
        self,
        *,
        W_enc: Float[Tensor, "layer feature d_model"],
        b_enc: Float[Tensor, "layer feature"],
        W_dec: Sequence[Float[Tensor, "feature _ _"]],
        b_dec: Float[Tensor, "layer d_model"],
        activation: Activation,
        W_skip: Float[Tensor, "layer d_model _"] | None = None,
        W_skip_out: Float[Tensor, "layer rank d_out"] | None = None,
        W_later: Sequence[Float[Tensor, "_ _ d_model"]] = (),
        centred: bool = False,
        aligned: bool = False,
        unit_decoders: bool = False,
        side_by_side: int = 1,
        bf16: bool = False,
        ranks: World = ALONE,
    ) -> None:
        """`side_by_side`: of `SAEConfig`. `ranks`: those that have the other features of these layers."""
        super().__init__()
        self.W_enc, self.b_enc = nn.Parameter(W_enc), nn.Parameter(b_enc)
        self.W_dec = nn.ParameterList(nn.Parameter(w) for w in W_dec)
        self.W_later = nn.ParameterList(nn.Parameter(w) for w in W_later)
        self.b_dec = nn.Parameter(b_dec)
        self.W_skip = None if W_skip is None else nn.Parameter(W_skip)
        self.W_skip_out = None if W_skip_out is None else nn.Parameter(W_skip_out)
        self.activation = activation
        self.centred, self.aligned, self.unit_decoders, self.bf16 = centred, aligned, unit_decoders, bf16
        self.side_by_side, self.ranks = side_by_side, ranks
        if b_dec.shape[1] % side_by_side:
            raise DictionaryError(
                f"{side_by_side} sites side by side share a width evenly; got vectors of width {b_dec.shape[1]}."
            )

    @property
    def n_layers(self) -> int:
        return self.W_enc.shape[0]

    def views(self, first: int, last: int) -> "TrainingParameters":
        """The layers `first … last − 1` in the same memory, as parameters with gradients of their own."""
        with torch.no_grad():
            return TrainingParameters(
                W_enc=self.W_enc[first:last],
                b_enc=self.b_enc[first:last],
                W_dec=[W_dec.detach() for W_dec in self.W_dec[first:last]],
                b_dec=self.b_dec[first:last],
                activation=_views(self.activation, first, last),
                W_skip=None if self.W_skip is None else self.W_skip[first:last],
                W_skip_out=None if self.W_skip_out is None else self.W_skip_out[first:last],
                centred=self.centred,
                aligned=self.aligned,
                unit_decoders=self.unit_decoders,
                side_by_side=self.side_by_side,
                bf16=self.bf16,
                ranks=self.ranks,
            )

    def holding(self, tensors: Mapping[str, Tensor]) -> "TrainingParameters":
        """The same kind of other weights, given by the names of `state_dict`."""
        activation = copy.copy(self.activation)
        own = {name.removeprefix("activation."): t for name, t in tensors.items() if name.startswith("activation.")}
        activation._parameters = {name: nn.Parameter(own[name]) for name in activation._parameters}
        activation._buffers = {name: own[name] for name in activation._buffers}
        n_layers = len(tensors["W_enc"])
        return TrainingParameters(
            W_enc=tensors["W_enc"],
            b_enc=tensors["b_enc"],
            W_dec=[tensors[f"W_dec.{layer}"] for layer in range(n_layers)],
            b_dec=tensors["b_dec"],
            activation=activation,
            W_skip=tensors.get("W_skip"),
            W_skip_out=tensors.get("W_skip_out"),
            W_later=[tensors[f"W_later.{layer}"] for layer in range(len(self.W_later))],
            centred=self.centred,
            aligned=self.aligned,
            unit_decoders=self.unit_decoders,
            side_by_side=self.side_by_side,
            bf16=self.bf16,
        )

    # the parts of a forward pass

    def encoder(self) -> Float[Tensor, "layer feature d_model"]:
        """The encoder that is applied: `W_enc`, or with aligned training its projection.

        `ŵ = w + (1 − ⟨w, v⟩) v / ‖v‖²`, the vector next to w with ⟨ŵ, v⟩ = 1, where v is all that the feature writes,
        the sum of its decoders. For an SAE or a transcoder that is its decoder, so that encoder · decoder = 1; for a
        cross-layer transcoder it is what the feature has added to the residual stream after the last layer, a
        generalisation of ours. Holds in the coordinates of training, with normalised activations.

        All d numbers of w are stored, and d − 1 of them are free: ŵ does not depend on w's part along v, which gets no
        gradient (`∂ŵ/∂w = I − v vᵀ / ‖v‖²`, of rank d − 1).

        Source of the constraint: Brzozowski & Chung 2026, *Aligned Training* (arXiv 2605.18629).
        """
        if not self.aligned:
            return self.W_enc
        return aligned_to(self.written(), self.W_enc)

    def written(self) -> Float[Tensor, "layer feature d_model"]:
        """The sum of each feature's decoders."""
        low = [low_rank.summed(*factors) for factors in self._factored()]
        return torch.stack(low + [W_dec.sum(dim=1) for W_dec in self.W_dec[len(low) :]])

    def encoder_bias(self, encoder: Float[Tensor, "layer feature d_model"]) -> Float[Tensor, "layer feature"]:
        """The constant of the pre-activations: `b_enc`, or `b_enc − b_dec W_enc` where the encoder reads x − b_dec."""
        if not self.centred:
            return self.b_enc
        return self.b_enc - (encoder @ self.ranks.shared(self.b_dec).unsqueeze(-1)).squeeze(-1)

    def pre_activations(self, reads: Float[Tensor, "layer batch d_model"]) -> Float[Tensor, "layer batch feature"]:
        """h; of a gated dictionary the pre-activations of its gate."""
        encoder = self.encoder()
        bias = self.encoder_bias(encoder).unsqueeze(1)
        if self.bf16:
            return self.product(reads, encoder.transpose(1, 2)) + bias
        return torch.baddbmm(bias, reads, encoder.transpose(1, 2))

    def activate(self, h: Float[Tensor, "layer batch feature"]) -> Float[Tensor, "layer batch feature"]:
        activation = self.activation
        if isinstance(activation, TopK | BatchTopK) and host.queued(h):
            if isinstance(activation, TopK):
                return keep_of_rows(h, activation.k, over_layers=activation.over_layers)
            return keep_of_all(h, activation.k * h.shape[1], over_layers=activation.over_layers)
        by_token = h.movedim(0, -2)
        if isinstance(self.activation, Gated):
            return self.activation.magnitudes(by_token, self.b_enc).movedim(-2, 0)
        return self.activation(by_token).movedim(-2, 0)

    def decode(
        self, a: Float[Tensor, "layer batch feature"], first: int = 0, last: int | None = None, *, frozen: bool = False
    ) -> Float[Tensor, "layer batch d_model"]:
        """What the features `first … last − 1` write, without bias and skip term; `frozen` decoders get no gradient."""
        W_dec = [W.detach() if frozen else W for W in self.W_dec]
        last = a.shape[2] if last is None else last
        if (first, last) != (0, a.shape[2]):  # the gradient of a slice is a copy of the whole
            a, W_dec = a[:, :, first:last], [W[first:last] for W in W_dec]
        return self.spread(dense_cross_layer_decode(a, W_dec, bf16=self.bf16), frozen)

    def decode_active(
        self, values: Float[Tensor, "n"], active: ActiveFeatures, *, frozen: bool = False
    ) -> Float[Tensor, "layer batch d_model"]:
        """The same of active features alone."""
        W_dec = [W.detach() if frozen else W for W in self.W_dec]
        return self.spread(cross_layer_decode(values, active, W_dec), frozen)

    def spread(
        self, written: Float[Tensor, "layer batch _"], frozen: bool = False
    ) -> Float[Tensor, "layer batch d_model"]:
        """What is written at every layer, of what the tables of `W_dec` make; the same unless decoders have a rank."""
        if not len(self.W_later):
            return written
        return low_rank.spread(written, [W.detach() if frozen else W for W in self.W_later], bf16=self.bf16)

    def _factored(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """`W_dec` and `W_later` of the layers whose decoders are of low rank."""
        return list(zip(self.W_dec, self.W_later, strict=False))

    def full_decoders(self) -> list[Float[Tensor, "feature _ d_model"]]:
        """What each layer's features write to it and to later ones, in memory of its own."""
        low = [low_rank.expanded(*factors).detach() for factors in self._factored()]
        return low + [W.detach().clone() for W in self.W_dec[len(low) :]]

    def base(
        self, reads: Float[Tensor, "layer batch d_model"], *, frozen: bool = False
    ) -> Float[Tensor, "layer _ d_model"]:
        """The reconstruction without features: `b_dec`, and the skip term where there is one."""
        skipped = self.skipped(reads)
        y = self.b_dec.unsqueeze(1) if skipped is None else self.b_dec.unsqueeze(1) + skipped
        return y.detach() if frozen else y

    def skipped(self, reads: Float[Tensor, "layer batch d_model"]) -> Float[Tensor, "layer batch d_model"] | None:
        """What goes past the features; None without a skip term."""
        if self.W_skip is None:
            return None
        inner = self.product(reads, self.W_skip)
        return inner if self.W_skip_out is None else self.product(inner, self.W_skip_out)

    def skip_map(self) -> Float[Tensor, "layer d_model d_out"] | None:
        """The skip term as one matrix for each layer."""
        return self.W_skip if self.W_skip is None or self.W_skip_out is None else self.W_skip @ self.W_skip_out

    def reconstruct(
        self, a: Float[Tensor, "layer batch feature"], reads: Float[Tensor, "layer batch d_model"]
    ) -> Float[Tensor, "layer batch d_model"]:
        return self.base(reads) + self.decode(a)

    def decoder_norms(self) -> Float[Tensor, "layer feature"]:
        """The norm of all decoders of a feature stacked."""
        low = [low_rank.stacked_norms(*factors) for factors in self._factored()]
        return torch.stack(low + [self.norms_of(W_dec.flatten(1)) for W_dec in self.W_dec[len(low) :]])

    def norms_of(self, decoders: Float[Tensor, "feature width"]) -> Float[Tensor, "feature"]:
        """`‖d‖`; of S sites side by side `Σ_s ‖d_s‖ / √S`, which is the same where all are alike.

        Source of the sum: Lindsey et al. 2024, *Sparse Crosscoders for Cross-Layer Features and Model Diffing*.
        """
        if self.side_by_side == 1:
            return torch.linalg.vector_norm(decoders, dim=1)
        return _site_norms(decoders, self.side_by_side).sum(dim=1) / self.side_by_side**0.5

    def product(self, x: Tensor, W: Tensor) -> Tensor:
        """`x @ W`; in bf16 where asked, with a float32 result, and float32 gradients for the weights."""
        return (x.bfloat16() @ W.bfloat16()).to(x.dtype) if self.bf16 else x @ W

    # upkeep

    def stacked_gradients(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """As `gradients` has them, of all layers together: of features `[layer, …]`, of decoders, of outputs.

        Those of `W_later` are not among them.
        """
        of_outputs = [p for p in (self.b_dec, self.W_skip, self.W_skip_out) if p is not None]
        apart = [*of_outputs, *self.W_dec, *self.W_later]
        of_features = [p for p in self.parameters() if all(p is not other for other in apart)]
        sides = (of_features, self.W_dec, of_outputs)
        features, decoders, outputs = ([p.grad for p in side if p.grad is not None] for side in sides)
        return features, decoders, outputs

    def gradients(self) -> list[tuple[list[Tensor], list[Tensor]]]:
        """Of every layer those that there are: of its features, and of what these share (`b_dec`, skip, `W_later`)."""
        outputs = [p for p in (self.b_dec, self.W_skip, self.W_skip_out) if p is not None]
        stacked = [p for name, p in self.named_parameters() if not name.startswith(_NOT_STACKED)]
        return [
            (
                [p.grad[layer] for p in stacked if p.grad is not None]
                + [p.grad for p in [self.W_dec[layer]] if p.grad is not None],
                [p.grad[layer] for p in outputs if p.grad is not None]
                + [p.grad for p in self.W_later[layer : layer + 1] if p.grad is not None],
            )
            for layer in range(self.n_layers)
        ]

    @torch.no_grad()
    def project_gradients(self) -> None:
        """Where decoders have norm one: take the part of their gradient along which that would change away.

        It would only be undone by the normalisation after the step, and misleads Adam's moments.
        Source: Bricken et al. 2023, *Towards Monosemanticity*, appendix on advice for training.
        """
        if not self.unit_decoders:
            return
        for factors in self._factored():
            low_rank.project_gradients(*factors, self.ranks)
        for W_dec in self.W_dec[len(self.W_later) :]:
            if W_dec.grad is not None:
                for gradient, W in zip(_pieces(W_dec.grad), _pieces(W_dec), strict=True):
                    direction = W if self.side_by_side == 1 else _steepest(W, self.side_by_side)
                    along = (gradient * direction).sum(dim=1, keepdim=True)
                    gradient.addcmul_(direction, along, value=-1)

    @torch.no_grad()
    def constrain(self) -> None:
        """After every step: thresholds stay non-negative, and unit decoders have norm one."""
        if isinstance(self.activation, JumpReLU):
            self.activation.threshold.clamp_(min=0)
        if self.unit_decoders:
            for W_dec, W_later in self._factored():
                W_dec /= low_rank.stacked_norms(W_dec, W_later).clamp(min=1e-12)[:, None, None]
            for W_dec in self.W_dec[len(self.W_later) :]:
                for piece in _pieces(W_dec):
                    piece /= self.norms_of(piece).unsqueeze(1).clamp(min=1e-12)

    @torch.no_grad()
    def alignment(self) -> Float[Tensor, "layer feature"]:
        """The alignment score ⟨encoder, what the feature writes⟩ of every feature."""
        return (self.encoder() * self.written()).sum(dim=-1)


def aligned_to(
    written: Float[Tensor, "*of d_model"], W_enc: Float[Tensor, "*of d_model"]
) -> Float[Tensor, "*of d_model"]:
    """The encoders next to `W_enc` with ⟨encoder, written⟩ = 1: of d numbers d − 1 are free."""
    missing = 1 - (W_enc * written).sum(dim=-1, keepdim=True)
    return W_enc + missing / written.square().sum(dim=-1, keepdim=True).clamp(min=1e-12) * written


def _views(activation: Activation, first: int, last: int) -> Activation:
    """An activation function of some layers, its parameters and buffers in the same memory."""
    views = copy.copy(activation)
    views._parameters = {
        name: None if p is None else nn.Parameter(p.detach()[first:last]) for name, p in activation._parameters.items()
    }
    views._buffers = {name: None if b is None else b[first:last] for name, b in activation._buffers.items()}
    return views


def _pieces(weights: Float[Tensor, "feature _ d_model"]) -> Sequence[Float[Tensor, "_ _"]]:
    """Some features at a time, their decoders side by side: views so small that they stay in a processor's cache."""
    rows = weights.flatten(1)
    return rows.split(max(1, _PIECE // rows.shape[1]) if rows.device.type == "cpu" else len(rows))


def _site_norms(decoders: Float[Tensor, "feature _"], sites: int) -> Float[Tensor, "feature site"]:
    return torch.linalg.vector_norm(decoders.unflatten(1, (sites, -1)), dim=2)


def _steepest(decoders: Float[Tensor, "feature width"], sites: int) -> Float[Tensor, "feature width"]:
    """Of length one, the direction along which `Σ_s ‖d_s‖` grows fastest: each site's own direction, alike."""
    norms = _site_norms(decoders, sites).clamp(min=1e-12).unsqueeze(2)
    return (decoders.unflatten(1, (sites, -1)) / norms).flatten(1) / sites**0.5
