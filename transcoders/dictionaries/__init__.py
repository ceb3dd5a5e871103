"""Sparse dictionaries: what a set of them is (`DictionarySet`), and the kinds there are.

`activations` holds the sparsifying functions, `sparse_dictionary` the single-site SAE and transcoder, `per_layer` one
of them for each layer, `mixing` such a set made of several, `cross_layer` the cross-layer transcoder, `mapped` a set
whose decoders stay in their file, `fitting` layers without a dictionary, `normalisation` factors folded into weights,
`low_rank` decoders of a rank as factors,
`provenance` where a set comes from, `fingerprint` which weights it has, `random` seeded sets for tests.
Attribution knows nothing of them beyond the protocol.
"""

from transcoders.dictionaries.activations import Activation, GroupMax, JumpReLU, JumpTopK, ReLU, TopK
from transcoders.dictionaries.cross_layer import CrossLayerTranscoder
from transcoders.dictionaries.dictionary_set import DictionarySet, SparseFeatures, present_layers
from transcoders.dictionaries.fitting import fitted
from transcoders.dictionaries.mapped import MappedDictionaries
from transcoders.dictionaries.mixing import mixed
from transcoders.dictionaries.normalisation import fold_normalisation, unfold_normalisation
from transcoders.dictionaries.per_layer import MixedSet, SAESet, TranscoderSet
from transcoders.dictionaries.provenance import DictionaryProvenance
from transcoders.dictionaries.random import random_dictionaries
from transcoders.dictionaries.sparse_dictionary import SAE, SparseDictionary, Transcoder

__all__ = [
    "SAE",
    "Activation",
    "CrossLayerTranscoder",
    "DictionaryProvenance",
    "DictionarySet",
    "GroupMax",
    "JumpReLU",
    "JumpTopK",
    "MappedDictionaries",
    "MixedSet",
    "ReLU",
    "SAESet",
    "SparseDictionary",
    "SparseFeatures",
    "TopK",
    "Transcoder",
    "TranscoderSet",
    "fitted",
    "fold_normalisation",
    "mixed",
    "present_layers",
    "random_dictionaries",
    "unfold_normalisation",
]
