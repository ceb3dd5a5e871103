"""Everything outside a circuit ablated: features and error nodes, in any regime.

A feature or error node inside the circuit keeps the value it has in the run; one outside is set to

* `mean`: its mean over the task's prompts (and `others`) of the same template and role (positions without a role
  together);
* `resample`: its value on another prompt of the task, of the same template and length, drawn once per prompt;
* `zero`: 0.

Features that are off on the prompt are ablated too, for they may come on. With v the value in the run and v' the one
put in its place, a node outside moves what it writes by (v' − v)·W_dec, an error node by e' − e. The regime says what
is moved:

* `replacement`: features and the clean run's errors in the place of the MLPs, with attention and norms live;
* `model`: the model's own MLPs, everything live;
* `graph`: the model's own MLPs, with attention patterns and norm scales held. Nothing is ablated before the first
  position with features (position 0 sees no other), where MLP outputs are the clean ones.

v is what the dictionary reads in this run, layer by layer; where layers cannot be encoded one at a time (TopK over
layers), and where MLP outputs are constant, it is the clean activation. e is the clean run's in every regime: where the
model's own MLPs run, what their outputs miss of the dictionaries beyond e stays. With everything inside, the run is the
model's own.

Autoencoders are spliced in where they read: in the regime `model` both v and e are what they make of x in this run, so
that x = v W_dec + b_dec + e, and an error node inside knows no more of the clean prompt than what is inside before it;
in `replacement` e is the clean run's.

Source: Marks et al. 2024, "Sparse Feature Circuits" (section 3), there with all nodes at mean.
"""

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuitsae.interventions import REGIMES, Error, Means, PromptLike, Recording, Regime, RegimeName
from circuitsae.interventions.forward import SCORES, Forward, pass_memory, regime_named
from circuitsae.interventions.hooks import Tables
from circuitsae.interventions.prompts import By, error_place
from circuitsae.replacement import ReplacementModel
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
    left: float = 0.0
    """The share of its value that the rest keeps, beside 1 − `left` of what stands in for it."""


class Ablated:
    """The metric of a task's examples with everything outside of circuits ablated.

    Raises `InputError` for a way to ablate or a regime that it does not know, and where `resample` has no other prompt
    to draw.
    """

    def __init__(
        self,
        cases: Cases,
        ablation: Ablation = "mean",
        *,
        by: By = "role",
        errors: Errors = "ranked",
        regime: RegimeName | Regime = "replacement",
        others: Sequence[PromptLike] = (),
        seed: int = 0,
        memory: int | None = None,
    ) -> None:
        for name, value, known in (("ablation", ablation, Ablation), ("errors", errors, Errors)):
            if value not in get_args(known):
                raise InputError(f"{name}={value!r} is not known; give one of {', '.join(get_args(known))}.")
        self.cases, self.model, self.errors = cases, cases.model, errors
        self.memory = pass_memory(self.model.model.device, memory)
        self.ablation: Ablation = ablation
        self._others = others
        self.regime = regime_named(regime)
        if self.regime.mlps == "linear":
            raise InputError(
                "In the regime 'linear' features that are ablated would still answer what they read; "
                "take 'frozen-replacement', in which all are recomputed."
            )
        self._check_autoencoders()
        self._layers = range(self.model.model.n_layers)
        self._width = [self.model.dictionaries.n_features(layer) for layer in self._layers]
        self._places: list[dict[CircuitNode, Sequence[int]]] = [{} for _ in range(len(cases))]
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

    def reaches(self, node: CircuitNode) -> bool:
        """Whether keeping a node can matter: it has a place on some prompt, and, an error, follows the circuit."""
        if isinstance(node, Error) and self.errors != "ranked":
            return False
        return any(self._positions(number, node) for number in range(len(self.cases)))

    @property
    def about(self) -> dict[str, Any]:
        """What is ablated how, as JSON values."""
        names = [name for name, regime in REGIMES.items() if regime == self.regime]
        regime = names[0] if names else asdict(self.regime)
        return {"ablation": self.ablation, "errors": self.errors, "regime": regime}

    def _rows_at_once(self, length: int) -> int:
        lm = self.model.model
        patterns = SCORES + lm.n_layers * (self.regime.patterns == "frozen")
        per_token = 2 * lm.d_vocab + (12 + lm.n_layers**2) * lm.d_model + patterns * lm.n_heads * length
        per_token += 3 * max(self._width) + sum(self._width)
        return max(1, self.memory // (per_token * length * lm.dtype.itemsize))

    # one pass

    @torch.no_grad()
    def _run(self, numbers: Sequence[int], kept: Sequence[Kept]) -> Float[Tensor, "row d_vocab"]:
        """Logits of the last position, a row for each example with its circuit."""
        recordings = [self.cases.recordings[number] for number in numbers]
        inside = [self._inside(number, k) for number, k in zip(numbers, kept, strict=True)]
        outside = _Outside(
            self.model,
            recordings,
            self.regime,
            features=lambda layer: (
                self._feature_mask(layer, inside, kept, len(recordings[0])),
                torch.stack([self._fill[number][0][layer] for number in numbers]),
            ),
            errors=lambda layer: (
                torch.stack([errors[layer] for _, errors in inside])[..., None],
                torch.stack([self._fill[number][1][layer] for number in numbers]),
            ),
            left=[k.left for k in kept],
        )
        tokens = torch.stack([recording.trace.tokens for recording in recordings])
        if self.model.spliced:
            logits, _ = self.model.model.run(tokens, edits=outside.splices())
        else:
            logits, _ = self.model.model.run_hooked(tokens, write=outside.hooks())
        return logits[:, -1]

    def _check_autoencoders(self) -> None:
        """Raises `InputError` for what autoencoders cannot do."""
        spliced = self.model.spliced
        if spliced and self.regime not in (REGIMES["model"], REGIMES["replacement"]):
            raise InputError(
                "With autoencoders nothing of the model is held; give regime='model', or 'replacement', where error "
                "nodes inside the circuit keep the clean run's values."
            )
        if 0 < len(spliced) < self.model.model.n_layers:
            raise InputError(
                f"Layers {list(spliced)} have autoencoders, others transcoders; circuits are judged with one kind."
            )

    def _inside(self, number: int, kept: Kept) -> tuple[Int[Tensor, "n 3"], Bool[Tensor, "layer pos"]]:
        """The features that a circuit names on a prompt, and the error nodes that stay."""
        clean = self.cases.recordings[number].trace.errors
        errors = torch.full(clean.shape[:2], self.errors == "keep" or kept.all_but)
        rows: list[tuple[int, int, int]] = []
        for node in kept.nodes:
            for pos in self._positions(number, node):
                if not isinstance(node, Error):
                    rows.append((node.layer, pos, node.index))
                elif self.errors == "ranked":
                    errors[node.layer, pos] = not kept.all_but
        if self.errors == "ablate":
            errors[:] = False
        return torch.tensor(rows, dtype=torch.long, device=clean.device).reshape(-1, 3), errors.to(clean.device)

    def _positions(self, number: int, node: CircuitNode) -> Sequence[int]:
        """Where a node is on a prompt; a role or a position that the prompt has not is nowhere."""
        known = self._places[number]
        if node not in known:
            known[node] = self.positions_of(self.cases.recordings[number], node)
        return known[node]

    @staticmethod
    def positions_of(recording: Recording, node: CircuitNode) -> Sequence[int]:
        """Where a node is on a prompt, positions without features left out."""
        first = recording.model.first
        if node.at is None:
            return range(first, len(recording))
        places, size = node.at if isinstance(node.at, tuple) else (node.at,), len(recording)
        here = tuple(p for p in places if (p in recording.roles if isinstance(p, str) else -size <= p < size))
        return [pos for pos in recording.positions(here) or [] if first <= pos < len(recording)]

    def _feature_mask(
        self, layer: int, inside: Sequence[tuple[Tensor, Tensor]], kept: Sequence[Kept], length: int
    ) -> Bool[Tensor, "row pos feature"]:
        device = inside[0][0].device
        mask = torch.zeros(len(inside), length, self._width[layer], dtype=torch.bool, device=device)
        for row, (index, _) in enumerate(inside):
            here = index[index[:, 0] == layer]
            mask[row, here[:, 1], here[:, 2]] = True
        flip = torch.tensor([k.all_but for k in kept], device=device)
        return mask ^ flip[:, None, None]

    # what stands in

    def _filler(self, ablation: Ablation, by: By, seed: int) -> Callable[[int], tuple[list[Tensor], Tensor]]:
        """For an example: activations of every layer `[pos feature]` and errors `[layer pos d_model]` to put."""
        recordings = self.cases.recordings
        if ablation == "zero":
            return lambda number: self._dense(recordings[number], 0.0)
        if ablation == "resample":
            return lambda number: self._dense(recordings[self._partner(number, seed)], 1.0)
        means = Means.over(self.model, [*self.cases.prompts, *self._others], by=by)
        return lambda number: self._means(means, recordings[number])

    def _dense(self, recording: Recording, factor: float) -> tuple[list[Tensor], Tensor]:
        clean = [factor * dense_features(recording, layer, width) for layer, width in enumerate(self._width)]
        return clean, factor * recording.trace.errors

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


def dense_features(recording: Recording, layer: int, width: int) -> Float[Tensor, "pos feature"]:
    """The clean activations of a layer; position 0 has none."""
    index, value = recording.trace.features.of_layer(layer)
    dense = value.new_zeros(len(recording), width)
    dense[index[:, 1], index[:, 2]] = value
    return dense


Side = Callable[[int], tuple[Bool[Tensor, "row pos _"], Float[Tensor, "row pos _"]]]
"""Of a layer, what is inside, and what is put in the place of what is not."""


class _Outside(Forward):
    """A forward pass in which all that is outside of each row's circuit is set to something else."""

    def __init__(
        self,
        model: ReplacementModel,
        prompts: Sequence[Recording],
        regime: Regime,
        *,
        features: Side,
        errors: Side,
        left: Sequence[float],
    ) -> None:
        super().__init__(model, prompts, Tables({}, {}), regime)
        self._outside_features, self._outside_errors = features, errors
        self._left = model.model.W_U.new_tensor(left)[:, None, None] if any(left) else None
        self._moved: dict[int, list[Tensor]] = defaultdict(list)

    def _encode(self, layer: int) -> Hook:
        """Where its dictionary reads: what this layer's features, those outside ablated, write later.

        Where features stand in for an MLP they are written as they are then; where it runs itself, the change is added.
        """
        dictionaries, mode = self.model.dictionaries, self.regime.mlp(layer)
        encode_all = super()._encode(layer)
        replaced = {at for at in dictionaries.write_layers(layer) if self.regime.mlp(at) == "features"}

        def encode(read: Tensor) -> None:
            if mode == "features":
                self.read[layer] = read  # `encode_all` would write the features that are to be ablated
            else:
                encode_all(read)
            keep, fill = self._outside_features(layer)
            value = self._in_this_run(layer, read, mode)
            put = torch.where(keep | self._exact, value, self._mixed(fill, value))
            if replaced:
                self._write_later(layer, put, self._written, replaced)
            if rest := set(dictionaries.write_layers(layer)) - replaced:
                self._write_later(layer, put - value, self._moved, rest)

        return encode

    def _in_this_run(self, layer: int, read: Tensor, mode: str) -> Float[Tensor, "row pos feature"]:
        """The activations that a circuit leaves as they are."""
        if mode == "features" or (mode == "live" and self._encodes_by_layer):
            return self.model.dictionaries.activations(layer, read)
        width = self.model.dictionaries.n_features(layer)
        return self.by_row(lambda prompt: dense_features(prompt, layer, width))

    def _write_later(self, layer: int, active: Tensor, to: dict[int, list[Tensor]], layers: set[int]) -> None:
        written = self.model.dictionaries.decode_layer(layer, active).unbind(-2)
        for at, out in zip(self.model.dictionaries.write_layers(layer), written, strict=True):
            if at in layers:
                to[at].append(out)

    def _add_features(self, layer: int, out: Tensor) -> Tensor:
        return sum(self._moved[layer], start=out)

    def _add_errors(self, layer: int, out: Tensor) -> Tensor:
        keep, fill = self._outside_errors(layer)
        error = self.by_row(lambda prompt: prompt.trace.errors[layer])
        return out + torch.where(keep | self._exact, 0, self._mixed(fill, error) - error)

    def _mixed(self, fill: Tensor, value: Tensor) -> Tensor:
        """What is put in the place of values outside: all of what stands in for them, or a part."""
        return fill if self._left is None else fill + self._left * (value - fill)

    def splices(self) -> dict[Site, Hook]:
        """For autoencoders: at each site, what is outside set to something else."""
        layers = [layer for layer in self.model.spliced if layer not in self.model.passed]
        return {self.model.dictionaries.writes[layer]: self._splice(layer) for layer in layers}

    def _splice(self, layer: int) -> Hook:
        dictionaries, live = self.model.dictionaries, self.regime.mlps == "live"

        def splice(x: Tensor) -> Tensor:
            value = dictionaries.activations(layer, x)
            decoded = dictionaries.decode_layer(layer, value)[..., 0, :] + dictionaries.decoder_bias(layer)
            decoded = dictionaries.finished(layer, decoded, x)
            error = x - decoded if live else self.by_row(lambda prompt: prompt.trace.errors[layer])
            keep, fill = self._outside_features(layer)
            moved = dictionaries.decode_layer(layer, torch.where(keep, 0, self._mixed(fill, value) - value))[..., 0, :]
            keep, fill = self._outside_errors(layer)
            moved = moved + torch.where(keep, 0, self._mixed(fill, error) - error)
            return torch.where(self._exact, x, (x if live else decoded + error) + moved)

        return splice
