"""Fine-tuning all layers of a set of dictionaries together, in the place of the model's MLPs."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from transcoders.data.chunks import Chunk, Chunks
from transcoders.data.outliers import massive_tokens
from transcoders.dictionaries import DictionarySet, fitted
from transcoders.dictionaries.provenance import reading_as_trained
from transcoders.errors import DictionaryError, FileFormatError, InputError, NotFiniteError, WriteError
from transcoders.evaluation.splice import sequential
from transcoders.files import sweep
from transcoders.formats.native import save_native
from transcoders.formats.registry import load_dictionaries
from transcoders.held import HeldModel
from transcoders.language_model import LanguageModel
from transcoders.training.batches import open_rows
from transcoders.training.checkpoint import (
    Checkpoint,
    alone_in,
    checkpoints,
    keep_checkpoints,
    latest_checkpoint,
    read_record,
    read_state,
    remove_checkpoints,
    require_like,
    save_checkpoint,
    way_back,
)
from transcoders.training.config import TrainConfig
from transcoders.training.config_reading import config_of
from transcoders.training.display import Display
from transcoders.training.end_to_end import EndToEndLosses, end_to_end_losses, logit_metric
from transcoders.training.end_to_end_config import EndToEndConfig
from transcoders.training.end_to_end_weights import JointWeights
from transcoders.training.entry import StartFrom, Text
from transcoders.training.export import Scales, export, library_versions
from transcoders.training.initialise import measure_scales
from transcoders.training.metrics import METRICS, MetricsFile
from transcoders.training.run_folder import (
    finished_dictionaries,
    mark_finished,
    mark_started,
    require_same_run,
    was_started,
)
from transcoders.training.sparsity import SparsityController, learning_rate
from transcoders.training.stopping import stop_requests
from transcoders.training.warm_start import Start

logger = logging.getLogger(__name__)

_SAMPLE = 2048
"""Tokens from which scales, and the L0 that is to stay, are taken."""
_CONTEXT = 128
_RATE = 0.05
"""Of the learning rate that training has by default."""
_SPARSE_FROM, _SPARSE_BELOW = 512, 0.05
"""Features of a layer, and the share of them that is active, for which kernels of active features alone are faster."""
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def finetune(
    model: LanguageModel,
    dictionaries: StartFrom,
    corpus: Text,
    config: EndToEndConfig = EndToEndConfig(),
    *,
    out: Path | str | None = None,
    resume: bool = False,
    progress: bool = True,
) -> DictionarySet:
    """Train all layers of transcoders, or of a cross-layer transcoder, together in the place of the model's MLPs.

    `KL(p_model ‖ p_replacement) + λ_d ‖Ĵ v − J v‖² / ‖J v‖² + λ_r mean_l FVU_l` (`+ λ_s sparsity` where a penalty makes
    features sparse): of the next-token distributions where every MLP from `provenance.first` on is replaced, attention
    patterns and norm scales held at their clean values; of how the logits change with an embedding, or with what an
    active feature writes; of each layer on the model's own activations. Positions before `first` and tokens over a
    limit of the dictionaries' training keep their MLPs. Only the dictionaries' weights change, and of TopK k stays.

    `corpus`, `out`, `resume`, Ctrl-C: as in `train`; a run is resumed with the same dictionaries. `config.context` and
    `config.separator` are the dictionaries' own by default. The result has this run in its provenance, beside what
    trained it before.

    Raises `DictionaryError` for what training cannot hold (see `train`'s `start`), for SAEs, and for TopK that ranks
    all layers together, whose features are not known layer by layer. `InputError` for a model in a precision that
    differences of nearly equal runs do not survive. `NotFiniteError` where a loss is not finite: the last good
    checkpoint stays.
    """
    loaded = (
        load_dictionaries(dictionaries, device=model.device) if isinstance(dictionaries, str | Path) else dictionaries
    )
    folder = None if out is None else Path(out)
    run = EndToEndRun(model, loaded, corpus, config, out=folder)
    with alone_in(folder):
        if resume and (done := run.finished()) is not None:
            return done
        run.begin(resume=resume)
        run.run(progress=progress)
        return run.finish()


class EndToEndRun:
    """The weights in fine-tuning, their optimizer, and the place in the text."""

    def __init__(
        self,
        model: LanguageModel,
        dictionaries: DictionarySet,
        corpus: Text,
        config: EndToEndConfig,
        *,
        out: Path | None = None,
    ) -> None:
        dictionaries = fitted(dictionaries, model)
        _require_suitable(model, dictionaries, config)
        self.start, self.out = Start.of(dictionaries), out
        self.provenance = dictionaries.provenance
        self.model = reading_as_trained(model, self.provenance)
        self.config = _settled(config, self.provenance.config)
        asked = config_of(dictionaries.kind, context=self.config.context, separator=self.config.separator)
        self.corpus, self._rows, width = open_rows(self.model, corpus, asked)
        if width <= self.provenance.first + 1:
            raise InputError(
                f"Rows of {width} tokens have none after the first {self.provenance.first} whose successor could be "
                "compared; give a longer context."
            )
        self.batch = self.config.rows * width
        self.training = self._training(asked)
        self.steps = self.training.steps
        self.step = 0
        self.metric = logit_metric(self.model) if self.config.derivative else None

    def _training(self, asked: TrainConfig) -> TrainConfig:
        """What this is as training has it: for its schedule, and for the penalty."""
        c, tokens = self.config, max(self.batch, self.config.tokens)
        schedule = {"tokens": tokens, "batch": self.batch, "warmup": c.warmup, "decay": c.decay, "sparsity_warmup": 0.0}
        settled = self.start.config(replace(asked, **schedule))
        return replace(settled, lr=c.lr or _RATE * settled.lr_used)

    def finished(self) -> DictionarySet | None:
        """What this run wrote to its folder, where it is done already."""
        if self.out is None:
            return None
        found = finished_dictionaries(self.out, self.identity(), self.model.device)
        return found[0] if found else None

    def identity(self) -> dict[str, Any]:
        """What the result depends on, as JSON."""
        identity = {
            "model": self.model.name,
            "fingerprint": self.model.fingerprint(),
            "corpus": self.corpus,
            "config": [{"kind": "end to end", **self.config.to_json()}],
            "start": self.start.hash,
        }
        return json.loads(json.dumps(identity))

    # starting and resuming

    def begin(self, *, resume: bool = False) -> None:
        """From the dictionaries as they are, or from the latest checkpoint in the folder that is not damaged."""
        if resume and self._restore():
            return
        chunks = Chunks(self._rows, tokens=_SAMPLE, first=self.provenance.first)
        held, usable = self.text(next(chunks).tokens)
        reads, writes = (side[:, usable].transpose(0, 1) for side in held.clean)
        self._take(measure_scales(reads.float(), writes.float()))
        if self.training.penalty_used is not None:
            self.training = replace(self.training, target_l0=self.config.target_l0 or self._l0(held, usable))
        self.controller = SparsityController(self.training)
        self._open(None)
        if self.out is not None:
            sweep(self.out)
            if earlier := latest_checkpoint(self.out):
                logger.warning("Removing %s of an earlier run, as this one starts anew.", earlier)
                remove_checkpoints(self.out)
            mark_started(self.out, self.identity())

    @torch.no_grad()
    def _l0(self, held: HeldModel, usable: Bool[Tensor, "row pos"]) -> float:
        reads = [self.replacement.normalised(layer, read[usable]) for layer, read in enumerate(held.clean.reads)]
        codes = [self.replacement.code(layer, x) for layer, x in enumerate(reads)]
        return max(float(torch.cat([code.l0() for code in codes]).mean()), 1e-3)

    def _take(self, scales: Scales) -> None:
        self.joint = JointWeights(self.start, self.training, scales, betas=self.config.betas)
        self.replacement = self.joint.replacement

    def _open(self, state: dict[str, Any] | None) -> None:
        per_step = self.config.rows * (self.batch // self.config.rows - self.provenance.first)
        self.chunks = Chunks(self._rows, tokens=per_step, first=self.provenance.first, state=state)
        if state is not None:
            next(self.chunks)  # the one that was trained on last

    def _restore(self) -> bool:
        """Whether there was something to go on from."""
        if self.out is None:
            raise InputError("`resume` goes on from a checkpoint in an output folder; give `out` as well.")
        started, there = was_started(self.out, self.identity()), checkpoints(self.out)
        if not there and not started:
            raise InputError(f"There is no checkpoint in {self.out} to resume; leave out `resume` to start anew.")
        sweep(self.out)
        while there:
            folder = there.pop()
            try:
                self._restore_from(folder)
                logger.info("resuming %s at step %d of %d", folder, self.step, self.steps)
                return True
            except FileFormatError as error:
                if not there:
                    raise FileFormatError(
                        f"{error} There is no checkpoint before it, so leave out `resume` to start anew."
                    ) from error
                logger.warning("%s Going on from the one before it, %s.", error, there[-1])
        return False

    def _restore_from(self, folder: Path) -> None:
        record = read_record(folder, steps=self.steps, runs=0)
        require_same_run(folder.parent, record["run"], self.identity())
        tensors = read_state(folder, record, self.model.device)
        state = record.get("sparsity") or {}
        ones = torch.ones(self.model.n_layers, device=self.model.device)
        self._take(Scales(*(tensors.get(f"scales.{side}", ones) for side in ("read", "write"))))
        require_like(folder, tensors, self.joint.tensors())
        self.joint.load(tensors)
        self.step = record["step"]
        if self.training.penalty_used is not None:
            self.training = replace(self.training, target_l0=float(state["target_l0"]))
        self.controller = SparsityController(self.training, **state.get("controller", {}))
        self._open(record["data"])

    # the loop

    def run(self, *, until: int | None = None, progress: bool = True) -> None:
        """Train to the end, or up to a step."""
        end = min(self.steps, until or self.steps)
        display = Display(["end to end"], steps=self.steps, done=self.step, batch=self.batch, shown=progress)
        with self._with_way_back(), stop_requests(heard=self.out is not None) as request, display:
            file = None if self.out is None else MetricsFile(self.out / METRICS, step=self.step)
            while self.step < end:
                metrics = self._train_step(next(self.chunks))
                if self.step % self.config.log_every == 0 or self.step == self.steps:
                    figures = display.noted(_figures(metrics))
                    logger.info("step %d of %d, %s", self.step, self.steps, figures)
                    if file is not None:
                        file.write(metrics)
                display.advance()
                stop = request.number is not None
                if self.out is not None and (stop or self.step % self.config.checkpoint_every == 0):
                    self._save_checkpoint(self.out)
                if stop:
                    raise request.stopped(
                        f"Fine-tuning stopped after step {self.step} of {self.steps}. {way_back(self.out)}"
                    )

    def _train_step(self, chunk: Chunk) -> dict[str, Any]:
        """One optimizer step, and what it came to."""
        found = self.losses(chunk.tokens)
        weight = float(self.controller.weight(self.step)) if self.training.penalty_used else 0.0
        config = self.config
        total = found.kl + config.derivative * found.derivative + config.reconstruction * found.fvu.mean()
        total = total + weight * found.sparsity
        norm = self.joint.backward(total)
        self._require_finite(total, norm)
        rate = learning_rate(self.training, self.step)
        self.joint.step(rate, clip=config.clip, norm=norm)
        if self.training.penalty_used is not None:
            self.controller.update(self.step, float(found.l0.mean()))
        self.step += 1
        return self._metrics(found, total, norm, rate, weight)

    def losses(self, tokens: Int[Tensor, "row pos"]) -> EndToEndLosses:
        """On rows of text, with the changes of the step at hand; differentiable in `replacement`'s weights."""
        held, usable = self.text(tokens)
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.step)
        return end_to_end_losses(
            self.replacement, held, usable, self.training, first=self.provenance.first, metric=self.metric,
            generator=generator,
        )  # fmt: skip

    def text(self, tokens: Int[Tensor, "row pos"]) -> tuple[HeldModel, Bool[Tensor, "row pos"]]:
        """The model on rows of text, and which tokens have features."""
        d, limits = self.start.dictionaries, self.provenance.site_limits
        held = HeldModel(self.model, tokens.to(self.model.device), d.reads, d.writes)
        at = {
            **dict(zip(d.reads, held.clean.reads, strict=True)),
            **dict(zip(d.writes, held.clean.writes, strict=True)),
        }
        exact = massive_tokens(self.model, held.rows, limits, at)
        exact[:, : self.provenance.first] = True
        return held, ~exact

    def _metrics(
        self, found: EndToEndLosses, total: Tensor, norm: Tensor, rate: float, weight: float
    ) -> dict[str, Any]:
        return {
            "step": self.step,
            "tokens": self.step * self.batch,
            "loss": float(total.detach()),
            "kl": float(found.kl.detach()),
            "agreement": float(found.agreement),
            "derivative": float(found.derivative.detach()),
            "fvu": float(found.fvu.detach().mean()),
            "l0": float(found.l0.mean()),
            "gradient": float(norm),
            "learning_rate": rate,
            "sparsity_weight": weight,
            "fvu_per_layer": found.fvu.tolist(),
            "l0_per_layer": found.l0.tolist(),
        }

    def _require_finite(self, total: Float[Tensor, ""], norm: Float[Tensor, ""]) -> None:
        if not bool(total.isfinite() & norm.isfinite()):
            raise NotFiniteError(
                f"Fine-tuning stopped at step {self.step + 1}: its loss is {float(total.detach()):g}, the norm of its "
                f"gradient {float(norm):g}; a lower lr or clip may help. {way_back(self.out)}"
            )

    @contextmanager
    def _with_way_back(self) -> Iterator[None]:
        try:
            yield
        except WriteError as error:
            raise WriteError(f"{error} {way_back(self.out)}") from error

    def _save_checkpoint(self, out: Path) -> None:
        self.joint.require_finite(f"The checkpoint of step {self.step}")
        tensors = self.joint.tensors()
        state = {"target_l0": self.training.target_l0, "controller": self.controller.state()}
        record = {
            "step": self.step,
            "data": {**self.chunks.state(), "batch_in_chunk": 1},
            "runs": [],
            "run": self.identity(),
            "sparsity": state if self.training.penalty_used else None,
        }
        save_checkpoint(out, self.step, Checkpoint(tensors, iter(tensors.values()), record))
        keep_checkpoints(out, self.step, keep_last=self.config.keep_last, keep_best=False)

    # what it has come to

    def finish(self) -> DictionarySet:
        """The dictionaries as they are now; saved where there is an output folder."""
        self.joint.require_finite("What was fine-tuned")
        result = self.export()
        if self.out is not None:
            with self._with_way_back():
                save_native(result, self.out)
                if self.step == self.steps:
                    mark_finished(self.out, self.identity(), [self.out])
        return result

    def export(self) -> DictionarySet:
        """On the model's own activations, with this run in their provenance."""
        d, own = self.start.dictionaries, self.provenance
        this = {
            **self.config.to_json(),
            "corpus": self.corpus,
            "tokens": self.step * self.batch,
            "start": self.start.hash,
        }
        config = {**own.config, "end_to_end": [*own.config.get("end_to_end", []), this]}
        provenance = replace(own, config=config, versions=library_versions(), normalisation={}, agreement={})
        return export(self.joint.weights, d.kind, self.joint.scales, d.reads, d.writes, provenance)


def _figures(metrics: dict[str, Any]) -> str:
    return (
        f"KL {metrics['kl']:.3f}, agreement {metrics['agreement']:.1%}, derivative {metrics['derivative']:.3f}, "
        f"FVU {metrics['fvu']:.3f}, L0 {metrics['l0']:.1f}"
    )


def _require_suitable(model: LanguageModel, dictionaries: DictionarySet, config: EndToEndConfig) -> None:
    if dictionaries.kind == "sae":
        raise DictionaryError(
            "SAEs rebuild what they read and replace no MLP; fine-tuning end to end takes transcoders ('plt', 'clt')."
        )
    if not sequential(dictionaries):
        raise DictionaryError(
            "TopK ranks the features of all layers together, so a layer's are not known before later ones have run; "
            "put thresholds in its place first (transcoders.calibrate_topk, circuitsae convert --calibrate-on)."
        )
    if config.derivative and model.dtype not in (torch.float32, torch.float64):
        raise InputError(
            f"derivative takes differences between nearly equal runs, for which {model.dtype} is too coarse; load the "
            "model with dtype float32, or give derivative=0."
        )


def _settled(config: EndToEndConfig, trained: Any) -> EndToEndConfig:
    """With the rows of the dictionaries' own training where nothing was chosen."""
    context, separator = trained.get("context"), trained.get("separator")
    return replace(
        config,
        context=config.context or (context if isinstance(context, int) and context > 1 else _CONTEXT),
        separator=separator if config.separator is None and isinstance(separator, str) else config.separator,
    )
