"""One set of the layers of several: transcoders of one origin, SAEs of another, at other sites, of other widths."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

from transcoders.dictionaries.dictionary_set import DictionarySet, require_layer
from transcoders.dictionaries.per_layer import MixedSet, SAESet, TranscoderSet
from transcoders.dictionaries.provenance import DictionaryProvenance
from transcoders.dictionaries.sparse_dictionary import SAE, SparseDictionary, Transcoder
from transcoders.errors import DictionaryError

T = TypeVar("T", bound=Hashable)


def mixed(layers: Mapping[int, DictionarySet]) -> TranscoderSet | SAESet | MixedSet:
    """The set with the dictionary of layer l of `layers[l]`, for one model: `mixed({0: plt, 1: plt, 2: sae})`.

    Sites and widths may differ from layer to layer. It is a `TranscoderSet` or an `SAESet` where all are of that kind.
    A layer that is not named has no dictionary: among transcoders alone all that its MLP writes is error, beside SAEs
    its MLP stays. The dictionaries are shared with the sets that they come from. Of their provenance is kept what all
    say; an activation limit of any of them holds.

    Raises `DictionaryError` for sets of several models or frames, or with other first positions, for cross-layer
    transcoders, whose layers cannot be taken apart, for mapped decoders, and for a layer that a set does not have.
    """
    if not layers:
        raise DictionaryError("There is nothing to mix; give a set for some layer, such as mixed({0: transcoders}).")
    taken = {layer: _layer(given, layer) for layer, given in sorted(layers.items())}
    n_layers = max(given.n_layers for given in layers.values())
    provenance = _shared([layers[layer].provenance for layer in taken], list(taken), n_layers)
    kind = _kind(list(taken.values()))
    known = kind(list(taken.values()), provenance)
    every = [taken[layer] if layer in taken else known.absent(layer) for layer in range(n_layers)]
    return kind(every, provenance).requires_grad_(False)


def _layer(given: DictionarySet, layer: int) -> SparseDictionary:
    if not isinstance(given, TranscoderSet | SAESet | MixedSet):
        raise DictionaryError(
            f"The layers of a {type(given).__name__} cannot be taken apart; mix sets with one dictionary for each "
            "layer, loaded with decoders='memory'."
        )
    require_layer(layer, given.n_layers)
    return given[layer]


def _kind(found: Sequence[SparseDictionary]) -> Any:
    if all(isinstance(d, SAE) for d in found):
        return SAESet
    return TranscoderSet if all(isinstance(d, Transcoder) for d in found) else MixedSet


def _shared(parts: Sequence[DictionaryProvenance], layers: Sequence[int], n_layers: int) -> DictionaryProvenance:
    """What all parts say of where they come from."""

    def same(name: str, what: str, of: Callable[[Any], T]) -> T:
        found = list(dict.fromkeys(of(getattr(part, name)) for part in parts))
        if len(found) > 1:
            raise DictionaryError(
                f"The dictionaries to be mixed have {what} {', '.join(map(repr, found))}; they must have one."
            )
        return found[0]

    def agreed(name: str) -> Any:
        found = [getattr(part, name) for part in parts]
        return found[0] if all(one == found[0] for one in found) else None

    def common(name: str) -> dict[str, Any]:
        first, *others = (getattr(part, name) for part in parts)
        return {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}

    same("model", "models", lambda name: name.rstrip("/").rsplit("/", 1)[-1].lower())
    limits: dict[str, float] = {}
    for part in parts:
        for site, limit in part.limits.items():
            limits[site] = min(limit, limits.get(site, limit))
    return DictionaryProvenance(
        model=parts[0].model,
        model_origin=common("model_origin"),
        fingerprint=agreed("fingerprint"),
        frame=same("frame", "frames", lambda frame: frame),
        corpus=agreed("corpus"),
        tokens=min(part.tokens for part in parts),
        bos=agreed("bos"),
        seed=agreed("seed"),
        versions=common("versions"),
        config=common("config"),
        normalisation=_factors(parts, layers, n_layers),
        d_vocab=agreed("d_vocab"),
        first=same("first", "first positions", lambda first: first),
        limits=limits,
    )


def _factors(parts: Sequence[DictionaryProvenance], layers: Sequence[int], n_layers: int) -> dict[str, list[float]]:
    """Each layer's own, 1 where nothing is folded."""
    if not any(part.normalisation for part in parts):
        return {}
    factors = {side: [1.0] * n_layers for side in ("read", "write")}
    for part, layer in zip(parts, layers, strict=True):
        for side, values in part.normalisation.items():
            factors[side][layer] = values[layer]
    return factors
