"""Direct logit attribution: what each component adds to the metric through the final norm and unembedding alone."""

from typing import Any

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from circuitsae.components.recording import BATCH_TOKENS, Prepared, Problems, parts_of
from circuitsae.components.scores import Scores, join
from transcoders.errors import ModelError


def direct_logit_attribution(problems: Problems, *, batch_tokens: int = BATCH_TOKENS) -> Scores:
    """`Σ_pos norm(c_u) · ∂m/∂(unembedding's input)`: each writer's own contribution, the final norm's scale frozen.

    For a metric that is linear in the logits (a logit difference) the writers' scores and the biases' sum to it; for
    any other it is the first-order term at the clean run. These are contributions, not effects of an ablation: a
    component that raises the metric scores above zero (nostalgebraist 2020; Wang et al. 2022, section 3.1).
    """
    return join([_attribution(part) for part in parts_of(problems, batch_tokens)])


def _attribution(prepared: Prepared) -> Scores:
    bridge: Any = prepared.network.model.bridge
    final = prepared.clean.final
    norm = getattr(bridge, "ln_final", None)
    weight, scale, centres = _final_norm(norm, final, bridge.cfg.eps)
    read = (final if norm is None else norm(final)).detach().requires_grad_()
    with torch.enable_grad():
        value = prepared.problem.metric(_logits(prepared, read)).sum()
        (gradient,) = torch.autograd.grad(value, read, allow_unused=True, materialize_grads=True)
    writes = prepared.clean.writes
    linear = (writes - writes.mean(-1, keepdim=True) if centres else writes) * (weight / scale)
    spans = prepared.spans.to(writes)
    terms = "writer example pos d_model, example pos d_model, span example pos -> example writer span"
    values = einsum(linear, gradient, spans, terms)
    return Scores(prepared.graph.writers, values, "direct logit attribution", prepared.span_names)


def _logits(prepared: Prepared, read: Float[Tensor, "example pos d_model"]) -> Tensor:
    if prepared.problem.read is not None:
        read = read[torch.arange(len(read), device=read.device), prepared.problem.read][:, None]
    return prepared.network.unembed(read)


def _final_norm(norm: Any, x: Tensor, eps: float) -> tuple[Tensor, Tensor, bool]:
    """Weight, scale and whether it centres; checked against the norm itself."""
    if norm is None or torch.equal(norm(x), x):
        return x.new_ones(x.shape[-1]), x.new_ones(*x.shape[:-1], 1), False
    centres = not norm.uses_rms_norm
    centred = x - x.mean(-1, keepdim=True) if centres else x
    scale = (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    weight = norm.weight.detach() + 1 if norm.uses_weight_offset else norm.weight.detach()
    bias = getattr(norm.original_component, "bias", None)
    ours = centred / scale * weight + (0 if bias is None else bias.detach())
    if not torch.allclose(ours, norm(x), rtol=1e-3, atol=1e-3 * float(ours.abs().max())):
        raise ModelError("The final norm is not a LayerNorm or RMSNorm; direct logit attribution is not supported.")
    return weight, scale, centres
