"""What to train: one frozen dataclass for each kind, the same for Python, the command line and the saved file.

Nothing here imports torch.
"""

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal, get_args, get_origin

from transcoders.errors import InputError
from transcoders.sites import SiteKind

ActivationName = Literal["relu", "jumprelu", "topk"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings common to all kinds."""

    kind: ClassVar[str]

    features: int = 4096
    """Features per layer."""
    activation: ActivationName = "jumprelu"
    """`relu`: L1 penalty. `jumprelu`: tanh penalty and learned thresholds. `topk`: exactly k features, no penalty."""
    k: int = 32
    """TopK only: active features per token (of a cross-layer transcoder: of all layers together)."""
    sparsity: float = 5e-3
    """Weight of the sparsity penalty, in fraction of variance per active feature and layer. No effect on TopK."""
    sparsity_warmup: float = 0.5
    """Fraction of the steps over which the penalty rises linearly to its weight."""
    tanh_scale: float = 8.0
    """JumpReLU only: c in `tanh(c · a‖W_dec‖ / √d)`."""
    bandwidth: float = 0.3
    """JumpReLU only: width of the rectangle through which thresholds get their gradient."""
    threshold: float = 0.1
    """JumpReLU only: first value of the thresholds; the inputs have mean square one."""
    tokens: int = 10_000_000
    """Tokens to train on; a shorter corpus is read again."""
    batch: int = 512
    """Tokens per step."""
    lr: float = 2e-3
    """Peak learning rate of Adam."""
    warmup: float = 0.05
    """Fraction of the steps over which the learning rate rises linearly to its peak."""
    decay: float = 0.3
    """Fraction of the steps, at the end, over which the learning rate falls linearly to zero."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Adam's moment decays."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    dead_after: int = 100_000
    """A latent that fired on none of this many tokens counts as dead."""
    revival: float = 1 / 32
    """Weight of the loss that revives dead latents: AuxK for TopK, a pull on their pre-activations otherwise."""
    k_aux: int = 64
    """TopK only: dead latents per layer and token that predict the residual."""
    context: int = 128
    """Tokens per row of text."""
    separator: str | None = None
    """Text between documents; None for what the corpus has there: a blank line, or the model's end-of-text token."""
    buffer_mb: int = 512
    """Memory for the activations that are shuffled together."""
    seed: int = 0
    """Of the first weights and of the order of the data."""
    checkpoint_every: int = 1000
    """Steps between checkpoints, where an output folder is given."""
    log_every: int = 100
    """Steps between lines of metrics."""

    def __post_init__(self) -> None:
        for name in ("features", "k", "tokens", "batch", "context", "checkpoint_every", "log_every", "k_aux"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1; got {getattr(self, name)}.")
        for name in ("warmup", "decay", "sparsity_warmup"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is a fraction of the steps, from 0 to 1; got {getattr(self, name)}.")
        _as(ActivationName, "activation", self.activation)
        if self.bandwidth <= 0:
            raise InputError(f"bandwidth must be positive; got {self.bandwidth}.")

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return max(1, self.tokens // self.batch)

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class SAEConfig(TrainConfig):
    """A sparse autoencoder for one site of every layer."""

    kind: ClassVar[str] = "sae"

    site: SiteKind = "resid_post"
    """What is read and reconstructed."""


@dataclass(frozen=True, kw_only=True)
class TranscoderConfig(TrainConfig):
    """A transcoder for every MLP."""

    kind: ClassVar[str] = "plt"

    skip: bool = False
    """Whether a linear map of the input is added to the output."""


@dataclass(frozen=True, kw_only=True)
class CLTConfig(TrainConfig):
    """A cross-layer transcoder for all MLPs."""

    kind: ClassVar[str] = "clt"

    skip: bool = False
    """Whether a linear map of each layer's input is added to its output."""


_KINDS: dict[str, type[TrainConfig]] = {c.kind: c for c in (SAEConfig, TranscoderConfig, CLTConfig)}


def config_from_json(record: Mapping[str, Any]) -> TrainConfig:
    """The configuration that `to_json` wrote, or a user did; `InputError` for what it cannot mean."""
    settings = dict(record)
    kind = settings.pop("kind", None)
    if kind not in _KINDS:
        raise InputError(f"Unknown kind of dictionary {kind!r}; there are {', '.join(map(repr, _KINDS))}.")
    hints = {field.name: field.type for field in fields(_KINDS[kind])}
    for key in settings:
        if key not in hints:
            close = difflib.get_close_matches(key, list(hints), n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"the settings are {', '.join(hints)}."
            raise InputError(f"A configuration of kind {kind!r} has no setting {key!r}; {hint}")
    return _KINDS[kind](**{key: _as(hints[key], key, value) for key, value in settings.items()})


def _as(hint: Any, key: str, value: Any) -> Any:
    """A value from JSON as a field has it: lists become tuples and integers floats where the field says so."""
    if get_origin(hint) is tuple:
        return tuple(value)
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise InputError(f"{key} cannot be {value!r}; there are {', '.join(map(repr, get_args(hint)))}.")
        return value
    if hint is float and isinstance(value, int):
        return float(value)
    if isinstance(hint, type) and not isinstance(value, hint):
        raise InputError(f"{key} must be of type {hint.__name__}; got {value!r}.")
    return value
