"""Layers that are trained together: views of a run's weights, an optimizer of their own, the kernels that suit them.

The layers of a per-layer kind know nothing of each other, so they can take their steps some at a time: gradients and
activations of the others need no memory meanwhile. A cross-layer transcoder is one part.
"""

import itertools
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from transcoders.devices import line_of
from transcoders.dictionaries import JumpReLU
from transcoders.kernels import host
from transcoders.training.activations import BatchTopK
from transcoders.training.codes import Code, DenseCode, SparseCode
from transcoders.training.config import MLPConfig, TrainConfig
from transcoders.training.derivative import Directions, derivative_loss
from transcoders.training.losses import Losses, losses
from transcoders.training.parameters import TrainingParameters
from transcoders.training.revival import DeadCounter, resample
from transcoders.training.sparsity import learning_rate
from transcoders.training.split import WHOLE, Split

_MEASURE_EVERY = 20
"""Steps between measurements of the density."""
_AT_ONCE = {"cpu": 2**26, "cuda": 2**31}
"""Bytes of gradients and activations that the layers of one part may take together."""
CODES = 3
"""Tensors of the size of all pre-activations that a step holds."""


class Part:
    """Some layers of a dictionary in training; the loss of each is its own, and so is the norm that is clipped."""

    def __init__(
        self,
        config: TrainConfig,
        weights: TrainingParameters,
        counter: DeadCounter,
        first: int,
        *,
        alone: bool,
        split: Split = WHOLE,
        before: int = 0,
    ) -> None:
        """`weights`: views of layers from `first` on. `alone`: whether they are all; if not, gradients are freed.

        `split`: what of them is with this rank; `before`: layers of the ranks before it.
        """
        self.config, self.weights, self.counter, self.split, self.before = config, weights, counter, split, before
        self.layers, self.alone = slice(first, first + weights.n_layers), alone
        self.optimizer = torch.optim.Adam(_groups(config, weights), lr=config.lr_used, betas=config.betas, fused=True)
        self.kernels = line_of(weights.W_enc.device)
        """From which width and below which density sparse kernels are faster on this device."""
        self.sparse = self._sparse_at_first()
        self.finite = torch.ones((), dtype=torch.bool, device=weights.W_enc.device)
        """Whether the last step's loss and gradient were finite; not read each step, as a device would have to wait."""
        self._losses = torch.compile(losses) if config.compile else losses

    def step(
        self,
        step: int,
        x: Float[Tensor, "layer batch d_model"],
        y: Float[Tensor, "layer batch d_model"],
        *,
        sparsity_weight: float | Float[Tensor, ""],
        p: float,
        directions: Directions | None = None,
    ) -> Losses:
        """One optimizer step on normalised activations, and changes of these where they are compared."""
        config, weights, split = self.config, self.weights, self.split
        revived = config.remedy_used in ("auxiliary", "ghost") and self.counter.any(split.features)
        compute = losses if self.sparse else self._losses
        result = compute(
            weights,
            x,
            y,
            config,
            sparsity_weight=sparsity_weight,
            dead=self.counter.dead if revived else None,
            p=p,
            sparse=self.sparse,
            split=split,
        )
        if directions is not None:
            result = self._with_derivative(result, directions)
        self.optimizer.zero_grad()
        # The losses of layers that know nothing of each other are summed, so that each has the gradient it has alone.
        (result.total if config.kind == "clt" else result.total * weights.n_layers).backward()
        self._add_up_gradients()
        weights.project_gradients()
        self.finite = result.total.detach().isfinite()
        if config.clip:
            self.finite = self.finite & self._clip()
        for group in self.optimizer.param_groups:
            group["lr"] = group["factor"] * learning_rate(config, step)
        self.optimizer.step()
        weights.constrain()
        if isinstance(weights.activation, BatchTopK):
            weights.activation.observe(split.competing.least(result.code.smallest()))
        tokens = x.shape[1] if split.tokens.size == 1 else config.batch
        self.counter.update(split.tokens.any(result.code.fired()), tokens=tokens)
        self._choose_kernels(step, result.code, x.shape[1])
        if config.remedy_used == "resample":
            self._resample(step, x, result)
        if not self.alone:
            self.optimizer.zero_grad()
        return result

    def _with_derivative(self, result: Losses, directions: Directions) -> Losses:
        """The loss with what is passed on of changes, which ranks that share tokens all have alike."""
        config = self.config
        assert isinstance(config, MLPConfig)
        found = derivative_loss(self.weights, directions, config, sparse=self.sparse, split=self.split)
        total = result.total + config.derivative / self.split.tokens.size * found.mean()
        return result._replace(total=total, derivative=found.detach())

    def _clip(self) -> Bool[Tensor, ""]:
        """Gradients of norm `clip` at most, a layer's or a cross-layer transcoder's; whether they are finite."""
        if host.queued(self.finite) and all(W.grad is not None for W in self.weights.W_dec):
            return self._clip_at_once()
        gradients = self.weights.gradients()
        norms = [[torch.nn.utils.get_total_norm(side).to(self.finite.device) for side in layer] for layer in gradients]
        own, outputs = torch.stack([torch.stack(pair) for pair in norms]).T
        squares = self.split.features.sum(own.square()) + outputs.square()
        if self.config.kind == "clt":
            squares = squares.sum().expand_as(squares)
        factors = (self.config.clip / (squares.sqrt() + 1e-6)).clamp(max=1)
        for layer, factor in zip(gradients, factors, strict=True):
            for gradient in itertools.chain(*layer):
                gradient.mul_(factor)
        return squares.isfinite().all()

    def _clip_at_once(self) -> Bool[Tensor, ""]:
        """`_clip` with few launches, and a cross-layer transcoder's decoders in one: sums in another order."""
        features, decoders, outputs = self.weights.stacked_gradients()
        own, others = (
            sum(torch.linalg.vector_norm(gradient.flatten(1), dim=1).square() for gradient in side)
            for side in (features, outputs)
        )
        own = own + torch.stack(torch._foreach_norm(decoders)).square()  # pyright: ignore[reportPrivateImportUsage]
        later = [p.grad for p in self.weights.W_later if p.grad is not None]
        if later:  # of all layers together, as their sum alone is asked for
            others = others + torch.nn.utils.get_total_norm(later).square() / len(own)
        squares = self.split.features.sum(own) + others
        if self.config.kind == "clt":
            squares = squares.sum()
        factors = (self.config.clip / (squares.sqrt() + 1e-6)).clamp(max=1)
        if self.config.kind == "clt":
            torch._foreach_mul_([*features, *decoders, *outputs, *later], factors)  # pyright: ignore[reportPrivateImportUsage]
        else:
            for gradient in (*features, *outputs):
                gradient.mul_(factors.view(-1, *(1,) * (gradient.ndim - 1)))
            for gradient, factor in zip(decoders, factors.unbind(), strict=True):
                gradient.mul_(factor)
        return squares.isfinite().all()

    def _add_up_gradients(self) -> None:
        """Those of all tokens; and of what all ranks have alike, one and the same gradient."""
        self.split.tokens.add_up([p.grad for p in self.weights.parameters() if p.grad is not None])
        if (ranks := self.split.features).size > 1:
            of_all = (self.weights.b_dec, self.weights.W_skip, self.weights.W_skip_out)
            outputs = [p.grad for p in of_all if p is not None and p.grad is not None]
            ranks.add_up(outputs)
            for gradient in outputs:
                gradient /= ranks.size
            ranks.add_up([p.grad for p in self.weights.W_later if p.grad is not None])  # each from its own features

    def _sparse_at_first(self) -> bool:
        """The ranked kinds' density is known; of the others all is active at first."""
        config = self.config
        if config.kernels != "auto":
            return config.kernels == "sparse"
        if not config.ranks:
            return False
        layers = self.weights.n_layers if config.kind == "clt" else 1
        wide, density = config.features >= self.kernels.sparse_from, config.k / (layers * config.features)
        return wide and density < self.kernels.sparse_below

    @property
    def _measures(self) -> bool:
        """Whether the density chooses: not on a device, where only those of ranked features wait for nothing."""
        config = self.config
        wide = config.features >= self.kernels.sparse_from
        return config.kernels == "auto" and not config.ranks and wide and not host.queued(self.weights.W_enc)

    def take_kernels(self, sparse: bool) -> None:
        """Those of a checkpoint, which may have been written on another device."""
        self.sparse = sparse if self.config.ranks or self._measures else self._sparse_at_first()

    def _choose_kernels(self, step: int, code: Code, n_tokens: int) -> None:
        config = self.config
        if not self._measures or step % _MEASURE_EVERY:
            return
        density = code.active.density if isinstance(code, SparseCode) else None
        if isinstance(code, DenseCode):
            density = code.density(self.weights, config.margin)
        assert density is not None
        of_features = self.split.features.sum(torch.tensor(density)) / self.split.features.size
        self.sparse = float(self.split.of_batch(of_features, n_tokens, config.batch)) < self.kernels.sparse_below

    def _resample(self, step: int, x: Tensor, result: Losses) -> None:
        config = self.config
        falling = step + 1 >= (1 - config.decay) * config.steps
        dead = self.counter.dead
        split = self.split
        if falling or (step + 1) % config.resample_every_used or not bool(split.features.any(dead.any())):
            return
        renewed = resample(
            self.weights,
            self.optimizer,
            x,
            result.error,
            dead,
            config,
            l0=split.of_batch(split.features.sum(result.code.l0()), x.shape[1], config.batch),
            smallest=split.competing.least(result.code.smallest()),
            seed=config.seed * 1_000_003 + step + (self.before + self.layers.start) * 7_919,
            split=split,
        )
        self.counter.since_fired[renewed] = 0


def layers_at_once(config: TrainConfig, d_model: int, n_layers: int, device: torch.device) -> int:
    """How many layers a part has: what was asked, or as many as fit 64 MB (a GPU: 2 GB), one at least."""
    if config.kind == "clt":
        return n_layers
    if config.layers_at_once is not None:
        return min(config.layers_at_once, n_layers)
    bytes_per_layer = 4 * (2 * config.features * d_model + CODES * config.batch * config.features)
    return max(1, min(n_layers, _AT_ONCE.get(device.type, _AT_ONCE["cuda"]) // bytes_per_layer))


def _groups(config: TrainConfig, weights: TrainingParameters) -> list[dict[str, Any]]:
    """Parameters by their rate: JumpReLU's thresholds have one of their own."""
    thresholds = [weights.activation.threshold] if isinstance(weights.activation, JumpReLU) else []
    others = [p for p in weights.parameters() if all(p is not t for t in thresholds)]
    groups = ((others, 1.0), (thresholds, config.threshold_rate or (1.0 if config.target_l0 is None else 3.0)))
    return [{"params": parameters, "factor": factor} for parameters, factor in groups if parameters]
