"""What to train: one frozen dataclass for each kind, the same for Python, the command line and the saved file.

Nothing here imports torch.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, get_args

from transcoders.errors import InputError
from transcoders.sites import SiteKind

ActivationName = Literal["relu", "gated", "jumprelu", "topk", "batchtopk"]
PenaltyName = Literal["default", "l1", "unit_l1", "p_anneal", "tanh", "l0"]
Remedy = Literal["default", "auxiliary", "ghost", "resample", "none"]
AuxPooling = Literal["batch", "token", "none"]
MatryoshkaLoss = Literal["mean", "sum"]
DecoderNorms = Literal["default", "unit", "free"]
Documents = Literal["packed", "masked", "separate"]
LogTo = Literal["none", "tensorboard", "wandb"]
Parallel = Literal["data", "layers", "features"]
_CHOICES: dict[str, Any] = {
    "activation": ActivationName, "documents": Documents, "decoders": DecoderNorms, "parallel": Parallel,
    "remedy": Remedy, "aux_pooling": AuxPooling, "matryoshka_loss": MatryoshkaLoss,
}  # fmt: skip

PENALTIES: dict[str, tuple[PenaltyName, ...]] = {
    "relu": ("l1", "unit_l1", "p_anneal"),
    "gated": ("unit_l1", "l1"),
    "jumprelu": ("tanh", "l0"),
    "topk": (),
    "batchtopk": (),
}
"""The penalties an activation can be trained with, the default first."""

_RATE, _RATE_FEATURES, _RATE_FALL = 8e-3, 512, 0.7
"""The default learning rate, the largest number of features that it is for, and the power with which it falls beyond:
at 2,048 features 8e-3 leaves most latents of a skip transcoder of SmolLM2 dead."""

_DEAD_AFTER = 100_000
"""Tokens, where latents are not resampled."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings common to all kinds."""

    kind: ClassVar[str]

    features: int = 4096
    """Features per layer."""
    activation: ActivationName = "jumprelu"
    """`relu`, `gated`, `jumprelu`: a penalty makes them sparse. `topk`, `batchtopk`: k features, no penalty."""
    k: int = 32
    """TopK and BatchTopK: active features per token (of a cross-layer transcoder: of all layers together)."""
    k_start: float = 1.0
    """TopK and BatchTopK: first k, in multiples of the last, to which it falls over `sparsity_warmup` of the steps."""
    penalty: PenaltyName = "default"
    """`l1`: Σ a‖W_dec‖. `unit_l1`: Σ a with unit decoders. `p_anneal`: Σ (a‖W_dec‖)^p. `tanh`, `l0`: JumpReLU's."""
    sparsity: float = 5e-3
    """Weight of the penalty, in fraction of variance per active feature and layer; where `target_l0` starts from."""
    sparsity_warmup: float = 0.5
    """Fraction of the steps over which the penalty rises linearly to its weight, or L0 falls to `target_l0`."""
    target_l0: float | None = None
    """Active features per token and layer that the penalty's weight is steered to; None for a weight that is given."""
    tanh_scale: float = 8.0
    """`tanh` only: c in `tanh(c · a‖W_dec‖ / √d)`."""
    bandwidth: float = 0.3
    """JumpReLU only: width of the rectangle through which the reconstruction reaches the thresholds."""
    penalty_bandwidth: float | None = None
    """`l0` only: width of the rectangle through which the penalty reaches the thresholds; None for `bandwidth`."""
    threshold: float = 0.1
    """JumpReLU only: first value of the thresholds; the inputs have mean square one."""
    threshold_rate: float | None = None
    """JumpReLU only: learning rate of the thresholds, in multiples of `lr`; None for 3 with `target_l0`, else 1."""
    p_end: float = 0.2
    """`p_anneal` only: last value of p, which starts at one."""
    p_start: float = 0.3
    """`p_anneal` only: fraction of the steps after which p begins to fall."""
    matryoshka: tuple[float, ...] = ()
    """Shares of the features, rising to 1, whose prefixes must each reconstruct; empty for the whole alone."""
    matryoshka_loss: MatryoshkaLoss = "mean"
    """Of the prefixes' losses. `sum` (Bussmann et al. 2025, eq. 6): n prefixes weigh n times as much beside penalty and
    revival, as if `sparsity` and `revival` were an n-th; Adam's steps do not grow (but for `clip`), so `lr` stays."""
    aligned: bool = False
    """Whether `encoder · decoder = 1` holds for every feature all the way."""
    tokens: int = 10_000_000
    """Tokens to train on; a shorter corpus is read again."""
    batch: int = 512
    """Tokens per step."""
    lr: float | None = None
    """Peak learning rate of Adam; None for 8e-3 up to 512 features, and falling as features^-0.7 beyond."""
    warmup: float = 0.05
    """Fraction of the steps over which the learning rate rises linearly to its peak."""
    decay: float = 0.3
    """Fraction of the steps, at the end, over which the learning rate falls linearly to zero."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Adam's moment decays."""
    clip: float = 1.0
    """Largest norm of the gradient, of each layer by itself (a cross-layer transcoder: of all); 0 for no limit."""
    ema: float = 0.0
    """Decay per step of the running mean of the weights that is handed out; 0 for the last weights."""
    decoder_init: Literal["default", "transpose", "random"] = "default"
    """First decoders: the encoder's transpose (an SAE's default), or directions of their own."""
    decoder_norm: float | None = None
    """Norm of the first decoders; None for a tenth (transcoders), or what makes the first outputs inputs (SAEs)."""
    encoder_scale: float | None = None
    """Norm of the first encoders; None for one."""
    decoders: DecoderNorms = "default"
    """`unit`: kept at norm one. `free`: of whatever norm they come to, as in training that starts from dictionaries.
    `default`: `unit` where features are ranked or the penalty sees activations only."""
    bias_init: Literal["mean", "median", "zero"] = "mean"
    """First b_dec: the mean of the targets, their geometric median, or zero."""
    start_l0: float | None = None
    """Encoder biases such that this many features of a layer are active at first; None for four times `target_l0`
    where there is one, else for centred pre-activations."""
    normalise: Literal["layer", "none"] = "layer"
    """`layer`: each layer's activations are brought to variance one by a factor, which is recorded and folded in."""
    remedy: Remedy = "default"
    """For dead latents. `auxiliary`: AuxK for TopK, a pull on pre-activations otherwise. `ghost`: ghost gradients.
    `resample`: new directions. `default`: `resample` for TopK and BatchTopK but of a CLT, else `auxiliary`."""
    dead_after: int | None = None
    """A latent that fired on none of this many tokens counts as dead; None for 100,000, with `resample` for a hundredth
    of all, at least 4 batches."""
    revival: float = 1 / 32
    """`auxiliary` only: weight of the loss that revives dead latents."""
    k_aux: int = 64
    """`auxiliary`, TopK only: dead latents per layer and token that predict the residual; 0 for the choice of Gao et
    al. 2024, a power of two near half the model's width."""
    aux_pooling: AuxPooling = "batch"
    """`auxiliary`, TopK only: the residual left, as a share of the batch's residual (the code of Gao et al. 2024), of
    each token's (`token`), or of the variance (`none`; their equation)."""
    resample_every: int | None = None
    """`resample` only: steps between replacements, none while the learning rate falls; None for a fortieth of all."""
    precision: Literal["float32", "bf16"] = "float32"
    """Of matrix products; weights, thresholds and sums stay in float32."""
    kernels: Literal["auto", "dense", "sparse"] = "auto"
    """Whether only active features are touched; `auto`: where so few are active that it is faster, on a GPU with TopK
    and BatchTopK alone."""
    layers_at_once: int | None = None
    """SAEs and transcoders: layers that take a step together, the others' gradients needing no memory meanwhile; None
    for as many as fit 64 MB on a CPU, 2 GB on a GPU. The result is the same."""
    parallel: Parallel = "data"
    """What the processes of `torchrun` share out: the tokens of a batch, the layers (SAEs, transcoders), or each
    layer's features. The result is the same; a single process does it all."""
    compile: bool = False
    """Whether the loss goes through torch.compile; needs a C++ compiler, and that ranks share nothing but layers."""
    context: int = 128
    """Tokens per row of text."""
    documents: Documents = "packed"
    """`packed`: rows are cut from the documents end to end. `masked`: so too, but each document begins anew, and none
    sees another. `separate`: a document a row, longer ones over several; short rows take computation."""
    separator: str | None = None
    """Text between documents; None for what the corpus has there: a blank line, or the model's end-of-text token."""
    bos: bool | None = None
    """Whether each row begins with the beginning-of-text token; None for what the model's own tokenizer does."""
    first: int = 1
    """Positions left out at the start of every row: attention sinks, whose activations are like no others."""
    outliers: float = 20.0
    """A token is left out too where the norm of its activations at a site is more than this many times the site's
    median (massive activations); 0 for none."""
    buffer_mb: int = 512
    """Memory for the activations that are shuffled together; at least a batch is."""
    seed: int = 0
    """Of the first weights and of the order of the data."""
    checkpoint_every: int = 1000
    """Steps between checkpoints, where an output folder is given."""
    keep_last: int = 2
    """Checkpoints that stay, the latest ones; each takes three times the memory of the weights."""
    keep_best: bool = False
    """Whether the best checkpoint stays as well: of least FVU, or of least loss where a penalty's weight is given."""
    log_every: int = 100
    """Steps between lines of metrics."""
    log_to: LogTo = "none"
    """Where the metrics go besides `metrics.jsonl`; its package is optional, and an output folder is needed."""

    def __post_init__(self) -> None:
        for name in (
            "features", "k", "tokens", "batch", "context", "checkpoint_every", "keep_last", "log_every",
            "resample_every", "dead_after", "layers_at_once",
        ):  # fmt: skip
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1; got {getattr(self, name)}.")
        for name in ("warmup", "decay", "sparsity_warmup", "p_start"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is a fraction of the steps, from 0 to 1; got {getattr(self, name)}.")
        for name in (
            "bandwidth", "penalty_bandwidth", "threshold_rate", "target_l0", "start_l0", "decoder_norm",
            "encoder_scale", "lr",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise InputError(f"{name} must be positive; got {value}.")
        for name in ("first", "k_aux"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} must be at least 0; got {getattr(self, name)}.")
        if self.outliers and not self.outliers > 1:
            raise InputError(
                f"outliers is how many times the median norm is too much, above 1, or 0 for none; got {self.outliers}."
            )
        if self.keep_best and self.log_every > self.checkpoint_every:
            raise InputError(
                f"keep_best compares checkpoints by what was logged since the one before, so log_every must be at most "
                f"checkpoint_every ({self.checkpoint_every}); got {self.log_every}."
            )
        if self.k_start < 1:
            raise InputError(f"k_start is at least 1, as k only falls; got {self.k_start}.")
        for name in ("target_l0", "start_l0"):
            if (getattr(self, name) or 0) >= self.features:
                raise InputError(f"{name} must be below the {self.features} features; got {getattr(self, name)}.")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in get_args(choices):
                raise InputError(f"{name} cannot be {getattr(self, name)!r}; there are {', '.join(get_args(choices))}.")
        if not 0 < self.p_end <= 1:
            raise InputError(f"p_end must be above 0 and at most 1; got {self.p_end}.")
        if not 0 <= self.ema < 1:
            raise InputError(f"ema must be from 0 to below 1; got {self.ema}.")
        self._check_combination()

    def _check_combination(self) -> None:
        allowed = PENALTIES[self.activation]
        if self.penalty != "default" and self.penalty not in allowed:
            raise InputError(
                f"The activation {self.activation!r} has no penalty {self.penalty!r}; "
                f"it goes with {', '.join(map(repr, ('default', *allowed)))}."
            )
        if self.target_l0 is not None and not allowed:
            raise InputError(
                f"target_l0 steers a penalty, and {self.activation!r} has none; set k = {self.target_l0:g}."
            )
        if self.aligned and self.activation == "gated":
            raise InputError("aligned has no meaning for 'gated', which has two encoders; choose another activation.")
        if self.matryoshka and (list(self.matryoshka) != sorted(set(self.matryoshka)) or self.matryoshka[-1] != 1):
            raise InputError(f"matryoshka must rise to 1, as in (0.125, 0.5, 1.0); got {self.matryoshka}.")
        if self.matryoshka and self.matryoshka[0] * self.features < 1:
            raise InputError(
                f"The first matryoshka share, {self.matryoshka[0]}, holds none of {self.features} features."
            )

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return max(1, self.tokens // self.batch)

    @property
    def lr_used(self) -> float:
        """The peak learning rate, with the one for this many features where none was chosen."""
        return _RATE * min(1.0, (_RATE_FEATURES / self.features) ** _RATE_FALL) if self.lr is None else self.lr

    @property
    def remedy_used(self) -> Remedy:
        """The remedy for dead latents, with the kind's own where none was chosen."""
        if self.remedy != "default":
            return self.remedy
        return "resample" if self.ranks and self.kind != "clt" else "auxiliary"

    @property
    def dead_after_used(self) -> int:
        """Tokens after which a latent that did not fire counts as dead."""
        if self.dead_after is not None:
            return self.dead_after
        return max(self.tokens // 100, 4 * self.batch) if self.remedy_used == "resample" else _DEAD_AFTER

    @property
    def resample_every_used(self) -> int:
        """Steps between replacements of dead latents."""
        return max(1, self.steps // 40) if self.resample_every is None else self.resample_every

    @property
    def penalty_used(self) -> PenaltyName | None:
        """The penalty, with the activation's own where none was chosen; None for TopK and BatchTopK."""
        allowed = PENALTIES[self.activation]
        return (allowed[0] if allowed else None) if self.penalty == "default" else self.penalty

    @property
    def ranks(self) -> bool:
        """Whether features are chosen by the size of their activation."""
        return self.activation in ("topk", "batchtopk")

    @property
    def unit_decoders(self) -> bool:
        """Whether decoders are kept at norm one: where features are ranked, or the penalty sees activations only."""
        if self.decoders != "default":
            return self.decoders == "unit"
        return self.ranks or self.penalty_used == "unit_l1"

    @property
    def margin(self) -> float:
        """How far below its threshold a feature still has a gradient: half the wider of the two kernels."""
        return max(self.bandwidth, self.penalty_bandwidth or 0.0) / 2

    @property
    def prefixes(self) -> tuple[int, ...]:
        """Numbers of features that must reconstruct by themselves, the last one all of them."""
        return tuple(round(share * self.features) for share in self.matryoshka) or (self.features,)

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class SAEConfig(TrainConfig):
    """A sparse autoencoder for one site of every layer."""

    kind: ClassVar[str] = "sae"

    site: SiteKind = "resid_post"
    """What is read and reconstructed."""
    centred: bool = True
    """Whether the encoder reads `x − b_dec`."""
    side_by_side: int = 1
    """Sites whose vectors stand side by side in what is read, as in a crosscoder: a decoder's norm is the sum of
    theirs, over √sites, wherever it counts."""


@dataclass(frozen=True, kw_only=True)
class MLPSettings:
    """Settings of what stands for the MLPs."""

    skip: bool = False
    """Whether a linear map of a layer's input, `W_skip`, is added to its output."""
    skip_rank: int | None = None
    """Rank of `W_skip`; None for full."""
    skip_penalty: float = 0.0
    """Weight of `‖W_skip‖² / d`, which keeps small what goes past the features; the activations have variance one."""
    derivative: float = 0.0
    """Weight of the relative squared error of what is passed on of small changes, `‖Ĵ v − J v‖² / ‖J v‖²`."""
    derivative_share: float = 0.25
    """Tokens of a step on which changes are compared, as a share of the batch; of a row of text at least."""
    derivative_from: float = 0.5
    """Fraction of the steps before the first that compares changes."""
    derivative_along: float = 0.0
    """Extra weight of the error along J v, `(1 − Ĵ v · J v / ‖J v‖²)²`: what misses least in the square is shorter than
    J v by its cosine, and over a chain of layers that multiplies."""


@dataclass(frozen=True, kw_only=True)
class MLPConfig(MLPSettings, TrainConfig):
    """What stands for the MLPs: transcoders and cross-layer transcoders."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("derivative_share", "derivative_from"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is a fraction, from 0 to 1; got {getattr(self, name)}.")
        for name in ("derivative", "derivative_along", "skip_penalty"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} must be at least 0; got {getattr(self, name)}.")
        for name in ("skip_penalty", "skip_rank"):
            if getattr(self, name) and not self.skip:
                raise InputError(f"{name} is for a skip term, and there is none; give skip=True (--skip) as well.")
        if self.skip_rank is not None and self.skip_rank < 1:
            raise InputError(f"skip_rank must be at least 1; got {self.skip_rank}.")


@dataclass(frozen=True, kw_only=True)
class TranscoderConfig(MLPConfig):
    """A transcoder for every MLP."""

    kind: ClassVar[str] = "plt"


@dataclass(frozen=True, kw_only=True)
class CLTConfig(MLPConfig):
    """A cross-layer transcoder for all MLPs."""

    kind: ClassVar[str] = "clt"

    decoder_rank: int | None = None
    """Directions through which a layer's features write to later layers; None for a decoder for each pair of layers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decoder_rank is not None and (self.decoder_rank < 1 or self.remedy == "resample"):
            got = f"got {self.decoder_rank} with remedy={self.remedy!r}"
            raise InputError(f"decoder_rank must be at least 1, and goes with any remedy but 'resample'; {got}.")
        if self.parallel == "layers":
            raise InputError(
                "parallel='layers' is for layers that know nothing of each other, which those of a cross-layer "
                "transcoder do; give 'data' or 'features'."
            )


def compares_at(config: TrainConfig, step: int) -> bool:
    """Whether a step has the derivative in its loss."""
    return isinstance(config, MLPConfig) and config.derivative > 0 and step >= config.derivative_from * config.steps


_SHARED = ("tokens", "batch", "context", "documents", "separator", "bos", "first", "outliers", "parallel")
"""Settings of the stream, which all dictionaries trained on it have in common."""


def require_configs(configs: Sequence[TrainConfig]) -> None:
    """Raises `InputError` where there is none, or they cannot be trained on one stream."""
    if not configs:
        raise InputError("There is nothing to train; give at least one configuration.")
    for name in _SHARED:
        values = {getattr(config, name) for config in configs}
        if len(values) > 1:
            raise InputError(
                f"Dictionaries trained on one stream share their {name}; got {sorted(map(repr, values))}. "
                "Give them one value, or train them one after the other."
            )
