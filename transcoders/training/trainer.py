"""The training loop: all sites from one pass over the model, all dictionaries at once, over one stream.

Numbers that are not finite are noticed without making a device wait for each step.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from transcoders.dictionaries import DictionaryProvenance, DictionarySet
from transcoders.errors import FileFormatError, InputError, NotFiniteError, WriteError
from transcoders.files import sweep
from transcoders.formats.native import save_native
from transcoders.sites import Site
from transcoders.training.batches import FIRST_BATCHES, Places, Source
from transcoders.training.best import L0_TOLERANCE, score
from transcoders.training.checkpoint import (
    RECORD,
    Checkpoint,
    alone_in,
    checkpoints,
    damaged,
    keep_checkpoints,
    latest_checkpoint,
    read_record,
    read_state,
    remove_checkpoints,
    save_checkpoint,
)
from transcoders.training.config import TrainConfig
from transcoders.training.display import Display
from transcoders.training.export import library_versions
from transcoders.training.metrics import METRICS, MetricsFile, Sink, Wait, lines_after, open_sink
from transcoders.training.record import write_record
from transcoders.training.run_folder import identity_of, mark_finished, mark_started, require_same_run, was_started
from transcoders.training.step import Run
from transcoders.training.stopping import stop_requests


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

_SHARED = ("tokens", "batch", "context", "documents", "separator", "bos", "first", "outliers")
"""Settings of the stream, which all dictionaries trained on it have in common."""


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
        self.sites, self._places = Places.of(source, configs)
        self._watch = Watch(self.sites, self.names, source.device)
        with alone_in(self.out):
            if resume:
                self._restore()
            else:
                self._start()

    def run(self, *, until: int | None = None, progress: bool = True) -> None:
        """Train to the end, or up to a step.

        Where there is an output folder, Ctrl-C and SIGTERM are heard at the end of a step: a checkpoint is written, and
        `Stopped`, a KeyboardInterrupt, says so.
        """
        steps = self.config.steps
        end = min(steps, until or steps)
        self._wait = Wait()
        display = Display(self.names, steps=steps, done=self.step, batch=self.config.batch, shown=progress)
        with (
            alone_in(self.out),
            self._with_way_back(),
            stop_requests(heard=self.out is not None) as request,
            display,
            ExitStack() as stack,
        ):
            sinks = self._open_sinks(stack)  # first: a missing package is to leave everything as it was
            files = [stack.enter_context(MetricsFile(folder / METRICS, step=self.step)) for folder in self._folders()]
            while self.step < end:
                activations = self._wait.next(self.batches).reads
                log = (self.step + 1) % self.config.log_every == 0 or self.step + 1 == steps
                self._train_step(activations, measure=log)
                stop = request.number is not None
                save = self.out is not None and (stop or self.step % self.config.checkpoint_every == 0)
                if log or save or self.step == end or activations.device.type == "cpu":
                    self._require_finite(activations)
                if log:
                    logger.info("step %d of %d, %s", self.step, steps, display.measured(self._log(files, sinks)))
                display.advance()
                if save:
                    self._save_checkpoint()
                if stop:
                    raise request.stopped(f"Training stopped after step {self.step} of {steps}. {self._way_back()}")
        if self.step == steps:
            self.batches = iter(())  # what the stream buffers is needed no longer

    def finish(self) -> list[DictionarySet]:
        """The dictionaries as they are now, on the model's own activations; saved where there is an output folder.

        At the end of training a warning says where `target_l0` was missed by more than 5 %. `NotFiniteError` for
        weights that are not finite; nothing is saved then.
        """
        self._require_finite(None)
        results = []
        for config, run, name in zip(self.configs, self.runs, self.names, strict=True):
            run.require_finite(f"The dictionary {name}")
            results.append(run.export(*self.source.sites(config), self._provenance(config)))
        with alone_in(self.out), self._with_way_back():
            for folder, dictionaries in zip(self._folders(), results, strict=False):
                save_native(dictionaries, folder)
            self._write_records()
            if self.out is not None and self.step == self.config.steps:
                mark_finished(self.out, self._identity(), self._folders())
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

    @contextmanager
    def _with_way_back(self) -> Iterator[None]:
        """A full disk ends a run; it says from where the run can go on once there is room."""
        try:
            yield
        except WriteError as error:
            raise WriteError(f"{error} {self._way_back()}") from error

    def _way_back(self) -> str:
        folder = None if self.out is None else latest_checkpoint(self.out)
        if folder is None:
            return "There is no checkpoint to go back to."
        return f"The last good checkpoint is {folder}, from which `resume` (--resume) goes on."

    def _compare_l0(self, results: Sequence[DictionarySet]) -> None:
        """Warn where the L0 of what is handed out is not the one that was asked."""
        if all(config.target_l0 is None for config in self.configs):
            return
        sample = self.source.sample(self.sites, FIRST_BATCHES * self.config.batch).transpose(0, 1).float()
        for config, name, (reads, _), result in zip(self.configs, self.names, self._places, results, strict=True):
            if config.target_l0 is None:
                continue
            l0 = len(result.encode(sample[reads]).value) / (sample.shape[1] * len(sample[reads]))
            if abs(l0 / config.target_l0 - 1) > L0_TOLERANCE:
                logger.warning(
                    "%s ended with L0 %.1f, %+.0f%% off its target_l0 of %g: train on more tokens, or set `sparsity`.",
                    name, l0, 100 * (l0 / config.target_l0 - 1), config.target_l0,
                )  # fmt: skip

    def _log(self, files: Sequence[MetricsFile], sinks: Sequence[Sink | None]) -> list[dict[str, Any]]:
        """Metrics to the files and the sinks; returns them."""
        waited = self._wait.share()
        lines = [{**run.metrics(self.step), "data_wait": waited} for run in self.runs]
        for file, line in zip(files, lines, strict=False):
            file.write(line)
        for sink, line in zip(sinks, lines, strict=True):
            if sink is not None:
                sink(line)
        return lines

    # starting and resuming

    def _start(self) -> None:
        first = self.source.sample(self.sites, FIRST_BATCHES * self.config.batch)
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
        if self.out is not None:
            self._take_folder(self.out)

    def _take_folder(self, out: Path) -> None:
        """Last of all that can fail: what an earlier run left to go on from is lost here."""
        self._sweep()
        if earlier := latest_checkpoint(out):
            # It would be taken for this run's.
            logger.warning("Removing %s of an earlier run, as this one starts anew (`resume` would go on).", earlier)
            remove_checkpoints(out)
        mark_started(out, self._identity())

    def _restore(self) -> None:
        """From the latest checkpoint that is not damaged; from the beginning where the run was killed before any."""
        if self.out is None:
            raise InputError("`resume` goes on from a checkpoint in an output folder; give `out` as well.")
        started, there = was_started(self.out, self._identity()), checkpoints(self.out)
        if not there and started:
            logger.info("%s has no checkpoint yet; starting at step 0", self.out)
            self._start()
            return
        if not there:
            raise InputError(f"There is no checkpoint in {self.out} to resume; leave out `resume` to start anew.")
        self._sweep()
        while True:
            folder = there.pop()
            try:
                self._restore_from(folder)
                break
            except FileFormatError as error:
                if not there:
                    raise FileFormatError(
                        f"{error} There is no checkpoint before it, so leave out `resume` to train anew."
                    ) from error
                logger.warning("%s Going on from the one before it, %s.", error, there[-1])
        self._keep_checkpoints()  # a kill may have left one too many
        if not started:  # of an earlier release
            mark_started(self.out, self._identity())
        logger.info("resuming %s at step %d of %d", self.out, self.step, self.config.steps)

    def _restore_from(self, folder: Path) -> None:
        record = read_record(folder, steps=self.config.steps, runs=len(self.configs))
        require_same_run(folder.parent, record["run"], self._identity())
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
        try:
            self._open(record["data"])
        except InputError:  # of data that are not there any more, for example
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise damaged(folder / RECORD, "data", record["data"], "where the data go on") from error

    def _open(self, state: Mapping[str, Any] | None) -> None:
        self.stream = self.source.open(self.sites, batch=self.config.batch, state=state)
        self.batches = iter(self.stream)

    def _save_checkpoint(self) -> None:
        assert self.out is not None
        for run in self.runs:
            run.require_finite(f"The checkpoint of step {self.step}")
        save_checkpoint(self.out, self.step, self._checkpoint())
        self._write_records()
        self._keep_checkpoints()

    def _keep_checkpoints(self) -> None:
        assert self.out is not None
        keep_last, keep_best = self.config.keep_last, self.config.keep_best
        keep_checkpoints(self.out, self.step, keep_last=keep_last, keep_best=keep_best)

    def _checkpoint(self) -> Checkpoint:
        tensors = {f"{i}.{name}": t for i, run in enumerate(self.runs) for name, t in run.tensors().items()}
        record = {
            "step": self.step,
            "data": self.stream.state(),
            "runs": [run.record() for run in self.runs],
            "run": self._identity(),
            "names": self.names,
            "provenance": [self._provenance(config).to_json() for config in self.configs],
            "score": self._score(),
        }
        return Checkpoint(tensors, record)

    def _score(self) -> float | None:
        """Of what was logged since the checkpoint before, over all dictionaries; None where it says nothing."""
        since = (self.step - 1) // self.config.checkpoint_every * self.config.checkpoint_every
        lines = [lines_after(folder / METRICS, since) for folder in self._folders()]
        scores = [score(config, each) for config, each in zip(self.configs, lines, strict=True)]
        known = [each for each in scores if each is not None]
        return sum(known) / len(known) if len(known) == len(scores) else None

    def _provenance(self, config: TrainConfig) -> DictionaryProvenance:
        source = self.source
        return DictionaryProvenance(
            model=source.name,
            model_origin=source.origin,
            fingerprint=source.fingerprint(),
            frame=source.frame,
            corpus=source.corpus,
            tokens=self.step * config.batch,
            bos=source.bos,
            seed=config.seed,
            versions=library_versions(),
            config=config.to_json(),
            d_vocab=source.d_vocab,
            first=source.first,
            limits={str(site): limit for site, limit in source.limits.items()},
        )

    def _identity(self) -> dict[str, Any]:
        return identity_of(self.source, self.configs)

    # files

    def _write_records(self) -> None:
        identity = {**self._identity(), "data_hash": self.stream.state().get("hash")}
        for folder, config in zip(self._folders(), self.configs, strict=False):
            write_record(folder, config, step=self.step, identity=identity, versions=library_versions())

    def _folders(self) -> list[Path]:
        """One for each dictionary: the output folder itself, or named folders in it where there are several."""
        if self.out is None:
            return []
        return [self.out] if len(self.configs) == 1 else [self.out / name for name in self.names]

    def _sweep(self) -> None:
        """Remove what a killed run left half-written; the lock says that it is not there any more."""
        for folder in {self.out, *self._folders()} - {None}:
            sweep(folder)

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
