"""The embedded datasets as files: made by processes, killed, read by the decoder, compared with the committed manifests."""
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
import numpy as np
import pandas as pd
import pytest
from video_study.core import root
from video_study.data import embedded
from video_study.data.catalog import card
from video_study.data.decode import read
from video_study.data.probing import probe
from video_study.data.manifest import Manifest

NAMES = list(embedded.DRAW)
ALL = np.arange(embedded.FRAMES)


def committed(name): return Manifest.read(root() / "data_manifests" / f"{name}.csv", classes=card(name).classes)


def videos(folder): return sorted(p for p in folder.rglob("*.mp4"))


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    "The first group of each split of both datasets."
    folder = tmp_path_factory.mktemp("embedded")
    for name in NAMES: embedded.render(name, folder / name, limit=1)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_the_committed_manifest_is_what_is_drawn(name):
    drawn, listed = pd.DataFrame(embedded.rows(name)), committed(name).to_pandas().drop(columns="class")
    pd.testing.assert_frame_equal(drawn[listed.columns], listed, check_dtype=False)


@pytest.mark.parametrize("name", NAMES)
def test_card_and_manifest_agree(name):
    m, told = committed(name), card(name)
    assert m.table["split"].to_pandas().value_counts().to_dict() == dict(told.splits)
    for split in told.splits: assert set(np.bincount(m.split(split).column("label"))) == {told.splits[split] // len(told.classes)}


@pytest.mark.parametrize("name", NAMES)
def test_groups_are_complete_and_do_not_straddle_splits(name):
    table = committed(name).to_pandas()
    assert (table.groupby("group")["label"].apply(sorted).map(tuple) == tuple(range(10))).all()
    assert (table.groupby("group")["split"].nunique() == 1).all()


@pytest.mark.parametrize("name", NAMES)
def test_no_video_is_there_twice(name):
    assert committed(name).to_pandas()["content"].is_unique


@pytest.mark.parametrize("name", NAMES)
def test_files_are_as_listed(rendered, name):
    table = committed(name).to_pandas().set_index("path")
    assert len(videos(rendered / name)) == 20
    for file in videos(rendered / name):
        row = table.loc[file.relative_to(rendered / name).as_posix()]
        assert probe(file) == (row["num_frames"], row["fps"], row["height"], row["width"], row["seek_exact"])


@pytest.mark.parametrize("decoder", ["decord", "pyav"])
def test_twins_are_reversals_to_the_last_bit(rendered, decoder):
    names = card("motion").classes
    for split in embedded.GROUPS:
        film = {c: read(rendered / "motion" / split / c / "000.mp4", ALL, decoder=decoder) for c in names}
        for one, other in zip(names[:8:2], names[1:8:2]): assert np.array_equal(film[one], film[other][::-1])
        assert len({f.tobytes() for c in ("blink_slow", "blink_fast") for f in film[c]}) == 2


def test_no_twin_is_the_same_forwards_and_backwards(rendered):
    for split in embedded.GROUPS:
        for c in card("motion").classes[:8]:
            film = read(rendered / "motion" / split / c / "000.mp4", ALL)
            assert np.abs(film.astype(int) - film[::-1]).max() > 50


def test_a_frame_has_the_same_pixels_wherever_it_stands(tmp_path):
    frames = embedded.group("scene", "val", 0)["dots"][[0, 8, 16, 24, 32]]
    order = np.random.default_rng(0).integers(0, 5, 40)
    embedded.write_video(tmp_path / "shuffled.mp4", frames[order])
    decoded = read(tmp_path / "shuffled.mp4", np.arange(40))
    for k in range(5): assert len({f.tobytes() for f in decoded[order == k]}) == 1


def test_training_videos_are_twins_as_well(tmp_path):
    "The multisets of the sampled frames of the training split, as drawn."
    clips = defaultdict(list)
    for k in range(embedded.GROUPS["train"]):
        for name, film in embedded.group("motion", "train", k).items():
            for T in (4, 8, 16, 32):
                frames = film[embedded.uniform_indices(embedded.FRAMES, T)]
                clips[T, tuple(sorted(f.tobytes() for f in frames))].append(name)
    pairs = {frozenset(card("motion").classes[k:k + 2]) for k in range(0, 10, 2)}
    assert all(len(names) == 2 and frozenset(names) in pairs for names in clips.values())


RENDER = "import sys; from video_study.data.embedded import render; render(sys.argv[1], sys.argv[2], limit=int(sys.argv[3]))"


def start(*args): return subprocess.Popen([sys.executable, "-c", RENDER, *map(str, args)], env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_another_process_renders_the_same_files(rendered, tmp_path):
    assert start("motion", tmp_path, 1).wait() == 0
    for file in videos(tmp_path): assert file.read_bytes() == (rendered / "motion" / file.relative_to(tmp_path)).read_bytes()


def test_a_killed_rendering_leaves_whole_files_and_is_finished_later(rendered, tmp_path):
    process = start("motion", tmp_path, 4)
    while not len(videos(tmp_path)) >= 5 and process.poll() is None: time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {p: p.stat().st_mtime_ns for p in videos(tmp_path) if not p.name.startswith(".")}
    assert before
    for file in before: assert read(file, ALL).shape == (33, 64, 64, 3)
    embedded.render("motion", tmp_path, limit=1)
    assert {p: p.stat().st_mtime_ns for p in before} == before
    for file in videos(rendered / "motion"): assert (tmp_path / file.relative_to(rendered / "motion")).read_bytes() == file.read_bytes()


def test_no_space_left_keeps_what_was_there(tmp_path, monkeypatch):
    def full(*args, **kwargs): raise OSError(28, "No space left on device")
    path, frames = tmp_path / "grow.mp4", embedded.group("motion", "val", 0)["grow"]
    embedded.write_video(path, frames)
    before = path.read_bytes()
    with monkeypatch.context() as m:
        m.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"): embedded.write_video(path, frames[::-1])
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["grow.mp4"]
