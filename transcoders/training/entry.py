"""What users call: one dictionary or several, on a language model or on vectors."""

from collections.abc import Sequence
from pathlib import Path

from jaxtyping import Int
from torch import Tensor

from transcoders.data.tokens import CorpusSource
from transcoders.dictionaries import DictionarySet
from transcoders.language_model import LanguageModel
from transcoders.training.config import TrainConfig
from transcoders.training.folder import alone_in
from transcoders.training.sources import ModelSource, Source, Vectors, VectorSource
from transcoders.training.trainer import Trainer, require_configs


def train(
    model: LanguageModel,
    corpus: CorpusSource | Int[Tensor, "row pos"],
    config: TrainConfig,
    *,
    progress: bool = True,
    out: Path | str | None = None,
    resume: bool = False,
) -> DictionarySet:
    """Train dictionaries of the kind that `config` names for all layers of `model`.

    `corpus`: a text file, a hub data set, documents, or rows of tokens; of documents every twentieth is held out.
    `out`: a folder for the metrics (`metrics.jsonl`), checkpoints and the result, for one training at a time. `resume`:
    go on from the latest checkpoint there, to the same result as an unbroken run; `InputError` where there is none.
    Without it the checkpoints of an earlier run there are removed, which a warning says. `NotFiniteError` where
    activations or a loss are not finite: the last good checkpoint stays.
    """
    return train_many(model, corpus, [config], progress=progress, out=out, resume=resume)[0]


def train_many(
    model: LanguageModel,
    corpus: CorpusSource | Int[Tensor, "row pos"],
    configs: Sequence[TrainConfig],
    *,
    names: Sequence[str] | None = None,
    progress: bool = True,
    out: Path | str | None = None,
    resume: bool = False,
) -> list[DictionarySet]:
    """Train several dictionaries, of any kinds, over one stream of activations: the model runs once for all.

    The configurations must agree in `tokens`, `batch`, `context`, `separator` and `bos`; the order of the data is that
    of the first one's seed. Each dictionary comes out as it would from `train` with that order (the order also depends
    on how many tokens fit the buffer, hence on the number of sites). With `out`, each has a folder of its own in it, by
    `names` or by kind and activation, and checkpoints are of all together.
    """
    require_configs(configs)
    return _train(ModelSource(model, corpus, configs[0]), configs, names, progress, out, resume)


def train_on(
    vectors: Vectors | tuple[Vectors, Vectors],
    config: TrainConfig,
    *,
    progress: bool = True,
    out: Path | str | None = None,
    resume: bool = False,
) -> DictionarySet:
    """Train dictionaries on vectors, without a language model.

    `vectors`: `[token, d_model]`, or `[token, layer, d_model]` for one dictionary a layer; or a function from a chunk's
    number to such a tensor, where there are too many to hold. For transcoders a pair of them, reads and writes. A
    tensor is read again, in another order, until `config.tokens` are seen.
    """
    return train_many_on(vectors, [config], progress=progress, out=out, resume=resume)[0]


def train_many_on(
    vectors: Vectors | tuple[Vectors, Vectors],
    configs: Sequence[TrainConfig],
    *,
    names: Sequence[str] | None = None,
    progress: bool = True,
    out: Path | str | None = None,
    resume: bool = False,
) -> list[DictionarySet]:
    """`train_on` for several dictionaries at once, which all see the same batches."""
    require_configs(configs)
    reads, writes = vectors if isinstance(vectors, tuple) else (vectors, None)
    return _train(VectorSource(reads, writes, seed=configs[0].seed), configs, names, progress, out, resume)


def _train(
    source: Source,
    configs: Sequence[TrainConfig],
    names: Sequence[str] | None,
    progress: bool,
    out: Path | str | None,
    resume: bool,
) -> list[DictionarySet]:
    with alone_in(None if out is None else Path(out)):
        trainer = Trainer(source, configs, out=out, resume=resume, names=names)
        trainer.run(progress=progress)
        return trainer.finish()
