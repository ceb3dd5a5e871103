"""Components as nodes, against the models' own hooks and against a forward pass written out."""

import pytest
import torch

from circuitsae.audit.planted import PROGRAMS
from circuitsae.components import (
    Edge,
    PatchingProblem,
    Prepared,
    atp_star,
    direct_logit_attribution,
    eap,
    eap_ig,
    eap_ig_activations,
    exact_edges,
    exact_inputs,
    exact_nodes,
    node_scores,
    patch_path,
    path_patching,
    run_keeping,
    run_without,
)
from circuitsae.components.known import projection
from circuitsae.components.network import Network
from transcoders.errors import InputError, ModelError
from transcoders.random_models import random_model

FAMILIES = ("gpt2", "opt", "gpt_neox", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi")
NORM_AFTER_ATTENTION = ("gemma2", "gemma3")
"""There a head's share of the norm is replaced, not its z."""
_D_VOCAB = 23


def difference(logits):
    return logits[:, -1, 3] - logits[:, -1, 4]


def problem_of(family, ablation="resample", metric=difference, **sizes):
    sizes = {"n_layers": 2, "d_model": 16, "n_heads": 4, **sizes}
    model = random_model(family, d_vocab=_D_VOCAB, context=8, dtype=torch.float64, **sizes)
    generator = torch.Generator().manual_seed(1)
    clean, corrupt = torch.randint(0, _D_VOCAB, (2, 3, 5), generator=generator)
    return PatchingProblem(model, clean, corrupt, metric, ablation)


@pytest.fixture(scope="module", params=FAMILIES)
def problem(request):
    return problem_of(request.param)


@pytest.fixture(scope="module")
def gpt2():
    return problem_of("gpt2")


def value(problem, write=None):
    return difference(problem.model.run_hooked(problem.clean, write=write)[0])


def corrupt_hook(problem, name):
    return problem.model.run_hooked(problem.corrupt, read=[name])[1][name]


# against the model's own hooks


def test_ablating_an_input_is_replacing_what_it_projects_to(problem):
    """All edges into a head's q, k or v resampled: the same as the corrupt run's query, key or value."""
    graph = Prepared(problem).graph
    scores = exact_inputs(problem)
    for kind in "qkv":
        name = f"blocks.1.attn.{kind}.hook_out"
        other = corrupt_hook(problem, name)
        for place, reader in enumerate(graph.head_readers(1, kind)):

            def edit(x, place=place, other=other):
                x = x.clone()
                x[:, :, place] = other[:, :, place]
                return x

            expected = value(problem, {name: edit}) - value(problem)
            torch.testing.assert_close(scores.only([reader]).values[:, 0, 0], expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("problem", [f for f in FAMILIES if f not in NORM_AFTER_ATTENTION], indirect=True)
def test_ablating_a_head_is_replacing_its_z(problem):
    scores = exact_nodes(problem)
    name = "blocks.0.attn.hook_z"
    other = corrupt_hook(problem, name)
    for head in range(Prepared(problem).graph.n_heads):

        def edit(x, head=head):
            x = x.clone()
            x[:, :, head] = other[:, :, head]
            return x

        expected = value(problem, {name: edit}) - value(problem)
        torch.testing.assert_close(scores.only([f"a0.h{head}"]).values[:, 0, 0], expected, rtol=1e-9, atol=1e-10)


def test_ablating_an_mlp_is_replacing_its_output(problem):
    gemma = "ln2_post" in problem.model.bridge.blocks[0].submodules
    name = "blocks.0.ln2_post.hook_out" if gemma else "blocks.0.mlp.hook_out"
    other = corrupt_hook(problem, name)
    expected = value(problem, {name: lambda _: other}) - value(problem)
    torch.testing.assert_close(exact_nodes(problem, ["m0"]).values[:, 0, 0], expected, rtol=1e-9, atol=1e-10)


def test_batched_patches_are_those_of_one_edge_at_a_time(problem):
    scores = exact_edges(problem)
    clean, *single = run_without(problem, [[], *([edge] for edge in scores.edges)])
    torch.testing.assert_close(scores.values[..., 0], (torch.stack(single) - clean).mT, rtol=1e-9, atol=1e-10)


def test_nothing_kept_is_the_corrupt_run(problem):
    logits, _ = problem.model.run(problem.corrupt)
    torch.testing.assert_close(run_keeping(problem, [[]])[0], difference(logits), rtol=1e-9, atol=1e-10)


def test_parts_sum_to_the_stream(problem):
    """Writers and attention's biases give what the blocks pass on."""
    prepared = Prepared(problem)
    _, cache = problem.model.run_hooked(problem.clean, read=["blocks.1.hook_out"])
    biases = sum(prepared.network.attention_bias(layer) for layer in range(2))
    total = prepared.clean.writes.sum(0) + biases
    torch.testing.assert_close(total, cache["blocks.1.hook_out"], rtol=1e-9, atol=1e-10)


# against a forward pass written out


class WrittenOut:
    """GPT-2 in float64 from its state dict, one head and one edge at a time."""

    def __init__(self, model):
        self.w = {k.removeprefix("transformer."): v for k, v in _gpt2_state(model).items()}
        self.d_head = 16 // 4

    def norm(self, x, name):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def head(self, layer, head, q_in, k_in, v_in):
        weight, bias = self.w[f"h.{layer}.attn.c_attn.weight"], self.w[f"h.{layer}.attn.c_attn.bias"]
        parts = []
        for i, x in enumerate((q_in, k_in, v_in)):
            columns = slice(16 * i + self.d_head * head, 16 * i + self.d_head * (head + 1))
            parts.append(self.norm(x, f"h.{layer}.ln_1") @ weight[:, columns] + bias[columns])
        q, k, v = parts
        scores = q @ k.mT / self.d_head**0.5
        mask = torch.triu(torch.ones(scores.shape[-2:], dtype=torch.bool), 1)
        pattern = scores.masked_fill(mask, -torch.inf).softmax(-1)
        rows = slice(self.d_head * head, self.d_head * (head + 1))
        return pattern @ v @ self.w[f"h.{layer}.attn.c_proj.weight"][rows]

    def mlp(self, layer, x):
        hidden = self.norm(x, f"h.{layer}.ln_2") @ self.w[f"h.{layer}.mlp.c_fc.weight"]
        hidden = torch.nn.functional.gelu(hidden + self.w[f"h.{layer}.mlp.c_fc.bias"], approximate="tanh")
        return hidden @ self.w[f"h.{layer}.mlp.c_proj.weight"] + self.w[f"h.{layer}.mlp.c_proj.bias"]

    def run(self, tokens, edge=None, other=None):
        """Logits and contributions; the reader of `edge` sees its writer's contribution in `other`."""
        written = {"embed": self.w["wte.weight"][tokens], "pos": self.w["wpe.weight"][: tokens.shape[1]]}
        biases, ablated = 0, other or {}

        def read(reader):
            swapped = edge.writer if edge is not None and edge.reader == reader else None
            return biases + sum(ablated[k] if k == swapped else v for k, v in written.items())

        for layer in range(2):
            heads = {}
            for head in range(4):
                inputs = [read(f"a{layer}.h{head}.{kind}") for kind in "qkv"]
                heads[f"a{layer}.h{head}"] = self.head(layer, head, *inputs)
            written |= heads
            biases = biases + self.w[f"h.{layer}.attn.c_proj.bias"]
            written[f"m{layer}"] = self.mlp(layer, read(f"m{layer}"))
        return self.norm(read("logits"), "ln_f") @ self.w["wte.weight"].T, written


def _gpt2_state(model):
    """The weights of the Hugging Face model, under its own names."""
    state = {}
    for name, tensor in model.bridge.original_model.state_dict().items():
        state[name.replace("_original_component.", "")] = tensor
    return state


def test_every_edge_against_a_forward_pass_written_out(gpt2):
    oracle = WrittenOut(gpt2.model)
    clean, _ = oracle.run(gpt2.clean)
    torch.testing.assert_close(clean, gpt2.model.run(gpt2.clean)[0], rtol=1e-9, atol=1e-10)
    _, other = oracle.run(gpt2.corrupt)
    zero = {name: torch.zeros_like(value) for name, value in other.items()}
    for ablation, ablated in (("resample", other), ("zero", zero)):
        scores = exact_edges(PatchingProblem(gpt2.model, gpt2.clean, gpt2.corrupt, difference, ablation))
        for place, edge in enumerate(scores.items):
            patched, _ = oracle.run(gpt2.clean, edge, ablated)
            expected = difference(patched) - difference(clean)
            torch.testing.assert_close(scores.values[:, place, 0], expected, rtol=1e-9, atol=1e-10)


# first-order methods


def small_step(problem, size):
    """The problem with an ablation that goes only part of the way."""
    prepared = Prepared(problem)
    change = size * prepared.delta
    prepared.__dict__["delta"] = change
    return prepared


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "phi"])
def test_attribution_patching_is_the_derivative_of_exact_patching(family):
    problem = problem_of(family)
    step = 2e-3  # Hugging Face rounds attention patterns to float32, so that a smaller one would show its noise
    up, down = (exact_edges(small_step(problem, sign * step)).values for sign in (1, -1))
    slope = (up - down) / (2 * step)
    torch.testing.assert_close(eap(problem).values, slope, rtol=1e-3, atol=1e-3 * float(slope.abs().max()))


def test_integrated_gradients_over_inputs_average_those_between_clean_and_corrupt(gpt2):
    """At two steps, the gradient is the mean of those at the clean embeddings and half-way to the corrupt ones."""
    prepared = Prepared(gpt2)
    network, gradient = prepared.network, 0
    for alpha in (0.0, 0.5):
        stream = (prepared.clean.layers[0].before + alpha * prepared.delta[:2].sum(0)).requires_grad_()
        value = difference(network.logits(network.run(stream))).sum()
        gradient = gradient + torch.autograd.grad(value, stream)[0] / 2
    # Everything that reads the embeddings, reads the stream before block 0, or that and more: their sum is this one.
    scores = eap_ig(gpt2, steps=2)
    total = sum(scores.of(edge) for edge in scores.edges if edge.writer == "embed")
    assert total == pytest.approx(float((prepared.delta[0] * gradient).sum((1, 2)).mean()), rel=1e-9)


def test_integrated_gradients_over_activations_account_for_the_whole_effect():
    """Along the path of one layer's writers the integral is exact (to the midpoint rule): the embeddings' part is
    the change from clean to corrupt.
    """
    problem = problem_of("gpt2")
    scores = eap_ig_activations(problem, steps=24)
    embeddings = sum(scores.of(edge) for edge in scores.edges if edge.writer in ("embed", "pos"))
    corrupt, _ = problem.model.run(problem.swapped().clean)
    expected = float((difference(corrupt) - value(problem)).mean())
    assert embeddings == pytest.approx(expected, rel=5e-3)


def test_the_attention_correction_is_exact_where_what_follows_is_linear():
    """Saturated attention in the last layer, no norm, a linear metric: recomputing z leaves no error."""
    (induction,) = (program for program in PROGRAMS if program.name == "induction")
    problem = induction.program().problems("resample", projection)[-1]
    edges = [("a0.h1", "a1.h0.k"), ("embed", "a1.h0.q")]
    exact = exact_edges(problem, edges)
    assert bool((exact.largest > 0.5).all())
    torch.testing.assert_close(atp_star(problem).only(edges).values, exact.values, rtol=1e-9, atol=1e-10)
    assert not torch.allclose(eap(problem).only(edges).values, exact.values, atol=0.1)


def test_node_scores_sum_over_outgoing_edges(gpt2):
    edges = eap(gpt2)
    nodes = node_scores(edges)
    expected = sum(edges.of(edge) for edge in edges.edges if edge.writer == "a0.h1")
    assert nodes.of("a0.h1") == pytest.approx(expected)


def test_dropping_gradients_never_hides_an_edge(gpt2):
    plain, dropped = atp_star(gpt2, drop=False), atp_star(gpt2)
    assert bool((dropped.values.abs() >= plain.values.abs() - 1e-12).all())
    kinds = [edge for edge in plain.edges if edge.reader.endswith(".v")]
    torch.testing.assert_close(plain.only(kinds).values, eap(gpt2).only(kinds).values)


# paths and direct effects


def test_a_path_of_one_edge_is_the_edge(gpt2):
    scores = exact_edges(gpt2)
    for edge in (Edge("embed", "a0.h1.k"), Edge("a0.h1", "m1"), Edge("m0", "logits")):
        torch.testing.assert_close(patch_path(gpt2, [edge]), scores.only([edge]).values[:, 0, 0])


def test_a_longer_path_is_patched_step_by_step(gpt2):
    """embed → q of 0.1 → MLP 1 → logits, with the written-out model's parts."""
    oracle = WrittenOut(gpt2.model)
    clean, written = oracle.run(gpt2.clean)
    _, other = oracle.run(gpt2.corrupt)
    stream = written["embed"] + written["pos"]
    patched = oracle.head(0, 1, stream + other["embed"] - written["embed"], stream, stream)
    middle = sum(written[k] for k in written if k != "m1") + sum(
        oracle.w[f"h.{layer}.attn.c_proj.bias"] for layer in range(2)
    )
    mlp = oracle.mlp(1, middle + patched - written["a0.h1"])
    logits = oracle.norm(middle + mlp, "ln_f") @ oracle.w["wte.weight"].T
    found = patch_path(gpt2, [("embed", "a0.h1.q"), ("a0.h1", "m1"), ("m1", "logits")])
    torch.testing.assert_close(found, difference(logits) - difference(clean), rtol=1e-9, atol=1e-10)


def test_path_patching_without_mlps_to_the_logits_is_the_direct_edge(gpt2):
    found = path_patching(gpt2, ["logits"], through_mlps=False)
    edges = exact_edges(gpt2, [(str(name), "logits") for name in found.items])
    torch.testing.assert_close(found.values, edges.values, rtol=1e-9, atol=1e-10)


def test_path_patching_through_mlps_freezes_the_other_heads(gpt2):
    """A head of layer 0 to the queries of layer 1: MLP 0 moves, heads do not. Checked with hooks."""
    model, name = gpt2.model, "blocks.0.attn.hook_z"
    other = corrupt_hook(gpt2, name)

    def edit(x):
        x = x.clone()
        x[:, :, 2] = other[:, :, 2]
        return x

    _, cache = model.run_hooked(gpt2.clean, read=["blocks.1.attn.q.hook_out"], write={name: edit})
    query = cache["blocks.1.attn.q.hook_out"]

    def receive(x):
        x = x.clone()
        x[:, :, 3] = query[:, :, 3]
        return x

    expected = value(gpt2, {"blocks.1.attn.q.hook_out": receive}) - value(gpt2)
    found = path_patching(gpt2, ["a1.h3.q"], ["a0.h2"])
    torch.testing.assert_close(found.values[:, 0, 0], expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3"])
def test_direct_contributions_and_biases_sum_to_the_logit_difference(family):
    problem = problem_of(family)
    prepared, bridge = Prepared(problem), problem.model.bridge
    final = prepared.clean.final
    total = direct_logit_attribution(problem).values[..., 0].sum(1)
    centred = final - final.mean(-1, keepdim=True) if family == "gpt2" else final
    scale = (centred.pow(2).mean(-1, keepdim=True) + bridge.cfg.eps).sqrt()
    readout = bridge.unembed.W_U[:, 3] - bridge.unembed.W_U[:, 4]
    biases = sum(prepared.network.attention_bias(layer) for layer in range(2)) + torch.zeros(16, dtype=torch.float64)
    if family == "gpt2":
        weight, constant = bridge.ln_final.weight, bridge.ln_final.original_component.bias @ readout
        biases = biases - biases.mean()
    else:
        weight, constant = bridge.ln_final.weight + (family == "gemma3"), 0
    rest = (biases / scale[:, -1] * weight) @ readout + constant
    torch.testing.assert_close(total + rest, value(problem), rtol=1e-9, atol=1e-10)


# positions, means, several lengths


def test_positions_apart_give_each_positions_patch(gpt2):
    scores = exact_edges(gpt2.each_position(), [("embed", "a1.h0.k")])
    assert scores.values.shape == (3, 1, 5)
    other = gpt2.clean.clone()
    other[:, 2] = gpt2.corrupt[:, 2]
    alone = PatchingProblem(gpt2.model, gpt2.clean, other, difference)
    torch.testing.assert_close(scores.values[:, :, 2], exact_edges(alone, [("embed", "a1.h0.k")]).values[..., 0])
    estimate = eap(gpt2.each_position())
    torch.testing.assert_close(estimate.values.sum(2), eap(gpt2).values[..., 0])


def test_mean_ablation_within_groups(gpt2):
    groups = torch.tensor([0, 0, 1])
    problem = PatchingProblem(gpt2.model, gpt2.clean, None, difference, "mean", groups=groups)
    prepared = Prepared(problem)
    writes = prepared.clean.writes
    torch.testing.assert_close(prepared.replacement[:, 0], (writes[:, 0] + writes[:, 1]) / 2)
    assert not prepared.delta[:, 2].any()
    assert float(exact_edges(problem).values[2].abs().max()) < 1e-12


def test_small_batches_and_one_position_read_change_nothing(gpt2):
    whole = exact_edges(gpt2)
    read = torch.full((3,), 4)
    one = PatchingProblem(gpt2.model, gpt2.clean, gpt2.corrupt, difference, read=read)
    for method in (exact_edges, eap, eap_ig, atp_star):
        torch.testing.assert_close(method(one, batch_tokens=5).values, method(gpt2).values, rtol=1e-9, atol=1e-10)
    assert exact_edges([gpt2, one]).values.shape[0] == 2 * len(whole.values)


def test_swapping_denoises(gpt2):
    every = run_without(gpt2.swapped(), [Prepared(gpt2).graph.edges])[0]
    torch.testing.assert_close(every, value(gpt2), rtol=1e-9, atol=1e-10)


# refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"corrupt": None}, "Resample ablation needs corrupt prompts"),
        ({"corrupt": torch.zeros(3, 4, dtype=torch.long)}, "equal length"),
        ({"ablation": "median"}, "Unknown ablation 'median'"),
        ({"clean": torch.full((3, 5), 99)}, "do not fit"),
        ({"read": torch.tensor([1])}, "one value per example"),
    ],
)
def test_bad_problems_are_refused(gpt2, change, message):
    given = {"model": gpt2.model, "clean": gpt2.clean, "corrupt": gpt2.corrupt, "metric": difference, **change}
    with pytest.raises(InputError, match=message):
        PatchingProblem(**given)


def test_unknown_edges_and_broken_paths_are_refused(gpt2):
    with pytest.raises(InputError, match="no edge m1→a0.h0.q"):
        exact_edges(gpt2, [("m1", "a0.h0.q")])
    with pytest.raises(InputError, match="no component 'a9.h0'"):
        exact_nodes(gpt2, ["a9.h0"])
    with pytest.raises(InputError, match="The path breaks"):
        patch_path(gpt2, [("embed", "a0.h1.q"), ("m0", "logits")])
    with pytest.raises(InputError, match="at least one step"):
        eap_ig(gpt2, steps=0)


@torch.no_grad()
def test_mlps_that_are_given_the_stream_can_be_run_alone():
    tokens = torch.tensor([[0, 11, 22, 7]])
    model = random_model("mpt", n_layers=2, d_model=16, n_heads=4, dtype=torch.float64)
    network = Network.of(model)
    (embedded,) = network.embeddings(tokens)
    torch.testing.assert_close(network.logits(network.run(embedded)), model.run(tokens)[0], rtol=1e-9, atol=1e-9)
    bloom = random_model("bloom", n_layers=2, d_model=16, n_heads=4)  # its embeddings pass a norm
    with pytest.raises(ModelError, match="The components of random-bloom-0, put together again, give logits"):
        Network.of(bloom).embeddings(tokens)
