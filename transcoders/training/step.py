"""One dictionary in training: its loss, its optimizer, what steers it. It knows nothing of where data come from.

All tensors are normalised: a layer's writes have variance one per coordinate.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from transcoders.dictionaries import DictionaryProvenance, DictionarySet, JumpReLU, TopK
from transcoders.errors import NotFiniteError
from transcoders.sites import Site
from transcoders.training.checkpoint import optimizer_tensors, require_like, restore_optimizer
from transcoders.training.codes import Code, DenseCode, SparseCode
from transcoders.training.config import TrainConfig
from transcoders.training.export import Scales, export
from transcoders.training.initialise import initial_parameters, measure_scales
from transcoders.training.parameters import BatchTopK, Gated, TrainingParameters
from transcoders.training.revival import never_fired, resample, revival_loss
from transcoders.training.sparsity import (
    P_SMALLEST,
    SparsityController,
    exponent,
    falling,
    learning_rate,
    shares,
    sparsity_penalty,
)


class Losses(NamedTuple):
    """The parts of the loss, and what they were computed from."""

    total: Float[Tensor, ""]
    fvu: Float[Tensor, "layer"]
    """Mean squared error over the variance of the target."""
    sparsity: Float[Tensor, ""]
    revival: Float[Tensor, ""]
    code: Code
    error: Float[Tensor, "layer batch d_model"]
    """Target minus reconstruction."""


def losses(
    weights: TrainingParameters,
    reads: Float[Tensor, "layer batch d_model"],
    writes: Float[Tensor, "layer batch d_model"],
    config: TrainConfig,
    *,
    sparsity_weight: float,
    dead: Bool[Tensor, "layer feature"] | None,
    p: float = 1.0,
    sparse: bool = False,
) -> Losses:
    """`mean_l ‖y_l − ŷ_l‖² / d + λ · sparsity + revival`, averaged over the batch.

    With prefixes (Matryoshka), the first term is the mean over them. `dead`: latents to be revived by an auxiliary
    loss. `p`: the exponent of an annealed penalty. `sparse`: whether only active features are touched; the loss and
    its gradients are the same.
    """
    code = SparseCode.of(weights, reads, config.margin) if sparse else DenseCode.of(weights, reads)
    target = writes - weights.base(reads)
    errors = _prefix_errors(weights, target, code, config.prefixes)
    fvu = torch.stack([error.square().mean(dim=(1, 2)) for error in errors])
    sparsity = sparsity_penalty(weights, code, config, p=p)
    total = fvu.mean() + sparsity_weight * sparsity
    if isinstance(weights.activation, Gated):
        total = total + _gate_loss(weights, code, writes, reads)
    error = errors[-1].detach()
    revival = fvu.new_zeros(())
    if dead is not None and bool(dead.any()):
        revival = config.revival * revival_loss(weights, code, reads, error, dead, config)
    return Losses(total + revival, fvu[-1].detach(), sparsity.detach(), revival.detach(), code, error)


def _prefix_errors(
    weights: TrainingParameters, target: Float[Tensor, "layer batch d_model"], code: Code, prefixes: tuple[int, ...]
) -> list[Float[Tensor, "layer batch d_model"]]:
    """What the first features leave of the target, for each of the prefixes; costs as much as the last one alone.

    Source: Bussmann et al. 2025, *Learning Multi-Level Features with Matryoshka Sparse Autoencoders*, eq. 6.
    """
    errors: list[Tensor] = []
    for first, last in zip((0, *prefixes), prefixes, strict=False):
        target = target - code.decode(weights, first, last)
        errors.append(target)
    return errors


def _gate_loss(
    weights: TrainingParameters,
    code: Code,
    writes: Float[Tensor, "layer batch d_model"],
    reads: Float[Tensor, "layer batch d_model"],
) -> Float[Tensor, ""]:
    """`‖y − relu(π) W_dec − b_dec‖² / d` with a decoder that gets no gradient from it: how the gate learns.

    Source: Rajamanoharan et al. 2024, *Improving Dictionary Learning with Gated Sparse Autoencoders*, eq. 8.
    """
    return (writes - weights.base(reads, frozen=True) - code.decode_gate(weights)).square().mean()


_DENSE_ABOVE = 0.05
"""Density of listed features from which dense products are faster."""
_SMALLEST = 512
"""Features per layer from which sparse products can be faster."""
_OWN = "trainee."
"""Before the names of weights in a checkpoint, as the first release wrote them."""
_MEASURE_EVERY = 20
"""Steps between measurements of the density."""


class Run:
    """One dictionary in training. Batches are `[batch, layer, d_model]`, as the model has them."""

    def __init__(self, config: TrainConfig, weights: TrainingParameters, scales: Scales) -> None:
        self.config, self.weights, self.scales = config, weights, scales
        self.optimizer = torch.optim.Adam(_groups(config, weights), lr=config.lr, betas=config.betas, fused=True)
        self.counter = never_fired(weights.n_layers, config.features, config.dead_after, weights.W_enc.device)
        self.controller = SparsityController(config)
        self.averaged = {n: p.detach().clone() for n, p in weights.named_parameters()} if config.ema else {}
        self._losses = torch.compile(losses) if config.compile else losses
        self.sparse = self._sparse_at_first()
        self.last: Losses | None = None
        self.finite = torch.ones((), dtype=torch.bool, device=weights.W_enc.device)
        """Whether the last step's loss and gradient were finite; not read each step, as a device would have to wait."""

    @classmethod
    def start(
        cls,
        config: TrainConfig,
        reads: Float[Tensor, "batch layer d_model"],
        writes: Float[Tensor, "batch layer d_model"],
    ) -> "Run":
        """With first values from a sample of the data."""
        reads, writes = reads.float(), writes.float()
        scales = measure_scales(reads, writes, config)
        first = (x * scale[:, None] for x, scale in ((reads, scales.read), (writes, scales.write)))
        return cls(config, initial_parameters(config, *first), scales)

    @classmethod
    def restore(
        cls,
        config: TrainConfig,
        shape: tuple[int, int],
        tensors: dict[str, Tensor],
        record: dict[str, Any],
        folder: Path,
        device: torch.device,
    ) -> "Run":
        """As `tensors()` and `record()` left it, `[layer, d_model]`; `FileFormatError` where they are not of it."""
        empty = torch.zeros(2, *shape, device=device)
        run = cls(config, initial_parameters(config, empty, empty), measure_scales(empty, empty, config))
        require_like(folder, tensors, run.tensors() | run.moments())
        run.weights.load_state_dict(_within(_OWN, tensors))
        restore_optimizer(run.optimizer, tensors)
        run.scales = Scales(tensors["scales.read"], tensors["scales.write"])
        run.counter.since_fired.copy_(tensors["since_fired"])
        run.controller = SparsityController(config, **record["controller"])
        run.sparse = record["sparse"]
        run.averaged = _within("averaged.", tensors)
        return run

    def tensors(self) -> dict[str, Tensor]:
        tensors = {f"{_OWN}{name}": value for name, value in self.weights.state_dict().items()}
        tensors |= {f"averaged.{name}": value for name, value in self.averaged.items()}
        tensors |= optimizer_tensors(self.optimizer)
        tensors |= {"scales.read": self.scales.read, "scales.write": self.scales.write}
        tensors["since_fired"] = self.counter.since_fired
        return tensors

    def moments(self) -> dict[str, Tensor]:
        """Of the optimizer, by name and shape, as they are after a step."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        kinds = ("step", "exp_avg", "exp_avg_sq")
        return {f"optimizer.{i}.{k}": torch.zeros(()).to(p) if k == "step" else p.detach()
                for i, p in enumerate(parameters) for k in kinds}  # fmt: skip

    def require_finite(self, place: str) -> None:
        """Raises `NotFiniteError` where a weight is not finite."""
        for name, value in self.tensors().items():
            if not bool(value.isfinite().all()):
                raise NotFiniteError(f"{place} has numbers in {name} that are not finite, so it is not written.")

    def record(self) -> dict[str, Any]:
        return {"controller": self.controller.state(), "sparse": self.sparse}

    # one step

    def step(
        self,
        step: int,
        reads: Float[Tensor, "batch layer d_model"],
        writes: Float[Tensor, "batch layer d_model"],
    ) -> Losses:
        config, weights = self.config, self.weights
        x = _normalise(reads, self.scales.read)
        y = x if config.kind == "sae" else _normalise(writes, self.scales.write)
        p = exponent(config, step)
        if isinstance(weights.activation, TopK | BatchTopK):
            weights.activation.k = round(config.k * falling(config, step, config.k_start))
        dead = self.counter.dead if config.remedy == "auxiliary" else None
        compute = losses if self.sparse else self._losses
        result = compute(
            weights,
            x,
            y,
            config,
            sparsity_weight=self.controller.weight(step),
            dead=dead if dead is not None and bool(dead.any()) else None,
            p=p,
            sparse=self.sparse,
        )
        self.optimizer.zero_grad()
        result.total.backward()
        weights.project_gradients()
        self.finite = result.total.detach().isfinite()
        if config.clip:
            self.finite &= torch.nn.utils.clip_grad_norm_(weights.parameters(), config.clip).isfinite()
        for group in self.optimizer.param_groups:
            group["lr"] = group["factor"] * learning_rate(config, step)
        self.optimizer.step()
        weights.constrain()
        if isinstance(weights.activation, BatchTopK):
            weights.activation.observe(result.code.smallest())
        self.counter.update(result.code.fired(), tokens=x.shape[1])
        self._steer(step, p, result)
        self._choose_kernels(step, result.code)
        self._average()
        if config.remedy == "resample":
            self._resample(step, x, result)
        self.last = result
        return result

    @torch.no_grad()
    def _steer(self, step: int, p: float, result: Losses) -> None:
        if self.config.target_l0 is not None:
            self.controller.update(step, float(result.code.l0().mean()))
        if (after := exponent(self.config, step + 1)) < p:
            share = shares(self.weights, result.code, result.code.a)
            before_sum, after_sum = (((share + P_SMALLEST) ** q - P_SMALLEST**q).sum() for q in (p, after))
            self.controller.gain *= float(before_sum / after_sum.clamp(min=1e-12)) if after_sum > 0 else 1.0

    @torch.no_grad()
    def _average(self) -> None:
        for name, parameter in self.weights.named_parameters() if self.averaged else ():
            self.averaged[name].lerp_(parameter, 1 - self.config.ema)

    def _sparse_at_first(self) -> bool:
        """The ranked kinds' density is known; of the others all is active at first."""
        config = self.config
        if config.kernels != "auto":
            return config.kernels == "sparse"
        layers = self.weights.n_layers if config.kind == "clt" else 1
        return config.ranks and config.features >= _SMALLEST and config.k / (layers * config.features) < _DENSE_ABOVE

    def _choose_kernels(self, step: int, code: Code) -> None:
        config = self.config
        if config.kernels != "auto" or config.ranks or config.features < _SMALLEST or step % _MEASURE_EVERY:
            return
        density = code.active.density if isinstance(code, SparseCode) else None
        if isinstance(code, DenseCode):
            density = code.density(self.weights, config.margin)
        assert density is not None
        self.sparse = density < _DENSE_ABOVE

    def _resample(self, step: int, x: Tensor, result: Losses) -> None:
        config = self.config
        falling = step + 1 >= (1 - config.decay) * config.steps
        dead = self.counter.dead
        if falling or (step + 1) % config.resample_every or not bool(dead.any()):
            return
        resample(
            self.weights,
            self.optimizer,
            result.code,
            x,
            result.error,
            dead,
            config,
            seed=config.seed * 1_000_003 + step,
        )
        self.counter.since_fired[dead] = 0

    # what it has come to

    def metrics(self, step: int) -> dict[str, Any]:
        """Of the last batch; `step` counts the steps done."""
        result = self.last
        assert result is not None
        l0 = result.code.l0()
        dead = self.counter.dead.float().mean(dim=1)
        metrics = {
            "step": step,
            "tokens": step * self.config.batch,
            "loss": float(result.total.detach()),
            "fvu": float(result.fvu.mean()),
            "l0": float(l0.mean()),
            "dead": float(dead.mean()),
            "alignment": float(self.weights.alignment().mean()),
            "sparsity": float(result.sparsity),
            "revival": float(result.revival),
            "learning_rate": learning_rate(self.config, step - 1),
            "sparsity_weight": self.controller.weight(step - 1),
            "fvu_per_layer": result.fvu.tolist(),
            "l0_per_layer": l0.tolist(),
            "dead_per_layer": dead.tolist(),
        }
        if self.config.penalty_used == "p_anneal":
            metrics["p"] = exponent(self.config, step - 1)
        return metrics

    @torch.no_grad()
    def export(self, reads: Sequence[Site], writes: Sequence[Site], provenance: DictionaryProvenance) -> DictionarySet:
        """The dictionaries as they are now, or their running mean, on the model's own activations."""
        own = {name: parameter.detach().clone() for name, parameter in self.weights.named_parameters()}
        try:
            for name, parameter in self.weights.named_parameters():
                parameter.copy_(self.averaged.get(name, own[name]))
            self.weights.constrain()
            return export(self.weights, self.config.kind, self.scales, reads, writes, provenance)
        finally:
            for name, parameter in self.weights.named_parameters():
                parameter.copy_(own[name])


def _groups(config: TrainConfig, weights: TrainingParameters) -> list[dict[str, Any]]:
    """Parameters by their rate: JumpReLU's thresholds have one of their own."""
    thresholds = [weights.activation.threshold] if isinstance(weights.activation, JumpReLU) else []
    others = [p for p in weights.parameters() if all(p is not t for t in thresholds)]
    groups = ((others, 1.0), (thresholds, config.threshold_rate or (1.0 if config.target_l0 is None else 3.0)))
    return [{"params": parameters, "factor": factor} for parameters, factor in groups if parameters]


def _normalise(
    activations: Float[Tensor, "batch layer d_model"], scale: Float[Tensor, "layer"]
) -> Float[Tensor, "layer batch d_model"]:
    """In float32, whatever the model's precision."""
    return (activations.transpose(0, 1).float() * scale[:, None, None]).contiguous()


def _within(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
