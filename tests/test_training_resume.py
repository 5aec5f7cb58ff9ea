"""Runs are killed, started twice, and run out of space; what they end with is what an undisturbed run ends with."""
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from training_videos import toy_dataset

from video_study.core import StudyError, rng
from video_study.training import state
from video_study.training.experiment import experiment, resolve
from video_study.training.loop import fit

SERVER = Path(__file__).with_name("training_process.py")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return toy_dataset(tmp_path_factory.mktemp("videos"))


@pytest.fixture(scope="module")
def exp(dataset):
    """Twelve updates of a network with batch normalisation and dropout."""
    return resolve(experiment(model="tam_resnet18", width=0.0625, data=str(dataset), frames=4, image_size=32, evaluation=("clip", "video"),
                              epochs=4, batch_size=4, accumulate=2, lr=0.02, warmup_epochs=1, dropout=0.5, crop="random", seed=7))


class Process:
    """A run in a process of its own, followed event by event."""

    def __init__(self, server, exp, folder, **options):
        out = Path(folder).with_name(f"{Path(folder).name}-{time.monotonic_ns()}.txt")
        out.touch()
        server.stdin.write(json.dumps(dict(experiment=exp.to_dict(), folder=str(folder), out=str(out), **options)) + "\n")
        server.stdin.flush()
        self.pid, self.file, self.lines = int(server.stdout.readline()), out.open(), []

    def alive(self):
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def read(self, until=lambda lines: False):
        """Follow the events up to the one that completes `until`, or to the end."""
        alive, part = True, ""
        while True:
            part += self.file.readline()
            if part.endswith("\n"):
                self.lines.append(part.strip())
                part = ""
                if until(self.lines):
                    return self
            elif not alive:
                return self
            else:
                alive = self.alive()
                time.sleep(0.001)

    def kill(self, delay=0.0):
        time.sleep(delay)
        try:
            os.kill(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # it was done before the blow fell
        return self.read()

    def end(self, how="done"):
        self.read()
        assert self.lines[-1].startswith(how), "\n".join(self.lines[-30:])
        return self

    def events(self):
        return [line for line in self.lines if line.startswith(("update", "save"))]

    def checkpoints(self):
        return {line.split()[2]: line.split()[3] for line in self.events() if line.startswith("save checkpoint.pt")}

    def updates(self):
        return [int(line.split()[1]) for line in self.events() if line.startswith("update")]


@pytest.fixture(scope="module")
def start():
    """Start a run in a process of its own."""
    with subprocess.Popen([sys.executable, str(SERVER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout.readline() == "serving\n"
        yield partial(Process, server)
        server.stdin.close()


def contents(folder):
    """All that a finished run holds, but for the time it took and the way it was run."""
    result = json.loads((folder / "result.json").read_text())
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return dict(weights=state.load(folder / "weights.pt")["state_dict"], scores=dict(np.load(folder / "scores.npz")), metrics=result["metrics"],
                log=[{k: v for k, v in line.items() if k != "seconds"} for line in log])


def assert_same(folder, reference):
    a, b = contents(folder), contents(reference)
    assert list(a["weights"]) == list(b["weights"])
    assert [k for k in a["weights"] if not torch.equal(a["weights"][k], b["weights"][k])] == []
    assert [k for k in b["scores"] if not np.array_equal(a["scores"][k], b["scores"][k])] == []
    assert a["metrics"] == b["metrics"]
    assert a["log"] == b["log"]
    assert not (folder / "checkpoint.pt").exists() and not list(folder.glob(".*.part"))


@pytest.fixture(scope="module")
def reference(start, exp, tmp_path_factory):
    """The same experiment, undisturbed, with a checkpoint after every update."""
    folder = tmp_path_factory.mktemp("reference")
    process = start(exp, folder, every=0).end()
    assert process.updates() == list(range(12)) and len(process.checkpoints()) == 12
    return folder, process


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_any_moment_with_any_workers(start, exp, reference, tmp_path, seed):
    seed, draw = seed + int(os.environ.get("KILL_SEED", "0")), rng(seed + int(os.environ.get("KILL_SEED", "0")), "kills")
    undisturbed, every = reference[1].checkpoints(), (0, 0, 1e9, 0, 0, 0, 0)
    for attempt, workers in enumerate((0, 2, 1, 0, 2, 0, 1)):
        process = start(exp, tmp_path, workers=workers, every=every[attempt])
        at, delay = int(draw.integers(1, 7)), float(draw.uniform(0, 0.05))
        process.read(lambda lines: len(process.events()) >= at).kill(delay)
        print(f"seed {seed}, attempt {attempt}, {workers} workers: killed {1000 * delay:.0f} ms after event {at}; the last was {process.lines[-1][:30]}")
        assert [step for step, digest in process.checkpoints().items() if undisturbed[step] != digest] == []
    last = start(exp, tmp_path, workers=1, every=0).end()
    assert last.updates()[:1] != [0], "the last attempt started again from nothing"
    assert_same(tmp_path, reference[0])


@pytest.mark.parametrize("event", ["save weights.pt", "save result.json"])
def test_killed_while_finishing(start, exp, reference, tmp_path, event):
    start(exp, tmp_path).read(lambda lines: lines[-1].startswith(event)).kill()
    assert start(exp, tmp_path).end().updates() == []
    assert_same(tmp_path, reference[0])


def test_killed_between_the_last_checkpoint_and_its_log(start, exp, reference, tmp_path):
    start(exp, tmp_path).read(lambda lines: lines[-1].startswith("save weights.pt")).kill()
    assert not (tmp_path / "result.json").exists()
    lines = (reference[0] / "log.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "log.jsonl").write_text("".join(lines[:-1]))
    assert start(exp, tmp_path).end().updates() == []
    assert_same(tmp_path, reference[0])


def test_mutual_training_killed_twice(start, dataset, tmp_path):
    """A3D-Slow: the sub-networks of an update are a function of its number, so a run that was killed draws what it would have drawn."""
    a3d = resolve(experiment(model="slow_resnet50", width=0.0625, data=str(dataset), frames=4, image_size=64, epochs=2, batch_size=4, lr=0.02, dropout=0.5, mutual="0.016", seed=3))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    undisturbed = start(a3d, whole, every=0).end()
    assert undisturbed.updates() == list(range(12))
    for at in (3, 9):
        start(a3d, killed, every=0).read(lambda lines: lines[-1] == f"update {at}").kill()
    last = start(a3d, killed, every=0).end()
    assert last.updates()[0] in (8, 9), "the last attempt does not go on from the kill"
    assert_same(killed, whole)
    assert all(line["divergence"] > 0 for line in contents(whole)["log"])


def test_finished_run_is_read_not_repeated(start, exp, reference):
    assert start(exp, reference[0]).end().events() == []


def test_two_processes_one_runs_the_other_waits(start, exp, reference, tmp_path):
    both = [start(exp, tmp_path), start(exp, tmp_path)]
    assert sorted(len(p.end().updates()) for p in both) == [0, 12]
    assert both[0].lines[-1] == both[1].lines[-1]
    assert_same(tmp_path, reference[0])


def test_the_waiting_process_takes_over_when_the_first_dies(start, exp, reference, tmp_path):
    first = start(exp, tmp_path, every=0).read(lambda lines: lines[-1] == "update 5")
    os.kill(first.pid, signal.SIGSTOP)
    second = start(exp, tmp_path).read(lambda lines: lines[-1] == "ready")
    time.sleep(1)
    assert second.alive() and second.lines == ["ready"], "the second process does not wait"
    first.kill()
    assert second.end().updates() == list(range(second.updates()[0], 12)) and second.updates()[0] > 0
    assert_same(tmp_path, reference[0])


def test_no_space_left_keeps_the_old_checkpoint(start, exp, reference, tmp_path):
    process = start(exp, tmp_path, every=0, full_at=6).end("error no space left while writing")
    assert "the one before is whole" in process.lines[-1]
    assert state.load(tmp_path / "checkpoint.pt", exp.key)["step"] == 6
    assert not list(tmp_path.glob(".*.part"))
    assert start(exp, tmp_path).end().updates() == list(range(6, 12))
    assert_same(tmp_path, reference[0])


def test_result_of_another_version(exp, reference, tmp_path):
    values = json.loads((reference[0] / "result.json").read_text())
    (tmp_path / "result.json").write_text(json.dumps(values | dict(format=99)))
    with pytest.raises(StudyError, match="is of format 99, this version reads and writes 1; remove or move away"):
        fit(exp, tmp_path, progress=False)


def test_folder_or_checkpoint_of_another_experiment(exp, reference, tmp_path):
    with pytest.raises(StudyError, match=f"belongs to experiment {exp.key}"):
        fit(replace(exp, seed=8), reference[0], progress=False)
    state.save(tmp_path / "checkpoint.pt", dict(format=state.FORMAT, key="0" * 16))
    with pytest.raises(StudyError, match=f"belongs to experiment {'0' * 16}, not to {exp.key}"):
        fit(exp, tmp_path, progress=False)


def test_damaged_checkpoint(exp, tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes(b"half of")
    with pytest.raises(StudyError, match="is damaged; remove it to start this run again"):
        fit(exp, tmp_path, progress=False)


def test_loss_that_is_not_a_number(dataset, tmp_path):
    wild = experiment(model="tsn_resnet18", width=0.0625, data=str(dataset), frames=2, image_size=32, epochs=4, batch_size=4, lr=1e20, warmup_epochs=0)
    with pytest.raises(StudyError, match=r"the loss of update \d+ \(epoch \d\) is not a number; its videos are listed in .*diverged.json"):
        fit(wild, tmp_path, progress=False)
    told = json.loads((tmp_path / "diverged.json").read_text())
    assert len(told["video_ids"]) == 4 and all(v.startswith("train_") or "train" in v for v in told["video_ids"])
    assert not (tmp_path / "result.json").exists()
