"""One dictionary of one layer: the SAE and the transcoder."""

from pathlib import Path
from typing import Any, TypedDict

import torch
from jaxtyping import Float
from torch import Tensor, nn

from transcoders.dictionaries.activations import Activation, ReLU
from transcoders.dictionaries.by_name import Kind, load_one
from transcoders.dictionaries.token_norm import TokenNorm
from transcoders.errors import DictionaryError
from transcoders.sites import Site, SiteKind


class SparseDictionary(nn.Module):
    """Encoder `h = x W_enc + b_enc`, activation `a = σ(h)`, decoder `y = a W_dec + b_dec (+ x W_skip)`.

    With a `norm`, the encoder sees `norm(x)`, and y is taken back to the units of x unless the norm is one `_in` only.
    """

    W_enc: Float[Tensor, "d_in feature"]
    b_enc: Float[Tensor, "feature"]
    W_dec: Float[Tensor, "feature d_out"]
    b_dec: Float[Tensor, "d_out"]
    W_skip: Float[Tensor, "d_in d_out"] | None

    def __init__(
        self,
        *,
        W_enc: Float[Tensor, "_ _"],
        b_enc: Float[Tensor, "_"],
        W_dec: Float[Tensor, "_ _"],
        b_dec: Float[Tensor, "_"],
        activation: Activation,
        read: Site,
        write: Site,
        W_skip: Float[Tensor, "_ _"] | None = None,
        norm: TokenNorm | None = None,
    ) -> None:
        super().__init__()
        if not (W_enc.shape[1] == len(b_enc) == len(W_dec) and W_dec.shape[1] == len(b_dec)):
            shapes = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
            raise DictionaryError(
                "The weights disagree: expected W_enc [d_in, feature], b_enc [feature], W_dec [feature, d_out], "
                f"b_dec [d_out]; got {', '.join(f'{name} {list(w.shape)}' for name, w in shapes.items())}."
            )
        if W_skip is not None and W_skip.shape != (len(W_enc), len(b_dec)):
            raise DictionaryError(
                f"W_skip must be [d_in, d_out] = {[len(W_enc), len(b_dec)]}; got {list(W_skip.shape)}."
            )
        activation.require(len(b_enc))
        self.W_enc, self.b_enc = nn.Parameter(W_enc), nn.Parameter(b_enc)
        self.W_dec, self.b_dec = nn.Parameter(W_dec), nn.Parameter(b_dec)
        self.W_skip = None if W_skip is None else nn.Parameter(W_skip)
        self.activation = activation
        self.read = read
        self.writes = (write,)
        self.norm = norm

    @classmethod
    def from_pretrained(cls: type[Kind], release: str | Path, sae_id: str | None = None, **how: Any) -> Kind:
        """`load_dictionaries(release, sae_id=sae_id, **how)`, of which it is the only one: SAELens' name for it.

        Raises `DictionaryError` where there are several, and for a dictionary of another kind.
        """
        return load_one(cls, release, sae_id, how)

    @property
    def n_features(self) -> int:
        return self.W_enc.shape[1]

    @property
    def d_in(self) -> int:
        return self.W_enc.shape[0]

    @property
    def d_out(self) -> int:
        return self.W_dec.shape[1]

    @property
    def is_absent(self) -> bool:
        """Whether it stands for no dictionary: it has no features, no skip term, and writes nothing."""
        return self.n_features == 0 and self.W_skip is None and not bool(self.b_dec.any())

    @property
    def encoder_bias(self) -> Float[Tensor, "feature"]:
        """The constant of the pre-activations."""
        return self.b_enc

    def pre_activations(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch feature"]:
        return self._normed(x) @ self.W_enc + self.encoder_bias

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch feature"]:
        return self.activation(self.pre_activations(x))

    def decode(
        self, a: Float[Tensor, "*batch feature"], x: Float[Tensor, "*batch d_in"] | None = None
    ) -> Float[Tensor, "*batch d_out"]:
        """`a W_dec + b_dec`; a dictionary with a skip term or a norm needs its input `x` too."""
        return self.finished(a @ self.W_dec + self.b_dec, x)

    def finished(
        self, y: Float[Tensor, "*batch d_out"], x: Float[Tensor, "*batch d_in"] | None
    ) -> Float[Tensor, "*batch d_out"]:
        """What is written, of what the features and b_dec sum up to: with the skip term, in the model's units."""
        norm = self.norm if self.norm is not None and self.norm.is_undone else None
        if self.W_skip is None and norm is None:
            return y
        if x is None:
            what = "skip term" if norm is None else "norm"
            raise DictionaryError(
                f"The dictionary of {self.read} has a {what} and needs its input: decode(a, x), "
                "reconstruct(features, reads)."
            )
        if self.W_skip is not None:
            y = y + (x if norm is None else norm(x)) @ self.W_skip
        return y if norm is None else norm.inverse(y, x)

    def _normed(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        return x if self.norm is None else self.norm(x)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        return self.decode(self.encode(x), x)

    def extra_repr(self) -> str:
        return f"{self.read} → {self.writes[0]}, features={self.n_features}"


class SAE(SparseDictionary):
    """A sparse autoencoder: reads and writes the same site: `y = a W_dec + b_dec (+ x W_skip)`.

    With `centred`, the encoder reads `x − b_dec`: `h = (x − b_dec) W_enc + b_enc`; a skip term reads x itself.
    """

    def __init__(
        self,
        *,
        W_enc: Float[Tensor, "_ _"],
        b_enc: Float[Tensor, "_"],
        W_dec: Float[Tensor, "_ _"],
        b_dec: Float[Tensor, "_"],
        activation: Activation,
        site: Site,
        centred: bool = False,
        W_skip: Float[Tensor, "_ _"] | None = None,
        norm: TokenNorm | None = None,
    ) -> None:
        super().__init__(
            W_enc=W_enc, b_enc=b_enc, W_dec=W_dec, b_dec=b_dec, activation=activation, read=site, write=site,
            W_skip=W_skip, norm=norm,
        )  # fmt: skip
        self.centred = centred

    @classmethod
    def absent(cls, layer: int, d_model: int, site: SiteKind, dtype: torch.dtype = torch.float32) -> "SAE":
        """What stands for the SAE of a layer that has none: no features, and zeros for a reconstruction."""
        return cls(**_nothing(d_model, dtype), activation=ReLU(), site=Site(layer, site)).requires_grad_(False)

    @property
    def encoder_bias(self) -> Float[Tensor, "feature"]:
        return self.b_enc - self.b_dec @ self.W_enc if self.centred else self.b_enc


class Transcoder(SparseDictionary):
    """Reads what an MLP reads and writes what it writes: `y = a W_dec + b_dec (+ x W_skip)`.

    Its input is never centred: `b_dec` is a vector of the output.

    Source: Dunefsky et al. 2024, *Transcoders Find Interpretable LLM Feature Circuits*; the skip form is
    Paulo et al. 2025, *Transcoders Beat Sparse Autoencoders for Interpretability*.
    """

    def __init__(
        self,
        *,
        W_enc: Float[Tensor, "_ _"],
        b_enc: Float[Tensor, "_"],
        W_dec: Float[Tensor, "_ _"],
        b_dec: Float[Tensor, "_"],
        activation: Activation,
        read: Site,
        write: Site,
        W_skip: Float[Tensor, "_ _"] | None = None,
        norm: TokenNorm | None = None,
    ) -> None:
        super().__init__(
            W_enc=W_enc, b_enc=b_enc, W_dec=W_dec, b_dec=b_dec, activation=activation, read=read, write=write,
            W_skip=W_skip, norm=norm,
        )  # fmt: skip

    @classmethod
    def absent(
        cls,
        layer: int,
        d_model: int,
        read: SiteKind = "mlp_in",
        write: SiteKind = "mlp_out",
        dtype: torch.dtype = torch.float32,
    ) -> "Transcoder":
        """What stands for the transcoder of a layer that has none: no features; all that the MLP writes is error."""
        return cls(
            **_nothing(d_model, dtype), activation=ReLU(), read=Site(layer, read), write=Site(layer, write)
        ).requires_grad_(False)


class _Weights(TypedDict):
    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor


def _nothing(d_model: int, dtype: torch.dtype) -> _Weights:
    """The weights of a dictionary without features."""

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    return {"W_enc": zeros(d_model, 0), "b_enc": zeros(0), "W_dec": zeros(0, d_model), "b_dec": zeros(d_model)}
