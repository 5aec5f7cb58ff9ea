"""JupyterLab for real: a server, a browser, "Run All Cells", and what a reader then sees on the page."""
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest

from video_study.core import data_home

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.browser


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def chromium():
    path = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)
    if path is None:
        pytest.skip("no Chromium on this machine; on Debian or Ubuntu: apt-get install chromium")
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed; `make dev` installs it")
    return path


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The notebooks without their outputs and with small settings, in a project of their own, so that everything on the page was made there."""
    home = tmp_path_factory.mktemp("jupyter")
    shutil.copy(ROOT / "settings.ini", home)
    for name in ("data_manifests", "outputs/evidence", "outputs/figures", "nbs"):
        shutil.copytree(ROOT / name, home / name)
    for extension, setting in {
        "notebook-extension/tracker": '{"windowingMode": "none"}',  # keep cells on the page that are out of sight
        "apputils-extension/notification": '{"fetchNews": "false", "checkForUpdates": false}',
    }.items():
        file = home / "settings" / "@jupyterlab" / f"{extension}.jupyterlab-settings"
        file.parent.mkdir(parents=True)
        file.write_text(setting)
    for path in (home / "nbs").glob("*.ipynb"):
        nb = nbformat.read(path, 4)
        for cell in nb.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
            if "parameters" in cell.metadata.get("tags", []):
                cell.source = re.sub(r"^frames: int = \d+", "frames: int = 4", cell.source, flags=re.M)
        nbformat.write(nb, path)
    return home


@pytest.fixture(scope="module")
def lab(project):
    """A JupyterLab server on the loopback interface."""
    port, log = free_port(), project / "lab.log"
    settings = [f"--ServerApp.port={port}", "--ServerApp.ip=127.0.0.1", "--IdentityProvider.token=", "--no-browser", "--ServerApp.allow_root=True",
                f"--ServerApp.root_dir={project}"]
    env = os.environ | dict(VIDEO_STUDY_ROOT=str(project), VIDEO_STUDY_SMALL="1", VIDEO_STUDY_DATA=str(data_home()), JUPYTER_CONFIG_DIR=str(project / "config"), JUPYTER_DATA_DIR=str(project / "share"),
                            JUPYTERLAB_SETTINGS_DIR=str(project / "settings"), JUPYTERLAB_WORKSPACES_DIR=str(project / "workspaces"))
    with open(log, "w") as out:
        server = subprocess.Popen([sys.executable, "-m", "jupyterlab", *settings], stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=env, cwd=project, start_new_session=True)
    url, until = f"http://127.0.0.1:{port}", time.monotonic() + 60
    try:
        while True:
            try:
                urllib.request.urlopen(f"{url}/api/status", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < until, log.read_text()[-2000:]
                time.sleep(0.2)
        yield url
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)


def read_page(chromium, url, name, seconds, folder):
    """Run all cells of a notebook in a browser of its own, which is ended with its children if it hangs; what it then finds on the page."""
    words = [sys.executable, str(ROOT / "tests" / "jupyter_page.py"), chromium, f"{url}/lab/tree/nbs/{name}?reset", str(seconds), str(folder)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, start_new_session=True)
    try:
        out, err = process.communicate(timeout=seconds + 60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate(timeout=30)
        pytest.fail(f"the browser hangs; it got to: {err[-2000:]}")
    assert process.returncode == 0, err[-2000:]
    page = json.loads(out)
    assert page["error"] == [] and page["stderr"] == []  # no cell may end in an error or write a warning
    return page


def test_the_index_runs_and_shows_the_map(chromium, lab, tmp_path):
    page = read_page(chromium, lab, "index.ipynb", 100, tmp_path)
    assert [text for text, target in page["links"] if "ablation_tam.ipynb" in target] == ["ablation_tam"]


def test_the_ablation_runs_and_shows_its_table_and_figure(chromium, lab, tmp_path):
    page = read_page(chromium, lab, "ablation_tam.ipynb", 220, tmp_path)
    assert any("tam" in text and "tsn" in text for text in page["tables"])
    assert page["images"] and min(page["images"][0]) > 100
