"""Run prompts with interventions and compare with the clean run."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from circuitsae.frozen import Reads
from circuitsae.interventions.auditing import Audit
from circuitsae.interventions.changes import Contribution, Intervention
from circuitsae.interventions.forward import (
    FINAL,
    Alternative,
    Forward,
    Regime,
    RegimeName,
    first_block,
    regime_named,
    rows_at_once,
)
from circuitsae.interventions.hooks import Tables, compile_edits
from circuitsae.interventions.outcome import BatchReads, Outcome
from circuitsae.interventions.prompts import Library, Prompt, PromptLike, Recording
from circuitsae.interventions.writers import Compiled, Shares
from circuitsae.replacement import ReplacementModel, Trace
from transcoders.errors import InputError


@torch.no_grad()
def intervene(
    model: ReplacementModel,
    prompts: PromptLike | Sequence[PromptLike],
    interventions: Sequence[Intervention | Contribution] | Sequence[Sequence[Intervention | Contribution]],
    *,
    regime: RegimeName | Regime = "model",
    until: int | None = None,
    audit: bool = False,
    logits_at: int | None = -1,
    reads: bool = True,
    memory: int | None = None,
) -> Outcome:
    """What the model computes once something was changed, beside what it computes by itself.

    `interventions` is one alternative (a list of changes, all made in one run) or several (a list of such lists). Every
    alternative is run on every prompt; a forward pass carries as many as fit into about `memory` bytes, by default what
    suits the device. All prompts have one number of tokens. `logits_at` is the position whose logits are kept (None:
    every one); without `reads` what the dictionaries and the unembedding read is dropped. `audit` proves that what the
    regime holds did not move.

    Raises `InputError` for what the model, the dictionaries or a prompt do not have, `CheckFailedError` if an audit
    finds something moved.
    """
    chosen = regime_named(regime, until)
    library = Library(model)
    recordings = [library[prompt] for prompt in _listed(prompts)]
    if not recordings:
        raise InputError("There is no prompt to intervene on; give at least one.")
    alternatives = alternatives_of(interventions)
    rows = [(recording, alternative) for recording in recordings for alternative in alternatives]
    at = slice(None) if logits_at is None else _kept(logits_at, len(recordings[0]))
    logits, by_layer, final, moved = [], [], [], []
    for chunk in run_alternatives(model, rows, chosen, memory=memory, audit=audit, library=library):
        logits.append(chunk.logits[:, at].clone())
        moved += chunk.moved
        if reads:
            by_layer.append(chunk.by_layer)
            final.append(chunk.final)
    shape = (len(recordings), len(alternatives))
    clean = [r.trace.frozen.reads for r in recordings]
    return Outcome(
        model=model,
        prompts=tuple(recordings),
        alternatives=tuple(tuple(a) for a in alternatives),
        regime=chosen,
        clean=torch.stack([r.trace.logits[at] for r in recordings]),
        changed=torch.cat(logits).unflatten(0, shape),
        clean_reads=BatchReads(torch.stack([c.by_layer for c in clean]), torch.stack([c.final for c in clean])),
        changed_reads=BatchReads(*(torch.cat(x).unflatten(0, shape) for x in (by_layer, final))) if reads else None,
        audit=_audit_frame(moved, len(alternatives)) if audit else None,
    )


def audit(
    model: ReplacementModel,
    prompt: PromptLike,
    interventions: Sequence[Intervention | Contribution],
    regime: RegimeName | Regime = "frozen",
    *,
    until: int | None = None,
) -> pd.DataFrame:
    """Proof that what `regime` holds did not move under these interventions: `kind`, `layer`, `moved`.

    `moved` is the largest difference from an independent clean run, as a share of the largest clean value. The final
    norm has the layer after the last. Raises `CheckFailedError` naming kind and layer where it is more than rounding.
    """
    outcome = intervene(model, prompt, interventions, regime=regime, until=until, audit=True, reads=False)
    assert outcome.audit is not None
    return outcome.audit.drop(columns=["prompt", "alternative"])


@torch.no_grad()
def reads_after(
    model: ReplacementModel,
    trace: Trace,
    changes: Sequence[Contribution | Alternative],
    regime: RegimeName | Regime,
    *,
    memory: int | None = None,
) -> list[Reads]:
    """What every dictionary and the unembedding read once each change (one at a time) was made."""
    recording = Recording(model, trace)
    rows = [[change] if isinstance(change, Contribution) else change for change in changes]
    found: dict[int, Reads] = {}
    for chunk in run_reads(model, recording, rows, regime, memory=memory):
        found |= dict(zip(chunk.rows, map(Reads, chunk.by_layer, chunk.final), strict=True))
    return [found[row] for row in range(len(rows))]


def _listed(prompts: PromptLike | Sequence[PromptLike]) -> Sequence[PromptLike]:
    one = isinstance(prompts, str | torch.Tensor | Trace | Prompt)
    return [cast(PromptLike, prompts)] if one else cast(Sequence[PromptLike], prompts)


def alternatives_of(given: Sequence[Any]) -> list[Sequence[Intervention | Contribution]]:
    """A list of alternatives, whether one or several were given."""
    single = [isinstance(item, Intervention | Contribution) for item in given]
    if all(single):
        return [list(given)]
    if any(single):
        raise InputError("Give one list of interventions, or a list of such lists, not a mixture.")
    for item in (it for alternative in given for it in alternative):
        if not isinstance(item, Intervention | Contribution):
            raise InputError(f"{item!r} is no intervention; write Intervention(Feature(2, 713, 5), Zero()).")
    return list(given)


def _kept(at: int, length: int) -> slice:
    if not -length <= at < length:
        raise InputError(f"logits_at={at} is no position of prompts of {length} tokens.")
    return slice(at % length, at % length + 1)


def _audit_frame(moved: list[dict[tuple[str, int], float]], alternatives: int) -> pd.DataFrame:
    rows = [
        (number // alternatives, number % alternatives, kind, layer, far)
        for number, found in enumerate(moved)
        for (kind, layer), far in found.items()
    ]
    return pd.DataFrame(rows, columns=["prompt", "alternative", "kind", "layer", "moved"])


@dataclass(frozen=True)
class Chunk:
    """What one forward pass read, for rows `start` to `stop` of what was asked for."""

    start: int
    stop: int
    by_layer: Float[Tensor, "batch layer pos d_model"]
    final: Float[Tensor, "batch pos d_model"]
    """After the final norm."""
    logits: Float[Tensor, "batch pos d_vocab"]
    moved: list[dict[tuple[str, int], float]]
    """With an audit: for each row, how far what is held moved, by kind and layer, as a share of its largest value."""


@dataclass(frozen=True)
class ReadChunk:
    """What one forward pass read, for some rows of what was asked for."""

    rows: list[int]
    by_layer: Float[Tensor, "batch layer pos d_model"]
    final: Float[Tensor, "batch pos d_model"]
    """After the final norm."""


@torch.no_grad()
def run_reads(
    model: ReplacementModel,
    prompt: Recording,
    alternatives: Sequence[Alternative] | Shares,
    regime: RegimeName | Regime,
    *,
    memory: int | None = None,
) -> Iterator[ReadChunk]:
    """As `run_alternatives` on one prompt, for what is read alone: a part of the work.

    Rows come in the order of the first block that they change, at which their pass begins; neither logits are computed
    nor MLPs whose outputs are held.
    """
    chosen = regime_named(regime)
    changes = alternatives if isinstance(alternatives, Shares) else compiled(alternatives, prompt)
    whole = chosen.mlps == "features"  # features of all layers are recomputed
    starts = [0] * len(changes) if whole else changes.starts
    order = sorted(range(len(changes)), key=starts.__getitem__)
    size = rows_at_once(model, len(prompt), chosen, memory, logits=False)
    for begin in range(0, len(order), size):
        rows = order[begin : begin + size]
        forward = Forward(model, [prompt] * len(rows), changes.tables(rows), chosen)
        yield ReadChunk(rows, *read_from(forward, starts[rows[0]]))


def compiled(alternatives: Sequence[Alternative], prompt: Recording) -> Compiled:
    """Alternatives of any kind, as the passes of `run_reads` take them."""
    library = Library(prompt.model)
    edits = [compile_edits(alternative, prompt, library) for alternative in alternatives]
    return Compiled(edits, [first_block(one) for one in edits])


def read_from(forward: Forward, start: int) -> tuple[Tensor, Tensor]:
    """What is read in a pass over rows of one prompt that begins at a block, where the model can be run from there on;
    below it, what the clean run read.
    """
    model, prompt, count = forward.model, forward.prompts[0], len(forward.prompts)
    start = start if start and start in prompt.streams else 0
    stream = prompt.streams[start].expand(count, -1, -1) if start else None
    tokens = prompt.trace.tokens.expand(count, -1)
    with model.model.parts.silent_mlps(forward.idle):
        final, _ = model.model.run_to_unembedding(tokens, start=start, stream=stream, held=forward.hooks())
    reads = forward.by_row(lambda p: p.trace.frozen.reads.by_layer).clone()
    for layer, read in forward.read.items():
        reads[:, layer] = read
    return reads, final


@torch.no_grad()
def run_alternatives(
    model: ReplacementModel,
    rows: Sequence[tuple[PromptLike | Recording, Alternative]],
    regime: str | Regime = "model",
    *,
    until: int | None = None,
    memory: int | None = None,
    audit: bool = False,
    library: Library | None = None,
) -> Iterator[Chunk]:
    """Run prompts, each with its interventions, as many together as fit into `memory` bytes.

    The lean way: measure each chunk and drop it. Prompts must have one length. With `audit`, raises `CheckFailedError`
    where something that the regime holds moved.
    """
    chosen = regime_named(regime, until)
    if not rows:
        return
    library = library or Library(model)
    prompts = [library[prompt] for prompt, _ in rows]
    _require_one_length(prompts)
    size = rows_at_once(model, len(prompts[0]), chosen, memory)
    for start in range(0, len(rows), size):
        stop = min(start + size, len(rows))
        here = prompts[start:stop]
        given = zip(here, rows[start:stop], strict=True)
        edits = [compile_edits(alternative, prompt, library) for prompt, (_, alternative) in given]
        forward = Forward(model, here, Tables.of(edits), chosen)
        checks = Audit(forward) if audit else None
        tokens = torch.stack([p.trace.tokens for p in here])
        names, hooks = [FINAL, *(checks.names if checks else ())], forward.hooks(checks and checks.peek)
        logits, cache = model.model.run_hooked(tokens, read=names, write=hooks)
        moved = checks.check(cache) if checks else []
        reads = torch.stack([forward.read[layer] for layer in range(model.model.n_layers)], dim=1)
        chunk = Chunk(start, stop, reads, cache[FINAL], logits, moved)
        del forward, checks, hooks, cache, logits, edits  # nothing of this pass but the chunk is alive in the next
        yield chunk
        del chunk


def _require_one_length(prompts: Sequence[Recording]) -> None:
    lengths = sorted({len(p) for p in prompts})
    if len(lengths) > 1:
        raise InputError(f"Prompts that run together must have one length; these have {lengths} tokens. Split them.")
