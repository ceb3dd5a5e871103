"""Dictionaries against each other and against known features: cases that can be worked out by hand, and brute force."""

import itertools
import math

import pytest
import torch

from transcoders import SAE, SAESet, random_dictionaries
from transcoders.dictionaries import DictionaryProvenance, ReLU, TopK
from transcoders.errors import DictionaryError, InputError
from transcoders.evaluation import (
    alignment,
    bimodality,
    compare_seeds,
    connected_groups,
    decompose,
    match,
    mmcs,
    recovery,
    splitting,
    stitch,
)
from transcoders.evaluation.statistics import Statistics
from transcoders.sites import Site

SITE = Site(0, "resid_post")


def rows(*values):
    return torch.tensor(values, dtype=torch.float64)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tied_sae(decoders, bias=0.0, k=None):
    """An SAE whose encoder is its decoder's transpose."""
    decoders = torch.as_tensor(decoders, dtype=torch.float64)
    return SAE(
        W_enc=decoders.T.clone(), b_enc=torch.full((len(decoders),), bias, dtype=torch.float64), W_dec=decoders.clone(),
        b_dec=torch.zeros(decoders.shape[1], dtype=torch.float64), activation=TopK(k) if k else ReLU(), site=SITE,
    ).requires_grad_(False)  # fmt: skip


def one_layer(sae):
    return SAESet([sae], DictionaryProvenance(model="test"))


# alignment


def test_alignment_by_hand():
    sae = tied_sae([[1.0, 0.0], [0.0, 2.0], [1.0, 0.0], [0.0, 0.0]])
    sae.W_enc.copy_(rows([3, 0, 0, 1], [0, 0.5, 1, 0]))  # along, along, at a right angle, a decoder of zeros
    found = alignment(one_layer(sae), 0)
    assert found.product.tolist() == pytest.approx([3, 1, 0, 0])
    assert found.cosine.tolist() == pytest.approx([1, 1, 0, 0])
    summary = found.summary()
    assert (summary.product, summary.cosine, summary.cosine_below_half) == pytest.approx((1, 0.5, 0.5))
    assert summary.product_sd == pytest.approx(math.sqrt(6 / 4))  # of 3, 1, 0, 0
    assert summary.cosine_bimodality == pytest.approx(1)  # two equal halves
    assert summary.product_bimodality < 1


def test_the_score_depends_on_norms_and_the_cosine_does_not():
    sae = tied_sae([[1.0, 0.0], [0.0, 1.0]])
    before = alignment(one_layer(sae), 0)
    sae.W_enc.mul_(0.25)
    after = alignment(one_layer(sae), 0)
    torch.testing.assert_close(after.product, before.product / 4)
    torch.testing.assert_close(after.cosine, before.cosine)
    assert math.isnan(after.summary().product_bimodality), "all scores are the same"


def test_alignment_of_a_cross_layer_transcoder_takes_the_sum_of_its_decoders():
    clt = random_dictionaries("clt", n_layers=3, d_model=8, features=5, dtype=torch.float64).requires_grad_(False)
    found = alignment(clt, 1)
    for feature in range(5):
        written = sum(clt.W_dec[1][feature, offset] for offset in range(2))
        encoder = clt.W_enc[1][:, feature]
        assert isinstance(written, torch.Tensor)
        assert float(found.product[feature]) == pytest.approx(float(encoder @ written))
        assert float(found.cosine[feature]) == pytest.approx(float(encoder @ written / encoder.norm() / written.norm()))


def test_alignment_is_in_the_coordinates_of_training():
    from transcoders.dictionaries import fold_normalisation

    plt = random_dictionaries("plt", n_layers=2, d_model=8, features=5, dtype=torch.float64)
    before = [alignment(plt, layer) for layer in range(2)]
    fold_normalisation(plt, [2.0, 3.0], [0.5, 7.0])
    for layer in range(2):
        torch.testing.assert_close(alignment(plt, layer).product, before[layer].product)
        torch.testing.assert_close(alignment(plt, layer).cosine, before[layer].cosine)


def test_bimodality_of_known_distributions():
    assert bimodality([-1.0, 1.0] * 10) == pytest.approx(1)
    assert bimodality(torch.linspace(0, 1, 10_001, dtype=torch.float64)) == pytest.approx(5 / 9, abs=1e-3)
    assert bimodality(normal(100_000)) == pytest.approx(1 / 3, abs=0.02)
    assert math.isnan(bimodality([2.0, 2.0]))


# matching


def test_mmcs_by_hand_and_not_symmetric():
    first, second = rows([1, 0], [2, 0]), rows([3, 0], [0, 1])
    assert mmcs(first, second) == pytest.approx(1)
    assert mmcs(second, first) == pytest.approx(0.5)
    assert mmcs(first, -second) == pytest.approx(0), "an opposite direction is another feature"


def test_match_finds_the_best_pairing_where_greed_does_not():
    """Greedy pairing takes the cosine of 1 first, and leaves a pair at a right angle."""
    c, s = math.cos(0.3), math.sin(0.3)
    first, second = rows([1, 0, 0], [c, s, 0]), rows([1, 0, 0], [0, 0, 1])
    first = torch.cat([first, rows([0, 0, 1])])
    second = torch.cat([second, rows([math.cos(0.1), -math.sin(0.1), 0])])
    similarity = torch.nn.functional.normalize(first, dim=1) @ torch.nn.functional.normalize(second, dim=1).T
    best = max(sum(float(similarity[i, p[i]]) for i in range(3)) for p in itertools.permutations(range(3)))
    found = match(first, second)
    assert float(found.cosine.sum()) == pytest.approx(best)
    assert found.second.tolist() == [2, 0, 1]
    greedy = 1 + float(similarity[1, 2]) + 1
    assert best > greedy


def test_match_of_a_permuted_copy_is_the_permutation():
    first = normal(30, 12)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    found = match(first, 5 * first[order])
    assert found.mean == pytest.approx(1)
    assert torch.equal(order[found.second], found.first)
    assert len(match(first, first[:7]).first) == 7


@pytest.mark.parametrize("kind", ["plt", "clt", "sae"])
def test_seeds_are_compared_whatever_the_order_of_features(kind):
    first = random_dictionaries(kind, n_layers=2, d_model=24, features=20)
    second = random_dictionaries(kind, n_layers=2, d_model=24, features=20)
    with torch.no_grad():
        if kind == "clt":
            second.W_enc[1] = second.W_enc[1].flip(1)
            second.W_dec[1].copy_(second.W_dec[1].flip(0))
            second.W_enc[1][:, :5] = -second.W_enc[1][:, :5]
        else:
            second[1].W_enc.copy_(second[1].W_enc.flip(1))
            second[1].W_dec.copy_(second[1].W_dec.flip(0))
            second[1].W_enc[:, :5] = -second[1].W_enc[:, :5]
    same, flipped = compare_seeds(first, second)
    assert same.mmcs == pytest.approx(1)
    assert same.shared == 1
    assert flipped.matched == pytest.approx(1)
    assert flipped.shared == pytest.approx(0.75), "five encoders point the other way"
    unrelated = compare_seeds(first, random_dictionaries(kind, n_layers=2, d_model=24, features=20, seed=9))[0]
    assert unrelated.matched < 0.6
    assert unrelated.shared < 0.2


def best_by_hand(first, second):
    """Row by row and pair by pair: mean over `first` of the highest cosine in `second`."""
    return sum(max(float(a @ b / a.norm() / b.norm()) for b in second) for a in first) / len(first)


def seeds_with_dead_features(features=6):
    """Two autoencoders some of whose biases let nothing through, and which features fire on vectors."""
    pair = [tied_sae(normal(features, 5, seed=seed)) for seed in (1, 2)]
    pair[0].b_enc[2:4] = -100.0
    pair[1].b_enc[0] = -100.0
    x = normal(400, 1, 5, seed=3)
    alive = []
    for sae in pair:
        statistics = Statistics(one_layer(sae))
        statistics.update(x, x)
        alive.append(statistics.alive)
    return pair, alive


def test_dead_features_are_left_out_of_both_sides_and_counted():
    (first, second), alive = seeds_with_dead_features()
    assert [int((~mask[0]).sum()) for mask in alive] == [2, 1]
    found = compare_seeds(one_layer(first), one_layer(second), alive=(alive[0], alive[1]))[0]
    ours = [first.W_dec[i] for i in (0, 1, 4, 5)]
    theirs = [second.W_dec[i] for i in range(1, 6)]
    assert found.mmcs == pytest.approx(best_by_hand(ours, theirs))
    assert found.mmcs_back == pytest.approx(best_by_hand(theirs, ours))
    similarity = torch.tensor([[float(a @ b / a.norm() / b.norm()) for b in theirs] for a in ours])
    best = max(sum(float(similarity[i, p[i]]) for i in range(4)) for p in itertools.permutations(range(5), 4))
    assert found.matched == pytest.approx(best / 4)
    assert (found.left_out, found.left_out_back) == (2, 1)
    every = compare_seeds(one_layer(first), one_layer(second))[0]
    assert every.mmcs == pytest.approx(best_by_hand(first.W_dec, second.W_dec))
    assert every.mmcs != pytest.approx(found.mmcs)
    assert (every.left_out, every.left_out_back) == (0, 0)


def test_where_nothing_lives_there_is_nothing_to_compare():
    (first, second), alive = seeds_with_dead_features()
    none = [torch.zeros(6, dtype=torch.bool)]
    found = compare_seeds(one_layer(first), one_layer(second), alive=(none, alive[1]))[0]
    assert all(math.isnan(value) for value in found[:4])
    assert (found.left_out, found.left_out_back) == (6, 1)


def test_masks_of_other_features_are_refused():
    (first, second), alive = seeds_with_dead_features()
    with pytest.raises(InputError, match=r"here of \[6\]; got masks of \[5\]"):
        compare_seeds(one_layer(first), one_layer(second), alive=(alive[0], [torch.ones(5, dtype=torch.bool)]))


def test_other_kinds_and_widths_are_refused():
    with pytest.raises(DictionaryError, match="of one kind on the same sites"):
        compare_seeds(random_dictionaries("plt"), random_dictionaries("sae"))
    with pytest.raises(InputError, match=r"\[3, 4\] and \[3, 5\]"):
        mmcs(normal(3, 4), normal(3, 5))


# recovery


def test_recovery_by_hand():
    """Three known directions: one found twice, one found with the wrong sign, one nearly."""
    known = torch.eye(3, dtype=torch.float64)
    near = rows([0, 0.2, 1.0])
    decoders = torch.cat([rows([2, 0, 0], [0.5, 0, 0], [0, -1, 0]), near])
    found = recovery(decoders, known)
    cosine = 1 / math.sqrt(1.04)
    second = 0.2 / math.sqrt(1.04)
    assert found.recovered == pytest.approx(2 / 3)
    assert found.matched == pytest.approx(2 / 3)
    assert found.spurious == pytest.approx(1 / 4)
    assert found.mmcs == pytest.approx((1 + second + cosine) / 3)
    assert recovery(decoders, known, above=0.99).recovered == pytest.approx(1 / 3)


def test_one_decoder_between_two_directions_does_not_stand_for_both():
    c, s = math.cos(0.2), math.sin(0.2)
    known = rows([c, s], [c, -s])
    found = recovery(rows([1, 0], [-1, 0]), known)
    assert (found.recovered, found.matched) == (1, 0.5)


# splitting


def test_splitting_by_hand():
    c, s = math.cos(0.4), math.sin(0.4)
    narrow = torch.eye(4, dtype=torch.float64)[:3]
    wide = rows([c, 0, 0, s], [math.cos(0.1), math.sin(0.1), 0, 0], [0, 3, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0])
    found = splitting(narrow, wide)
    assert found.children == ((1, 0), (2,), ())
    assert found.novel == (3, 4)
    assert (found.split, found.kept, found.lost) == pytest.approx((1 / 3, 1 / 3, 1 / 3))
    assert found.coverage is None
    narrow_fires = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 0, 0], [0, 1, 0]]).bool()
    wide_fires = torch.tensor([[1, 0, 1, 0, 0], [0, 1, 0, 0, 0], [0, 0, 1, 1, 1], [1, 0, 0, 0, 0]]).bool()
    coverage = splitting(narrow, wide, fires=(narrow_fires, wide_fires)).coverage
    assert coverage is not None
    assert coverage[:2] == pytest.approx((2 / 3, 1 / 2))
    assert math.isnan(coverage[2])
    with pytest.raises(InputError, match="on the same tokens"):
        splitting(narrow, wide, fires=(narrow_fires, wide_fires[:2]))


def test_groups_are_linked_through_others():
    narrow = rows([1, 0, 0], [math.cos(1.0), math.sin(1.0), 0], [0, 0, 1])
    wide = rows([math.cos(0.5), math.sin(0.5), 0], [0, 0, -1])
    assert connected_groups(narrow, wide) == [([0, 1], [0])]


# stitching


@pytest.fixture(scope="module")
def pair():
    """A narrow and a wide SAE that share two directions, on vectors made of the wide one's."""
    wide = torch.nn.functional.normalize(normal(12, 10, seed=1), dim=1)
    narrow = torch.cat([wide[:2], torch.nn.functional.normalize(wide[2:3] + wide[3:4], dim=1), normal(3, 10, seed=2)])
    narrow = torch.nn.functional.normalize(narrow, dim=1)
    a = torch.relu(normal(200, 12, seed=3) - 0.8)
    return tied_sae(narrow, -0.2), tied_sae(wide, -0.3), a @ wide


def hybrid_fvu(narrow, wide, x, keep, extra):
    """Brute force: the narrow dictionary with the latents `keep`, and the latents `extra` of the wide one."""
    a, b = narrow.encode(x), wide.encode(x)
    y = torch.zeros_like(x)
    for t in range(len(x)):
        y[t] = sum((a[t, i] * narrow.W_dec[i] for i in keep), torch.zeros(x.shape[1], dtype=x.dtype))
        y[t] += sum((b[t, j] * wide.W_dec[j] for j in extra), torch.zeros(x.shape[1], dtype=x.dtype))
    return float((x - y).square().sum() / (x - x.mean(0)).square().sum())


def test_stitching_against_brute_force(pair):
    narrow, wide, x = pair
    found = stitch(narrow, wide, x)
    everything, nothing = range(6), []
    base = hybrid_fvu(narrow, wide, x, everything, nothing)
    assert found.fvu_narrow == pytest.approx(base)
    assert found.fvu_wide == pytest.approx(hybrid_fvu(narrow, wide, x, [], range(12)))
    for j in range(12):
        assert found.added[j] == pytest.approx(hybrid_fvu(narrow, wide, x, everything, [j]) - base)
    assert found.fvu_with_novel == pytest.approx(hybrid_fvu(narrow, wide, x, everything, found.novel))
    groups = connected_groups(narrow.W_dec, wide.W_dec)
    assert len(found.swapped) == len(groups) >= 2
    for change, (out, into) in zip(found.swapped, groups, strict=True):
        kept = [i for i in everything if i not in out]
        assert change == pytest.approx(hybrid_fvu(narrow, wide, x, kept, into) - base)
    assert found.path[0][1] == pytest.approx(found.fvu_narrow)
    assert found.path[-1][1] == pytest.approx(found.fvu_wide)
    out, into = ([i for group in groups for i in group[side]] for side in (0, 1))
    before_last = hybrid_fvu(narrow, wide, x, [i for i in everything if i not in out], [*found.novel, *into])
    assert found.path[-2][1] == pytest.approx(before_last)


def test_novel_latents_help_and_those_already_there_do_not():
    """Three of five orthogonal features are in the narrow dictionary; adding one of them again counts it twice."""
    eye = torch.eye(5, dtype=torch.float64)
    x = torch.relu(normal(300, 5))
    found = stitch(tied_sae(eye[:3]), tied_sae(eye), x)
    assert found.novel == (3, 4)
    assert found.improving() == (1, 0)
    assert found.fvu_with_novel == pytest.approx(0, abs=1e-12)
    assert found.swapped == pytest.approx((0, 0, 0), abs=1e-12)


def test_what_cannot_be_stitched_is_refused():
    with pytest.raises(DictionaryError, match="of width 4, and .* of width 5"):
        stitch(tied_sae(torch.eye(4)), tied_sae(torch.eye(5)), normal(3, 4))


# meta-SAE


def test_decoders_made_of_two_parts_are_taken_apart():
    """Six latents, each the sum of two of four orthogonal directions, and a seventh that is one of them."""
    parts = torch.eye(6, dtype=torch.float64)[:4]
    pairs = list(itertools.combinations(range(4), 2))
    decoders = torch.stack([3 * (parts[i] + parts[j]) for i, j in pairs] + [parts[0]])
    found = decompose(decoders, tied_sae(torch.eye(6, dtype=torch.float64)[:5], bias=0.0, k=2))
    assert found.fvu == pytest.approx(0, abs=1e-12)
    assert found.l0 == pytest.approx((6 * 2 + 1) / 7)
    assert [sorted(m for m, _ in part) for part in found.parts] == [*map(list, pairs), [0]]
    assert found.parts[0][0][1] == pytest.approx(math.sqrt(0.5))
    assert found.members[0][0] == 6, "the latent that is direction 0 alone has most of it"
    assert found.atomic == pytest.approx(1 / 7)
    assert found.unused == pytest.approx(1 / 5)
