"""attribute: a prompt becomes an attribution graph."""

import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from rich.progress import Progress
from torch import Tensor

from circuitsae.attribution.engines import EngineName, linear_for, open_engine, to_numpy
from circuitsae.attribution.expansion import (
    Expansion,
    FullSize,
    Rows,
    every_row,
    explored,
    first_look,
    looked_at,
    pruned,
    with_only,
)
from circuitsae.attribution.linear import LinearModel
from circuitsae.attribution.sources import UNEMBED, Sources, feature_nodes
from circuitsae.attribution.targets import (
    ChooseLogits,
    Readers,
    TopLogits,
    centred_columns,
    feature_readers,
    logit_readers,
)
from circuitsae.graph import AttributionGraph, Node, NodeKind
from circuitsae.graph.compact import RowBlock
from circuitsae.graph.pruning import check_shares
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
    bos: bool | None = None,
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
    * `bos`: whether a text gets BOS first; default, as the model reads texts (its dictionaries' training).

    Raises `PromptError` for a prompt the model cannot take, `InputError` for targets it does not have or a setting out
    of range, and `ModelError` where the engine cannot take the model.
    """
    trace = model.trace(prompt, bos=bos)
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


def attribute_pruned(
    model: ReplacementModel,
    prompt: str | Int[Tensor, "pos"],
    *,
    nodes: float = 0.8,
    edges: float = 0.98,
    targets: ChooseLogits = TopLogits(),
    max_features: int | None = None,
    unexplained: float | None = None,
    edges_per_node: int | None = None,
    batch_size: int | Literal["auto"] = "auto",
    engine: EngineName = "auto",
    bos: bool | None = None,
    progress: bool = False,
) -> tuple[AttributionGraph, FullSize]:
    """`attribute(...).prune(nodes=nodes, edges=edges)`, and how large the full graph was, which is never held.

    Edges are dropped as soon as their influence is counted, so that the memory does not grow with them (those of
    targets below the layer where the fast engine's sources and targets meet wait until the end; with `unexplained`
    the rows that were found are held). Same nodes and edges as the full graph's, and the same figures up to the
    rounding of float64.
    """
    check_shares(nodes=nodes, edges=edges)
    limits = _Limits(max_features, unexplained, edges_per_node, batch_size)
    work = _Attribution(
        model, model.trace(prompt, bos=bos), prompt if isinstance(prompt, str) else None, targets, limits, engine
    )
    if unexplained is not None:
        full = work.graph(progress)
        return full.prune(nodes=nodes, edges=edges), FullSize(len(full.nodes), int(full.weights.nnz))
    with work.rows(progress) as (expansion, rows, known):
        return pruned(expansion, rows, nodes, edges, known)


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
    limits = _Limits(max_features, unexplained, edges_per_node, batch_size)
    return _Attribution(model, trace, prompt, targets, limits, engine).graph(progress)


@dataclass(frozen=True)
class _Limits:
    """How much is asked for; the fields are `attribute`'s."""

    max_features: int | None
    unexplained: float | None
    edges_per_node: int | None
    batch_size: int | Literal["auto"]

    def __post_init__(self) -> None:
        for name in ("max_features", "edges_per_node", "batch_size"):
            value = getattr(self, name)
            if isinstance(value, int) and value < 1:
                raise InputError(f"{name}={value} leaves nothing to compute; give at least 1.")
        if self.unexplained is not None and not 0 <= self.unexplained < 1:
            raise InputError(
                f"unexplained={self.unexplained} is not a share of the influence; give a number from 0 to below 1."
            )


@dataclass(frozen=True)
class _Attribution:
    """What is asked for, and how a graph is made of it."""

    model: ReplacementModel
    trace: Trace
    prompt: str | None
    targets: ChooseLogits
    limits: _Limits
    engine: EngineName

    def graph(self, progress: bool) -> AttributionGraph:
        with self.rows(progress) as (expansion, rows, known):
            if self.limits.unexplained is None:
                return every_row(expansion, rows, known)
            return explored(expansion, rows, self._at_most, self.limits.unexplained)

    @contextmanager
    def rows(self, progress: bool) -> Iterator[tuple[Expansion, Rows, RowBlock | None]]:
        """The nodes, the rows that can be had, and those that are known already."""
        model, trace, limits = self.model, self.trace, self.limits
        token = self.targets(model.model, trace.logits[-1])
        settings = {
            "targets": repr(self.targets),
            "max_features": limits.max_features,
            "unexplained": limits.unexplained,
            "edges_per_node": limits.edges_per_node,
        }
        with torch.no_grad(), Progress(disable=not progress, transient=True) as bar:
            task = bar.add_task("attributing", total=self._at_most + len(token))
            open_rows = _OpenRows(
                model=model,
                linear=linear_for(self.engine, trace),
                batch_size=None if limits.batch_size == "auto" else limits.batch_size,
                edges_per_node=limits.edges_per_node,
                provenance=_provenance(model, trace, self.prompt, settings),
                done=lambda n: bar.advance(task, n),
            )
            ends, known = _Ends.of(model, trace, token), None
            wanted = None if limits.unexplained is None else self._at_most
            if wanted is None and self._at_most < len(trace.features.value):
                ends, known = _chosen(open_rows, ends, self._at_most)
                bar.reset(task, total=len(ends.targets.layer))
            with open_rows(ends, wanted) as (expansion, rows):
                yield expansion, rows, known

    @property
    def _at_most(self) -> int:
        n_features = len(self.trace.features.value)
        return min(self.limits.max_features or n_features, n_features)


@dataclass(frozen=True)
class _Ends:
    """The ends of a prompt's edges: its sources, and its targets, of the active features and logits those wanted."""

    trace: Trace
    sources: Sources
    other_nodes: tuple[Node, ...]
    """b_U, where the model has one, and the logits."""
    targets: Readers
    target_nodes: np.ndarray
    """[target], which node it is."""
    unembedding_bias: np.ndarray
    """[target, extra], what b_U adds to it."""

    @classmethod
    def of(cls, model: ReplacementModel, trace: Trace, token: Int[Tensor, "k"]) -> "_Ends":
        n_features = len(trace.features.value)
        features = feature_readers(model, trace, torch.arange(n_features, device=token.device))
        sources = Sources(model, trace, feature_nodes(model, trace, features))
        extra, bias = _unembedding_bias(model, trace, token)
        logits = len(sources.nodes) + len(extra) + np.arange(len(token))
        return cls(
            trace=trace,
            sources=sources,
            other_nodes=(*extra, *_logit_nodes(model, trace, token)),
            targets=Readers(*(torch.cat(p) for p in zip(features, logit_readers(trace, token), strict=True))),
            target_nodes=np.concatenate([np.arange(n_features), logits]),
            unembedding_bias=np.pad(to_numpy(bias), ((n_features, 0), (0, 0))),
        )

    @property
    def nodes(self) -> tuple[Node, ...]:
        return (*self.sources.nodes, *self.other_nodes)

    @property
    def n_features(self) -> int:
        return len(self.trace.features.value)

    def keep(self, features: np.ndarray) -> "_Ends":
        """The features with these numbers, in order, and the logits; what the other features write is error."""
        rows = torch.from_numpy(features).to(self.targets.layer.device)
        trace = self.sources.model.keep(self.trace, rows)
        sources = self.sources.keep(trace, rows)
        dropped = np.setdiff1d(np.arange(self.n_features), features)
        left = self.without_targets(dropped)
        nodes = left.target_nodes - np.searchsorted(dropped, left.target_nodes)
        return replace(left, trace=trace, sources=sources, target_nodes=nodes)

    def without_targets(self, nodes: np.ndarray) -> "_Ends":
        wanted = np.flatnonzero(~np.isin(self.target_nodes, nodes))
        return replace(
            self,
            targets=self.targets.take(torch.from_numpy(wanted).to(self.targets.layer.device)),
            target_nodes=self.target_nodes[wanted],
            unembedding_bias=self.unembedding_bias[wanted],
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
    def __call__(self, ends: _Ends, n_features: int | None = None) -> Iterator[tuple[Expansion, Rows]]:
        """`n_features`: the rows of so many features will be asked for; default: those of all targets, at once."""
        trace, sources = ends.trace, ends.sources
        expansion = Expansion(
            nodes=ends.nodes,
            n_features=ends.n_features,
            tokens=trace.token_strings,
            token_ids=tuple(trace.tokens.tolist()),
            n_layers=self.model.model.n_layers,
            provenance=self.provenance,
            edges_per_node=self.edges_per_node,
        )
        share = 1.0 if n_features is None else n_features / len(ends.targets.layer)
        with open_engine(
            self.linear, self.model, trace, sources, ends.targets, share=share, batch_size=self.batch_size
        ) as engine:
            yield expansion, Rows(engine, ends.target_nodes, ends.unembedding_bias, len(sources.nodes), self.done)


def _chosen(open_rows: _OpenRows, ends: _Ends, at_most: int) -> tuple[_Ends, RowBlock | None]:
    """The ends with the `at_most` features of most influence, and of their rows those that are known from choosing."""
    with open_rows(ends, looked_at(at_most)) as (expansion, rows):
        features, seen = first_look(expansion, rows, at_most)
    left = ends.keep(features)
    if len(open_rows.model.dictionaries.write_layers(0)) > 1:
        return left, None  # an edge does not tell at which of its layers a feature wrote, and so which error it joins
    known = with_only(features, seen, expansion)
    return left.without_targets(known.rows), known


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


def _provenance(model: ReplacementModel, trace: Trace, prompt: str | None, settings: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": model.model.name,
        "fingerprint": model.model.fingerprint(),
        "frame": model.model.frame.name,
        "dtype": str(model.model.dtype).removeprefix("torch."),
        "dictionaries": {"kind": model.dictionaries.kind, **model.dictionaries.provenance.to_json()},
        "dictionary_fingerprint": _dictionary_fingerprint(model),
        "prompt": prompt,
        "bos": trace.starts_with_bos,
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
