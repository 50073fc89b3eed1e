"""Grouping on planted structure; sharing and condition numbers by hand."""

import math

import pytest
import torch
from sklearn.metrics import adjusted_rand_score

import experiment as ex


def firing(n_features, size, p_group, p_in, p_out, tokens=32768, seed=0):
    """A sketch of firing in which the features of a planted group fire together."""
    g = torch.Generator().manual_seed(seed)
    n_groups = n_features // size
    label = torch.arange(n_groups).repeat_interleave(size)
    label = label[torch.randperm(n_features, generator=g)]
    frequency = 0.25 + 1.5 * torch.rand(n_features, generator=g)
    sketch = ex.CoactivationSketch(n_features, 512)
    for _ in range(tokens // 2048):
        on = (torch.rand(2048, n_groups, generator=g) < p_group).float()
        fires = (
            torch.rand(2048, n_features, generator=g) < (on[:, label] * p_in + p_out) * frequency
        )
        row, column = fires.nonzero(as_tuple=True)
        sketch.add_(ex.Code(row, row, row, column), 2048, g)
    return label, frequency, sketch


def as_labels(groups):
    labels = torch.empty(groups.numel(), dtype=torch.long)
    labels[groups] = torch.arange(len(groups))[:, None].expand_as(groups)
    return labels


@pytest.mark.parametrize(("n_features", "size"), [(512, 32), (1024, 64), (2304, 64)])
def test_planted_groups_are_recovered(n_features, size):
    label, _, sketch = firing(n_features, size, 0.04, 0.3, 0.005)
    groups = ex.group_features(sketch.unit_rows(), size, seed=0)
    assert adjusted_rand_score(label, as_labels(groups)) >= 0.9


def test_frequency_alone_forms_no_group():
    """Independent features of very different frequency: groups do not sort by frequency."""
    g = torch.Generator().manual_seed(1)
    frequency = torch.logspace(-3, -0.7, 512)
    sketch = ex.CoactivationSketch(512, 512)
    for _ in range(16):
        row, column = (torch.rand(2048, 512, generator=g) < frequency).nonzero(as_tuple=True)
        sketch.add_(ex.Code(row, row, row, column), 2048, g)
    groups = ex.group_features(sketch.unit_rows(), 32, seed=0)
    level = (frequency.argsort().argsort() // 32).float()
    assert abs(adjusted_rand_score(level, as_labels(groups))) < 0.05
    between = level[groups].mean(1).var() / level.var()
    assert float(between) < 3 / 32  # what 32 random members give is 1/32


def test_correlations_of_the_sketch():
    """Rows' inner products estimate the correlation of firing, computed here directly."""
    g = torch.Generator().manual_seed(2)
    base = torch.rand(20000, 1, generator=g) < 0.3
    fires = base & (torch.rand(20000, 6, generator=g) < 0.5)
    fires[:, 5] = torch.rand(20000, generator=g) < 0.2
    sketch = ex.CoactivationSketch(6, 4096)
    row, column = fires.nonzero(as_tuple=True)
    sketch.add_(ex.Code(row, row, row, column), 20000, g)
    rows = sketch.unit_rows()
    torch.testing.assert_close(rows @ rows.T, torch.corrcoef(fires.T.float()), atol=0.08, rtol=0)


def test_groups_are_balanced_deterministic_and_keep_dead_features():
    _, _, sketch = firing(512, 32, 0.04, 0.3, 0.005, tokens=8192)
    rows = sketch.unit_rows()
    rows[100:200] = 0  # dead
    a, b = (ex.group_features(rows, 32, seed=3) for _ in range(2))
    assert torch.equal(a, b)
    assert a.shape == (16, 32)
    assert torch.equal(a.flatten().sort().values, torch.arange(512))
    with pytest.raises(ValueError, match="do not divide"):
        ex.group_features(rows[:500], 32, seed=0)


def test_grouping_survives_nothing_firing_and_duplicates():
    nothing = ex.CoactivationSketch(128, 64).unit_rows()
    assert torch.equal(nothing, torch.zeros(128, 64))
    assert ex.group_features(nothing, 16, seed=0).shape == (8, 16)
    same = torch.ones(128, 64)
    assert ex.group_features(same, 16, seed=0).flatten().unique().numel() == 128


def test_a_deep_tree_is_balanced():
    rows = torch.randn(1024, 32, generator=torch.Generator().manual_seed(0))
    groups = ex.group_features(rows, 8, seed=0, branch=4)
    assert groups.shape == (128, 8)
    assert groups.flatten().unique().numel() == 1024


def test_assign_balanced_by_hand():
    score = torch.tensor([[0.9, 0.1], [0.8, 0.7], [0.7, 0.0], [0.1, 0.2]])
    # rows 0 and 1 take column 0 (best bids), row 2 finds it full, row 3 is in column 1
    assert ex.assign_balanced(score, torch.tensor([2, 2])).tolist() == [0, 0, 1, 1]


def test_condition_numbers_by_hand():
    angle = math.radians(60)
    W = torch.tensor([[1, 0, 0], [0, 1, 0], [math.cos(angle), math.sin(angle), 0], [1, 0, 0]])
    groups = torch.tensor([[0, 1], [0, 2], [0, 3]])
    kappa = ex.condition_numbers(W, groups)
    # two unit vectors at angle t: singular values sqrt(1 ± cos t)
    assert kappa[:2].tolist() == pytest.approx([1.0, math.sqrt(1.5 / 0.5)], rel=1e-6)
    assert kappa[2] == pytest.approx(1e7)
    assert torch.isfinite(ex.condition_numbers(torch.zeros(4, 3), groups)).all()
    assert ex.condition_numbers(W[:, :2], torch.tensor([[0, 2]]), 1).tolist() == [1.0]


def test_a_common_direction_alone_is_no_bad_conditioning():
    own = torch.eye(9)[1:]
    shared = torch.nn.functional.normalize(own + 2 * torch.eye(9)[:1], dim=1)
    groups = torch.arange(16).view(2, 8)
    found = ex.group_statistics(torch.ones(16, 2), torch.ones(2, 16), torch.cat([own, shared]),
                                groups)
    assert found.kappa_own_G.tolist() == pytest.approx([1.0, 1.0], abs=1e-6)
    assert found.kappa_G.tolist() == pytest.approx([1.0, math.sqrt(1 + 8 * 4)], rel=1e-5)


def test_random_condition_number_matches_random_vectors():
    W = torch.nn.functional.normalize(
        torch.randn(64 * 20, 576, generator=torch.Generator().manual_seed(0)), dim=1
    )
    kappa = ex.condition_numbers(W, torch.arange(1280).view(20, 64))
    assert float(kappa.median()) == pytest.approx(ex.random_condition_number(64, 576), rel=0.05)


def test_group_statistics_by_hand():
    rows = torch.tensor([[1.0, 0], [1, 0], [1, 0], [0, 1]])
    use = torch.tensor([[1.0, 1, 2, 0], [0, 2, 1, 1]])  # by domain, each sums to 4
    groups = torch.tensor([[0, 1], [2, 3]])
    found = ex.group_statistics(rows, use, torch.eye(4), groups)
    assert found.coactivation_G.tolist() == [1.0, 0.0]
    assert found.evenness_G.tolist() == [1.0, 1.0]  # (2, 2) and (2, 2) of 4
    found = ex.group_statistics(
        rows, torch.tensor([[3.0, 1, 0, 0], [0, 1, 1, 2]]), torch.eye(4), groups
    )
    assert found.evenness_G.tolist() == pytest.approx([0.25 / 0.625, 0.0])


def test_sharing_by_hand():
    def share(evenness, kappa, even=1.0):
        rest = [0.1] * len(kappa), evenness, [100.0] * len(kappa)  # κ itself has no say
        parts = (torch.tensor(part) for part in (*rest, kappa))
        found = ex.sharing(ex.GroupStatistics(*parts), -8.0, 0.9, even, 2.0, 2.0)
        for use, evenly in zip(found.use_G.tolist(), evenness):  # nor has any κ in use
            assert use == pytest.approx(0.9 * min(1, evenly / even))
        return found.direction_G.tolist()

    # well conditioned: share_max times evenness
    assert share([1.0, 0.5, 0.0], [2.0, 2.5, 1.0]) == pytest.approx([0.9, 0.45, 0.0])
    assert share([1.0, 0.6, 0.25], [2.0, 2.5, 1.0], 0.5) == pytest.approx([0.9, 0.9, 0.45])
    # beyond twice the median (4): half of share_min at 5, all of it at 6 and beyond
    assert share([1.0, 1.0, 1.0], [2.0, 2.0, 5.0]) == pytest.approx([0.9, 0.9, -4.0])
    assert share([1.0, 1.0, 1.0], [2.0, 2.0, 1e7]) == pytest.approx([0.9, 0.9, -8.0])
    # what all groups have, none is blamed for; nor what random vectors have
    assert share([1.0, 1.0, 1.0], [9.0, 9.0, 12.0]) == pytest.approx([0.9, 0.9, 0.9])
    assert share([1.0, 1.0, 1.0], [1.0, 1.0, 3.0]) == pytest.approx([0.9, 0.9, 0.9])


def test_sharing_stays_in_its_bounds_and_zero_bounds_switch_it_off():
    g = torch.Generator().manual_seed(0)
    parts = ex.GroupStatistics(
        torch.randn(50, generator=g),
        torch.rand(50, generator=g),
        torch.full((50,), 100.0),
        1 + 9 * torch.rand(50, generator=g),
    )
    share = ex.sharing(parts, -2.0, 0.5, 1.0, 1.5, 2.0)
    assert -2 <= float(share.direction_G.min()) < 0
    assert 0 < float(share.direction_G.max()) <= 0.5
    assert 0 <= float(share.use_G.min()) < float(share.use_G.max()) <= 0.5
    assert all(part.abs().max() == 0 for part in ex.sharing(parts, 0.0, 0.0, 1.0, 1.5, 2.0))
