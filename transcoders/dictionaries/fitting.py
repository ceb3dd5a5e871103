"""Dictionaries as a model needs them: one for each layer, absent where there is none."""

from typing import cast

from transcoders.dictionaries.cross_layer import CrossLayerTranscoder
from transcoders.dictionaries.dictionary_set import DictionarySet, present_layers
from transcoders.dictionaries.mapped import MappedDictionaries
from transcoders.dictionaries.per_layer import MixedSet, SAESet, TranscoderSet
from transcoders.language_model import LanguageModel


def fitted(dictionaries: DictionarySet, model: LanguageModel) -> DictionarySet:
    """The set with an absent dictionary for each layer of `model` that it does not cover.

    A set is filled up only where it is known to be a part: where it names this very model, has absent layers already,
    or has a dictionary for one layer alone. One that lies on another device is taken, in place, to the model's.
    Raises `DictionaryError` where it does not belong to the model.
    """
    if dictionaries.n_layers < model.n_layers and _is_part(dictionaries, model):
        dictionaries = cast(DictionarySet, _per_layer(dictionaries).padded(model.n_layers))
    dictionaries.check_fits(model)
    if dictionaries.decoder_bias(0).device != model.device:
        dictionaries.to(model.device)
    return dictionaries


def _is_part(dictionaries: DictionarySet, model: LanguageModel) -> bool:
    if dictionaries.kind == CrossLayerTranscoder.kind or not hasattr(dictionaries, "padded"):
        return False
    present = len(present_layers(dictionaries))
    same_model = _last_part(dictionaries.provenance.model) == _last_part(model.name)
    return same_model or present < dictionaries.n_layers or present == 1


def _per_layer(dictionaries: DictionarySet) -> TranscoderSet | SAESet | MixedSet | MappedDictionaries:
    assert isinstance(dictionaries, TranscoderSet | SAESet | MixedSet | MappedDictionaries)
    return dictionaries


def _last_part(name: str) -> str:
    return name.rstrip("/").rsplit("/", 1)[-1].lower()
