"""The training loop: all sites from one pass over the model, all dictionaries at once, over one stream.

Numbers that are not finite are noticed without making a device wait for each step.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from torch import Tensor

from transcoders.dictionaries import DictionaryProvenance, DictionarySet
from transcoders.errors import InputError, NotFiniteError
from transcoders.formats.native import save_native
from transcoders.progress import progress_bar
from transcoders.sites import Site
from transcoders.training.batches import Source
from transcoders.training.checkpoint import (
    Checkpoint,
    alone_in,
    latest_checkpoint,
    read_record,
    read_state,
    remove_checkpoints,
    require_same_run,
    save_checkpoint,
)
from transcoders.training.config import TrainConfig
from transcoders.training.export import library_versions
from transcoders.training.metrics import MetricsFile, Sink, open_sink
from transcoders.training.step import Run


class Spoilt(NamedTuple):
    """The first number that was not finite."""

    step: int
    """Counted from one, as in the metrics."""
    site: Site | None
    """Whose activations were not finite, or None where they were and a loss was not."""
    name: str
    """Whose loss it was."""


class Watch:
    """For every site and every dictionary the first step with a number that is not finite, kept on the device."""

    def __init__(self, sites: Sequence[Site], names: Sequence[str], device: torch.device) -> None:
        self.sites, self.names = list(sites), list(names)
        self._first = torch.zeros(len(self.sites) + len(self.names), dtype=torch.int64, device=device)

    def see(
        self, step: int, activations: Float[Tensor, "batch site d_model"], finite: Sequence[Bool[Tensor, ""]]
    ) -> None:
        """Take in a step's activations, and whether each dictionary's loss and gradient were finite."""
        ends = torch.stack([activations.amax(dim=(0, 2)), activations.amin(dim=(0, 2))])  # NaN where anything is
        good = torch.cat([ends.isfinite().all(dim=0), torch.stack(list(finite))])
        self._first = torch.where((self._first == 0) & ~good, step, self._first)

    def first(self) -> Spoilt | None:
        """The first of them; waits for the device. Activations go before the losses they spoil."""
        steps = self._first.tolist()
        if not any(steps):
            return None
        step, place = min((step, place) for place, step in enumerate(steps) if step)
        if place < len(self.sites):
            return Spoilt(step, self.sites[place], "")
        return Spoilt(step, None, self.names[place - len(self.sites)])


def spoilt_rows(activations: Float[Tensor, "batch site d_model"]) -> list[int]:
    """The rows of a batch that hold a number that is not finite."""
    return (~activations.isfinite().all(dim=2).all(dim=1)).nonzero().squeeze(1).tolist()


logger = logging.getLogger(__name__)

_SCALE_BATCHES = 8
_SHARED = ("tokens", "batch", "context", "separator", "bos")
"""Settings of the stream, which all dictionaries trained on it have in common."""

_L0_TOLERANCE = 0.05

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
        self._watch = Watch(self.sites, self.names, source.device)
        with alone_in(self.out):
            if resume:
                self._restore()
            else:
                self._start()

    def run(self, *, until: int | None = None, progress: bool = True) -> None:
        """Train to the end, or up to a step."""
        steps = self.config.steps
        end = min(steps, until or steps)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with (
            alone_in(self.out),
            progress_bar(*columns, shown=progress, transient=False) as bar,
            ExitStack() as stack,
        ):
            sinks = self._open_sinks(stack)  # first: a missing package is to leave everything as it was
            files = [
                stack.enter_context(MetricsFile(folder / "metrics.jsonl", step=self.step)) for folder in self._folders()
            ]
            task = bar.add_task(f"training {', '.join(self.names)}", total=steps, completed=self.step)
            while self.step < end:
                activations = next(self.batches).reads
                log = (self.step + 1) % self.config.log_every == 0 or self.step + 1 == steps
                self._train_step(activations, measure=log)
                save = self.out is not None and self.step % self.config.checkpoint_every == 0
                if log or save or self.step == end or activations.device.type == "cpu":
                    self._require_finite(activations)
                if log:
                    bar.update(task, description=self._log(files, sinks))
                bar.update(task, advance=1)
                if save:
                    self._save_checkpoint()

    def finish(self) -> list[DictionarySet]:
        """The dictionaries as they are now, on the model's own activations; saved where there is an output folder.

        At the end of training a warning says where `target_l0` was missed by more than 5 %. `NotFiniteError` for
        weights that are not finite; nothing is saved then.
        """
        self._require_finite(None)
        results = []
        for config, run, name in zip(self.configs, self.runs, self.names, strict=True):
            run.require_finite(f"The dictionary {name}")
            provenance = DictionaryProvenance(
                model=self.source.name,
                model_origin=self.source.origin,
                fingerprint=self.source.fingerprint(),
                frame=self.source.frame,
                corpus=self.source.corpus,
                tokens=self.step * config.batch,
                bos=self.source.bos,
                seed=config.seed,
                versions=library_versions(),
                config=config.to_json(),
                d_vocab=self.source.d_vocab,
            )
            results.append(run.export(*self.source.sites(config), provenance))
        with alone_in(self.out):
            for folder, dictionaries in zip(self._folders(), results, strict=False):
                save_native(dictionaries, folder)
        if self.step == self.config.steps:
            self._compare_l0(results)
        return results

    # one step

    def _train_step(self, activations: Float[Tensor, "batch site d_model"], *, measure: bool) -> None:
        for run, (reads, writes) in zip(self.runs, self._places, strict=True):
            run.step(self.step, activations[:, reads], activations[:, writes], measure=measure)
        self.step += 1
        self._watch.see(self.step, activations, [run.finite for run in self.runs])

    def _require_finite(self, activations: Float[Tensor, "batch site d_model"] | None) -> None:
        """Raises `NotFiniteError` where a step came to NaN or infinity; `activations`: those of the last step."""
        spoilt = self._watch.first()
        if spoilt is None:
            return
        if spoilt.site is None:
            what = f"the loss of {spoilt.name} or its gradient is not finite; a lower lr or clip may help"
        else:
            what = f"the activations at {spoilt.site} are not finite"
            if activations is not None and spoilt.step == self.step:
                row = spoilt_rows(activations)[0]
                what += f" (row {row} of the batch, {self.stream.place(row)}); mend or leave out what they come from"
        raise NotFiniteError(f"Training stopped at step {spoilt.step}: {what}. {self._way_back()}")

    def _way_back(self) -> str:
        folder = None if self.out is None else latest_checkpoint(self.out)
        if folder is None:
            return "There is no checkpoint to go back to."
        return f"The last good checkpoint is {folder}, from which `resume` goes on."

    def _compare_l0(self, results: Sequence[DictionarySet]) -> None:
        """Warn where the L0 of what is handed out is not the one that was asked."""
        if all(config.target_l0 is None for config in self.configs):
            return
        sample = self.source.sample(self.sites, _SCALE_BATCHES * self.config.batch).transpose(0, 1).float()
        for config, name, (reads, _), result in zip(self.configs, self.names, self._places, results, strict=True):
            if config.target_l0 is None:
                continue
            l0 = len(result.encode(sample[reads]).value) / (sample.shape[1] * len(reads))
            if abs(l0 / config.target_l0 - 1) > _L0_TOLERANCE:
                logger.warning(
                    "%s ended with L0 %.1f, %+.0f%% off its target_l0 of %g: train on more tokens, or set `sparsity`.",
                    name, l0, 100 * (l0 / config.target_l0 - 1), config.target_l0,
                )  # fmt: skip

    def _log(self, files: Sequence[MetricsFile], sinks: Sequence[Sink | None]) -> str:
        """Metrics to the files, the sinks and the log; returns a line for the progress bar."""
        lines = [run.metrics(self.step) for run in self.runs]
        for file, line in zip(files, lines, strict=False):
            file.write(line)
        for sink, line in zip(sinks, lines, strict=True):
            if sink is not None:
                sink(line)
        texts = [f"{n}: fvu {m['fvu']:.3f}, L0 {m['l0']:.1f}" for n, m in zip(self.names, lines, strict=True)]
        logger.info("step %d of %d, %s", self.step, self.config.steps, "; ".join(texts))
        return texts[0] if len(texts) == 1 else f"{len(texts)} dictionaries, {texts[0]}"

    # starting and resuming

    def _start(self) -> None:
        if self.out is not None and (earlier := latest_checkpoint(self.out)):
            # It would be taken for this run's.
            logger.warning("Removing %s of an earlier run, as this one starts anew (`resume` would go on).", earlier)
            remove_checkpoints(self.out)
        first = self.source.sample(self.sites, _SCALE_BATCHES * self.config.batch)
        for place, site in enumerate(self.sites):
            if rows := spoilt_rows(first[:, place : place + 1]):
                raise NotFiniteError(
                    f"Training did not start: the activations at {site} are not finite in {len(rows)} of the first "
                    f"{len(first)} tokens; mend or leave out what they come from."
                )
        self.step = 0
        self.runs = [
            Run.start(config, first[:, reads], first[:, writes])
            for config, (reads, writes) in zip(self.configs, self._places, strict=True)
        ]
        self._open(None)

    def _restore(self) -> None:
        if self.out is None:
            raise InputError("`resume` goes on from a checkpoint in an output folder; give `out` as well.")
        folder = latest_checkpoint(self.out)
        if folder is None:
            raise InputError(f"There is no checkpoint in {self.out} to resume; leave out `resume` to start anew.")
        record = read_record(folder, steps=self.config.steps, runs=len(self.configs))
        require_same_run(self.out, record["run"], self._identity())
        tensors = read_state(folder, record, self.source.device)
        self.step = record["step"]
        self.runs = [
            Run.restore(
                config,
                (self.source.n_layers, self.source.d_model),
                {n.removeprefix(f"{i}."): t for n, t in tensors.items() if n.startswith(f"{i}.")},
                record["runs"][i],
                folder,
                self.source.device,
            )
            for i, config in enumerate(self.configs)
        ]
        self._open(record["data"])
        logger.info("resuming %s at step %d of %d", self.out, self.step, self.config.steps)

    def _open(self, state: Mapping[str, Any] | None) -> None:
        self.stream = self.source.open(self.sites, batch=self.config.batch, state=state)
        self.batches = iter(self.stream)

    def _save_checkpoint(self) -> None:
        assert self.out is not None
        for run in self.runs:
            run.require_finite(f"The checkpoint of step {self.step}")
        save_checkpoint(self.out, self.step, self._checkpoint())

    def _checkpoint(self) -> Checkpoint:
        tensors = {f"{i}.{name}": t for i, run in enumerate(self.runs) for name, t in run.tensors().items()}
        record = {
            "step": self.step,
            "data": self.stream.state(),
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
