"""The training loop: all sites from one pass over the model, all dictionaries at once, over one stream."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from signal import Signals
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from transcoders.dictionaries import DictionaryProvenance, DictionarySet
from transcoders.errors import FileFormatError, InputError, LostRankError, NotFiniteError, WriteError
from transcoders.files import sweep
from transcoders.formats.native import save_native
from transcoders.formats.registry import load_dictionaries
from transcoders.kernels import host
from transcoders.training.batches import FIRST_BATCHES, Places, Source, evenly, nudges_of
from transcoders.training.best import compare_l0, score
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
    way_back,
)
from transcoders.training.config import TrainConfig, require_configs
from transcoders.training.cost import decoder_rank
from transcoders.training.display import Display
from transcoders.training.distributed import ALONE, World
from transcoders.training.export import library_versions
from transcoders.training.metrics import METRICS, MetricsFile, Sink, Wait, lines_after, open_sink
from transcoders.training.record import write_record
from transcoders.training.run_folder import identity_of, mark_finished, mark_started, require_same_run, was_started
from transcoders.training.split import Piece, Split
from transcoders.training.step import Run
from transcoders.training.stopping import StopRequest, stop_requests
from transcoders.training.trained_on import write_trained_on
from transcoders.training.warm_start import Start
from transcoders.training.watch import Watch, spoilt_rows

logger = logging.getLogger(__name__)


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
        world: World = ALONE,
        start: Start | None = None,
    ) -> None:
        """`world`: the ranks that train together; the first one writes. `start`: of a single configuration, settled."""
        require_configs(configs)
        self.source, self.configs, self.config = source, list(configs), configs[0]
        self.split, self.start = Split(world, self.config.parallel), start
        for config in configs:
            self.split.require(config, source.n_layers)
        self.names = _names(configs, names)
        self.out = None if out is None else Path(out)
        self.sites, self._places = Places.of(source, configs, self.split)
        self._own = self.split.sites_of(self.sites, source.n_layers)
        self._watch = Watch(self.sites, self.names, source.device, world, self._own)
        with alone_in(self._mine):
            if resume:
                self._restore()
            else:
                self._start()
        self._nudges = nudges_of(source, configs)

    def run(self, *, until: int | None = None, progress: bool = True) -> None:
        """Train to the end, or up to a step.

        Where there is an output folder, Ctrl-C and SIGTERM are heard at the end of a step: a checkpoint is written, and
        `Stopped`, a KeyboardInterrupt, says so.
        """
        steps = self.config.steps
        end = min(steps, until or steps)
        self._wait = Wait()
        display = Display(
            self.names, steps=steps, done=self.step, batch=self.config.batch, shown=progress and self._writes
        )
        with (
            alone_in(self._mine),
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
                stop = self.out is not None and self._agreed(request)
                save = self.out is not None and (stop or self.step % self.config.checkpoint_every == 0)
                if log or save or self.step == end or not host.queued(activations):
                    self._require_finite(activations)
                if log:
                    figures = display.measured(self._log(files, sinks))
                    if self._writes:
                        logger.info("step %d of %d, %s", self.step, steps, figures)
                display.advance()
                if save:
                    self._save_checkpoint()
                if stop:
                    raise request.stopped(f"Training stopped after step {self.step} of {steps}. {way_back(self.out)}")
        if self.step == steps:
            self.batches = iter(())  # what the stream buffers is needed no longer

    def finish(self) -> list[DictionarySet]:
        """The dictionaries as they are now, on the model's own activations; saved where there is an output folder.

        At the end of training a warning says where `target_l0` was missed by more than 5 %. `NotFiniteError` for
        weights that are not finite; nothing is saved then.
        """
        with self._with_way_back(), alone_in(self._mine):
            self._require_finite(None)
            exported = [self._export(*each) for each in zip(self.configs, self.runs, self.names, strict=True)]
            for folder, dictionaries in zip(self._folders(), exported, strict=False):
                assert dictionaries is not None
                save_native(dictionaries, folder)
            self._write_records()
            if self._mine is not None and self.step == self.config.steps:
                mark_finished(self._mine, self._identity(), self._folders())
            self.split.world.wait()
        results = [each for each in exported if each is not None]
        if not results:  # a rank that has a part of them: of the rest it reads what it needs
            results = [
                load_dictionaries(folder, decoders="memory" if decoder_rank(config) else "mapped")
                for folder, config in zip(self._folders_of(self.out), self.configs, strict=True)
            ]
        if self.step == self.config.steps and self._writes:
            self._compare_l0(results)
        return results

    def _export(self, config: TrainConfig, run: Run, name: str) -> DictionarySet | None:
        run.require_finite(f"The dictionary {name}")
        sites, provenance = self.source.sites(config), self._provenance(config)
        return run.export(*sites, provenance, everywhere=self.out is None)

    # one step

    def _agreed(self, request: StopRequest) -> bool:
        """Whether any rank was asked to stop: all do at the same step."""
        if self.split.world.size > 1:
            number = -int(self.split.world.least(torch.tensor(-int(request.number or 0))))
            if not number:  # a signal that came meanwhile is for the next step
                return False
            request.number = Signals(number)
        return request.number is not None

    def _train_step(self, activations: Float[Tensor, "batch site d_model"], *, measure: bool) -> None:
        directions = None if self._nudges is None else self._nudges.at(self.step, self.stream)
        for run, (reads, writes) in zip(self.runs, self._places, strict=True):
            sides = activations[:, reads], activations[:, writes]
            run.step(self.step, *sides, directions=directions, measure=measure)
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
                for row in spoilt_rows(activations)[:1]:  # ranks may have none
                    what += f" (row {row} of the batch, {self.stream.place(row)})"
                what += "; mend or leave out what they come from"
        raise NotFiniteError(f"Training stopped at step {spoilt.step}: {what}. {way_back(self.out)}")

    @contextmanager
    def _with_way_back(self) -> Iterator[None]:
        """A full disk ends a run, and so does a lost rank; it says from where the run can go on."""
        try:
            yield
        except WriteError as error:
            raise WriteError(f"{error} {way_back(self.out)}") from error
        except LostRankError as error:
            raise LostRankError(f"Training stopped at step {self.step}: {error} {way_back(self.out)}") from error

    def _compare_l0(self, results: Sequence[DictionarySet]) -> None:
        """Warn where the L0 of what is handed out is not the one that was asked."""
        if all(config.target_l0 is None for config in self.configs):
            return
        sample = self.source.sample(self.sites, FIRST_BATCHES * self.config.batch).transpose(0, 1).float()
        for config, name, result in zip(self.configs, self.names, results, strict=True):
            reads = torch.stack([sample[self.sites.index(site)] for site in self.source.sites(config)[0]])
            compare_l0(config, name, result, reads)

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
        first = first[:, evenly(self._own)]
        begin = partial(Run.start, split=self.split, n_layers=self.source.n_layers, start=self.start)
        self.runs = [begin(c, first[:, r], first[:, w]) for c, (r, w) in zip(self.configs, self._places, strict=True)]
        self._open(None)
        if self._mine is not None:
            self._take_folder(self._mine)

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
                self._restore_alike(folder)
                break
            except FileFormatError as error:
                if not there:
                    raise FileFormatError(
                        f"{error} There is no checkpoint before it, so leave out `resume` to train anew."
                    ) from error
                logger.warning("%s Going on from the one before it, %s.", error, there[-1])
        self._keep_checkpoints()  # a kill may have left one too many
        if not started and self._mine is not None:  # of an earlier release
            mark_started(self._mine, self._identity())
        logger.info("resuming %s at step %d of %d", self.out, self.step, self.config.steps)

    def _restore_alike(self, folder: Path) -> None:
        """On all ranks or on none: what one finds damaged, the others may not have read."""
        damage = None
        try:
            self._restore_from(folder)
        except FileFormatError as error:
            damage = error
        if bool(self.split.world.any(torch.tensor(damage is not None))):
            raise damage or FileFormatError(f"{folder} is damaged, as another rank says.")

    def _restore_from(self, folder: Path) -> None:
        record = read_record(folder, steps=self.config.steps, runs=len(self.configs))
        require_same_run(folder.parent, record["run"], self._identity())
        tensors = read_state(folder, record, self.source.device, self._own_piece)
        self.step = record["step"]
        self.runs = [
            Run.restore(
                config,
                (self.source.n_layers, self.source.d_model),
                {n.removeprefix(f"{i}."): t for n, t in tensors.items() if n.startswith(f"{i}.")},
                record["runs"][i],
                folder,
                self.source.device,
                split=self.split,
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
        self.stream = self.source.open(self.sites, batch=self.config.batch, state=state, split=self.split)
        self.batches = iter(self.stream)

    def _save_checkpoint(self) -> None:
        assert self.out is not None
        for run in self.runs:
            run.require_finite(f"The checkpoint of step {self.step}")
        checkpoint = self._checkpoint()
        if self._writes:
            save_checkpoint(self.out, self.step, checkpoint)
            self._write_records()
            self._keep_checkpoints()
        else:
            checkpoint.take_part()
        self.split.world.wait()

    def _keep_checkpoints(self) -> None:
        if self._mine is not None:
            keep_last, keep_best = self.config.keep_last, self.config.keep_best
            keep_checkpoints(self._mine, self.step, keep_last=keep_last, keep_best=keep_best)

    def _checkpoint(self) -> Checkpoint:
        shapes: dict[str, Tensor] = {}
        streams: list[Iterator[tuple[str, Tensor | None]]] = []
        for i, run in enumerate(self.runs):
            of_run, stream = run.to_first()
            shapes |= {f"{i}.{name}": like for name, like in of_run.items()}
            streams.append(stream)
        record = {
            "step": self.step,
            "data": self.stream.state(),
            "runs": [run.record() for run in self.runs],
            "run": self._identity(),
            "names": self.names,
            "provenance": [self._provenance(config).to_json() for config in self.configs],
            "score": self._score() if self._writes else None,
        }
        return Checkpoint(shapes, (tensor for stream in streams for _, tensor in stream), record)

    def _own_piece(self, name: str) -> tuple[str, Piece] | None:
        """What of a checkpoint's tensor is with this rank, and its name here."""
        number = name.partition(".")[0]
        features = self.configs[int(number)].features if number.isdigit() and int(number) < len(self.configs) else 0
        return self.split.own(name, self.source.n_layers, features)

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
            config=config.to_json() | ({} if self.start is None else {"start": self.start.record()}),
            d_vocab=source.d_vocab,
            first=source.first,
            limits={str(site): limit for site, limit in source.limits.items()},
        )

    def _identity(self) -> dict[str, Any]:
        return identity_of(self.source, self.configs, None if self.start is None else self.start.hash)

    # files

    def _write_records(self) -> None:
        place = self.stream.state()
        identity = {**self._identity(), "data_hash": place.get("hash") or place.get("store")}
        for folder, config in zip(self._folders(), self.configs, strict=False):
            write_record(folder, config, step=self.step, identity=identity, versions=library_versions())
            write_trained_on(folder, self.source.trained_on)

    def _folders(self) -> list[Path]:
        """One for each dictionary, where this rank writes."""
        return self._folders_of(self._mine)

    def _folders_of(self, out: Path | None) -> list[Path]:
        """The output folder itself, or named folders in it where there are several dictionaries."""
        if out is None:
            return []
        return [out] if len(self.configs) == 1 else [out / name for name in self.names]

    @property
    def _writes(self) -> bool:
        return self.split.world.first

    @property
    def _mine(self) -> Path | None:
        """The output folder, where this rank writes to it."""
        return self.out if self._writes else None

    def _sweep(self) -> None:
        """Remove what a killed run left half-written; the lock says that it is not there any more."""
        for folder in {self._mine, *self._folders()} - {None}:
            sweep(folder)

    def _open_sinks(self, stack: ExitStack) -> list[Sink | None]:
        """For each dictionary where its configuration wants its metrics besides the file, closed with the stack."""
        sinks: list[Sink | None] = []
        for config, name in zip(self.configs, self.names, strict=True):
            if config.log_to == "none" or not self._writes:
                sinks.append(None)
                continue
            if self.out is None:
                raise InputError(f"log_to={config.log_to!r} writes below an output folder; give `out` as well.")
            sink = open_sink(config.log_to, folder=self.out, name=name, config=config.to_json())
            sinks.append(stack.enter_context(sink))
        return sinks


def _names(configs: Sequence[TrainConfig], names: Sequence[str] | None) -> list[str]:
    chosen = list(names or (f"{c.kind}-{c.activation}" + (f"-{i}" if i else "") for i, c in enumerate(configs)))
    if len(chosen) != len(configs) or len(set(chosen)) != len(chosen):
        raise InputError(f"{len(configs)} dictionaries need as many names, all different; got {chosen}.")
    return chosen
