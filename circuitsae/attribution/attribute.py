"""attribute: a prompt becomes an attribution graph. What is asked for, and what comes back.

Where a number comes from: `nodes` has the ends of a prompt's edges, who writes and who is read; `closed_form` has their
weights, or `autograd`, which it is checked against. `expansion` says which rows are found, and makes a graph of them.
"""

import logging
import math
import platform
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, cached_property, partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal, cast, get_args

import torch
from jaxtyping import Int
from torch import Tensor

from circuitsae.attribution import device_graph
from circuitsae.attribution.autograd import Autograd, autograd_rows
from circuitsae.attribution.closed_form import ClosedForm
from circuitsae.attribution.device_sweep import DeviceSources, DeviceSweep, Memory, ProductPrecision, fills_device
from circuitsae.attribution.expansion import (
    Expansion,
    FullSize,
    every_row,
    explored,
    first_look,
    looked_at,
    pruned,
    with_only,
)
from circuitsae.attribution.limits import Errors, Limits, Response
from circuitsae.attribution.linear import LinearModel, linear_model
from circuitsae.attribution.live import live_model
from circuitsae.attribution.nodes import Endpoints, Explained, SourceVectors
from circuitsae.attribution.responding import Responding
from circuitsae.attribution.targets import ChooseTargets, TopLogits, explained, until
from circuitsae.graph import AttributionGraph
from circuitsae.graph.compact import RowBlock
from circuitsae.graph.pruning import check_shares
from circuitsae.replacement import ReplacementModel, Trace
from transcoders.dictionaries.fingerprint import dictionary_fingerprint
from transcoders.errors import InputError, ModelError
from transcoders.progress import progress_bar
from transcoders.token_text import join_tokens

EngineName = Literal["auto", "closed_form", "autograd"]
OldEngineName = Literal["fast", "plain"]
NEW_NAMES: dict[str, EngineName] = {"fast": "closed_form", "plain": "autograd"}


def attribute(
    model: ReplacementModel,
    prompt: str | Int[Tensor, "pos"],
    *,
    targets: ChooseTargets = TopLogits(),
    max_features: int | None = None,
    unexplained: float | None = None,
    edges_per_node: int | None = None,
    batch_size: int | Literal["auto"] = "auto",
    engine: EngineName | OldEngineName = "auto",
    precision: ProductPrecision | None = None,
    response: Response | None = None,
    errors: Errors = "held",
    bos: bool | None = None,
    progress: bool = False,
) -> AttributionGraph:
    """The full attribution graph of what `targets` choose, by default the likeliest next tokens; `prune()` it to read
    it.

    A[t, s] = a_s · Σ_{l' < l_t} W_dec[s→l'] · P((l', p_s) → (l_t, p_t)) · W_enc[:, t] under frozen attention patterns
    and norm scales, after Ameisen et al. 2025, "Circuit Tracing". Where dictionaries have skip terms, these are
    paths, and the graph's `past` is what of each edge passed by them, by one more sweep.

    * `max_features`: only this many features become nodes, those of most influence as far as the rows of the logits
      and of a few features tell; what the others write counts as error there, so rows still sum up.
    * `unexplained`: features get their rows from the logits down, always those of most influence so far, until the
      features without hold at most this share of the influence (or `max_features` have theirs).
    * `edges_per_node`: only this many strongest edges into each node are stored, with the exact sum of the others.
    * `engine`: `closed_form`, or `autograd`, the slow reference; `auto` is the closed form where the model allows.
    * `batch_size`: targets at once; `auto` bounds the memory.
    * `precision`: of matrix products on a CUDA device; `tf32` lets tensor cores round what they multiply, and the
      graph's provenance says how far the first block of rows is from that of products in float32.
    * `response`: `frozen`, or `linear`, where attention patterns and norm scales answer as their derivatives say. Then
      A[t, s] = a_s · ∂h_t/∂a_s, the exact Jacobian of the replacement model, and rows do not sum up to what is read.
      With autoencoders, between which the real MLPs stay, it is the only one. Default: `frozen` where it can be.
    * `errors`: `held`, or `linear`, where an error answers what its MLP and its features read as their derivatives say.
      Chained over features, edges are then the model's own derivative, with attention and norms as `response` says,
      however little the dictionaries explain; what passed by errors is in the graph's `past`.
    * `bos`: whether a text gets BOS first; default, as the model reads texts (its dictionaries' training).

    Raises `PromptError` for a prompt the model cannot take, `InputError` for targets it does not have or a setting out
    of range, and `ModelError` where the engine cannot take the model.
    """
    limits = Limits(max_features, unexplained, edges_per_node, batch_size, precision, response, errors)
    trace, text = _read(model, prompt, targets, bos)
    return _Attribution(model, trace, text, targets, limits, _current_name(engine)).graph(progress)


def attribute_pruned(
    model: ReplacementModel,
    prompt: str | Int[Tensor, "pos"],
    *,
    nodes: float = 0.8,
    edges: float = 0.98,
    targets: ChooseTargets = TopLogits(),
    max_features: int | None = None,
    unexplained: float | None = None,
    edges_per_node: int | None = None,
    batch_size: int | Literal["auto"] = "auto",
    engine: EngineName | OldEngineName = "auto",
    precision: ProductPrecision | None = None,
    response: Response | None = None,
    errors: Errors = "held",
    bos: bool | None = None,
    progress: bool = False,
) -> tuple[AttributionGraph, FullSize]:
    """`attribute(...).prune(nodes=nodes, edges=edges)`, and how large the full graph was, which is never held.

    Edges are dropped as soon as their influence is counted, so that the memory does not grow with them (those of
    targets below the layer where the closed form's sources and targets meet wait until the end; with `unexplained`
    the rows that were found are held). Same nodes and edges as the full graph's, and the same figures up to the
    rounding of float64.
    """
    check_shares(nodes=nodes, edges=edges)
    limits = Limits(max_features, unexplained, edges_per_node, batch_size, precision, response, errors)
    trace, text = _read(model, prompt, targets, bos)
    work = _Attribution(model, trace, text, targets, limits, _current_name(engine))
    if unexplained is not None:
        full = work.graph(progress)
        return full.prune(nodes=nodes, edges=edges), FullSize(len(full.nodes), int(full.weights.nnz))
    with work.expansion(progress) as (expansion, known):
        if isinstance(expansion.engine, DeviceSweep):
            return device_graph.pruned(expansion, expansion.engine, nodes, edges)
        return pruned(expansion, nodes, edges, known)


def attribute_trace(
    model: ReplacementModel,
    trace: Trace,
    *,
    prompt: str | None = None,
    targets: ChooseTargets = TopLogits(),
    max_features: int | None = None,
    unexplained: float | None = None,
    edges_per_node: int | None = None,
    batch_size: int | Literal["auto"] = "auto",
    engine: EngineName | OldEngineName = "auto",
    precision: ProductPrecision | None = None,
    response: Response | None = None,
    errors: Errors = "held",
    progress: bool = False,
) -> AttributionGraph:
    """`attribute` of a prompt that has been traced already."""
    limits = Limits(max_features, unexplained, edges_per_node, batch_size, precision, response, errors)
    if len(read := until(trace.tokens, targets)) < trace.n_positions:
        trace = model.trace(read)
    return _Attribution(model, trace, prompt, targets, limits, _current_name(engine)).graph(progress)


def _read(
    model: ReplacementModel, prompt: str | Int[Tensor, "pos"], targets: ChooseTargets, bos: bool | None
) -> tuple[Trace, str | None]:
    """The prompt up to the position that is explained, and its text: no later token has a part in it."""
    tokens = model.tokens(prompt, bos=bos)
    trace = model.trace(until(tokens, targets))
    if not isinstance(prompt, str) or trace.n_positions == len(tokens):
        return trace, prompt if isinstance(prompt, str) else None
    return trace, join_tokens(trace.token_strings[trace.starts_with_bos :])


@dataclass(frozen=True)
class _Attribution:
    """What is asked for, and how a graph is made of it."""

    model: ReplacementModel
    trace: Trace
    prompt: str | None
    targets: ChooseTargets
    limits: Limits
    engine: EngineName

    def graph(self, progress: bool) -> AttributionGraph:
        with self.expansion(progress) as (expansion, known):
            if self.limits.unexplained is not None:
                return explored(expansion, self._at_most, self.limits.unexplained)
            if isinstance(expansion.engine, DeviceSweep):
                return device_graph.every_row(expansion, expansion.engine)
            return every_row(expansion, known)

    @contextmanager
    def expansion(self, progress: bool) -> Iterator[tuple[Expansion, RowBlock | None]]:
        """The nodes with the rows that can be had, and the rows that are known already."""
        model, trace, limits = self.model, self.explained.trace, self.limits
        settings = {
            "targets": repr(self.targets),
            "max_features": limits.max_features,
            "unexplained": limits.unexplained,
            "edges_per_node": limits.edges_per_node,
        }
        with torch.no_grad(), progress_bar(shown=progress) as bar:
            task = bar.add_task("attributing", total=self._at_most + len(self.explained.nodes))
            live, responds = self.response == "linear", limits.errors == "linear"
            expand = partial(
                _expand,
                responds=responds,
                linear=_linear_for(self.engine, model, trace, live),
                live=live,
                batch_size=None if limits.batch_size == "auto" else limits.batch_size,
                edges_per_node=limits.edges_per_node,
                precision=limits.precision,
                provenance={
                    **_provenance(model, self.trace, self.prompt, settings),
                    "response": self.response,
                    **({"errors": "linear"} if responds else {}),
                },
                done=lambda n: bar.advance(task, n),
            )
            ends, known = Endpoints.of(model, self.explained), None
            wanted = None if limits.unexplained is None else self._at_most
            if wanted is None and self._at_most < len(trace.features.value):
                with expand(ends, looked_at(self._at_most)) as all_features:
                    ends, known = _strongest(all_features, self._at_most)
                del all_features
                bar.reset(task, total=len(ends.targets.layer))
            with expand(ends, wanted) as expansion:
                yield expansion, known

    @cached_property
    def response(self) -> Response:
        if self.limits.errors == "linear" and self.model.spliced:
            raise InputError(
                "errors='linear' is for transcoders in the place of MLPs; those between autoencoders are the model's "
                "own and answer as they are. Leave errors at 'held'."
            )
        return _response(self.limits.response, self.model)

    @cached_property
    def explained(self) -> Explained:
        trace, live = self.trace, self.response == "linear"
        return explained(self.model, trace.with_logit_slope() if live else trace, self.targets)

    @property
    def _at_most(self) -> int:
        n_features = len(self.explained.trace.features.value)
        return min(self.limits.max_features or n_features, n_features)


@contextmanager
def _expand(
    ends: Endpoints,
    n_features: int | None = None,
    *,
    linear: LinearModel | None,
    live: bool,
    responds: bool,
    batch_size: int | None,
    edges_per_node: int | None,
    precision: ProductPrecision | None,
    provenance: dict[str, Any],
    done: Callable[[int], Any],
) -> Iterator[Expansion]:
    """A prompt's graph, be it with all features or with some: in closed form with its matrices, else by autograd.

    `n_features`: the rows of so many features will be asked for; default: those of all targets, at once.
    """
    expansion = partial(
        Expansion, ends=ends, provenance=provenance, edges_per_node=edges_per_node, responds=responds, done=done
    )
    device, passes = ends.targets.pos.device, responds or has_skips(ends.model)
    if precision == "tf32" and not (linear is not None and fills_device(device)):
        raise InputError(f"precision='tf32' needs the closed form on a CUDA device; the model is on {device}.")
    if linear is not None:
        sources = SourceVectors(ends.model, ends.trace, ends.sources, linear)
        if fills_device(device):
            sweep = _device_sweep(ends, sources, batch_size, precision, responds)
            yield expansion(engine=sweep, without_skips=sweep.without_skips() if sweep.pairs else None)
            return
        share = 1.0 if n_features is None else n_features / len(ends.targets.layer)
        answering = Responding(ends.model, ends.trace, linear, sources.columns) if responds else None
        engine = ClosedForm(sources, ends.targets, share=share, batch_size=batch_size, responds=answering)
        yield expansion(engine=engine, without_skips=engine.without_skips() if passes else None)
        return
    with ExitStack() as opened:
        maps = [{"responds": responds}, {"skips": False}] if passes else [{}]
        engines = [
            Autograd(opened.enter_context(autograd_rows(ends.model, ends.trace, live=live, **how)), ends,
                     batch_size=batch_size)
            for how in maps
        ]  # fmt: skip
        yield expansion(engine=engines[0], without_skips=engines[1] if len(engines) > 1 else None)


def check_settings(*, nodes: float = 0.8, edges: float = 0.98, engine: str = "auto", **settings: Any) -> None:
    """Raises `InputError` for settings of `attribute_pruned` that are out of range, before any prompt is read."""
    check_shares(nodes=nodes, edges=edges)
    _check_engine(NEW_NAMES.get(engine, engine))
    limits: dict[str, Any] = dict.fromkeys(("max_features", "unexplained", "edges_per_node", "precision", "response"))
    limits |= {"batch_size": "auto", "errors": "held"} | settings
    Limits(**{name: value for name, value in limits.items() if name not in ("bos", "progress")})


def _device_sweep(
    ends: Endpoints, sources: SourceVectors, batch_size: int | None, precision: ProductPrecision | None, responds: bool
) -> DeviceSweep:
    device = ends.targets.pos.device
    extra = torch.from_numpy(ends.unembedding_bias).to(device)
    on_device = DeviceSources(sources.without_skips() if responds else sources, extra.shape[1])
    return DeviceSweep(
        sources=on_device,
        responds=Responding(ends.model, ends.trace, sources.linear, on_device.node) if responds else None,
        targets=ends.targets,
        target_nodes=ends.target_nodes,
        extra=extra,
        pairs=responds or has_skips(ends.model),
        batch_size=batch_size,
        memory=Memory.of(device),
        precision=precision,
    )


def _response(asked: Response | None, model: ReplacementModel) -> Response:
    if asked == "frozen" and model.spliced:
        raise InputError(
            "response='frozen' needs transcoders in the place of all MLPs; those between autoencoders are no linear "
            "maps. Leave response at its default, or give 'linear'."
        )
    return asked or ("linear" if model.spliced else "frozen")


def has_skips(model: ReplacementModel) -> bool:
    """Whether the dictionary of some layer has a skip term."""
    return any(model.dictionaries.skip(layer) is not None for layer in range(model.model.n_layers))


def _current_name(engine: EngineName | OldEngineName) -> EngineName:
    """The engine's name, where it may be one of before."""
    if (new := NEW_NAMES.get(engine)) is not None:
        warnings.warn(f"engine={engine!r} is called {new!r} now.", DeprecationWarning, stacklevel=3)
    return cast(EngineName, new or engine)


def _linear_for(engine: EngineName, model: ReplacementModel, trace: Trace, live: bool) -> LinearModel | None:
    """The matrices that the closed form needs of a prompt; None where `engine` is autograd.

    `auto` is the closed form where it knows the architecture, else, with a notice, autograd; that is all there is
    for what lies between autoencoders. Raises `InputError` for another name, and `ModelError` where the closed form is
    asked for and cannot take the model.
    """
    _check_engine(engine)
    if engine == "closed_form" and model.spliced:
        raise InputError("The closed form needs transcoders in the place of all MLPs; leave engine at 'auto'.")
    if engine == "autograd" or model.spliced:
        return None
    try:
        return (live_model if live else linear_model)(trace.frozen)
    except ModelError as error:
        if engine == "closed_form":
            raise ModelError(f"{error}; use engine='autograd'.") from error
        logging.getLogger(__name__).warning("%s; using autograd, which is slower.", error)
        return None


def _check_engine(engine: str) -> None:
    if engine not in get_args(EngineName):
        raise InputError(f"Unknown engine {engine!r}; the engines are {', '.join(get_args(EngineName))}.")


def _strongest(expansion: Expansion, at_most: int) -> tuple[Endpoints, RowBlock | None]:
    """The ends with the `at_most` features of most influence, and of their rows those that are known from choosing."""
    features, seen = first_look(expansion, at_most)
    left = expansion.ends.keep(features)
    on_device = isinstance(expansion.engine, DeviceSweep)  # where these few rows are found again at no cost
    passes = expansion.responds or has_skips(left.model)
    if on_device or len(left.model.dictionaries.write_layers(0)) > 1 or passes:
        return left, None  # an edge does not tell at which of its layers a feature wrote, nor what passed features
    known = with_only(features, seen, expansion)
    return left.without_targets(known.rows), known


def _provenance(model: ReplacementModel, trace: Trace, prompt: str | None, settings: dict[str, Any]) -> dict[str, Any]:
    fit = model.check_fit(trace)
    return {
        "model": model.model.name,
        **({"model_origin": dict(model.model.origin)} if model.model.origin else {}),
        "fingerprint": model.model.fingerprint(),
        "frame": model.model.frame.name,
        "dtype": str(model.model.dtype).removeprefix("torch."),
        "dictionaries": {"kind": model.dictionaries.kind, **model.dictionaries.provenance.to_json()},
        "dictionary_fingerprint": weights_of_dictionaries(model),
        **({"sites": [model.stands_for(layer) for layer in range(model.model.n_layers)]} if model.spliced else {}),
        "fit": {"l0": fit.l0, "fvu": fit.fvu if math.isfinite(fit.fvu) else None},
        "prompt": prompt,
        "bos": trace.starts_with_bos,
        "settings": settings,
        "versions": {name: _version(name) for name in ("circuitsae", "torch", "transformer-lens")}
        | {"python": platform.python_version()},
    }


def weights_of_dictionaries(model: ReplacementModel) -> str | None:
    """Which weights the dictionaries have; None where they were rounded to those of a model in low precision."""
    exact = model.model.dtype in (torch.float32, torch.float64)
    return dictionary_fingerprint(model.dictionaries) if exact else None


@cache
def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "uninstalled"
