"""The known dictionary: what is planted, and what every mode must at least find of it."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

from lab.sparse import ExportedSAE

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))

import ground_truth as gt

WORLD, CONFIG = gt.QUICK


def test_directions_firing_and_styles_are_as_planted():
    world = dataclasses.replace(WORLD, dense=3)
    w_TD, sharing = world.directions(), world.sharing_T
    torch.testing.assert_close(w_TD.norm(dim=1), torch.ones(len(w_TD)))
    grouped_TD = w_TD[~world.dense_T]
    cosine = (grouped_TD @ grouped_TD.T).view(world.n_groups, world.group_size, world.n_groups, -1)
    group = torch.arange(world.n_groups)
    within = cosine[group, :, group]
    off_diagonal = ~torch.eye(world.group_size, dtype=torch.bool)
    mean_G = within[:, off_diagonal].mean(1)
    shares_G = sharing[~world.dense_T].view(world.n_groups, -1)[:, 0]
    assert mean_G[shares_G] == pytest.approx(world.common, abs=0.1)
    assert mean_G[~shares_G] == pytest.approx(0, abs=0.1)
    assert float(cosine[0, :, world.groups_specific].mean()) > world.common - 0.2  # two meanings
    z, domain, a = world.sample(20_000, "a test")
    again = world.sample(20_000, "a test")
    assert all(torch.equal(one, other) for one, other in zip((z, domain, a), again))
    use = torch.stack([(a[domain == k] > 0).float().mean(0) for k in range(2)])
    assert use[1][world.domain_T == 0].max() == use[0][world.domain_T == 1].max() == 0
    general = use[:, world.domain_T == gt.GENERAL].mean(1)
    assert float(general[0] / general[1]) == pytest.approx(1, abs=0.1)
    fires = (a[:, : world.group_size] > 0).float()[domain == 0]
    correlation = torch.corrcoef(fires.T)[off_diagonal]
    assert float(correlation.mean()) > 0.05  # members fire together
    assert world.dense_T.sum() == world.dense > 0
    often = (a[:, world.dense_T] > 0).float().mean(0)
    assert often.tolist() == pytest.approx([world.dense_rate] * world.dense, abs=0.02)
    third = world.sample(1000, "a test", third=True)[2]
    assert third[:, world.domain_T == 0].max() == 0  # and say nothing of the domain they look like


@pytest.fixture
def exact():
    """A world whose directions are independent, and what reads each of them twice without error:
    encoder rows, biases, decoder rows, and what reads the styles."""
    world = gt.World(d_in=256, group_size=4, groups_specific=2, groups_general=2)
    w_TD = world.directions()
    n, read_DT = len(w_TD), torch.linalg.pinv(torch.cat([w_TD, world.styles()]))
    return world, read_DT[:, :n].repeat(1, 2), torch.cat([w_TD, w_TD]), read_DT[:, n:]


def test_the_truth_scores_full_marks(exact):
    world, W_enc, W_dec, _ = exact
    n = len(W_dec) // 2
    bias = torch.tensor([-0.2, -100.0]).repeat_interleave(n)  # of the copies, one never fires
    scores = gt.score(ExportedSAE(W_enc, bias, W_dec, torch.zeros(world.d_in)), world)
    full = dict.fromkeys(("recovery", "sharing", "general", "found", "separated"), 1.0)
    assert {name: scores[name] for name in full} == pytest.approx(full)
    assert scores["purity"] > 0.98
    assert scores["correlation"] > 0.98
    assert scores["evenness"] > 0.9
    assert scores["split"] == 0
    assert scores["style"] < 0.02


def test_a_copy_of_general_features_for_each_domain_is_noticed(exact):
    """Features that read how a text is written besides what it says: the cheat."""
    world, W_enc, W_dec, style_DK = exact
    W_enc = W_enc + 9 * style_DK.repeat_interleave(len(W_dec) // 2, dim=1)
    bias = torch.full((len(W_dec),), -9.2)
    scores = gt.score(ExportedSAE(W_enc, bias, W_dec, torch.zeros(world.d_in)), world)
    assert scores["split"] == int((world.domain_T == gt.GENERAL).sum())
    assert scores["evenness"] < 0.1
    assert scores["style"] > 0.2  # the text of the other domain's things, but for the general ones


def measured(**lines):
    """Scores of the first seed in the small world, by line."""
    return {name: scores[0] for name, scores in gt.measure(WORLD, CONFIG, lines, [0]).items()}


def test_every_mode_finds_the_dictionary():
    lines = gt.settings((0.05,))
    modes = ("off", "gram_encoder 0.05", "fixed 0.05", "adaptive 0.05", "max_cosine 0.25")
    results = measured(**{name: lines[name] for name in modes})
    for scores in results.values():
        assert scores["recovery"] > 0.7
        assert scores["l0"] == pytest.approx(WORLD.l0(), rel=0.15)
        assert scores["split"] <= 0.1 * WORLD.groups_general * WORLD.group_size
    assert results["adaptive 0.05"]["purity"] > results["off"]["purity"]


def test_the_table_has_a_line_for_every_setting_with_errors_over_seeds():
    head, _, one, two = gt.table({"off": [{"recovery": 0.5}],
                                  "fixed": [{"recovery": 1.0}, {"recovery": 0.5}]}).splitlines()
    assert head == "| | recovery |"
    assert (one, two) == ("| off | 0.500 |", "| fixed | 0.750 ± 0.250 |")


def test_the_use_term_makes_features_purer_and_sharing_restrains_it():
    """By itself it also splits general features in two, which is what sharing is for."""
    results = measured(**{"off": dict(orthogonality="off", alpha=0.0),
                          "shared": dict(orthogonality="adaptive", alpha=0.05),
                          "not shared": dict(orthogonality="adaptive", alpha=0.05, share_use=0.0)})
    purity, split, evenness = ({name: scores[key] for name, scores in results.items()}
                               for key in ("purity", "split", "evenness"))
    assert purity["not shared"] > purity["off"] + 0.05
    assert split["shared"] < split["not shared"]
    assert evenness["shared"] > evenness["not shared"] + 0.2
