"""`study data check` on miniature layouts: what it finds, that it can be stopped, and that training uses what it leaves."""
import os
import signal
import subprocess
import sys
import time
import data_layouts as layouts
import pytest
from data_videos import copy_stream
from video_study.core import StudyError, outputs
from video_study.data import audit
from video_study.data.audit import check
from video_study.data.build import build
from video_study.data.catalog import dataset


@pytest.fixture()
def built(tmp_path, monkeypatch):
    for name in ("ROOT", "DATA", "OUTPUTS"): monkeypatch.delenv(f"VIDEO_STUDY_{name}", raising=False)
    monkeypatch.setenv("VIDEO_STUDY_ROOT", str(layouts.project(tmp_path / "project")))
    layouts.kinetics(tmp_path)
    copy_stream(tmp_path / "v/train/eating_cake/abc_000005_000015.mp4", tmp_path / "v/val/eating_cake/jkl_000000_000010.mkv")
    (tmp_path / "v/val/eating_cake/jkl_000000_000010.mp4").unlink()
    build("kinetics_small", tmp_path / "a", videos=tmp_path / "v")
    return tmp_path


def test_everything_is_found(built):
    path = built / "v/train/eating_cake/def.mkv"
    path.write_bytes(path.read_bytes()[:-1500])
    table, lines, m = check("kinetics_small", shortest=20)
    found = {(r.kind, r.video_id) for r in table.itertuples()}
    assert {("missing", "gone_000000_000010"), ("leaking", "jkl_000000_000010"), ("too short", "ghi_000000_000010")} <= found
    assert any(v == "def_000000_000010" and k in ("truncated", "undecodable") for k, v in found)
    assert m.coverage == (4, 6) and any("A table prints 4 train videos; here are 2 (50.0 %)" in line for line in lines)
    assert (outputs() / "audits/kinetics_small.csv").exists()


def test_training_uses_the_audited_manifest(built):
    before = dataset("kinetics_small")
    assert not before.column("seek_exact").any() and any("study data check" in n for n in before.notes)
    check("kinetics_small")
    after = dataset("kinetics_small")
    assert after.column("seek_exact").all() and not any("study data check" in n for n in after.notes)
    assert after.card.audited and after.hash != before.hash


def test_a_sample_changes_nothing(built):
    before = dataset("kinetics_small").hash
    table, lines, m = check("kinetics_small", sample=2)
    assert "2 of 5 videos were looked at" in lines[0] and dataset("kinetics_small").hash == before == m.hash


def test_a_video_that_hangs_or_crashes_the_decoder_is_a_line(built, monkeypatch):
    true_look = audit.look

    def look(path, decoder):
        if "ghi" in path: time.sleep(600)
        if "mno" in path: os.kill(os.getpid(), signal.SIGKILL)
        return true_look(path, decoder)
    monkeypatch.setattr(audit, "look", look)
    table, _, m = check("kinetics_small", limit=2)
    details = dict(zip(table["path"].str.split("/").str[-1], table["detail"]))
    assert details["ghi_000000_000010.mp4"] == "its decoder did not finish within 2 seconds" and details["mno_000003_000013.mp4"] == "its decoder crashed (SIGKILL)"
    assert len(m) == 3


CHECK = """
import sys, time
from video_study.data import audit
true_look = audit.look
def look(path, decoder): time.sleep(0.4); return true_look(path, decoder)
audit.look = look
audit.check("kinetics_small", workers=1)
"""


def test_a_killed_check_goes_on_where_it_was(built):
    process = subprocess.Popen([sys.executable, "-c", CHECK], env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True)
    log = audit._log(dataset("kinetics_small"), "decord")
    try:
        end = time.monotonic() + 60
        while not (log.exists() and log.read_text().count("\n") >= 2) and time.monotonic() < end: time.sleep(0.02)
    finally: os.killpg(process.pid, signal.SIGKILL); process.wait(30)
    done = log.read_text()[:-7]  # the last line as a kill may leave it
    log.write_text(done)
    check("kinetics_small")
    after = log.read_text()
    whole = done[:done.rindex("\n") + 1]
    assert after.startswith(whole) and after.count('"content"') >= 5
    lines = [line for line in after.splitlines() if line.startswith("{") and line.endswith("}")]
    assert len(lines) == 5 and len({line.split('"path": "')[1].split('"')[0] for line in lines}) == 5


def test_a_file_that_was_fetched_again_is_looked_at_again(built):
    path = built / "v/train/air_drumming/ghi_000000_000010.mp4"
    good = path.read_bytes()
    path.write_bytes(good[:700])
    with pytest.raises(StudyError): audit.look(str(path), "decord")
    assert "ghi" in str(check("kinetics_small")[0]["path"].tolist())
    path.write_bytes(good)
    build("kinetics_small", built / "a", videos=built / "v")
    table, _, m = check("kinetics_small")
    assert "ghi_000000_000010" not in table["video_id"].tolist() and len(m) == 5
