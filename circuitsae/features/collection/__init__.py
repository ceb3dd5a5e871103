"""One pass of a corpus through a model and its dictionaries, all layers together: what feature cards are made of.

`config` says what is collected, `run` is the pass (`collect`), `state` what a killed run goes on from. Each of the rest
gathers one thing and can be merged exactly, so that memory does not grow with the corpus and neither chunks nor
interruptions change a number: `statistics` rates, means and histograms, `examples` top and stratified examples,
`cofiring` which features fire together. `assemble` makes the cards, with logit effects and cosines of the decoders.
"""

from circuitsae.features.collection.config import CollectConfig
from circuitsae.features.collection.run import collect
from transcoders.dictionaries.fingerprint import dictionary_fingerprint

__all__ = ["CollectConfig", "collect", "dictionary_fingerprint"]
