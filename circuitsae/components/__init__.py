"""Heads and MLPs as nodes: which of them, and which edges between them, carry a behaviour.

A `PatchingProblem` (`problem`) is a model, clean and corrupt prompts and a metric, with its runs kept. `network` names
the components and their edges, cuts the model there and runs it from any layer on. Methods: `exact` (the oracle),
`gradients` (EAP, integrated gradients, AtP*), `paths` (path patching, direct logit attribution), `discovery` (the
default: cheap, then exact, then pruned). `circuit` judges a set of edges, `by_role` draws it; `scores` compares with a
truth, and `known` holds truths: published circuits and compiled programs.
"""

from typing import TYPE_CHECKING

from transcoders._lazy import lazy_exports

if TYPE_CHECKING:
    from circuitsae.components.by_role import RoleCircuit, role_circuit
    from circuitsae.components.circuit import (
        Gap,
        Judge,
        areas,
        by_node,
        completeness,
        edges_of_nodes,
        faithfulness,
        faithfulness_curve,
        minimality,
    )
    from circuitsae.components.discovery import Discovery, Rescored, find_circuit, score_edges
    from circuitsae.components.exact import exact_edges, exact_inputs, exact_nodes, graph_of, run_keeping, run_without
    from circuitsae.components.gradients import atp_star, eap, eap_ig, eap_ig_activations, node_scores
    from circuitsae.components.known import CompiledProgram, KnownCircuit, known_circuit, known_circuits, load_compiled
    from circuitsae.components.network import ComponentGraph, Edge
    from circuitsae.components.paths import attention_moved, direct_logit_attribution, patch_path, path_patching
    from circuitsae.components.problem import Ablation, Metric, PatchingProblem, Prepared, problems_of
    from circuitsae.components.scores import Scores, auroc, average_precision, join, overlap

__getattr__, __all__ = lazy_exports(
    __name__,
    {
        "circuitsae.components.known": (
            "CompiledProgram",
            "KnownCircuit",
            "known_circuit",
            "known_circuits",
            "load_compiled",
        ),
        "circuitsae.components.circuit": (
            "Gap",
            "Judge",
            "areas",
            "by_node",
            "completeness",
            "edges_of_nodes",
            "faithfulness",
            "faithfulness_curve",
            "minimality",
        ),
        "circuitsae.components.by_role": ("RoleCircuit", "role_circuit"),
        "circuitsae.components.paths": (
            "attention_moved",
            "direct_logit_attribution",
            "patch_path",
            "path_patching",
        ),
        "circuitsae.components.discovery": (
            "Discovery",
            "Rescored",
            "find_circuit",
            "score_edges",
        ),
        "circuitsae.components.exact": (
            "exact_edges",
            "exact_inputs",
            "exact_nodes",
            "graph_of",
            "run_keeping",
            "run_without",
        ),
        "circuitsae.components.problem": (
            "Ablation",
            "Metric",
            "PatchingProblem",
            "Prepared",
            "problems_of",
        ),
        "circuitsae.components.gradients": (
            "atp_star",
            "eap",
            "eap_ig",
            "eap_ig_activations",
            "node_scores",
        ),
        "circuitsae.components.network": (
            "ComponentGraph",
            "Edge",
        ),
        "circuitsae.components.scores": (
            "Scores",
            "auroc",
            "average_precision",
            "join",
            "overlap",
        ),
    },
)
