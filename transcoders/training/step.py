"""One dictionary in training: its weights, its parts and what steers them. It knows nothing of where data come from.

All tensors are normalised: a layer's writes have variance one per coordinate.
"""

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from transcoders.dictionaries import DictionaryProvenance, DictionarySet, TopK
from transcoders.errors import NotFiniteError
from transcoders.kernels import host
from transcoders.precision import all_finite
from transcoders.sites import Site
from transcoders.training.activations import BatchTopK
from transcoders.training.checkpoint import require_for_each_layer, require_like
from transcoders.training.config import TrainConfig, compares_at
from transcoders.training.derivative import Directions
from transcoders.training.export import Scales, export
from transcoders.training.initialise import initial_parameters, measure_scales
from transcoders.training.losses import Losses
from transcoders.training.parameters import TrainingParameters
from transcoders.training.part import Part, layers_at_once
from transcoders.training.revival import DeadCounter, never_fired
from transcoders.training.sparsity import P_SMALLEST, SparsityController, exponent, falling, learning_rate, shares
from transcoders.training.split import WHOLE, Split
from transcoders.training.warm_start import Start

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
    derivative: Float[Tensor, "layer"] | None = None

    @classmethod
    def of(cls, result: Losses) -> "Measured":
        """Without the features that it was computed from."""
        total, sparsity, revival = result.total.detach(), result.sparsity.detach(), result.revival.detach()
        return cls(total, result.fvu, result.code.l0(), sparsity, revival, result.derivative)

    def over_ranks(self, split: Split, n_tokens: int, config: TrainConfig) -> "Measured":
        """The same of all ranks' tokens, layers and features."""
        if split.world.size == 1:
            return self
        fvu, sparsity = (split.of_batch(x, n_tokens, config.batch) for x in (self.fvu, self.sparsity))
        l0 = split.of_batch(split.features.sum(self.l0), n_tokens, config.batch)
        loss, revival = split.tokens.sum(torch.stack([self.loss, self.revival]))
        n_own, ranks = len(fvu), split.layers
        loss, sparsity, revival = ranks.sum(torch.stack([loss, sparsity, revival]) * n_own) / ranks.count(n_own)
        derivative = None if self.derivative is None else ranks.gather(self.derivative)
        return Measured(loss, ranks.gather(fvu), ranks.gather(l0), sparsity, revival, derivative)


class Run:
    """One dictionary in training, or what of it is with this rank.

    Batches are `[batch, layer, d_model]`, as the model has them.
    """

    def __init__(
        self,
        config: TrainConfig,
        weights: TrainingParameters,
        scales: Scales,
        *,
        split: Split = WHOLE,
        n_layers: int | None = None,
    ) -> None:
        """`weights`, `scales`: this rank's; `n_layers`: of all ranks."""
        self.config, self.weights, self.scales, self.split = config, weights, scales, split
        n, device = weights.n_layers, weights.W_enc.device
        self.n_layers = n_layers or n
        self.counter = never_fired(n, weights.W_enc.shape[1], config.dead_after_used, device)
        at_once = layers_at_once(config, weights.W_enc.shape[-1], n, device)
        self.parts = [self._part(first, min(first + at_once, n)) for first in range(0, n, at_once)]
        self._stacked_moments = self._share_moments()
        self.controller = SparsityController(config)
        self.averaged = {n: p.detach().clone() for n, p in weights.named_parameters()} if config.ema else {}
        self.measured: Measured | None = None

    def _part(self, first: int, last: int) -> Part:
        counter = DeadCounter(self.counter.since_fired[first:last], self.config.dead_after_used)
        alone = last - first == self.weights.n_layers
        weights = self.weights if alone else self.weights.views(first, last)
        before = self.split.layers_of(self.n_layers).start
        return Part(self.config, weights, counter, first, alone=alone, split=self.split, before=before)

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
        *,
        split: Split = WHOLE,
        n_layers: int | None = None,
        start: Start | None = None,
    ) -> "Run":
        """With first values from a sample of the data, of the layers of `n_layers` that are with this rank.

        `start`: dictionaries to start from, of which the sample says the scale alone.
        """
        reads, writes = reads.float(), writes.float()
        scales = measure_scales(reads, writes, config)
        first = (x * scale[:, None] for x, scale in ((reads, scales.read), (writes, scales.write)))
        if start is None:
            weights = initial_parameters(config, *first, split=split, n_layers=n_layers)
        else:
            weights = start.weights(config, scales, split=split)
        split.tokens.broadcast([scales.read, scales.write, *weights.parameters()])
        return cls(config, weights, scales, split=split, n_layers=n_layers)

    @classmethod
    def restore(
        cls,
        config: TrainConfig,
        shape: tuple[int, int],
        tensors: dict[str, Tensor],
        record: dict[str, Any],
        folder: Path,
        device: torch.device,
        *,
        split: Split = WHOLE,
    ) -> "Run":
        """As `tensors()` and `record()` left it, `[layer, d_model]` of all ranks, where `tensors` are this rank's.

        `FileFormatError` where they are not of it.
        """
        run = cls._empty(config, shape, device, split)
        require_like(folder, tensors, run.tensors() | run._moments_like())
        run._take(tensors)
        run._restore_moments(_within("optimizer.", tensors))
        run.controller = SparsityController(config, **record["controller"])
        require_for_each_layer(folder, record["sparse"], shape[0])
        for part in run.parts:
            part.take_kernels(record["sparse"][part.before + part.layers.start])
            part.counter.alive_until = 0
        return run

    @classmethod
    def of_weights(cls, config: TrainConfig, tensors: dict[str, Tensor], folder: Path, device: torch.device) -> "Run":
        """To be exported, not to go on: of `tensors()` all but the optimizer's; `FileFormatError` as in `restore`."""
        W_enc = tensors.get(f"{_OWN}W_enc")
        layers, d_model = (1, 1) if W_enc is None or W_enc.ndim != 3 else (W_enc.shape[0], W_enc.shape[2])
        run = cls._empty(config, (layers, d_model), device, WHOLE)
        require_like(folder, tensors, run.tensors())
        run._take(tensors)
        return run

    @classmethod
    def _empty(cls, config: TrainConfig, shape: tuple[int, int], device: torch.device, split: Split) -> "Run":
        n_layers, d_model = shape
        empty = torch.zeros(2, len(split.layers_of(n_layers)), d_model, device=device)
        weights = initial_parameters(config, empty, empty, split=split, n_layers=n_layers)
        return cls(config, weights, measure_scales(empty, empty, config), split=split, n_layers=n_layers)

    def _take(self, tensors: dict[str, Tensor]) -> None:
        self.weights.load_state_dict(_within(_OWN, tensors))
        self.scales = Scales(tensors["scales.read"], tensors["scales.write"])
        self.counter.since_fired.copy_(tensors["since_fired"])
        self.averaged = _within("averaged.", tensors)

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
        if not any(bool(state["step"]) for part in self.parts for state in part.optimizer.state.values()):
            return {}
        moments: dict[str, Tensor] = {}
        for name, ((part, parameter), *_) in self._places().items():
            state = part.optimizer.state[parameter] | self._stacked_moments.get(name, {})
            moments |= {f"optimizer.{name}.{key}": state[key] for key in (*_MOMENTS, "step")}
        return moments

    def _share_moments(self) -> dict[str, dict[str, Tensor]]:
        """The moments of parameters that several parts make up, stacked as these are; the parts have views of them.

        So what is saved needs no copy.
        """
        whole = dict(self.weights.named_parameters())
        stacked = {}
        for name, places in self._places().items():
            if len(places) > 1:
                stacked[name] = {key: torch.zeros_like(whole[name]).detach() for key in _MOMENTS}
                for part, parameter in places:
                    views = {key: moment[part.layers] for key, moment in stacked[name].items()}
                    part.optimizer.state[parameter] = {"step": parameter.new_zeros(()).detach(), **views}
        return stacked

    def _moments_like(self) -> dict[str, Tensor]:
        """Their names and shapes after a step."""
        shapes: dict[str, Tensor] = {}
        for name, parameter in self.weights.named_parameters():
            shapes |= {f"optimizer.{name}.{key}": parameter.detach() for key in _MOMENTS}
            shapes[f"optimizer.{name}.step"] = torch.zeros(()).to(parameter)
        return shapes

    def _restore_moments(self, moments: dict[str, Tensor]) -> None:
        for name, places in self._places().items():
            found = {key: moments[f"{name}.{key}"] for key in _MOMENTS}
            if len(places) > 1:
                self._stacked_moments[name] = found
            for part, parameter in places:
                views = found if len(places) == 1 else {key: moment[part.layers] for key, moment in found.items()}
                part.optimizer.state[parameter] = {"step": moments[f"{name}.step"].clone(), **views}

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
        """Raises `NotFiniteError` where a weight is not finite, on all ranks."""
        bad = []
        for name, value in self.tensors().items():
            if not all_finite(value):
                bad.append(name)
        if bool(self.split.world.any(torch.tensor(bool(bad)))):
            which = f"in {bad[0]}" if bad else "on another rank"
            raise NotFiniteError(f"{place} has numbers {which} that are not finite, so it is not written.")

    def record(self) -> dict[str, Any]:
        """What else is saved, of all ranks."""
        sparse = torch.tensor([part.sparse for part in self.parts for _ in range(part.weights.n_layers)])
        return {"controller": self.controller.state(), "sparse": self.split.layers.gather(sparse).tolist()}

    def to_first(self) -> tuple[dict[str, Tensor], Iterator[tuple[str, Tensor | None]]]:
        """The tensors of all ranks: shapes without data, and one tensor after the other on the first rank."""
        sizes = self.n_layers, self.config.features
        tensors = self.tensors()
        return self.split.whole_shapes(tensors, *sizes), self.split.to_first(tensors, *sizes)

    # one step

    def step(
        self,
        step: int,
        reads: Float[Tensor, "batch layer d_model"],
        writes: Float[Tensor, "batch layer d_model"],
        *,
        directions: Directions | None = None,
        measure: bool = True,
    ) -> None:
        """One optimizer step of every part.

        `directions`: small changes at some tokens and the answers of all layers' MLPs, where they are compared.
        `measure`: whether `measured` is renewed.
        """
        config = self.config
        weight, p = self.controller.weight(step), exponent(config, step)
        weight = weight.to(self.weights.W_enc.dtype) if isinstance(weight, Tensor) else weight
        annealed = exponent(config, step + 1)
        measure = measure or config.target_l0 is not None
        measured, strengths = [], []
        if not compares_at(config, step):
            directions = None
        if directions is not None:
            own = self.split.layers_of(self.n_layers)
            directions = directions.of_layers(slice(own.start, own.stop)).scaled(self.scales.read, self.scales.write)
        for part in self.parts:
            x = _normalise(reads[:, part.layers], self.scales.read[part.layers])
            y = x if config.kind == "sae" else _normalise(writes[:, part.layers], self.scales.write[part.layers])
            activation = part.weights.activation
            if isinstance(activation, TopK | BatchTopK):
                activation.k = round(config.k * falling(config, step, config.k_start))
            of_part = None if directions is None else directions.of_layers(part.layers)
            result = part.step(step, x, y, sparsity_weight=weight, p=p, directions=of_part)
            if measure:
                measured.append((part.weights.n_layers, Measured.of(result)))
            if annealed < p:
                strengths.append(_strengths(part.weights, result, (p, annealed)))
            del result  # its features, before the next part has its own
        if measured:
            self.measured = _together(measured).over_ranks(self.split, reads.shape[0], config)
        self._steer(step, strengths)
        self._average()

    @torch.no_grad()
    def _steer(self, step: int, strengths: Sequence[Float[Tensor, "2"]]) -> None:
        """Take the step's L0 into the controller, and keep an annealed penalty as strong as it was."""
        if self.config.target_l0 is not None:
            assert self.measured is not None
            l0 = self.measured.l0.mean().double()
            self.controller.update(step, l0 if host.queued(l0) else float(l0))
        if strengths:
            before, after = self.split.world.sum(functools.reduce(torch.add, strengths))
            factor = torch.where(after > 0, before / after.clamp(min=1e-12), 1.0)
            self.controller.gain *= factor if host.queued(factor) else float(factor)

    @torch.no_grad()
    def _average(self) -> None:
        for name, parameter in self.weights.named_parameters() if self.averaged else ():
            self.averaged[name].lerp_(parameter, 1 - self.config.ema)

    # what it has come to

    def metrics(self, step: int) -> dict[str, Any]:
        """Of the last batch that was measured; `step` counts the steps done."""
        result = self.measured
        assert result is not None
        ranks = self.split.features
        dead = self.split.layers.gather(ranks.sum(self.counter.dead.float().mean(dim=1)) / ranks.size)
        alignment = self.split.layers.gather(ranks.sum(self.weights.alignment().mean(dim=1)) / ranks.size)
        metrics = {
            "step": step,
            "tokens": step * self.config.batch,
            "loss": float(result.loss),
            "fvu": float(result.fvu.mean()),
            "l0": float(result.l0.mean()),
            "dead": float(dead.mean()),
            "alignment": float(alignment.mean()),
            "sparsity": float(result.sparsity),
            "revival": float(result.revival),
            "learning_rate": learning_rate(self.config, step - 1),
            "sparsity_weight": float(self.controller.weight(step - 1)),
            "fvu_per_layer": result.fvu.tolist(),
            "l0_per_layer": result.l0.tolist(),
            "dead_per_layer": dead.tolist(),
        }
        if result.derivative is not None:
            metrics["derivative"] = float(result.derivative.mean())
            metrics["derivative_per_layer"] = result.derivative.tolist()
        if self.config.penalty_used == "p_anneal":
            metrics["p"] = exponent(self.config, step - 1)
        return metrics

    @torch.no_grad()
    def export(
        self,
        reads: Sequence[Site],
        writes: Sequence[Site],
        provenance: DictionaryProvenance,
        *,
        everywhere: bool = True,
    ) -> DictionarySet | None:
        """The dictionaries as they are now, or their running mean, on the model's own activations.

        Without `everywhere` on the first rank only, and on those that have all of them anyway; None on others.
        """
        own = dict(self.weights.state_dict()) | self.averaged
        own |= {"scales.read": self.scales.read, "scales.write": self.scales.write}
        tensors = self.split.whole(own, self.n_layers, self.config.features, everywhere)
        if tensors is None:
            return None
        scales = Scales(tensors["scales.read"], tensors["scales.write"])
        if self.averaged:
            tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        weights = self.weights.holding(tensors)
        if self.averaged:
            weights.constrain()
        return export(weights, self.config.kind, scales, reads, writes, provenance)


def _normalise(
    activations: Float[Tensor, "batch layer d_model"], scale: Float[Tensor, "layer"]
) -> Float[Tensor, "layer batch d_model"]:
    """In float32, whatever the model's precision."""
    return (activations.transpose(0, 1).float() * scale[:, None, None]).contiguous()


def _within(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


@torch.no_grad()
def _strengths(weights: TrainingParameters, result: Losses, powers: tuple[float, float]) -> Float[Tensor, "2"]:
    """`Σ share^p` of a batch for two powers."""
    share = shares(weights, result.code, result.code.a)
    return torch.stack([((share + P_SMALLEST) ** p - P_SMALLEST**p).sum() for p in powers]).double()


def _together(parts: Sequence[tuple[int, Measured]]) -> Measured:
    """The measurements of parts of so many layers, averaged where they are of a layer on average."""
    n_layers = sum(n for n, _ in parts)

    def mean(name: str) -> Tensor:
        return sum(getattr(part, name) * (n / n_layers) for n, part in parts)  # pyright: ignore[reportReturnType]

    fvu, l0 = (torch.cat([getattr(part, name) for _, part in parts]) for name in ("fvu", "l0"))
    derivatives = [part.derivative for _, part in parts if part.derivative is not None]
    derivative = torch.cat(derivatives) if derivatives else None
    return Measured(mean("loss"), fvu, l0, mean("sparsity"), mean("revival"), derivative)
