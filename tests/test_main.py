"""The real main job on the stand-in at smoke budget."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import experiment as ex

ROOT = Path(__file__).resolve().parent.parent


def command(folder, out_dir, **environment):
    env = {
        **os.environ,
        "SAE_BUDGET": "smoke",
        "SAE_SUBSTRATE": "standin",
        "WANDB_MODE": "offline",
        **environment,
    }
    return subprocess.run(
        [sys.executable, ROOT / "experiment.py", f"--out_dir={out_dir}"],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="session")
def study(tmp_path_factory):
    """A folder in which run_1 has run; downloads are kept where SAE_CACHE_DIR points, if set."""
    folder = tmp_path_factory.mktemp("study")
    cache = os.environ.get("SAE_CACHE_DIR", str(folder / "cache"))
    done = command(folder, "run_1", SAE_CACHE_DIR=cache)
    assert done.returncode == 0, done.stderr[-1500:]
    return folder, cache, done


def test_main_job_writes_everything(study):
    folder, _, done = study
    info = json.loads((folder / "run_1" / "final_info.json").read_text())
    baseline = json.loads((ROOT / "run_0" / "final_info.json").read_text())
    assert set(baseline) <= set(info)
    assert set(baseline["eval_config"]) == set(info["eval_config"])
    assert set(baseline["sae_cfg_dict"]) == set(info["sae_cfg_dict"])
    for side in ("llm", "sae"):
        assert set(info["eval_result_metrics"][side]) == set(baseline["eval_result_metrics"][side])
    assert set(info["eval_result_details"][0]) == set(baseline["eval_result_details"][0])
    for key in (
        "substrate",
        "budget",
        "config",
        "means",
        "stderrs",
        "reconstruction",
        "conditioning",
        "unlearning",
        "environment",
        "timing",
    ):
        assert key in info
    assert (info["substrate"], info["budget"], info["config"]["alpha"]) == ("standin", "smoke", 0.1)
    assert [row["seed"] for row in info["seeds"]] == [0, 1]
    assert info["means"]["ce_score"] > 0.2
    assert info["means"]["explained_variance"] > 0.3
    assert info["means"]["llm_test_accuracy"] > 0.75
    assert all(error is not None for name, error in info["stderrs"].items() if info["means"][name])
    lines = [
        json.loads(line) for line in (folder / "run_1" / "history.jsonl").read_text().splitlines()
    ]
    assert {line["seed"] for line in lines} == {0, 1}
    assert all(line["alpha"] == 0.1 for line in lines if "alpha" in line)
    config = json.loads((folder / "run_1" / "config.json").read_text())
    assert config["orthogonality"] == "adaptive"
    assert "run_1 on standin (smoke)" in done.stdout
    assert "=== run_1 (" in (folder / "notes.txt").read_text()


def test_exports_are_the_same_sae(study):
    folder = study[0] / "run_1" / "seed_0"
    lens = load_file(folder / "sae_lens" / "sae_weights.safetensors")
    other = torch.load(folder / "dictionary_learning" / "trainer_0" / "ae.pt", weights_only=True)
    torch.testing.assert_close(lens["W_enc"], other["encoder.weight"].T)
    torch.testing.assert_close(lens["W_dec"], other["decoder.weight"].T)
    torch.testing.assert_close(lens["W_dec"].norm(dim=1), torch.ones(len(lens["W_dec"])))


def test_a_second_run_gives_the_same_numbers_from_the_cache(study):
    folder, cache, _ = study
    before = json.loads((folder / "run_1" / "final_info.json").read_text())
    assert command(folder, "again/run_1", SAE_CACHE_DIR=cache).returncode == 0
    after = json.loads((folder / "again" / "run_1" / "final_info.json").read_text())
    times = ("timing", "datetime_epoch_millis")
    assert {k: v for k, v in before.items() if k not in times} == {
        k: v for k, v in after.items() if k not in times
    }


def test_plot_draws_the_run(study):
    folder = study[0]
    done = subprocess.run(
        [sys.executable, ROOT / "plot.py"], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-1500:]
    assert (folder / "figures" / "overview.png").stat().st_size > 10_000


def test_help_lists_rows_and_variables():
    done = subprocess.run(
        [sys.executable, ROOT / "experiment.py", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith("  run_")]
    assert [row[0] for row in rows] == list(ex.RUNS)
    assert [row[2] for row in rows] == [str(row.get("alpha", "best")) for row in ex.RUNS.values()]
    for name in ("SAE_SUBSTRATE", "SAE_BUDGET", "SAE_CACHE_DIR", "WANDB_MODE"):
        assert f"  {name} " in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100


def one_line_error(done):
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0
    assert len(lines) == 1
    assert "Traceback" not in done.stderr
    return lines[0]


def test_bad_input_gives_one_line_and_harms_nothing(tmp_path):
    cache = str(tmp_path / "cache")
    done = command(tmp_path, "run_11", SAE_CACHE_DIR=cache)
    assert "'run_11'" in one_line_error(done)
    assert "run_10" in done.stderr
    done = command(tmp_path, "run_10", SAE_CACHE_DIR=cache)
    assert "missing: run_1, run_2, run_3, run_4, run_5" in one_line_error(done)
    (tmp_path / "run_2").write_text("precious")
    assert "is a file" in one_line_error(command(tmp_path, "run_2", SAE_CACHE_DIR=cache))
    assert (tmp_path / "run_2").read_text() == "precious"
    assert "nonsense" in one_line_error(command(tmp_path, "run_3", SAE_BUDGET="nonsense"))
    done = command(tmp_path, "run_3", SAE_SUBSTRATE="gpt9", SAE_CACHE_DIR=cache)
    assert "gpt9" in one_line_error(done)
    done = command(tmp_path, "run_3", SAE_CACHE_DIR=str(tmp_path / "run_2" / "x"))
    assert "SAE_CACHE_DIR" in one_line_error(done)


def test_a_missing_package_is_one_line(tmp_path):
    (tmp_path / "nnsight.py").write_text("raise ImportError('not here', name='nnsight')")
    done = command(tmp_path, "run_1", PYTHONPATH=str(tmp_path))
    assert "nnsight is missing; pip install -r requirements.txt" in one_line_error(done)


def test_no_network_is_one_line(tmp_path):
    nowhere = {
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
        "PIP_EXTRA_INDEX_URL": "",
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": "",
        "PIP_CONFIG_FILE": os.devnull,
    }
    done = command(tmp_path, "run_1", SAE_CACHE_DIR=str(tmp_path / "c"), **nowhere)
    assert "could not be fetched" in one_line_error(done)


def test_a_second_process_on_the_same_folder_leaves(tmp_path):
    cache = ex.Cache(tmp_path / "c")
    (tmp_path / "run_1").mkdir()
    with cache.lock(f"run-{ex.digest(str((tmp_path / 'run_1').resolve()))}"):
        done = command(tmp_path, "run_1", SAE_CACHE_DIR=str(tmp_path / "c"))
    assert "another process" in one_line_error(done)


def test_rows_differ_only_by_their_row(tmp_path):
    default = dataclasses.asdict(ex.CustomSAEConfig())
    for run, row in ex.RUNS.items():
        if run != "run_10":
            config = dataclasses.asdict(ex.resolve_config(run, "full", tmp_path))
            assert {k: v for k, v in config.items() if v != default[k]} == {
                k: v for k, v in row.items() if v != default[k]
            }
    expected = {
        "run_1": 0.1,
        "run_2": 0.05,
        "run_3": 0.01,
        "run_7": 0.05,
        "run_8": 0,
        "run_9": 0.25,
    }
    for run, alpha in expected.items():
        assert ex.resolve_config(run, "full", tmp_path).alpha == alpha


def test_run_10_takes_the_best_of_its_candidates(tmp_path):
    for i in range(1, 6):
        folder = tmp_path / f"run_{i}"
        folder.mkdir()
        info = {
            "means": {"unlearning_area": float(i == 4)},
            "seeds": [],
            "budget": "full",
            "substrate": "standin",
            "config": dict(ex.RUNS[f"run_{i}"]),
        }
        (folder / "final_info.json").write_text(json.dumps(info))
    config = ex.resolve_config("run_10", "full", tmp_path)
    assert (config.alpha, config.regroup_every) == (0.05, 100)
    assert not set(config.seeds) & set(ex.resolve_config("run_1", "full", tmp_path).seeds)


def test_a_processor_that_has_bfloat16_is_used_in_it(processor, job):
    """The language model's products and L_dir's; nothing but rounding differs."""
    found = {}
    for has in (True, False):
        processor(bfloat16=has)
        assert job(f"{has}/run_7") == 0
        found[has] = ex.read_result(Path(f"{has}/run_7"))
        assert found[has]["environment"]["language_model_dtype"] == (
            "bfloat16" if has else "float32")
    for name in ("ce_base", "ce_sae", "explained_variance", "l_dir"):
        with_it, without = (found[has]["means"][name] for has in (True, False))
        assert with_it == pytest.approx(without, rel=0.02)
        assert with_it != without
