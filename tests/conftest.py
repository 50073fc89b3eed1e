"""Fixtures that several test files share."""

import os
import signal
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import small
from main_job import MainJob

import experiment
from lab.substrates import quiet_libraries

quiet_libraries()
torch.set_num_threads(small.THREADS)


@pytest.fixture(scope="session", autouse=True)
def early_main_job(request, tmp_path_factory):
    """The real main job of the session, one for all workers: it takes a core for minutes, so it
    begins with the first test, whichever that is, if any test needs it."""
    if not any("main_job" in item.fixturenames for item in request.session.items):
        yield None
        return
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "main"
    folder.mkdir(exist_ok=True)
    cache = os.environ.get("SAE_CACHE_DIR", str(folder / "cache"))
    started = MainJob(folder, "run_1", SAE_CACHE_DIR=cache, OMP_NUM_THREADS="1")
    yield started
    if "PYTEST_XDIST_WORKER" not in os.environ:
        started.stop()


@pytest.fixture(scope="session")
def main_job(early_main_job):
    """The real main job, which has ended well; downloads are kept where SAE_CACHE_DIR points."""
    assert early_main_job.wait() == 0, early_main_job.stderr.read_text()[-1500:]
    return early_main_job


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def small_config():
    """A trainer's row for tests: small, quick, two domains."""
    return experiment.CustomSAEConfig(
        purpose="test", expansion=4, group_size=8, steps=60, batch_size=256, target_l0=8.0,
        warmup_steps=5, regroup_every=20, resample_every=20, counted_tokens=2048, log_every=10)


@pytest.fixture(scope="session")
def small_hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    small.local_hub(folder)
    return folder


@pytest.fixture(scope="session")
def whole(small_hub, tmp_path_factory):
    """Folder in which run_1 of the small job ran undisturbed: in a process of its own, on an ASCII
    terminal, with secrets about."""
    folder = tmp_path_factory.mktemp("whole")
    done = small.started(small_hub, folder, PYTHONIOENCODING="ascii", **small.SECRETS)
    assert done.returncode == 0, done.stderr[-1500:]
    (folder / "stderr").write_text(done.stderr)
    (folder / "stdout").write_text(done.stdout)
    return folder


@pytest.fixture
def job(small_hub, tmp_path, monkeypatch):
    """The small main job in a folder of its own; gives the exit code."""
    small.prepare(small_hub, monkeypatch.setattr)
    settings = {"SAE_SUBSTRATE": "pythia", "SAE_BUDGET": "smoke",
                "SAE_CACHE_DIR": str(tmp_path / "cache"), "WANDB_MODE": "disabled"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield lambda out_dir="run_1": experiment.main([f"--out_dir={out_dir}"])
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def processor(monkeypatch):
    """Makes the processor one with products in bfloat16, or one without."""
    capabilities = torch.cpu.get_capabilities()
    return lambda bfloat16: monkeypatch.setattr(
        torch.cpu, "get_capabilities",
        lambda: {**capabilities, "avx512_bf16": bfloat16, "amx_bf16": False})


def planted_activations(n_tokens, d_in=32, n_true=64, active=4, seed=0):
    """Sparse sums of unit directions; the first half fires on domain 0, the rest on domain 1."""
    g = torch.Generator().manual_seed(seed)
    truth = torch.nn.functional.normalize(torch.randn(n_true, d_in, generator=g), dim=1)
    domain = torch.randint(0, 2, (n_tokens,), generator=g)
    half = n_true // 2
    pick = torch.randint(0, half, (n_tokens, active), generator=g) + domain[:, None] * half
    size = 0.5 + torch.rand(n_tokens, active, generator=g)
    z = (truth[pick] * size[..., None]).sum(1)
    return z / z.square().sum(1).mean().sqrt(), domain
