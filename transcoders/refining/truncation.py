"""A trained cross-layer transcoder with decoders of low rank: the cheap way, beside training them (`decoder_rank`)."""

import torch

from transcoders.dictionaries import CrossLayerTranscoder, DictionarySet, fitted
from transcoders.dictionaries.low_rank import truncated
from transcoders.dictionaries.provenance import reading_as_trained
from transcoders.errors import DictionaryError
from transcoders.language_model import LanguageModel
from transcoders.refining.config import RefineConfig
from transcoders.refining.reading import Reading, Text


@torch.no_grad()
def truncate_decoders(
    model: LanguageModel,
    clt: DictionarySet,
    corpus: Text,
    *,
    rank: int,
    tokens: int = 8192,
    bos: bool | None = None,
) -> CrossLayerTranscoder:
    """The transcoder with decoders of `rank` to later layers, by `truncated` on so many tokens of a corpus.

    `corpus`: what `refine` takes. Features, and what they write to their own layer, stay as they are, and so do the
    dictionaries given; saved, the result takes the room of its factors. Raises `DictionaryError` for other dictionaries
    than a cross-layer transcoder in memory, and for those of another model; `InputError` for a rank below 1.
    """
    if not isinstance(clt, CrossLayerTranscoder):
        raise DictionaryError(
            f"A {type(clt).__name__} has no decoders to later layers in memory; give a cross-layer transcoder, loaded "
            "with decoders='memory'."
        )
    held = fitted(clt, model)
    assert isinstance(held, CrossLayerTranscoder)  # a cross-layer transcoder fits as it is, or not at all
    reading = Reading.of(reading_as_trained(model, held.provenance, bos), held, corpus, RefineConfig(tokens=tokens))
    reads = torch.cat([batch.reads for batch in reading.batches(tokens)])
    return truncated(held, reads.transpose(0, 1).to(held.b_dec), rank)
