"""Nothing that is committed is older than its data: tables, figures, the ledger, and the numbers on the front page."""
import io
import json
import re
import shutil
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from video_study.evidence.claims import judge_printed
from video_study.evidence.facts import FACTS, number
from video_study.evidence.published import claims
from video_study.evidence.redraw import expected, redraw
from video_study.evidence.results import sidecar
from video_study.evidence.rules import rules
from video_study.evidence.summary import KINDS, SILENT, claim_map, combined, full_ledger, read_ledger, tally, verdicts
from video_study.launch.parameters import notebook_cells
from video_study.launch.pages import output_markdown

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "outputs"
FIGURES = sorted((OUT / "figures").glob("*.png"))


def told(path):
    return json.loads(sidecar(path).read_text(encoding="utf-8"))


@pytest.mark.parametrize("file, notebook", expected().items(), ids=lambda v: str(v))
def test_what_a_notebook_keeps_is_there(file, notebook):
    found = sorted(OUT.glob(file))
    assert found, f"{file} is missing: run nbs/{notebook}.ipynb with VIDEO_STUDY_EVIDENCE=1, as `make evidence` does"
    assert {told(path)["notebook"] for path in found} == {notebook}


def test_nothing_lies_there_that_no_notebook_keeps():
    drawn_from = {name for f in FIGURES for name in told(f).get("draw", {}).get("tables", {}).values()}
    there = {p.relative_to(OUT).as_posix() for d, kind in (("evidence", "csv"), ("figures", "png")) for p in (OUT / d).glob(f"*.{kind}")}
    stray = {f for f in there if not any(fnmatch(f, e) for e in expected()) and Path(f).name not in drawn_from and not Path(f).name.startswith("speed_")}
    assert not stray, "no study notebook says that it leaves these"


@pytest.mark.parametrize("path", [f for f in FIGURES if "draw" in told(f)], ids=lambda p: p.name)
def test_a_figure_is_what_its_tables_give(path, tmp_path):
    from PIL import Image
    for file in (path, sidecar(path)):
        shutil.copy(file, tmp_path / file.name)
    again = redraw(tmp_path / path.name, OUT / "evidence")
    a, b = (np.asarray(Image.open(io.BytesIO(f.read_bytes())).convert("RGB"), float) for f in (path, again))
    assert a.shape == b.shape and abs(a - b).mean() < 2, f"{path.name} is not what its tables give; run `make figures` and commit it"


def test_every_claim_has_a_rule():
    assert [r.claim for r in rules()] == claims()["id"].tolist()
    for r in rules():
        assert r.decides.endswith("."), r.claim
        assert r.printed or r.rebuilt or r.measured or r.reason or r.command, f"{r.claim} is neither judged nor says why not"


def test_every_untested_claim_says_how_to_test_it():
    book = read_ledger()
    open_ones = book[(book["measured"] == "untested") | (book["rebuilt"] == "untested")]
    silent = open_ones[open_ones["command"] == ""]["claim"].tolist()
    assert silent == [], "an untested claim names the command that would test it"


def test_rules_point_at_facts_that_exist():
    named = {w["fact"] for r in rules() for s in r.rebuilt for _, w in s.terms if "fact" in w}
    assert named <= set(FACTS)


def test_the_papers_contradictions_are_explained():
    for r in rules():
        if any(p["verdict"] == "contradicts" for p in judge_printed(r)):
            assert r.note, f"{r.claim}: its own numbers contradict it, and no note says how"


def test_the_ledger_is_what_the_rules_and_the_evidence_say():
    book, seen = read_ledger().set_index("claim"), verdicts()
    assert book.index.tolist() == claims()["id"].tolist()
    for r in rules():
        said = {p["verdict"] for p in judge_printed(r)}
        assert book.loc[r.claim, "printed"] == ("contradicts" if "contradicts" in said else "supports" if said else "not printed"), r.claim
        assert book.loc[r.claim, "decides"] == r.decides
        measured = combined(list(seen.loc[seen["claim"] == r.claim, "measured"]))
        assert (book.loc[r.claim, "measured"] if book.loc[r.claim, "measured"] not in SILENT else "") == measured, f"{r.claim}: the ledger is older than a notebook's verdicts; run `make evidence`"


def test_rebuilt_verdicts_are_those_of_the_code():
    fresh = full_ledger(number, ("r2plus1d",)).set_index("claim")
    committed = read_ledger().set_index("claim").loc[fresh.index]
    pd.testing.assert_series_equal(fresh["rebuilt"], committed["rebuilt"])


def test_the_front_page_shows_the_ledger_that_is_committed():
    shown = "\n".join(output_markdown(o) for c in notebook_cells(ROOT / "nbs" / "index.ipynb") for o in c.get("outputs", []))
    assert claim_map() in shown, "run nbs/index.ipynb again, as `make evidence` does"
    assert claim_map() in (ROOT / "README.md").read_text(encoding="utf-8"), "run `study readme` and commit README.md"


def test_the_tally_counts_every_claim_once():
    counts = tally(read_ledger())
    assert counts.loc["all", ("claims", "")] == 212
    assert {k for k, _ in counts.columns if k in KINDS} == set(KINDS)
    assert int(counts.loc["all", ("printed", "supports")]) + int(counts.loc["all", ("printed", "contradicts")]) + int(counts.loc["all", ("printed", "not printed")]) == 212


def test_no_number_of_a_verdict_is_typed_into_the_front_page():
    prose = "\n".join(c["source"] for c in notebook_cells(ROOT / "nbs" / "index.ipynb") if c["cell_type"] == "markdown")
    assert not re.search(r"\b\d+ (of \d+ )?claims? (hold|support|contradict|are measured)", prose)
