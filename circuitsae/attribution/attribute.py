"""attribute: a prompt becomes an attribution graph."""

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from rich.progress import Progress
from scipy import sparse
from torch import Tensor

from circuitsae.attribution.plain import Rows, plain_rows
from circuitsae.attribution.sources import UNEMBED, Sources
from circuitsae.attribution.targets import ChooseLogits, Readers, TopLogits, feature_readers, logit_readers
from circuitsae.graph import AttributionGraph, Node, NodeKind, merge_features
from circuitsae.replacement import ReplacementModel, Trace
from transcoders.errors import InputError

_BATCH_BYTES = 256 * 2**20


def attribute(
    model: ReplacementModel,
    prompt: str | Int[Tensor, "pos"],
    *,
    targets: ChooseLogits = TopLogits(),
    max_features: int | None = None,
    batch_size: int | Literal["auto"] = "auto",
    progress: bool = False,
) -> AttributionGraph:
    """The full attribution graph of a prompt's last position; `prune()` it to read it.

    A[t, s] = a_s · Σ_{l' < l_t} W_dec[s→l'] · P((l', p_s) → (l_t, p_t)) · W_enc[:, t] under frozen attention patterns
    and norm scales, after Ameisen et al. 2025, "Circuit Tracing". With `max_features`, only the most influential
    features become nodes; what the others write counts as error of their layer and position, so rows still sum up.

    Raises `PromptError` for a prompt the model cannot take and `InputError` for targets it does not have.
    """
    trace = model.trace(prompt)
    text = prompt if isinstance(prompt, str) else None
    return attribute_trace(
        model, trace, prompt=text, targets=targets, max_features=max_features, batch_size=batch_size, progress=progress
    )


def attribute_trace(
    model: ReplacementModel,
    trace: Trace,
    *,
    prompt: str | None = None,
    targets: ChooseLogits = TopLogits(),
    max_features: int | None = None,
    batch_size: int | Literal["auto"] = "auto",
    progress: bool = False,
) -> AttributionGraph:
    """`attribute` of a prompt that has been traced already."""
    if max_features is not None and max_features < 1:
        raise InputError(f"max_features={max_features} keeps no feature; give at least 1.")
    sources = Sources(model, trace)
    token = targets(model.model, trace.logits[-1])
    logits = _logit_nodes(model, trace, token)
    size = _batch_size(model, trace) if batch_size == "auto" else batch_size
    with (
        torch.no_grad(),
        plain_rows(model, trace, sources) as rows,
        Progress(disable=not progress, transient=True) as bar,
    ):
        task = bar.add_task("attributing", total=len(trace.features.value))
        logit_rows = _batched(rows, logit_readers(trace, token), size, lambda n: None)
        readers = feature_readers(model, trace, torch.arange(len(trace.features.value)))
        feature_rows = _batched(rows, readers, size, lambda n: bar.advance(task, n))
    logit_rows, extra = _unembedding_bias(model, trace, token, logit_rows)
    nodes = (*sources.nodes, *extra, *logits)
    weights = _assemble(feature_rows, logit_rows, len(nodes))
    provenance = _provenance(model, prompt, {"targets": repr(targets), "max_features": max_features})
    graph = AttributionGraph.build(
        nodes, weights, trace.token_strings, trace.tokens.tolist(), model.model.n_layers, provenance
    )
    return graph if max_features is None else merge_features(graph, max_features)


def _batched(rows: Rows, readers: Readers, size: int, done: Any) -> Float[Tensor, "target source"]:
    parts = []
    for start in range(0, len(readers.layer), size):
        parts.append(rows(readers.rows(start, start + size)))
        done(len(parts[-1]))
    return torch.cat(parts) if parts else rows(readers)


def _batch_size(model: ReplacementModel, trace: Trace) -> int:
    """As many targets as keep the gradients of all layers, about ten tensors deep, within the budget."""
    element = torch.finfo(model.model.dtype).bits // 8
    one = (model.model.n_layers + 1) * trace.n_positions * model.model.d_model * element
    return max(1, min(512, _BATCH_BYTES // (10 * one)))


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
    model: ReplacementModel, trace: Trace, token: Int[Tensor, "k"], rows: Float[Tensor, "k source"]
) -> tuple[Float[Tensor, "k _"], list[Node]]:
    """The logit rows with a last column for b_U, centred like the logits, where the model has one."""
    group = model.model.bias_groups().get((model.model.n_layers, UNEMBED))
    if group is None:
        return rows, []
    b_U = group[0].detach()
    node = Node(NodeKind.BIAS, model.model.n_layers, -1, text=f"{UNEMBED}.b")
    return torch.cat([rows, (b_U[token] - b_U.mean())[:, None]], dim=1), [node]


def _assemble(features: Tensor, logits: Tensor, n: int) -> sparse.csr_array:
    """Rows of features first, of logits last, nothing between."""
    blocks = [sparse.coo_array(part.double().cpu().numpy()) for part in (features, logits)]
    row = np.concatenate([blocks[0].row, blocks[1].row + n - len(logits)])
    col = np.concatenate([blocks[0].col, blocks[1].col])
    return sparse.csr_array(sparse.coo_array((np.concatenate([b.data for b in blocks]), (row, col)), shape=(n, n)))


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
