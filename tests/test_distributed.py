"""Processes of a torchrun, their place, shares and errors; signals; memory that is kept."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import small
import torch
import torch.distributed as dist

from lab import console, distributed
from lab.console import UserError
from lab.distributed import Interrupts, Processes, place_in_team, report_error

ROOT = Path(__file__).resolve().parent.parent
VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TOGETHER = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def variables(monkeypatch):
    """Sets what torchrun sets, and nothing else of it."""

    def set_(**values):
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_


# -- A process's place ---------------------------------------------------------------------------


@pytest.mark.parametrize(("values", "place"), [
    ({}, (0, 0, 1)),
    ({"WORLD_SIZE": ""}, (0, 0, 1)),
    ({"RANK": ""}, (0, 0, 1)),
    ({"RANK": "", "WORLD_SIZE": "", "LOCAL_RANK": ""}, (0, 0, 1)),
    ({"WORLD_SIZE": "1"}, (0, 0, 1)),
    ({"RANK": "0"}, (0, 0, 1)),
    ({"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", **TOGETHER}, (3, 1, 4)),
    ({"RANK": "3", "WORLD_SIZE": "4", **TOGETHER}, (3, 3, 4)),
])
def test_a_process_finds_its_place_where_variables_are_unset_empty_or_all_set(variables, values,
                                                                              place):
    variables(**values)
    assert place_in_team() == place


@pytest.mark.parametrize(("values", "reason"), [
    ({"WORLD_SIZE": "2"}, "RANK='', LOCAL_RANK='', WORLD_SIZE='2': RANK is not set"),
    ({"RANK": "1"}, "RANK='1', LOCAL_RANK='', WORLD_SIZE='': RANK must be from 0 to 0"),
    ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK must be from 0 to 1"),
    ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK must be from 0 to 1"),
    ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE must be at least 1"),
    ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two': not all are whole numbers"),
    ({"RANK": "1.5", "WORLD_SIZE": "2"}, "not all are whole numbers"),
    ({"RANK": "0", "LOCAL_RANK": "-2"}, "LOCAL_RANK must be at least 0"),
    ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR or MASTER_PORT is not set"),
    ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "here"}, "MASTER_ADDR or MASTER_PORT"),
])
def test_variables_that_are_set_alone_or_make_no_sense_are_named_with_the_cure(variables, values,
                                                                               reason):
    variables(**values)
    with pytest.raises(UserError) as error:
        Processes()
    assert reason in str(error.value)
    assert str(error.value).endswith(
        "start several processes with torchrun, or unset all three for a single one")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("port", ["not-a-port", "99999999"])
def test_processes_that_cannot_be_reached_are_one_line(variables, port):
    variables(RANK="1", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    with pytest.raises(UserError, match=f"^process 1 of 2 does not reach the others at 127.0.0.1:"
                                        rf"{port} \(.*\); start them with torchrun$"):
        Processes()
    assert not dist.is_initialized()


@pytest.mark.parametrize("values", [{"WORLD_SIZE": ""}, {"RANK": "1"}], ids=str)
def test_a_run_with_part_of_the_variables_gives_one_line_and_no_traceback(variables, tmp_path,
                                                                          values):
    """Of a row that is not in the table: where the variables are sound, this is the error."""
    variables(**values, SAE_CACHE_DIR=str(tmp_path / "cache"))
    done = subprocess.run([sys.executable, ROOT / "experiment.py", "--out_dir=run_11"],
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if "rror" in line]
    assert len(errors) == 1
    named = "--out_dir ends in 'run_11'" if "" in values.values() else "WORLD_SIZE='"
    assert errors[0].startswith("error: ")
    assert named in errors[0]


# -- Alone and together --------------------------------------------------------------------------


def test_one_process_has_all_of_a_batch_and_its_own_sums(variables):
    variables()
    processes = Processes()
    part = torch.randn(3)
    assert processes.share(12) == slice(0, 12)
    assert processes.sum_(part) is processes.same_(part) is part
    processes.wait()
    assert (processes.rank, processes.size, processes.device.type) == (0, 1, "cpu")


def test_shares_of_all_processes_make_up_a_batch():
    processes = Processes.__new__(Processes)
    processes.size, rows = 4, []
    for processes.rank in range(4):
        rows += range(12)[processes.share(12)]
    assert rows == list(range(12))


TEAM = """
import sys
import torch
from lab.console import UserError, report
from lab.distributed import Processes, report_error

processes = Processes()
part = torch.tensor([1.0 + processes.rank])
sums = processes.sum_(part.clone()).tolist(), processes.same_(part.clone()).tolist()
report(f"of {processes.size}: {sums}")
report_error("a batch of 7 cannot be shared")
report_error(f"process {processes.rank} has no room on its disk")
processes.wait()
"""


def test_two_processes_sum_and_tell_the_same_line_once_and_different_errors_each(tmp_path):
    (tmp_path / "team.py").write_text(TEAM)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [sys.executable, *launch, tmp_path / "team.py"], cwd=tmp_path, timeout=240, text=True,
        env={**small.inherited(), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True)
    assert done.returncode == 0, done.stderr[-1500:]
    lines = sorted(line for line in done.stderr.splitlines() if line.startswith(("of ", "error")))
    assert lines == ["error: a batch of 7 cannot be shared",
                     "error: process 0 has no room on its disk",
                     "error: process 1 has no room on its disk",
                     "of 2: ([3.0], [1.0])"]


def test_an_error_is_told_where_no_other_process_can_be_asked(variables, monkeypatch, capsys):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    variables(RANK="1", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "PATIENCE", 0.1)
    monkeypatch.setattr(console, "IS_LEADER", False)
    report_error("lost another one")
    assert capsys.readouterr().err == "error: lost another one\n"


# -- Signals -------------------------------------------------------------------------------------


@pytest.fixture
def interrupts():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield Interrupts()
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_at_once_what_can_lose_nothing(interrupts, number):
    interrupts.install()
    with pytest.raises(Interrupts.Stop):
        os.kill(os.getpid(), number)
    assert interrupts.signal == number


def test_a_signal_waits_for_the_end_of_what_must_not_be_cut(interrupts):
    interrupts.install()
    done = []

    def work():
        with interrupts.deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("after the signal")

    with pytest.raises(Interrupts.Stop):
        work()
    assert done == ["after the signal"]


def test_a_failure_in_what_must_not_be_cut_is_told_as_itself(interrupts):
    with pytest.raises(ZeroDivisionError), interrupts.deferred():
        raise ZeroDivisionError
    assert not interrupts.waits


def test_no_handler_of_exceptions_swallows_a_signal():
    assert not issubclass(Interrupts.Stop, Exception)


# -- Memory --------------------------------------------------------------------------------------

FAULTS = """
import resource, torch
from lab.distributed import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):  # 64 MB each
        torch.ones(16_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
handed_back = faults()
keep_freed_memory()
faults()  # until there is enough to keep
print(handed_back, faults())
"""  # a process of its own: page faults are the whole process's, other tests' threads included


def test_freed_memory_is_not_mapped_anew():
    done = subprocess.run([sys.executable, "-c", FAULTS], cwd=ROOT, capture_output=True, text=True,
                          check=True)
    handed_back, kept = map(int, done.stdout.split())
    assert 10 * kept < handed_back
