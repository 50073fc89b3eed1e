"""The known dictionary: what is planted, and what every mode must at least find of it."""

import dataclasses
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


def test_the_truth_itself_scores_full_marks():
    """A dictionary of the true directions finds all; with a copy a domain it is found to cheat."""
    w_TD = WORLD.directions()
    sae = ex.CustomSAE(WORLD.d_in, 2 * len(w_TD), ex.randomness(0))
    with torch.no_grad():
        sae.W_dec.copy_(torch.cat([w_TD, w_TD]))
        sae.W_enc.copy_(sae.W_dec.T)
        sae.b_enc.fill_(-0.5)
        sae.b_enc[len(w_TD) :] = -100.0
    found = gt.score(sae, WORLD, 1.0, tokens=4096)
    assert found["recovery"] == found["found"] == pytest.approx(1)
    assert found["split"] == 0
    with torch.no_grad():
        style = torch.stack([WORLD.sample(4096, k)[0][:].mean(0) for k in range(1)])
        assert style.shape == (1, WORLD.d_in)
