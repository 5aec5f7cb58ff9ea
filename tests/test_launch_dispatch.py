"""Worker processes that are killed, and dispatchers that are: no run is lost, none is done twice, no process stays."""
import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

# runs in a process of its own, as a user's script would; each toy run writes its process id and an epoch at a time
SCRIPT = '''
import json, os, sys, time
from functools import partial
from pathlib import Path
from video_study.core import outputs, write_json
from video_study.launch.tasks import Task, error_of, one_bar, state
from video_study.launch.workers import run_local

def toy(folder, seconds, progress):
    from video_study.training.state import run_lock
    with run_lock(folder):
        if (folder / "result.json").exists(): return
        with open(folder / "began", "a") as f: f.write(f"{os.getpid()}\\n")
        print("epoch 1 of", folder.name, flush=True)
        time.sleep(seconds)
        write_json(folder / "result.json", {})

def task(name, seconds):
    folder = outputs() / "runs" / name
    folder.mkdir(parents=True, exist_ok=True)
    return Task(folder, partial(toy, folder, seconds), 1, name)

if __name__ == "__main__":
    tasks = [task(name, float(seconds)) for name, seconds in (pair.split("=") for pair in sys.argv[1:])]
    with one_bar(tasks) as renew: run_local(tasks, renew, jobs=2)
    print(json.dumps({t.label: error_of(t) or state(t) for t in tasks}))
'''


@pytest.fixture
def start(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    env = os.environ | dict(VIDEO_STUDY_OUTPUTS=str(tmp_path / "out"))
    started = []

    def start(**seconds):
        words = [sys.executable, "script.py", *(f"{name}={s}" for name, s in seconds.items())]
        started.append(subprocess.Popen(words, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True))
        return started[-1]

    yield start
    for process in started:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            process.kill()
        process.communicate(timeout=60)


def began(tmp_path, name):
    path = tmp_path / "out" / "runs" / name / "began"
    return [int(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait(condition, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def family(process):
    return [p for p in psutil.Process(process.pid).children(recursive=True)]


def test_killed_workers_cost_their_runs_and_are_replaced(start, tmp_path):
    process = start(a=60, b=60, c=0.1, d=0.1)
    wait(lambda: began(tmp_path, "a") and began(tmp_path, "b"))
    for name in "ab":
        os.kill(began(tmp_path, name)[0], signal.SIGKILL)
    out, err = process.communicate(timeout=60)
    died = "the process died: killed, out of memory, or crashed"
    assert json.loads(out.splitlines()[-1]) == dict(a=died, b=died, c="done", d="done"), err
    failed = json.loads((tmp_path / "out" / "runs" / "a" / "failed.json").read_text())
    assert "epoch 1 of a" in failed["details"]  # the end of its log


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGKILL], ids=["interrupt", "kill"])
def test_a_stopped_dispatcher_leaves_no_process(start, tmp_path, sig):
    process = start(a=60, b=60, c=60)
    wait(lambda: began(tmp_path, "a") and began(tmp_path, "b"))
    children = family(process)
    assert len(children) >= 4  # two workers and submitit's controllers
    os.killpg(process.pid, sig) if sig == signal.SIGINT else process.kill()  # Ctrl-C reaches every process of the terminal
    out, err = process.communicate(timeout=60)
    assert process.returncode != 0
    gone, alive = psutil.wait_procs(children, timeout=30)
    assert not alive
    assert not (tmp_path / "out" / "runs" / "a" / "failed.json").exists()  # an interrupted run has not failed; it goes on next time
    if sig == signal.SIGINT:
        assert err.count("Traceback") == 1 and err.rstrip().endswith("KeyboardInterrupt"), err  # ours, and none of the workers'
        assert not list((tmp_path / "out" / "runs" / "_jobs").iterdir())


def test_an_interrupt_while_workers_start_leaves_no_process(start, tmp_path):
    process = start(a=60, b=60)
    wait(lambda: len(family(process)) >= 2)
    children = family(process)
    process.send_signal(signal.SIGINT)  # once: it is not lost, even while the next worker is being started
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert not psutil.wait_procs(children, timeout=30)[1]


def test_two_dispatchers_share_the_work(start, tmp_path):
    runs = dict(a=1.5, b=1.5, c=1.5, d=1.5)
    first = start(**runs)
    wait(lambda: began(tmp_path, "a"))
    second = start(**runs)
    for process in (first, second):
        out, err = process.communicate(timeout=120)
        assert set(json.loads(out.splitlines()[-1]).values()) == {"done"}, err
    workers = [began(tmp_path, name) for name in runs]
    assert [len(w) for w in workers] == [1] * 4  # each run was made once
