"""Three answers to "what if this had been written instead?".

| regime        | attention, norms | MLPs                                   | is a test of          |
|---------------|------------------|----------------------------------------|-----------------------|
| `frozen`      | clean values     | clean outputs                          | this code             |
| `replacement` | recomputed       | features recomputed, errors constant   | the linearisation     |
| `model`       | recomputed       | the model's own, recomputed            | the claim             |
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from circuitsae.frozen import Reads
from circuitsae.interventions.changes import Change
from circuitsae.replacement import ReplacementModel, Trace
from transcoders.errors import InputError
from transcoders.language_model import Hook
from transcoders.sites import Site

Regime = Literal["frozen", "replacement", "model"]

_BATCH_TOKENS = 4096
_EMBED, _FINAL = "embed.hook_out", "unembed.hook_in"


@torch.no_grad()
def reads_after(model: ReplacementModel, trace: Trace, changes: Sequence[Change], regime: Regime) -> list[Reads]:
    """What every MLP and the unembedding read once each change (one at a time) has been added to the stream."""
    if regime not in get_args(Regime):
        raise InputError(f"Unknown regime {regime!r}; the regimes are {', '.join(get_args(Regime))}.")
    if regime == "frozen":
        return [_frozen(trace, change) for change in changes]
    size = max(1, _BATCH_TOKENS // trace.n_positions)
    reads = []
    for start in range(0, len(changes), size):
        reads += _live(model, trace, changes[start : start + size], regime)
    return reads


def _frozen(trace: Trace, change: Change) -> Reads:
    frozen = trace.frozen
    written = frozen.writes.mlp_out - frozen.skip_out(frozen.reads.mlp_in)
    return frozen(replace(frozen.writes, embed=frozen.writes.embed + change.embed, mlp_out=written + change.mlp_out))


def _live(model: ReplacementModel, trace: Trace, changes: Sequence[Change], regime: Regime) -> list[Reads]:
    """One forward pass that carries a change in each row of the batch."""
    mlp_out = torch.stack([change.mlp_out for change in changes], dim=1)
    embed = torch.stack([change.embed for change in changes])
    layers = range(model.model.n_layers)
    replaced = model.edits(trace.errors) if regime == "replacement" else {}
    edits = {site.hook: edit for site, edit in replaced.items()}
    for layer in layers:
        site = Site(layer, "mlp_out")
        edits[site.hook] = _adding(mlp_out[layer], replaced.get(site))
    edits[_EMBED] = _adding(embed)
    reads = [Site(layer, "mlp_in").hook for layer in layers]
    tokens = trace.tokens.expand(len(changes), -1)
    _, cache = model.model.run_hooked(tokens, read=[*reads, _FINAL], write=edits)
    mlp_in = torch.stack([cache[name] for name in reads], dim=1)
    return [Reads(*pair) for pair in zip(mlp_in, cache[_FINAL], strict=True)]


def _adding(change: Float[Tensor, "batch pos d_model"], first: Hook | None = None) -> Hook:
    def add(value: Tensor) -> Tensor:
        before = first(value) if first is not None else None
        return (value if before is None else before) + change

    return add
