"""JupyterLab for real: a server, a browser, "Run All Cells", and what a reader then sees on the page."""
import os
import re
import shutil
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
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
pytestmark = pytest.mark.browser


DONE = """() => {
    const prompts = [...document.querySelectorAll('.jp-Notebook .jp-InputPrompt')].map(p => p.innerText);
    return prompts.some(p => /\\[\\d+\\]/.test(p)) && !prompts.some(p => p.includes('*'));
}"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def chromium():
    path = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)
    if path is None:
        pytest.skip("no Chromium on this machine; on Debian or Ubuntu: apt-get install chromium")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; `make dev` installs it")
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, headless=True, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The notebooks without their outputs and with small settings, in a project of their own, so that everything on the page was made there."""
    home = tmp_path_factory.mktemp("jupyter")
    shutil.copy(ROOT / "settings.ini", home)
    for name in ("data_manifests", "outputs/figures", "nbs"):
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
        server = subprocess.Popen([sys.executable, "-m", "jupyterlab", *settings], stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=env, cwd=project)
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
        server.wait(30)


def run_all(chromium, url, name, seconds, picture):
    """Open a notebook, run all its cells, wait until every cell has run; return the page."""
    page = chromium.new_page(viewport=dict(width=1400, height=1000))
    page.goto(f"{url}/lab/tree/nbs/{name}?reset", timeout=60_000)
    page.wait_for_selector(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-Notebook .jp-Cell", timeout=60_000)
    page.wait_for_selector("#jp-bottom-panel :text('| Idle'), .jp-StatusBar-Widget :text('| Idle')", timeout=60_000)  # the kernel is connected
    page.click(".lm-MenuBar-itemLabel:text-is('Run')")
    page.click(".lm-Menu-itemLabel:text-is('Run All Cells')")
    try:
        page.wait_for_function(DONE, timeout=seconds * 1000)
    finally:
        page.screenshot(path=picture)
    return page


def check(page):
    """No cell may end in an error or write a warning."""
    for kind in ("error", "stderr"):
        found = page.locator(f'.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.{kind}"]')
        assert found.count() == 0, found.first.inner_text()


def test_the_index_runs_and_shows_the_map(chromium, lab, tmp_path):
    page = run_all(chromium, lab, "index.ipynb", 60, tmp_path / "index.png")
    check(page)
    links = page.locator(".jp-OutputArea-output a[href*='ablation_tam.ipynb']")
    assert links.count() == 1 and links.first.inner_text() == "ablation_tam"


def test_the_ablation_runs_and_shows_its_table_and_figure(chromium, lab, tmp_path):
    page = run_all(chromium, lab, "ablation_tam.ipynb", 600, tmp_path / "ablation_tam.png")
    check(page)
    table = page.locator(".jp-OutputArea-output table").filter(has_text="tam").filter(has_text="tsn")
    assert table.count() >= 1
    figure = page.locator(".jp-OutputArea-output img")
    assert figure.count() >= 1
    size = figure.first.evaluate("img => [img.naturalWidth, img.naturalHeight]")
    assert min(size) > 100, size
    figure.first.screenshot(path=tmp_path / "figure.png")
