"""Which features fire together, counted against brute force and on planted groups; what they
share; how well conditioned they are."""

import itertools
import math

import pytest
import torch

from experiment import Partners, firing, partners, sharing, stability
from lab.grouping import condition_numbers
from lab.pairs import cofiring_sums, partner_condition_numbers, strongest


def lists_of(fires, room=None):
    """Lists of active features from 1 on, packed to the left."""
    lists = torch.where(fires, torch.arange(1, fires.shape[1] + 1), 0).int()
    return lists.sort(dim=1, descending=True).values[:, :room]


def planted(n_features, size, tokens, seed=0, together=True):
    """Which features are active: in groups that fire together, or each at the same rate alone."""
    g = torch.Generator().manual_seed(seed)
    n_groups = n_features // size
    label = torch.arange(n_groups).repeat_interleave(size)
    label = label[torch.randperm(n_features, generator=g)]
    often = 0.25 + 1.5 * torch.rand(n_features, generator=g)
    on = torch.rand(tokens, n_groups, generator=g) < 0.04
    chance = on[:, label] * 0.3 + 0.005 if together else torch.tensor(0.04 * 0.3 + 0.005)
    return label, torch.rand(tokens, n_features, generator=g) < chance * often


@pytest.fixture
def fires(generator):
    """Of 30 features on 200 tokens, at rates from rare to frequent; one silent, one token empty."""
    fires = torch.rand(200, 30, generator=generator) < torch.linspace(0.02, 0.6, 30)
    fires[:, 7], fires[13] = False, False
    return fires


def brute_force(fires):
    """Σ over tokens of 1/n where two features are both active, [F, F] float64."""
    total = torch.zeros(fires.shape[1], fires.shape[1], dtype=torch.float64)
    for row in fires:
        active = row.nonzero().squeeze(1).tolist()
        for i, j in itertools.permutations(active, 2):
            total[i, j] += 1 / len(active)
    return total


# -- How often -------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [7, 1024])
def test_counts_are_those_of_brute_force(fires, block):
    row, column, value = cofiring_sums(lists_of(fires), 30, 0.0, block=block)
    dense = torch.zeros(30, 30, dtype=torch.float64)
    dense[row, column] = value
    torch.testing.assert_close(dense, brute_force(fires), rtol=1e-12, atol=0)
    assert row.tolist() == sorted(row.tolist())
    assert value.dtype == torch.float64


def test_counts_of_some_features_and_above_some_count_are_parts_of_all(fires):
    expected = brute_force(fires)
    row, column, value = cofiring_sums(lists_of(fires), 30, 1.5, every=4)
    kept = expected > 1.5
    kept[[i for i in range(30) if i % 4]] = False
    assert torch.equal(torch.stack([row, column]).T[(row * 30 + column).argsort()], kept.nonzero())
    torch.testing.assert_close(value, expected[row, column])


def test_order_and_gaps_of_lists_do_not_matter(fires):
    lists = lists_of(fires)
    mixed = lists[:, torch.randperm(30, generator=torch.Generator().manual_seed(1))]
    for one, other in zip(partners(firing(lists, 30), 5), partners(firing(mixed, 30), 5)):
        assert torch.equal(one, other)


def test_rates_are_over_tokens_on_which_anything_fires(fires):
    seen = firing(lists_of(fires), 30)
    assert seen.tokens == 199
    assert torch.equal(seen.fired_F, fires.sum(0))
    assert seen.n == pytest.approx(float(fires.sum()) / 199)


# -- Partners --------------------------------------------------------------------------------------


def test_partners_are_the_strongest_beyond_chance_by_hand(fires):
    seen = firing(lists_of(fires), 30)
    omega = brute_force(fires) / 199
    rate = fires.sum(0).double() / 199
    excess = omega - rate[:, None] * rate / seen.n
    row, column, weight = partners(seen, 4, sure=0.0)
    assert torch.bincount(row, minlength=30).max() == 4
    for i in range(30):
        others = [j for j in excess[i].argsort(descending=True).tolist()
                  if j != i and excess[i, j] > 0 and omega[i, j] > 0]
        assert column[row == i].tolist() == others[:4]
    torch.testing.assert_close(weight, omega[row, column])


def test_features_that_always_fire_together_are_partners_and_none_is_by_chance():
    """Nor is one that fires on every token anybody's partner."""
    g = torch.Generator().manual_seed(0)
    fires = torch.rand(20_000, 6, generator=g) < 0.02
    fires[:, 1], fires[:, 5] = fires[:, 0], True
    found = partners(firing(lists_of(fires), 6), 5)
    assert list(zip(found.row_N.tolist(), found.column_N.tolist())) == [(0, 1), (1, 0)]


@pytest.mark.parametrize(("together", "expected"), [(23, False), (24, True)])
def test_a_partner_exceeds_chance_by_four_standard_errors(together, expected):
    """Of 1,000 tokens with four active features each, two features are active on 100 each. By
    chance they meet on 10, and four standard errors are 4 √(10 + 1) = 13.3."""
    fires = torch.zeros(1000, 6, dtype=torch.bool)
    fires[:100, 0] = fires[100 - together : 200 - together, 1] = True
    missing = 4 - fires.sum(1, keepdim=True)
    fires[:, 2:] = torch.arange(4) < missing
    assert fires.sum(1).unique().tolist() == [4]
    found = partners(firing(lists_of(fires), 6), 5)
    assert ((0, 1) in zip(found.row_N.tolist(), found.column_N.tolist())) == expected


def test_the_strongest_of_each_row_come_first_and_ties_as_they_are():
    row = torch.tensor([1, 0, 1, 1, 0, 2])
    strength = torch.tensor([5.0, 1, 7, 5, 2, 0])
    assert strongest(row, strength, 2).tolist() == [4, 1, 2, 0, 5]


def test_partners_are_members_of_the_planted_group_and_most_of_it_is_found():
    label, fires = planted(512, 32, 32_768)
    found = partners(firing(lists_of(fires, 120), 512), 31)
    right = label[found.row_N] == label[found.column_N]
    assert float(right.float().mean()) > 0.95
    assert int(right.sum()) > 0.6 * 512 * 31


def test_partners_from_two_halves_overlap_on_planted_groups_and_are_few_by_chance():
    """Stability, of all features and of every fourth; partners by chance alone are rare and not
    found again, those of no certainty as often as any M of F."""
    _, fires = planted(512, 32, 32_768)
    seen = firing(lists_of(fires, 120), 512)
    assert stability(seen, 31, every=1) >= 0.6
    assert stability(seen, 31, every=4) == pytest.approx(stability(seen, 31, every=1), abs=0.05)
    _, fires = planted(512, 32, 32_768, together=False)
    seen = firing(lists_of(fires, 120), 512)
    assert len(partners(seen, 31)[0]) < 0.002 * 512 * 31
    assert stability(seen, 31, every=1) < 0.05
    assert stability(seen, 31, every=1, sure=-math.inf) == pytest.approx(31 / 512, abs=0.03)


# -- Conditioning ----------------------------------------------------------------------------------


def test_a_features_condition_number_is_that_of_its_direction_and_its_first_partners(generator):
    W = torch.nn.functional.normalize(torch.randn(600, 16, generator=generator), dim=1)
    row = torch.tensor([0, 0, 0, 2, 599])
    column = torch.tensor([5, 9, 7, 0, 1])
    kappa = partner_condition_numbers(W, row, column, 2)
    groups = [torch.tensor([[0, 5, 9]]), torch.tensor([[2, 0]]), torch.tensor([[599, 1]])]
    expected = [float(condition_numbers(W, group)) for group in groups]
    assert kappa[[0, 2, 599]].tolist() == pytest.approx(expected, rel=1e-6)
    assert kappa[[1, 3, 598]].tolist() == pytest.approx([1.0] * 3)  # alone
    none = torch.zeros(0, dtype=torch.long)
    assert partner_condition_numbers(W, none, none, 2).tolist() == pytest.approx([1.0] * 600)


# -- What is shared --------------------------------------------------------------------------------

EVEN = torch.ones(2, 4)
MUTUAL = Partners(torch.arange(4), torch.tensor([1, 0, 3, 2]), torch.ones(4))  # 0 and 1, 2 and 3


def shares(use=EVEN, fired=(1000.0,) * 4, prior=100.0, even=1.0, found=MUTUAL):
    return pytest.approx(sharing(found, torch.tensor(fired), use, even, prior).tolist(), abs=1e-6)


def test_a_feature_shares_as_evenly_as_it_serves_the_domains():
    use = torch.tensor([[3.0, 1, 2, 0], [1.0, 3, 2, 2]])  # by domain; 6 and 8 in all
    part = [0.5 / (0.5 + 1 / 8), (1 / 6) / (1 / 6 + 3 / 8), (1 / 3) / (1 / 3 + 1 / 4), 0.0]
    even = [2 * min(p, 1 - p) for p in part]
    assert shares(use=use, prior=0.0) == even
    assert shares(use=use, prior=0.0, even=0.5) == [min(1, 2 * e) for e in even]
    assert shares() == [1.0] * 4


def test_a_feature_of_one_kind_of_retain_text_is_held_against_that_kind():
    """Features 0 and 1 have forget text half and half with a kind of their own; 2 with none."""
    use = torch.tensor([[1.0, 1, 2, 0], [1, 0, 0, 3], [0, 1, 0, 3]])  # 4 in all by domain
    assert shares(use=use, prior=0.0) == [1.0, 1.0, 0.0, 0.0]


def test_evenness_leans_on_the_partners_where_a_feature_fired_rarely():
    """(n e + m e_g)/(n + m): a dense even feature exempts no partner that was seen often."""
    use = torch.tensor([[9.0, 1, 5, 5], [9.0, 0, 5, 6]])
    alone = shares(use=use, prior=0.0).expected
    assert alone[1] == 0
    assert alone[0] > 0.95
    for fired, leaning in ((100.0, 0.5), (900.0, 0.1), (0.0, 1.0)):
        one = shares(use=use, fired=(1000.0, fired, 1000.0, 1000.0)).expected
        assert one[1] == pytest.approx(leaning * alone[0])
    assert 0 < one[0] < alone[0]


def test_partners_count_by_how_often_they_fire_together():
    """Feature 0 never fired; a partner serves one domain, the other both."""
    use = torch.tensor([[0.0, 1, 1, 2], [0.0, 0, 1, 3]])  # 4 in all by domain
    for weight in (0.0, 0.25, 1.0):
        found = Partners(torch.tensor([0, 0]), torch.tensor([1, 2]), torch.tensor([weight, 1.0]))
        forget, retain = weight * 1 + 0.5, 0.5  # feature 2 is half and half
        expected = 2 * min(forget, retain) / (forget + retain)
        assert shares(use=use, fired=(0.0, 9.0, 9.0, 9.0), found=found).expected[0] == (
            pytest.approx(expected))


def test_what_never_fired_and_has_no_partners_counts_as_even():
    use = torch.tensor([[0.0, 1, 1, 1], [0.0, 1, 1, 1]])
    none = Partners(*torch.zeros(2, 0, dtype=torch.long), torch.zeros(0))
    assert sharing(none, torch.zeros(4), use, 0.5).tolist() == [1.0] * 4
