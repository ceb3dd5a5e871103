"""Evidence for roles of heads, each against hooks in the model, a sum by hand, or heads made to do one thing."""

from typing import ClassVar, NamedTuple

import pytest
import torch

from circuitsae.commands.shared import told
from circuitsae.components import Prepared, attention_moved, direct_logit_attribution, problems_of, role_circuit
from circuitsae.components.network import Network
from circuitsae.loading import load_model
from circuitsae.reproduce import Reproduction, head_roles
from circuitsae.reproduce.copying import TOP, copy_scores
from circuitsae.reproduce.role_picture import picture_stage
from circuitsae.reproduce.role_stage import beside_published, mlps_that_write, role_stage
from circuitsae.tasks import Task, load_task
from circuitsae.tasks.task import Example, PatchPair
from transcoders.bridge import native_bridge
from transcoders.errors import InputError
from transcoders.language_model import LanguageModel
from transcoders.random_models import random_model

PLACES = {"IO": 0, "S1": 1, "S1+1": 2, "S2": 3, "END": 4}


class Given(Task):
    """A task of token ids, for models without a tokenizer."""

    pairs: ClassVar[dict[str, PatchPair]] = {}

    def tokens(self, model):
        return [self.pairs[self.examples[0].template]]


def given(name, clean, corrupt, answers, wrong):
    """Every example has its roles at the same places."""
    n = len(clean)
    roles = {role: torch.full((n,), place) for role, place in PLACES.items()}
    ids = torch.stack([answers, wrong], 1)
    pair = PatchPair(clean, corrupt, ids[:, :1], ids[:, 1:], torch.full((n, 2), -1), roles, ("t",) * n, torch.arange(n))
    Given.pairs[name] = pair
    example = Example(clean="", corrupt="", answers=(0,), template=name)
    return Given("ioi", (example,) * n)


def random_task(n=4, d_vocab=23):
    generator = torch.Generator().manual_seed(2)
    clean, corrupt = torch.randint(0, d_vocab, (2, n, 5), generator=generator)
    return given("random", clean, corrupt, clean[:, 0], clean[:, 1])


# copy scores


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "phi", "gemma2", "olmo2"])
def test_copy_scores_are_those_of_a_run_where_the_head_sees_one_name_everywhere(family):
    """The same stream at every position makes every pattern copy it; what one head writes is put before the end."""
    model = random_model(family, n_layers=2, d_model=16, n_heads=4, d_vocab=23, context=8, dtype=torch.float64)
    task = random_task(n=2)
    (pair,) = task.tokens(model)
    slow = torch.zeros(2, 8, dtype=torch.float64)
    names = [(i, place) for place in (0, 1, 3) for i in range(2)]
    _, cache = model.run_hooked(pair.clean, read=["blocks.0.hook_out"])
    for i, place in names:
        x, name = cache["blocks.0.hook_out"][i, place], int(pair.clean[i, 0 if place == 0 else 1])
        for layer in range(2):
            for head in range(4):
                written = one_head(model, layer, head, x) - one_head(model, layer, -1, x)
                for row, sign in enumerate((1, -1)):
                    edit = {"blocks.1.hook_out": lambda value, w=sign * written: w.expand_as(value).clone()}
                    logits = model.run_hooked(pair.clean[:1], write=edit)[0][0, -1]
                    slow[row, 4 * layer + head] += (name in logits.topk(TOP).indices.tolist()) / len(names)
    torch.testing.assert_close(copy_scores(model, task), slow)
    assert 0 < float(slow.mean()) < 1


def one_head(model, layer, head, x):
    """What attention adds with x at every position and all heads but one silent."""
    block = f"blocks.{layer}."

    def silence(z):
        heads = z.reshape(*z.shape[:2], 4, -1)
        return (heads * (torch.arange(4) == head)[:, None]).reshape(z.shape)

    edits = {f"{block}hook_in": lambda value: x.expand_as(value).clone(), f"{block}attn.o.hook_in": silence}
    name = f"{block}ln1_post.hook_out" if model.has_hook(f"{block}ln1_post.hook_out") else f"{block}attn.hook_out"
    return model.run_hooked(torch.zeros(1, 3, dtype=torch.long), write=edits, read=[name])[1][name][0, -1]


def test_copying_needs_to_know_where_names_stand():
    model = load_model("pocket")
    with pytest.raises(InputError, match="agreement"):
        copy_scores(model, load_task("agreement", model, 2, 0))


# what patching moves, and what is written after a knock-out


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "qwen3", "gemma3"])
def test_attention_moves_as_in_a_run_with_the_query_of_another(family):
    """A head of layer 0 to a query of layer 1, MLP 0 recomputed; patterns are read from the model's own attention."""
    model = random_model(family, n_layers=2, d_model=16, n_heads=4, d_vocab=23, context=8, dtype=torch.float64)
    (problem,) = problems_of(model, random_task(), roles=("IO", "S1", "S2"))
    part = Prepared(problem)
    query, pattern = "blocks.1.attn.q.hook_out", "blocks.1.attn.hook_pattern"
    added = "blocks.0.ln1_post.hook_out" if family == "gemma3" else "blocks.0.attn.hook_out"
    delta = part.delta[part.graph.writer_index["a0.h2"]]
    _, cache = model.run_hooked(problem.clean, read=[query], write={added: lambda value: value + delta})
    other = cache[query]

    def receive(value):
        value = value.clone()
        value[:, :, 3] = other[:, :, 3]
        return value

    before = model.run_hooked(problem.clean, read=[pattern])[1][pattern][:, 3, -1]
    after = model.run_hooked(problem.clean, read=[pattern], write={query: receive})[1][pattern][:, 3, -1]
    expected = (after - before)[:, [PLACES["IO"], PLACES["S1"], PLACES["S2"]]]
    found = attention_moved(problem, ["a0.h2", "a1.h0"], ["a1.h3"])
    torch.testing.assert_close(found[0, 0, :, :3], expected, rtol=1e-9, atol=1e-12)
    assert float(found[0, 0].sum(-1).abs().max()) < 1e-6  # every position is in one span; softmax is in float32
    assert float(expected.abs().max()) > 1e-4
    assert float(found[1].abs().max()) < 1e-12  # a1.h0 does not come before a1.h3


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_direct_contributions_after_a_knock_out_are_those_of_the_run_with_hooks(family):
    model = random_model(family, n_layers=2, d_model=16, n_heads=4, d_vocab=23, context=8, dtype=torch.float64)
    task = random_task()
    (problem,), (pair,) = problems_of(model, task), task.tokens(model)
    z, read = "blocks.0.attn.hook_z", ["blocks.1.hook_out", "blocks.1.attn.hook_z", "blocks.0.attn.hook_z"]
    other = model.run_hooked(pair.corrupt, read=[z])[1][z]

    def edit(value):
        value = value.clone()
        value[:, :, 1] = other[:, :, 1]
        return value

    _, cache = model.run_hooked(problem.clean, write={z: edit}, read=read)
    network = Network.of(model)
    norm = network.parts.final_norm
    assert norm is not None

    def centred(x):
        return x if family == "llama" else x - x.mean(-1, keepdim=True)

    final = centred(cache["blocks.1.hook_out"][:, -1])
    scale = (final.pow(2).mean(-1, keepdim=True) + model.bridge.cfg.eps).sqrt()
    readout = norm.weight() * (model.W_U[:, pair.answers[:, 0]] - model.W_U[:, pair.wrong[:, 0]]).T
    for layer, head in ((0, 0), (0, 1), (1, 3)):
        written = network.results(layer, cache[f"blocks.{layer}.attn.hook_z"])[:, -1, head]
        expected = (centred(written) / scale * readout).sum(-1)
        found = direct_logit_attribution(problem, without=["a0.h1"]).only([f"a{layer}.h{head}"]).values[:, 0, 0]
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_nothing_knocked_out_is_the_clean_run():
    model = random_model("llama", n_layers=2, d_model=16, n_heads=4, d_vocab=23, context=8, dtype=torch.float64)
    (problem,) = problems_of(model, random_task())
    part = Prepared(problem)
    assert part.without(()) is part.clean
    every = part.without(part.graph.writers)
    torch.testing.assert_close(every.writes, part.replacement)
    torch.testing.assert_close(every.final, Prepared(problem.swapped()).clean.final)


# heads made to do one thing each


class Directions(NamedTuple):
    """Where in the stream what is written."""

    token: slice = slice(0, 8)
    place: slice = slice(8, 13)
    one: int = 13
    seen: slice = slice(14, 22)
    """The name at S2, written by the s-inhibition head."""
    moved: slice = slice(22, 30)
    """The name that the mover moved."""
    out: slice = slice(30, 38)


D = Directions()
SHARP, WIDTH, HEAD = 600.0, 38, 10


def inhibited_mover():
    """Three layers of one head: one reads S2, one moves the name that is not S, one moves IO if nobody has.

    Tokens 0 to 5 are names, 6 fills and 7 ends; `IO S1 6 S2 7`.
    """
    eye = torch.eye(8)
    weights = {"W_E": torch.zeros(8, WIDTH), "W_pos": torch.zeros(5, WIDTH), "W_U": torch.zeros(WIDTH, 8)}
    weights["W_E"][:, D.token], weights["W_U"][D.out] = eye, eye
    weights["W_pos"][:, D.place], weights["W_pos"][:, D.one] = torch.eye(5), 1
    for layer in range(3):
        here = f"blocks.{layer}."
        weights |= {f"{here}W_{kind}": torch.zeros(1, WIDTH, HEAD) for kind in "QKV"}
        weights |= {f"{here}W_O": torch.zeros(1, HEAD, WIDTH)}
        weights |= {f"{here}W_in": torch.zeros(WIDTH, 1), f"{here}W_out": torch.zeros(1, WIDTH)}
        weights[f"{here}W_V"][0, D.token, :8] = eye
    q, k, o = ({layer: weights[f"blocks.{layer}.W_{kind}"][0] for layer in range(3)} for kind in "QKO")
    q[0][D.one, 0], k[0][D.place.start + 3, 0] = SHARP, 1
    o[0][:8, D.seen] = eye
    q[1][D.seen, :8], k[1][D.token, :8] = -SHARP * eye, eye
    q[1][D.one, 8], k[1][[D.place.start, D.place.start + 1], 8] = SHARP / 2, 1
    o[1][:8, D.moved], o[1][:8, D.out] = eye, eye
    q[2][D.moved, :8], k[2][D.token, :8] = -SHARP * eye, eye
    q[2][D.one, 8], k[2][D.place.start, 8] = SHARP / 2, 1
    q[2][D.one, 9], k[2][D.place.start + 4, 9] = SHARP / 4, 1
    o[2][:8, D.out] = eye
    bridge = native_bridge(
        weights, n_layers=3, n_heads=1, d_model=WIDTH, d_head=HEAD, d_mlp=1, n_ctx=5, d_vocab=8, d_out=8, causal=True,
        dtype=torch.float64,
    )  # fmt: skip
    return LanguageModel(bridge, "handmade-inhibited-mover")


def made_task():
    drawn = [torch.randperm(6, generator=torch.Generator().manual_seed(i))[:5] for i in range(6)]
    clean = torch.stack([torch.tensor([int(a), int(b), 6, int(b), 7]) for a, b, *_ in drawn])
    corrupt = torch.stack([torch.tensor([int(c), int(d), 6, int(e), 7]) for _, _, c, d, e in drawn])
    return given("made", clean, corrupt, clean[:, 0], clean[:, 1])


def test_heads_made_for_a_role_are_found_in_it():
    table = head_roles(inhibited_mover(), made_task()).set_index(["role", "head"])
    mover, inhibitor = table.loc["name mover", "a1.h0"], table.loc["s-inhibition", "a0.h0"]
    backup = table.loc["backup name mover", "a2.h0"]
    assert mover[["attention", "direct", "effect", "copies"]].tolist() == pytest.approx([1, 1, 0, 1], abs=1e-6)
    assert inhibitor[["attention", "direct", "copies", "feeds"]].tolist() == pytest.approx([1, 0, 0, -1], abs=1e-6)
    assert inhibitor["moves"] == pytest.approx(-1, abs=1e-6)
    assert backup[["attention", "direct", "effect", "knocked_out"]].tolist() == pytest.approx([0, 0, 0, 1], abs=1e-6)
    for role, head in (("name mover", "a1.h0"), ("s-inhibition", "a0.h0"), ("backup name mover", "a2.h0")):
        assert [h for r, h in table.index if r == role] == [head]


def test_who_writes_against_the_subject_is_a_suppressor_and_moves_no_name():
    """The same mover, made to look at S2 and to write against what it sees there."""
    model = inhibited_mover()
    with torch.no_grad():
        attention = model.bridge.blocks[1].attn
        attention.k.weight[8] = 0
        attention.k.weight[8, D.place.start + 3] = 3
        attention.o.weight[D.out] *= -1
    assert copy_scores(model, made_task())[:, 1].tolist() == [0, 1]
    table = head_roles(model, made_task())
    roles = table[table["head"] == "a1.h0"].set_index("role")
    assert "subject suppressor" in roles.index
    assert not {"name mover", "name mover through S2"} & set(roles.index)
    assert roles.loc["subject suppressor", "copies"] == 1


# beside what was published


def test_mlps_that_raise_later_years_by_hand():
    model = load_model("pocket")
    task = load_task("greater-than", model, 6, 0)
    found = mlps_that_write(model, task).set_index("mlp")
    total, by_mlp = 0.0, dict.fromkeys((f"m{layer}" for layer in range(4)), 0.0)
    names = [f"blocks.{layer}.mlp.hook_out" for layer in range(4)]
    for pair in task.tokens(model):
        logits, cache = model.run_hooked(pair.clean, read=[*names, "blocks.3.hook_out"])
        for i in range(len(pair)):
            answers, wrong = (ids[i][ids[i] >= 0] for ids in (pair.answers, pair.wrong))
            total += float(logits[i, -1, answers].mean() - logits[i, -1, wrong].mean())
            final = cache["blocks.3.hook_out"][i, -1]
            scale = (final.var(unbiased=False) + model.bridge.cfg.eps).sqrt()
            direction = model.W_U[:, answers].mean(1) - model.W_U[:, wrong].mean(1)
            for name, site in zip(by_mlp, names, strict=True):
                out = cache[site][i, -1]
                normed = (out - out.mean()) / scale * model.bridge.ln_final.weight
                by_mlp[name] += float(normed @ direction)
    expected = {name: value / abs(total) for name, value in by_mlp.items() if value / abs(total) >= 0.02}
    assert found["direct"].to_dict() == pytest.approx(expected, rel=1e-3)


def test_published_roles_stand_beside_those_found():
    found = [
        {"role": "name mover", "head": "a9.h9", "attention": 0.8, "copies": 1.0, "effect": -0.3},
        {"role": "name mover", "head": "a1.h1", "attention": 0.4, "copies": 0.5, "effect": 0.01},
    ]
    table = beside_published("ioi", ["name mover", "s-inhibition", "IO reader at S2"], found).set_index("role")
    mover = table.loc["name mover"]
    assert mover[["found", "that matter", "attention", "copies"]].tolist() == pytest.approx([2, 1, 0.6, 0.75])
    assert mover[["GPT-2 small", "their attention", "their copies"]].tolist() == [3, 0.59, 0.95]
    assert mover["source"] == "Wang et al. 2022, section 3.1"
    assert table.loc["s-inhibition", ["found", "GPT-2 small", "their attention"]].tolist() == [0, 4, 0.51]
    assert table.loc["IO reader at S2"].isna()["GPT-2 small"]


@pytest.mark.parametrize(("own", "published"), [(True, 3.0), (False, None)])
def test_published_counts_are_claims_about_their_own_model_alone(own, published):
    report, steps = Reproduction("ioi", "made", {}), []
    role_stage(report, inhibited_mover(), made_task(), ("a1.h0",), gpt2_small=own, progress=steps.append)
    (claim,) = [claim for claim in report.claims if claim.name == "heads found as name mover"]
    assert (claim.measured, claim.published) == (1, published)
    assert claim.note == ("a1.h0; 0 of those published" if own else "a1.h0")
    assert [section.title for section in report.sections] == ["Roles of heads", "Roles beside GPT-2 small's"]
    assert {"copy scores", "attention"} <= set(steps)


# the circuit by roles


def test_what_is_between_roles_is_the_metric_of_a_run_with_those_inputs_patched():
    """Query, key and value of one head read another head's corrupt output, by hooks; all else is recomputed."""
    model = random_model("gpt2", n_layers=2, d_model=16, n_heads=4, d_vocab=23, context=8, dtype=torch.float64)
    (problem,) = problems_of(model, random_task())
    part = Prepared(problem)
    clean = float(problem.metric(model.run(problem.clean)[0]).mean())
    delta = sum(part.delta[part.graph.writer_index[name]] for name in ("a0.h1", "a0.h2"))
    names = [f"blocks.1.attn.{kind}.hook_out" for kind in "qkv"]
    # A change of the stream after block 0's attention reaches block 1 alone where its MLP is given the clean output.
    other = model.run_hooked(problem.clean, read=["blocks.0.hook_out"])[1]["blocks.0.hook_out"]
    edit = {"blocks.0.hook_out": lambda value: other + delta}
    patched = model.run_hooked(problem.clean, write=edit, read=names)[1]

    def receive(name):
        def put(value):
            value = value.clone()
            value[:, :, 3] = patched[name][:, :, 3]
            return value

        return put

    logits = model.run_hooked(problem.clean, write={name: receive(name) for name in names})[0]
    made = role_circuit(problem, {"early": ["a0.h1", "a0.h2"], "late": ["a1.h3"], "none": []}, least=0.0)
    rows = made.effects.set_index(["source", "target"])
    assert rows.loc[("early", "late"), "worth"] == pytest.approx(
        (clean - float(problem.metric(logits).mean())) / abs(clean), rel=1e-9
    )
    assert set(rows.index) == {("early", "late"), ("early", "answer"), ("late", "answer")}
    assert rows["edges"].tolist() == [6, 2, 1]
    assert made.metric == pytest.approx(clean)
    arrows = {(a.source, a.target): a.weight for a in made.picture().arrows}
    assert arrows == pytest.approx(rows["worth"].to_dict())


def test_the_circuit_by_roles_of_a_known_mechanism():
    report, model, task = Reproduction("ioi", "made", {}), inhibited_mover(), made_task()
    picture_stage(report, model, task, role_stage(report, model, task, ("a1.h0",)))
    picture, section = report.picture, report.sections[-1]
    assert picture is not None
    heads = {box.id: box.detail for box in picture.boxes if box.kind == "group"}
    assert heads == {
        "s-inhibition": "a0.h0 · at END",
        "name mover": "a1.h0 · at END",
        "backup name mover": "a2.h0 · at END",
    }
    by = {(a.source, a.target): a for a in picture.arrows if not a.looks}
    assert by["s-inhibition", "name mover"].note == "q"
    assert by["name mover", "answer"].weight > 0
    assert ("s-inhibition", "answer") not in by
    looks = {(a.source, a.target): a.weight for a in picture.arrows if a.looks}
    assert looks["place: S2", "s-inhibition"] == pytest.approx(1.0, abs=0.01)
    assert looks["place: IO", "name mover"] > 0.5
    assert "“s-inhibition” → “name mover” → the answer" in section.text
    assert section.figure is not None
    with pytest.raises(InputError, match=r"'a0\.h0' has two roles"):
        role_circuit(problems_of(model, task), {"a": ["a0.h0"], "b": ["a0.h0"]})
    with pytest.raises(InputError, match="called 'answer'"):
        role_circuit(problems_of(model, task), {"answer": ["a0.h0"]})


def test_stages_are_lines_of_the_error_stream_without_a_terminal(capsys):
    with told("loading") as tell:
        tell("ioi: behaviour [0]")
    assert capsys.readouterr() == ("", "loading\nioi: behaviour [0]\n")
