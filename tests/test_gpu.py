"""On a GPU, as far as that can be seen without one: everything is where it must be."""

import dataclasses
from pathlib import Path

import pytest
import torch
from conftest import planted_activations
from pretended_gpu import GPU, OnGPU, PretendedGPU

from experiment import MODES, CustomSAE, CustomTrainer
from lab.console import UserError
from lab.distributed import Processes
from lab.results.final_info import read_result
from lab.storage import randomness


@pytest.fixture
def gpu(processor):
    processor(bfloat16=False)  # so that both compute in float32
    return PretendedGPU()


def test_the_pretended_gpu_refuses_what_a_gpu_refuses(gpu):
    with gpu:
        here = torch.arange(3.0)
        there = here.to(GPU)
        assert isinstance(there, OnGPU)
        assert (there * 2 + 1).cpu().tolist() == [1.0, 3.0, 5.0]
        assert there[torch.tensor([2, 0])].tolist() == [2.0, 0.0]
        with pytest.raises(RuntimeError, match="tensors on cuda:0 and on the CPU"):
            there + here
        with pytest.raises(RuntimeError, match="indices on cuda:0"):
            here[there.long()]
        with pytest.raises(RuntimeError, match="generator of the CPU"):
            torch.randn(3, generator=torch.Generator(), device=GPU)
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        weight = torch.ones(3, device=GPU, requires_grad=True)
        (weight * there).sum().backward()
        assert isinstance(weight.grad, OnGPU)
        assert weight.grad.tolist() == there.tolist()


def test_a_process_without_a_gpu_of_its_own_is_named(gpu, monkeypatch):
    for name, value in {"RANK": "0", "LOCAL_RANK": "1", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    with gpu, pytest.raises(UserError, match="LOCAL_RANK=1, but this machine has 1 GPU"):
        Processes()


def losses(trainer, z, domain, device):
    """The losses of its steps up to the last, some features being dead at first."""
    with torch.no_grad():
        trainer.sae.b_enc[:7] = -100.0
    values, B = [], trainer.row.batch_size
    while trainer.step_count < trainer.row.steps:
        part = torch.arange(trainer.step_count * B, (trainer.step_count + 1) * B) % len(z)
        values.append(trainer.step(z[part].to(device), domain[part].to(device))["loss"])
    return values


@pytest.mark.parametrize("mode", MODES)
def test_training_takes_the_same_path_on_a_gpu(gpu, monkeypatch, small_config, mode):
    monkeypatch.setattr(CustomTrainer, "is_sparse", lambda _: False)  # as on a GPU
    config = dataclasses.replace(small_config, orthogonality=mode)
    z, domain = planted_activations(8192)
    sae = CustomSAE(32, config.expansion * 32, randomness("weights", 0))
    sae.initialize_biases_(z[: config.batch_size], 2 * config.target_l0)
    weights = {name: part.clone() for name, part in sae.state_dict().items()}
    expected = losses(CustomTrainer(config, sae, 0), z, domain, "cpu")
    sae.load_state_dict(weights)
    with gpu:
        trainer = CustomTrainer(config, sae.to(GPU), 0)
        assert losses(trainer, z, domain, GPU) == pytest.approx(expected, rel=1e-4)
        assert float(trainer.state["silent_F"].max()) < config.steps - 1  # the dead were revived
        tensors, note = trainer.state_dict()
        other = CustomSAE(32, config.expansion * 32, randomness("weights", 1)).to(GPU)
        other = CustomTrainer(config, other, 0)
        other.load_state_dict({name: part.cpu() for name, part in tensors.items()}, note)
        batch = z[: config.batch_size].to(GPU), domain[: config.batch_size].to(GPU)
        assert other.step(*batch) == trainer.step(*batch)


@pytest.mark.parametrize("run", ["run_2", "run_9"])
def test_the_main_job_gives_the_same_on_a_gpu(gpu, job, monkeypatch, run):
    monkeypatch.setattr(CustomTrainer, "is_sparse", lambda _: False)  # as on a GPU
    assert job(run) == 0
    monkeypatch.setenv("SAE_CACHE_DIR", "gpu")
    with gpu:
        assert job(f"gpu/{run}") == 0
    on_cpu, on_gpu = (read_result(folder / run) for folder in (Path(), Path("gpu")))
    assert on_gpu["environment"]["device"] == "cuda:0"
    assert gpu.ran["aten::_fused_adam_"] >= 24 * len(on_gpu["seeds"])
    for name, bound in {"l0": 0.01, "explained_variance": 1e-4, "ce_base": 1e-5, "ce_sae": 1e-3,
                        "l_dir": 1e-3, "llm_test_accuracy": 0}.items():
        assert on_gpu["means"][name] == pytest.approx(on_cpu["means"][name], abs=bound), name
    rises = [{tuple(one[key] for key in ("threshold", "n_features", "multiplier")):
              one["forget_ce_rise"] for one in info["unlearning"]["per_seed"][0]["settings"]}
             for info in (on_cpu, on_gpu)]
    both = rises[0].keys() & rises[1].keys()
    assert len(both) >= 8
    assert [rises[1][one] for one in both] == pytest.approx([rises[0][one] for one in both],
                                                            abs=1e-2)


def test_a_gpu_that_has_bfloat16_runs_the_language_model_in_it(gpu, job):
    assert job("run_2") == 0
    gpu.has_bfloat16 = True
    with gpu:
        assert job("gpu/run_2") == 0
    on_cpu, on_gpu = (read_result(folder / "run_2") for folder in (Path(), Path("gpu")))
    assert on_cpu["environment"]["language_model_dtype"] == "float32"
    assert on_gpu["environment"]["language_model_dtype"] == "bfloat16"
    for name in ("ce_base", "ce_sae", "explained_variance"):
        assert on_gpu["means"][name] == pytest.approx(on_cpu["means"][name], rel=0.02)
        assert on_gpu["means"][name] != on_cpu["means"][name]
