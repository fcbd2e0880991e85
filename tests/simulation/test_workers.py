"""A comparison in several processes: the results of one, resumed with any number, stopped by an error or an interrupt."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from multiprocessing import Pipe
from types import SimpleNamespace

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from fedrot.cli.commands import main
from fedrot.server.checkpoint import CHECKPOINT, load_checkpoint
from fedrot.simulation.sweep import workers
from fedrot.simulation.sweep.compare import compare
from fedrot.simulation.sweep.comparison import Comparison
from fedrot.simulation.training import memory

CPU = torch.device("cpu")
TINY = {"rounds": 1, "local_steps": 2, "clients": 3, "batch_size": 4}
TWO_TASKS = Comparison(TINY, ["fedit", "fedrot"], [0.5], ["shared"], [0], vary={"max_train_examples": [300, 400]})
WEIGHTS = "base_model/model.safetensors"


def contents(folder):
    """Path → bytes of what must not depend on the number of processes. PEFT writes sets, in any order, into its JSON."""
    kinds = (".csv", ".txt", ".md", ".jsonl", ".yaml", ".safetensors")
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.suffix in kinds and p.name != "README.md"
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The comparison of two methods on two tasks, run in this process."""
    folder = tmp_path_factory.mktemp("one") / "comparison"
    compare(TWO_TASKS, folder, progress=False)
    return folder


@pytest.mark.slow
def test_several_processes_give_the_bits_of_one_and_take_up_what_is_left(alone, tmp_path, capsys):
    folder = tmp_path / "two"
    table = compare(TWO_TASKS, folder, workers=2)
    expected = contents(alone)
    assert contents(folder) == expected and len([name for name in expected if name.endswith(CHECKPOINT)]) == 4
    assert "workers" not in yaml.safe_load((folder / "config.yaml").read_text())
    shown = capsys.readouterr().err
    assert "4/4" in shown and "shared-fedrot-0.5-max_train_examples=400-seed0 1/1" in shown

    # What is left goes on in processes too, from the weights that an earlier run of its task saved.
    left = "shared-fedit-max_train_examples=400-seed0"
    other = folder / left.replace("fedit", "fedrot-0.5") / WEIGHTS
    save_file(changed := {name: x * 1.5 for name, x in load_file(other).items()}, other, metadata={"format": "pt"})
    shutil.rmtree(folder / left)
    assert main(["compare", "--resume", str(folder), "--workers", "2"]) == 0
    assert table.splitlines()[0] in capsys.readouterr().out
    again = load_file(folder / left / WEIGHTS)
    assert all(torch.equal(again[name], x) for name, x in changed.items())
    assert contents(folder).keys() == expected.keys()

    shutil.rmtree(folder / left)
    save_file(load_file(alone / left / WEIGHTS), other, metadata={"format": "pt"})
    compare(TWO_TASKS, folder, resume=True, progress=False)
    assert contents(folder) == expected


@pytest.mark.slow
def test_an_error_ends_the_other_runs_after_their_round_and_names_its_own(tmp_path, capfd):
    folder, short, long = tmp_path / "out", 10, 5000
    options = ["--methods", "fedit", "--starts=shared", "--seeds=0", f"--rounds={short}", "--local-steps=2", "--clients=2"]
    options += [f"--variants.long.rounds={long}", "--variants.bad.lr=1e38", "--eval-every=5000", "--optimizer=sgd"]
    assert main(["compare", *options, "--workers=2", "--output", str(folder)]) == 1
    (error,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("fedrot: error: ")]
    assert error.startswith("fedrot: error: shared-bad-seed0: ") and "NaN" in error
    assert len((folder / "shared-fedit-seed0/metrics.jsonl").read_text().splitlines()) == short
    stopped = folder / "shared-long-seed0"
    _, rounds_done = load_checkpoint(stopped)
    assert 0 < rounds_done < long and not (stopped / "adapter").exists()
    rows = [json.loads(line) for line in (stopped / "metrics.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rows] == list(range(1, rounds_done + 1))
    assert not (folder / "results.csv").exists()


def in_group(process, group):
    with suppress(ProcessLookupError, psutil.NoSuchProcess):
        return os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE
    return False


@pytest.mark.slow
def test_an_interrupted_comparison_leaves_what_any_number_of_processes_can_resume(tmp_path):
    options = ["--methods", "fedit", "fedrot", "--strengths=0.5", "--starts=shared", "--seeds=0", "--rounds=8"]
    options += ["--local-steps=10", "--clients=4", "--batch-size=4"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(["compare", *options, f"--output={whole}"]) == 0

    # As in a terminal, whose interrupt goes to all processes of a group. Shells tell background jobs to ignore it.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(
        [sys.executable, "-m", "fedrot.cli", "compare", *options, "--workers=2", f"--output={cut}"],
        # One thread, as here: some sums depend on the number of threads, and so the bits on when the interrupt comes.
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed,
        start_new_session=True,
    )
    while not list(cut.glob(f"*/{CHECKPOINT}")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, messages = process.communicate()
    assert process.returncode == 130
    assert f"go on with: fedrot compare --resume {cut} --workers 2" in messages and "Traceback" not in messages
    while [p for p in psutil.process_iter() if in_group(p, process.pid)]:  # the last of them end after it
        time.sleep(0.01)
    assert not (cut / "results.csv").exists()
    assert not [path for path in cut.rglob(".*") if path.name.startswith(".")], "nothing half-written stays"
    assert main(["compare", f"--resume={cut}"]) == 0
    assert contents(cut) == contents(whole)


class Bar:
    """What a progress bar is told."""

    def __init__(self):
        self.finished, self.postfix = 0, ""

    def update(self, n):
        self.finished += n

    def set_postfix_str(self, text):
        self.postfix = text


@pytest.fixture
def worker():
    """A worker without a process, whose pipe's other end this is."""
    own, other = Pipe()
    run, *_ = TWO_TASKS.runs()[0]
    process = SimpleNamespace(join=lambda: None, exitcode=-9)
    yield workers._Worker(process, own, run), other
    own.close()
    other.close()


def test_a_process_that_ends_by_itself_is_an_error_that_names_its_run(worker):
    worker, other = worker
    other.close()
    error = workers._receive(worker, Bar())
    assert isinstance(error, OSError) and worker.run is None
    assert str(error) == (
        "shared-fedit-max_train_examples=300-seed0: its process ended with exit status -9; was there too little memory?"
    )


@pytest.mark.parametrize(("kind", "raised"), [("value", ValueError), ("system", OSError), ("failure", RuntimeError)])
def test_messages_are_counted_logged_and_raised(worker, caplog, kind, raised):
    (worker, other), bar = worker, Bar()
    with caplog.at_level(logging.INFO):
        other.send(("log", ("fedrot.simulation.run", logging.INFO, "100 % of it")))
        assert workers._receive(worker, bar) is None and caplog.messages == ["100 % of it"]
    other.send(("round", 7))
    assert workers._receive(worker, bar) is None
    assert workers._shown(worker) == "shared-fedit-max_train_examples=300-seed0 7/1" and bar.finished == 0
    run = worker.run
    for message, finished in (("done", 1), ("stopped", 1), (kind, 1)):
        worker.run = run
        other.send((message, "what it is"))
        error = workers._receive(worker, bar)
        assert worker.run is None and bar.finished == finished
    assert type(error) is raised and str(error) == f"{run.name}: what it is"


def test_processes_share_threads_and_memory(monkeypatch, tmp_path):
    given = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(workers, "_hand_out", lambda waiting, started, bar: None)
    monkeypatch.setattr(workers, "_start", lambda assignment: given.append(assignment) or ENDED)
    runs, _ = TWO_TASKS.runs()
    for number in (3, 9):
        workers.run_in_processes(runs, tmp_path, {}, workers=number, progress=False)
    assert [assignment.threads for assignment in given] == [2] * 3 + [1] * 9
    assert {assignment.processes for assignment in given} == {3, 9}
    monkeypatch.setattr(memory, "free_memory", lambda device: 100)
    monkeypatch.setattr(memory, "_processes", 1)
    assert memory.clients_that_fit(6, CPU) == 10
    memory.share_memory(2)
    assert memory.clients_that_fit(6, CPU) == 5


ENDED = workers._Worker(SimpleNamespace(join=lambda: None), SimpleNamespace(close=lambda: None))


def test_the_number_of_processes_is_no_part_of_a_comparison(alone, tmp_path, capsys):
    assert main(["compare", "--workers=0", "--output", str(tmp_path / "out")]) == 1
    assert "workers must be at least 1, got 0" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main(["compare", "--resume", str(alone), "--workers=2", "--lr=1"]) == 1
    assert "give no other option" in capsys.readouterr().err
    assert main(["simulate", "--workers=2", "--output", str(tmp_path / "out")]) == 2
