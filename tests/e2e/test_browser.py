"""The pages of all features, used as a reader uses them, in a real browser with nothing but files."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Page, expect

from circuitsae.features import Evidence, FeatureCards, Label, Ledger, Verdict
from circuitsae.features.cards import TOP
from circuitsae.report import browser
from circuitsae.report.browser import write_browser

OpenPage = Callable[..., Page]
HOSTILE = ["</script><b>bold</b>", "<img src=x onerror=alert(1)>", "\"'&amp;", "שלום", "👩‍🔬", "", "\u202eevil", "\n"]
WORDS = [" Rome", " Paris", "Texas", *HOSTILE]
WIDTH, BEFORE, WINDOW = 70, 2, 4


def sample_cards(seed: int = 0) -> FeatureCards:
    """Two layers of 70 features: two blocks of cards each; feature 0.0 is dead, 1.69 says every hostile text."""
    draw, n = np.random.default_rng(seed), 2 * WIDTH
    count = draw.integers(1, 5000, n)
    count[0] = 0
    largest = np.where(count > 0, draw.uniform(0.5, 9, n), 0).astype(np.float32)
    start = np.concatenate([[0], np.cumsum(np.where(count > 0, 3, 0))])
    tokens = draw.integers(1, 4, (start[-1], WINDOW))
    tokens[-3:] = np.arange(4, 4 + 12).reshape(3, 4).clip(max=len(WORDS))
    share = np.zeros((start[-1], WINDOW), np.float16)
    share[:, BEFORE] = np.tile([1, 0.9, 0.4], start[-1] // 3)
    share[-3:] = 0.5
    arrays = {
        "count": count, "mean": largest / 2, "max": largest, "histogram": np.tile(np.arange(32), (n, 1)),
        "example_start": start, "example_tokens": tokens, "example_share": share,
        "example_stratum": np.tile([TOP, TOP, 1], start[-1] // 3),
        "top_token": draw.integers(1, len(WORDS) + 1, (n, 3)), "top_value": draw.uniform(0, 1, (n, 3)),
        "bottom_token": draw.integers(1, len(WORDS) + 1, (n, 3)), "bottom_value": -draw.uniform(0, 1, (n, 3)),
        "neighbour_index": draw.integers(0, n, (n, 3)), "neighbour_score": draw.uniform(0, 1, (n, 3)),
        "nearest_index": draw.integers(0, n, (n, 3)), "nearest_score": draw.uniform(0, 1, (n, 3)),
        "input_index": np.where(np.arange(n)[:, None] < WIDTH, -1, draw.integers(0, WIDTH, (n, 2))),
        "output_index": np.where(np.arange(n)[:, None] < WIDTH, draw.integers(WIDTH, n, (n, 2)), -1),
        **{f"{side}_{part}": draw.normal(0, 1, (n, 2)) for side in ("input", "output") for part in ("twera", "weight")},
    }  # fmt: skip
    manifest = {
        "widths": [WIDTH, WIDTH], "tokens_seen": 10_000, "vocabulary": WORDS, "model": "<i>sample</i>", "kind": "clt",
        "corpus": "made up", "dead": [1, 0], "settings": {"before": BEFORE, "strata": 4},
    }  # fmt: skip
    return FeatureCards(manifest, arrays, {})


@pytest.fixture(scope="module")
def ledger() -> Ledger:
    proof = Evidence("target ablation", Verdict.SUPPORTED, {"falls_on": 1.0}, "circuitsae steer")
    return Ledger([Label("capitals", ("1.3",)).with_rows(proof), Label("<b>maybe</b>", ("0.5", "1.5"))])


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory, ledger: Ledger) -> Path:
    return write_browser(sample_cards().with_labels(ledger), tmp_path_factory.mktemp("browser"))


def names(page: Page) -> list[str]:
    return page.locator("#rows th").all_inner_texts()


def test_the_list_shows_every_feature_and_leads_to_its_card_and_back(index: Path, open_page: OpenPage):
    page = open_page(index)
    expect(page.locator("h1")).to_have_text("Features of <i>sample</i> (clt)")
    expect(page.locator("#about")).to_contain_text("10,000 tokens of made up · dead by layer: 1, 0")
    assert len(names(page)) == 2 * WIDTH
    page.locator("#query").fill("1.3")
    assert names(page) == ["1.3", *(f"1.{i}" for i in range(30, 40))]
    page.locator("#rows a").first.click()
    page.wait_for_selector("html[data-ready] .card")
    expect(page.locator("h1")).to_have_text("Feature 1.3")
    expect(page.locator(".card .label")).to_contain_text("capitals")
    assert page.locator(".examples mark.peak").count() >= 2
    page.go_back()
    page.wait_for_selector("html[data-ready]")
    assert page.locator("#query").input_value() == "1.3"
    assert len(names(page)) == 11


def test_filters_and_order_are_in_the_address(index: Path, open_page: OpenPage):
    cards = sample_cards()
    frame = cards.frame()
    page = open_page(index)
    page.locator("#dead").select_option("only")
    assert names(page) == ["0.0"]
    page.locator("#dead").select_option("no")
    page.locator("#layer").select_option("1")
    page.locator("#least").select_option("0.1")
    page.locator("#sort").select_option("often")
    often = frame[(frame.layer == 1) & (frame.firing_rate >= 0.1)]
    expected = often.iloc[np.argsort(-often.firing_rate.to_numpy(), kind="stable")]
    assert names(page) == [f"1.{feature}" for feature in expected.feature]
    page.locator("#most").select_option("0.1")
    assert names(page) == []
    expect(page.locator("#count")).to_have_text("0 of 140 features")
    page.locator("#most").select_option("")
    again = open_page(index, page.evaluate("location.hash"))
    assert names(again) == [f"1.{feature}" for feature in expected.feature]
    again.locator("#least").select_option("")
    again.locator("#layer").select_option("")
    again.locator("#status").select_option("any")
    again.locator("#sort").select_option("label")
    assert names(again) == ["1.3", "0.5", "1.5"]
    again.locator("#status").select_option("supported")
    assert names(again) == ["1.3"]
    bad = open_page(index, "#layer=%3Cb%3E&sort=__proto__&dead=perhaps&theme=pink")
    assert len(names(bad)) == 2 * WIDTH


def test_tokens_of_the_examples_and_labels_are_found(index: Path, open_page: OpenPage):
    page = open_page(index)
    page.keyboard.press("/")
    page.keyboard.type("onerror")
    assert names(page) == ["1.69"]
    page.locator("#query").fill("maybe")
    assert names(page) == ["0.5", "1.5"]
    page.locator("#query").fill("rome")
    found = names(page)
    page.locator("#query").fill("zzz")
    assert names(page) == []
    assert found == [f"{layer}.{feature}" for layer, feature in sample_cards() if fires_on(" Rome", layer, feature)]


def fires_on(token: str, layer: int, feature: int) -> bool:
    card = sample_cards().card(layer, feature)
    assert card is not None
    pairs = [pair for e in card.examples for pair in zip(e["tokens"], e["activations"], strict=True)]
    return any(text == token and activation > 0 for text, activation in pairs)


def test_hostile_texts_are_shown_as_text(index: Path, open_page: OpenPage):
    page = open_page(index.parent / "cards" / "1-1.html", "#1.69")
    expect(page.locator("h1")).to_have_text("Feature 1.69")
    for hostile in ("</script><b>bold</b>", "<img src=x onerror=alert(1)>", "שלום", "\\u202eevil"):
        expect(page.locator(".examples")).to_contain_text(hostile)
    assert page.locator("main b, main img, main i").count() == 0
    page = open_page(index, "#query=maybe")
    expect(page.locator("#rows")).to_contain_text("<b>maybe</b>")
    assert page.locator("tbody b").count() == 0


def test_links_lead_from_card_to_card_across_pages_and_keep_the_theme(index: Path, open_page: OpenPage):
    page = open_page(index.parent / "cards" / "0-0.html", "#0.63")
    page.locator("#theme").click()
    theme = page.locator("html").get_attribute("data-theme")
    page.locator("#next").click()
    expect(page.locator("h1")).to_have_text("Feature 0.64")
    assert page.url.split("/")[-1].startswith("0-1.html#0.64")
    assert page.locator("html").get_attribute("data-theme") == theme
    assert page.locator("#previous").inner_text() == "← 0.63"
    card = sample_cards().card(0, 64)
    assert card is not None
    page.locator(".similar a").first.click()
    first = card.neighbours[0]
    expect(page.locator("h1")).to_have_text(f"Feature {first['layer']}.{first['feature']}")
    page.goto(page.url.split("cards/")[0] + "cards/0-1.html#0.64")
    page.get_by_role("heading", name="outputs").locator("..").get_by_role("link").first.click()
    expect(page.locator("h1")).to_have_text(f"Feature 1.{card.outputs[0]['feature']}")
    expect(page.get_by_role("heading", name="inputs")).to_be_visible()
    expect(page.get_by_role("heading", name="outputs")).to_have_count(0)
    page.goto(page.url.split("cards/")[0] + "cards/0-0.html#0.0")
    expect(page.locator(".card")).to_contain_text("Dead")
    expect(page.locator("#previous")).to_be_hidden()
    page.locator("#back").click()
    page.wait_for_selector("#rows")


def test_links_of_the_list_keep_the_theme(index: Path, open_page: OpenPage):
    page = open_page(index, "#query=1.3")
    page.locator("#theme").click()
    theme = page.locator("html").get_attribute("data-theme")
    page.locator("#rows a").first.click()
    page.wait_for_selector("html[data-ready] .card")
    expect(page.locator("h1")).to_have_text("Feature 1.3")
    assert page.evaluate("location.hash") == f"#1.3&theme={theme}"
    assert page.locator("html").get_attribute("data-theme") == theme


def test_axe_finds_nothing(index: Path, open_page: OpenPage, flaws: Callable[[Page], list[str]]):
    assert flaws(open_page(index, "#query=1.3")) == []
    assert flaws(open_page(index.parent / "cards" / "1-0.html", "#1.3")) == []


def test_many_features_have_a_list_per_layer(tmp_path: Path, open_page: OpenPage, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(browser, "LISTED_TOGETHER", 100)
    page = open_page(write_browser(sample_cards(), tmp_path, title="Two <layers>"))
    expect(page.locator("h1")).to_have_text("Two <layers>")
    page.get_by_role("link", name="Layer 1").click()
    page.wait_for_selector("#rows th")
    assert names(page) == [f"1.{i}" for i in range(WIDTH)]
    page.locator("#rows a").first.click()
    page.wait_for_selector(".card")
    page.locator("#back").click()
    page.wait_for_selector("#rows th")
    assert page.url.endswith("layer-1.html")
