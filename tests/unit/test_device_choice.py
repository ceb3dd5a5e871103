"""Which device `auto` is, by a table that is measured or built in; what `doctor --tune` writes, and what is refused."""

import json
import math

import pytest
import torch
from rich.console import Console

import circuitsae as cs
from circuitsae import doctor, tuning
from circuitsae.interventions.passes import worth_launches
from circuitsae.pocket import MODEL_DIR
from transcoders import devices, loading
from transcoders.devices import BUILT_IN, WORKS, Line, choose_device, line_of, read_table, table_path, write_table
from transcoders.dictionaries import random_dictionaries
from transcoders.errors import InputError, ModelError
from transcoders.random_models import random_model
from transcoders.training.distributed import device_of_rank

CPU, ELSEWHERE = torch.device("cpu"), torch.device("meta")


@pytest.fixture(autouse=True)
def own_table(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.fixture
def accelerator(monkeypatch):
    """The meta device in the place of a GPU: it takes everything and computes nothing."""
    for module in (devices, loading, tuning):
        monkeypatch.setattr(module, "accelerators", lambda: [ELSEWHERE])
    monkeypatch.setattr(devices, "device_name", lambda device: f"a {device.type}")


def line(least: float = 5e6, **changes) -> Line:
    settings = {"sparse_below": 0.2, "sparse_from": 1024, "measured": "today", **changes}
    return Line(parameters=dict.fromkeys(WORKS, least), **settings)


def test_what_is_named_is_taken_and_without_an_accelerator_auto_is_the_cpu(monkeypatch):
    monkeypatch.setattr(devices, "accelerators", list)
    assert choose_device("cuda:1") == torch.device("cuda:1")
    assert choose_device() == choose_device(None, parameters=1e12) == CPU


def test_small_models_stay_on_the_cpu_by_what_was_measured(accelerator):
    least = BUILT_IN["cuda"].parameters["attribution"]
    assert [choose_device(parameters=size) for size in (least / 2, least, None)] == [CPU, ELSEWHERE, ELSEWHERE]
    write_table({ELSEWHERE: Line(**{**vars(line(5e6)), "parameters": {"attribution": 5e6, "training": math.inf}})})
    assert [choose_device(parameters=size) for size in (4e6, 6e6)] == [CPU, ELSEWHERE]
    assert choose_device(parameters=1e12, work="training") == CPU
    assert line_of(CPU) == BUILT_IN["cpu"]


def test_mps_is_not_asked_for_float64(monkeypatch):
    monkeypatch.setattr(devices, "accelerators", lambda: [torch.device("mps")])
    assert choose_device(dtype=torch.float64) == CPU
    assert choose_device().type == "mps"


def test_the_table_is_kept_by_device_and_torch(accelerator):
    path = write_table({ELSEWHERE: line(math.inf)})
    write_table({CPU: line(0.0)})
    assert path == table_path()
    stored = json.loads(path.read_text())
    assert all(torch.__version__ in key for key in stored)
    assert len(stored) == 2
    assert line_of(ELSEWHERE) == line(math.inf)
    assert line_of(CPU).sparse_from == 1024


@pytest.mark.parametrize("text", ["", "[1]", '{"a": 1}', '{"a": {"parameters": {}}}'])
def test_a_damaged_table_is_named_and_what_is_built_in_holds(text, caplog):
    table_path().parent.mkdir(parents=True)
    table_path().write_text(text)
    assert read_table() == {}
    assert line_of(CPU) == BUILT_IN["cpu"]
    assert "doctor --tune" in caplog.text


def test_loaded_models_go_where_the_table_says(accelerator):
    """The pocket model is small; the place that stands for a GPU can compute nothing, so nothing is loaded there."""
    assert cs.load_model("pocket").device == CPU
    write_table({ELSEWHERE: line(0.0)})
    assert loading.device_for(MODEL_DIR) == ELSEWHERE
    assert cs.load_model("pocket", device="cpu").device == CPU


def test_sizes_are_read_from_the_configuration():
    gpt2 = {"n_embd": 768, "n_layer": 12, "vocab_size": 50257}
    assert loading._parameters(gpt2) == pytest.approx(124e6, rel=0.02)
    assert loading._parameters({"text_config": {"hidden_size": 4, "num_hidden_layers": 1}}) == 192
    assert loading._parameters({"model_type": "own"}) is None


def test_a_device_that_is_not_there_is_refused_in_one_sentence():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    for call in (lambda: cs.load_model("pocket", device="cuda"), lambda: loading.device_for("x", "cuda")):
        with pytest.raises(ModelError, match=r"^The device 'cuda' cannot be used here \(.*\); give 'auto' or 'cpu'.$"):
            call()
    with pytest.raises(InputError, match="'gpu' cannot be used here"):
        cs.load_dictionaries("pocket", device="gpu")


def test_dictionaries_follow_the_model():
    model = random_model("gpt2", n_layers=2, d_model=16, n_heads=2, d_vocab=32)
    dictionaries = random_dictionaries("plt", n_layers=2, d_model=16, features=8)
    model.bridge.to(ELSEWHERE)
    from transcoders.dictionaries import fitted

    assert fitted(dictionaries, model).decoder_bias(0).device == ELSEWHERE


def test_ranks_share_gpus_only_where_each_has_one(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for count, device in ((2, "cuda:1"), (1, "cpu")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        assert device_of_rank("auto") == device
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert device_of_rank("auto") == "auto"


def test_a_crossover_lies_between_the_sizes_around_it():
    sizes = [1e6, 4e6, 1e8]
    assert tuning.crossover(sizes, [False, False, True]) == 2e7
    assert tuning.crossover(sizes, [True, False, True]) == 2e7
    assert tuning.crossover(sizes, [True, True, True]) == 0
    assert tuning.crossover(sizes, [True, True, False]) == math.inf


def test_tuning_compares_every_size_on_every_device(accelerator, monkeypatch):
    """Clocks that say: the accelerator takes one second whatever the work, the CPU more with every size."""
    cost = {shape.layers: 0.4 * number for number, shape in enumerate(tuning.SHAPES, start=1)}
    made = {work: lambda shape, device: shape for work in WORKS}
    monkeypatch.setattr(tuning, "_WORKS", made)
    monkeypatch.setattr(tuning, "_seconds", lambda shape, device: cost[shape.layers] if device == CPU else 1.0)
    monkeypatch.setattr(tuning, "_dense_is_faster", lambda config, device: config.k > 64 or config.features < 512)
    monkeypatch.setattr(tuning, "_launch_work", lambda device: 1e9 if device == CPU else 5e10)
    found = tuning.tune()
    assert [found[device].launch_work for device in (CPU, ELSEWHERE)] == [1e9, 5e10]
    _, second, third, _ = (shape.parameters for shape in tuning.SHAPES)
    assert found[ELSEWHERE].parameters == dict.fromkeys(WORKS, math.sqrt(second * third))
    assert found[CPU].parameters == {}
    assert found[CPU].sparse_below == pytest.approx(math.sqrt(64 * 128) / tuning.WIDTH)
    assert found[CPU].sparse_from == round(math.sqrt(256 * 512))


def test_work_of_each_kind_can_be_timed():
    for work in tuning._WORKS.values():
        assert tuning._seconds(work(tuning.SHAPES[0], CPU), CPU) > 0


def test_what_a_pass_costs_whatever_its_rows_is_timed_and_used(monkeypatch):
    monkeypatch.setattr(tuning, "MANY", 8)
    per_row = tuning.TOKENS * tuning.PASS.parameters / tuning.PASS.layers
    assert tuning._fixed(3.0 + tuning.FEW / 2, 3.0 + tuning.MANY / 2) == pytest.approx(6)
    assert tuning._fixed(1.0, 0.9) == tuning.MANY
    assert 0 <= tuning._launch_work(CPU) < 100 * tuning.MANY * per_row
    model = random_model(d_model=32)
    write_table({CPU: line(launch_work=12 * 32**2 * 77.0)})
    assert worth_launches(model) == 77


def test_doctor_shows_the_table_in_force(monkeypatch):
    monkeypatch.setattr(devices, "accelerators", list)
    console = Console(record=True, width=160)
    doctor._show_devices(console)
    text = console.export_text()
    assert "built in" in text
    assert "No accelerator: --device auto is cpu." in text
    assert "devices.json" in text


def test_doctor_measures_and_keeps(accelerator, monkeypatch):
    monkeypatch.setattr(tuning, "tune", lambda say: {CPU: line(0.0), ELSEWHERE: line(3e6)})
    console = Console(record=True, width=160)
    doctor.tuned(console)
    doctor._show_devices(console)
    text = console.export_text()
    assert "3 M" in text
    assert "today" in text
    assert line_of(ELSEWHERE) == line(3e6)
