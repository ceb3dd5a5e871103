"""The training loop: all sites from one pass over the model, all dictionaries at once, over one stream."""

import json
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from jaxtyping import Float
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from transcoders.dictionaries import DictionaryProvenance, DictionarySet
from transcoders.errors import InputError
from transcoders.formats.native import save_native
from transcoders.training.checkpoints import (
    Checkpoint,
    load_checkpoint,
    remove_checkpoints,
    require_same_run,
    save_checkpoint,
)
from transcoders.training.config import TrainConfig
from transcoders.training.loggers import Sink, open_sink
from transcoders.training.run import Run
from transcoders.training.sources import Source
from transcoders.training.versions import library_versions

logger = logging.getLogger(__name__)

_SCALE_BATCHES = 8
_SHARED = ("tokens", "batch", "context", "separator", "bos")
"""Settings of the stream, which all dictionaries trained on it have in common."""

_FREE_TO_CHANGE = ("log_to",)
"""Settings that nothing trained depends on: a run may be resumed with others."""


class Trainer:
    """Dictionaries in training on one source: their runs, and the place in the data.

    The order of the data, the buffer and the intervals of metrics and checkpoints are those of the first configuration.
    """

    def __init__(
        self,
        source: Source,
        configs: Sequence[TrainConfig],
        *,
        out: Path | str | None = None,
        resume: bool = False,
        names: Sequence[str] | None = None,
    ) -> None:
        require_configs(configs)
        self.source, self.configs, self.config = source, list(configs), configs[0]
        self.names = _names(configs, names)
        self.out = None if out is None else Path(out)
        sides = [source.sites(config) for config in configs]
        self.sites = sorted({site for reads, writes in sides for site in (*reads, *writes)})
        place = {site: i for i, site in enumerate(self.sites)}
        self._places = [tuple([place[site] for site in side] for side in pair) for pair in sides]
        for folder in self._folders():
            folder.mkdir(parents=True, exist_ok=True)
        checkpoint = load_checkpoint(self.out, source.device) if resume and self.out is not None else None
        if checkpoint is None:
            if self.out is not None:  # those of an earlier run there would be taken for this one's
                remove_checkpoints(self.out)
            self._start()
        else:
            self._restore(checkpoint)

    def run(self, *, until: int | None = None, progress: bool = True) -> None:
        """Train to the end, or up to a step."""
        steps = self.config.steps
        end = min(steps, until or steps)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, disable=not progress) as bar, ExitStack() as stack:
            sinks = self._open_sinks(stack)  # first: a missing package is to leave everything as it was
            files = [stack.enter_context(self._metrics_file(folder)) for folder in self._folders()]
            task = bar.add_task(f"training {', '.join(self.names)}", total=steps, completed=self.step)
            while self.step < end:
                self._train_step(next(self.batches).reads)
                if self.step % self.config.log_every == 0 or self.step == steps:
                    bar.update(task, description=self._log(files, sinks))
                bar.update(task, advance=1)
                if self.out is not None and self.step % self.config.checkpoint_every == 0:
                    save_checkpoint(self.out, self.step, self._checkpoint())

    def finish(self) -> list[DictionarySet]:
        """The dictionaries as they are now, on the model's own activations; saved where there is an output folder."""
        results = []
        for config, run in zip(self.configs, self.runs, strict=True):
            provenance = DictionaryProvenance(
                model=self.source.name,
                fingerprint=self.source.fingerprint(),
                frame=self.source.frame,
                corpus=self.source.corpus,
                tokens=self.step * config.batch,
                bos=self.source.bos,
                seed=config.seed,
                versions=library_versions(),
                config=config.to_json(),
            )
            results.append(run.export(*self.source.sites(config), provenance))
        for folder, dictionaries in zip(self._folders(), results, strict=False):
            save_native(dictionaries, folder)
        return results

    # one step

    def _train_step(self, activations: Float[Tensor, "batch site d_model"]) -> None:
        for run, (reads, writes) in zip(self.runs, self._places, strict=True):
            run.step(self.step, activations[:, reads], activations[:, writes])
        self.step += 1

    def _log(self, files: Sequence[IO[str]], sinks: Sequence[Sink | None]) -> str:
        """Metrics to the files, the sinks and the log; returns a line for the progress bar."""
        lines = [run.metrics(self.step) for run in self.runs]
        for file, line in zip(files, lines, strict=False):
            file.write(json.dumps(line) + "\n")
            file.flush()
        for sink, line in zip(sinks, lines, strict=True):
            if sink is not None:
                sink(line)
        texts = [f"{n}: fvu {m['fvu']:.3f}, L0 {m['l0']:.1f}" for n, m in zip(self.names, lines, strict=True)]
        logger.info("step %d of %d, %s", self.step, self.config.steps, "; ".join(texts))
        return texts[0] if len(texts) == 1 else f"{len(texts)} dictionaries, {texts[0]}"

    # starting and resuming

    def _start(self) -> None:
        first = self.source.sample(self.sites, _SCALE_BATCHES * self.config.batch)
        self.step = 0
        self.runs = [
            Run.start(config, first[:, reads], first[:, writes])
            for config, (reads, writes) in zip(self.configs, self._places, strict=True)
        ]
        self._open(chunk=0, batch_in_chunk=0)

    def _restore(self, checkpoint: Checkpoint) -> None:
        assert self.out is not None
        tensors, record = checkpoint.tensors, checkpoint.record
        require_same_run(self.out, record["run"], self._identity())
        self.step = record["step"]
        self.runs = [
            Run.restore(
                config,
                self.source.n_layers,
                self.source.d_model,
                {n.removeprefix(f"{i}."): t for n, t in tensors.items() if n.startswith(f"{i}.")},
                record["runs"][i],
            )
            for i, config in enumerate(self.configs)
        ]
        self._open(chunk=record["chunk"], batch_in_chunk=record["batch_in_chunk"])
        logger.info("resuming %s at step %d of %d", self.out, self.step, self.config.steps)

    def _open(self, *, chunk: int, batch_in_chunk: int) -> None:
        self.stream = self.source.open(self.sites, batch=self.config.batch, chunk=chunk, batch_in_chunk=batch_in_chunk)
        self.batches = iter(self.stream)

    def _checkpoint(self) -> Checkpoint:
        tensors = {f"{i}.{name}": t for i, run in enumerate(self.runs) for name, t in run.tensors().items()}
        record = {
            "step": self.step,
            "chunk": self.stream.chunk,
            "batch_in_chunk": self.stream.batch_in_chunk,
            "runs": [run.record() for run in self.runs],
            "run": self._identity(),
        }
        return Checkpoint(tensors, record)

    def _identity(self) -> dict[str, Any]:
        # Through JSON, because that is how a checkpoint remembers it: tuples become lists.
        identity = {
            "model": self.source.name,
            "fingerprint": self.source.fingerprint(),
            "corpus": self.source.corpus,
            "config": [
                {key: value for key, value in config.to_json().items() if key not in _FREE_TO_CHANGE}
                for config in self.configs
            ],
        }
        return json.loads(json.dumps(identity))

    # files

    def _folders(self) -> list[Path]:
        """One for each dictionary: the output folder itself, or named folders in it where there are several."""
        if self.out is None:
            return []
        return [self.out] if len(self.configs) == 1 else [self.out / name for name in self.names]

    def _open_sinks(self, stack: ExitStack) -> list[Sink | None]:
        """For each dictionary where its configuration wants its metrics besides the file, closed with the stack."""
        sinks: list[Sink | None] = []
        for config, name in zip(self.configs, self.names, strict=True):
            if config.log_to == "none":
                sinks.append(None)
                continue
            if self.out is None:
                raise InputError(f"log_to={config.log_to!r} writes below an output folder; give `out` as well.")
            sink = open_sink(config.log_to, folder=self.out, name=name, config=config.to_json())
            sinks.append(stack.enter_context(sink))
        return sinks

    def _metrics_file(self, folder: Path) -> IO[str]:
        """The metrics file, with the lines of steps that are about to be repeated cut off."""
        path = folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if json.loads(line)["step"] <= self.step]
        path.write_text("".join(line + "\n" for line in kept))
        return path.open("a", encoding="utf-8")


def require_configs(configs: Sequence[TrainConfig]) -> None:
    if not configs:
        raise InputError("There is nothing to train; give at least one configuration.")
    for name in _SHARED:
        values = {getattr(config, name) for config in configs}
        if len(values) > 1:
            raise InputError(
                f"Dictionaries trained on one stream share their {name}; got {sorted(map(repr, values))}. "
                "Give them one value, or train them one after the other."
            )


def _names(configs: Sequence[TrainConfig], names: Sequence[str] | None) -> list[str]:
    chosen = list(names or (f"{c.kind}-{c.activation}" + (f"-{i}" if i else "") for i, c in enumerate(configs)))
    if len(chosen) != len(configs) or len(set(chosen)) != len(chosen):
        raise InputError(f"{len(configs)} dictionaries need as many names, all different; got {chosen}.")
    return chosen
