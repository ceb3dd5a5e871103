"""`circuitsae dictionaries` and `circuitsae convert`, and the choices that every command with dictionaries takes."""

import contextlib
import json
import logging
import re
from dataclasses import replace
from typing import Any

import pytest
import torch

import circuitsae.loading
from circuitsae.cli import main
from circuitsae.commands.shared import layers_of
from circuitsae.graph import load_graph
from circuitsae.graph.exchange import read_graph
from circuitsae.pocket import dictionary_folder
from tests.hub import cache_repository, use_cache
from tests.sample_graphs import small_graph
from transcoders import load_dictionaries, random_dictionaries, save_dictionaries
from transcoders.errors import FileFormatError, InputError

TEXT = "The capital of the state containing Dallas is Austin and John gave a drink to Mary. " * 12


@pytest.fixture
def call(monkeypatch, tmp_path, capsys):
    """Runs a command in an empty folder; what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")

    def run(*arguments):
        main([str(argument) for argument in arguments])
        return capsys.readouterr().out

    return run


@pytest.fixture
def refused(call, capsys):
    """What a command says that ends with exit code 2."""

    def run(*arguments):
        with pytest.raises(SystemExit) as left:
            call(*arguments)
        assert left.value.code == 2
        return " ".join(capsys.readouterr().err.split())

    return run


def made(kind: Any = "plt", **options: Any) -> Any:
    return random_dictionaries(kind, n_layers=4, d_model=128, features=40, seed=3, **options).requires_grad_(False)


# mix


def test_mix_puts_layers_of_several_sets_into_one(call):
    assert "runs/mixed (native)" in call("dictionaries", "mix", "runs/mixed", "0-1,3=pocket-plt", "2=pocket-sae")
    found, plt, sae = (load_dictionaries(name) for name in ("runs/mixed", dictionary_folder("pocket-plt"),
                       dictionary_folder("pocket-sae")))  # fmt: skip
    assert [str(site) for site in found.writes] == ["0.mlp_out", "1.mlp_out", "2.resid_post", "3.mlp_out"]
    for layer, own in ((3, plt), (2, sae)):
        rows = torch.arange(5)
        assert torch.equal(found.decoder_rows(layer, rows, layer), own.decoder_rows(layer, rows, layer))
    assert "mixed" in call("dictionaries", "info", "runs/mixed")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["0=pocket-plt", "0-1=pocket-sae"], "Layer 0 is named twice, for pocket-plt and pocket-sae"),
        (["pocket-plt"], "Cannot read 'pocket-plt'; write LAYERS=NAME"),
        (["7=pocket-plt"], "has layers 0 to 3, not 7"),
        (["0-3=pocket"], "cannot be taken apart"),
    ],
)
def test_mix_refuses_in_a_sentence(refused, words, message):
    assert message in refused("dictionaries", "mix", "runs/mixed", *words)


# list, info


def test_list_prints_what_a_name_offers(call):
    printed = call("dictionaries", "list", "pocket-sae")
    assert "pocket-sae: native" in printed
    assert re.search(r"│ resid_post │ sae  │ one set │", printed)
    assert "1 of 1: site resid_post" in printed


def test_list_prints_json(call):
    found = json.loads(call("dictionaries", "list", "pocket", "--json"))
    assert (found["name"], found["format"]) == ("pocket", "native")
    assert [(row["site"], row["kind"]) for row in found["dictionaries"]] == [("mlp_in", "clt")]


def test_notices_do_not_mix_with_the_json(tmp_path, monkeypatch, capfd):
    """What a program reads is on standard output alone."""
    save_dictionaries(made(), tmp_path / "d", format="circuit-tracer")
    cache_repository(tmp_path / "cache", "me/d", tmp_path / "d")
    use_cache(monkeypatch, tmp_path / "cache")
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's, beside which the command sets up none
    main(["dictionaries", "list", "me/d", "--json"])
    printed, noticed = capfd.readouterr()
    assert len(json.loads(printed)["dictionaries"]) == 4
    assert "comes from this machine's cache" in " ".join(noticed.split())


def test_what_may_be_done_next_names_what_was_chosen(call, tmp_path, monkeypatch):
    save_dictionaries(made(), tmp_path / "d", format="circuit-tracer")
    cache_repository(tmp_path / "cache", "me/d", tmp_path / "d", "v2")
    use_cache(monkeypatch, tmp_path / "cache")
    listed = call("dictionaries", "list", "me/d", "--revision", "v2", "--layers", "1-2")
    assert listed.endswith("Next:  circuitsae dictionaries info me/d --revision v2 --layers 1-2\n")
    told = call("dictionaries", "info", "me/d", "--revision", "v2", "--layers", "1-2")
    assert told.endswith("--dictionaries me/d@v2 --layers 1-2\n")


def test_an_activation_is_that_of_layers_that_are_there(call, tmp_path):
    save_dictionaries(made(activation="jumprelu"), tmp_path / "d", format="circuit-tracer")
    facts = json.loads(call("dictionaries", "info", tmp_path / "d", "--layers", "1", "--json"))
    assert (facts["layers"], facts["activation"]) == ("1", "jumprelu")


def test_list_reads_no_weights(call, tmp_path):
    save_dictionaries(made(), tmp_path / "d")
    (tmp_path / "d" / "weights.safetensors").write_bytes(b"")
    assert "mlp_in" in call("dictionaries", "list", tmp_path / "d")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere/at/all/and/more"], "nowhere"),
        (["pocket", "--site", "attn_z"], "pocket offers nothing with site=attn_z; it offers site mlp_in"),
        (["pocket", "--most", "-1"], "--most -1 is no number of dictionaries; give 0 for all"),
        (["pocket", "--revision", "v2"], "lies on this machine, where there is no revision 'v2'"),
        (["pocket", "--width", "lots"], "width='lots' is no number of features"),
        (["pocket", "--layers", "5-2"], "--layers '5-2' names no layers"),
        (["pocket", "--l0", "-3"], "l0=-3.0 is no number of active features"),
    ],
)
def test_list_refuses_in_a_sentence(refused, monkeypatch, arguments, says):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert says in refused("dictionaries", "list", *arguments)


def test_info_says_what_dictionaries_are(call, tmp_path):
    save_dictionaries(made(activation="topk", k=7, skip=True), tmp_path / "d")
    printed = call("dictionaries", "info", tmp_path / "d")
    for fact in (
        "layers +│ 0–3",
        "reads +│ mlp_in",
        "features of a layer +│ 40",
        r"activation +│ topk \(k = 7\)",
        "skip +│ yes",
    ):
        assert re.search(fact, printed), fact
    assert "--model MODEL --dictionaries" in printed.replace("\n", " ")
    assert json.loads(call("dictionaries", "info", "pocket-sae", "--json"))["kind"] == "sae"


# convert


@pytest.mark.parametrize("kind", ["plt", "clt"])
def test_convert_there_and_back_gives_the_same_dictionaries(call, tmp_path, kind):
    original = made(kind, activation="jumprelu")
    save_dictionaries(original, tmp_path / "d")
    assert "there (circuit-tracer)" in call("convert", "d", "there", "--format", "circuit-tracer")
    assert (tmp_path / "there" / "config.yaml").is_file()
    call("convert", "there", "back")
    back, reads = load_dictionaries(tmp_path / "back"), torch.randn(4, 5, 128)
    assert torch.equal(back.encode(reads).value, original.encode(reads).value)


def test_convert_stores_in_the_precision_asked_for(call, tmp_path):
    from safetensors import safe_open

    call("convert", "pocket", "half", "--storage-dtype", "bfloat16")
    with safe_open(tmp_path / "half" / "weights.safetensors", "pt") as file:
        assert (file.get_slice("W_enc").get_dtype(), file.get_slice("b_enc").get_dtype()) == ("BF16", "F32")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["pocket", "out", "--format", "lotus"],
            "Unknown format 'lotus'; dictionaries are written as native, circuit-",
        ),
        (["topk", "out", "--format", "circuit-tracer"], "--calibrate-on TEXT --model NAME"),
        (["pocket-sae", "out", "--format", "circuit-tracer"], "holds transcoders, not 'sae'"),
        (["topk", "out", "--calibrate-on", "nowhere.txt", "--model", "pocket"], "no text file at nowhere.txt"),
        (["pocket", "out", "--calibrate-on", "text.txt", "--model", "pocket"], "have 'jumprelu'"),
        (["nowhere", "out"], "nowhere"),
    ],
)
def test_convert_refuses_in_a_sentence_and_writes_nothing(refused, tmp_path, arguments, says):
    save_dictionaries(made("clt", activation="topk", k=9), tmp_path / "topk")
    (tmp_path / "text.txt").write_text("\n\n".join([TEXT] * 40))
    assert says in refused("convert", *arguments)
    assert not (tmp_path / "out").exists()


def test_convert_writes_over_nothing_unless_it_is_told_to(call, refused, tmp_path):
    save_dictionaries(made(), tmp_path / "there")
    before = (tmp_path / "there" / "weights.safetensors").read_bytes()
    assert "there is not empty; write to another, or give --overwrite" in refused("convert", "pocket-plt", "there")
    assert (tmp_path / "there" / "weights.safetensors").read_bytes() == before
    call("convert", "pocket-plt", "there", "--overwrite")
    assert load_dictionaries(tmp_path / "there").n_features(0) == load_dictionaries(
        dictionary_folder("pocket-plt")
    ).n_features(0)


def test_convert_calibrates_topk_and_prints_the_difference(call, tmp_path):
    original = made("clt", activation="topk", k=30)
    save_dictionaries(original, tmp_path / "topk")
    (tmp_path / "text.txt").write_text("\n\n".join([TEXT] * 40))
    printed = call(
        "convert", "topk", "out", "--format", "circuit-tracer", "--calibrate-on", "text.txt", "--model", "pocket",
        "--tokens", "600", "--context", "60",
    )  # fmt: skip
    rows = [[float(cell) for cell in re.findall(r"[\d.]+", line)] for line in printed.splitlines() if line[:1] == "│"]
    assert [row[0] for row in rows] == [0, 1, 2, 3]
    assert sum(row[1] for row in rows) == pytest.approx(30, abs=0.3)  # TopK over the features of all layers
    assert sum(row[2] for row in rows) == pytest.approx(30, rel=0.1)
    assert all(row[3] > 0 and row[4] > 0 for row in rows)
    assert json.loads(call("dictionaries", "info", "out", "--json"))["activation"] == "jumprelu"


# graphs


def test_convert_exports_and_imports_graphs(call, tmp_path):
    graph = small_graph()
    graph.save(tmp_path / "g")
    call("convert", "g", "g.json")
    call("convert", "g.json", "g.graphml")
    call("convert", "g.graphml", "again")
    call("convert", "g", "other.json", "--format", "eleuther")
    again = load_graph(tmp_path / "again")
    assert again.tokens == graph.tokens
    assert len(again.edges_frame()) == len(read_graph(tmp_path / "g.graphml").edges_frame()) > 1
    assert (tmp_path / "again" / "graph.html").is_file()
    assert "edges" in json.loads((tmp_path / "other.json").read_text())


def test_convert_refuses_a_dictionary_format_for_a_graph(refused, tmp_path):
    small_graph().save(tmp_path / "g")
    assert "graphs are written as neuronpedia" in refused("convert", "g", "g.json", "--format", "native")


@pytest.mark.parametrize(
    "option", [("--layers", "3"), ("--storage-dtype", "bfloat16"), ("--calibrate-on", "a.txt"), ("--revision", "v2")]
)
def test_convert_refuses_the_options_of_dictionaries_for_a_graph(refused, tmp_path, option):
    small_graph().save(tmp_path / "g")
    assert f"g is a graph, but {option[0]} is for dictionaries; leave it out" in refused(
        "convert", "g", "g.json", *option
    )
    assert not (tmp_path / "g.json").exists()


# choices


def test_layers_are_written_as_numbers_and_ranges():
    assert layers_of("12") == [12]
    assert layers_of("0-2, 8") == [0, 1, 2, 8]
    for wrong in ("", "a", "3-1", "1,,2", "-1", "1-"):
        with pytest.raises(InputError, match="names no layers"):
            layers_of(wrong)


CHOSEN = ["--sae-id", "a/b", "--layers", "0-3", "--site", "mlp_in", "--width", "1k", "--l0", "20", "--variant", "x"]
WANTED = {"sae_id": "a/b", "layers": [0, 1, 2, 3], "site": "mlp_in", "width": "1k", "l0": 20.0, "variant": "x"}


@pytest.fixture
def asked(monkeypatch):
    """What dictionaries are loaded with, at which the command ends."""
    heard = []

    def listen(name="pocket", **wanted):
        heard.append({key: value for key, value in wanted.items() if key in WANTED and value is not None})
        raise FileFormatError("That will do.")

    monkeypatch.setattr(circuitsae.loading, "load_dictionaries", listen)
    return heard


@pytest.mark.parametrize(
    "command",
    [
        ["trace", "a b c", "--dictionaries", "some/name"],
        ["intervene", "a b c", "--dictionaries", "some/name", "--feature", "0.1@1", "--zero"],
        ["evaluate", "pocket", "some/name"],
        ["steer", "a b c", "--dictionaries", "some/name", "--feature", "0.1"],
        ["features", "collect", "--dictionaries", "some/name", "--out", "cards"],
        ["dictionaries", "info", "some/name"],
        ["convert", "some/name", "out"],
    ],
    ids=lambda command: command[0],
)
def test_choices_reach_the_loader(refused, asked, command):
    assert "That will do" in refused(*command, *CHOSEN)
    assert asked == [WANTED]


def test_trace_keeps_the_choices_with_the_graph(call):
    options = ["--validate", "0", "--max-features", "5", "--out", "g", "--site", "mlp_in", "--layers", "1-2"]
    call("trace", "The capital of the state containing", "--dictionaries", "pocket-plt", *options)
    graph = load_graph("g")
    kept = {"model": "pocket", "dictionaries": "pocket-plt", "layers": "1-2", "site": "mlp_in"}
    assert graph.provenance["source"] == kept
    assert {node.layer for node in graph.nodes if node.kind.value == "feature"} <= {1, 2}


def test_validate_takes_the_choices_of_the_graph(refused, asked, tmp_path):
    kept = {"model": "pocket", "dictionaries": "some/name", **dict(zip(WANTED, CHOSEN[1::2], strict=True))}
    replace(small_graph(), provenance={"model": "pocket", "source": kept}).save(tmp_path / "g")
    for options in ([], ["--l0", "5"], ["--dictionaries", "other/name"]):
        assert "That will do" in refused("validate", "g", *options)
    assert asked == [WANTED, {"l0": 5.0}, {}]


def test_validate_says_that_the_dictionaries_are_others_than_the_graphs(call, tmp_path, caplog):
    trace = ["trace", "When John and Mary went to the store", "--out", "g", "--validate", "0", "--max-features", "5"]
    call(*trace, "--dictionaries", "pocket-plt")
    call("validate", "g", "--edges", "2", "--claims", "direct")
    assert "was traced with dictionaries" not in caplog.text
    other: Any = load_dictionaries(dictionary_folder("pocket-plt"))
    with torch.no_grad():
        other.layers[3].b_enc += 1e-3
        other.layers[3].W_enc *= 1.01
    save_dictionaries(other, tmp_path / "other")
    with contextlib.suppress(SystemExit):  # whatever is found, it was not of the graph's
        call("validate", "g", "--edges", "2", "--claims", "direct", "--dictionaries", "other")
    traced = load_graph(tmp_path / "g").provenance["dictionary_fingerprint"]
    assert f"was traced with dictionaries {traced}, but those that were loaded are" in caplog.text


def test_a_choice_of_a_graph_that_makes_no_sense_is_refused(refused, tmp_path):
    kept = {"model": "pocket", "dictionaries": "some/name", "l0": "<b>"}
    replace(small_graph(), provenance={"model": "pocket", "source": kept}).save(tmp_path / "g")
    assert "The graph names the L0 '<b>'" in refused("validate", "g")
