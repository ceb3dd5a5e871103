"""Prompt pairs from files: one's own, those others published, and what is wrong with bad ones."""

import json
from pathlib import Path

import pytest

from circuitsae.tasks import behaviour, load_task, read_examples, write_examples
from transcoders.errors import FileFormatError, InputError, PromptError
from transcoders.language_model import LanguageModel

GOOD = {"clean": "John saw Mary", "corrupt": "Mary saw Mary", "answers": [" saw"]}


@pytest.fixture(scope="module")
def files(shared: Path) -> Path:
    folder = shared / "data" / "tasks"
    if not folder.is_dir():
        pytest.skip(f"needs the published task files in {folder}, which are absent")
    return folder


def test_published_ioi_answers_are_the_ids_of_the_file(files: Path, gpt2_tokens: LanguageModel) -> None:
    import pandas as pd

    task = load_task(files / "ioi_gpt2.csv", gpt2_tokens)
    table = pd.read_csv(files / "ioi_gpt2.csv")
    assert len(task) == len(table) == 1000
    for pair in task.tokens(gpt2_tokens):
        rows = table.iloc[pair.index.tolist()]
        assert pair.answers[:, 0].tolist() == rows["correct_idx"].tolist()
        assert pair.wrong[:, 0].tolist() == rows["incorrect_idx"].tolist()
        assert (pair.clean != pair.corrupt).nonzero()[:, 1].tolist() == pair.roles["S2"].tolist()
    assert len({example.template for example in task.examples}) < 40
    hard = load_task(files / "ioi_gpt2.csv", gpt2_tokens, 50, seed=1, corrupt="corrupted_hard")
    for pair in hard.tokens(gpt2_tokens):
        io = pair.clean.gather(1, pair.roles["IO"][:, None])
        assert io.tolist() == pair.corrupt.gather(1, pair.roles["S2"][:, None]).tolist()


def test_published_greater_than_has_its_years(files: Path, gpt2_tokens: LanguageModel, pocket: LanguageModel) -> None:
    task = load_task(files / "greater_than_gpt2.csv", gpt2_tokens)
    assert (len(task), task.metric) == (1000, "prob_diff")
    for pair in task.tokens(gpt2_tokens):
        at = pair.clean.gather(1, pair.roles["YY"][:, None])[:, 0]
        years = [int(gpt2_tokens.token_string(int(token))) for token in at]
        assert [int(n) for n in (pair.wrong >= 0).sum(1)] == [year + 1 for year in years]
    # The same file on another model: nouns split alike in both prompts of a pair.
    frame = behaviour(pocket, load_task(files / "greater_than_gpt2.csv", pocket, 64), measures=("prob_diff",))
    assert frame["clean"].item() > 0.6


def test_published_ioi_on_pocket_refuses_or_drops_names_that_split(files: Path, pocket: LanguageModel) -> None:
    with pytest.raises(PromptError, match=r"of the 1000 examples of 'ioi_gpt2' do not fit the tokenizer of pocket"):
        load_task(files / "ioi_gpt2.csv", pocket)
    kept = load_task(files / "ioi_gpt2.csv", pocket, unfit="drop")
    assert 20 < len(kept) == 1000 - len(kept.refused)
    assert behaviour(pocket, kept, measures=("accuracy",))["clean"].item() > 0.9


def test_template_lists_with_their_words(files: Path, pocket: LanguageModel, gpt2_tokens: LanguageModel) -> None:
    path = files / "mib_ioi_templates.json"
    with pytest.raises(InputError, match=r"names given are not one token each in pocket: "):
        load_task(path, pocket)
    task = load_task(path, pocket, 80, unfit="drop", templates=["After {name_A} and {name_B} left, {name_C} ran to"])
    assert "Danielle" in task.refused
    assert all(example.clean.startswith("After ") for example in task.examples)
    names = json.loads((files / "mib_ioi_names.json").read_text())
    published = load_task(
        path, gpt2_tokens, 400, templates=[t for t in json.loads(path.read_text()) if " an " not in t]
    )
    assert {str(e.answers[0]).strip() for e in published.examples} <= set(names)
    assert sum(len(pair) for pair in published.tokens(gpt2_tokens)) == 400


def test_own_csv_and_json(tmp_path: Path, pocket: LanguageModel) -> None:
    csv = tmp_path / "mine.csv"
    csv.write_text(
        "clean,corrupted,answer,wrong,role:S1,role:S2,template\n"
        '"John and Mary ran, John gave it to","Paul and Lisa ran, Anna gave it to", Mary, John| Paul,John,John#2,t\n'
    )
    (example,) = read_examples(csv)
    assert (example.answers, example.wrong, example.template) == ((" Mary",), (" John", " Paul"), "t")
    assert example.roles == {"S1": (0, 4), "S2": (19, 23)}
    (pair,) = load_task(csv, pocket).tokens(pocket)
    assert pair.clean[0, pair.roles["S2"][0]] == pocket.token_id(" John")
    json_file = tmp_path / "mine.json"
    json_file.write_text(json.dumps({"prompts": [{**GOOD, "wrong_answers": [" ran"], "roles": {"who": "John"}}]}))
    task = load_task(json_file, pocket)
    assert task.examples[0].wrong == (" ran",)
    assert task.metric == "logit_diff"
    json_file.write_text(json.dumps([GOOD]))
    assert load_task(json_file, pocket).metric == "log_prob"


def test_built_in_tasks_written_and_read_back(tmp_path: Path, pocket: LanguageModel) -> None:
    for name in ("ioi", "greater-than", "two-hop", "docstring"):
        examples = list(load_task(name, pocket, 12).examples)
        path = write_examples(tmp_path / f"{name}.json", examples)
        read = read_examples(path)
        assert [(e.clean, e.answers, e.boundary, e.facts) for e in read] == [
            (e.clean, e.answers, e.boundary, e.facts) for e in examples
        ]
        assert [dict(e.roles) for e in read] == [dict(e.roles) for e in examples]


def _json(**changes: object) -> str:
    return json.dumps([{**GOOD, **changes}])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "x", r"neither .csv nor .json"),
        ("a.csv", b"\xff\xfe\x00", r"is not UTF-8 text \(byte 0\)"),
        ("a.csv", "", r"holds no examples"),
        ("a.csv", "clean,corrupt,answers\n", r"holds no examples"),
        ("a.csv", "prompt,answer\nhello, x\n", r"Row 1 of .* has no 'clean'; its fields are: prompt, answer"),
        ("a.csv", "clean,corrupt,answers\na b,c d, e,f\n", r"does not have the 3 fields of the header"),
        ("a.csv", "clean,corrupt,answers\na b,c d\n", r"does not have the 3 fields of the header"),
        ("a.csv", 'clean,corrupt,answers\n"a b"x,c d, e\n', r"is not CSV \(after line 1"),
        ("a.csv", "clean,corrupt,answers\na b,c d,\n", r"has no 'answers'"),
        ("a.json", "[{", r"is not JSON \(line 1, column 3"),
        ("a.json", "[]", r"holds no examples"),
        ("a.json", "3", r"should be a JSON list of objects"),
        ("a.json", '["a", "b"]', r"should be a JSON list of objects"),
        ("a.json", _json(clean=3), r"'clean' is 3, not a prompt"),
        ("a.json", _json(clean=" "), r"'clean' is ' ', not a prompt"),
        ("a.json", _json(corrupt=GOOD["clean"]), r"are the same"),
        ("a.json", _json(answers=[]), r"'answers' is \[\]; give tokens"),
        ("a.json", _json(answers=[1.5]), r"'answers' is \[1.5\]; give tokens"),
        ("a.json", _json(wrong=[" saw"]), r"' saw' is both an answer and a wrong answer"),
        ("a.json", _json(roles=["S1"]), r"'roles' is \['S1'\]; give a JSON object"),
        ("a.json", _json(roles={"S1": "Paul"}), r"role 'S1' is 'Paul', which is not in the clean prompt"),
        ("a.json", _json(roles={"S1": "John#2"}), r"role 'S1' is 'John#2'"),
        ("a.json", _json(boundary=[" a"]), r"'boundary' has 1 answers"),
        ("a.json", json.dumps([{"clean": "a", "corrupt": "b", "correct_idx": "x"}]), r"give token ids"),
        (
            "a.csv",
            "clean,corrupt,correct_idx\nThe war lasted from the year 1732 to the year 17,The war x 17,33\n",
            r"correct_idx is '33', but the prompt .* starts in 32",
        ),
    ],
)
def test_each_bad_file_gets_one_clear_sentence(name: str, content: str | bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(FileFormatError, match=message) as caught:
        read_examples(path)
    assert "\n" not in str(caught.value)


def test_what_only_the_model_can_refuse(tmp_path: Path, pocket: LanguageModel) -> None:
    path = tmp_path / "mine.json"
    with pytest.raises(FileFormatError, match="There is no task file"):
        load_task(tmp_path / "none.json", pocket)
    path.write_text(_json(corrupt="Mary saw"))
    with pytest.raises(PromptError, match="'John saw Mary' has 4 tokens but 'Mary saw' has 3"):
        load_task(path, pocket)
    path.write_text(json.dumps([{**GOOD, "answers": [" Wolfgang"]}]))
    with pytest.raises(PromptError, match="' Wolfgang' after 'John saw Mary' is not one token"):
        load_task(path, pocket)
    path.write_text(json.dumps([{"clean": "a b", "corrupt": "b b", "correct_idx": 9999}]))
    with pytest.raises(PromptError, match="9999 after 'a b' is not one token"):
        load_task(path, pocket)
    path.write_text(_json())
    with pytest.raises(InputError, match="has 1 examples that 2 cannot be drawn from"):
        load_task(path, pocket, 2)
    with pytest.raises(InputError, match="takes no option 'names'"):
        load_task(path, pocket, names=["John"])
