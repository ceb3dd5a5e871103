"""Training a crosscoder: the trainer of autoencoders, on all sites side by side."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from jaxtyping import Int
from torch import Tensor

from transcoders.crosscoders.crosscoder import Crosscoder
from transcoders.crosscoders.files import CONFIG, load_crosscoder, save_crosscoder
from transcoders.crosscoders.pair import ModelPair
from transcoders.crosscoders.source import SideBySide
from transcoders.data.corpora import CorpusSource
from transcoders.dictionaries import SAESet
from transcoders.errors import InputError
from transcoders.language_model import LanguageModel
from transcoders.sites import Site
from transcoders.training.batches import ModelSource, Vectors, VectorSource
from transcoders.training.config import SAEConfig
from transcoders.training.planning import Plan, plan_run
from transcoders.training.run_folder import identity_of, was_started
from transcoders.training.trainer import Trainer

RUN = "run"
"""The folder in the output folder that the trainer has to itself."""


def train_crosscoder(
    model: LanguageModel | None,
    corpus: CorpusSource | Int[Tensor, "row pos"] | Vectors,
    config: SAEConfig,
    *,
    sites: Sequence[Site] | None = None,
    progress: bool = True,
    out: Path | str | None = None,
    resume: bool = False,
) -> Crosscoder:
    """Train a crosscoder of several sites, of a model, of two (`ModelPair`), or of vectors where it is None.

    `mean_s ‖x_s − x̂_s‖² / d + λ Σ_i a_i Σ_s ‖W_dec,i^s‖ / (S √d)` on sites of variance one; other penalties see the
    same sum of norms. TopK and BatchTopK rank by `a_i Σ_s ‖W_dec,i^s‖`: decoders are kept where this sum is √S, which
    changes no output.

    `corpus`, `out`, `resume`: as `train` takes them; vectors are `[token, site, d_model]`. `sites`: by default
    `config.site` of all layers; of a pair that of the middle layer, in both models. In `out` stand the crosscoder, and
    in `out/run` metrics and checkpoints. `InputError` for fewer than one site, sites of several widths,
    and sites that the model has not.

    Source: Lindsey et al. 2024, *Sparse Crosscoders*; for BatchTopK Minder et al. 2025, *Overcoming Sparsity Artifacts
    in Crosscoders to Interpret Chat-Tuning*.
    """
    source, folder = _opened(model, corpus, config, sites), None if out is None else Path(out)
    sites, config = source.inner_sites, source.config
    run = None if folder is None else folder / RUN
    is_there = folder is not None and (folder / CONFIG).is_file()
    if folder and run and resume and is_there and was_started(run, identity_of(source, [config])):
        return _complete(folder, sites)
    trainer = Trainer(source, [config], out=run, resume=resume, names=["crosscoder"])
    if folder is not None and not resume:  # of an earlier run, which this one takes the place of
        (folder / CONFIG).unlink(missing_ok=True)
    trainer.run(progress=progress)
    (trained,) = trainer.finish()
    assert isinstance(trained, SAESet)
    assert source.scales is not None
    provenance = replace(trained.provenance, normalisation={})
    labels = [model.label(site) for site in sites] if isinstance(model, ModelPair) else None
    crosscoder = Crosscoder.of_sae(trained[0], sites, source.scales, provenance, labels)
    if folder is not None:
        save_crosscoder(crosscoder, folder)
    return crosscoder


def plan_crosscoder(
    model: LanguageModel | None,
    corpus: CorpusSource | Int[Tensor, "row pos"] | Vectors,
    config: SAEConfig,
    *,
    sites: Sequence[Site] | None = None,
    out: Path | str | None = None,
    trial_seconds: float = 10.0,
) -> Plan:
    """What `train_crosscoder` with the same arguments will take, as `transcoders.plan` says it; nothing is written."""
    source, folder = _opened(model, corpus, config, sites), None if out is None else Path(out) / RUN
    behind = source.inner, source.inner_sites
    planned = plan_run(source, [source.config], out=folder, trial_seconds=trial_seconds, behind=behind)
    disk = dict(planned.disk)
    if "dictionaries" in disk:  # the trainer's, and the crosscoder beside them
        disk["crosscoder"] = disk["dictionaries"]
    return replace(planned, disk=disk)


def _opened(model: LanguageModel | None, corpus: object, config: SAEConfig, sites: Sequence[Site] | None) -> SideBySide:
    """What is read, with `config` settled; `InputError` for sites that do not go together."""
    inner = _source(model, corpus, config)
    sites = tuple(_default(model, inner.n_layers, config) if sites is None else sites)
    if not sites or len(set(sites)) < len(sites):
        raise InputError(f"A crosscoder has one site or more, each once; got {', '.join(map(str, sites)) or 'none'}.")
    if model is not None:
        for site in sites:
            model.hook(site)  # refused before a folder is made
        if len(widths := {model.width(site) for site in sites}) > 1:
            raise InputError(
                f"The sites of a crosscoder have one width; got {sorted(widths)}. Choose sites of one kind."
            )
    if model is None and sites != tuple(Site(i, config.site) for i in range(inner.n_layers)):
        raise InputError(f"Vectors have their own {inner.n_layers} sites; leave out `sites`.")
    return SideBySide(inner, sites, replace(config, site=sites[0].kind, side_by_side=len(sites)))


def _complete(folder: Path, sites: Sequence[Site]) -> Crosscoder:
    """What a complete run wrote."""
    crosscoder = load_crosscoder(folder)
    if crosscoder.sites != sites:
        raise InputError(
            f"{folder} holds a crosscoder of {', '.join(crosscoder.labels)}; give those sites, or another folder."
        )
    return crosscoder


def _source(model: LanguageModel | None, corpus: object, config: SAEConfig) -> ModelSource | VectorSource:
    are_vectors = callable(corpus) or (isinstance(corpus, Tensor) and corpus.is_floating_point())
    if are_vectors != (model is None):
        raise InputError(
            "A crosscoder is trained on a model and text (or rows of tokens), or on vectors without a model; got "
            f"{'no model' if model is None else model.name} and {type(corpus).__name__}."
        )
    if model is None:
        return VectorSource(corpus, None, seed=config.seed)  # pyright: ignore[reportArgumentType]
    return ModelSource(model, corpus, config)  # pyright: ignore[reportArgumentType]


def _default(model: LanguageModel | None, n_layers: int, config: SAEConfig) -> tuple[Site, ...]:
    if isinstance(model, ModelPair):
        return model.both(Site(model.first.n_layers // 2, config.site))
    return tuple(Site(layer, config.site) for layer in range(n_layers))
