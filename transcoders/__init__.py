"""transcoders: dictionaries for language models, from text to a trained set of sparse features.

    model = load_model("gpt2")
    clt = train(model, "roneneldan/TinyStories", CLTConfig(features=4096, tokens=50_000_000), out="runs/gpt2-clt")
    rows = take_rows(model, open_corpus("roneneldan/TinyStories").held_out(), rows=256, context=128)
    print(evaluate(model, clt, rows).to_frame())
    save_dictionaries(clt, "gpt2-clt")

Importing the package imports no torch; its names are loaded when they are first used.
"""

from transcoders._lazy import lazy_exports

__getattr__, __all__ = lazy_exports(
    __name__,
    {
        "transcoders.data": ("Corpus", "open_corpus", "pack_rows", "take_rows"),
        "transcoders.dictionaries": (
            "SAE",
            "CrossLayerTranscoder",
            "DictionaryProvenance",
            "DictionarySet",
            "JumpReLU",
            "ReLU",
            "SAESet",
            "SparseDictionary",
            "SparseFeatures",
            "TopK",
            "Transcoder",
            "TranscoderSet",
            "random_dictionaries",
        ),
        "transcoders.evaluation": ("Evaluation", "evaluate"),
        "transcoders.formats": ("load_dictionaries", "save_dictionaries"),
        "transcoders.language_model": ("LanguageModel",),
        "transcoders.loading": ("load_model", "random_model"),
        "transcoders.sites": ("Frame", "Site"),
        "transcoders.training": (
            "CLTConfig",
            "SAEConfig",
            "TrainConfig",
            "TranscoderConfig",
            "config_from_json",
            "fold_topk",
            "train",
        ),
    },
)
