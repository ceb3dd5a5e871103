"""`circuitsae shift`: a classifier freed of what it should not go by, and the features for people to judge."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console

from circuitsae.commands.shared import (
    Bos,
    ChoiceOptions,
    Choices,
    Dtype,
    WeightOptions,
    Weights,
    Wide,
    load_replacement,
    say,
)
from circuitsae.tables import Column, open_console, show_table
from transcoders.errors import InputError

if TYPE_CHECKING:
    from circuitsae.benchmark import Labelled
    from circuitsae.shift import ShiftResult

_SHIPPED = ("food", "animals")
_PER_CELL = 40


def shift(
    *,
    texts: Path | None = None,
    labels: tuple[str, ...] = (),
    intended: Annotated[Literal["label", "second"] | None, tyro.conf.DisallowNone] = None,
    judge: str = "auto",
    words: tuple[str, ...] = (),
    layer: Annotated[int | None, tyro.conf.DisallowNone] = None,
    pool: Literal["mean", "last"] = "mean",
    nodes: int = 100,
    effect_texts: int = 64,
    judge_texts: int = 8,
    margin: float = 0.2,
    method: Literal["gradient", "integrated"] = "integrated",
    steps: int = 10,
    ablation: Literal["zero", "mean"] = "zero",
    baselines: bool = True,
    top: int = 10,
    out: Path = Path("shift"),
    seed: int = 0,
    model: str = "pocket",
    dictionaries: str | None = None,
    bos: Bos = None,
    device: str = "auto",
    dtype: Dtype = "float32",
    wide: Wide = False,
    weights: WeightOptions = Weights(),
    choices: ChoiceOptions = Choices(),
) -> None:
    """Free a classifier of a label that came with the intended one in training: SHIFT, with its baselines.

    Writes shift.json, and features.csv: the features that the classifier goes by, what they fire on, and which are
    taken out. Change its last column and run again with --judge shift/features.csv.

    Args:
        texts: A .csv or .jsonl file with the fields text, label and second; default, texts on food or animals by men
            and women, of which gender is intended.
        labels: The two labels to tell apart, where there are more; repeat the option.
        intended: Which of the two labels the classifier is meant to tell; it is to be freed of the other one.
        judge: auto: the rule, or --words. Else a file: features.csv as edited, or a list of features such as 2.713.
        words: Take out features that fire on such words; repeat the option.
        layer: The classifier reads the stream after this block; default, the last but one.
        pool: What it reads of a text: the mean over its tokens, or the last one.
        nodes: How many features and error nodes of largest effect are judged.
        effect_texts: Effects are means over so many texts, at most.
        judge_texts: Of each pair of labels, how many texts the rule sees.
        margin: How much more a feature tells of the other label where the rule takes it out (of |2 AUC - 1|).
        method: integrated: gradients averaged on the way from 0. gradient: at the text alone.
        steps: Runs on that way, for each layer.
        ablation: What takes the place of a feature that is taken out: zero, or its mean.
        baselines: Measure coordinates of the stream and both skylines too.
        top: How many features to print.
        out: Folder to write.
        seed: Seed of the texts, of what is trained and tested on, and of random features.
        model: A hub name, a local Hugging Face folder, or "pocket".
        dictionaries: Autoencoders or transcoders by name or folder; the pocket model has its own ("pocket-sae").
        bos: Begin each text with the beginning-of-text token; default, as in the dictionaries' training.
        device: auto (a GPU, but the CPU for what is faster there: see `doctor`), cpu, cuda, cuda:1 or mps.
        dtype: Precision of the model.
        weights: Which weights of the model.
        choices: Which of the dictionaries that the name offers.
    """
    if words and judge != "auto":
        raise InputError(f"--words and --judge {judge} both say what to take out; give one of them.")
    from circuitsae.shift import ShiftConfig, read_judged
    from circuitsae.shift import shift as run

    labelled = _texts(texts, seed)
    judged = None if judge == "auto" else read_judged(judge)
    config = ShiftConfig(
        layer=layer, pool=pool, intended=intended or ("second" if texts is None else "label"),
        labels=labels or (_SHIPPED if texts is None else ()), nodes=nodes, effect_texts=effect_texts,
        judge_texts=judge_texts, margin=margin, words=words, method=method, steps=steps, ablation=ablation,
        baselines=baselines, seed=seed,
    )  # fmt: skip
    if dictionaries is None and model == "pocket":
        dictionaries = "pocket-sae"
    loaded = load_replacement(model, dictionaries, device, dtype, bos, weights, choices)
    result = run(loaded, labelled, config=config, judged=judged, progress=True)
    console = open_console(wide)
    _show(console, result, top)
    say(console, f"Written: {result.save(out)} and shift.json")


def _texts(path: Path | None, seed: int) -> "Labelled":
    from circuitsae.benchmark import Labelled
    from circuitsae.benchmark.templates import topics

    return topics(_PER_CELL, seed) if path is None else Labelled.read(path)


def _show(console: Console, result: "ShiftResult", top: int) -> None:
    """The strongest features, and a line for each classifier."""
    intended, unintended = (" or ".join(names) for names in result.names)
    columns = [Column("node", text=True), Column("effect"), Column(intended, keep=1), Column(unintended, keep=1),
               Column("ablate"), Column("fires on", text=True)]  # fmt: skip
    rows = [
        (row["id"], f"{row['effect']:+.3f}", *(_share(row[f"tells_{side}"]) for side in ("intended", "unintended")),
         row["ablate"], row["fires_on"])
        for row in result.features.head(top).to_dict("records")
    ]  # fmt: skip
    show_table(console, "Effects on the margin, and what each feature tells of either label", columns, rows)
    lines = [(line.name, str(line.ablated), *(f"{value:.2f}" for value in line.groups)) for line in result.lines]
    heads = [Column("classifier", text=True), Column("taken out"), Column(intended), Column(unintended),
             Column("worst group")]  # fmt: skip
    show_table(console, f"Trained to tell {intended} where {unintended} goes with it; answers that agree", heads, lines)


def _share(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.2f}"
