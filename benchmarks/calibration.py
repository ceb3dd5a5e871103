"""Claim: of claims known to be false at most 5 % are confirmed, of edges known to be there at least 95 %.

Prompts of five tasks that nothing else uses (seed 170017), other ones for each of the pocket model's dictionaries; of
each graph 40 edges lend their predictions. *Without an edge*: another source of the same kind, whose own prediction is
at most 5 % of the one it is given. *Shuffled*: predictions swapped among edges of a class, beyond a factor of four
from their own (or of another sign); *near*: between two and four; what is closer is left out, being true. *Planted*:
edges of the size of the median tested one, written into error nodes. *Tested*: the edges themselves, for comparison.
*Wired*: a network whose weights are written by hand (`tests/handmade.py`, ten wirings, exact dictionaries), with every
edge it has and as many pairs without one that are given the same effect. All are judged as `validate` judges.
Intervals: exact binomial, 95 %.

*Near* claims are confirmed where they are true: of the {near} that were, the measured effect is within a factor of two
of the claim for {right}. It is the edge that misses its own prediction, by up to the factor of two that the verdict
allows, in the direction of the other one. So what is not within a factor of two of a prediction is not yet false;
what is not within four is.

Programs compiled with Tracr (`shared/references/compiled`) cannot stand in for the wired network. They have no MLP
(those with causal attention), or 18 to 114 neurons that are on and five or six tokens, so that most of their edges
have fewer than the 19 controls without which no p-value is below 5 %; and their steps are pairs of steep neurons that
cancel, of which one switches when a source is removed: the linear prediction is 0 where the effect is not.
"""

import logging
import sys
import time
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from machine import write_table

import circuitsae as cs
from circuitsae.graph.notes import Claim
from circuitsae.pocket import prompts as pocket
from circuitsae.pocket.corpus import held_out_text
from circuitsae.validation.calibration import Calibration, calibrate
from circuitsae.validation.statistics import within_factor_two
from tests.handmade import wired

SEED = 170017
KINDS = {"pocket": "cross-layer", "pocket-plt": "per layer"}
CLAIMS: tuple[Claim, ...] = ("graph", "direct")
NAMES = {"without": "without an edge", "near": "shuffled, near", "shuffled": "shuffled, beyond"}
WIRINGS = 10
COLUMNS = ["dictionaries", "claim", "what", "claims", "confirmed", "rate", "95 %"]


def prompts(n: int) -> dict[str, list[str]]:
    """`n` prompts of each of five tasks."""
    cities = [p for p in pocket.two_hop_prompts(held_out_cities=True, seed=SEED) if p.template > 0]
    return {
        "pocket text": [" ".join(text.split()[:14]) for text in held_out_text(400 * n, seed=SEED)][:n],
        "IOI": [p.text for p in pocket.ioi_prompts(n, seed=SEED)],
        "greater-than": [p.text for p in pocket.greater_than_prompts(n, seed=SEED)],
        "two-hop": [p.text for p in cities[:n]],
        "agreement": [p.text for p in pocket.agreement_prompts(n, seed=SEED)],
    }


def calibrations(per_task: int) -> dict[str, Calibration]:
    """By kind of dictionary; prompts in turns."""
    given, model = prompts(per_task * len(KINDS)), cs.load_model("pocket")
    found = {}
    for turn, name in enumerate(KINDS):
        replacement = cs.ReplacementModel(model, cs.load_dictionaries(name))
        mine = [prompt for texts in given.values() for prompt in texts[turn :: len(KINDS)]]
        found[name] = calibrate(replacement, (cs.attribute(replacement, prompt).prune() for prompt in mine))
    return found


def rows(name: str, found: Calibration) -> list[list[object]]:
    """Each claim and each kind of claim."""
    lines = []
    for record in found.frame().to_dict("records"):
        spread = f"{record['low']:.1%} to {record['high']:.1%}"
        what = NAMES.get(record["what"], record["what"])
        lines.append([name, record["claim"], what, record["n"], record["confirmed"], f"{record['rate']:.1%}", spread])
    return lines


def wirings() -> Calibration:
    """Hand-made networks, both claims."""
    frames = []
    for claim in CLAIMS:
        for seed in range(WIRINGS):
            judged = wired(seed).judged(torch.tensor([0, 3, 5, 1, 6]), claim, seed)
            what = np.where(judged["true"], "every edge", "without an edge")
            frames.append(pd.DataFrame({"claim": claim, "what": what, "verdict": judged[f"{claim}_verdict"]}))
    return Calibration(pd.concat(frames, ignore_index=True), 0)


def main(arguments: Sequence[str]) -> None:
    logging.disable(logging.WARNING)
    start, found = time.process_time(), calibrations(per_task=1)
    both = Calibration(
        pd.concat([part.pairs for part in found.values()]), sum(part.left_out for part in found.values())
    )
    table = [row for name, part in found.items() for row in rows(KINDS[name], part)]
    table += [*rows("both", both), *rows("wired", wirings())]
    if arguments:
        both.pairs.to_json(arguments[0], orient="records")
    near = both.pairs.query("what == 'near' and verdict == 'confirmed'")
    right = within_factor_two(*near[["predicted", "measured"]].to_numpy(float).T)
    claim = str(__doc__).strip().format(right=right.sum(), near=len(near)) + (
        f"\n\nLeft out of the shuffled ones: {both.left_out}. "
        f"Made by `python benchmarks/calibration.py` in {time.process_time() - start:.0f} CPU-seconds."
    )
    print(write_table("calibration", claim, COLUMNS, table))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:])
