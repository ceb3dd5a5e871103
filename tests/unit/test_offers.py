"""Which of the dictionaries on offer is meant: what is chosen, and what is said where a choice is missing."""

import math
import re

import pytest
import torch

from circuitsae import load_dictionaries
from transcoders.errors import FileFormatError, InputError
from transcoders.formats.offers import Choice, Offer, choose, fitting, summary_of, width_of, width_text


def offer(layer, site="resid_post", width=2**14, l0=None, variant=None, **more):
    name = f"layer_{layer}/{site}/{width}/{l0}/{variant}"
    return Offer(id=name, files=(name,), layer=layer, site=site, width=width, l0=l0, variant=variant, **more)


GRID = [
    offer(layer, site, width, l0)
    for layer in range(3)
    for site in ("resid_post", "attn_z")
    for width in (2**14, 2**16)
    for l0 in (20.0, 80.0 + layer, 300.0)
]


def chosen(offers, **choice):
    return [(o.layer, o.site, o.width, o.l0) for o in choose(offers, Choice.of(**choice), "org/repo")]


# widths


@pytest.mark.parametrize(
    ("text", "width"),
    [("16k", 2**14), ("16K", 2**14), ("65k", 2**16), ("131k", 2**17), ("262k", 2**18), ("1m", 2**20), ("1k", 2**10),
     ("32k", 2**15), (16384, 16384), ("24576", 24576), (" 4096 ", 4096), ("524k", 2**19),
     ("24k", 24576), ("12k", 12288), ("2m", 2**21)],
)  # fmt: skip
def test_a_width_is_a_number_or_as_authors_write_it(text, width):
    assert width_of(text) == width


@pytest.mark.parametrize("text", ["", "k", "16kk", "-1", "0", "1.5k", "16 k", "١٦k" * 20, 0, "9" * 20])
def test_what_is_no_width_is_refused(text):
    with pytest.raises(InputError, match="is no number of features; give one such as 16384 or '16k'"):
        width_of(text)


@pytest.mark.parametrize("power", range(10, 24))
def test_a_width_is_read_as_it_is_written(power):
    assert width_of(width_text(2**power)) == 2**power


# choices


@pytest.mark.parametrize("layers", [[], [1, 1], [-1], [0, -2], True, [0, True], ""])
def test_layers_that_are_none_are_refused(layers):
    with pytest.raises(InputError, match="are no layers; give distinct numbers from 0"):
        Choice.of(layers=layers)


def test_layers_may_come_one_by_one():
    assert Choice.of(layers=(layer for layer in (2, 3))).layers == (2, 3)
    assert Choice.of(layers=range(2, 4)).layers == (2, 3)
    assert Choice.of(layers=3).layers == (3,)


@pytest.mark.parametrize("l0", [0, -1.0, math.inf, math.nan, True])
def test_an_l0_that_is_none_is_refused(l0):
    with pytest.raises(InputError, match="is no number of active features; give a positive number"):
        Choice.of(l0=l0)


def test_one_dictionary_for_each_layer_is_chosen_by_site_width_and_the_nearest_l0():
    assert chosen(GRID, site="attn_z", width="16k", l0=85) == [(i, "attn_z", 2**14, 80.0 + i) for i in range(3)]
    assert chosen(GRID, site="attn_z", width="65k", l0=1) == [(i, "attn_z", 2**16, 20.0) for i in range(3)]
    assert chosen(GRID, site="attn_z", width="65k", l0=1e6, layers=1) == [(1, "attn_z", 2**16, 300.0)]
    assert chosen(GRID, site="resid_post", width=2**14, l0=20, layers=[2, 0]) == [
        (0, "resid_post", 2**14, 20.0), (2, "resid_post", 2**14, 20.0),
    ]  # fmt: skip


def test_a_choice_that_is_not_needed_need_not_be_made():
    alone = [offer(layer, l0=30.0 + layer) for layer in range(3)]
    assert [o.layer for o in choose(alone, Choice(), "org/repo")] == [0, 1, 2]
    assert [o.layer for o in choose(alone[::-1], Choice.of(l0=1000), "org/repo")] == [0, 1, 2]
    mixed = [offer(0, "resid_post"), offer(1, "attn_z")]  # one a layer
    assert len(choose(mixed, Choice(), "org/repo")) == 2
    whole = [Offer(id="", files=("a", "b"))]
    assert choose(whole, Choice(), "org/repo") == whole


def test_an_id_is_enough_and_its_slashes_do_not_matter():
    wanted = GRID[7]
    assert choose(GRID, Choice.of(id=f"/{wanted.id}/"), "org/repo") == [wanted]


@pytest.mark.parametrize(
    ("choice", "says"),
    [
        ({}, "offers dictionaries of more than one site (attn_z, resid_post); say which with site=… (--site)"),
        ({"site": "attn_z"}, "offers dictionaries of more than one width (16k, 65k); say which with width=… (--width)"),
        (
            {"site": "attn_z", "width": "16k"},
            "offers 3 dictionaries of layer 0, of L0 20, 80, 300; say which with l0=…",
        ),
        ({"site": "attn_z", "width": "16k", "layers": 2}, "offers 3 dictionaries of layer 2, of L0 20, 82, 300; say"),
        (
            {"id": "layer_0"},
            "offers nothing with sae_id=layer_0; it offers layer 0, 1, 2; site attn_z, resid_post; width",
        ),
        ({"site": "mlp_out"}, "offers nothing with site=mlp_out; it offers layer 0, 1, 2; site attn_z, resid_post; "),
        ({"width": "1m"}, "offers nothing with width=1m; it offers"),
        ({"layers": 7}, "offers nothing with layers=7; it offers layer 0, 1, 2"),
        (
            {"site": "attn_z", "width": "16k", "l0": 20, "layers": [1, 5, 8]},
            "offers nothing for the layers [5, 8]; of those asked for, it offers",
        ),
        ({"variant": "canonical"}, "offers nothing with variant=canonical"),
    ],
)
def test_a_choice_that_is_missing_is_asked_for_with_the_options(choice, says):
    with pytest.raises(InputError, match=re.escape(f"org/repo {says}")) as raised:
        chosen(GRID, **choice)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 600


def test_variants_kinds_and_ids_are_asked_for():
    with pytest.raises(
        InputError, match=re.escape("more than one variant (trainer_0, trainer_1); say which with variant=…")
    ):
        chosen([offer(0, variant="trainer_0"), offer(0, variant="trainer_1")])
    with pytest.raises(InputError, match=re.escape("more than one variant (big or none); say which")):
        chosen([offer(0, variant="big"), offer(0)])
    with pytest.raises(InputError, match=re.escape("more than one kind (plt, sae); give the folder of one of them")):
        chosen([offer(0, kind="sae"), offer(0, kind="plt")])
    twins = [Offer(id=f"run_{i}", files=(), layer=3) for i in range(12)]
    with pytest.raises(InputError, match=r"12 dictionaries of layer 3 \(run_0, .*run_7 and 4 more\); say .*sae_id=…"):
        chosen(twins)


def test_offers_without_a_variant_can_be_meant():
    offers = [offer(layer, variant=variant) for layer in range(2) for variant in (None, "big")]
    assert [o.variant for o in choose(offers, Choice.of(variant="none"), "org/repo")] == [None, None]
    assert [o.variant for o in choose(offers, Choice.of(variant="big"), "org/repo")] == ["big", "big"]
    with pytest.raises(FileFormatError, match="offers nothing with .*width=1k, variant=none"):
        choose(offers, Choice.of(variant="none", width="1k"), "org/repo")


def test_every_layer_that_is_asked_for_must_be_there():
    offers = [offer(layer) for layer in (0, 1, 5)]
    with pytest.raises(FileFormatError, match=r"offers nothing for the layers \[3, 9\]; .* layer 0, 5; site"):
        choose(offers, Choice.of(layers=[0, 3, 5, 9]), "org/repo")
    whole = [Offer(id="", files=("a",), kind="clt")]
    assert choose(whole, Choice.of(layers=range(4)), "org/repo") == whole


@pytest.mark.parametrize("l0", [None, 40.0])
def test_an_l0_does_not_choose_among_dictionaries_of_one_l0(l0):
    twins = [Offer(id=f"run_{i}", files=(), layer=3, l0=l0) for i in range(2)]
    with pytest.raises(InputError, match=r"2 dictionaries of layer 3 \(run_0, run_1\); say which with sae_id=…"):
        choose(twins, Choice.of(l0=40), "org/repo")


def test_of_unknown_l0s_the_known_one_is_the_nearest():
    assert chosen([offer(0, l0=None), offer(0, l0=500.0)], l0=3) == [(0, "resid_post", 2**14, 500.0)]


def test_nothing_is_offered_in_a_sentence():
    with pytest.raises(FileFormatError, match="org/repo offers no dictionaries; check the name"):
        choose([], Choice(), "org/repo")


def test_what_names_leave_open_is_asked_for_or_taken_from_the_choice():
    unsure = [Offer(id="params.npz", files=("params.npz",), asks=("site", "layer"))]
    with pytest.raises(InputError, match=re.escape("org/repo say which site params.npz reads; say it with site=…")):
        choose(unsure, Choice(), "org/repo")
    with pytest.raises(InputError, match=re.escape("which layer params.npz reads; say it with layers=… (--layers)")):
        choose(unsure, Choice.of(site="mlp_out"), "org/repo")
    (made,) = choose(unsure, Choice.of(site="mlp_out", layers=4), "org/repo")
    assert (made.site, made.layer, made.asks) == ("mlp_out", 4, ())


def test_the_summary_of_many_offers_is_short():
    many = [offer(layer, l0=float(layer)) for layer in range(1000)]
    assert summary_of(many) == (
        "layer 0, 1, 2, 3, 4, 5, 6, 7 and 992 more; site resid_post; width 16k; l0 0, 1, 2, 3, 4, 5, 6, 7 and 992 more"
    )
    assert summary_of([Offer(id="", files=())]) == "one set"


def test_fitting_leaves_the_l0_open():
    assert len(fitting(GRID, Choice.of(site="attn_z", l0=5), "org/repo")) == 18


def test_layers_of_a_set_that_is_stored_as_one():
    whole, some = load_dictionaries("pocket-sae"), load_dictionaries("pocket-sae", layers=[1, 3])
    assert [some.n_features(layer) for layer in range(4)] == [0, whole.n_features(1), 0, whole.n_features(3)]
    reads = torch.randn(4, 5, 128, generator=torch.Generator().manual_seed(0))
    kept = whole.encode(reads).of_layer(3)
    assert torch.equal(some.encode(reads).of_layer(3).index, kept.index)
    assert some.reads == whole.reads
    with pytest.raises(InputError, match="has layers 0 to 3, not 7"):
        load_dictionaries("pocket-sae", layers=7)
    with pytest.raises(InputError, match=r"cannot be taken apart \(CrossLayerTranscoder\); leave out layers=…"):
        load_dictionaries("pocket", layers=2)


def test_ids_like_one_that_there_is_not_are_named():
    with pytest.raises(
        FileFormatError, match=re.escape("nothing with sae_id=run_7b; it offers run_1, run_7; ids such")
    ):
        choose([Offer(id=f"run_{i}", files=()) for i in (1, 7)], Choice.of(id="run_7b"), "org/repo")
