"""All layers' weights in one fine-tuning, with the optimizer that steps them together."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from transcoders.dictionaries import JumpReLU
from transcoders.errors import NotFiniteError
from transcoders.precision import all_finite
from transcoders.training.config import TrainConfig
from transcoders.training.export import Scales
from transcoders.training.replacement import Replacement
from transcoders.training.warm_start import Start

_SPARSE_FROM, _SPARSE_BELOW = 512, 0.05
"""Features of a layer, and the share of them that is active, for which kernels of active features alone are faster."""
_THRESHOLD_RATE = 3.0
"""Learning rate of thresholds in multiples of the others', as in training that steers L0."""
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


class JointWeights:
    """Weights on normalised activations, a stack of one for each layer, and Adam over all of them."""

    def __init__(self, start: Start, config: TrainConfig, scales: Scales, *, betas: tuple[float, float]) -> None:
        """`config`: as `start.config` made it."""
        self.scales, self.weights = scales, start.weights(config, scales)
        few = config.ranks and config.features >= _SPARSE_FROM and config.k < _SPARSE_BELOW * config.features
        self.replacement = Replacement(self.weights, scales, sparse=few)
        self.optimizer = torch.optim.Adam(self._groups(), lr=config.lr_used, betas=betas, fused=True)

    def _groups(self) -> list[dict[str, Any]]:
        """Thresholds have a rate of their own."""
        layers = self.replacement.layers
        thresholds = [view.activation.threshold for view in layers if isinstance(view.activation, JumpReLU)]
        others = [p for p in self.parameters().values() if all(p is not t for t in thresholds)]
        groups = ((others, 1.0), (thresholds, _THRESHOLD_RATE))
        return [{"params": parameters, "factor": factor} for parameters, factor in groups if parameters]

    def parameters(self) -> dict[str, nn.Parameter]:
        """Of all layers, by layer and name; together they are the memory of `weights`."""
        layers = enumerate(self.replacement.layers)
        return {f"{layer}.{name}": p for layer, view in layers for name, p in view.named_parameters()}

    def backward(self, loss: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """The norm of the gradient of all weights."""
        self.optimizer.zero_grad()
        loss.backward()
        return nn.utils.get_total_norm([p.grad for p in self.parameters().values() if p.grad is not None])

    def step(self, rate: float, *, clip: float, norm: Float[Tensor, ""]) -> None:
        """One step of Adam on the gradient, which has this norm; `clip`: the largest, 0 for any."""
        if clip:
            nn.utils.clip_grads_with_norm_(list(self.parameters().values()), clip, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = group["factor"] * rate
        self.optimizer.step()
        for view in self.replacement.layers:
            view.constrain()

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps; moments are zeros before the first step."""
        tensors = {f"weights.{name}": value for name, value in self.weights.state_dict().items()}
        tensors |= {"scales.read": self.scales.read, "scales.write": self.scales.write}
        for name, parameter in self.parameters().items():
            state = self.optimizer.state.get(parameter) or _no_moments(parameter)
            tensors |= {f"optimizer.{name}.{key}": state[key] for key in _MOMENTS}
        return tensors

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Go on from `tensors()`."""
        named = {name.removeprefix("weights."): t for name, t in tensors.items() if name.startswith("weights.")}
        self.weights.load_state_dict(named)
        for name, parameter in self.parameters().items():
            self.optimizer.state[parameter] = {key: tensors[f"optimizer.{name}.{key}"].clone() for key in _MOMENTS}

    def require_finite(self, place: str) -> None:
        """Raises `NotFiniteError` where a number is not finite."""
        if bad := [name for name, tensor in self.tensors().items() if not all_finite(tensor)]:
            raise NotFiniteError(f"{place} has numbers in {bad[0]} that are not finite, so it is not written.")


def _no_moments(parameter: nn.Parameter) -> dict[str, Tensor]:
    zeros = torch.zeros_like(parameter, requires_grad=False)
    return {"exp_avg": zeros, "exp_avg_sq": zeros, "step": torch.zeros((), device=parameter.device)}
