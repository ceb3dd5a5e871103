"""One dictionary of one layer: the SAE and the transcoder."""

from jaxtyping import Float
from torch import Tensor, nn

from transcoders.dictionaries.activations import Activation
from transcoders.dictionaries.token_norm import TokenNorm
from transcoders.errors import DictionaryError
from transcoders.sites import Site


class SparseDictionary(nn.Module):
    """Encoder `h = x W_enc + b_enc`, activation `a = σ(h)`, decoder `y = a W_dec + b_dec`.

    With a `norm`, the encoder sees `norm(x)`, and y is taken back to the units of x unless the norm is one `_in` only.
    """

    W_enc: Float[Tensor, "d_in feature"]
    b_enc: Float[Tensor, "feature"]
    W_dec: Float[Tensor, "feature d_out"]
    b_dec: Float[Tensor, "d_out"]

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
        norm: TokenNorm | None = None,
    ) -> None:
        super().__init__()
        if not (W_enc.shape[1] == len(b_enc) == len(W_dec) and W_dec.shape[1] == len(b_dec)):
            shapes = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
            raise DictionaryError(
                "The weights disagree: expected W_enc [d_in, feature], b_enc [feature], W_dec [feature, d_out], "
                f"b_dec [d_out]; got {', '.join(f'{name} {list(w.shape)}' for name, w in shapes.items())}."
            )
        self.W_enc, self.b_enc = nn.Parameter(W_enc), nn.Parameter(b_enc)
        self.W_dec, self.b_dec = nn.Parameter(W_dec), nn.Parameter(b_dec)
        self.activation = activation
        self.read = read
        self.writes = (write,)
        self.norm = norm

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
        W_skip = getattr(self, "W_skip", None)
        norm = self.norm if self.norm is not None and self.norm.is_undone else None
        if W_skip is None and norm is None:
            return y
        if x is None:
            what = "skip term" if norm is None else "norm"
            raise DictionaryError(
                f"The dictionary of {self.read} has a {what} and needs its input: decode(a, x), "
                "reconstruct(features, reads)."
            )
        if W_skip is not None:
            y = y + (x if norm is None else norm(x)) @ W_skip
        return y if norm is None else norm.inverse(y, x)

    def _normed(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        return x if self.norm is None else self.norm(x)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        return self.decode(self.encode(x), x)

    def extra_repr(self) -> str:
        return f"{self.read} → {self.writes[0]}, features={self.n_features}"


class SAE(SparseDictionary):
    """A sparse autoencoder: reads and writes the same site.

    With `centred`, the encoder reads `x − b_dec`: `h = (x − b_dec) W_enc + b_enc`.
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
        norm: TokenNorm | None = None,
    ) -> None:
        super().__init__(
            W_enc=W_enc, b_enc=b_enc, W_dec=W_dec, b_dec=b_dec, activation=activation, read=site, write=site, norm=norm
        )
        self.centred = centred

    @property
    def encoder_bias(self) -> Float[Tensor, "feature"]:
        return self.b_enc - self.b_dec @ self.W_enc if self.centred else self.b_enc


class Transcoder(SparseDictionary):
    """Reads what an MLP reads and writes what it writes: `y = a W_dec + b_dec (+ x W_skip)`.

    Its input is never centred: `b_dec` is a vector of the output.

    Source: Dunefsky et al. 2024, *Transcoders Find Interpretable LLM Feature Circuits*; the skip form is
    Paulo et al. 2025, *Transcoders Beat Sparse Autoencoders for Interpretability*.
    """

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
        super().__init__(
            W_enc=W_enc, b_enc=b_enc, W_dec=W_dec, b_dec=b_dec, activation=activation, read=read, write=write, norm=norm
        )
        if W_skip is not None and W_skip.shape != (self.d_in, self.d_out):
            raise DictionaryError(
                f"W_skip must be [d_in, d_out] = {[self.d_in, self.d_out]}; got {list(W_skip.shape)}."
            )
        self.W_skip = None if W_skip is None else nn.Parameter(W_skip)
