"""The known dictionary: what is planted, and what every mode must at least find of it."""

import sys
from pathlib import Path

import pytest
import torch

import experiment as ex

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))

import ground_truth as gt

WORLD, CONFIG = gt.QUICK


def test_the_world_is_as_planted():
    w_TD, sharing = WORLD.directions(), WORLD.sharing_T
    torch.testing.assert_close(w_TD.norm(dim=1), torch.ones(len(w_TD)))
    cosine = (w_TD @ w_TD.T).view(WORLD.n_groups, WORLD.group_size, WORLD.n_groups, -1)
    group = torch.arange(WORLD.n_groups)
    within = cosine[group, :, group]
    off_diagonal = ~torch.eye(WORLD.group_size, dtype=torch.bool)
    mean_G = within[:, off_diagonal].mean(1)
    shares_G = sharing.view(WORLD.n_groups, -1)[:, 0]
    assert mean_G[shares_G] == pytest.approx(WORLD.common, abs=0.1)
    assert mean_G[~shares_G] == pytest.approx(0, abs=0.1)
    assert float(cosine[0, :, WORLD.groups_specific].mean()) > WORLD.common - 0.2  # two meanings
    z, domain, a = WORLD.sample(20_000, "a test")
    again = WORLD.sample(20_000, "a test")
    assert all(torch.equal(one, other) for one, other in zip((z, domain, a), again))
    use = torch.stack([(a[domain == k] > 0).float().mean(0) for k in range(2)])
    assert use[1][WORLD.domain_T == 0].max() == use[0][WORLD.domain_T == 1].max() == 0
    general = use[:, WORLD.domain_T == gt.GENERAL].mean(1)
    assert float(general[0] / general[1]) == pytest.approx(1, abs=0.1)
    fires = (a[:, : WORLD.group_size] > 0).float()[domain == 0]
    correlation = torch.corrcoef(fires.T)[off_diagonal]
    assert float(correlation.mean()) > 0.05  # members fire together
    third = WORLD.sample(1000, "a test", third=True)[2]
    assert third[:, WORLD.domain_T == 0].max() == 0  # and say nothing of the domain they look like


@pytest.fixture
def exact():
    """A world whose directions are independent, and an SAE that reads it without error."""
    world = gt.World(d_in=256, group_size=4, groups_specific=2, groups_general=2)
    w_TD = world.directions()
    sae = ex.CustomSAE(world.d_in, 2 * len(w_TD), ex.randomness(0))
    read_DT = torch.linalg.pinv(torch.cat([w_TD, world.styles()]))
    with torch.no_grad():
        sae.W_dec.copy_(torch.cat([w_TD, w_TD]))
        sae.W_enc.copy_(read_DT[:, : len(w_TD)].repeat(1, 2))
        sae.b_enc.copy_(torch.tensor([-0.2, -100.0]).repeat_interleave(len(w_TD)))
    return world, sae, read_DT[:, len(w_TD) :]


def test_the_truth_scores_full_marks(exact):
    world, sae, _ = exact
    found = gt.score(sae, world, 1.0)
    full = dict.fromkeys(("recovery", "sharing", "general", "found", "separated"), 1.0)
    assert {name: found[name] for name in full} == pytest.approx(full)
    assert found["purity"] > 0.98
    assert found["correlation"] > 0.98
    assert found["evenness"] > 0.9
    assert found["split"] == 0
    assert found["style"] < 0.02


def test_a_copy_for_each_domain_is_noticed(exact):
    """Features that read how a text is written besides what it says: the cheat."""
    world, sae, style_DK = exact
    with torch.no_grad():
        for k, part in enumerate(torch.arange(sae.d_sae).chunk(2)):
            sae.W_enc[:, part] += 9 * style_DK[:, k : k + 1]
            sae.b_enc[part] = -9.2
    found = gt.score(sae, world, 1.0)
    assert found["split"] == int((world.domain_T == gt.GENERAL).sum())
    assert found["evenness"] < 0.1
    assert found["style"] > 0.2  # the text of the other domain's things, but for the general ones


def test_training_finds_the_dictionary():
    lines = {
        name: changes for name, changes in gt.settings((0.05,)).items()
        if name in ("off", "fixed 0.05", "adaptive 0.05", "max_cosine 0.25")
    }
    assert len(lines) == 4
    found = {name: scores[0] for name, scores in gt.measure(WORLD, CONFIG, lines, [0]).items()}
    for scores in found.values():
        assert scores["recovery"] > 0.7
        assert scores["l0"] == pytest.approx(WORLD.l0(), rel=0.15)
        assert scores["split"] <= 0.1 * WORLD.groups_general * WORLD.group_size
    assert found["adaptive 0.05"]["purity"] > found["off"]["purity"]
    assert len(gt.table({name: [scores] for name, scores in found.items()}).splitlines()) == 6


def test_the_use_term_makes_features_purer_and_sharing_restrains_it():
    """By itself it also splits general features in two, which is what sharing is for."""
    lines = {"off": dict(orthogonality="off", alpha=0.0),
             "shared": dict(orthogonality="adaptive", alpha=0.05),
             "not shared": dict(orthogonality="adaptive", alpha=0.05, share_max=0.0)}
    found = {name: scores[0] for name, scores in gt.measure(WORLD, CONFIG, lines, [0]).items()}
    purity, split, evenness = ({name: scores[key] for name, scores in found.items()}
                               for key in ("purity", "split", "evenness"))
    assert purity["not shared"] > purity["off"] + 0.05
    assert split["shared"] < split["not shared"]
    assert evenness["shared"] > evenness["not shared"] + 0.2
