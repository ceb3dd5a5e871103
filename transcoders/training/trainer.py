"""The training loop: activations of all layers from one pass over the model, all dictionaries at once."""

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from transcoders.data.activations import ActivationBatch, ActivationStream
from transcoders.data.corpora import Corpus, CorpusSource, open_corpus
from transcoders.data.tokens import pack_rows
from transcoders.dictionaries import DictionaryProvenance, DictionarySet
from transcoders.formats.native import save_native
from transcoders.language_model import LanguageModel
from transcoders.sites import Site
from transcoders.training.checkpoints import (
    Checkpoint,
    load_checkpoint,
    optimizer_tensors,
    remove_checkpoints,
    require_same_run,
    restore_optimizer,
    save_checkpoint,
)
from transcoders.training.config import SAEConfig, TrainConfig
from transcoders.training.dead import never_fired
from transcoders.training.initialise import initial_trainee, measure_scales
from transcoders.training.losses import Losses, losses
from transcoders.training.schedules import learning_rate, sparsity_weight
from transcoders.training.trainee import Scales
from transcoders.training.versions import library_versions

logger = logging.getLogger(__name__)

_SCALE_BATCHES = 8


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
    `out`: a folder for the metrics (`metrics.jsonl`), checkpoints and the result. `resume`: go on from the latest
    checkpoint there, to the same result as an unbroken run; from the start where there is none.
    """
    trainer = Trainer(model, corpus, config, out=out, resume=resume)
    trainer.run(progress=progress)
    return trainer.finish()


class Trainer:
    """One run: the weights, the optimizer, and the place in the data."""

    def __init__(
        self,
        model: LanguageModel,
        corpus: CorpusSource | Int[Tensor, "row pos"],
        config: TrainConfig,
        *,
        out: Path | str | None = None,
        resume: bool = False,
    ) -> None:
        self.model, self.config = model, config
        self.corpus_name, self._rows, self._context = _open_rows(model, corpus, config)
        self.reads, self.writes = _sites(config, model.n_layers)
        self.out = None if out is None else Path(out)
        if self.out is not None:
            self.out.mkdir(parents=True, exist_ok=True)
        self.step = 0
        checkpoint = load_checkpoint(self.out, model.device) if resume and self.out is not None else None
        if checkpoint is None:
            if self.out is not None:  # those of an earlier run there would be taken for this one's
                remove_checkpoints(self.out)
            self._start()
        else:
            self._restore(checkpoint)

    def run(self, *, until: int | None = None, progress: bool = True) -> None:
        """Train to the end, or up to a step."""
        end = min(self.config.steps, until or self.config.steps)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, disable=not progress) as bar, self._metrics_file() as metrics:
            task = bar.add_task(f"training {self.config.kind}", total=self.config.steps, completed=self.step)
            while self.step < end:
                result = self._train_step(next(self.batches))
                self.step += 1
                if self.step % self.config.log_every == 0 or self.step == self.config.steps:
                    line = self._metrics(result)
                    logger.info(
                        "step %d of %d, fvu %.4f, l0 %.1f", self.step, self.config.steps, line["fvu"], line["l0"]
                    )
                    bar.update(task, description=f"{self.config.kind}: fvu {line['fvu']:.3f}, L0 {line['l0']:.1f}")
                    if metrics is not None:
                        metrics.write(json.dumps(line) + "\n")
                        metrics.flush()
                bar.update(task, advance=1)
                if self.out is not None and self.step % self.config.checkpoint_every == 0:
                    save_checkpoint(self.out, self.step, self._checkpoint())

    def finish(self) -> DictionarySet:
        """The dictionaries as they are now, on the model's own activations; saved where there is an output folder."""
        provenance = DictionaryProvenance(
            model=self.model.name,
            fingerprint=self.model.fingerprint(),
            frame=self.model.frame,
            corpus=self.corpus_name,
            tokens=self.step * self.config.batch,
            seed=self.config.seed,
            versions=library_versions(),
            config=self.config.to_json(),
        )
        dictionaries = self.trainee.export(self.config, self.scales, self.reads, self.writes, provenance)
        if self.out is not None:
            save_native(dictionaries, self.out)
        return dictionaries

    # one step

    def _train_step(self, batch: ActivationBatch) -> Losses:
        config = self.config
        reads, writes = _normalise(batch.reads, self.scales.read), _normalise(batch.writes, self.scales.write)
        result = losses(
            self.trainee,
            reads,
            writes,
            config,
            sparsity_weight=sparsity_weight(config, self.step),
            dead=self.counter.dead,
        )
        self.optimizer.zero_grad()
        result.total.backward()
        torch.nn.utils.clip_grad_norm_(self.trainee.parameters(), config.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.step)
        self.optimizer.step()
        self.trainee.constrain()
        self.counter.update(result.active)
        return result

    def _metrics(self, result: Losses) -> dict[str, Any]:
        l0 = result.active.sum(dim=-1).float().mean(dim=1)
        dead = self.counter.dead.float().mean(dim=1)
        return {
            "step": self.step,
            "tokens": self.step * self.config.batch,
            "loss": float(result.total.detach()),
            "fvu": float(result.fvu.mean()),
            "l0": float(l0.mean()),
            "dead": float(dead.mean()),
            "sparsity": float(result.sparsity),
            "revival": float(result.revival),
            "learning_rate": learning_rate(self.config, self.step - 1),
            "sparsity_weight": sparsity_weight(self.config, self.step - 1),
            "fvu_per_layer": result.fvu.tolist(),
            "l0_per_layer": l0.tolist(),
            "dead_per_layer": dead.tolist(),
        }

    # starting and resuming

    def _start(self) -> None:
        first = next(iter(self._open_stream(batch=_SCALE_BATCHES * self.config.batch, buffer_mb=0)))
        self.scales = measure_scales(first.reads.float(), first.writes.float())
        reads, writes = _normalise(first.reads, self.scales.read), _normalise(first.writes, self.scales.write)
        self.trainee = initial_trainee(self.config, reads.transpose(0, 1), writes.transpose(0, 1))
        self._make_optimizer()
        self.stream = self._open_stream()
        self.batches = iter(self.stream)
        self.counter = never_fired(self.model.n_layers, self.config.features, self.config.dead_after, self.model.device)

    def _restore(self, checkpoint: Checkpoint) -> None:
        assert self.out is not None
        tensors, record = checkpoint.tensors, checkpoint.record
        require_same_run(self.out, record["run"], self._run_identity())
        self.step = record["step"]
        self.scales = Scales(tensors["scales.read"], tensors["scales.write"])
        empty = torch.zeros(2, self.model.n_layers, self.model.d_model, device=self.model.device)
        self.trainee = initial_trainee(self.config, empty, empty)
        prefix = "trainee."
        self.trainee.load_state_dict({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
        self._make_optimizer()
        restore_optimizer(self.optimizer, tensors)
        self.stream = self._open_stream(chunk=record["chunk"], batch_in_chunk=record["batch_in_chunk"])
        self.batches = iter(self.stream)
        self.counter = never_fired(self.model.n_layers, self.config.features, self.config.dead_after, self.model.device)
        self.counter.since_fired.copy_(tensors["since_fired"])
        logger.info("resuming %s at step %d of %d", self.out, self.step, self.config.steps)

    def _checkpoint(self) -> Checkpoint:
        tensors = {f"trainee.{name}": value for name, value in self.trainee.state_dict().items()}
        tensors |= optimizer_tensors(self.optimizer)
        tensors |= {"scales.read": self.scales.read, "scales.write": self.scales.write}
        tensors["since_fired"] = self.counter.since_fired
        place = {"chunk": self.stream.chunk, "batch_in_chunk": self.stream.batch_in_chunk}
        return Checkpoint(tensors, {"step": self.step, **place, "run": self._run_identity()})

    def _run_identity(self) -> dict[str, Any]:
        # Through JSON, because that is how a checkpoint remembers it: tuples become lists.
        identity = {
            "model": self.model.name,
            "fingerprint": self.model.fingerprint(),
            "corpus": self.corpus_name,
            "config": self.config.to_json(),
        }
        return json.loads(json.dumps(identity))

    def _make_optimizer(self) -> None:
        self.optimizer = torch.optim.Adam(
            self.trainee.parameters(), lr=self.config.lr, betas=self.config.betas, fused=True
        )

    def _open_stream(
        self, *, batch: int | None = None, buffer_mb: int | None = None, chunk: int = 0, batch_in_chunk: int = 0
    ) -> ActivationStream:
        """Chunks as large as the buffer, and large enough for a batch."""
        batch = self.config.batch if batch is None else batch
        buffer_mb = self.config.buffer_mb if buffer_mb is None else buffer_mb
        n_sites = len({*self.reads, *self.writes})
        bytes_per_row = self._context * n_sites * self.model.d_model * self.model.W_U.element_size()
        enough = -(-batch // (self._context - 1))
        return ActivationStream(
            self.model,
            self._rows,
            reads=self.reads,
            writes=self.writes,
            batch=batch,
            chunk_rows=max(enough, buffer_mb * 2**20 // bytes_per_row),
            seed=self.config.seed,
            chunk=chunk,
            batch_in_chunk=batch_in_chunk,
        )

    def _metrics_file(self) -> Any:
        """The metrics file, with the lines of steps that are about to be repeated cut off."""
        if self.out is None:
            return nullcontext()
        path = self.out / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if json.loads(line)["step"] <= self.step]
        path.write_text("".join(line + "\n" for line in kept))
        return path.open("a", encoding="utf-8")


def _normalise(
    activations: Float[Tensor, "batch layer d_model"], scale: Float[Tensor, "layer"]
) -> Float[Tensor, "layer batch d_model"]:
    """In float32, whatever the model's precision."""
    return (activations.float() * scale[:, None]).transpose(0, 1)


def _sites(config: TrainConfig, n_layers: int) -> tuple[tuple[Site, ...], tuple[Site, ...]]:
    layers = range(n_layers)
    if isinstance(config, SAEConfig):
        sites = tuple(Site(layer, config.site) for layer in layers)
        return sites, sites
    return tuple(Site(layer, "mlp_in") for layer in layers), tuple(Site(layer, "mlp_out") for layer in layers)


def _open_rows(model: LanguageModel, corpus: CorpusSource | Tensor, config: TrainConfig) -> tuple[str, Any, int]:
    """The name of the corpus, a function that opens a pass over its rows of tokens, and their length."""
    if isinstance(corpus, Tensor):
        rows = corpus.tolist()
        return "rows of tokens", lambda: iter(rows), corpus.shape[1]
    opened: Corpus = open_corpus(corpus)
    context = min(config.context, model.context)

    def passes() -> Iterator[Sequence[int]]:
        separator = opened.separator_or(config.separator)
        return pack_rows(model, opened.training(), context=context, separator=separator)

    return opened.name, passes, context
