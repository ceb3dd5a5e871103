"""Everything outside a circuit ablated: features and error nodes, in the replacement regime.

MLPs are replaced layer by layer by features and errors, with attention and norms live. A feature or error node inside
the circuit keeps the value it has in the run (an error: the clean one); one outside is set to

* `mean`: its mean over the task's prompts of the same template and role (positions without a role together);
* `resample`: its value on another prompt of the task, of the same template and length, drawn once per prompt;
* `zero`: 0.

Features that are off on the prompt are ablated too, for they may come on. With everything inside, the run is the
model's own. Source: Marks et al. 2024, "Sparse Feature Circuits" (section 3), there with all nodes at mean.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuitsae.interventions import Error, Means, Recording
from circuitsae.interventions.forward import MEMORY
from circuitsae.interventions.prompts import By, error_place
from circuitsae.replacement import FIRST
from circuitsae.validation.circuits import Circuit, CircuitNode
from circuitsae.validation.tasks import Cases
from transcoders.errors import InputError
from transcoders.language_model import Hook
from transcoders.sites import Site

Ablation = Literal["mean", "resample", "zero"]
"""What takes the place of what is ablated: its mean over prompts, its value on another (corrupt) prompt, or nothing."""
Errors = Literal["ranked", "keep", "ablate"]
"""Error nodes: inside as far as the circuit names them, all inside, or all outside."""


@dataclass(frozen=True)
class Kept:
    """What stays as it is: the named nodes, or (`all_but`) everything but them."""

    nodes: tuple[CircuitNode, ...]
    all_but: bool = False


class Ablated:
    """The metric of a task's examples with everything outside of circuits ablated.

    Raises `InputError` for a way to ablate that it does not know, or where `resample` has no other prompt to draw.
    """

    def __init__(
        self,
        cases: Cases,
        ablation: Ablation = "mean",
        *,
        by: By = "role",
        errors: Errors = "ranked",
        seed: int = 0,
        memory: int = MEMORY,
    ) -> None:
        for name, value, known in (("ablation", ablation, Ablation), ("errors", errors, Errors)):
            if value not in get_args(known):
                raise InputError(f"{name}={value!r} is not known; give one of {', '.join(get_args(known))}.")
        self.cases, self.model, self.errors, self.memory = cases, cases.model, errors, memory
        self._layers = range(self.model.model.n_layers)
        self._width = [self.model.dictionaries.n_features(layer) for layer in self._layers]
        self._fill = [fill(number) for fill in [self._filler(ablation, by, seed)] for number in range(len(cases))]

    def metric(self, kept: Sequence[Kept]) -> Float[np.ndarray, "circuit example"]:
        """The metric of every example for every circuit, batched over both."""
        found = np.zeros((len(kept), len(self.cases)))
        for numbers in self.cases.by_length():
            rows = [(circuit, number) for circuit in range(len(kept)) for number in numbers]
            size = self._rows_at_once(len(self.cases.recordings[numbers[0]]))
            for start in range(0, len(rows), size):
                part = rows[start : start + size]
                logits = self._run([number for _, number in part], [kept[circuit] for circuit, _ in part])
                for (circuit, number), row in zip(part, logits, strict=True):
                    found[circuit, number] = float(self.cases.metrics[number](row[None])[0])
        return found

    def clean(self) -> Float[np.ndarray, "example"]:
        """The metric of the model itself."""
        pairs = zip(self.cases.metrics, self.cases.recordings, strict=True)
        return np.array([float(metric(recording.trace.logits[-1:])[0]) for metric, recording in pairs])

    def _rows_at_once(self, length: int) -> int:
        lm = self.model.model
        per_token = 2 * lm.d_vocab + (12 + lm.n_layers**2) * lm.d_model + 3 * max(self._width) + sum(self._width)
        return max(1, self.memory // (per_token * length * lm.dtype.itemsize))

    # one pass

    @torch.no_grad()
    def _run(self, numbers: Sequence[int], kept: Sequence[Kept]) -> Float[Tensor, "row d_vocab"]:
        """Logits of the last position, a row for each example with its circuit."""
        recordings = [self.cases.recordings[number] for number in numbers]
        inside = [self._inside(recording, k) for recording, k in zip(recordings, kept, strict=True)]
        dictionaries, written = self.model.dictionaries, {}

        def read(layer: int) -> Hook:
            def encode(mlp_in: Tensor) -> None:
                active = dictionaries.activations(layer, mlp_in)
                keep = self._feature_mask(layer, inside, kept, active)
                fill = torch.stack([self._fill[number][0][layer] for number in numbers])
                decoded = dictionaries.decode_layer(layer, torch.where(keep, active, fill))
                for at, out in zip(dictionaries.write_layers(layer), decoded.unbind(-2), strict=True):
                    written[at] = written.get(at, dictionaries.decoder_bias(at)) + out
                if (skip := dictionaries.skip(layer)) is not None:
                    written[layer] = written[layer] + mlp_in @ skip

            return encode

        def write(layer: int) -> Hook:
            clean = torch.stack([recording.trace.errors[layer] for recording in recordings])
            fill = torch.stack([self._fill[number][1][layer] for number in numbers])
            keep = torch.stack([errors[layer] for _, errors in inside])[..., None]

            def stand_in(mlp_out: Tensor) -> Tensor:
                out = written[layer] + torch.where(keep, clean, fill)
                return torch.cat([mlp_out[:, :FIRST], out[:, FIRST:]], dim=1)

            return stand_in

        edits = {Site(i, "mlp_in"): read(i) for i in self._layers} | {
            Site(i, "mlp_out"): write(i) for i in self._layers
        }
        tokens = torch.stack([recording.trace.tokens for recording in recordings])
        logits, _ = self.model.model.run(tokens, edits=edits)
        return logits[:, -1]

    def _inside(self, recording: Recording, kept: Kept) -> tuple[Int[Tensor, "n 3"], Bool[Tensor, "layer pos"]]:
        """The features that a circuit names on a prompt, and the error nodes that stay."""
        errors = torch.full(recording.trace.errors.shape[:2], self.errors == "keep" or kept.all_but)
        rows: list[tuple[int, int, int]] = []
        for node in kept.nodes:
            for pos in self._positions(recording, node):
                if not isinstance(node, Error):
                    rows.append((node.layer, pos, node.index))
                elif self.errors == "ranked":
                    errors[node.layer, pos] = not kept.all_but
        if self.errors == "ablate":
            errors[:] = False
        device = recording.trace.errors.device
        return torch.tensor(rows, dtype=torch.long, device=device).reshape(-1, 3), errors.to(device)

    @staticmethod
    def _positions(recording: Recording, node: CircuitNode) -> Sequence[int]:
        """Where a node is on a prompt; a role or a position that the prompt has not is nowhere."""
        if node.at is None:
            return range(FIRST, len(recording))
        places, size = node.at if isinstance(node.at, tuple) else (node.at,), len(recording)
        here = tuple(p for p in places if (p in recording.roles if isinstance(p, str) else -size <= p < size))
        return [pos for pos in recording.positions(here) or [] if FIRST <= pos < len(recording)]

    def _feature_mask(
        self,
        layer: int,
        inside: Sequence[tuple[Tensor, Tensor]],
        kept: Sequence[Kept],
        active: Float[Tensor, "row pos feature"],
    ) -> Bool[Tensor, "row pos feature"]:
        mask = torch.zeros_like(active, dtype=torch.bool)
        for row, (index, _) in enumerate(inside):
            here = index[index[:, 0] == layer]
            mask[row, here[:, 1], here[:, 2]] = True
        flip = torch.tensor([k.all_but for k in kept], device=mask.device)
        return mask ^ flip[:, None, None]

    # what stands in

    def _filler(self, ablation: Ablation, by: By, seed: int) -> Callable[[int], tuple[list[Tensor], Tensor]]:
        """For an example: activations of every layer `[pos feature]` and errors `[layer pos d_model]` to put."""
        recordings = self.cases.recordings
        if ablation == "zero":
            return lambda number: self._dense(recordings[number], 0.0)
        if ablation == "resample":
            return lambda number: self._dense(recordings[self._partner(number, seed)], 1.0)
        means = Means.over(self.model, self.cases.prompts, by=by)
        return lambda number: self._means(means, recordings[number])

    def _dense(self, recording: Recording, factor: float) -> tuple[list[Tensor], Tensor]:
        index, value = recording.trace.features
        dense = [recording.trace.errors.new_zeros(len(recording), width) for width in self._width]
        for layer in self._layers:
            here = index[:, 0] == layer
            dense[layer][index[here, 1], index[here, 2]] = factor * value[here]
        return dense, factor * recording.trace.errors

    def _means(self, means: Means, recording: Recording) -> tuple[list[Tensor], Tensor]:
        groups = [means.group(recording, pos) for pos in range(len(recording))]
        active = torch.stack([means.features_[group] for group in groups], dim=1)
        errors = [torch.stack([means.vectors[g][error_place(layer)] for g in groups]) for layer in self._layers]
        return [active[layer][:, : self._width[layer]] for layer in self._layers], torch.stack(errors)

    def _partner(self, number: int, seed: int) -> int:
        """Another prompt of the same template and length."""
        own = self.cases.recordings[number]
        others = [
            i
            for i, r in enumerate(self.cases.recordings)
            if len(r) == len(own) and r.template == own.template and not torch.equal(r.trace.tokens, own.trace.tokens)
        ]
        if not others:
            raise InputError(
                f"Prompt {number} of the task has no other one of its template and length to be resampled from; "
                "give more prompts, or ablation='mean'."
            )
        return random.Random(f"{seed}:{number}").choice(others)


def kept(circuit: Circuit) -> Kept:
    return Kept(circuit.nodes)
