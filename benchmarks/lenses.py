"""Claim: a tuned lens reads the pocket model's stream several times better than the logit lens, on text held out.

Mean KL(model ‖ lens) per token in nats, by state, over 10,000 tokens that nothing was fitted on, positions from 1 on.
Translators are fitted on 100,000 tokens in 250 steps of 512 (`fit_lens`' defaults), with three seeds: mean and, in
brackets, the least and the largest. `least squares`: ridge regression of the last state on each, on the same tokens.

    python benchmarks/lenses.py
"""

import torch
from machine import write_table

import circuitsae as cs
from circuitsae.lenses import TunedLens, fit_lens
from circuitsae.lenses.reading import streams_of
from circuitsae.lenses.translators import FIRST, held_out_kl
from circuitsae.pocket.corpus import CONTEXT, TRAINING
from transcoders.data import take_rows
from transcoders.language_model import LanguageModel
from transcoders.refining.regression import Moments, RidgeRegression

SEEDS = (0, 1, 2)
TOKENS, HELD_OUT, RIDGE = 100_000, 10_000, 1e-4


def least_squares(model: LanguageModel) -> TunedLens:
    """The affine maps from each state to the last one, in closed form."""
    rows = take_rows(model, TRAINING.training(None), rows=-(-TOKENS // CONTEXT), context=CONTEXT, separator=None)
    sums = [Moments(model.d_model, model.d_model) for _ in range(model.n_layers)]
    for part in rows.split(32):
        _, streams = streams_of(model, part)
        streams = streams[:, :, FIRST:].flatten(1, 2)
        for moments, stream in zip(sums, streams, strict=False):
            moments.add(stream, streams[-1])
    fits = [RidgeRegression(moments).fit(RIDGE) for moments in sums]
    A, b = (torch.stack(side).float() for side in zip(*fits, strict=True))
    return TunedLens(A, b, model.name, model.fingerprint())


def main() -> None:
    model = cs.load_model("pocket")
    lenses = [fit_lens(model, TRAINING, tokens=TOKENS, held_out_tokens=HELD_OUT, seed=seed) for seed in SEEDS]
    held_out = take_rows(model, TRAINING.held_out(), rows=-(-HELD_OUT // CONTEXT), context=CONTEXT, separator=None)
    _, closed = held_out_kl(model, least_squares(model), held_out, 8)
    rows = []
    for state, plain in enumerate(lenses[0].fitted["plain"]):
        found = sorted(lens.fitted["tuned"][state] for lens in lenses)
        name = "embeddings" if state == 0 else f"after {state - 1}"
        mean = sum(found) / len(found)
        rows.append((name, f"{plain:.3f}", f"{mean:.3f} [{found[0]:.3f}, {found[-1]:.3f}]", f"{closed[state]:.3f}"))
    claim = str(__doc__).removesuffix("\n")
    print(write_table("lenses", claim, ("state", "logit lens", "tuned lens", "least squares"), rows))


if __name__ == "__main__":
    main()
