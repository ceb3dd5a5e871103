"""transcoders: dictionaries for language models, from text to a trained set of sparse features.

    model = load_model("gpt2")
    clt = train(model, "roneneldan/TinyStories", CLTConfig(features=4096, tokens=50_000_000), out="runs/gpt2-clt")
    rows = held_out_rows(model, "roneneldan/TinyStories", tokens=32_768, context=128)
    print(evaluate(model, clt, rows).to_frame())
    save_dictionaries(clt, "gpt2-clt")

Importing the package imports no torch; its names are loaded when they are first used.
"""

from typing import TYPE_CHECKING

from transcoders._lazy import lazy_exports

if TYPE_CHECKING:
    __version__: str
    from transcoders.data import (
        ActivationStore,
        Corpus,
        held_out_rows,
        open_corpus,
        pack_rows,
        take_rows,
        write_activations,
    )
    from transcoders.dictionaries import (
        SAE,
        CrossLayerTranscoder,
        DictionaryProvenance,
        DictionarySet,
        GroupMax,
        JumpReLU,
        JumpTopK,
        MixedSet,
        ReLU,
        SAESet,
        SparseDictionary,
        SparseFeatures,
        TopK,
        Transcoder,
        TranscoderSet,
        fold_normalisation,
        mixed,
        random_dictionaries,
        unfold_normalisation,
    )
    from transcoders.evaluation import Evaluation, evaluate
    from transcoders.formats import (
        list_dictionaries,
        load_dictionaries,
        save_dictionaries,
        upload_dictionaries,
    )
    from transcoders.language_model import LanguageModel
    from transcoders.loading import load_model, random_model
    from transcoders.refining import RefineConfig, refine
    from transcoders.sites import Frame, Site
    from transcoders.training import (
        CLTConfig,
        EndToEndConfig,
        SAEConfig,
        TrainConfig,
        TranscoderConfig,
        calibrate_topk,
        config_from_json,
        finetune,
        fold_topk,
        from_checkpoint,
        plan,
        train,
        train_many,
        train_many_on,
        train_on,
    )

__getattr__, __all__ = lazy_exports(
    __name__,
    {
        "transcoders.data": (
            "ActivationStore",
            "Corpus",
            "held_out_rows",
            "open_corpus",
            "pack_rows",
            "take_rows",
            "write_activations",
        ),
        "transcoders.dictionaries": (
            "SAE",
            "CrossLayerTranscoder",
            "DictionaryProvenance",
            "DictionarySet",
            "GroupMax",
            "JumpReLU",
            "JumpTopK",
            "ReLU",
            "MixedSet",
            "SAESet",
            "SparseDictionary",
            "SparseFeatures",
            "TopK",
            "Transcoder",
            "TranscoderSet",
            "fold_normalisation",
            "mixed",
            "random_dictionaries",
            "unfold_normalisation",
        ),
        "transcoders.evaluation": ("Evaluation", "evaluate"),
        "transcoders.formats": (
            "list_dictionaries",
            "load_dictionaries",
            "save_dictionaries",
            "upload_dictionaries",
        ),
        "transcoders.language_model": ("LanguageModel",),
        "transcoders.loading": ("load_model", "random_model"),
        "transcoders.refining": ("RefineConfig", "refine"),
        "transcoders.sites": ("Frame", "Site"),
        "transcoders.training": (
            "CLTConfig",
            "EndToEndConfig",
            "SAEConfig",
            "TrainConfig",
            "TranscoderConfig",
            "calibrate_topk",
            "config_from_json",
            "finetune",
            "fold_topk",
            "from_checkpoint",
            "plan",
            "train",
            "train_many",
            "train_many_on",
            "train_on",
        ),
    },
)
