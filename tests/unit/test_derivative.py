"""The derivative as a target: its loss against autograd, its directions against the model, and training for it."""

from dataclasses import replace

import pytest
import torch

from tests.unit.test_training_gradients import BATCH, D_MODEL, N_LAYERS, build, draw
from transcoders import CLTConfig, TranscoderConfig, TranscoderSet, random_model, train
from transcoders.data.chunks import Chunk
from transcoders.errors import InputError
from transcoders.held import HeldModel, held_hooks
from transcoders.sites import Site
from transcoders.training import Trainer
from transcoders.training.batches import ModelSource
from transcoders.training.config_reading import config_of
from transcoders.training.derivative import Directions, Nudges, derivative_loss

KINDS = [
    ("plt", {"activation": "topk", "skip": True}),
    ("plt", {"activation": "gated"}),
    ("plt", {"activation": "jumprelu", "aligned": True}),
    ("clt", {"activation": "batchtopk"}),
    ("clt", {"activation": "jumprelu", "skip": True, "skip_rank": 2}),
    ("clt", {"activation": "gated", "skip": True}),
]


def directions():
    sides = (draw(N_LAYERS, BATCH, D_MODEL, seed=seed) for seed in (5, 6, 7))
    made = Directions(*sides)
    made.responses[1, 3] *= 1e-5  # a change that does not reach this token
    return made


@pytest.mark.parametrize("along", [0.0, 0.5], ids=["", "along"])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize(
    ("kind", "options"), KINDS, ids=lambda x: x if isinstance(x, str) else "-".join(map(str, x.values()))
)
def test_the_loss_is_autograds_derivative_of_the_reconstruction(kind, options, sparse, along):
    config, built = build(kind, {**options, "derivative_along": along})
    given = directions()

    def reconstruct(reads):
        return built.reconstruct(built.activate(built.pre_activations(reads)), reads)

    _, passed_on = torch.autograd.functional.jvp(reconstruct, given.reads, given.changes, strict=True)
    assert isinstance(passed_on, torch.Tensor)
    size = given.responses.square().sum(-1)
    missed = (passed_on - given.responses).square().sum(-1) / size
    missed = missed + along * (1 - (passed_on * given.responses).sum(-1) / size) ** 2
    expected = torch.stack([missed[0].mean(), missed[1][torch.arange(BATCH) != 3].mean(), missed[2].mean()])
    found = derivative_loss(built, given, config, sparse=sparse)
    torch.testing.assert_close(found.detach(), expected.detach())
    found.mean().backward()
    trained = [weight for weight in (built.W_enc, *built.W_dec, built.W_skip, built.W_skip_out) if weight is not None]
    assert all(weight.grad is not None and bool(weight.grad.any()) for weight in trained)


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model(request):
    return random_model(request.param, n_layers=3, d_model=8, n_heads=2, d_vocab=30, context=16, seed=1).to("float64")


def sites(model, kind):
    return [Site(layer, kind) for layer in range(model.n_layers)]


def held(model):
    rows = torch.randint(0, 30, (2, 7), generator=torch.Generator().manual_seed(0))
    return HeldModel(model, rows, sites(model, "mlp_in"), sites(model, "mlp_out"))


def test_a_nudge_is_the_derivative_with_patterns_and_scales_held(model):
    at = held(model)
    embed, written = draw(2, 7, 8, seed=1), draw(3, 2, 7, 8, seed=2)
    patterns = {name: (lambda _, value=value: value) for name, value in at.constants.items()}
    assert set(patterns) == set(held_hooks(model))

    def run(embed, written):
        """Reads, and writes before anything is added: one layer of writes is the model's own, a sum the other's."""
        seen = {}
        edits = {"embed.hook_out": lambda value: at.embed + embed}
        for layer in range(3):
            read, wrote = (model.hook(Site(layer, kind)) for kind in ("mlp_in", "mlp_out"))
            edits[read] = lambda value, layer=layer: seen.__setitem__(("r", layer), value)

            def add(value, layer=layer):
                seen["w", layer] = value
                return value + written[layer]

            edits[wrote] = add
        model.run_hooked(at.rows, write=patterns | edits)
        return torch.stack([seen["r", i] for i in range(3)]), torch.stack([seen["w", i] for i in range(3)])

    zero = torch.zeros_like(embed), torch.zeros_like(written)
    _, (reads, writes) = torch.autograd.functional.jvp(run, zero, (embed, written))
    found, rough = at.nudge(embed, written, size=1e-5), at.nudge(embed, written, size=1e-7, central=False)
    for changes in (found, rough):
        torch.testing.assert_close(changes.reads, reads, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(changes.writes, writes, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(at.respond(reads, size=1e-4), writes, rtol=1e-4, atol=1e-5)


def test_a_replacement_that_answers_as_the_mlps_do_changes_what_is_read_alike(model):
    at = held(model)
    embed = draw(2, 7, 8, seed=1)
    exact = at.nudge(embed, size=1e-4)
    torch.testing.assert_close(
        at.through(lambda layer, change: exact.writes[layer], embed), exact.reads, rtol=1e-4, atol=1e-5
    )
    without = at.through(lambda layer, change: torch.zeros_like(change), embed)
    torch.testing.assert_close(without[0], exact.reads[0], rtol=1e-4, atol=1e-5)
    assert float((without[2] - exact.reads[2]).abs().max()) > 1e-2


def chunk(rows=20, width=9):
    tokens = torch.randint(0, 30, (rows, width), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(width).repeat(rows, 1)
    positions[-4:, 6:] = -1  # shorter rows, filled up
    return Chunk(0, 0, tokens, positions)


CONFIG = TranscoderConfig(
    features=24,
    activation="topk",
    k=3,
    batch=64,
    tokens=64 * 40,
    context=9,
    lr=1e-2,
    derivative=1.0,
    derivative_from=0.0,
    log_every=40,
)


def test_directions_are_what_the_model_answers_and_the_same_again(model):
    nudges = Nudges(model, sites(model, "mlp_in"), sites(model, "mlp_out"), [CONFIG])
    found, again, other = (nudges.of(step, chunk()) for step in (3, 3, 4))
    assert found.reads.shape[1] <= 2 * 8 == 2 * (9 - CONFIG.first)  # a quarter of the batch, in whole rows
    for side, same, differs in zip(found, again, other, strict=True):
        assert torch.equal(side, same)
        assert side.shape != differs.shape or not torch.equal(side, differs)
    reached = found.changes.norm(dim=-1) > 0
    assert float(reached.double().mean()) > 0.3
    for layer in range(3):  # each by itself, through the MLP alone
        mlp = model.parts.blocks[layer].mlp
        read, change = found.reads[layer][None], found.changes[layer][None]
        expected = (mlp(read + 1e-5 * change) - mlp(read - 1e-5 * change))[0] / 2e-5
        torch.testing.assert_close(found.responses[layer], expected, rtol=2e-3, atol=2e-3 * float(expected.abs().max()))


def test_tokens_over_a_limit_and_what_fills_rows_up_are_left_out(model):
    sides = sites(model, "mlp_in"), sites(model, "mlp_out")
    everything = Nudges(model, *sides, [replace(CONFIG, batch=1000)]).of(0, chunk())
    assert everything.reads.shape[1] == 16 * 8 + 4 * 5
    norm = everything.reads[1].norm(dim=-1)
    limit = float(norm.median())
    kept = Nudges(model, *sides, [replace(CONFIG, batch=1000)], limits={sides[0][1]: limit}).of(0, chunk())
    assert kept.reads.shape[1] == int((norm <= limit).sum())


@pytest.fixture(scope="module")
def small():
    return random_model(n_layers=3, d_model=8, n_heads=2, d_vocab=30, context=16, seed=1)


@pytest.fixture(scope="module")
def text():
    return torch.randint(0, 30, (120, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        CLTConfig(
            features=24, batch=64, tokens=64 * 40, context=9, lr=1e-2, log_every=40, skip=True, derivative_from=0.0
        ),
    ],
    ids=["plt", "clt"],
)
def test_training_for_the_derivative_brings_it_nearer(small, text, config):
    def last(derivative):
        trainer = Trainer(ModelSource(small, text, each := replace(config, derivative=derivative)), [each])
        trainer.run(progress=False)
        (run,) = trainer.runs
        return run, trainer.source

    trained, source = last(1.0)
    assert trained.metrics(40)["derivative"] == pytest.approx(sum(trained.metrics(40)["derivative_per_layer"]) / 3)
    plain, _ = last(0.0)
    assert "derivative" not in plain.metrics(40)
    given = Nudges(small, *source.sites(config), [replace(config, batch=1000)]).of(999, chunk())
    far, near = (
        derivative_loss(run.weights, given.scaled(run.scales.read, run.scales.write), config).mean()
        for run in (plain, trained)
    )
    assert near.item() < 0.95 * far.item()


@pytest.mark.parametrize("extra", [0.0, 0.5])
def test_what_is_passed_on_is_shorter_by_its_cosine_unless_the_extra_weight_keeps_it_long(extra):
    """Of a skip term alone, where J v is along v as far as the cosine says and noise besides."""
    config, built = build("plt", {"activation": "topk", "skip": True, "derivative_along": extra})
    for weight in built.W_dec:
        weight.data.zero_()
    assert built.W_skip is not None
    skip = built.W_skip.data
    cosine, unit = 0.7, torch.nn.functional.normalize
    changes = unit(draw(N_LAYERS, 500, D_MODEL, seed=5), dim=-1)
    noise = draw(N_LAYERS, 500, D_MODEL, seed=6)
    noise = unit(noise - (noise * changes).sum(-1, keepdim=True) * changes, dim=-1)
    given = Directions(torch.zeros_like(changes), changes, cosine * changes + (1 - cosine**2) ** 0.5 * noise)

    def loss(size):
        skip.copy_(size * torch.eye(D_MODEL))
        return derivative_loss(built, given, config).mean().item()

    lengths = torch.linspace(0.5, 1.2, 701).tolist()
    best = (1 + extra) * cosine / (1 + extra * cosine**2)
    assert min(lengths, key=loss) == pytest.approx(best, abs=1e-3)


def test_a_run_that_was_cut_goes_on_to_the_very_weights(small, text, tmp_path):
    config = replace(CONFIG, derivative_from=0.5, checkpoint_every=10)
    whole = train(small, text, config, out=tmp_path / "whole", progress=False)
    cut = tmp_path / "cut"
    Trainer(ModelSource(small, text, config), [config], out=cut).run(until=30, progress=False)
    resumed = train(small, text, config, out=cut, resume=True, progress=False)
    assert isinstance(whole, TranscoderSet)
    assert isinstance(resumed, TranscoderSet)
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name


def test_where_there_is_no_mlp_to_compare_with(small, text):
    vectors = torch.randn(200, 3, 8)
    coarse = random_model(n_layers=1, d_model=8, n_heads=2, d_vocab=30, context=16).to("bfloat16")
    with pytest.raises(InputError, match=r"derivative=1 compares the dictionary with the MLPs themselves"):
        train(None, (vectors, vectors), CONFIG, progress=False)
    with pytest.raises(InputError, match="has no setting 'derivative'"):
        config_of("sae", derivative=1.0)
    with pytest.raises(InputError, match="differences between activations, which bfloat16 is too coarse for"):
        train(coarse, text, CONFIG, progress=False)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"derivative": -1.0}, "derivative must be at least 0; got -1.0"),
        ({"derivative_along": -0.5}, "derivative_along must be at least 0; got -0.5"),
        ({"derivative_share": 2.0}, "derivative_share is a fraction, from 0 to 1; got 2.0"),
        ({"skip_rank": 2}, "skip_rank is for a skip term, and there is none"),
        ({"skip": True, "skip_rank": 0}, "skip_rank must be at least 1; got 0"),
        ({"skip_penalty": 0.1}, "skip_penalty is for a skip term, and there is none"),
    ],
)
def test_settings_that_mean_nothing(settings, says):
    with pytest.raises(InputError, match=says):
        replace(CONFIG, **settings)
