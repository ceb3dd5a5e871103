"""Heads carried by an edge: its weight split by the heads of every attention layer that it crosses."""

from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitsae.attribution.limits import Response
from circuitsae.attribution.linear import LinearModel, linear_model
from circuitsae.attribution.live import live_model
from circuitsae.attribution.nodes import SourceVectors, TargetVectors, feature_targets, source_nodes
from circuitsae.attribution.targets import node_vectors
from circuitsae.graph import Node, NodeKind
from circuitsae.replacement import ReplacementModel, Trace
from transcoders.errors import InputError

WAYS = ("values", "patterns")
"""In which ways heads take an edge."""
PAST = -1
"""Stands for the residual stream, which goes past the heads of a layer."""


def edge_heads(
    model: ReplacementModel,
    prompt: str | Int[Tensor, "pos"] | Trace,
    source: Node,
    target: Node,
    *,
    response: Response = "frozen",
) -> pd.DataFrame:
    """How much of an edge passes by each head: columns `layer`, `head` (-1: past them), `weight`.

    `weight[l, h] = Σ_p ∂t/∂o_lh(p) · o_lh(p)`, with o_lh what head h of layer l makes of the source alone, patterns and
    norm scales held: one sweep up with the source and one back from the target. The rows of each layer sum to the edge.
    In `weight[l, -1]` is what goes by the residual stream, and what a cross-layer feature writes only after layer l. A
    path may take heads in several layers: layers are not to be added up. An edge that crosses no attention has no rows.

    `response`: that of the graph. In `linear` ones heads take an edge in two ways, told apart by a column `by`:
    `values`, what the head moves changes, and `patterns`, where it looks does; with the stream they sum to the edge.

    Raises `InputError` for a source that writes at no single position (a bias), for a target that is no active feature
    or logit, and where the source cannot reach the target.
    """
    trace, live = prompt if isinstance(prompt, Trace) else model.trace(prompt), response == "linear"
    if live:
        trace = trace.with_logit_slope()
    reads = _target(model, trace, target)
    if source.layer >= target.layer or source.pos > target.pos:
        raise InputError(f"{source.id} cannot reach {target.id}: edges go to later layers, not to earlier positions.")
    with torch.enable_grad():
        linear = (live_model if live else linear_model)(trace.frozen)
        value, crossed = _carry(model, trace, linear, source, reads)
        back = torch.autograd.grad(value, [layer.probe for layer in crossed]) if crossed else ()
    rows, n_heads = [], model.model.n_heads
    for layer, G in zip(crossed, back, strict=True):
        parts = (G * layer.heads).sum((0, 2)).detach()
        rows += [
            (layer.number, number % n_heads, WAYS[number // n_heads], part)
            for number, part in enumerate(parts.tolist())
        ]
        rows.append((layer.number, PAST, "stream", float(value.detach() - parts.sum())))
    found = pd.DataFrame(rows, columns=["layer", "head", "by", "weight"])
    return found if live else found.drop(columns="by")


def _target(model: ReplacementModel, trace: Trace, node: Node) -> TargetVectors:
    if node.kind is NodeKind.LOGIT:
        if node.pos != trace.n_positions - 1:
            raise InputError(f"{node.id} is no logit of the prompt's last position, {trace.n_positions - 1}.")
        return node_vectors(model, trace, node)
    place = torch.tensor([node.layer, node.pos, node.index], device=trace.tokens.device)
    rows = (trace.features.index == place).all(1).nonzero().squeeze(1)
    if node.kind is not NodeKind.FEATURE or not len(rows):
        raise InputError(f"{node.id} is no target on this prompt; give an active feature or a logit.")
    return feature_targets(model, trace, rows)


class _Crossed(NamedTuple):
    """An attention layer that the source has crossed."""

    number: int
    heads: Float[Tensor, "pos head d_model"]
    """What each head makes of the source alone, by values and then, where they answer, by patterns."""
    probe: Float[Tensor, "pos head d_model"]
    """Zeros, added to it."""


def _carry(
    model: ReplacementModel, trace: Trace, linear: LinearModel, source: Node, target: TargetVectors
) -> tuple[Float[Tensor, ""], list[_Crossed]]:
    """The edge's weight, from the source carried up to what the target reads, and the layers that it crossed."""
    nodes = source_nodes(model, trace)
    sources = SourceVectors(model, trace, nodes, linear)
    column, layer_of, pos = _column(sources, nodes, source), int(target.layer), int(target.pos)
    crossed: list[_Crossed] = []

    def written(layer: int) -> Float[Tensor, "pos d_model"]:
        out = torch.zeros_like(linear.embed)
        if layer >= source.layer:
            out[source.pos] = sources.vectors(layer, column)[0]
        return out

    x = written(-1)
    for layer, block in enumerate(linear.blocks[: layer_of + 1]):
        before, here = x, layer == layer_of
        if layer > source.layer and not (here and block.parallel):
            heads = block.attention.by_head(x)
            crossed.append(_Crossed(layer, heads, torch.zeros_like(heads, requires_grad=True)))
            x = x + (heads + crossed[-1].probe).sum(1)
        read = block.read.forward((before if block.parallel else x)[None])
        if here:
            break
        if (skip := sources.skips[layer]) is not None:
            x = x + (read @ skip if block.write is None else block.write.forward(read @ skip))[0]
        x = x + written(layer)
    else:
        read = linear.final.forward(x[None])
    return read[0, pos] @ target.vector[0].to(read), crossed


def _column(sources: SourceVectors, nodes: tuple[Node, ...], source: Node) -> np.ndarray:
    """Of a source that writes at one position."""
    for column in range(sources.n_local):
        if nodes[sources.columns[column]].id == source.id:
            return np.array([column])
    raise InputError(f"{source.id} is no source here that writes at one position; give a feature, error or token.")
