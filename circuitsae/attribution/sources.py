"""The sources of a prompt's graph, and how a target's gradients become its row of edges.

Column order: features, errors (layer by layer), tokens, biases.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitsae.attribution.targets import Readers, feature_readers
from circuitsae.graph import Node, NodeKind
from circuitsae.replacement import FIRST, ReplacementModel, Trace

UNEMBED = "unembed"


@dataclass(frozen=True)
class Gradients:
    """How much each target of a batch changes per unit written at each place."""

    embed: Float[Tensor, "target pos d_model"]
    position: Float[Tensor, "target pos d_model"] | None
    mlp_out: Float[Tensor, "target layer pos d_model"]
    bias: dict[tuple[int, str], Float[Tensor, "target"]]
    """Already multiplied by the bias: what each bias group adds to each target."""


def feature_nodes(model: ReplacementModel, trace: Trace, readers: Readers) -> list[Node]:
    """The active features, whose encoders are `readers`, with the clean h and the constant in it (b_enc)."""
    index, value = trace.features
    bias = torch.empty_like(value)
    for layer in range(model.model.n_layers):
        here = readers.layer == layer
        bias[here] = model.dictionaries.encoder_biases(layer, index[here, 2]).detach()
    h = torch.einsum("nd,nd->n", readers.vector, trace.frozen.reads.mlp_in[readers.layer, readers.pos]) + bias
    columns = zip(index.tolist(), value.tolist(), h.tolist(), bias.tolist(), strict=True)
    return [
        Node(NodeKind.FEATURE, layer, pos, number, activation=a, pre_activation=pre, bias=constant)
        for (layer, pos, number), a, pre, constant in columns
    ]


class Sources:
    """Everything that writes into the residual stream on one prompt, as nodes and as columns of edges."""

    def __init__(self, model: ReplacementModel, trace: Trace, features: Sequence[Node] | None = None) -> None:
        """`features`: the nodes of the trace's features, where they are known."""
        if features is None:
            every = torch.arange(len(trace.features.value), device=trace.errors.device)
            features = feature_nodes(model, trace, feature_readers(model, trace, every))
        self.model = model
        self.trace = trace
        self.first_error = FIRST if trace.starts_with_bos else 0
        self._bias_keys = [key for key in model.model.bias_groups() if key[1] != UNEMBED]
        self.nodes: tuple[Node, ...] = (
            *features,
            *self._errors(),
            *self._tokens(),
            *self._biases(),
        )

    def keep(self, trace: Trace, rows: Int[Tensor, "k"]) -> "Sources":
        """The sources of `trace`, which has only the features with these numbers."""
        return Sources(self.model, trace, [self.nodes[row] for row in rows.tolist()])

    def _errors(self) -> list[Node]:
        positions = range(self.first_error, self.trace.n_positions)
        return [Node(NodeKind.ERROR, layer, pos) for layer in range(self.model.model.n_layers) for pos in positions]

    def _tokens(self) -> list[Node]:
        strings = self.trace.token_strings
        return [Node(NodeKind.TOKEN, -1, pos, int(token), strings[pos]) for pos, token in enumerate(self.trace.tokens)]

    def _biases(self) -> list[Node]:
        """Positional embeddings, MLP outputs at BOS, b_dec of each layer, and the model's own biases."""
        layers = range(self.model.model.n_layers)
        nodes = []
        if self.trace.frozen.writes.position is not None:
            nodes += [Node(NodeKind.BIAS, -1, pos, text="pos") for pos in range(self.trace.n_positions)]
        nodes += [Node(NodeKind.BIAS, layer, pos, text="mlp") for layer in layers for pos in range(self.first_error)]
        nodes += [Node(NodeKind.BIAS, layer, -1, text="b_dec") for layer in layers]
        nodes += [Node(NodeKind.BIAS, layer, -1, text=f"{label}.b") for layer, label in self._bias_keys]
        return nodes

    def score(self, gradients: Gradients) -> Float[Tensor, "target source"]:
        """Each source's own vector times the gradient where it is written."""
        writes, errors = self.trace.frozen.writes, self.trace.errors
        to_errors = torch.einsum("tlpd,lpd->tlp", gradients.mlp_out, errors)
        columns = [
            self._score_features(gradients.mlp_out),
            to_errors[:, :, self.first_error :].flatten(1),
            torch.einsum("tpd,pd->tp", gradients.embed, writes.embed),
        ]
        if writes.position is not None and gradients.position is not None:
            columns.append(torch.einsum("tpd,pd->tp", gradients.position, writes.position))
        columns.append(to_errors[:, :, : self.first_error].flatten(1))
        columns.append(self._score_decoder_biases(gradients.mlp_out))
        columns += [gradients.bias[key][:, None] for key in self._bias_keys]
        return torch.cat(columns, dim=1)

    def _score_features(self, mlp_out: Float[Tensor, "target layer pos d_model"]) -> Float[Tensor, "target n"]:
        index, value = self.trace.features
        columns = torch.zeros(len(mlp_out), len(value), dtype=value.dtype, device=value.device)
        for layer in range(self.model.model.n_layers):
            here = (index[:, 0] == layer).nonzero()[:, 0]
            _, pos, feature = index[here].unbind(1)
            for written in self.model.dictionaries.write_layers(layer):
                rows = self.model.dictionaries.decoder_rows(layer, feature, written).detach()
                columns[:, here] += torch.einsum("tnd,nd->tn", mlp_out[:, written, pos], rows * value[here, None])
        return columns

    def _score_decoder_biases(self, mlp_out: Float[Tensor, "target layer pos d_model"]) -> Float[Tensor, "target l"]:
        biases = [self.model.dictionaries.decoder_bias(layer).detach() for layer in range(self.model.model.n_layers)]
        return torch.einsum("tlpd,ld->tl", mlp_out[:, :, FIRST:], torch.stack(biases))
