"""The crosscoder, on activations as the model has them."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from transcoders.dictionaries import SAE, Activation, DictionaryProvenance
from transcoders.errors import DictionaryError
from transcoders.sites import Site

LEAST_SHARE = 0.1
"""A latent is at a site where its decoder there has this share of its largest norm, or more."""


class Crosscoder(nn.Module):
    """Latents over several sites: `a = σ(Σ_s x_s W_enc^s + b_enc)`, and `x̂_s = a W_dec^s + b_dec^s` for every site s.

    `scales`: the factor of each site that brought it to variance one in training; it is folded into the weights.
    `labels`: what the sites are called. Of a `ModelPair`, the sites of its second model count their layers on from the
    first one's. `DictionaryError` where weights and sites disagree.

    Source: Lindsey et al. 2024, *Sparse Crosscoders for Cross-Layer Features and Model Diffing*.
    """

    W_enc: Float[Tensor, "site d_model feature"]
    b_enc: Float[Tensor, "feature"]
    W_dec: Float[Tensor, "site feature d_model"]
    b_dec: Float[Tensor, "site d_model"]
    scales: Float[Tensor, "site"]

    def __init__(
        self,
        *,
        W_enc: Float[Tensor, "_ _ _"],
        b_enc: Float[Tensor, "_"],
        W_dec: Float[Tensor, "_ _ _"],
        b_dec: Float[Tensor, "_ _"],
        activation: Activation,
        sites: Sequence[Site],
        scales: Float[Tensor, "_"],
        provenance: DictionaryProvenance,
        labels: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        n, d, f = W_enc.shape
        found = {"b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec, "scales": scales}
        wanted = {"b_enc": (f,), "W_dec": (n, f, d), "b_dec": (n, d), "scales": (n,)}
        labels = tuple(map(str, sites)) if labels is None else tuple(labels)
        wrong = [f"{name} {list(found[name].shape)}" for name, shape in wanted.items() if found[name].shape != shape]
        if wrong or not n == len(sites) == len(labels) == len(set(sites)):
            raise DictionaryError(
                f"The weights of a crosscoder disagree: W_enc {[n, d, f]} is [site, d_model, feature], for which there "
                f"are {len(sites)} sites, {len(labels)} labels, {', '.join(wrong) or 'and fitting weights'}."
            )
        activation.require(f)
        self.W_enc, self.b_enc = nn.Parameter(W_enc), nn.Parameter(b_enc)
        self.W_dec, self.b_dec = nn.Parameter(W_dec), nn.Parameter(b_dec)
        self.register_buffer("scales", scales)
        self.activation, self.sites, self.labels, self.provenance = activation, tuple(sites), labels, provenance
        self.requires_grad_(False)

    @classmethod
    @torch.no_grad()
    def of_sae(
        cls,
        sae: SAE,
        sites: Sequence[Site],
        scales: Float[Tensor, "site"],
        provenance: DictionaryProvenance,
        labels: Sequence[str] | None = None,
    ) -> "Crosscoder":
        """An autoencoder of all sites side by side, each times its scale: `W_enc^s ← t_s W_enc^s`, `W_dec^s / t_s`."""
        n, scales = len(sites), scales.to(sae.b_dec)
        return cls(
            W_enc=sae.W_enc.detach().unflatten(0, (n, -1)) * scales[:, None, None],
            b_enc=sae.encoder_bias.detach().clone(),
            W_dec=(sae.W_dec.detach().unflatten(1, (n, -1)) / scales[:, None]).transpose(0, 1).contiguous(),
            b_dec=sae.b_dec.detach().unflatten(0, (n, -1)) / scales[:, None],
            activation=sae.activation,
            sites=sites,
            scales=scales,
            provenance=provenance,
            labels=labels,
        )

    n_sites = property(lambda self: int(self.W_enc.shape[0]), doc="Number of sites.")
    d_model = property(lambda self: int(self.W_enc.shape[1]), doc="Width of each site.")
    n_features = property(lambda self: int(self.W_enc.shape[2]), doc="Number of latents.")

    def pre_activations(self, x: Float[Tensor, "*batch site d_model"]) -> Float[Tensor, "*batch feature"]:
        """`Σ_s x_s W_enc^s + b_enc`."""
        if x.shape[-2:] != self.W_enc.shape[:2]:
            raise DictionaryError(
                f"This crosscoder reads {self.n_sites} sites of width {self.d_model} ({', '.join(self.labels)}), side "
                f"by side as [token, site, d_model]; got {list(x.shape)}."
            )
        return x.flatten(-2) @ self.W_enc.flatten(0, 1) + self.b_enc

    def encode(self, x: Float[Tensor, "*batch site d_model"]) -> Float[Tensor, "*batch feature"]:
        return self.activation(self.pre_activations(x))

    def decode(self, a: Float[Tensor, "*batch feature"]) -> Float[Tensor, "*batch site d_model"]:
        return (a @ self.W_dec.transpose(0, 1).flatten(1)).unflatten(-1, self.b_dec.shape) + self.b_dec

    def forward(self, x: Float[Tensor, "*batch site d_model"]) -> Float[Tensor, "*batch site d_model"]:
        return self.decode(self.encode(x))

    # where a latent is

    @torch.no_grad()
    def decoder_norms(self, *, scaled: bool = True) -> Float[Tensor, "feature site"]:
        """`‖W_dec,i^s‖`; `scaled`: in units of the site's standard deviation, as the penalty has them."""
        norms = self.W_dec.norm(dim=2).T
        return norms * self.scales if scaled else norms

    def profile(self) -> Float[Tensor, "feature site"]:
        """The share of each site in the sum of a latent's scaled norms."""
        norms = self.decoder_norms()
        return norms / norms.sum(dim=1, keepdim=True).clamp(min=1e-12)

    def sites_of(self, least: float = LEAST_SHARE) -> Int[Tensor, "feature"]:
        """At how many sites each latent is: its scaled norm there is at least `least` of its largest."""
        norms = self.decoder_norms()
        return ((norms >= least * norms.amax(dim=1, keepdim=True)) & (norms > 0)).sum(dim=1)

    def extra_repr(self) -> str:
        return f"{', '.join(self.labels)}, features={self.n_features}"
