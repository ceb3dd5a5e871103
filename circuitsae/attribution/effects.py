"""The effect of every feature and error node on a metric, with attention, norms and all that comes after them live.

With m the metric, a_s and a'_s a feature's activation on the clean and on the corrupted prompt (0 without one), w_s→l
what an activation of 1 adds to y_l, what is written at layer l, and p its position,

    E_s = (a_s − a'_s) · Σ_l ⟨∂m/∂y_l(p), w_s→l⟩,    of an error node ⟨∂m/∂y_l(p), e − e'⟩;

positive where the clean value raises the metric. `gradient` takes ∂m/∂y at the clean run. `integrated` averages it over
the runs in which all nodes of one layer, features and errors, are at a' + α (a − a'), α = (k − ½) / steps, and what is
before them at its clean value: the effects of a layer then sum up to m(clean) − m(the layer's nodes at a'), but for the
midpoint rule. What comes after a node is, by `regime`,

* `model`: the model itself. Dictionaries further up reconstruct what comes to them and their errors make up for the
  rest, x = f(x) W_dec + b_dec + e(x), so that derivatives pass through their sites unchanged;
* `replacement`: features further up answer, and the clean run's errors stay.

Sources: Marks et al. 2024, "Sparse Feature Circuits" (section 3.2, there the negative, m(patched) − m(clean)); Hanna et
al. 2024, "Have Faith in Faithfulness" (integrated gradients).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitsae.replacement import ReplacementModel, Trace
from transcoders.edits import Hook, after
from transcoders.errors import InputError, PromptError
from transcoders.language_model import LanguageModel
from transcoders.sites import Site

Method = Literal["gradient", "integrated"]
After = Literal["model", "replacement"]
"""What comes after a node: the model itself, or features that answer and errors that stay."""
Metric = Callable[[Float[Tensor, "row d_vocab"]], Float[Tensor, "row"]]
"""A number from the logits of the last position, of several runs at once."""


@dataclass(frozen=True, eq=False)
class Readout:
    """A metric of what is at a site of the model, such as a classifier's score, in the place of logits."""

    site: Site
    value: Callable[[Float[Tensor, "row pos _"]], Float[Tensor, "row"]]
    """A number from the activations at all positions, of several runs at once."""


Measure = Metric | Readout
STEPS = 10
MEMORY = 256 * 2**20
"""Bytes that the runs of one batch may take with what their backward pass needs, roughly."""


@dataclass(frozen=True, eq=False)
class Nodes:
    """Features and error nodes of a prompt, and how far each is from its value on the corrupted prompt."""

    model: ReplacementModel
    index: Int[Tensor, "n 3"]
    """Layer, position and feature of those that are active on either prompt, sorted."""
    value: Float[Tensor, "n"]
    baseline: Float[Tensor, "n"]
    """Activations on the clean prompt and on the corrupted one."""
    errors: Float[Tensor, "layer pos d_model"]
    """e − e'; 0 where a site has no dictionary, and at positions without features where nothing is corrupted."""

    @classmethod
    def of(cls, model: ReplacementModel, clean: Trace, corrupted: Trace | None = None) -> "Nodes":
        """Raises `PromptError` where the two prompts differ in length."""
        features = clean.features
        if corrupted is None:
            errors = clean.errors.masked_fill(clean.exact[:, None], 0)
            index, value, baseline = features.index, features.value, torch.zeros_like(features.value)
        else:
            if corrupted.n_positions != clean.n_positions:
                raise PromptError(
                    f"The clean prompt has {clean.n_positions} tokens and the corrupted one {corrupted.n_positions}; "
                    "values are compared position by position, so give prompts of one length."
                )
            errors = clean.errors - corrupted.errors
            both = torch.cat([features.index, corrupted.features.index])
            index, place = both.unique(dim=0, return_inverse=True)
            ours, theirs = place.split([len(features.value), len(corrupted.features.value)])
            value = features.value.new_zeros(len(index)).index_put((ours,), features.value)
            baseline = torch.zeros_like(value).index_put((theirs,), corrupted.features.value)
        errors = errors.clone()
        errors[list(model.passed)] = 0
        return cls(model, index, value, baseline, errors)

    def writes(self, layer: int) -> range:
        """The layers at which nodes of a layer write."""
        return self.model.dictionaries.write_layers(layer)

    def rows(self, layer: int) -> Int[Tensor, "k"]:
        """The features of a layer, by number."""
        return (self.index[:, 0] == layer).nonzero()[:, 0]

    def written(self, layer: int) -> dict[int, Float[Tensor, "pos d_model"]]:
        """What all nodes of a layer write beyond the corrupted prompt, by the layer where."""
        rows = self.rows(layer)
        _, pos, feature = self.index[rows].unbind(1)
        change = (self.value - self.baseline)[rows, None]
        found = {}
        for at in self.writes(layer):
            start = self.errors[layer] if at == layer else torch.zeros_like(self.errors[layer])
            vectors = self.model.dictionaries.decoder_rows(layer, feature, at).detach()
            found[at] = start.index_add(0, pos, vectors * change)
        return found

    def slopes(self, layer: int, gradients: Mapping[int, Tensor]) -> Float[Tensor, "*batch k"]:
        """∂m/∂a of each feature of a layer, from ∂m/∂y `[*batch pos d_model]` by the layer where."""
        _, pos, feature = self.index[self.rows(layer)].unbind(1)
        found = self.errors.new_zeros(*next(iter(gradients.values())).shape[:-2], len(pos))
        for at in self.writes(layer):
            vectors = self.model.dictionaries.decoder_rows(layer, feature, at).detach()
            found = found + torch.einsum("...kd,kd->...k", gradients[at][..., pos, :], vectors)
        return found

    def effects_of_errors(self, layer: int, gradient: Float[Tensor, "*batch pos d_model"]) -> Tensor:
        """Of the error nodes of a layer, `[*batch pos]`."""
        return torch.einsum("...pd,pd->...p", gradient, self.errors[layer])


@dataclass(frozen=True, eq=False)
class NodeEffects:
    """What every feature and error node of a prompt adds to a metric."""

    trace: Trace
    nodes: Nodes
    metric: Measure
    method: Method
    regime: After
    slopes: Float[Tensor, "n"]
    """∂m/∂a of each feature, at the clean run or averaged."""
    errors: Float[Tensor, "layer pos"]
    """Effects of the error nodes."""
    clean: float
    """m of the prompt."""
    removed: Float[Tensor, "layer"]
    """m with all nodes of one layer at their values on the corrupted prompt, and everything after them live."""

    @property
    def features(self) -> Float[Tensor, "n"]:
        """Effects of the features `nodes.index`."""
        return self.slopes * (self.nodes.value - self.nodes.baseline)

    def frame(self) -> pd.DataFrame:
        """A row per node, the largest effects first.

        Columns `id`, `kind`, `layer`, `pos`, `feature` (−1: error), `token`, `value`, `baseline`, `effect`.
        """
        tokens, nodes = self.trace.token_strings, self.nodes
        layer, pos, feature = nodes.index.T.tolist()
        features = pd.DataFrame({"kind": "feature", "layer": layer, "pos": pos, "feature": feature,
                                 "value": nodes.value.tolist(), "baseline": nodes.baseline.tolist(),
                                 "effect": self.features.tolist()})  # fmt: skip
        where = nodes.errors.any(-1).nonzero()
        layer, pos = where.T.tolist()
        effect = self.errors[where[:, 0], where[:, 1]].tolist()
        errors = pd.DataFrame({"kind": "error", "layer": layer, "pos": pos, "feature": -1, "effect": effect})
        found = pd.concat([part for part in (features, errors) if len(part)] or [features], ignore_index=True)
        names = [
            f"{layer}.{'err' if feature < 0 else feature}@{pos}"
            for layer, feature, pos in zip(found["layer"], found["feature"], found["pos"], strict=True)
        ]
        found.insert(0, "id", names)
        found.insert(5, "token", [tokens[pos] for pos in found["pos"]])
        return found.sort_values("effect", key=abs, ascending=False, kind="stable", ignore_index=True)

    def by_layer(self) -> pd.DataFrame:
        """Of each layer the sum of its nodes' effects beside what removing them all does.

        Columns `layer`, `features`, `errors`, `sum`, `measured` (m(clean) − m(removed)).
        """
        n = len(self.removed)
        features = self.errors.new_zeros(n).index_add(0, self.nodes.index[:, 0], self.features)
        errors = self.errors.sum(1)
        table = {"layer": range(n), "features": features.tolist(), "errors": errors.tolist()}
        table |= {"sum": (features + errors).tolist(), "measured": (self.clean - self.removed).tolist()}
        return pd.DataFrame(table)


def node_effects(
    model: ReplacementModel,
    prompt: str | Int[Tensor, "pos"] | Trace,
    metric: Measure | tuple[str | int, str | int],
    *,
    corrupted: str | Int[Tensor, "other"] | Trace | None = None,
    method: Method = "gradient",
    steps: int = STEPS,
    regime: After = "model",
    memory: int = MEMORY,
) -> NodeEffects:
    """The effect of every feature and error node on a metric of the last position's logits, or of a site (`Readout`).

    `metric` may be a pair of tokens, for the difference of their logits. Without `corrupted` nodes are compared with 0,
    but for positions without features, which stay; with it, a prompt of the same length, with their values there.
    `steps` of `integrated` are run as many at once as `memory` holds.
    Raises `InputError` for an unknown setting or a metric that does not depend on the nodes, `PromptError` for prompts
    of different lengths, and `DictionaryError` where the regime `replacement` cannot run layer by layer.
    """
    for name, value, known in (("method", method, Method), ("regime", regime, After)):
        if value not in get_args(known):
            raise InputError(f"{name}={value!r} is not known; give {' or '.join(map(repr, get_args(known)))}.")
    if steps < 1:
        raise InputError(f"Integrated gradients need at least one step; got {steps}.")
    trace = prompt if isinstance(prompt, Trace) else model.trace(prompt)
    other = corrupted if isinstance(corrupted, Trace) or corrupted is None else model.trace(corrupted)
    nodes = Nodes.of(model, trace, other)
    runs = Runs(model, trace, token_contrast(model, metric) if isinstance(metric, tuple) else metric, regime, memory)
    slopes, errors = torch.zeros_like(nodes.value), nodes.errors.new_zeros(nodes.errors.shape[:2])
    removed = nodes.errors.new_zeros(len(errors))
    clean, at_clean = runs.gradients(range(model.model.n_layers))
    read_before = metric.site.layer + 1 if isinstance(metric, Readout) else model.model.n_layers
    removed[read_before:] = clean
    for layer in range(read_before):
        written = nodes.written(layer)
        offsets = {at: -change[None] for at, change in written.items()}
        removed[layer] = runs.values(offsets)[0]
        found = at_clean if method == "gradient" else runs.averaged(written, steps)
        slopes[nodes.rows(layer)] = nodes.slopes(layer, found)
        errors[layer] = nodes.effects_of_errors(layer, found[layer])
    return NodeEffects(trace, nodes, runs.metric, method, regime, slopes, errors, clean, removed)


def measured(
    model: LanguageModel, metric: Measure, tokens: Int[Tensor, "row pos"], edits: Mapping[Site, Hook]
) -> Float[Tensor, "row"]:
    """The metric of a run; raises `InputError` unless it is one number for each row."""
    if isinstance(metric, Readout):
        _, found = model.run_to_unembedding(tokens, [metric.site], edits)
        values, what, seen = metric.value(found[metric.site]), "activations", found[metric.site]
    else:
        logits, _ = model.run(tokens, edits=edits)
        values, what, seen = metric(logits[:, -1]), "logits", logits[:, -1]
    if values.shape != seen.shape[:1]:
        raise InputError(
            f"The metric made {list(values.shape)} of {what} {list(seen.shape)}; it must give one number for each row."
        )
    return values


def token_contrast(model: ReplacementModel, tokens: tuple[str | int, str | int]) -> Metric:
    """The logit of one token less that of another."""
    right, wrong = (t if isinstance(t, int) else model.model.token_id(t) for t in tokens)
    return lambda logits: logits[..., right] - logits[..., wrong]


class Runs:
    """A metric of one prompt with something added to what is written, and its gradients by what is written."""

    def __init__(self, model: ReplacementModel, trace: Trace, metric: Measure, regime: After, memory: int) -> None:
        self.model, self.trace, self.metric, self.regime, self.memory = model, trace, metric, regime, memory

    def gradients(self, layers: Sequence[int]) -> tuple[float, dict[int, Float[Tensor, "pos d_model"]]]:
        """m of the clean run, and ∂m/∂y of these layers."""
        zeros = {layer: torch.zeros_like(self.trace.errors[layer])[None] for layer in layers}
        values, found = self._backward(zeros)
        if not found:
            what = "activations at its site" if isinstance(self.metric, Readout) else "logits of the last position"
            raise InputError(f"The metric does not depend on the {what}.")
        return float(values[0]), {layer: gradient[0] for layer, gradient in found.items()}

    @torch.no_grad()
    def values(self, added: Mapping[int, Float[Tensor, "row pos d_model"]]) -> Float[Tensor, "row"]:
        """m of each row."""
        return self._measured(added)

    def averaged(
        self, written: Mapping[int, Float[Tensor, "pos d_model"]], steps: int
    ) -> dict[int, Float[Tensor, "pos d_model"]]:
        """∂m/∂y of the layers in `written`, averaged over runs from which (1 − α) of what is written was taken; 0 of
        those that the metric does not see.
        """
        total = {layer: torch.zeros_like(change) for layer, change in written.items()}
        missing = 1 - (torch.arange(steps, device=self.trace.errors.device).to(self.trace.errors.dtype) + 0.5) / steps
        for some in missing.split(self._rows_at_once()):
            added = {layer: -some[:, None, None] * change for layer, change in written.items()}
            for layer, gradient in self._backward(added)[1].items():
                total[layer] += gradient.sum(0) / steps
        return total

    def _backward(self, added: Mapping[int, Tensor]) -> tuple[Tensor, dict[int, Tensor]]:
        leaves = {layer: value.detach().clone().requires_grad_() for layer, value in added.items()}
        with torch.enable_grad():
            values = self._measured(leaves)
            if not values.requires_grad:
                return values.detach(), {}
            found = torch.autograd.grad(values.sum(), list(leaves.values()), allow_unused=True, materialize_grads=True)
        return values.detach(), dict(zip(leaves, found, strict=True))

    def _measured(self, added: Mapping[int, Tensor]) -> Float[Tensor, "row"]:
        trace, sites = self.trace, self.model.dictionaries.writes
        live = self.regime == "model"
        edits: dict[Site, Hook] = {} if live else self.model.edits(trace.exact, trace.errors)
        for layer, value in added.items():
            add = _adding(value)
            edits[sites[layer]] = after(edits[sites[layer]], add) if sites[layer] in edits else add
        rows = len(next(iter(added.values())))
        return measured(self.model.model, self.metric, trace.tokens.expand(rows, -1), edits)

    def _rows_at_once(self) -> int:
        """Runs that fit in the memory, each block's activations being kept for the backward pass."""
        lm, length = self.model.model, self.trace.n_positions
        block = 40 * lm.d_model + 6 * lm.n_heads * length
        features = sum(map(self.model.dictionaries.n_features, range(lm.n_layers))) if self.regime != "model" else 0
        per_token = lm.n_layers * block + 3 * lm.d_vocab + 3 * features
        return max(1, self.memory // (per_token * length * lm.dtype.itemsize))


def _adding(what: Tensor) -> Hook:
    return lambda value: value + what
