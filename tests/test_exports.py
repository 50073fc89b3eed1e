"""Exports: the same SAE in both layouts, for raw activations, with names that load or none."""

import dataclasses
import json
import re
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from experiment import CustomSAE, CustomSAEConfig
from lab.results.exports import SAE_LENS_VERSION, export_sae, hook_name, sae_cfg_dict
from lab.sparse import ExportedSAE
from lab.storage import randomness
from lab.substrates import Pythia, Standin
from lab.substrates.texts import Sizes

SCALE = 7.3  # of the activations that it is trained on
TRAINER = {**dataclasses.asdict(CustomSAEConfig()), **dataclasses.asdict(Sizes()), "seed": 0,
           "alpha": 0.123, "d_in": 24, "d_sae": 96}


@pytest.fixture
def sae():
    """As trained: on activations divided by their scale."""
    sae = CustomSAE(24, 96, randomness("exports"))
    with torch.no_grad():
        sae.b_dec.add_(0.1)
        sae.b_enc.sub_(0.1)
    return sae


@pytest.fixture
def z():
    return torch.randn(64, 24, generator=randomness("z")) / 24**0.5


def exported(sae, folder, source=Pythia):
    export_sae(sae.exported(SCALE), folder, source, TRAINER)
    lens, learning = folder / "sae_lens", folder / "dictionary_learning" / "trainer_0"
    return (load_file(lens / "sae_weights.safetensors"),
            json.loads((lens / "cfg.json").read_text()),
            torch.load(learning / "ae.pt", weights_only=True),
            json.loads((learning / "config.json").read_text()))


def test_the_exported_sae_on_raw_activations_is_the_trained_one_on_normalised(sae, z):
    """f·c, ẑ·c: features come out in raw units."""
    raw = sae.exported(SCALE)
    torch.testing.assert_close(raw.encode(z * SCALE), sae.encode(z) * SCALE, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(raw.reconstruct(z * SCALE), sae(z) * SCALE, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(raw.code(z * SCALE).z_hat_BD, sae(z) * SCALE, atol=1e-5, rtol=1e-5)


def test_an_export_does_not_change_when_training_goes_on(sae):
    raw = sae.exported(SCALE)
    before = {name: part.clone() for name, part in raw.tensors().items()}
    with torch.no_grad():
        for part in sae.parameters():
            part.add_(1.0)
    assert all(torch.equal(part, before[name]) for name, part in raw.tensors().items())


def test_both_layouts_hold_the_trained_sae(sae, z, tmp_path):
    lens, _, learning, _ = exported(sae, tmp_path)
    x = z * SCALE
    f = torch.relu((x - lens["b_dec"]) @ lens["W_enc"] + lens["b_enc"])
    torch.testing.assert_close(f, sae.encode(z) * SCALE, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(f @ lens["W_dec"] + lens["b_dec"], sae(z) * SCALE, atol=1e-5,
                               rtol=1e-5)
    g = torch.relu((x - learning["bias"]) @ learning["encoder.weight"].T
                   + learning["encoder.bias"])
    x_hat = g @ learning["decoder.weight"].T + learning["bias"]
    torch.testing.assert_close(x_hat, sae(z) * SCALE, atol=1e-5, rtol=1e-5)


def test_a_batch_topk_sae_keeps_its_threshold_in_both_layouts(sae, z, tmp_path):
    raw = sae.exported(SCALE, 0.3)
    export_sae(raw, tmp_path, Pythia, {**TRAINER, "activation": "batch_topk"})
    x, a = z * SCALE, (z - sae.b_dec) @ sae.W_enc + sae.b_enc
    f = SCALE * a * (a > 0.3)
    assert 0 < int((f > 0).sum()) < int((a > 0).sum())
    torch.testing.assert_close(raw.encode(x), f, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(raw.code(x).z_hat_BD, raw.reconstruct(x), atol=1e-5, rtol=1e-5)
    lens = load_file(tmp_path / "sae_lens" / "sae_weights.safetensors")
    assert lens["threshold"].tolist() == pytest.approx([0.3 * SCALE] * 96)
    assert torch.equal(ExportedSAE.of(lens).encode(x), raw.encode(x))
    assert json.loads((tmp_path / "sae_lens/cfg.json").read_text())["architecture"] == "jumprelu"
    folder = tmp_path / "dictionary_learning" / "trainer_0"
    learning = torch.load(folder / "ae.pt", weights_only=True)
    assert learning.keys() == {"encoder.weight", "encoder.bias", "decoder.weight", "b_dec", "k",
                               "threshold"}
    assert float(learning["threshold"]) == pytest.approx(0.3 * SCALE)
    told = json.loads((folder / "config.json").read_text())["trainer"]
    assert told["dict_class"] == "BatchTopKSAE"
    assert told["k"] == int(learning["k"]) == 40


def test_sae_lens_is_told_how_the_sae_takes_its_input(sae, tmp_path):
    cfg = exported(sae, tmp_path)[1]
    told = {"architecture": "standard", "d_in": 24, "d_sae": 96, "dtype": "float32",
            "apply_b_dec_to_input": True, "normalize_activations": "none",
            "reshape_activations": "none"}
    assert told.items() <= cfg.items()
    assert re.fullmatch(r"6\.\d+\.\d+", cfg["metadata"]["sae_lens_version"])
    assert cfg["metadata"]["sae_lens_version"] == SAE_LENS_VERSION
    assert cfg["metadata"]["hook_name"] == "blocks.3.hook_resid_post"
    assert cfg["metadata"]["context_size"] == 128
    assert cfg["metadata"]["alpha"] == 0.123


def test_dictionary_learning_is_told_its_class_and_the_alpha_that_trained(sae, tmp_path):
    trainer = exported(sae, tmp_path)[3]["trainer"]
    told = {"dict_class": "AutoEncoder", "activation_dim": 24, "dict_size": 96, "layer": 3,
            "alpha": 0.123, "seed": 0, "lm_name": Pythia.model_name}
    assert told.items() <= trainer.items()


def test_a_model_that_nothing_can_load_has_no_name_but_a_description(sae, tmp_path):
    """A GGUF file and packages of text: SAELens would try to load whatever stands there."""
    _, cfg, _, config = exported(sae, tmp_path, Standin)
    assert cfg["metadata"]["model_name"] is None
    assert cfg["metadata"]["dataset_path"] is None
    assert config["trainer"]["lm_name"] is None
    assert cfg["metadata"]["model_description"] == Standin.model_name
    assert cfg["metadata"]["dataset_description"] == Standin.text
    described = sae_cfg_dict(TRAINER, Standin)
    assert described["model_name"] is described["dataset_path"] is None


def test_a_model_of_the_hub_goes_by_the_name_under_which_it_loads(sae, tmp_path):
    metadata = exported(sae, tmp_path)[1]["metadata"]
    assert metadata["model_name"] == "EleutherAI/pythia-70m-deduped"
    assert metadata["dataset_path"] == "Salesforce/wikitext"


def test_saebench_is_told_the_tokens_of_training_and_the_hook():
    described = sae_cfg_dict(TRAINER, SimpleNamespace(layer=7, loadable_name=None,
                                                      dataset_path=None))
    assert described["training_tokens"] == 600 * 2048
    assert described["hook_name"] == hook_name(SimpleNamespace(layer=7))
    assert described["hook_layer"] == 7


def test_exports_hold_no_pickled_code(sae, tmp_path):
    weights = exported(sae, tmp_path)[2]  # weights_only refuses all but tensors
    assert {part.dtype for part in weights.values()} == {torch.float32}
    assert all(part.is_contiguous() for part in weights.values())
