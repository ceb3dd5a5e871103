"""Claim: a skip term in closed form brings published dictionaries nearer to their MLPs' derivatives at less FVU.

SmolLM2-135M with {n} layers of transcoders, 2,048 features and TopK 32 each, which were trained without a skip term.
The error of each layer is regressed on its read ({fitted:,} tokens of news, prose and speeches, sums collected once for
all ranks), with the ridge of least error on {held:,} held-out tokens. *FVU*, on these: mean over layers, and the worst
of them. *Cosine*, *norm ratio*: of `J_dictionary v` against `J_mlp v`, along changes of a token's embedding, patterns
and norm scales held, {agreed:,} of the held-out tokens; *feature* and *random*: cosine along what features write and
along Gaussian changes. *Hops*: MLPs that a change may pass before its cosine falls below .9. *Kept*: layers that would
be worse on held-out text and stay as they were. *Ridge*: the middle one. *Seconds*: of the regression, beside those of
reading, {seconds:.0f}, which all share.

    python benchmarks/refine.py MODEL    # SmolLM2-135M, as ../shared/tools/smollm2_to_hf.py writes it
"""

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

import torch
from machine import write_table

from transcoders import load_dictionaries, load_model
from transcoders.evaluation.agreement import jacobian_agreement
from transcoders.evaluation.agreement_result import Agreement
from transcoders.evaluation.statistics import Statistics
from transcoders.refining import AffineMap, ErrorMoments, RefineConfig, corrected, corrections
from transcoders.refining.reading import Reading
from transcoders.refining.refinement import refinable
from transcoders.refining.skip_terms import Correction, Refinable

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
RANKS: dict[str, int | None] = {"16": 16, "64": 64, "full": None}
SETTINGS = RefineConfig(tokens=36_000, held_out_tokens=8_000, agreement_tokens=1_024)
COLUMNS = [
    "skip term of rank", "FVU", "worst", "cosine", "norm ratio", "feature", "random", "hops", "kept", "ridge",
    "seconds",
]  # fmt: skip


def collect(reading: Reading, given: Refinable) -> tuple[ErrorMoments, ErrorMoments, Statistics]:
    """Sums on the text to fit on and on held-out text, and the figures of what was given on the latter."""
    fit, held_out, before = ErrorMoments(given), ErrorMoments(given), Statistics(given)
    for batch in reading.batches(SETTINGS.tokens):
        fit.add(batch)
    for batch in reading.held_out_batches(reading.limits):
        held_out.add(batch)
        before.update(*batch)
    return fit, held_out, before


def row(name: str, fvu: Sequence[float], passed: Agreement, found: Mapping[int, Correction], spent: float) -> list[str]:
    feature, random = (
        [got.cosine for layer in passed.layers if (got := getattr(layer, kind))] for kind in ("feature", "random")
    )
    return [
        name, f"{sum(fvu) / len(fvu):.3f}", f"{max(fvu):.3f}", f"{passed.cosine:.3f}", f"{passed.norm_ratio:.3f}",
        f"{sum(feature) / len(feature):.3f}", f"{sum(random) / len(random):.3f}", str(passed.reach),
        str(sum(each.error > 1 for each in found.values())) if found else "",
        f"{median(each.ridge for each in found.values()):g}" if found else "", f"{spent:.0f}" if found else "",
    ]  # fmt: skip


def main(arguments: Sequence[str]) -> None:
    (folder,) = arguments
    model = load_model(folder)
    given = refinable(load_dictionaries(SHARED / "dictionaries" / "smollm2-135m-plt"))
    corpus = SHARED / "corpora" / "english_news_prose_speeches.txt"
    reading = Reading.of(model, given, corpus, SETTINGS)
    start = time.process_time()
    fit, held_out, before = collect(reading, given)
    seconds = time.process_time() - start
    rows = reading.held_out[: SETTINGS.agreement_tokens // reading.context]
    table = [row("none", before.fvu, jacobian_agreement(model, given, rows), {}, 0.0)]
    print(*table[0], f"{seconds:.0f} s", flush=True)
    for name, rank in RANKS.items():
        start = time.process_time()
        found = corrections(fit, held_out, rank=rank)
        better: dict[int, AffineMap] = {layer: each.map for layer, each in found.items() if each.error <= 1}
        made = corrected(given, better)
        spent = time.process_time() - start
        fvu = [before.fvu[layer] * min(1.0, each.error) for layer, each in found.items()]
        table.append(row(name, fvu, jacobian_agreement(model, made, rows), found, spent))
        print(*table[-1], flush=True)
    claim = (
        str(__doc__)
        .strip()
        .format(n=len(before.fvu), fitted=fit.of_layer[0].n, held=before.tokens, agreed=rows.numel(), seconds=seconds)
    )
    print(write_table("refine", claim, COLUMNS, table))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:])
