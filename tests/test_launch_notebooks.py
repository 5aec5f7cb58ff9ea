"""`study run` as a user meets it: a process with an exit code, started anywhere, over notebooks that fail in every way."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

ROOT = Path(__file__).resolve().parents[1]
STUDY = [str(Path(sys.executable).with_name("study"))]
FAULTS = '''
import os, pathlib, signal, sys, time
from video_study.core import Progress
pathlib.Path(os.environ["VIDEO_STUDY_OUTPUTS"], "kernel").write_text(str(os.getpid()))
if fault == "exception": raise ValueError("no such video")
if fault == "kill": os.kill(os.getpid(), signal.SIGKILL)
if fault == "exit": sys.exit(0)
if fault == "sleep":
    with Progress(4, "sleeping", "naps") as bar:
        bar.update(1)
        time.sleep(60)
print("on stderr", file=sys.stderr)
'''


@pytest.fixture
def project(tmp_path):
    """A project with one study notebook, whose cell "The work" does what its parameter `fault` says."""
    (tmp_path / "nbs").mkdir()
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nlib_name = video_study\n")
    cells = [
        new_markdown_cell("# Toy\n\n> A toy study"),
        new_code_cell('frames: int = 8  # frames a clip\nfault: str = ""  # what goes wrong', metadata=dict(tags=["parameters"])),
        new_markdown_cell("## The work"),
        new_code_cell(FAULTS),
        new_markdown_cell("## The result"),
        new_code_cell('print(f"{frames} frames in {os.getcwd()}")\nif fault == "last": os.kill(os.getpid(), signal.SIGKILL)', metadata=dict(tags=["result"])),
    ]
    meta = dict(kernelspec=dict(name="python3", display_name="python3", language="python"))
    nbformat.write(new_notebook(cells=cells, metadata=meta), tmp_path / "nbs" / "toy.ipynb")
    (tmp_path / "elsewhere").mkdir()
    return tmp_path


def environ(project):
    # another kernel is called python3 here, and it does not work
    wrong = project / "jupyter" / "kernels" / "python3"
    wrong.mkdir(parents=True, exist_ok=True)
    (wrong / "kernel.json").write_text(json.dumps(dict(argv=["false", "{connection_file}"], display_name="x", language="python")))
    return os.environ | dict(VIDEO_STUDY_ROOT=str(project), VIDEO_STUDY_OUTPUTS=str(project / "out"), JUPYTER_DATA_DIR=str(project / "jupyter"),
                             JUPYTER_PREFER_ENV_PATH="0")


def study(project, *words, **kw):
    (project / "out").mkdir(exist_ok=True)
    return subprocess.run([*STUDY, *words], capture_output=True, text=True, cwd=project / "elsewhere", env=environ(project), timeout=120, **kw)


def folder(project):
    return sorted(p.name for p in (project / "out" / "notebooks").iterdir())


def test_a_good_run_from_elsewhere_prints_its_result_and_leaves_the_source(project):
    source = (project / "nbs" / "toy.ipynb").read_bytes()
    done = study(project, "run", "toy", "-p", "frames", "16", input=source.decode())  # from a pipe, papermill would overwrite its first argument
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == f"16 frames in {project / 'elsewhere'}"
    assert "executed notebook: out/notebooks/toy-frames_16.ipynb" in done.stdout
    assert (project / "nbs" / "toy.ipynb").read_bytes() == source
    assert folder(project) == ["toy-frames_16.ipynb"]
    # no wall of log lines: what is on stderr are the stages
    assert all(line.startswith("[0:") for line in done.stderr.splitlines()), done.stderr


def test_outputs_that_would_overwrite_are_refused(project):
    mine = project / "mine.ipynb"
    mine.write_bytes((project / "nbs" / "toy.ipynb").read_bytes())
    link = project / "link.ipynb"
    link.symlink_to(project / "nbs" / "toy.ipynb")
    before = mine.read_bytes()
    for place in ("../nbs/toy.ipynb", "../nbs/new.ipynb", str(mine), str(link)):
        done = study(project, "run", "toy", "-o", place)
        assert done.returncode == 2 and "name another file" in done.stderr, (place, done.stderr)
    assert mine.read_bytes() == before and not (project / "nbs" / "new.ipynb").exists()


@pytest.mark.parametrize("words, says", [
    (["-p", "framez", "16"], "did you mean 'frames'"),
    (["-p", "frames", "many"], "'frames' is int, not 'many'"),
    (["-p", "frames", "16.0"], "'frames' is int, not '16.0'"),
], ids=["unknown", "text", "float"])
def test_parameters_that_do_not_fit_are_refused_with_the_list(project, words, says):
    done = study(project, "run", "toy", *words)
    assert done.returncode == 2
    assert says in done.stderr and "frames a clip" in done.stderr and "what goes wrong" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (project / "out" / "notebooks").exists()


@pytest.mark.parametrize("fault, says, not_said", [
    ("exception", "ValueError: no such video", None),
    ("kill", "the kernel died", "Traceback"),
    ("exit", "sys.exit()", "Traceback"),
    ("last", "the kernel died", "Traceback"),
])
def test_a_failed_run_has_a_true_exit_code_and_says_why(project, fault, says, not_said):
    done = study(project, "run", "toy", "-p", "fault", fault)
    assert done.returncode == 1, (done.returncode, done.stderr)
    assert says in done.stderr and not (not_said and not_said in done.stderr), done.stderr
    assert f'failed at "The {"result" if fault == "last" else "work"}"' in done.stderr
    failed = f"out/notebooks/toy-fault_{fault}.failed.ipynb"
    assert failed in done.stderr and (project / failed).exists()
    assert folder(project) == [Path(failed).name]


def gone(pid, seconds=20):
    until = time.monotonic() + seconds
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True


@pytest.mark.parametrize("sig, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)], ids=["interrupt", "terminate", "kill"])
def test_a_stopped_run_leaves_no_kernel(project, sig, code):
    (project / "out").mkdir()
    words = [*STUDY, "run", "toy", "-p", "fault", "sleep"]
    process = subprocess.Popen(words, cwd=project, env=environ(project), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    lines = []
    for line in process.stderr:
        lines.append(line)
        if "sleeping 1/4 naps" in line:
            break
    assert "The work | sleeping" in lines[-1], lines
    kernel = int((project / "out" / "kernel").read_text())
    process.send_signal(sig)
    rest = process.communicate(timeout=60)[1]
    assert process.returncode == code, rest
    assert gone(kernel)
    assert "Traceback" not in rest, rest
    if sig != signal.SIGKILL:
        assert folder(project) == ["toy-fault_sleep.failed.ipynb"]


def test_the_project_is_found_from_anywhere(tmp_path):
    env = {k: v for k, v in os.environ.items() if not k.startswith("VIDEO_STUDY_")}
    done = subprocess.run([*STUDY, "list"], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert all(f"{p.stem}:" in done.stdout for p in (ROOT / "nbs").glob("ablation_*.ipynb"))


def test_help_is_light():
    code = "import sys\nfrom video_study.launch.cli import parser\nparser().format_help()\nprint([m for m in ('torch', 'pandas', 'papermill') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
