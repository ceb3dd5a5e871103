"""What a run will take is what it then takes."""

import json
import subprocess
import sys

import pytest
import torch

import transcoders as tc
from circuitsae.cli import main
from transcoders.errors import InputError
from transcoders.training.planning import available_memory

TEXT = "\n\n".join(f"document number {i} tells of the town of Austin and of a dog" for i in range(400))


def small(kind="plt", **settings):
    made = {"sae": tc.SAEConfig, "plt": tc.TranscoderConfig, "clt": tc.CLTConfig}[kind]
    return made(
        **{"features": 32, "activation": "topk", "k": 4, "tokens": 6400, "batch": 64, "context": 16, **settings}
    )


@pytest.fixture(scope="module")
def model():
    return tc.random_model(n_layers=2, d_model=16)


@pytest.fixture(scope="module")
def rows(model):
    return torch.randint(0, model.d_vocab, (300, 16), generator=torch.Generator().manual_seed(0))


def test_a_plan_names_what_is_read_and_counts_the_model(model, rows):
    plan = tc.plan(model, rows, small(), trial_seconds=0.1, evaluate_tokens=160)
    assert plan.sites["1.mlp_out"] == (model.hook(tc.Site(1, "mlp_out")), 16)
    assert (plan.steps, plan.tokens) == (100, 6400)
    # Two layers: attention 4 d², MLP 8 d², scores and mix 2 · 16 d; of 16 tokens 15 are trained on.
    products = 2 * (12 * 16 * 16 + 2 * 16 * 16)
    assert plan.flops["model"] == pytest.approx(2 * products * 6400 * 16 / 15, rel=0.05)
    assert all(seconds > 0 for seconds in plan.seconds.values())
    assert plan.flops.keys() == plan.seconds.keys() == {"model", "dictionaries", "evaluation"}
    assert json.loads(json.dumps(plan.to_json()))["peak"] == plan.peak
    assert plan.outliers is not None
    assert plan.disk_there is None


def test_nothing_is_written_and_a_run_is_what_it_would_have_been(model, rows, tmp_path):
    config = small(tokens=640)
    alone = tc.train(model, rows, config, progress=False)
    plan = tc.plan(model, rows, config, out=tmp_path / "new" / "run", trial_seconds=0.1)
    assert list(tmp_path.iterdir()) == []
    assert plan.disk_there is not None
    after = tc.train(model, rows, config, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(alone.state_dict().values(), after.state_dict().values(), strict=True))


def test_checkpoints_and_dictionaries_take_the_planned_room(tmp_path):
    x = torch.randn(600, 2, 64, generator=torch.Generator().manual_seed(0))
    config = tc.SAEConfig(features=512, activation="relu", tokens=640, batch=64, checkpoint_every=5)
    plan = tc.plan(None, x, config, out=tmp_path, trial_seconds=0.1)
    tc.train(None, x, config, out=tmp_path, progress=False)
    folder, *others = tmp_path.glob("checkpoint-*")
    assert plan.disk["checkpoints"] / (len(others) + 2) == pytest.approx(
        (folder / "state.safetensors").stat().st_size, rel=0.02
    )
    written = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert plan.disk["dictionaries"] == pytest.approx(written, rel=0.02)


def test_a_store_is_planned_by_its_path_with_the_settings_it_was_written_with(model, rows, tmp_path):
    tc.write_activations(model, rows, tmp_path / "acts", sites=["mlp_in", "mlp_out"], progress=False)
    plan = tc.plan(None, tmp_path / "acts", small(context=128), trial_seconds=0.0)
    assert (plan.steps, plan.tokens) == (100, 6400)
    with pytest.raises(InputError, match="was written with first=1; got first=2"):
        tc.plan(None, tmp_path / "acts", small(context=128, first=2), trial_seconds=0.0)


def test_a_store_is_planned_with_the_batches_that_are_read_ahead(model, rows, tmp_path):
    tc.write_activations(model, rows, tmp_path / "acts", sites=["mlp_in", "mlp_out"], progress=False)
    little, much = (
        tc.plan(None, tmp_path / "acts", small(buffer_mb=mb), trial_seconds=0.0).memory["buffer"] for mb in (0, 64)
    )
    one = 4 * 4 * 16 * 64  # a batch of 64 tokens at four sites
    assert little < much < 64 * 2**20
    assert (much - little) % one == 0


@pytest.mark.parametrize("how", ["data", "layers", "features"])
def test_each_of_several_ranks_has_its_share(model, rows, how):
    config = small(features=64, batch=256, parallel=how)
    alone, both = (tc.plan(model, rows, config, trial_seconds=0.0, ranks=n) for n in (1, 2))
    assert (alone.ranks, alone.network, both.ranks) == (1, 0, 2)
    assert both.network > 0
    assert both.flops == alone.flops
    weights = both.memory["weights"] / alone.memory["weights"]
    assert weights == (1 if how == "data" else pytest.approx(0.5, rel=0.1))
    buffer = both.memory["buffer"] / alone.memory["buffer"]  # its rows, and twice what it trains on of all of them
    assert buffer == pytest.approx({"data": 0.5, "layers": 0.5 + 1, "features": 0.5 + 2}[how], rel=0.01)


def test_a_run_that_ranks_cannot_share_is_refused_before_it_is_started(model, rows):
    with pytest.raises(InputError, match="3 ranks cannot share 32 features evenly"):
        tc.plan(model, rows, small(parallel="features"), trial_seconds=0.0, ranks=3)


def test_ranks_are_for_a_plan_alone(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["train", "pocket", "--out", str(tmp_path), "--ranks", "2"])
    assert ended.value.code == 2
    assert "--ranks 2 is for --plan" in " ".join(capsys.readouterr().err.split())


def test_a_start_is_planned_with_what_it_is(model, rows):
    start = tc.train(model, rows, small(features=48, k=6, tokens=640), progress=False)
    planned, asked = (
        tc.plan(model, rows, small(features=n, k=6), trial_seconds=0.0, start=given)
        for n, given in ((48, None), (48, start))
    )
    assert planned.memory["weights"] == asked.memory["weights"]
    with pytest.raises(InputError, match="features"):
        tc.plan(model, rows, small(features=50, k=6), trial_seconds=0.0, start=start)


def test_the_model_runs_twice_more_on_the_tokens_whose_changes_are_compared(model, rows):
    planned = tc.plan(model, rows, small(derivative=0.3, derivative_share=0.5, derivative_from=0.75), trial_seconds=0.1)
    share = planned.flops["directions"] / planned.flops["model"]
    assert 0.9 / 4 < share < 1.5 / 4  # twice a half of the batch, in whole rows and to the last block; in a quarter
    assert "directions" not in tc.plan(model, rows, small(), trial_seconds=0.1).flops


def test_losses_on_fewer_tokens_are_planned_as_such(model, rows):
    whole, some = (
        tc.plan(model, rows, small(), trial_seconds=0.0, evaluate_tokens=160_000, loss_tokens=n) for n in (None, 16_000)
    )
    assert some.flops["evaluation"] < 0.3 * whole.flops["evaluation"]


def test_what_cannot_fit_is_refused_with_the_numbers(tmp_path, monkeypatch):
    x = torch.randn(600, 16)
    plan = tc.plan(None, x, small("sae"), out=tmp_path, trial_seconds=0.1)
    plan.require_fit()
    for there, what in (("memory_there", "of memory, and 1 MB are there"), ("disk_there", "are free; make room")):
        with pytest.raises(InputError, match=what):
            type(plan)(**{**vars(plan), there: 2**20 if there == "memory_there" else 10}).require_fit()


def test_memory_is_what_the_machine_or_its_control_group_leaves(tmp_path, monkeypatch):
    free = available_memory(torch.device("cpu"))
    monkeypatch.setattr("transcoders.training.planning._CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("400000\n")
    assert available_memory(torch.device("cpu")) == 600_000 < free
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory(torch.device("cpu")) > 600_000


MEASURED = """
import sys, torch, psutil, resource
import transcoders as tc
x = torch.randn(4096, 8, 256)
config = tc.SAEConfig(features=4096, activation="relu", penalty="l1", tokens=5120, batch=512, kernels="dense")
if sys.argv[1] == "plan":
    plan = tc.plan(None, x, config, trial_seconds=3.0)
    print(plan.peak)
else:
    tc.train(None, x, config, progress=False)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.slow
def test_planned_memory_is_measured_memory_to_a_tenth(tmp_path):
    script = tmp_path / "measured.py"
    script.write_text(MEASURED)
    found = [
        int(subprocess.run([sys.executable, script, what], capture_output=True, text=True, check=True).stdout)
        for what in ("plan", "run")
    ]
    assert found[0] == pytest.approx(found[1], rel=0.1)


def test_the_command_prints_the_plan_and_trains_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("transcoders.training.entry.plan_run", _hasty(monkeypatch))
    arguments = ["train", "pocket", "--out", str(tmp_path / "run"), "--plan", "--kind", "plt", "--features", "64"]
    main([*arguments, "--tokens", "6400", "--batch", "64", "--evaluate-tokens", "640"])
    out = capsys.readouterr().out
    for line in (
        "Steps:      100, 6,400 tokens in all",
        "Memory:     about",
        "Disk:       about",
        "mlp_in:     blocks.0.",
    ):
        assert line in out
    assert "Outliers:" in out
    assert not (tmp_path / "run").exists()


def _hasty(monkeypatch):
    from transcoders.training.planning import plan_run

    return lambda *args, **options: plan_run(*args, **{**options, "trial_seconds": 0.1})
