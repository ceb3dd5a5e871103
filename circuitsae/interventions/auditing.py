"""Proof that what a regime holds did not move.

An independent clean run, without any hook that writes, gives the reference; the intervened run is read after all hooks.

| kind                | held value                                  | and what is made of it                        |
|---------------------|---------------------------------------------|-----------------------------------------------|
| `attention pattern` | the pattern is the clean run's              | z = pattern · v, of this run's v              |
| `norm scale`        | the scale is the clean run's                | normalised · scale = (centred) input          |
| `MLP output`        | output − what was added on purpose = clean  |                                               |
| `autoencoder's site`| the same of what leaves the site            |                                               |

The second column catches hooks whose value the model does not use.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from circuitsae.interventions.forward import Forward, layer_of
from circuitsae.interventions.prompts import Recording, write_place, z_hook
from transcoders.errors import CheckFailedError
from transcoders.language_model import Hook

PATTERN, NORM, MLP_OUT, SITE = "attention pattern", "norm scale", "MLP output", "autoencoder's site"
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Largest share of a value's size that rounding explains."""
_COARSE = 5e-2


class Audit:
    """The check of one forward pass."""

    def __init__(self, forward: Forward) -> None:
        self.forward, self.regime = forward, forward.regime
        self.model = forward.model.model
        self._z: dict[str, Tensor] = {}
        spliced = [forward.model.write_hooks[layer] for layer in forward.model.spliced]
        self._given = {*forward.vectors, *spliced}
        """Places whose value may be set on purpose."""
        constants = forward.prompts[0].trace.frozen.constants
        patterns = [n for n in constants if n.endswith("hook_pattern") and self.regime.holds(n)]
        self.held_heads = {n: self._held_heads(n, self.model.n_heads) for n in patterns}
        self.patterns = [n for n in patterns if self.held_heads[n]]
        self.scales = [n for n in constants if n.endswith("hook_scale") and self.regime.holds(n)]
        held = [layer for layer in range(self.model.n_layers) if self.regime.mlp(layer) == "constant"]
        self.mlps = {layer: forward.model.write_hooks[layer] for layer in held if layer not in forward.model.passed}
        """Of layers with something held in the place of an MLP's output, or of an autoencoder's site, its hook."""

    def _held_heads(self, name: str, count: int) -> list[int]:
        live = self.regime.live_heads(layer_of(name))
        return [head for head in range(count) if head not in live]

    @property
    def names(self) -> list[str]:
        """Hooks to read in the intervened run."""
        consumers = [name for scale in self.scales for name in _norm_names(scale)]
        values = [_value_hook(name) for name in self.patterns]
        wanted = [*self.patterns, *self.scales, *self.mlps.values(), *consumers, *values]
        return [name for name in wanted if self.model.has_hook(name)]

    @property
    def peek(self) -> dict[str, Hook]:
        """Hooks that note the heads' outputs before they are changed on purpose."""

        def note(name: str) -> Hook:
            return lambda value: self._z.update({name: value})

        return {name: note(name) for name in (z_hook(layer_of(n)) for n in self.patterns) if self.model.has_hook(name)}

    def check(self, cache: Mapping[str, Tensor]) -> list[dict[tuple[str, int], float]]:
        """By row: how far everything held moved, by kind and layer. Raises `CheckFailedError` where it is too far."""
        moved: list[dict[tuple[str, int], float]] = []
        for row, prompt in enumerate(self.forward.prompts):
            here = {name: value[row if len(value) > 1 else 0] for name, value in {**cache, **self._z}.items()}
            found = self._moved(row, prompt, here)
            _refuse(found, self.model.dtype)
            moved.append(found)
        return moved

    def _moved(self, row: int, prompt: Recording, here: Mapping[str, Tensor]) -> dict[tuple[str, int], float]:
        clean = prompt.clean_values(reference_names(prompt))
        found: dict[tuple[str, int], float] = {}
        for name in self.patterns:
            heads = self.held_heads[name]
            far = max(_share(here[name][heads], clean[name][heads]), self._pattern_use(name, here, clean))
            found[PATTERN, layer_of(name)] = far
        for name in self.scales:
            key = (NORM, layer_of(name, self.model.n_layers))
            on_purpose = _norm_names(name)[1] in self._given  # what the norm gives was changed itself
            far = max(_share(here[name], clean[name]), 0.0 if on_purpose else _norm_use(name, here, clean))
            found[key] = max(found.get(key, 0.0), far)
        for layer, name in self.mlps.items():
            kind = SITE if layer in self.forward.model.spliced else MLP_OUT
            found[kind, layer] = self._mlp_moved(row, layer, here[name], clean)
        return found

    def _pattern_use(self, name: str, here: Mapping[str, Tensor], clean: Mapping[str, Tensor]) -> float:
        z, v = z_hook(layer_of(name)), _value_hook(name)
        if z not in here or v not in here or _share(_mix(clean[name], clean[v]), clean[z]) > _COARSE:
            return 0.0  # the architecture makes z in another way
        heads = self.held_heads[name]
        return _share(here[z][:, heads], _mix(clean[name], here[v])[:, heads])

    def _mlp_moved(self, row: int, layer: int, out: Tensor, clean: Mapping[str, Tensor]) -> float:
        """Positions whose whole output was set on purpose are left out."""
        expected = clean[self.mlps[layer]] + self.forward.declared[layer][row]
        if (skip := self.forward.model.dictionaries.skip(layer)) is not None:
            expected = expected + (self.forward.read[layer][row] - clean[self.forward.model.read_hooks[layer]]) @ skip
        kept = torch.ones(len(out), dtype=torch.bool, device=out.device)
        for table in self.forward.vectors.get(write_place(self.forward.model, layer), ()):
            kept[table.pos[table.row == row]] = False
        size = float(clean[self.mlps[layer]].abs().max()) or 1.0
        return float((out - expected)[kept].abs().max()) / size if kept.any() else 0.0


def reference_names(recording: Recording) -> list[str]:
    """All that an audit compares, of any regime."""
    model, constants = recording.model.model, recording.trace.frozen.constants
    names = list(constants)
    for name in constants:
        names += [_value_hook(name), z_hook(layer_of(name))] if name.endswith("pattern") else _norm_names(name)
    names += [*recording.model.read_hooks, *recording.model.write_hooks]
    return [name for name in dict.fromkeys(names) if model.has_hook(name)]


def _norm_names(scale: str) -> list[str]:
    norm = scale.removesuffix("hook_scale")
    return [f"{norm}hook_in", f"{norm}hook_normalized"]


def _value_hook(pattern: str) -> str:
    return pattern.removesuffix("hook_pattern") + "v.hook_out"


def _mix(pattern: Tensor, v: Tensor) -> Tensor:
    """z of every head: values, shared by groups of heads, under the pattern."""
    heads = v.repeat_interleave(pattern.shape[0] // v.shape[1], dim=1)
    return torch.einsum("hqk,khd->qhd", pattern, heads)


def _norm_use(scale: str, here: Mapping[str, Tensor], clean: Mapping[str, Tensor]) -> float:
    read, normalised = _norm_names(scale)
    if read not in here or normalised not in here:
        return 0.0
    made = {
        centred: _share(clean[normalised] * clean[scale], _centre(clean[read], centred)) for centred in (True, False)
    }
    centred = min(made, key=made.__getitem__)
    if made[centred] > _COARSE:
        return 0.0  # the architecture normalises in another way
    return _share(here[normalised] * clean[scale], _centre(here[read], centred))


def _centre(x: Tensor, centred: bool) -> Tensor:
    return x - x.mean(-1, keepdim=True) if centred else x


def _share(value: Tensor, clean: Tensor) -> float:
    """Largest difference over the largest clean value."""
    return float((value - clean).abs().max()) / (float(clean.abs().max()) or 1.0)


def _refuse(moved: Mapping[tuple[str, int], float], dtype: torch.dtype) -> None:
    tolerance = TOLERANCE.get(dtype, _COARSE)
    for (kind, layer), far in moved.items():
        if not far <= tolerance:
            raise CheckFailedError(
                f"The {kind} of layer {layer} was declared frozen, but moved by {far:.1e} of its size, more than "
                f"{tolerance:.0e}; no effect measured in this run can be trusted."
            )
