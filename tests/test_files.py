"""Files appear whole or not at all, are checked when read, and JSON is strict."""

import inspect
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import experiment as ex

ROOT = Path(__file__).resolve().parent.parent


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    ex.write_text(path, "old")

    def fail(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        ex.write_text(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_json_is_strict():
    text = ex.to_json({"a": math.nan, "b": [math.inf, np.float64(1.5)], "c": "α", 1: (2, None)})
    assert json.loads(text) == {"a": None, "b": [None, 1.5], "c": "α", "1": [2, None]}


def test_tensors_come_back_and_damage_is_noticed(tmp_path, capsys):
    path = tmp_path / "t.safetensors"
    tensors = {"x": torch.arange(6.0).view(2, 3).T, "y": torch.tensor([True, False])}
    ex.write_tensors(path, tensors, {"note": [1, 2.5]})
    found, note = ex.read_tensors(path)
    assert note == {"note": [1, 2.5]}
    assert all(torch.equal(found[name], part) for name, part in tensors.items())
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(300):
        data = bytearray(whole)
        if rng.random() < 0.3:
            data = data[: rng.integers(0, len(data))]
        else:
            data[rng.integers(0, len(data))] ^= 1 << int(rng.integers(0, 8))
        path.write_bytes(bytes(data))
        found = ex.read_tensors(path)
        if found is not None:  # a flip where nothing depends on it, such as padding
            assert found[1] == note
            assert all(torch.equal(found[0][name], part) for name, part in tensors.items())
    assert "made anew" in capsys.readouterr().err


def test_cache_builds_once_and_again_when_causes_change(tmp_path):
    cache, calls = ex.Cache(tmp_path), []

    def build():
        calls.append(1)
        return {"x": torch.ones(2)}, len(calls)

    assert [cache.get("thing", (1, "a"), build)[1] for _ in range(3)] == [1, 1, 1]
    assert cache.get("thing", (2, "a"), build)[1] == 2


def test_all_that_training_runs_through_is_in_its_key():
    text = inspect.getsource(ex)
    part = text[text.index("\n# Activations") + 14 : text.index("\n# Evaluations")]
    assert ex.digest(part) == ex.TRAINING_CODE
    for item in (ex.ActivationBuffer, ex.Material, ex.Forest, ex.Questions, ex.CustomSAE,
                 ex.CoactivationSketch, ex.use_loss, ex.CustomTrainer, ex.train_sae):
        assert inspect.getsource(item) in part


def test_freed_memory_is_not_mapped_anew():
    program = """
import resource, torch, experiment as ex
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):  # 64 MB each
        torch.ones(16_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
handed_back = faults()
ex.keep_freed_memory()
print(handed_back, faults())
"""  # a process of its own: page faults are the whole process's, other tests' threads included
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    handed_back, kept = map(int, done.stdout.split())
    assert 4 * kept < handed_back


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ex.UserError, match="SAE_CACHE_DIR"):
        ex.Cache(file / "cache")


def test_notes_keep_what_people_wrote(tmp_path):
    cache, notes = ex.Cache(tmp_path / "c"), tmp_path / "notes.txt"
    config = dict(orthogonality="off", alpha=0.0, eta=0.0, regroup_every=1, seeds=[0])
    info = dict(
        config=config, means={"l0": 40.0}, stderrs={"l0": 0.5}, substrate="standin", budget="smoke"
    )
    ex.update_notes(notes, "run_8", info, cache)
    notes.write_text("mine, above\n" + notes.read_text() + "mine, below\n")
    ex.update_notes(notes, "run_1", info, cache)
    info["means"] = {"l0": 41.0}
    ex.update_notes(notes, "run_8", info, cache)
    text = notes.read_text()
    assert text.startswith("mine, above\n")
    assert "mine, below\n" in text
    assert text.count("=== run_8 (") == text.count("=== run_1 (") == 1
    assert "41.0000" in text
    assert text.index("run_8") < text.index("mine, below") < text.index("=== run_1 (")


def test_questions_do_not_leak_and_are_stable():
    words = {
        f"term{i} word{i}": "A definition that is long enough and says nothing of it " + "x" * i
        for i in range(8)
    }
    words["telling name"] = "This definition is telling what it is about, word for word"
    questions = ex.cloze_questions(words)
    assert len(questions) == 8  # the telling one is out
    for question in questions:
        assert len(question.options) == len(set(question.options)) == 4
        right = question.options[question.answer]
        assert words[right] in question.prompt
    assert ex.cloze_questions(dict(reversed(words.items()))) == questions


def test_halves_are_halves_and_do_not_depend_on_the_process():
    chosen = [ex.in_learn_half(f"HP:{i:07d}") for i in range(2000)]
    assert 0.45 < np.mean(chosen) < 0.55
    assert chosen[:8] == [ex.in_learn_half(f"HP:{i:07d}") for i in range(8)]
