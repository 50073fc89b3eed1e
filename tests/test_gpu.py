"""On a GPU, as far as that can be seen without one: everything is where it must be."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import planted_activations
from pretended_gpu import GPU, OnGPU, PretendedGPU

from experiment import MODES, CustomSAE, CustomTrainer
from lab.console import UserError
from lab.device import Readings, copy_stream, to_device
from lab.distributed import Processes
from lab.results.final_info import read_result
from lab.storage import randomness

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import gpu as benchmark  # noqa: E402

CARD = torch.device("cuda", 0)
on_a_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


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


def test_the_pretended_gpu_knows_what_a_program_waits_for(gpu):
    with gpu:
        there = torch.arange(6.0).to(GPU)
        for wait in (there.cpu, there.tolist, there.nonzero, there[0].item,
                     lambda: bool(there[0] > 0), lambda: there[there > 2],
                     lambda: torch.bincount(there.long()), lambda: torch.equal(there, there),
                     lambda: torch.ones(6).to(GPU),
                     lambda: torch.ones(6).pin_memory().to(GPU), lambda: there[torch.tensor([1])],
                     lambda: torch.ones(6).to(GPU, non_blocking=True),
                     lambda: torch.tensor(1.0, device=GPU), lambda: float(there[0])):
            gpu.waited.clear()
            wait()
            assert len(gpu.waited) == 1, gpu.waited
        gpu.waited.clear()
        index = torch.arange(3, device=GPU)
        there[index] = there.index_select(0, index) * 2 + torch.tensor(1.0)
        there.masked_fill_(there > 1, 0.0).clamp_(min=torch.zeros((), device=GPU))
        torch.ones(6).pin_memory().to(GPU, non_blocking=True)
        there.to(torch.bfloat16).copy_(there)
        assert gpu.waited == []


def test_what_is_sent_is_copied_beside_the_work_and_waited_for_by_it_alone(gpu):
    with gpu:
        there = to_device(torch.arange(3), GPU)
        assert gpu.waited == []
        assert gpu.stream.waits_for == [copy_stream(GPU)]
        assert copy_stream(GPU) is not gpu.stream
        assert isinstance(there, OnGPU)
        assert there.tolist() == [0, 1, 2]
    here = torch.arange(3)
    assert to_device(here, here.device) is here


def test_readings_wait_once_for_all_and_only_when_one_is_looked_at(gpu):
    with gpu:
        half = torch.tensor(0.5).to(GPU)
        readings = Readings({"late": half * 3, "early": 2.0, "double": half.double() / 3})
        gpu.waited.clear()
        assert list(readings) == ["late", "early", "double"]
        assert gpu.waited == []
        assert readings["early"] + readings["late"] == 3.5
        assert dict(readings) == {"late": 1.5, "early": 2.0, "double": 0.5 / 3}
        assert gpu.waited == ["aten::_to_copy"]


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_an_ordinary_step_waits_for_nothing(gpu, small_config, mode, bfloat16):
    """Steps that compute L_dir's gradient are ordinary ones. At others features are woken or
    grouped, or their numbers are looked at for a line of the curves."""
    config = dataclasses.replace(small_config, orthogonality=mode)
    z, domain = planted_activations(256)
    sae = CustomSAE(32, config.expansion * 32, randomness("weights", 0))
    with gpu:
        sae.half = bfloat16
        trainer = CustomTrainer(config, sae.to(GPU), 0)
        waits = []
        for step in range(config.steps):
            batch = to_device(z, GPU), to_device(domain, GPU)
            gpu.waited.clear()
            numbers = trainer.step(*batch)
            waits.append(len(gpu.waited))
            if step % 10 == 9:
                gpu.waited.clear()
                trainer.note(numbers)
                assert len(gpu.waited) <= 1
    first = round(config.ramp_fraction * config.steps)
    wakes = {step for step in range(1, config.steps) if step % config.resample_every == 0}
    groups = {step - 1 for step in range(first, config.steps + 1)
              if step == first or step % config.regroup_every == 0}
    assert {step for step, count in enumerate(waits) if count} == (rare := wakes | groups)
    assert len(rare) < config.steps / 5


def test_a_non_finite_loss_on_a_gpu_stops_the_run_when_it_is_looked_at(gpu, small_config):
    z, domain = planted_activations(256)
    z[3, 4] = float("inf")
    for last in ("note", "resample", "regroup"):
        config = dataclasses.replace(small_config, resample_every=6 if last == "resample" else 50,
                                     ramp_fraction=0.1 if last == "regroup" else 0.5)
        with gpu:
            trainer = CustomTrainer(config, CustomSAE(32, 128, randomness(0)).to(GPU), 0)
            for _ in range(5):
                numbers = trainer.step(z.to(GPU), domain.to(GPU))
            with pytest.raises(UserError, match=r"non-finite loss at step .*, seed 0: .*fit nan"):
                trainer.note(numbers) if last == "note" else [
                    trainer.step(z.to(GPU), domain.to(GPU)) for _ in range(2)]


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
    blank = [info["unlearning"]["per_seed"][0]["reference_rise"] for info in (on_cpu, on_gpu)]
    assert blank[1] == pytest.approx(blank[0], abs=1e-4)
    assert max(map(abs, blank[0])) > 1e-3


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


# -- On a real one, which `bash bench/gpu.sh` asks for ---------------------------------------------


def test_the_benchmark_ends_with_one_line_where_there_is_no_card(tmp_path):
    done = subprocess.run(
        ["bash", "bench/gpu.sh", str(tmp_path / "out")], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 1
    assert (done.stdout, done.stderr.count("\n")) == ("", 1)
    assert done.stderr.startswith("no GPU here: torch")
    assert done.stderr.endswith("run bench/gpu.sh where nvidia-smi lists one\n")
    assert not (tmp_path / "out").exists()


def test_the_benchmark_measures_each_of_its_parts(capsys):
    """At a small size, on the CPU."""
    cpu = torch.device("cpu")
    benchmark.steps(cpu, 256, 64, (128,), turns=1, repeats=1)
    benchmark.profile(cpu, 256, 64, (128,), repeats=1)
    benchmark.language_model(cpu, contexts=2, rows=1)
    out = capsys.readouterr().out
    assert "| 128 | ours, dense |" in out
    assert "D = 128, dense:" in out
    assert "aten::" in out
    assert "through the hook and back" in out


def test_the_bound_of_a_step_is_that_of_its_products_and_of_what_it_moves():
    """By hand for an H100: 0.34 TFLOP of five products; 134 MB a reading of [B, F]; 940 MB for the
    weights. Lists move 671 MB in four products."""
    dense, listed = (benchmark.bound(16_384, 4_096, 512, listed) for listed in (False, True))
    assert dense == pytest.approx(0.344e12 / 600e12 + (10 * 134e6 + 940e6) / 3.35e12, rel=0.01)
    assert listed == pytest.approx(0.0687e12 / 600e12 + (2 * 134e6 + 671e6 + 940e6) / 3.35e12,
                                   rel=0.01)


def on_card(config, room=0):
    sae = CustomSAE(32, config.expansion * 32, randomness("weights", 0))
    sae.initialize_biases_(planted_activations(8192)[0][: config.batch_size], 16.0)
    sae.room = room
    return CustomTrainer(config, sae.to(CARD), 0)


@on_a_card
@pytest.mark.parametrize("room", [0, 64])
@pytest.mark.parametrize("mode", MODES)
def test_on_a_card_training_takes_the_path_of_the_cpu(small_config, processor, mode, room):
    """For the steps in which rounding has not yet grown."""
    processor(bfloat16=False)
    config = dataclasses.replace(small_config, orthogonality=mode, steps=12, ramp_fraction=0.5)
    z, domain = planted_activations(8192)
    here = CustomSAE(32, config.expansion * 32, randomness("weights", 0))
    here.initialize_biases_(z[: config.batch_size], 16.0)
    expected = losses(CustomTrainer(config, here, 0), z, domain, "cpu")
    trainer = on_card(config, room)
    trainer.direction_dtype = torch.float32
    assert losses(trainer, z, domain, CARD) == pytest.approx(expected, rel=1e-3)


@on_a_card
@pytest.mark.parametrize("room", [0, 64])
@pytest.mark.parametrize("mode", MODES)
def test_on_a_card_an_ordinary_step_waits_for_nothing(small_config, mode, room):
    trainer = on_card(dataclasses.replace(small_config, orthogonality=mode, steps=100), room)
    trainer.sae.half = True
    z, domain = planted_activations(256)
    for _ in range(3):  # kernels are built, memory is taken
        trainer.step(to_device(z, CARD), to_device(domain, CARD))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(8):
            numbers = trainer.step(to_device(z, CARD), to_device(domain, CARD))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert 0 < numbers["fit"] < 1.5


@on_a_card
@pytest.mark.parametrize(("half", "error"), [(False, 1e-4), (True, 0.1)])
def test_on_a_card_the_kernels_have_the_gradients_of_the_dense_products(half, error):
    sae = CustomSAE(512, 4096, randomness("weights", 0)).to(CARD)
    z = torch.randn(1024, 512, generator=randomness("z")).to(CARD) / 512**0.5
    sae.initialize_biases_(z, 40.0)
    sae.half = half
    gradients = []
    for room in (0, 128):
        sae.room = room
        code = sae.gpu_code(z)
        total_KF, total = code.totals(torch.arange(1024, device=CARD) % 2, 2, 4096)
        loss = (z - code.z_hat_BD).norm(dim=1).sum() + 0.04 * total + total_KF[0].square().sum()
        gradients.append(torch.autograd.grad(loss, list(sae.parameters())))
    for one, other in zip(*gradients):
        assert float((one - other).norm() / other.norm()) < error
