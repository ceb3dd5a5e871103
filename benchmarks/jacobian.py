"""Jacobian agreement of the embedded dictionaries and, given its folder, of those of SmolLM2-135M, layer by layer.

`python -m benchmarks.jacobian [FOLDER [RUN]]`, from the repository's root. The folder is the model as
`python -m examples.smollm2` makes it, the run per-layer transcoders that this trains. Writes
benchmarks/results/jacobian.md.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

import circuitsae
from benchmarks.machine import write_table
from circuitsae.pocket.corpus import CONTEXT, SEPARATOR, held_out_text
from transcoders.data import held_out_rows, take_rows
from transcoders.evaluation.agreement import jacobian_agreement
from transcoders.evaluation.agreement_result import Agreement, Passed

SHARED = Path(__file__).resolve().parents[2] / "shared/data"
DICTIONARIES = SHARED / "dictionaries/smollm2-135m-plt"
TEXTS = {"WikiText-2": "wikitext2_valid.txt", "English": "english_news_prose_speeches.txt"}
TOKENS, SMOLLM2_TOKENS, SMOLLM2_CONTEXT = 2048, 1024, 128
COLUMNS = (
    "dictionaries", "layer", "natural: cosine", "ratio", "feature: cosine", "ratio", "random: cosine", "ratio",
    "its read: cosine", "ratio", "MLPs passed", "cosine", "ratio",
)  # fmt: skip
CLAIM = (
    "`cos(J_dictionary v, J_mlp v)` and `‖J_dictionary v‖ / ‖J_mlp v‖` of `jacobian_agreement`, two nudges of a kind "
    "in every row of text, attention patterns, norm scales and active features held, by `benchmarks/jacobian.py`. "
    f"The embedded dictionaries on {TOKENS:,} tokens of the recipe's held-out text; per-layer transcoders of "
    f"SmolLM2-135M (30 layers × 2,048 features, TopK 32) on {SMOLLM2_TOKENS:,} tokens of WikiText-2 and of the English "
    "text, of which they were trained on another part; *skip and derivative*: others of the same size and tokens, "
    "trained with `--skip --derivative 0.1`. *Its read*: the change of what the layer reads when one token's embedding "
    "is nudged, with dictionaries in the place of all MLPs before. *MLPs passed*: the same, by the "
    "number of MLPs on the way, mean over the layers that a change starts behind. *reach*: how many may be passed "
    "with a cosine of .9."
)


def measured(folders: Sequence[str]) -> Iterator[tuple[str, Agreement]]:
    pocket = circuitsae.load_model("pocket")
    rows = take_rows(pocket, held_out_text(4 * TOKENS), rows=TOKENS // CONTEXT, context=CONTEXT, separator=SEPARATOR)
    for name in ("pocket-plt", "pocket"):
        yield name, jacobian_agreement(pocket, circuitsae.load_dictionaries(name), rows)
    names = ("SmolLM2-135M", "SmolLM2-135M, skip and derivative")
    sets = (DICTIONARIES, *folders[1:2]) if folders else ()
    for kind, folder in zip(names, sets, strict=False):
        model, dictionaries = circuitsae.load_model(folders[0]), circuitsae.load_dictionaries(folder, dtype="float32")
        for name, file in TEXTS.items():
            corpus = SHARED / "corpora" / file
            rows = held_out_rows(model, corpus, tokens=SMOLLM2_TOKENS, context=SMOLLM2_CONTEXT)
            yield f"{kind}, {name}", jacobian_agreement(model, dictionaries, rows)


def table(name: str, found: Agreement) -> Iterator[list[str]]:
    """The means, and a row for each layer."""
    blank = [""] * 6
    yield [name, "mean", f"{found.cosine:.3f}", f"{found.norm_ratio:.3f}", *blank, f"reach {found.reach}", "", ""]
    for n, layer in enumerate(found.layers):
        kinds = (layer.natural, layer.feature, layer.random, layer.carried)
        hop = found.hops[n] if n < len(found.hops) else None
        yield [name, str(layer.layer), *(cell for kind in kinds for cell in cells(kind)), str(n), *cells(hop)]


def cells(passed: Passed | None) -> tuple[str, str]:
    return ("–", "–") if passed is None else (f"{passed.cosine:.3f}", f"{passed.norm_ratio:.3f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    if len(sys.argv) < 2:
        print("SmolLM2-135M is left out: give the folder of the model.")
    lines = [line for name, found in measured(sys.argv[1:]) for line in table(name, found)]
    print(write_table("jacobian", CLAIM, COLUMNS, lines))
