"""attribute: a prompt becomes an attribution graph."""

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from rich.progress import Progress
from torch import Tensor

from circuitsae.attribution.engines import EngineName, open_engine, to_numpy
from circuitsae.attribution.expansion import Expansion, Rows, every_row, most_influential
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

    * `max_features`: only this many features become nodes, found from the logits down, always expanding those of most
      influence so far; what the others write counts as error of their layer and position, so rows still sum up.
    * `unexplained`: stop sooner, once the features without edges into them hold at most this share of the influence.
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
    sources = Sources(model, trace)
    token = targets(model.model, trace.logits[-1])
    n_features = len(trace.features.value)
    readers = _all_readers(model, trace, token)
    extra, extra_rows = _unembedding_bias(model, trace, token)
    nodes = (*sources.nodes, *extra, *_logit_nodes(model, trace, token))
    settings = {
        "targets": repr(targets),
        "max_features": max_features,
        "unexplained": unexplained,
        "edges_per_node": edges_per_node,
    }
    expansion = Expansion(
        nodes=nodes,
        n_features=n_features,
        tokens=trace.token_strings,
        token_ids=tuple(trace.tokens.tolist()),
        n_layers=model.model.n_layers,
        provenance=_provenance(model, prompt, settings),
        edges_per_node=edges_per_node,
    )
    lazy = unexplained is not None or (max_features is not None and max_features < n_features)
    share = min(1.0, (max_features or n_features) / n_features) if lazy and n_features else 1.0
    size = None if batch_size == "auto" else batch_size
    with (
        open_engine(engine, model, trace, sources, readers, share=share, batch_size=size) as opened,
        Progress(disable=not progress, transient=True) as bar,
    ):
        task = bar.add_task("attributing", total=min(max_features or n_features, n_features))
        rows = Rows(opened, to_numpy(extra_rows), len(sources.nodes), done=lambda n: bar.advance(task, n))
        if not lazy:
            return every_row(expansion, rows)
        return most_influential(expansion, rows, max_features or n_features, unexplained or 0.0)


def _check_settings(
    max_features: int | None, unexplained: float | None, edges_per_node: int | None, batch_size: int | str
) -> None:
    for name, value in (("max_features", max_features), ("edges_per_node", edges_per_node), ("batch_size", batch_size)):
        if isinstance(value, int) and value < 1:
            raise InputError(f"{name}={value} leaves nothing to compute; give at least 1.")
    if unexplained is not None and not 0 <= unexplained < 1:
        raise InputError(f"unexplained={unexplained} is not a share of the influence; give a number from 0 to below 1.")


def _all_readers(model: ReplacementModel, trace: Trace, token: Int[Tensor, "k"]) -> Readers:
    """Every target: the active features, then the logits."""
    features = feature_readers(model, trace, torch.arange(len(trace.features.value), device=token.device))
    logits = logit_readers(trace, token)
    return Readers(*(torch.cat(pair) for pair in zip(features, logits, strict=True)))


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
        "prompt": prompt,
        "settings": settings,
        "versions": {name: _version(name) for name in ("circuitsae", "torch", "transformer-lens")}
        | {"python": platform.python_version()},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "uninstalled"
