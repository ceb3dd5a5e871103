"""Rebuild everything embedded in the package: `python -m examples.pocket.recipe --stage all`.

Stages run in order and each reads only the files of those before: `model` writes `model/` and the measurements,
`dictionaries` writes `dictionaries/`, `cards` the feature cards beside each dictionary, `labels` the labels of its
features by rules, as `circuitsae features label` does. A run that was killed goes on from its last checkpoint under
`--work`.
"""

import argparse
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.logging import RichHandler
from tokenizers import Tokenizer
from transformers import GPT2LMHeadModel

from circuitsae.features.labels import LabelConfig, label_features
from circuitsae.pocket import POCKET_DIR
from circuitsae.pocket.corpus import CONTEXT, UNSEEN
from examples.pocket import cards
from examples.pocket.measure import Behaviours, measure
from examples.pocket.report import write_report
from examples.pocket.sparse import train_all, write_section
from examples.pocket.tokenizer import build_tokenizer, save_tokenizer
from examples.pocket.train import TrainConfig, scaled, train
from transcoders import load_dictionaries, load_model
from transcoders.files import new_folder, write_json

logger = logging.getLogger(__name__)

MEASUREMENTS = "measurements.json"


@dataclass(frozen=True, kw_only=True)
class Run:
    """Where a recipe run writes, and at what size."""

    out: Path
    """Folder that receives `model/`, `dictionaries/` and, unless it is the package, `pocket.md`."""
    work: Path
    """Folder of checkpoints, safe to delete after the run."""
    config: TrainConfig
    """The language model's training."""
    prompts: int = 1000
    """Prompts per behaviour when measuring."""
    quick: bool = False
    """Seconds instead of an hour, for tests; the result is a useless model of the right format."""
    progress: bool = True
    """Whether to draw progress bars."""

    @property
    def report(self) -> Path:
        """In `benchmarks/results` for the package itself, else beside the model."""
        folder = POCKET_DIR.parents[1] / "benchmarks" / "results" if self.out == POCKET_DIR else self.out
        return folder / "pocket.md"


def quick_config(steps: int = 4) -> TrainConfig:
    """A model of a few thousand weights and a few steps."""
    return replace(
        scaled(TrainConfig(), steps),
        layers=1,
        d_model=16,
        heads=2,
        rows=4,
        row_length=32,
        periodic_steps=1,
        repeats_steps=1,
        checkpoint_every=2,
        bfloat16=False,
    )


def train_language_model(run: Run) -> None:
    """Stage `model`: tokenizer, training, measurements, report."""
    run.work.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(run.config.seed)
    clock = _Clock(run.work / "seconds.json")
    model = train(
        run.config,
        tokenizer,
        run.work / "checkpoint.safetensors",
        progress=run.progress,
        on_checkpoint=lambda _model, _step: clock.lap(),
    )
    logger.info("measuring")
    behaviours = measure(model, tokenizer, n=run.prompts)
    save_pocket(model, tokenizer, behaviours, run, clock.seconds)
    write_report(run.report, behaviours, run.config, model, clock.seconds, run.prompts)
    for shortfall in behaviours.shortfalls():
        logger.warning("below the bar: %s", shortfall)


def train_dictionaries(run: Run) -> None:
    """Stage `dictionaries`: trains on the activations of `run.out / "model"`; writes `run.out / "dictionaries"`."""
    results = train_all(run.out / "model", run.out / "dictionaries", run.work, quick=run.quick, progress=run.progress)
    write_section(run.report, results)


def collect_cards(run: Run) -> None:
    """Stage `cards`: reads `model/` and `dictionaries/` of `run.out`; writes `cards/` into each dictionary's folder."""
    folders = run.out / "model", run.out / "dictionaries", run.work
    cards.write_section(run.report, cards.collect_all(*folders, quick=run.quick, progress=run.progress))


def label_dictionaries(run: Run) -> None:
    """Stage `labels`: reads what `cards` does; writes `ledger.json` into each dictionary's folder."""
    model = load_model(run.out / "model")
    config = LabelConfig(tokens=300, held_out=300, context=16) if run.quick else LabelConfig(context=CONTEXT)
    for folder in sorted(path.parent for path in (run.out / "dictionaries").glob("*/config.json")):
        dictionaries = load_dictionaries(folder)
        command = f"circuitsae features label pocket --dictionaries pocket-{folder.name}"
        label_features(model, dictionaries, UNSEEN, config, command=command, progress=run.progress).save(folder)


STAGES: dict[str, Callable[[Run], None]] = {
    "model": train_language_model,
    "dictionaries": train_dictionaries,
    "cards": collect_cards,
    "labels": label_dictionaries,
}


class _Clock:
    """Seconds of training, summed over the pieces of an interrupted run."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.seconds: float = json.loads(path.read_text())["seconds"] if path.exists() else 0.0
        self._last = time.monotonic()

    def lap(self) -> None:
        now = time.monotonic()
        self.seconds += now - self._last
        self._last = now
        write_json(self._path, {"seconds": self.seconds})


def save_pocket(model: GPT2LMHeadModel, tokenizer: Tokenizer, behaviours: Behaviours, run: Run, seconds: float) -> None:
    """Write `model/` in Hugging Face layout, whole or not at all."""
    record = {"behaviours": asdict(behaviours), "training": asdict(run.config), "seconds": round(seconds)}
    with new_folder(run.out / "model") as fresh:
        model.save_pretrained(fresh)
        (fresh / "model.safetensors").chmod(0o644)  # written 0600
        save_tokenizer(tokenizer, fresh)
        write_json(fresh / MEASUREMENTS, record)


def _parse(arguments: Sequence[str] | None) -> tuple[Run, list[str], int]:
    parser = argparse.ArgumentParser(prog="python -m examples.pocket.recipe", description=__doc__)
    parser.add_argument("--stage", choices=[*STAGES, "all"], default="all")
    parser.add_argument("--out", type=Path, help="default: the package itself; with --quick, a folder under --work")
    parser.add_argument("--work", type=Path, default=Path("runs/pocket"), help="checkpoints (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="optimizer steps of the language model; the schedule scales")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a toy run of seconds, for tests")
    given = parser.parse_args(arguments)
    config = quick_config(given.steps or 4) if given.quick else scaled(TrainConfig(), given.steps or TrainConfig.steps)
    work = given.work / "quick" if given.quick else given.work
    out = given.out or (work if given.quick else POCKET_DIR)
    stages = list(STAGES) if given.stage == "all" else [given.stage]
    run = Run(out=out.resolve(), work=work, config=config, quick=given.quick, prompts=20 if given.quick else 1000)
    return run, stages, given.threads


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    run, stages, threads = _parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler(show_path=False)])
    torch.set_num_threads(threads)
    run.out.mkdir(parents=True, exist_ok=True)
    for name in stages:
        STAGES[name](run)


if __name__ == "__main__":
    main()
