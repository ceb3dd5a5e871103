"""One dictionary in training: its weights, its parts and what steers them. It knows nothing of where data come from.

All tensors are normalised: a layer's writes have variance one per coordinate.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from transcoders.dictionaries import DictionaryProvenance, DictionarySet, TopK
from transcoders.errors import NotFiniteError
from transcoders.sites import Site
from transcoders.training.checkpoint import require_for_each_layer, require_like
from transcoders.training.config import TrainConfig
from transcoders.training.export import Scales, export
from transcoders.training.initialise import initial_parameters, measure_scales
from transcoders.training.losses import Losses
from transcoders.training.parameters import BatchTopK, TrainingParameters
from transcoders.training.part import Part, layers_at_once
from transcoders.training.revival import DeadCounter, never_fired
from transcoders.training.sparsity import P_SMALLEST, SparsityController, exponent, falling, learning_rate, shares

_OWN = "trainee."
"""Before the names of weights in a checkpoint, as the first release wrote them."""
_MOMENTS = ("exp_avg", "exp_avg_sq")


class Measured(NamedTuple):
    """What a step came to, over all parts; on the device, as reading it would make the device wait."""

    loss: Float[Tensor, ""]
    """Averaged over layers."""
    fvu: Float[Tensor, "layer"]
    l0: Float[Tensor, "layer"]
    sparsity: Float[Tensor, ""]
    revival: Float[Tensor, ""]


class Run:
    """One dictionary in training. Batches are `[batch, layer, d_model]`, as the model has them."""

    def __init__(self, config: TrainConfig, weights: TrainingParameters, scales: Scales) -> None:
        self.config, self.weights, self.scales = config, weights, scales
        n, device = weights.n_layers, weights.W_enc.device
        self.counter = never_fired(n, config.features, config.dead_after_used, device)
        at_once = layers_at_once(config, weights.W_enc.shape[-1], n, device)
        self.parts = [self._part(first, min(first + at_once, n)) for first in range(0, n, at_once)]
        self.controller = SparsityController(config)
        self.averaged = {n: p.detach().clone() for n, p in weights.named_parameters()} if config.ema else {}
        self.measured: Measured | None = None

    def _part(self, first: int, last: int) -> Part:
        counter = DeadCounter(self.counter.since_fired[first:last], self.config.dead_after_used)
        if last - first == self.weights.n_layers:
            return Part(self.config, self.weights, counter, 0, alone=True)
        return Part(self.config, self.weights.views(first, last), counter, first, alone=False)

    @property
    def finite(self) -> Bool[Tensor, ""]:
        """Whether the last step's losses and gradients were finite."""
        return torch.stack([part.finite for part in self.parts]).all()

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
        require_like(folder, tensors, run.tensors() | run._moments_like())
        run.weights.load_state_dict(_within(_OWN, tensors))
        run._restore_moments(_within("optimizer.", tensors))
        run.scales = Scales(tensors["scales.read"], tensors["scales.write"])
        run.counter.since_fired.copy_(tensors["since_fired"])
        run.controller = SparsityController(config, **record["controller"])
        require_for_each_layer(folder, record["sparse"], shape[0])
        for part in run.parts:
            part.sparse = record["sparse"][part.layers.start]
        run.averaged = _within("averaged.", tensors)
        return run

    # what is saved

    def tensors(self) -> dict[str, Tensor]:
        tensors = {f"{_OWN}{name}": value for name, value in self.weights.state_dict().items()}
        tensors |= {f"averaged.{name}": value for name, value in self.averaged.items()}
        tensors |= self._moments()
        tensors |= {"scales.read": self.scales.read, "scales.write": self.scales.write}
        tensors["since_fired"] = self.counter.since_fired
        return tensors

    def _moments(self) -> dict[str, Tensor]:
        """Adam's, by the names of the parameters, however many parts these are in; none before the first step."""
        if not any(part.optimizer.state for part in self.parts):
            return {}
        moments: dict[str, Tensor] = {}
        for name, places in self._places().items():
            states = [part.optimizer.state[parameter] for part, parameter in places]
            moments |= {f"optimizer.{name}.{key}": _joined([state[key] for state in states]) for key in _MOMENTS}
            moments[f"optimizer.{name}.step"] = states[0]["step"]
        return moments

    def _moments_like(self) -> dict[str, Tensor]:
        """Their names and shapes after a step."""
        shapes: dict[str, Tensor] = {}
        for name, parameter in self.weights.named_parameters():
            shapes |= {f"optimizer.{name}.{key}": parameter.detach() for key in _MOMENTS}
            shapes[f"optimizer.{name}.step"] = torch.zeros(()).to(parameter)
        return shapes

    def _restore_moments(self, moments: dict[str, Tensor]) -> None:
        for name, places in self._places().items():
            for part, parameter in places:
                whole = len(places) == 1
                part.optimizer.state[parameter] = {"step": moments[f"{name}.step"].clone()} | {
                    key: (m if whole else m[part.layers].clone())
                    for key in _MOMENTS
                    for m in [moments[f"{name}.{key}"]]
                }

    def _places(self) -> dict[str, list[tuple[Part, Tensor]]]:
        """Of each parameter of the whole, the parts' own parameters that make it up."""
        places: dict[str, list[tuple[Part, Tensor]]] = {name: [] for name, _ in self.weights.named_parameters()}
        for part in self.parts:
            for name, parameter in part.weights.named_parameters():
                if name.startswith("W_dec."):
                    name = f"W_dec.{int(name.removeprefix('W_dec.')) + part.layers.start}"
                places[name].append((part, parameter))
        return places

    def require_finite(self, place: str) -> None:
        """Raises `NotFiniteError` where a weight is not finite."""
        for name, value in self.tensors().items():
            if not bool(value.isfinite().all()):
                raise NotFiniteError(f"{place} has numbers in {name} that are not finite, so it is not written.")

    def record(self) -> dict[str, Any]:
        sparse = [part.sparse for part in self.parts for _ in range(part.weights.n_layers)]
        return {"controller": self.controller.state(), "sparse": sparse}

    # one step

    def step(
        self,
        step: int,
        reads: Float[Tensor, "batch layer d_model"],
        writes: Float[Tensor, "batch layer d_model"],
        *,
        measure: bool = True,
    ) -> None:
        """One optimizer step of every part; `measure`: whether `measured` is renewed."""
        config = self.config
        weight, p = self.controller.weight(step), exponent(config, step)
        annealed = exponent(config, step + 1)
        measure = measure or config.target_l0 is not None
        measured, strengths = [], []
        for part in self.parts:
            x = _normalise(reads[:, part.layers], self.scales.read[part.layers])
            y = x if config.kind == "sae" else _normalise(writes[:, part.layers], self.scales.write[part.layers])
            activation = part.weights.activation
            if isinstance(activation, TopK | BatchTopK):
                activation.k = round(config.k * falling(config, step, config.k_start))
            result = part.step(step, x, y, sparsity_weight=weight, p=p)
            if measure:
                measured.append((part.weights.n_layers, result, result.code.l0()))
            if annealed < p:
                strengths.append(_strengths(part.weights, result, (p, annealed)))
        if measured:
            self.measured = _together(measured)
        self._steer(step, strengths)
        self._average()

    @torch.no_grad()
    def _steer(self, step: int, strengths: Sequence[tuple[float, float]]) -> None:
        """Take the step's L0 into the controller, and keep an annealed penalty as strong as it was."""
        if self.config.target_l0 is not None:
            assert self.measured is not None
            self.controller.update(step, float(self.measured.l0.mean()))
        if strengths:
            before, after = (sum(side) for side in zip(*strengths, strict=True))
            self.controller.gain *= before / max(after, 1e-12) if after > 0 else 1.0

    @torch.no_grad()
    def _average(self) -> None:
        for name, parameter in self.weights.named_parameters() if self.averaged else ():
            self.averaged[name].lerp_(parameter, 1 - self.config.ema)

    # what it has come to

    def metrics(self, step: int) -> dict[str, Any]:
        """Of the last batch that was measured; `step` counts the steps done."""
        result = self.measured
        assert result is not None
        dead = self.counter.dead.float().mean(dim=1)
        metrics = {
            "step": step,
            "tokens": step * self.config.batch,
            "loss": float(result.loss),
            "fvu": float(result.fvu.mean()),
            "l0": float(result.l0.mean()),
            "dead": float(dead.mean()),
            "alignment": float(self.weights.alignment().mean()),
            "sparsity": float(result.sparsity),
            "revival": float(result.revival),
            "learning_rate": learning_rate(self.config, step - 1),
            "sparsity_weight": self.controller.weight(step - 1),
            "fvu_per_layer": result.fvu.tolist(),
            "l0_per_layer": result.l0.tolist(),
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


def _normalise(
    activations: Float[Tensor, "batch layer d_model"], scale: Float[Tensor, "layer"]
) -> Float[Tensor, "layer batch d_model"]:
    """In float32, whatever the model's precision."""
    return (activations.transpose(0, 1).float() * scale[:, None, None]).contiguous()


def _within(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


@torch.no_grad()
def _strengths(weights: TrainingParameters, result: Losses, powers: tuple[float, float]) -> tuple[float, float]:
    """`Σ share^p` of a batch for two powers."""
    share = shares(weights, result.code, result.code.a)
    before, after = (float(((share + P_SMALLEST) ** p - P_SMALLEST**p).sum()) for p in powers)
    return before, after


def _together(parts: Sequence[tuple[int, Losses, Tensor]]) -> Measured:
    """The measurements of parts of so many layers, averaged where they are of a layer on average."""
    n_layers = sum(n for n, _, _ in parts)

    def mean(name: str) -> Tensor:
        return sum(getattr(result, name).detach() * (n / n_layers) for n, result, _ in parts)  # pyright: ignore[reportReturnType]

    fvu, l0 = torch.cat([result.fvu for _, result, _ in parts]), torch.cat([l0 for _, _, l0 in parts])
    return Measured(mean("total"), fvu, l0, mean("sparsity"), mean("revival"))
