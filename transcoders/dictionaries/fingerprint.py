"""Which weights a set of dictionaries has, as a short hash."""

from collections.abc import Iterator

import torch
from torch import nn

from transcoders.bridge import remembered
from transcoders.dictionaries.dictionary_set import DictionarySet
from transcoders.dictionaries.mapped import MappedDictionaries
from transcoders.files import short_hash

_SAMPLE = 64


@torch.no_grad()
def dictionary_fingerprint(dictionaries: DictionarySet) -> str:
    """A short hash of a set of dictionaries: kind, sizes, and the weights of up to 64 features of each layer; also
    64 rows of a skip term, which refining changes alone.

    It is remembered until a weight changes; changes through `.data` and in inference mode go unseen.
    """
    held = dictionaries._held if isinstance(dictionaries, MappedDictionaries) else dictionaries
    if not isinstance(held, nn.Module):
        return _fingerprint(dictionaries)
    return remembered(dictionaries, held.parameters(), lambda: _fingerprint(dictionaries))


def _fingerprint(dictionaries: DictionarySet) -> str:
    return short_hash(_parts(dictionaries))


def _parts(dictionaries: DictionarySet) -> Iterator[bytes | str]:
    yield dictionaries.kind
    for layer in range(dictionaries.n_layers):
        n = dictionaries.n_features(layer)
        chosen = torch.arange(0, n, max(1, n // _SAMPLE), device=dictionaries.decoder_bias(layer).device)
        rows = [dictionaries.encoder_rows(layer, chosen)]
        rows += [dictionaries.decoder_rows(layer, chosen, at) for at in dictionaries.write_layers(layer)]
        if (skip := dictionaries.skip(layer)) is not None:
            rows.append(skip[:: max(1, len(skip) // _SAMPLE)])
        yield f"{layer} {n}"
        for values in rows:
            yield values.detach().to("cpu", torch.float32).contiguous().numpy().tobytes()
