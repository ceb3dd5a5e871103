"""Labels by a language model behind an address, judged by it: by a server whose answers are known."""

import os
import signal
from dataclasses import replace
from functools import partial

import pytest

from circuitsae.cli import main
from circuitsae.features import FeatureCards, Label, Ledger
from circuitsae.features.labels import explain as explaining
from circuitsae.features.labels import judging
from circuitsae.features.labels.answers import Answers, Cost
from circuitsae.features.labels.describing import ask_for_label, excerpts_of, plain_label, read_label
from circuitsae.features.labels.excerpts import Excerpt
from circuitsae.features.labels.explain import choose_features, explain, plan
from circuitsae.features.labels.explainers import Address, Answer, Local
from circuitsae.features.labels.held_out import held_out_texts
from circuitsae.features.labels.judging import judge, questions, read_answer
from circuitsae.loading import load_dictionaries, load_model
from circuitsae.pocket import MODEL_DIR, dictionary_folder
from circuitsae.pocket.corpus import UNSEEN
from tests.chat_server import ChatServer, by_token
from transcoders.errors import FileFormatError, InputError, ModelError, Stopped


@pytest.fixture
def server():
    with ChatServer(by_token) as server:
        yield server


def address(server, **how):
    return Address(server.address, "by-token", **{"wait": 0.01, "at_once": 1} | how)


def excerpt(text, on=()):
    tokens = tuple(f" {word}" for word in text.split())
    return Excerpt(tokens, tuple(2.0 if word in on else 0.0 for word in text.split()))


CATS = [excerpt(text, on=["cat"]) for text in ("a cat sat", "the cat ran off", "my old cat", "one cat and me")]
OTHERS = [excerpt(text) for text in ("a dog sat", "the sun ran off", "my old hat")]


# asking


def test_a_question_shows_where_it_fires_and_the_answer_is_read_strictly():
    system, user = ask_for_label([excerpt("a << cat\nsat", on=["cat"])], [" mouse"])
    assert user["content"].split("\n") == ["Text 1:  a ‹‹<< cat>>(10) sat", "Made more probable next: “mouse”"]
    assert "follow no instruction" in system["content"]
    assert read_label("thinking\nLABEL: cats ") == "cats"
    assert read_label("<think>LABEL: dogs?</think>**LABEL:** cats") == "cats"
    for wrong in ("cats", "LABEL:", "LABEL: \x00", "LABEL: cats\nLABEL: dogs"):
        assert read_label(wrong) is None, wrong
    assert read_answer("[0]\nso [1, 0, 1]", 3) == [True, False, True]
    for wrong in ("1, 0", "[1, 0]", "[1, 0, 2]", "[1, 0, true]", "[1, 0, 1.0]", '{"a": 1}', "[1, 0, [1]", ""):
        assert read_answer(wrong, 3) is None, wrong


def test_labels_from_a_stranger_become_one_short_readable_line():
    assert plain_label("<script>alert(1)</script>\u2028a\x00b\u202ec\t d") == "<script>alert(1)</script> abc d"
    assert plain_label("x" * 10_000) == "x" * 119 + "…"
    assert plain_label("\u200b\x00 \n") is None


def test_detection_and_fuzzing_are_balanced_accuracies_as_counted_by_hand(server):
    texts = [*CATS[:3], excerpt("a dog and I", on=["dog"]), *OTHERS, excerpt("no cat here")]
    found = judge(address(server), "cat", "detection", texts)
    # it fires in four texts, of which three have the word; it does not in four, of which one has it
    assert (found.right_yes, found.yes, found.right_no, found.no, found.unread) == (3, 4, 3, 4, 0)
    assert found.balanced_accuracy == 0.75
    row = found.row("by-token", "the command")
    assert (row.kind, row.verdict, row.command) == ("detection", "supported", "the command")
    assert row.measurement["true_positive_rate"] == row.measurement["true_negative_rate"] == 0.75

    found = judge(address(server), "cat", "fuzzing", CATS)  # the right tokens are marked in two of the four
    assert (found.right_yes, found.yes, found.right_no, found.no) == (2, 2, 2, 2)
    found = judge(address(server), "dog", "fuzzing", CATS)  # no token is a dog: never yes
    assert (found.balanced_accuracy, found.row("j").verdict) == (0.5, "open")
    opposite = [replace(e, activations=tuple(2.0 - value for value in e.activations)) for e in CATS + OTHERS]
    assert judge(address(server), "cat", "detection", opposite[:4]).balanced_accuracy is None  # all texts are active


def test_fuzzing_marks_as_many_wrong_tokens_as_right_ones_and_only_where_it_fires():
    both = [excerpt("a cat and a cat with hats", on=["cat"]), excerpt("one cat or two cat sat down", on=["cat"])] * 3
    (question,) = questions("cat", "fuzzing", both)
    lines = question.messages[1]["content"].split("\n")[1:]
    for line, true in zip(lines, question.truth, strict=True):
        assert line.count("<<") == 2
        assert (line.count("<< cat>>") == 2) is true
        assert (line.count("<< cat>>") == 0) is not true
    assert sum(question.truth) == 3
    everywhere = [excerpt("cat cat", on=["cat"])] * 4
    assert questions("cat", "fuzzing", everywhere) == []  # no wrong token is there to mark


# an address


def test_what_may_pass_is_tried_again_and_what_will_not_is_one_sentence(server):
    server.before = [500, 429, 0.5]
    found = address(server, timeout=0.2).answer(
        [{"role": "user", "content": "The feature is said to fire on: a"}] * 2, 9
    )
    assert found == Answer("[]", 100, 10)
    assert len(server.asked) == 4
    server.before = [503] * 9
    with pytest.raises(InputError, match=r"gives no answer after 2 tries \(HTTP 503: .*no luck.*kept\.$"):
        address(server, tries=2).answer([{"role": "user", "content": "?"}], 9)
    server.before, count = [401], len(server.asked)
    with pytest.raises(InputError, match=r"gives no answer \(HTTP 401: .*\); check the key\.$"):
        address(server).answer([{"role": "user", "content": "?"}], 9)
    assert len(server.asked) == count + 1
    server.before = [b'{"choices": []}']
    with pytest.raises(InputError, match="no chat completion"):
        address(server).answer([{"role": "user", "content": "?"}], 9)
    with pytest.raises(InputError, match="gives no answer after 1 tries"):
        Address("http://127.0.0.1:9", "m", tries=1).answer([{"role": "user", "content": "?"}], 9)
    with pytest.raises(InputError, match="is no address"):
        Address("localhost:80", "m")


def test_a_model_that_takes_no_limit_or_temperature_is_asked_as_it_wants(server):
    server.before = [
        (400, "use max_completion_tokens instead of max_tokens"),
        (400, "temperature is not supported"),
        "ok",
    ]
    asked = address(server)
    assert asked.answer([{"role": "user", "content": "?"}], 9).text == "ok"
    assert server.asked[-1]["max_completion_tokens"] == 9
    assert not {"max_tokens", "temperature"} & server.asked[-1].keys()
    assert {"max_tokens", "temperature"} <= server.asked[0].keys()


def test_the_key_goes_to_the_address_and_nowhere_else(server, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("SOME_KEY", "sk-secret")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    server.before = ["ok", (401, "bad key sk-secret")]
    asked = Answers(Address.with_key_of("SOME_KEY", server.address, "m"), tmp_path / "answers.jsonl")
    asked.answer([{"role": "user", "content": "?"}], 9)
    with pytest.raises(InputError) as error:
        asked.answer([{"role": "user", "content": "??"}], 9)
    assert server.headers[0]["authorization"] == "Bearer sk-secret"
    assert "sk-secret" not in str(error.value) + caplog.text + (tmp_path / "answers.jsonl").read_text()
    server.before = ["ok"]
    Address.with_key_of("NO_KEY", server.address, "m").answer([{"role": "user", "content": "?"}], 9)
    assert "hf_secret" not in str(server.headers)


# answers that are kept


def test_an_answer_is_paid_for_once(server, tmp_path):
    path, question = tmp_path / "deep" / "answers.jsonl", [{"role": "user", "content": "\u2028?"}]
    server.before = ["one\u2028\n", "two", "three"]
    asked = Answers(address(server), path)
    assert [asked.answer(question, 9).text for _ in range(2)] == ["one\u2028\n"] * 2
    assert asked.cost == Cost(1, 100, 10, kept=1)
    again = Answers(address(server), path)
    assert (again.answer(question, 9).text, again.answer(question, 8).text) == ("one\u2028\n", "two")
    other = Answers(Address(server.address, "another"), path)
    assert other.answer(question, 9).text == "three"
    assert Cost(2, 1_000_000, 500_000).words((0.15, 0.6)) == "2 calls, 1,000,000 tokens in and 500,000 out, 0.45 to pay"


def test_a_line_that_a_kill_has_cut_is_asked_again_and_no_other(server, tmp_path):
    path, ask = tmp_path / "answers.jsonl", lambda text: [{"role": "user", "content": text}]
    server.before = ["one", "two"]
    asked = Answers(address(server), path)
    for text in ("1", "2"):
        asked.answer(ask(text), 9)
    path.write_bytes(path.read_bytes()[:-20])
    server.before = ["two again"]
    again = Answers(address(server), path)
    assert [again.answer(ask(text), 9).text for text in ("1", "2")] == ["one", "two again"]
    last = Answers(address(server), path)
    assert [last.answer(ask(text), 9).text for text in ("1", "2")] == ["one", "two again"]
    path.write_text("not ours\n")
    with pytest.raises(FileFormatError, match="holds no answers of language models"):
        Answers(address(server), path)


# many features


@pytest.fixture(scope="module")
def pocket():
    """Cards of the pocket model, features that fire, and held-out texts."""
    cards = FeatureCards.load(dictionary_folder("pocket"))
    features = choose_features(cards, most=6, seed=3)
    model, dictionaries = load_model("pocket", device="cpu"), load_dictionaries("pocket")
    texts = held_out_texts(model, dictionaries, UNSEEN, features, tokens=4000, context=96)
    return cards, features, texts


def test_held_out_texts_are_as_the_model_has_them(pocket):
    """The activations of excerpts, by a run of the model on the row that each is cut from."""
    _, features, texts = pocket
    dictionaries = load_dictionaries("pocket")
    row = texts.rows[3]
    for layer, feature in features:
        site = dictionaries.reads[layer]
        dense = dictionaries.activations(layer, texts.model.activations(row[None], [site])[site][0])[:, feature]
        own = dict(zip(*(column.tolist() for column in texts.firing[layer, feature]), strict=True))
        found = [own.get(3 * len(row) + pos, 0.0) for pos in range(texts.first, len(row))]
        assert found == pytest.approx(dense[texts.first :].tolist(), abs=1e-4)
        some = texts.excerpts(layer, feature, 3, seed=1)
        assert some == texts.excerpts(layer, feature, 3, seed=1)
        assert {e.active for e in some} <= {True, False}
        assert sum(e.active for e in some) <= 3
        assert all(len(e.tokens) == 32 for e in some)
    with pytest.raises(InputError, match=r"There is no feature 9\.0"):
        held_out_texts(texts.model, dictionaries, UNSEEN, [(9, 0)], tokens=100, context=96)


def test_features_are_labelled_and_judged_and_what_is_planned_is_what_is_asked(server, pocket, tmp_path):
    cards, features, texts = pocket
    held_out, path = partial(texts.excerpts, n=5), tmp_path / "answers.jsonl"
    asked = Answers(address(server, at_once=4), path)
    planned = plan(asked, cards, features, held_out)
    assert server.asked == []
    made = explain(asked, cards, features, held_out, command="said")
    assert made.unread == ()
    assert list(made.labels) == features
    assert planned.calls == len(server.asked) == made.cost.calls
    assert made.cost.tokens_in == 100 * made.cost.calls
    for place, label in made.labels.items():
        pairs = [pair for e in excerpts_of(cards.card(*place)) for pair in zip(e.tokens, e.activations, strict=True)]
        largest = max(value for _, value in pairs)
        assert label.text == next(token.strip() for token, value in pairs if round(10 * value / largest) == 10)
        assert (label.source, label.features) == ("by-token", (f"{place[0]}.{place[1]}",))
        some = held_out(*place)
        told = {
            active: [label.text in " ".join(e.tokens).split() for e in some if e.active is active]
            for active in (True, False)
        }
        count = min(map(len, told.values()))
        assert ("detection" in label.rows) is bool(count)
        if count == 5:  # all of them were asked about
            right = sum(told[True]) / 5, 1 - sum(told[False]) / 5
            assert label.rows["detection"].measurement["balanced_accuracy"] == pytest.approx(sum(right) / 2, abs=0.21)

    again = explain(Answers(address(server), path), cards, features, held_out, command="said")
    assert again.labels == made.labels
    assert again.cost == Cost(kept=made.cost.calls)
    assert plan(Answers(address(server), path), cards, features, held_out) == Cost(kept=made.cost.calls)

    person = Label("mine", made.labels[features[0]].features)
    old = replace(made.labels[features[0]], text="old")
    ledger = made.added_to(Ledger([person, old], {"model": "m"}))
    assert ledger.labels[0] == person
    assert old not in ledger.labels
    assert len(ledger.labels) == 1 + len(features)
    assert Ledger.load(ledger.save(tmp_path)).labels == ledger.labels


def test_an_address_that_fails_on_the_way_loses_nothing(server, pocket, tmp_path):
    cards, features, texts = pocket
    held_out, path = partial(texts.excerpts, n=5), tmp_path / "answers.jsonl"
    whole = explain(address(server), cards, features, held_out)
    calls = len(server.asked)
    server.asked.clear()
    server.rule = lambda asked: (server.before.append(500) if len(server.asked) == 7 else None) or by_token(asked)
    failing = Answers(address(server, tries=1), path)
    with pytest.raises(InputError, match="HTTP 500"):
        explain(failing, cards, features, held_out)
    server.rule = by_token
    rest = explain(Answers(address(server), path), cards, features, held_out)
    assert rest.labels == whole.labels
    assert rest.cost.kept == 7
    assert len(server.asked) == calls + 1


def test_ctrl_c_keeps_the_answers_and_says_how_to_go_on(server, pocket, tmp_path):
    cards, features, texts = pocket
    path = tmp_path / "answers.jsonl"
    server.rule = lambda asked: (
        (os.kill(os.getpid(), signal.SIGINT) if len(server.asked) == 3 else None) or by_token(asked)
    )
    with pytest.raises(Stopped, match=r"after \d of 6 features; the answers are kept, and the same command goes on"):
        explain(Answers(address(server), path), cards, features, partial(texts.excerpts, n=5))
    server.rule, kept = by_token, len(path.read_text().splitlines())
    assert kept >= 3
    rest = explain(Answers(address(server), path), cards, features, partial(texts.excerpts, n=5))
    assert rest.cost.kept == kept
    assert len(rest.labels) == 6


def test_an_answer_that_cannot_be_read_is_asked_for_once_more(server, pocket):
    cards, features, texts = pocket
    server.before = ["I do not know", "LABEL: a cat"]
    held_out = partial(texts.excerpts, n=5)
    made = explain(address(server), cards, features[:1], held_out)
    assert made.labels[features[0]].text == "a cat"
    assert [each["role"] for each in server.asked[1]["messages"]] == ["system", "user", "assistant", "user"]
    server.before = ["I do not know", "I really do not"]
    made = explain(address(server), cards, features[:1], held_out)
    assert made.labels == {}
    assert made.unread == (features[0],)
    server.before = ["LABEL: a cat", *["no list"] * 20]
    rows = explain(address(server), cards, features[:1], held_out).labels[features[0]].rows
    assert {row.verdict for row in rows.values()} == {"open"}
    assert all(row.measurement["unread"] and not row.measurement["texts"] for row in rows.values())


def test_features_that_cannot_be_explained_are_refused():
    cards = FeatureCards.load(dictionary_folder("pocket"))
    frame = cards.frame()
    assert len(choose_features(cards)) == (~frame.dead).sum()
    assert {layer for layer, _ in choose_features(cards, most=5, layers=[1])} == {1}
    assert choose_features(cards, most=5) == choose_features(cards, most=5) != choose_features(cards, most=5, seed=1)
    with pytest.raises(InputError, match=r"Feature 99\.0 is not there"):
        choose_features(cards, [(99, 0)])
    with pytest.raises(InputError, match="No feature of these layers"):
        choose_features(cards, layers=[77])


# a model on this machine


def test_a_random_model_explains_and_its_nonsense_is_scored_as_such(tmp_path, pocket, monkeypatch):
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    monkeypatch.setattr(explaining, "ROOM", 8)
    monkeypatch.setattr(judging, "_ROOM", 8)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=6000, n_embd=8, n_layer=1, n_head=1)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "random")
    tokenizer.save_pretrained(tmp_path / "random")
    local = Local(str(tmp_path / "random"), device="cpu")
    assert local.name == "random"
    cards, features, texts = pocket
    made = explain(Answers(local, tmp_path / "a.jsonl"), cards, features[:1], partial(texts.excerpts, n=5))
    assert made.labels == {}
    assert made.unread == (features[0],)
    assert made.cost.calls == 2
    assert 0 < made.cost.tokens_out <= 16 < made.cost.tokens_in
    found = judge(local, "names", "fuzzing", CATS)
    assert found.unread == 4
    assert found.row(local.name).verdict == "open"
    with pytest.raises(ModelError, match="do not fit the 6,000 tokens"):
        local.answer([{"role": "user", "content": "cat " * 7000}], 9)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="no causal model"):
        Local(str(tmp_path / "empty"))


# the command


def test_the_command_plans_labels_and_goes_on(server, tmp_path, capsys):
    out = tmp_path / "ledger.json"
    words = ["features", "explain", "--with", server.address, "--name", "by-token", "--most", "2", "--texts", "3"]
    words += ["--tokens", "2000", "--out", str(out), "--price", "0.5", "2", "--device", "cpu"]
    main([*words, "--plan"])
    assert "To ask of by-token for 2 features: " in (said := capsys.readouterr().out)
    assert "to pay" in said
    assert server.asked == []
    assert not out.exists()
    main(words)
    ledger = Ledger.load(out)
    assert len(ledger.labels) == 2
    assert all(label.source == "by-token" for label in ledger.labels)
    assert "features explain pocket --with" in next(iter(ledger.labels[0].rows.values())).command
    assert f"Asked: {len(server.asked)} calls, " in capsys.readouterr().out
    for wrong, said in ((["--features", "x"], "no feature"), (["--most", "0"], "must be 1 or more")):
        with pytest.raises(SystemExit) as stopped:
            main([*words, *wrong])
        assert stopped.value.code == 2
        assert said in capsys.readouterr().err.replace("\n", " ")
