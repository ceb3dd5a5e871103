"""Writes docs/audit.md, with the table of criteria: `python docs/write_audit.py`."""

import sys

# ruff: noqa: E501, as a paragraph is as wide as on the pages
from pathlib import Path

DOCS = Path(__file__).resolve().parent
PAGE = DOCS / "audit.md"

TEXT = """# What a circuit's evidence is worth

Written by `docs/write_audit.py`, its table from the criteria themselves.

A circuit that gives back what its model does can still be one of many, hang on one way to ablate, or hold on the prompts
that it was found on alone. `audit` puts a circuit to each criterion below: a measurement with a 95 % interval, held against
two bars that were stated before, one that confirms and one that refutes. What fails is said first.

<!-- skip: a quarter of an hour, and exit code 1 where a criterion is disconfirmed -->
```bash
circuitsae audit --task ioi --quick
```

It finds the circuit as `circuitsae reproduce` does and writes `audit.html`, one offline page with a figure for each
criterion, `audit.json`, and the circuit, `circuit.json`. The exit code is 1 if a criterion is disconfirmed. Ended, the same
command goes on after the last whole criterion. What it will cost is said by

```bash
circuitsae audit --task ioi --quick --plan
```

from a trial of a few prompts on this machine: prompts and time of each criterion, and memory. What is searched by gradients,
or run in other models, may take longer than its prompts say.

## The circuit

| given | is |
|---|---|
| nothing, with `--task` | the circuit of heads and MLPs that `reproduce` finds; with `--kind features` that of features and error nodes |
| `TASK-circuit.json`, `TASK-features.json` | a circuit that `reproduce` wrote |
| `circuit.json` | a feature circuit that `circuitsae circuit` wrote |
| a graph's folder, or a file of another tool, with `--task` | its features and error nodes; positions are the roles that prompts of the task which read like the graph's have there |
| `ioi-wang2022`, `ioi-acdc`, `greater-than-hanna2023`, … with `--model gpt2` | a published circuit of GPT-2 small |

A file of your own needs no more than this, or `"kind": "features"` with `"nodes": ["2.713@IO", …]`:

```json
{"kind": "heads", "task": "ioi", "model": "pocket", "edges": [["a0.h1", "m1"], ["m1", "logits"]]}
```

The same in Python, where a circuit may be anything that can be cut (`circuitsae.audit.Subject`):

<!-- quick: Settings.quick() → Settings(held_out=8) -->
```python
from circuitsae import load_model
from circuitsae.audit import HeadSubject, Settings, TaskSource, audit

subject = HeadSubject(TaskSource("ioi", load_model("pocket")), [("embed", "a0.h1.v"), ("a0.h1", "logits")])
found = audit(subject, settings=Settings.quick(), only=["sufficiency"])
found.of("sufficiency").status, found.tier
found.frame()  # a row per criterion
```

## The criteria

<!-- criteria -->

| status | the 95 % interval |
|---|---|
| confirmed | lies wholly on the good side of the bar that confirms |
| partly | lies on the good side of the bar that refutes, and not wholly on that of the one that confirms |
| inconclusive | has the bar that refutes inside: more prompts, or more circuits, would tell |
| disconfirmed | lies wholly on the bad side of the bar that refutes |
| untested | there is none; the reason is said, and what would let it be measured |

Bars are constants of the code, each with its reason beside it; nothing is fitted to a result. A circuit is *proposed* until
what is claimed is written down (*stated*), then *measured*, *causal* and *general*: each once every criterion of its family,
and of those before it, is confirmed or partly so. The page says which one blocks the next.

What needs a person is asked for in a file, `--claim FILE`: what is claimed, at which level, what would refute it, what is
predicted. The audit checks that it is there and can be used, tests what it predicts, and never judges whether it is true.

## Two circuits beside each other

<!-- skip: the circuits are the reader's -->
```bash
circuitsae audit --compare one/audit.json other/audit.json
circuitsae audit --task ioi --quick --compare mine.json reports/pocket-ioi/ioi-circuit.json
```

Two audits, or two circuits that are audited first, on one task: statuses, estimates, their differences and whether the
intervals overlap, on one page.

## How to read it

A criterion that is confirmed says that one question was asked and the answer was good enough; no sum of them says that the
circuit is *the* mechanism. A criterion that fails says where the claim must be narrower: to these templates, to this way to
ablate, to this model. An audit of one circuit on its own prompts says nothing of other behaviours.

The criteria follow the audits of published circuits that the framework of mechanistic validity made by hand; how much of a
graph hangs on where it was cut is [CIRCUS](https://arxiv.org/abs/2603.00523)'s question, and each graph's page answers it
([the viewer](viewer.md#how-much-is-drawn)).

## Four circuits, audited

IOI, greater-than and induction in the pocket model, and IOI in SmolLM2-135M: the circuits that `reproduce` finds, with the
claim files that ship ([all criteria side by side](../benchmarks/results/audits.md)).
What fails, fails in all of pocket's three:

<!-- figures: benchmarks/results/audits.md -->
* **choices.** f of one circuit runs from below 0 to above 1 with the way it is measured. Zero and noise ablation break
  circuits that resampling finds whole. A faithfulness without its ablation says nothing.
* **specificity** and **dissociation.** With the circuit's edges out, other tasks fail as well, and so does plain text: a
  circuit of edges holds those from the embeddings to the first heads, which every task needs. Circuits are what a task
  uses, not what it alone uses.
* Inconclusive are minimality (some edges matter to no prompt that was tried) and, of IOI, invariance: in the template that
  suits it least the circuit's f may be anything from 0.15 to 0.77, though over all templates it is within 0.1 of 1.

<!-- figures: benchmarks/results/audits.md -->
What holds: on held-out prompts the circuits alone do what the model does, nothing is left without them, no rival without
their members comes near, and the choice among all edges flatters them by next to nothing. What the claim files predict
came true throughout for greater-than, by 0.67 for IOI and by 0.60 for induction.

<!-- figures: benchmarks/results/audits.md -->
The circuit of SmolLM2 is another matter: found on two dozen prompts, it is off by 0.39 of what the model does on others,
an audit of so few leaves eight criteria open, and most of its parts change nothing beyond noise.

Pages: [IOI](pages/audit_ioi.html), [greater-than](pages/audit_greater_than.html),
[induction](pages/audit_induction.html), [IOI in SmolLM2](pages/audit_ioi_smollm2.html).

Whether the auditor can be trusted is measured too: true circuits of programs whose edges are known are to be confirmed, and
the same with one edge missing, one idle edge, random edges or random weights refuted
([table](../benchmarks/results/audit_calibration.md)).
"""


def table() -> str:
    """Every criterion: family, key, question, figure and bars."""
    from circuitsae.audit.criteria import CRITERIA

    rows = ["| family | criterion | asks | figure | rule |", "|---|---|---|---|---|"]
    for one in CRITERIA:
        rule = "" if one.rule is None else str(one.rule)
        cells = [one.family, f"`{one.key}`", one.question, one.figure, rule]
        rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(rows)


def page() -> str:
    """The whole page."""
    return TEXT.replace("<!-- criteria -->", table())


if __name__ == "__main__":
    sys.path.insert(0, str(DOCS.parent))
    PAGE.write_text(page(), encoding="utf-8")
    sys.stdout.write(f"{PAGE} written\n")
