"""What an evaluation costs, known beforehand, and how many tokens it takes at once to stay within a budget."""

from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from transcoders.dictionaries import DictionarySet, present_layers
from transcoders.errors import InputError
from transcoders.evaluation.splice import sequential
from transcoders.language_model import LanguageModel

MEMORY = 512 * 2**20
"""Bytes that an evaluation takes beside model and dictionaries, roughly, unless told otherwise."""

JACOBIAN_TOKENS = 2048
"""Tokens that Jacobian agreement is measured on, unless told otherwise."""

NUDGES = 2
"""Small changes of each kind that Jacobian agreement makes in every row of text, unless told otherwise."""

VARIANTS = 3
"""In the place of what a layer writes: its reconstruction, zeros, the mean."""

_SCORES = 5
"""Arrays of the size of an attention pattern that are alive at once while one is computed (measured)."""
_STREAMS = 16
"""Vectors of width d_model that a block holds for a token: parts of the stream, and of an MLP four times as wide."""
_CODES = 4
"""Arrays of the size of a layer's pre-activations that are alive at once while it is encoded."""
_HELD = 24
"""Vectors of width d_model that Jacobian agreement holds for each layer and token: a clean run, two nudged, answers."""
_LOGITS = 6
"""Arrays of logits that are alive at once while two models are compared."""


class DictionarySizes(NamedTuple):
    """All that the cost depends on of dictionaries, which need not exist yet."""

    layers: int
    """Layers with a dictionary."""
    parameters: int
    """Of all layers: weights of encoders, decoders and skip terms."""
    widest: int
    """Features that are encoded together: of one layer, or of all where they compete (TopK over layers)."""

    @classmethod
    def of(cls, dictionaries: DictionarySet) -> "DictionarySizes":
        features = [dictionaries.n_features(layer) for layer in range(dictionaries.n_layers)]
        d, parameters = dictionaries.d_model, 0
        for layer, n in enumerate(features):
            parameters += n * d * (1 + len(dictionaries.write_layers(layer)))
            parameters += 0 if dictionaries.skip(layer) is None else d * d
        together = max(features) if sequential(dictionaries) else sum(features)
        return cls(len(present_layers(dictionaries)), parameters, together)


class EvaluationCost(NamedTuple):
    """What an evaluation takes."""

    flops: float
    """Of matrix products, two for each multiplication and addition."""
    bytes: int
    """At its peak, beside the model and the dictionaries."""


def evaluation_cost(
    model: LanguageModel,
    dictionaries: DictionarySet | DictionarySizes,
    tokens: int,
    *,
    context: int = 128,
    loss_tokens: int | None = None,
    jacobian_tokens: int = JACOBIAN_TOKENS,
    memory: int = MEMORY,
) -> EvaluationCost:
    """FLOPs and peak memory of `evaluate` on `tokens` tokens in rows of `context`, `loss_tokens` of them for losses.

    Statistics take one pass of the model without its unembedding. Losses take three such passes for each layer, on
    average over half of the blocks, and as many unembeddings. Jacobian agreement, on `jacobian_tokens` (0 for SAEs,
    which have none), takes `jacobian_passes`. The model runs once, on one row, to be counted.

    Raises `InputError` for less than one token.
    """
    if min(tokens, context, 1 if loss_tokens is None else loss_tokens) < 1:
        raise InputError(f"tokens={tokens}, context={context}, loss_tokens={loss_tokens}: give at least 1 of each.")
    sizes = dictionaries if isinstance(dictionaries, DictionarySizes) else DictionarySizes.of(dictionaries)
    context = min(context, model.context)
    blocks, unembedding = _flops_per_token(model, context)
    codes, n, layers = 2.0 * sizes.parameters, model.n_layers, sizes.layers
    alone = VARIANTS * layers * (n + 1) / (2 * n)
    statistics = blocks + codes
    losses = blocks * (1 + alone + VARIANTS) + 2 * codes + unembedding * (1 + VARIANTS * (layers + 1))
    measured = tokens if loss_tokens is None else min(loss_tokens, tokens)
    nudged = min(tokens, -(-jacobian_tokens // context) * context)
    jacobian = blocks * jacobian_passes(NUDGES) + codes * (4 * NUDGES + 2)
    rows = min(rows_at_once(model, sizes, context, memory), -(-tokens // context))
    held = rows * context * _bytes_per_token(model, sizes, context)
    compared = min(positions_at_once(model, memory), rows * context) * _bytes_per_position(model)
    nudging = min(jacobian_rows_at_once(model, sizes, context, memory), -(-nudged // context))
    peak = max(held + compared, nudging * _bytes_per_nudged_row(model, sizes, context))
    return EvaluationCost(tokens * statistics + measured * losses + nudged * jacobian, peak)


def jacobian_passes(nudges: int) -> int:
    """Forward passes over each row that Jacobian agreement takes: clean, for random changes, and for all others."""
    return 3 + 6 * nudges


def jacobian_rows_at_once(model: LanguageModel, sizes: DictionarySizes, length: int, memory: int) -> int:
    """Rows of text that are nudged together."""
    return max(1, memory // _bytes_per_nudged_row(model, sizes, length))


def _bytes_per_nudged_row(model: LanguageModel, sizes: DictionarySizes, length: int) -> int:
    """Patterns of all layers, and for each token what is held of every layer and the features of one at work."""
    patterns = (model.n_layers + _SCORES) * model.n_heads * length**2
    values = length * (model.n_layers * _HELD * model.d_model + _CODES * sizes.widest)
    which_active = model.n_layers * length * sizes.widest
    return (patterns + values) * model.dtype.itemsize + which_active


@torch.no_grad()
def _flops_per_token(model: LanguageModel, context: int) -> tuple[float, float]:
    """Of the blocks, and of the unembedding."""
    row = torch.zeros(1, context, dtype=torch.long, device=model.device)
    with FlopCounterMode(display=False) as counter:
        model.run_to_unembedding(row)
    return counter.get_total_flops() / context, 2.0 * model.d_model * model.d_vocab


def rows_at_once(model: LanguageModel, sizes: DictionarySizes, length: int, memory: int) -> int:
    """Rows that are run together: in half of `memory`, one at least."""
    if memory < 1:
        raise InputError(f"memory={memory} bytes hold nothing; give more.")
    return max(1, memory // 2 // (length * _bytes_per_token(model, sizes, length)))


def positions_at_once(model: LanguageModel, memory: int) -> int:
    """Positions whose logits are compared together: in a quarter of `memory`, one at least."""
    return max(1, memory // 4 // _bytes_per_position(model))


def _bytes_per_token(model: LanguageModel, sizes: DictionarySizes, length: int) -> int:
    """What the unembedding reads in every variant; each layer's stream, read and reconstruction; one block at work."""
    vectors = VARIANTS * (sizes.layers + 1) + 1 + 3 * sizes.layers + _STREAMS
    values = vectors * model.d_model + _SCORES * model.n_heads * length + _CODES * sizes.widest
    return values * model.dtype.itemsize


def _bytes_per_position(model: LanguageModel) -> int:
    return _LOGITS * model.d_vocab * max(model.dtype.itemsize, torch.float32.itemsize)
