"""Two processes train what one process trains: whole runs on real videos, compared by their weights and scores."""
import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from training_videos import toy_dataset

from video_study.core import StudyError
from video_study.training import state
from video_study.training.experiment import experiment, resolve
from video_study.training.loop import fit

GROUP = Path(__file__).with_name("training_group.py")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_group(jobs, folder, world=2):
    """Run jobs in a group of processes; return what every process said of every job."""
    told = folder / "told.txt"
    (folder / "jobs.json").write_text(json.dumps(jobs))
    env = os.environ | dict(WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), OMP_NUM_THREADS="1")
    group = [subprocess.Popen([sys.executable, str(GROUP), str(folder / "jobs.json"), str(told)], env=env | dict(RANK=str(r), LOCAL_RANK=str(r)),
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for r in range(world)]
    try:
        said = [p.communicate()[0] for p in group]  # pytest's own limit stands over this
    finally:
        for p in group:
            p.kill()
    assert [p.returncode for p in group] == [0] * world, "\n".join(said)[-4000:]
    return [json.loads(line) for line in told.read_text().splitlines()]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return str(toy_dataset(tmp_path_factory.mktemp("videos")))


# Sums in another order differ in their last bits, and training doubles such differences with every update or so. So runs are compared after two updates.
PLAIN = dict(model="tam_resnet18", width=0.0625, frames=4, image_size=32, epochs=1, batch_size=12, lr=0.02, warmup_epochs=0.5, dropout=0.0, crop="random", seed=7,
             evaluation=("clip", "video"))
CASES = dict(
    joint_statistics=dict(),  # batch normalisation over the twelve clips of both processes
    groups=dict(bn_clips=6),  # over the six clips of each
    passes=dict(batch_size=6, accumulate=2, clip_grad=0.5, ema=0.9, label_smoothing=0.1, calibrate=2),
    three_d=dict(model="r2plus1d_18", frames=8, lr=0.0001),  # deeper, so differences grow faster
    mutual=dict(model="slow_resnet50", frames=4, image_size=64, mutual="0.06"),
    resolutions=dict(mutual="multi_resolution_0.06", image_size=64),
)
LONG = dict(batch_size=4, epochs=2)  # twelve updates, to be stopped between


@pytest.fixture(scope="module")
def exps(data):
    return {name: resolve(experiment(**PLAIN | changes | dict(data=data))) for name, changes in (CASES | dict(long=LONG)).items()}


@pytest.fixture(scope="module")
def pairs(exps, tmp_path_factory):
    """Every case by two processes, and then by one; and a run of two that is stopped twice, by the second process each time."""
    two, one = tmp_path_factory.mktemp("two"), tmp_path_factory.mktemp("one")
    job = lambda name, folder, **more: dict(experiment=exps[name].to_dict(), folder=str(two / folder), **more)
    stops = [job("long", "stopped", stop_at=5, stop_in=1), job("long", "stopped", stop_at=8, stop_in=1), job("long", "stopped")]
    half = [job("groups", "half", stop_at=1, stop_in=0)]
    told = run_group([job(name, name) for name in exps] + stops + half, two)
    for name, e in exps.items():
        if name == "long":
            continue
        fit(e, one / name, device="cpu", progress=False, threads=1)
    return two, one, told


def tensors(folder):
    return state.load(folder / "weights.pt")["state_dict"]


def far(a, b):
    """The largest difference of two networks, relative to the size of each tensor."""
    return max(float((a[k].double() - b[k].double()).norm() / (b[k].double().norm() + 1e-3)) for k in b)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_what_one_does(pairs, name):
    two, one, told = pairs
    assert told[list(CASES).index(name)] == ["done", "done"]
    assert far(tensors(two / name), tensors(one / name)) < (1e-2 if name == "three_d" else 2e-3)
    a, b = (json.loads((f / name / "result.json").read_text()) for f in (two, one))
    assert (a["processes"], b["processes"]) == (2, 1)
    assert a["effective"]["batch"] == b["effective"]["batch"] and a["effective"]["clips_in_a_pass"] * 2 == b["effective"]["clips_in_a_pass"]
    for line, other in zip((two / name / "log.jsonl").open(), (one / name / "log.jsonl").open()):
        line, other = json.loads(line), json.loads(other)
        assert line["updates"] == other["updates"] and line["loss"] == pytest.approx(other["loss"], rel=2e-3)


@pytest.mark.parametrize("name", CASES)
def test_scores_of_all_videos_in_their_order(pairs, name):
    two, one, _ = pairs
    a, b = (np.load(f / name / "scores.npz") for f in (two, one))
    assert list(a["video_ids"]) == list(b["video_ids"]) and list(a["labels"]) == list(b["labels"])
    assert np.allclose(a["video_views"], b["video_views"], atol=0.02)


def test_the_comparison_can_fail(pairs):
    two, one, _ = pairs
    assert far(tensors(two / "groups"), tensors(one / "joint_statistics")) > 0.01  # another rule of normalisation is another run


def test_one_process_asks_all_stop_and_the_end_has_the_same_bits(pairs):
    two, _, told = pairs
    n = len(CASES) + 1
    assert told[n] == ["Preempted: stopped after update 5 as asked; the same call continues from there"] * 2
    assert all(t.startswith("Preempted: stopped") for t in told[n + 1]) and told[n + 2] == ["done", "done"]
    a, b = tensors(two / "stopped"), tensors(two / "long")
    assert [k for k in b if not torch.equal(a[k], b[k])] == []
    steps = [json.loads(line)["step"] for line in (two / "stopped" / "steps.jsonl").open()]
    assert steps == list(range(1, 13))  # every update is told once, by the first process


def test_another_number_of_processes_is_refused(pairs, exps):
    two = pairs[0]
    assert state.load(two / "half" / "checkpoint.pt")["world"] == 2
    with pytest.raises(StudyError, match="the checkpoint was written by 2 processes, and now there is 1: .*Continue with 2, or remove the run folder"):
        fit(exps["groups"], two / "half", device="cpu", progress=False)


def test_a_batch_that_cannot_be_shared_is_refused_in_every_process(exps, tmp_path):
    odd = replace(exps["joint_statistics"], recipe=replace(exps["joint_statistics"].recipe, batch_size=3))
    told = run_group([dict(experiment=resolve(odd).to_dict(), folder=str(tmp_path / "odd"))], tmp_path)
    assert told == [["StudyError: a batch of 3 clips cannot be shared out evenly to 2 processes; use a number of processes that divides it, or change batch_size"] * 2]
    assert not (tmp_path / "odd").exists()
