"""`study data cache`: the frames of the videos, made once, by one process at a time, over several sittings."""
import os
import shutil
import signal
import subprocess
import sys
import time
import data_layouts as layouts
import numpy as np
import pytest
from video_study.core import StudyError
from video_study.data import cache, flow, packs as pack_files
from video_study.data.build import build
from video_study.data.cache import make_cache
from video_study.data.catalog import dataset
from video_study.data.clips import ClipDataset, make_batch


@pytest.fixture()
def built(tmp_path, monkeypatch):
    for name in ("ROOT", "DATA", "OUTPUTS"): monkeypatch.delenv(f"VIDEO_STUDY_{name}", raising=False)
    monkeypatch.setenv("VIDEO_STUDY_ROOT", str(layouts.project(tmp_path / "project")))
    layouts.kinetics(tmp_path)
    build("kinetics_small", tmp_path / "a", videos=tmp_path / "v")
    return tmp_path


def clips(name, **options): return make_batch(ClipDataset(dataset(name).split("train"), 4, 32, **{"train": True, "resize": None, "preload": "never"} | options), 0, np.arange(3)).clips.numpy()


def packs(built): return {p: p.stat().st_mtime_ns for p in sorted((built / "project/outputs/data").rglob("*.pack"))}


def test_raw_frames_are_the_frames_of_the_videos(built):
    make_cache("kinetics_small", 48)
    a, b = dataset("kinetics_small"), dataset("kinetics_small_raw48")
    assert a.hash != b.hash and a.classes == b.classes and b.card.title.endswith("(frames with a short side of 48)")
    for k in range(len(a)): assert (cache.read(a.file(k), range(12), seek_exact=False) == cache.read(b.file(k), range(12))).all()


def test_jpeg_frames_are_close(built):
    lines = make_cache("kinetics_small", 48, quality=90)
    assert lines[0].startswith("kinetics_small_cache48: 5 of 5 videos")
    a, b = dataset("kinetics_small"), dataset("kinetics_small_cache48")
    for k in range(len(a)): assert np.abs(cache.read(a.file(k), [3], seek_exact=False).astype(int) - cache.read(b.file(k), [3])).mean() < 4
    assert clips("kinetics_small_cache48").shape == (3, 4, 32, 32, 3)


def test_clips_of_a_raw_cache_are_the_clips_of_the_videos(built):
    make_cache("kinetics_small", 48)
    for options in ({}, dict(crop="jitter"), dict(train=False, clips=2), dict(train=False, crops=3, clips=2)):
        assert (clips("kinetics_small", resize=48, **options) == clips("kinetics_small_raw48", resize=48, **options)).all()


def test_a_disk_that_is_too_small_is_noticed_before_the_first_video(built, monkeypatch):
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    with pytest.raises(StudyError, match="the raw frames of 'kinetics_small' with a short side of 48 take 0.0 GB.*--quality 90"): make_cache("kinetics_small", 48)
    assert not packs(built)


def test_a_pack_of_another_size_is_refused(built):
    make_cache("kinetics_small", 48)
    m = dataset("kinetics_small_raw48")
    pack_files.write_pack(m.file(0), np.zeros((12, 40, 60, 3), np.uint8), 0)
    with pytest.raises(StudyError, match="has frames of 40x60 pixels instead of 48x"): clips("kinetics_small_raw48")


def test_both_jpeg_decoders_give_the_same_pixels():
    pytest.importorskip("cv2")
    frame = np.random.RandomState(0).randint(0, 256, (41, 67, 3)).astype(np.uint8)
    data = pack_files._encode(frame, 90)
    assert (pack_files._by_opencv(data) == pack_files._by_pillow(data)).all()


def test_flow_lies_beside_the_frames(built):
    pytest.importorskip("cv2")
    lines = flow.make_flow("kinetics_small", 48)
    assert lines[0].startswith("kinetics_small_flow48: the flow of 5 of 5 videos")
    m, videos = dataset("kinetics_small_flow48"), dataset("kinetics_small")
    stored = cache.read(m.file(1), range(12))
    assert (stored == flow.quantise(flow.farneback(cache.read(videos.file(1), range(12), 48, seek_exact=False)))).all()
    assert clips("kinetics_small_flow48").shape == (3, 4, 32, 32, 3) and m.card.flip == "none"
    before = packs(built)
    flow.make_flow("kinetics_small", 48)
    assert packs(built) == before


def test_the_flow_of_a_video_that_was_fetched_again_is_made_again(built):
    pytest.importorskip("cv2")
    flow.make_flow("kinetics_small", 48)
    m, before = dataset("kinetics_small"), packs(built)
    later = time.time_ns() + 10**9
    os.utime(m.file(1), ns=(later, later))
    flow.make_flow("kinetics_small", 48)
    after = packs(built)
    assert [p.name for p in before if after[p] != before[p]] == [os.path.basename(m.file(1)) + ".pack"]


def test_a_cache_of_another_resolution_is_refused(built):
    make_cache("kinetics_small", 32)
    with pytest.raises(StudyError, match="holds frames with a short side of 32 pixels, 48 are asked for; make another with --short-side 48"): clips("kinetics_small_raw32", resize=48)


def test_a_second_run_makes_nothing_again_and_repairs_what_is_damaged(built):
    make_cache("kinetics_small", 48)
    before = packs(built)
    make_cache("kinetics_small", 48)
    assert packs(built) == before and len(before) == 5
    first = next(iter(before))
    first.write_bytes(first.read_bytes()[:-5])
    with pytest.raises(StudyError, match="damaged"): cache.read(first, [0])
    make_cache("kinetics_small", 48)
    after = packs(built)
    assert [p for p in before if after[p] != before[p]] == [first]


def test_a_video_that_cannot_be_read_is_left_out(built):
    m = dataset("kinetics_small")
    with open(m.file(0), "r+b") as f: f.truncate(900)
    lines = make_cache("kinetics_small", 48)
    assert lines[0].startswith("kinetics_small_raw48: 4 of 5 videos") and any(line.startswith("not in it: ") for line in lines)
    assert dataset("kinetics_small_raw48").coverage == (4, 6)


SLOW = """
import sys, time
from video_study.data import cache
true = cache._make_pack
def slow(*args): time.sleep(0.5); true(*args)
cache._make_pack = slow
cache.make_cache("kinetics_small", 48, workers=1)
"""


def test_two_processes_and_a_kill(built):
    process = subprocess.Popen([sys.executable, "-c", SLOW], env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True)
    try:
        end = time.monotonic() + 60
        while not packs(built) and time.monotonic() < end and process.poll() is None: time.sleep(0.02)
        with pytest.raises(StudyError, match="another process is writing the cache"): make_cache("kinetics_small", 48)
    finally: os.killpg(process.pid, signal.SIGKILL); process.wait(30)
    time.sleep(0.2)
    before = packs(built)
    assert 1 <= len(before) < 5
    make_cache("kinetics_small", 48)
    after = packs(built)
    assert len(after) == 5 and all(after[p] == t for p, t in before.items())
