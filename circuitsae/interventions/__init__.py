"""Changing what a prompt's parts write, in one of several regimes, and reading what follows.

One trip: `targets` names what is changed, `changes` what is done to it (also to a graph's nodes), `prompts` holds the
values that other prompts have; `hooks` makes tables of numbers of them, `forward` the pass that carries many
alternatives in a regime; `intervene` and `generation` are what users call, `outcome` what they get. `auditing` proves
that what is held did not move, `controls` draws stand-ins, `steering` sweeps strengths.
"""

from circuitsae.interventions.changes import (
    Add,
    Contribution,
    Intervention,
    Mean,
    Operation,
    Patch,
    Replace,
    ReplaceToken,
    Resample,
    Scale,
    Set,
    Zero,
    feature_contribution,
    for_node,
    for_nodes,
    node_change,
)
from circuitsae.interventions.forward import REGIMES, Regime, RegimeName
from circuitsae.interventions.generation import Generation, generate
from circuitsae.interventions.intervene import (
    Chunk,
    ReadChunk,
    audit,
    intervene,
    reads_after,
    run_alternatives,
    run_reads,
)
from circuitsae.interventions.outcome import BatchReads, Metric, Outcome, logit, logit_diff, probability
from circuitsae.interventions.prompts import Library, Means, Prompt, PromptLike, Recording
from circuitsae.interventions.targets import (
    MLP,
    Error,
    Feature,
    Features,
    Head,
    Places,
    Stream,
    Target,
    Token,
    parse_target,
    target_id,
)

__all__ = [
    "MLP",
    "REGIMES",
    "Add",
    "BatchReads",
    "Chunk",
    "Contribution",
    "Error",
    "Feature",
    "Features",
    "Generation",
    "Head",
    "Intervention",
    "Library",
    "Mean",
    "Means",
    "Metric",
    "Operation",
    "Outcome",
    "Patch",
    "Places",
    "Prompt",
    "PromptLike",
    "ReadChunk",
    "Recording",
    "Regime",
    "RegimeName",
    "Replace",
    "ReplaceToken",
    "Resample",
    "Scale",
    "Set",
    "Stream",
    "Target",
    "Token",
    "Zero",
    "audit",
    "feature_contribution",
    "for_node",
    "for_nodes",
    "generate",
    "intervene",
    "logit",
    "logit_diff",
    "node_change",
    "parse_target",
    "probability",
    "reads_after",
    "run_alternatives",
    "run_reads",
    "target_id",
]
