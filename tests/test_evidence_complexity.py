"""Every printed cost of the five papers against our counts: what differs is known, and nothing is left out in silence."""
import pandas as pd
import pytest

from video_study.core import outputs
from video_study.evidence.complexity import COUNTED, EXCEPTIONS, compare
from video_study.evidence.published import PAPERS, published


@pytest.fixture(scope="module")
def table():
    return pd.concat([compare(paper, own=False) for paper in PAPERS], ignore_index=True)


def test_what_differs_is_what_is_explained(table):
    differs = table[table["matches_print"] == False]  # noqa: E712
    assert (differs["note"] != "differs").all(), differs[["paper", "locator", "model", "metric", "published", "computed"]].to_string()
    assert len(differs) == len(EXCEPTIONS)


@pytest.mark.parametrize("paper", PAPERS)
def test_every_own_cost_is_compared(table, paper):
    cells = published(paper)
    wanted = cells[cells["own_result"] & cells["metric"].isin(["params", "flops", "video_flops"])]
    mine = table[(table["paper"] == paper) & table["own_result"] & table["metric"].isin(COUNTED)]
    assert len(mine) == len(wanted)
    open_ones = mine[mine["matches_print"].isna()]
    assert open_ones.empty, open_ones[["locator", "model", "metric", "published", "note"]].to_string()


def test_nothing_is_left_out_without_a_reason(table):
    rest = table[table["matches_print"].isna()]
    assert rest["note"].str.startswith("not compared: ").all()
    assert not rest["note"].str.contains("unknown model").any()


def test_committed_table_is_what_the_code_says(table):
    path = outputs() / "evidence" / "complexity.csv"
    if not path.exists():
        pytest.skip("outputs/evidence/complexity.csv is not committed yet")
    kept = pd.read_csv(path, dtype=str, keep_default_na=False)
    columns = ["paper", "locator", "model", "metric", "published", "unit", "note"]
    assert kept[columns].to_dict("records") == table[columns].fillna("").to_dict("records")
    ours = pd.to_numeric(kept["computed"])
    assert ((ours - table["computed"]).abs().fillna(0) < 1e-6).all()
