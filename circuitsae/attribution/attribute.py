"""attribute: a prompt becomes an attribution graph."""

import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from rich.progress import Progress
from torch import Tensor

from circuitsae.attribution.engines import EngineName, linear_for, open_engine, to_numpy
from circuitsae.attribution.expansion import Expansion, Rows, every_row, explored, looked_at, most_influential
from circuitsae.attribution.linear import LinearModel
from circuitsae.attribution.sources import UNEMBED, Sources
from circuitsae.attribution.targets import (
    ChooseLogits,
    Readers,
    TopLogits,
    centred_columns,
    feature_readers,
    logit_readers,
)
from circuitsae.graph import AttributionGraph, Node, NodeKind
from circuitsae.replacement import ReplacementModel, Trace
from transcoders.dictionaries.fingerprint import dictionary_fingerprint
from transcoders.errors import InputError


def attribute(
    model: ReplacementModel,
    prompt: str | Int[Tensor, "pos"],
    *,
    targets: ChooseLogits = TopLogits(),
    max_features: int | None = None,
    unexplained: float | None = None,
    edges_per_node: int | None = None,
    batch_size: int | Literal["auto"] = "auto",
    engine: EngineName = "auto",
    progress: bool = False,
) -> AttributionGraph:
    """The full attribution graph of a prompt's last position; `prune()` it to read it.

    A[t, s] = a_s · Σ_{l' < l_t} W_dec[s→l'] · P((l', p_s) → (l_t, p_t)) · W_enc[:, t] under frozen attention patterns
    and norm scales, after Ameisen et al. 2025, "Circuit Tracing".

    * `max_features`: only this many features become nodes, those of most influence as far as the rows of the logits
      and of a few features tell; what the others write counts as error there, so rows still sum up.
    * `unexplained`: features get their rows from the logits down, always those of most influence so far, until the
      features without hold at most this share of the influence (or `max_features` have theirs).
    * `edges_per_node`: only this many strongest edges into each node are stored, with the exact sum of the others.
    * `engine`: `fast` is closed-form, `plain` the slow reference; `auto` is the fast one where the model allows.
    * `batch_size`: targets at once; `auto` bounds the memory.

    Raises `PromptError` for a prompt the model cannot take, `InputError` for targets it does not have or a setting out
    of range, and `ModelError` where the engine cannot take the model.
    """
    trace = model.trace(prompt)
    return attribute_trace(
        model,
        trace,
        prompt=prompt if isinstance(prompt, str) else None,
        targets=targets,
        max_features=max_features,
        unexplained=unexplained,
        edges_per_node=edges_per_node,
        batch_size=batch_size,
        engine=engine,
        progress=progress,
    )


@torch.no_grad()
def attribute_trace(
    model: ReplacementModel,
    trace: Trace,
    *,
    prompt: str | None = None,
    targets: ChooseLogits = TopLogits(),
    max_features: int | None = None,
    unexplained: float | None = None,
    edges_per_node: int | None = None,
    batch_size: int | Literal["auto"] = "auto",
    engine: EngineName = "auto",
    progress: bool = False,
) -> AttributionGraph:
    """`attribute` of a prompt that has been traced already."""
    _check_settings(max_features, unexplained, edges_per_node, batch_size)
    token = targets(model.model, trace.logits[-1])
    n_features = len(trace.features.value)
    at_most = min(max_features or n_features, n_features)
    settings = {
        "targets": repr(targets),
        "max_features": max_features,
        "unexplained": unexplained,
        "edges_per_node": edges_per_node,
    }
    with Progress(disable=not progress, transient=True) as bar:
        task = bar.add_task("attributing", total=at_most)
        open_rows = _OpenRows(
            model=model,
            linear=linear_for(engine, trace),
            batch_size=None if batch_size == "auto" else batch_size,
            edges_per_node=edges_per_node,
            provenance=_provenance(model, prompt, settings),
            done=lambda n: bar.advance(task, n),
        )
        ends = _Ends.of(model, trace, token)
        if unexplained is not None:
            with open_rows(ends, at_most) as opened:
                return explored(*opened, at_most, unexplained)
        if at_most < n_features:
            with open_rows(ends, looked_at(at_most)) as opened:
                kept = most_influential(*opened, at_most)
            bar.reset(task)
            ends = ends.keep(torch.from_numpy(kept).to(token.device).sort().values)
        with open_rows(ends, ends.n_features) as opened:
            return every_row(*opened)


@dataclass(frozen=True)
class _Ends:
    """The ends of a prompt's edges: its sources, and its targets, which are the active features and the logits."""

    trace: Trace
    sources: Sources
    targets: Readers
    other_nodes: tuple[Node, ...]
    """b_U, where the model has one, and the logits."""
    unembedding_bias: Float[Tensor, "k _"]

    @classmethod
    def of(cls, model: ReplacementModel, trace: Trace, token: Int[Tensor, "k"]) -> "_Ends":
        features = feature_readers(model, trace, torch.arange(len(trace.features.value), device=token.device))
        logits = logit_readers(trace, token)
        extra, bias = _unembedding_bias(model, trace, token)
        return cls(
            trace=trace,
            sources=Sources(model, trace),
            targets=Readers(*(torch.cat(pair) for pair in zip(features, logits, strict=True))),
            other_nodes=(*extra, *_logit_nodes(model, trace, token)),
            unembedding_bias=bias,
        )

    @property
    def n_features(self) -> int:
        return len(self.trace.features.value)

    def keep(self, rows: Int[Tensor, "k"]) -> "_Ends":
        """The features with these numbers, in order, and the logits; what the other features write is error."""
        trace = self.sources.model.keep(self.trace, rows)
        logits = torch.arange(self.n_features, len(self.targets.layer), device=rows.device)
        return replace(
            self,
            trace=trace,
            sources=self.sources.keep(trace, rows),
            targets=self.targets.take(torch.cat([rows, logits])),
        )


@dataclass(frozen=True, kw_only=True)
class _OpenRows:
    """Opens the rows of a prompt, be it with all of its features or with some."""

    model: ReplacementModel
    linear: LinearModel | None
    batch_size: int | None
    edges_per_node: int | None
    provenance: dict[str, Any]
    done: Callable[[int], Any]

    @contextmanager
    def __call__(self, ends: _Ends, n_wanted: int) -> Iterator[tuple[Expansion, Rows]]:
        """`n_wanted`: the rows of so many features will be asked for."""
        trace, sources, n_features = ends.trace, ends.sources, ends.n_features
        expansion = Expansion(
            nodes=(*sources.nodes, *ends.other_nodes),
            n_features=n_features,
            tokens=trace.token_strings,
            token_ids=tuple(trace.tokens.tolist()),
            n_layers=self.model.model.n_layers,
            provenance=self.provenance,
            edges_per_node=self.edges_per_node,
        )
        share = n_wanted / n_features if n_features else 1.0
        with open_engine(
            self.linear, self.model, trace, sources, ends.targets, share=share, batch_size=self.batch_size
        ) as engine:
            yield expansion, Rows(engine, to_numpy(ends.unembedding_bias), len(sources.nodes), self.done)


def _check_settings(
    max_features: int | None, unexplained: float | None, edges_per_node: int | None, batch_size: int | str
) -> None:
    for name, value in (("max_features", max_features), ("edges_per_node", edges_per_node), ("batch_size", batch_size)):
        if isinstance(value, int) and value < 1:
            raise InputError(f"{name}={value} leaves nothing to compute; give at least 1.")
    if unexplained is not None and not 0 <= unexplained < 1:
        raise InputError(f"unexplained={unexplained} is not a share of the influence; give a number from 0 to below 1.")


def _logit_nodes(model: ReplacementModel, trace: Trace, token: Int[Tensor, "k"]) -> list[Node]:
    logits, last = trace.logits[-1], trace.n_positions - 1
    probability, centred = logits.softmax(-1)[token], (logits - logits.mean())[token]
    return [
        Node(
            NodeKind.LOGIT,
            model.model.n_layers,
            last,
            index,
            model.model.token_string(index),
            pre_activation=value,
            probability=p,
        )
        for index, value, p in zip(token.tolist(), centred.tolist(), probability.tolist(), strict=True)
    ]


def _unembedding_bias(
    model: ReplacementModel, trace: Trace, token: Int[Tensor, "k"]
) -> tuple[list[Node], Float[Tensor, "k _"]]:
    """The node of b_U, where the model has one, and what it adds to each logit, centred like the logits."""
    group = model.model.bias_groups().get((model.model.n_layers, UNEMBED))
    if group is None:
        return [], trace.logits.new_zeros(len(token), 0)
    node = Node(NodeKind.BIAS, model.model.n_layers, -1, text=f"{UNEMBED}.b")
    return [node], centred_columns(group[0].detach(), trace, token)[:, None]


def _provenance(model: ReplacementModel, prompt: str | None, settings: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": model.model.name,
        "fingerprint": model.model.fingerprint(),
        "frame": model.model.frame.name,
        "dtype": str(model.model.dtype).removeprefix("torch."),
        "dictionaries": {"kind": model.dictionaries.kind, **model.dictionaries.provenance.to_json()},
        "dictionary_fingerprint": _dictionary_fingerprint(model),
        "prompt": prompt,
        "settings": settings,
        "versions": {name: _version(name) for name in ("circuitsae", "torch", "transformer-lens")}
        | {"python": platform.python_version()},
    }


def _dictionary_fingerprint(model: ReplacementModel) -> str | None:
    """Which weights the dictionaries have; None where they were rounded to those of a model in low precision."""
    exact = model.model.dtype in (torch.float32, torch.float64)
    return dictionary_fingerprint(model.dictionaries) if exact else None


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "uninstalled"
