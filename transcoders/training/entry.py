"""What users call: `plan` and `train`, for one dictionary or several, on a language model or on vectors."""

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

from jaxtyping import Int
from torch import Tensor

from transcoders.data.corpora import CorpusSource
from transcoders.data.store import ActivationStore
from transcoders.dictionaries import DictionarySet
from transcoders.errors import InputError
from transcoders.formats.registry import load_dictionaries
from transcoders.language_model import LanguageModel
from transcoders.training.batches import ModelSource, Source, Vectors, VectorSource
from transcoders.training.checkpoint import alone_in
from transcoders.training.config import TrainConfig, require_configs
from transcoders.training.distributed import join, ranks_here, ranks_in_environment
from transcoders.training.planning import Plan, plan_run
from transcoders.training.run_folder import finished_dictionaries, identity_of
from transcoders.training.stored import StoreSource, as_stored
from transcoders.training.trainer import Trainer
from transcoders.training.warm_start import Start

logger = logging.getLogger(__name__)

Text = CorpusSource | Int[Tensor, "row pos"]
"""What `open_corpus` takes (a file, a folder, a hub data set, documents), or rows of tokens."""
StartFrom = DictionarySet | Path | str
"""Dictionaries, or what `load_dictionaries` takes for them."""


@overload
def train(
    model: LanguageModel | None, corpus: ActivationStore, config: TrainConfig, *,
    progress: bool = ..., out: Path | str | None = ..., resume: bool = ..., start: StartFrom | None = ...,
) -> DictionarySet: ...  # fmt: skip
@overload
def train(
    model: LanguageModel | None, corpus: ActivationStore, config: Sequence[TrainConfig], *,
    names: Sequence[str] | None = ..., progress: bool = ..., out: Path | str | None = ..., resume: bool = ...,
) -> list[DictionarySet]: ...  # fmt: skip
@overload
def train(
    model: LanguageModel, corpus: Text, config: TrainConfig, *,
    progress: bool = ..., out: Path | str | None = ..., resume: bool = ..., start: StartFrom | None = ...,
) -> DictionarySet: ...  # fmt: skip
@overload
def train(
    model: LanguageModel, corpus: Text, config: Sequence[TrainConfig], *, names: Sequence[str] | None = ...,
    progress: bool = ..., out: Path | str | None = ..., resume: bool = ...,
) -> list[DictionarySet]: ...  # fmt: skip
@overload
def train(
    model: None, corpus: Vectors | tuple[Vectors, Vectors], config: TrainConfig, *,
    progress: bool = ..., out: Path | str | None = ..., resume: bool = ..., start: StartFrom | None = ...,
) -> DictionarySet: ...  # fmt: skip
@overload
def train(
    model: None, corpus: Vectors | tuple[Vectors, Vectors], config: Sequence[TrainConfig], *,
    names: Sequence[str] | None = ..., progress: bool = ..., out: Path | str | None = ..., resume: bool = ...,
) -> list[DictionarySet]: ...  # fmt: skip
def train(
    model: LanguageModel | None,
    corpus: Text | ActivationStore | Vectors | tuple[Vectors, Vectors],
    config: TrainConfig | Sequence[TrainConfig],
    *,
    names: Sequence[str] | None = None,
    progress: bool = True,
    out: Path | str | None = None,
    resume: bool = False,
    start: StartFrom | None = None,
) -> DictionarySet | list[DictionarySet]:
    """Train dictionaries of the kind that `config` names for all layers of `model`, or on vectors where it is None.

    `corpus`: what `open_corpus` takes (a file, a folder, a hub data set, documents), or rows of tokens; of documents
    every twentieth is held out.
    Without a model: vectors `[token, d_model]`, or `[token, layer, d_model]` for one dictionary a layer; or a function
    from a chunk's number to such a tensor, where there are too many to hold. For transcoders a pair of them, reads and
    writes. A tensor is read again, in another order, until `config.tokens` are seen. Or, with a model or without, the
    `ActivationStore` that `write_activations` wrote, or its path: runs that share it and the seed get the same batches,
    and the model, where it is given, says on which device, and is checked to be the store's.

    `config`: of a sequence all dictionaries, of any kinds, are trained at once on the same batches, and come back as a
    list; the model runs once for all. They must agree in `tokens`, `batch`, `context`, `documents`, `separator`, `bos`,
    `first`, `outliers` and `parallel`; the order of the data is that of the first one's seed. Each comes out as it
    would alone with that order, which also depends on how many tokens fit the buffer, hence on the number of sites.
    Each has a folder of its own in `out`, by `names` or by kind and activation, and checkpoints are of all together.

    `out`: a folder for the metrics (`metrics.jsonl`), checkpoints and the result, for one training at a time. `resume`:
    go on from the latest checkpoint there that is not damaged, to the same result as an unbroken run; where the run was
    killed before its first one, from the beginning; of a complete run, hand out what it saved. `InputError` where no
    run was started. Without it the checkpoints of an earlier run there are removed, which a warning says. Ctrl-C and
    SIGTERM write a checkpoint after the step at hand and raise `transcoders.errors.Stopped`, a KeyboardInterrupt.
    `NotFiniteError` where activations or a loss are not finite: the last good checkpoint stays.

    `start`: dictionaries to train on instead of new weights, or what `load_dictionaries` takes for them; of a single
    configuration. Exported at once they would be the same. Their features, activation, k, skip term, `first`, `bos`
    and sites are taken over, `InputError` where `config` asks for others; `skip=True` where they have no skip term
    starts one from zeros. `DictionaryError` for what training cannot hold (`transcoders.training.warm_start`). A run is
    resumed with the same `start`.

    In processes that `torchrun` started, all of which call this alike, the run is shared as `config.parallel` says, and
    every one gets the result, which is that of a single process. Only the first writes; `out` must be a folder that all
    of them see. `LostRankError` where one of them ends before its time.
    """
    started = None if start is None else _started(start, config)
    if started is not None:
        assert isinstance(config, TrainConfig)
        config = started.config(config)
    source, configs = _opened(model, corpus, config)
    if started is not None:
        started.require_sites(source.sites(configs[0]), source.d_model)
    world = join(source.device)
    with alone_in(Path(out) if out is not None and world.first else None):
        results = _complete(source, configs, Path(out), started) if resume and out is not None else None
        if results is None:
            trainer = Trainer(source, configs, out=out, resume=resume, names=names, world=world, start=started)
            trainer.run(progress=progress)
            results = trainer.finish()
    return results[0] if isinstance(config, TrainConfig) else results


def _started(start: StartFrom, config: TrainConfig | Sequence[TrainConfig]) -> Start:
    if not isinstance(config, TrainConfig):
        raise InputError(f"start is of one dictionary, and there are {len(config)} configurations; train them apart.")
    return Start.of(load_dictionaries(start) if isinstance(start, str | Path) else start)


def _complete(
    source: Source, configs: Sequence[TrainConfig], out: Path, start: Start | None
) -> list[DictionarySet] | None:
    """What a run wrote that is done already."""
    identity = identity_of(source, configs, None if start is None else start.hash)
    results = finished_dictionaries(out, identity, source.device)
    if results is not None:
        logger.warning("The run in %s is complete; its dictionaries are handed out as they were saved.", out)
    return results


def plan(
    model: LanguageModel | None,
    corpus: Text | Vectors | tuple[Vectors, Vectors] | ActivationStore,
    config: TrainConfig | Sequence[TrainConfig],
    *,
    out: Path | str | None = None,
    evaluate_tokens: int = 0,
    loss_tokens: int | None = None,
    trial_seconds: float = 10.0,
    start: StartFrom | None = None,
    ranks: int | None = None,
) -> Plan:
    """What `train` with the same arguments will take: operations, memory, disk and time, from a short trial.

    `evaluate_tokens`: held-out tokens of an evaluation afterwards, which is counted as well, `loss_tokens` of them for
    losses, as `evaluate` takes them. `ranks`: processes that share the run as `config.parallel` says; those that
    torchrun started, unless given. The time has none of what ranks wait for each other. Nothing is written.
    `Plan.require_fit` raises `InputError` where memory or disk do not suffice.
    """
    if start is not None:
        config = _started(start, config).config(config)  # pyright: ignore[reportArgumentType]  # refused for several
    source, configs = _opened(model, corpus, config)
    return plan_run(
        source, configs, out=None if out is None else Path(out), evaluate_tokens=evaluate_tokens,
        loss_tokens=loss_tokens, trial_seconds=trial_seconds, ranks=ranks or ranks_in_environment(),
        beside=ranks_here(),
    )  # fmt: skip


def _opened(
    model: LanguageModel | None, corpus: Any, config: TrainConfig | Sequence[TrainConfig]
) -> tuple[Source, Sequence[TrainConfig]]:
    """Where batches come from, and the configurations with what a store has settled."""
    configs = [config] if isinstance(config, TrainConfig) else config
    require_configs(configs)
    if ActivationStore.is_store(corpus):
        corpus = ActivationStore(corpus)
    if isinstance(corpus, ActivationStore):
        configs = [as_stored(each, corpus) for each in configs]
    return _source(model, corpus, configs[0]), configs


def _source(model: LanguageModel | None, corpus: Any, first: TrainConfig) -> Source:
    """Where batches come from; `InputError` for vectors with a model, and for text without one."""
    if isinstance(corpus, ActivationStore):
        return StoreSource(corpus, model, first)
    sides = list(corpus) if isinstance(corpus, tuple) else [corpus]
    floats = [isinstance(side, Tensor) and side.is_floating_point() for side in sides]
    are_vectors = all(given or callable(side) for given, side in zip(floats, sides, strict=True))
    if model is None:
        if not are_vectors or len(sides) not in (1, 2):
            raise InputError(
                f"Without a model, vectors are trained on: a tensor of numbers or a function, or a pair of them; got "
                f"{_named(corpus)}."
            )
        return VectorSource(sides[0], sides[1] if len(sides) == 2 else None, seed=first.seed)
    if are_vectors:
        raise InputError(
            f"A model reads text or rows of tokens; got {_named(corpus)}. Give None for the model to train on vectors."
        )
    return ModelSource(model, corpus, first)


def _named(corpus: Any) -> str:
    return f"a tensor of {corpus.dtype}" if isinstance(corpus, Tensor) else f"{type(corpus).__name__} {corpus!r:.60}"


# names of earlier releases


def train_many(
    model: LanguageModel, corpus: Text, configs: Sequence[TrainConfig], **options: Any
) -> list[DictionarySet]:
    """Deprecated: `train` with a sequence of configurations."""
    _deprecated("train_many(model, corpus, configs)", "train(model, corpus, configs)")
    return train(model, corpus, list(configs), **options)


def train_on(vectors: Vectors | tuple[Vectors, Vectors], config: TrainConfig, **options: Any) -> DictionarySet:
    """Deprecated: `train` without a model."""
    _deprecated("train_on(vectors, config)", "train(None, vectors, config)")
    return train(None, vectors, config, **options)


def train_many_on(
    vectors: Vectors | tuple[Vectors, Vectors], configs: Sequence[TrainConfig], **options: Any
) -> list[DictionarySet]:
    """Deprecated: `train` without a model, with a sequence of configurations."""
    _deprecated("train_many_on(vectors, configs)", "train(None, vectors, configs)")
    return train(None, vectors, list(configs), **options)


def _deprecated(old: str, new: str) -> None:
    warnings.warn(f"{old} is {new} now.", DeprecationWarning, stacklevel=3)
