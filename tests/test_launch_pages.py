"""README.md and the static pages: what the notebooks say, with links that lead somewhere and nothing from the network."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest
from bs4 import BeautifulSoup

from video_study.launch.docs import make_docs
from video_study.launch.pages import pages, readable, readme, relink
from video_study.launch.parameters import notebook_cells

ROOT = Path(__file__).resolve().parents[1]
HEADING = re.compile(r"^#+ +(.+?)\s*$", re.M)


def anchors(path):
    text = "\n".join(c["source"] for c in notebook_cells(path) if c["cell_type"] == "markdown")
    return {h.replace(" ", "-").replace("`", "") for h in HEADING.findall(re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))}


def links(text):
    found = []
    relink(text, lambda target: found.append(target) or target)
    return found


def test_readme_is_what_the_index_renders_to():
    assert (ROOT / "README.md").read_text(encoding="utf-8") == readme(), "run `study readme` and commit README.md"


def test_links_of_the_readme_lead_somewhere():
    lost = [t for t in links((ROOT / "README.md").read_text(encoding="utf-8")) if not (ROOT / t.partition("#")[0]).exists()]
    assert not lost


@pytest.mark.parametrize("page", pages(), ids=str)
def test_links_between_notebooks_lead_somewhere(page):
    path = ROOT / "nbs" / page
    for cell in readable(notebook_cells(path)):
        for target in links(cell["source"]) if cell["cell_type"] == "markdown" else ():
            file, _, anchor = target.partition("#")
            assert (path.parent / file).exists(), target
            if anchor and file.endswith(".ipynb"):
                assert unquote(anchor) in anchors(path.parent / file), target


def test_pages_are_complete_and_need_no_network(tmp_path):
    some = [p for p in pages() if p.as_posix() in ("index.ipynb", "ablation_tam.ipynb", "models/temporal.ipynb", "training/schedule.ipynb")]
    front = make_docs(tmp_path / "docs", some)
    assert front.exists()
    for page in some:
        html = (tmp_path / "docs" / page).with_suffix(".html").read_text(encoding="utf-8")
        soup = BeautifulSoup(html, "html.parser")
        assert not [t for t in soup.select("script[src], link, iframe, [srcset]")]
        assert all(t["src"].startswith("data:") for t in soup.select("[src]"))
        for a in soup.select("a[href]"):
            target = a["href"].partition("#")[0]
            if not target or re.match(r"[a-z]+:", target):
                continue
            if target == Path(os.path.relpath("reference.html", page.parent)).as_posix():  # made with the pages, of no notebook
                assert (tmp_path / "docs" / "reference.html").exists()
                continue
            source = (ROOT / "nbs" / page.parent / target).resolve()
            assert source.with_suffix(".ipynb").exists() if target.endswith(".html") else source.exists(), (str(page), target)
        shown = soup.select_one("main").get_text()
        assert "default_exp" not in shown and not re.search(r"\$[^$\n]*\\[a-z]+[^$\n]*\$", shown), "a formula was left as TeX"


@pytest.mark.browser
def test_the_front_page_shows_a_ledger_to_filter_without_a_network(tmp_path):
    chromium = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)
    if chromium is None:
        pytest.skip("no Chromium on this machine; on Debian or Ubuntu: apt-get install chromium")
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed; `make dev` installs it")
    front = make_docs(tmp_path / "docs", [p for p in pages() if p.as_posix() == "index.ipynb"])
    words = [sys.executable, str(ROOT / "tests" / "docs_page.py"), chromium, str(front), str(tmp_path)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        out, err = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail("the browser hangs")
    assert process.returncode == 0, err[-2000:]
    page = json.loads(out)
    assert page["asked"] == [] and page["errors"] == []
    assert len(page["all"]) == 212 and page["told"] == "212 of 212 claims"
    assert page["against"] and all(c.startswith("BL-") for c in page["against"]) and "BL-27" in page["against"]
    assert "What decides" in page["opened"] and "S3D" in page["opened"]
    assert page["searched"] == ["BL-08"]
