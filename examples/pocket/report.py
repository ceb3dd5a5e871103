"""The page that states what the pocket model is and does, written by the recipe from its own measurements."""

import operator
import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import GPT2LMHeadModel

from circuitsae.pocket.corpus import MIXTURE
from circuitsae.pocket.facts import CITIES, HELD_OUT_CITIES, STATE_OF, STATES
from circuitsae.pocket.families import IOI_TEMPLATES, TWO_HOP_TEMPLATES
from circuitsae.pocket.prompts import DEMONSTRATION
from circuitsae.pocket.words import NAMES
from examples.pocket.measure import Behaviours
from examples.pocket.train import TrainConfig
from transcoders.files import write_file

_PAGE = """# The pocket model

This page is written by `python -m examples.pocket.recipe --stage model` (`make pocket`); do not edit it by hand.

A GPT-2 of {layers} layers, {heads} heads, `d_model` {d_model}, {context} positions and {vocab} tokens ({parameters:,}
parameters, embeddings tied, {megabytes:.1f} MB in float32), trained from scratch on a corpus that the recipe generates.
It exists so that every example and test runs offline on a model that does something worth explaining. It knows nothing
outside that corpus.

## What it does

{prompts} prompts per behaviour (induction: at most 200; two hops: every city), each after `<|endoftext|>`. Apart from
the two-hop lines on trained cities, none of their combinations occurs in training. The curriculum and the schedule were
chosen while watching smaller samples of these same measurements.

| behaviour | measured | promised |
|---|---|---|
| top token after the demonstration prompt | `"{b.demonstration}"` | `" Mary"` |
| IOI accuracy (top-1 of all tokens) | {b.ioi_accuracy:.2%} | ≥ 99% |
| IOI mean logit difference | {b.ioi_logit_diff:.2f} | ≥ 3.5 |
| greater-than probability difference | {b.greater_than:.3f} | ≥ 0.75 |
| subject-verb agreement with an opposite distractor | {b.agreement_accuracy:.2%} | ≥ 95% |
| two hops, {n_trained} trained cities, main phrasing | {b.two_hop_trained:.2%} | 100% |
| two hops, trained cities, all {n_phrasings} phrasings | {b.two_hop_trained_all:.2%} | |
| two hops, {n_held_out} held-out cities, main phrasing | {b.two_hop_held_out:.2%} | aim ≥ 80% |
| two hops, held-out cities, all phrasings | {b.two_hop_held_out_all:.2%} | |
| induction: loss on first copy → second copy | {b.induction_first:.2f} → {b.induction_second:.2f} | ≤ 1/4 |
| loss on unseen text of the corpus, nats per token | {b.held_out_loss:.3f} | |

The demonstration is `{demonstration}`.

## What is held out

* IOI: one unordered pair of names in ten (by CRC-32; John and Mary always) is never cast together in a sentence or
  story; unrelated sentences side by side and lists of random words may happen to hold both. {n_names} names, {n_ioi}
  templates, ABBA and BABA in equal parts.
* Greater-than: one triple of noun, century and starting year in ten.
* Agreement: one pair of subject noun and distractor noun in ten.
* Two hops: {n_held_out} of the {n_cities} cities, at most one a state. They occur in one-hop sentences and never in one
  document with the capital of their state: {held_out}.
* Induction: the random sequences come from another seed; the words are the same.

## How it was made

* Seed {c.seed}; {c.steps} steps of at most {tokens_per_step:,} tokens, {tokens:.0f} million in all; rows of
  {c.row_length} tokens and, one step in twelve, of {c.context}.
* AdamW, peak rate {c.learning_rate}, weight decay {c.weight_decay}; linear warm-up over {c.warmup} steps, linear decay
  from step {c.decay_from} as if to end at {c.decay_to}, and from step {c.tail_from} a slower tail to the last; forward
  pass {precision}.
* Training took {minutes:.0f} minutes on {threads} threads ({machine}).
* Versions: {versions}.
* Share of documents: {mixture}.
* Copying is slow to emerge from that mixture alone, so four documents in five of the first {c.periodic_steps} steps, on
  rows of {c.periodic_length} tokens, are IOI or a few random words over and over, and of the next {c.repeats_steps}, on
  rows of {c.repeats_length}, IOI or up to 28 random words said at least twice.
* The initial heads are not independent matrices: each starts as a head that copies, and above the first layer as one
  that attends to tokens like its own (`train.build_model` says how). Positions start as sinusoids. All is trained.
* The facts are real: the capitals of the fifty states and four other cities of each, {n_facts} in all.
"""


def write_report(
    path: Path, behaviours: Behaviours, config: TrainConfig, model: GPT2LMHeadModel, seconds: float, prompts: int
) -> None:
    """Fill the page and put it in place."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    tokens_per_step = config.rows * config.row_length
    text = _PAGE.format(
        layers=config.layers,
        heads=config.heads,
        d_model=config.d_model,
        context=config.context,
        vocab=model.config.vocab_size,
        demonstration=DEMONSTRATION,
        parameters=parameters,
        megabytes=parameters * 4 / 1e6,
        prompts=prompts,
        b=behaviours,
        c=config,
        n_trained=len(CITIES) - len(HELD_OUT_CITIES),
        n_held_out=len(HELD_OUT_CITIES),
        n_cities=len(CITIES),
        n_phrasings=len(TWO_HOP_TEMPLATES),
        n_names=len(NAMES),
        n_ioi=len(IOI_TEMPLATES),
        held_out=", ".join(f"{city} ({STATE_OF[city].name})" for city in sorted(HELD_OUT_CITIES)),
        tokens_per_step=tokens_per_step,
        tokens=_tokens(config) / 1e6,
        precision="in bfloat16 autocast" if config.bfloat16 else "in float32",
        minutes=seconds / 60,
        threads=torch.get_num_threads(),
        machine=_machine(),
        versions=_versions(),
        mixture=", ".join(f"{family.__name__} {share:.0%}" for family, share in MIXTURE.items()),
        n_facts=len(CITIES) + len(STATES),
    )
    write_file(path, text)


def _tokens(config: TrainConfig) -> int:
    rest = config.steps - config.periodic_steps - config.repeats_steps
    lengths = (config.periodic_length, config.repeats_length, config.row_length)
    steps = (config.periodic_steps, config.repeats_steps, rest)
    return config.rows * sum(map(operator.mul, steps, lengths))


def _machine() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def _versions() -> str:
    packages = ("torch", "transformers", "tokenizers", "safetensors")
    return ", ".join([f"python {platform.python_version()}", *(f"{name} {version(name)}" for name in packages)])
