"""The evaluation's grouping on planted structure; condition numbers by hand."""

import math

import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from lab.grouping import (
    CoactivationSketch,
    assign_balanced,
    condition_numbers,
    group_features,
    group_statistics,
    random_condition_number,
)
from lab.sparse import Code


def add(sketch, fires, generator):
    """A batch in which feature j fires on token i where `fires[i, j]`."""
    row, column = fires.nonzero(as_tuple=True)
    sketch.add_(Code(row, row, row, column), len(fires), generator)


def planted(n_features, size, tokens=32768, seed=0):
    """Groups of features that fire together, at frequencies of their own, and their sketch."""
    g = torch.Generator().manual_seed(seed)
    n_groups = n_features // size
    label = torch.arange(n_groups).repeat_interleave(size)
    label = label[torch.randperm(n_features, generator=g)]
    frequency = 0.25 + 1.5 * torch.rand(n_features, generator=g)
    sketch = CoactivationSketch(n_features, 512)
    for _ in range(tokens // 2048):
        on = (torch.rand(2048, n_groups, generator=g) < 0.04).float()
        chance = (on[:, label] * 0.3 + 0.005) * frequency
        add(sketch, torch.rand(2048, n_features, generator=g) < chance, g)
    return label, sketch


def labels_of(groups):
    labels = torch.empty(groups.numel(), dtype=torch.long)
    labels[groups] = torch.arange(len(groups))[:, None].expand_as(groups)
    return labels


# -- Which features fire together ----------------------------------------------------------------


def test_inner_products_of_the_sketchs_rows_are_correlations_of_firing():
    """Computed here directly."""
    g = torch.Generator().manual_seed(2)
    base = torch.rand(20000, 1, generator=g) < 0.3
    fires = base & (torch.rand(20000, 6, generator=g) < 0.5)
    fires[:, 5] = torch.rand(20000, generator=g) < 0.2
    sketch = CoactivationSketch(6, 4096)
    add(sketch, fires, g)
    rows = sketch.unit_rows()
    torch.testing.assert_close(rows @ rows.T, torch.corrcoef(fires.T.float()), atol=0.08, rtol=0)


def test_features_that_fire_never_or_always_have_zero_rows():
    g = torch.Generator().manual_seed(0)
    fires = torch.rand(100, 4, generator=g) < 0.5
    fires[:, 1], fires[:, 2] = False, True
    sketch = CoactivationSketch(4, 64)
    add(sketch, fires, g)
    norm = sketch.unit_rows().norm(dim=1)
    assert norm[1:3].tolist() == [0, 0]
    assert float(norm[[0, 3]].min()) > 0.5


# -- Groups --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_features", "size"), [(512, 32), (1024, 64), (2304, 64)])
def test_planted_groups_are_recovered(n_features, size):
    label, sketch = planted(n_features, size)
    groups = group_features(sketch.unit_rows(), size, seed=0)
    assert adjusted_rand_score(label, labels_of(groups)) >= 0.9


def test_features_that_fire_alone_are_not_grouped_by_their_frequency():
    g = torch.Generator().manual_seed(1)
    frequency = torch.logspace(-3, -0.7, 512)
    sketch = CoactivationSketch(512, 512)
    for _ in range(16):
        add(sketch, torch.rand(2048, 512, generator=g) < frequency, g)
    groups = group_features(sketch.unit_rows(), 32, seed=0)
    level = (frequency.argsort().argsort() // 32).float()
    assert abs(adjusted_rand_score(level, labels_of(groups))) < 0.05
    between = level[groups].mean(1).var() / level.var()
    assert float(between) < 3 / 32  # what 32 random members give is 1/32


def test_every_feature_is_in_one_group_and_groups_are_of_equal_size_with_dead_features_too():
    _, sketch = planted(512, 32, tokens=8192)
    rows = sketch.unit_rows()
    rows[100:200] = 0  # dead
    groups = group_features(rows, 32, seed=3)
    assert groups.shape == (16, 32)
    assert torch.equal(groups.flatten().sort().values, torch.arange(512))


def test_groups_are_the_same_each_time():
    _, sketch = planted(512, 32, tokens=8192)
    one, other = (group_features(sketch.unit_rows(), 32, seed=3) for _ in range(2))
    assert torch.equal(one, other)


def test_features_that_do_not_divide_into_groups_are_refused():
    with pytest.raises(ValueError, match="500 features do not divide into groups of 32"):
        group_features(torch.zeros(500, 8), 32, seed=0)


@pytest.mark.parametrize("rows", [torch.zeros(128, 64), torch.ones(128, 64)])
def test_features_that_all_fire_alike_or_never_are_grouped_all_the_same(rows):
    groups = group_features(rows, 16, seed=0)
    assert groups.shape == (8, 16)
    assert groups.unique().numel() == 128


def test_a_deep_tree_is_balanced():
    rows = torch.randn(1024, 32, generator=torch.Generator().manual_seed(0))
    groups = group_features(rows, 8, seed=0, branch=4)
    assert groups.shape == (128, 8)
    assert groups.unique().numel() == 1024


def test_balanced_assignment_by_hand():
    score = torch.tensor([[0.9, 0.1], [0.8, 0.7], [0.7, 0.0], [0.1, 0.2]])
    # rows 0 and 1 take column 0 (best bids), row 2 finds it full, row 3 is in column 1
    assert assign_balanced(score, torch.tensor([2, 2])).tolist() == [0, 0, 1, 1]


# -- What is known of a group --------------------------------------------------------------------


def test_condition_numbers_by_hand():
    angle = math.radians(60)
    W = torch.tensor([[1, 0, 0], [0, 1, 0], [math.cos(angle), math.sin(angle), 0], [1, 0, 0]])
    groups = torch.tensor([[0, 1], [0, 2], [0, 3]])
    kappa = condition_numbers(W, groups)
    # two unit vectors at angle t: singular values sqrt(1 ± cos t)
    assert kappa[:2].tolist() == pytest.approx([1.0, math.sqrt(1.5 / 0.5)], rel=1e-6)
    assert kappa[2] == pytest.approx(1e7)  # dependent rows: the largest value that can be told
    assert torch.isfinite(condition_numbers(torch.zeros(4, 3), groups)).all()


def test_random_vectors_have_the_condition_number_that_is_said_of_them():
    g = torch.Generator().manual_seed(0)
    W = torch.nn.functional.normalize(torch.randn(64 * 20, 576, generator=g), dim=1)
    kappa = condition_numbers(W, torch.arange(1280).view(20, 64))
    assert float(kappa.median()) == pytest.approx(random_condition_number(64, 576), rel=0.05)


def test_coactivation_of_groups_by_hand():
    rows = torch.tensor([[1.0, 0], [1, 0], [1, 0], [0, 1]])
    statistics = group_statistics(rows, torch.eye(4), torch.tensor([[0, 1], [2, 3]]))
    assert statistics.coactivation_G.tolist() == [1.0, 0.0]
