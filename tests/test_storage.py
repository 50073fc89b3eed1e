"""Files appear whole or not at all and stay their owner's, are checked when read, cached by key."""

import errno
import fcntl
import json
import math
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from lab import storage
from lab.console import UserError
from lab.storage import (
    Cache,
    checksum,
    digest,
    non_finite,
    randomness,
    read_tensors,
    to_json,
    write_atomically,
    write_tensors,
    write_text,
)

ROOT = Path(__file__).resolve().parent.parent


def mode_of(path):
    return stat.S_IMODE(path.stat().st_mode)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


# -- Files ---------------------------------------------------------------------------------------


def test_a_write_that_fails_leaves_what_was_there_and_names_the_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_text(path, "old")

    def fail(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space") as error:
        write_text(path, "new")
    assert error.value.filename == path
    assert path.read_text() == "old"
    assert names_in(tmp_path) == ["a.json"]


def test_a_file_is_durable_before_it_gets_its_name(tmp_path, monkeypatch):
    order, sync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: order.append("durable") or sync(handle))
    monkeypatch.setattr(os, "replace", lambda *paths: order.append("named") or replace(*paths))
    write_text(tmp_path / "a.json", "new")
    assert order == ["durable", "named"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_new_file_gets_the_mode_that_the_umask_gives(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_text(tmp_path / "new folder" / "a.txt", "text")
    finally:
        os.umask(before)
    assert mode_of(tmp_path / "new folder" / "a.txt") == mode


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666, 0o755])
def test_a_file_that_is_there_keeps_its_mode_whatever_the_umask(tmp_path, mode):
    path = tmp_path / "notes.txt"
    path.write_text("old")
    path.chmod(mode)
    for umask in (0o000, 0o077):
        before = os.umask(umask)
        try:
            write_text(path, "new")
        finally:
            os.umask(before)
        assert mode_of(path) == mode
        assert path.read_text() == "new"


def test_nobody_can_look_into_a_private_file_while_it_is_written(tmp_path, monkeypatch):
    path, modes = tmp_path / "notes.txt", []
    path.write_text("old")
    path.chmod(0o600)
    opened = os.open

    def watched(file, *arguments):
        handle = opened(file, *arguments)
        modes.append(stat.S_IMODE(os.fstat(handle).st_mode))
        return handle

    monkeypatch.setattr(os, "open", watched)
    write_text(path, "secret")
    assert modes == [0o600]


@pytest.mark.skipif(os.getuid() != 0, reason="only root may give files away")
def test_a_file_stays_its_owners_and_its_groups(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("old")
    os.chown(path, 12345, 23456)
    path.chmod(0o640)
    write_text(path, "new")
    assert (path.stat().st_uid, path.stat().st_gid, mode_of(path)) == (12345, 23456, 0o640)


def test_a_read_only_file_is_refused_and_stays_as_it_is(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    path.chmod(0o444)
    with pytest.raises(PermissionError, match="is read-only") as error:
        write_text(path, "new")
    assert error.value.filename == str(path)
    assert (path.read_text(), mode_of(path)) == ("mine", 0o444)
    assert names_in(tmp_path) == ["notes.txt"]


def test_a_file_that_this_user_may_not_write_is_refused(tmp_path, monkeypatch):
    """Though its folder would let it be replaced."""
    path = tmp_path / "notes.txt"
    path.write_text("another user's")
    monkeypatch.setattr(os, "access", lambda file, way: False)
    with pytest.raises(PermissionError, match="is read-only"):
        write_text(path, "new")
    assert path.read_text() == "another user's"


def test_a_link_keeps_its_target_and_the_target_gets_the_text(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "log.txt", tmp_path / "notes.txt"
    link.symlink_to("elsewhere/log.txt")
    for text in ("new", "newer"):  # where the target is missing, and where it is there
        write_text(link, text)
        assert os.readlink(link) == "elsewhere/log.txt"
        assert target.read_text() == text
    assert names_in(tmp_path) == ["elsewhere", "notes.txt"]
    assert names_in(tmp_path / "elsewhere") == ["log.txt"]


def test_a_link_that_leads_to_itself_is_replaced_by_the_file(tmp_path):
    path = tmp_path / "notes.txt"
    path.symlink_to(path)
    write_text(path, "new")
    assert path.read_text() == "new"


def test_leftovers_of_killed_writers_go_and_those_of_living_ones_stay(tmp_path):
    path = tmp_path / "a[1].json"
    old, young, other = (tmp_path / name for name in (
        ".a[1].json.1.part", ".a[1].json.2.part", ".b.json.1.part"))
    for part in (old, young, other):
        part.write_text("half")
    for part in (old, other):
        os.utime(part, (1, 1))
    write_text(path, "whole")
    assert names_in(tmp_path) == sorted([path.name, young.name, other.name])


def test_writers_at_once_leave_one_whole_file(tmp_path):
    path, texts = tmp_path / "a.txt", [letter * 300_000 for letter in "abcdefgh"]
    threads = [threading.Thread(target=write_text, args=(path, text)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() in texts
    assert names_in(tmp_path) == ["a.txt"]


# -- JSON and digests ----------------------------------------------------------------------------


def test_json_is_strict_and_readable():
    value = {"a": math.nan, "b": [math.inf, -math.inf, np.float64(1.5)], "c": "α", 1: (2, None),
             "d": np.int64(3), "e": True}
    text = to_json(value)
    assert "α" in text
    assert json.loads(text) == {"a": None, "b": [None, None, 1.5], "c": "α", "1": [2, None],
                                "d": 3, "e": True}


def test_a_checksum_depends_on_names_shapes_types_and_every_value():
    tensors = {"x": torch.arange(6.0).view(2, 3), "none": torch.zeros(0, 3)}
    others = [{**tensors, "x": part} for part in (
        torch.arange(6.0).view(3, 2), torch.arange(6.0).view(2, 3).double(),
        torch.arange(6.0).view(2, 3).T.contiguous().T + torch.eye(2, 3))]
    others += [{"y": tensors["x"], "none": tensors["none"]}, {"x": tensors["x"]},
               {**tensors, "none": torch.zeros(3, 0)}]
    sums = [checksum(part, "") for part in (tensors, *others)] + [checksum(tensors, "label")]
    assert len(set(sums)) == len(sums)
    same = {"none": torch.zeros(0, 3), "x": torch.arange(6.0).view(2, 3).T.contiguous().T}
    assert checksum(same, "") == sums[0]


def test_randomness_depends_on_its_causes_alone():
    torch.manual_seed(1)
    one = torch.rand(3, generator=randomness("order", 0, 7))
    torch.manual_seed(2)
    assert torch.equal(torch.rand(3, generator=randomness("order", 0, 7)), one)
    assert not torch.equal(torch.rand(3, generator=randomness("order", 1, 7)), one)
    assert digest("ab", "c") != digest("a", "bc")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_what_is_not_finite_is_named(dtype):
    sound = {"acts": torch.full((9,), torch.finfo(dtype).max, dtype=dtype), "none": torch.zeros(0),
             "count": torch.arange(3), "flag": torch.tensor([True, False]), "one": torch.zeros(())}
    assert non_finite(sound) == []
    for bad in (torch.nan, torch.inf, -torch.inf):
        damaged = torch.zeros(5, 40, dtype=dtype)
        damaged[3, 17] = bad
        assert non_finite({**sound, "x": damaged, "y": torch.tensor(bad)}) == ["x", "y"]


# -- Tensors -------------------------------------------------------------------------------------


def test_tensors_and_their_note_come_back_as_they_were(tmp_path):
    path = tmp_path / "t.safetensors"
    tensors = {"x": torch.arange(6.0).view(2, 3).T, "y": torch.tensor([True, False]),
               "h": torch.ones(3, dtype=torch.bfloat16), "none": torch.zeros(0, 4)}
    write_tensors(path, tensors, {"note": [1, 2.5, "κ"]})
    kept, note = read_tensors(path)
    assert note == {"note": [1, 2.5, "κ"]}
    assert kept.keys() == tensors.keys()
    assert all(torch.equal(kept[name], part) for name, part in tensors.items())
    assert all(kept[name].dtype == part.dtype for name, part in tensors.items())


def test_damage_to_any_byte_is_noticed_or_harmless(tmp_path, capsys):
    path = tmp_path / "t.safetensors"
    tensors = {"x": torch.arange(6.0).view(2, 3), "y": torch.tensor([True, False])}
    write_tensors(path, tensors, {"note": [1, 2.5]})
    whole, rng, noticed = path.read_bytes(), np.random.default_rng(0), 0
    for _ in range(300):
        data = bytearray(whole)
        if rng.random() < 0.3:
            data = data[: rng.integers(0, len(data))]
        else:
            data[rng.integers(0, len(data))] ^= 1 << int(rng.integers(0, 8))
        path.write_bytes(bytes(data))
        kept = read_tensors(path)
        line = capsys.readouterr().err
        if kept is None:
            noticed += 1
            assert line.startswith(str(path))
            assert line.endswith("it is made anew\n")
        else:  # a flip where nothing depends on it, such as padding
            assert line == ""
            assert kept[1] == {"note": [1, 2.5]}
            assert all(torch.equal(kept[0][name], part) for name, part in tensors.items())
    assert noticed > 250


def test_a_safetensors_file_that_is_not_ours_is_made_anew(tmp_path, capsys):
    path = tmp_path / "t.safetensors"
    safetensors.torch.save_file({"x": torch.ones(2)}, path)
    assert read_tensors(path) is None
    assert "made anew" in capsys.readouterr().err


def test_what_is_not_there_is_no_damage(tmp_path, capsys):
    assert read_tensors(tmp_path / "no folder" / "t.safetensors") is None
    assert capsys.readouterr().err == ""


def test_what_cannot_be_read_is_named(tmp_path):
    (tmp_path / "t.safetensors").mkdir()
    with pytest.raises(OSError, match=".") as error:
        read_tensors(tmp_path / "t.safetensors")
    assert error.value.filename == tmp_path / "t.safetensors"


# -- The cache -----------------------------------------------------------------------------------


def ones():
    return {"x": torch.ones(2)}, None


def test_a_thing_is_built_once_and_again_when_its_causes_change(tmp_path):
    cache, calls = Cache(tmp_path), []

    def build():
        calls.append(1)
        return {"x": torch.ones(2)}, len(calls)

    assert [cache.get("thing", (1, "a"), build)[1] for _ in range(3)] == [1, 1, 1]
    assert cache.get("thing", (2, "a"), build)[1] == 2
    assert cache.get("other thing", (1, "a"), build)[1] == 3


def test_what_is_built_and_what_is_read_are_the_same(tmp_path):
    cache = Cache(tmp_path)
    build = lambda: ({"x": torch.arange(4).half()}, {"a": (1, math.nan), 2: "b"})  # noqa: E731
    (built, first), (read, second) = (cache.get("thing", (), build) for _ in range(2))
    assert torch.equal(built["x"], read["x"])
    assert first == second == {"a": [1, None], "2": "b"}


def test_what_is_not_finite_is_never_kept(tmp_path):
    cache = Cache(tmp_path)
    with pytest.raises(UserError, match="^x of activations/0003: not finite numbers$"):
        cache.get("activations/0003", (), lambda: ({"x": torch.tensor([torch.nan])}, None))
    assert not list(tmp_path.rglob("*.safetensors"))


def test_what_several_ask_for_at_once_one_builds(tmp_path):
    built, gate = [], threading.Barrier(4)

    def build():
        built.append(1)
        return ones()

    def ask():
        gate.wait()
        Cache(tmp_path).get("thing", (), build)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1


def test_a_wait_for_another_process_is_told_and_ends_with_its_result(tmp_path, monkeypatch, capsys):
    cache = Cache(tmp_path)
    monkeypatch.setattr(storage, "PATIENCE", 0.01)
    started, told = threading.Event(), threading.Event()
    monkeypatch.setattr(storage, "report", lambda line: (print(line), told.set()))

    def slow():
        started.set()
        assert told.wait(60)  # until the other one has told that it waits
        return ones()

    other = threading.Thread(target=Cache(tmp_path).get, args=("thing", (), slow))
    other.start()
    assert started.wait(60)
    cache.get("thing", (), lambda: pytest.fail("it was made twice"))
    other.join()
    assert capsys.readouterr().out == (
        "thing is being made by another process; this one waits for it\n")


def test_a_tilde_in_the_caches_name_is_the_users_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    Cache(Path("~/sae")).get("thing", (), ones)
    assert names_in(tmp_path) == ["home"]
    assert list((tmp_path / "home" / "sae").glob("thing-*.safetensors"))


def test_the_home_of_a_user_who_is_not_there_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"the cache ~nobody-of-this-name/sae cannot be written \("
                                        r".*\); set SAE_CACHE_DIR"):
        Cache(Path("~nobody-of-this-name/sae"))
    assert names_in(tmp_path) == []


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"the cache {tmp_path}/file/cache cannot be written "
                                        r"\(Not a directory\); set SAE_CACHE_DIR"):
        Cache(tmp_path / "file" / "cache")


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_a_file_system_without_locks_is_one_line_and_no_waiting(tmp_path, monkeypatch, number):
    """Also beside lock files that others have left there."""
    Cache(tmp_path).get("thing", (), ones)
    left = names_in(tmp_path / "locks")
    assert left

    def refuse(handle, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr("time.sleep", lambda _: pytest.fail("it waits"))
    with pytest.raises(UserError) as error:
        Cache(tmp_path)
    text = str(error.value)
    assert f"the cache {tmp_path} cannot be locked ({os.strerror(number)})" in text
    assert "SAE_CACHE_DIR" in text
    assert "\n" not in text
    monkeypatch.undo()
    Cache(tmp_path)


def test_trying_the_locks_leaves_nothing_behind(tmp_path):
    Cache(tmp_path)
    assert names_in(tmp_path / "locks") == []
    assert names_in(tmp_path) == ["locks"]


def test_a_lock_ends_with_the_process_that_held_it(tmp_path):
    program = ("import os, sys\nfrom pathlib import Path\nfrom lab.storage import Cache\n"
               "lock = Cache(Path(sys.argv[1])).lock('run')\nlock.acquire()\nos._exit(0)\n")
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, check=True)
    assert names_in(tmp_path / "locks") == ["run.lock"]
    with Cache(tmp_path).lock("run", timeout=0):
        pass


def test_a_note_beyond_the_limit_of_a_header_is_kept(tmp_path):
    note = ["x" * 1_000_000] * 101
    write_tensors(tmp_path / "corpus.safetensors", {}, note)
    assert read_tensors(tmp_path / "corpus.safetensors") == ({}, note)


def test_a_file_under_another_files_name_is_not_taken(tmp_path, capsys):
    first, second = tmp_path / "train-0.safetensors", tmp_path / "train-1.safetensors"
    write_tensors(first, {"x": torch.ones(2)})
    write_atomically(second, first.read_bytes())
    assert read_tensors(second) is None
    assert "train-1.safetensors does not match its checksum" in capsys.readouterr().err


def test_a_folder_that_a_library_wrote_is_checked_file_by_file(tmp_path, capsys):
    (tmp_path / "weights").write_text("1")
    storage.seal(tmp_path, "code")
    assert storage.is_sealed(tmp_path, "code")
    assert not storage.is_sealed(tmp_path / "missing", "code")
    assert capsys.readouterr().err == ""
    for name, text in (("weights", "2"), ("more", "1")):
        (tmp_path / name).write_text(text)
        assert not storage.is_sealed(tmp_path, "code")
        assert "does not match its checksums" in capsys.readouterr().err
        (tmp_path / "weights").write_text("1")


def test_a_folder_that_other_code_wrote_is_made_anew(tmp_path):
    (tmp_path / "weights").write_text("1")
    storage.seal(tmp_path, "older code")
    assert not storage.is_sealed(tmp_path, "newer code")
    storage.seal(tmp_path, "newer code")
    assert storage.is_sealed(tmp_path, "newer code")


def test_a_scratch_folder_is_empty_at_first_and_gone_at_last(tmp_path):
    path = tmp_path / "scratch"
    path.mkdir()
    (path / "left by a killed process").write_text("")
    with storage.scratch_folder(path) as scratch:
        assert names_in(scratch) == []
        (scratch / "new").write_text("")
    assert not path.exists()
