"""Batches do not depend on how they are loaded, and loading does not hang."""
import json
import os
import signal
import shutil
import subprocess
import sys
import textwrap
import time
import numpy as np
import pytest
import torch
from data_videos import number, numbered, render
from video_study.core import StudyError
from video_study.data import clips, decode
from video_study.data.clips import ClipDataset, loader
from video_study.data.manifest import Manifest, from_folder

FRAMES = 40


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    "Twelve videos of numbered frames in two classes, some of which must be decoded from the start."
    folder = tmp_path_factory.mktemp("videos")
    for k in range(6):
        for name in ("a", "b"):
            (folder / name).mkdir(exist_ok=True)
            render(folder / name / f"{k}.mp4", FRAMES + k, codec="libx264" if k % 2 else "mpeg4", draw=numbered)
    return from_folder(folder, val_share=0.34)


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("VIDEO_STUDY_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(clips, "TIMEOUT", 60)


def training(videos, **changes): return ClipDataset(videos.split("train"), **{**dict(frames=8, size=48, train=True, seed=3, preload="never"), **changes})


def same(a, b): return len(a) == len(b) and all(torch.equal(x, y) for one, two in zip(a, b) for x, y in zip(one, two))


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_do_not_depend_on_the_number_of_workers(videos, workers):
    ds = training(videos)
    alone = list(loader(ds, 3, epoch=2, shuffle_seed=5))
    assert same(alone, list(loader(ds, 3, epoch=2, shuffle_seed=5, num_workers=workers)))
    assert same(alone[1:], list(loader(ds, 3, epoch=2, shuffle_seed=5, num_workers=workers, start_batch=1)))


def test_kept_frames_are_the_decoded_ones(videos):
    assert same(list(loader(training(videos, preload="always"), 4)), list(loader(training(videos), 4)))
    judged = [ClipDataset(videos.split("val"), 8, 48, clips=2, crops=3, preload=p) for p in ("always", "never")]
    assert same(*(list(loader(ds, 2)) for ds in judged))


@pytest.mark.parametrize("sampling, stride", [("uniform", 1), ("dense", 3)])
def test_clips_hold_the_frames_that_were_sampled(videos, sampling, stride):
    "Through manifest, decoder and loader, in files where jumping is exact and in others."
    ds = ClipDataset(videos.split("val"), 8, 96, sampling=sampling, stride=stride, clips=3, crops=3, resize=None, preload="never")
    for batch in loader(ds, 2):
        for views, i in zip(batch.clips, batch.index.tolist()):
            n = int(ds.columns["num_frames"][i])
            for k in range(3):
                starts = [(2 * j + 1) * n // 16 - 1 + k for j in range(8)] if sampling == "uniform" else [(n - 24) * k // 2 + 3 * j for j in range(8)]
                # the three crops of 96 columns of 128 together show all twelve fields
                left, right = views[3 * k], views[3 * k + 2]
                whole = torch.cat([left, right[:, :, 64:]], dim=2).numpy()
                assert [number(f) for f in whole] == starts


def test_a_sample_does_not_depend_on_the_other_videos(videos):
    whole = training(videos)
    alone = ClipDataset(videos.split("train").take([4]), 8, 48, train=True, seed=3, preload="never")
    for epoch in range(3):
        a, b = clips.sample(whole, epoch, 4), clips.sample(alone, epoch, 0)
        assert torch.equal(a[0], b[0]) and a[1] == b[1]


def test_seed_and_epoch_matter(videos):
    a, b, c = training(videos), training(videos, seed=4), training(videos)
    assert not torch.equal(clips.sample(a, 0, 0)[0], clips.sample(b, 0, 0)[0])
    assert not torch.equal(clips.sample(a, 0, 0)[0], clips.sample(a, 1, 0)[0])
    assert torch.equal(clips.sample(a, 1, 0)[0], clips.sample(c, 1, 0)[0])


def test_global_generators_are_left_alone(videos):
    torch.manual_seed(0); np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1]
    list(loader(training(videos), 3, shuffle_seed=0)); list(loader(ClipDataset(videos.split("val"), 64, 48), 3))
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()


def test_skipped_batches_are_not_decoded(videos, monkeypatch):
    opened, true_read = [], clips.read
    monkeypatch.setattr(clips, "read", lambda path, *rest: opened.append(path) or true_read(path, *rest))
    ds = training(videos)
    next(iter(loader(ds, 3, start_batch=2)))
    assert len(opened) == min(3, len(ds) - 6)


def test_the_parent_opens_no_reader(videos, monkeypatch):
    parent, true_read = os.getpid(), clips.read

    def only_in_workers(path, *rest):
        assert os.getpid() != parent, "decoding in the parent"
        return true_read(path, *rest)
    monkeypatch.setattr(clips, "read", only_in_workers)
    assert len(list(loader(training(videos), 3, num_workers=2))) == 3


def test_no_deadlock_after_the_parent_has_decoded(videos):
    "A reader that lives across a fork hangs its copy; ours is gone by then."
    decode.read(videos.file(0), [0, 5])
    from_folder(videos.root)
    assert len(list(loader(training(videos), 3, num_workers=2))) == 3


def broken(videos, tmp_path):
    "A copy of the videos, one of which is cut short after the manifest was built."
    shutil.copytree(videos.root, tmp_path / "copy")
    m = Manifest(videos.table, videos.classes, "copy", tmp_path / "copy").split("train")
    with open(m.file(3), "r+b") as f: f.truncate(2000)
    return m


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_video_is_named(videos, tmp_path, workers):
    m = broken(videos, tmp_path)
    name = m.table["video_id"][3].as_py()
    with pytest.raises(StudyError, match=f"^video '{name}' of 'copy': .* build the manifest again, which leaves out") as e:
        list(loader(ClipDataset(m, 8, 48, train=True, preload="never"), 2, num_workers=workers))
    assert "Traceback" not in str(e.value)


def test_a_damaged_video_is_named_when_frames_are_kept(videos, tmp_path):
    with pytest.raises(StudyError, match=r"cannot read .*\d.mp4|\d.mp4 ends"):
        ClipDataset(broken(videos, tmp_path), 8, 48, train=True, preload="always").store


def spoiled(monkeypatch, path, how):
    "Let reading one file end its process, or never end."
    parent, true_read = os.getpid(), clips.read

    def read(file, *rest):
        if str(file) == str(path) and os.getpid() != parent: how()
        return true_read(file, *rest)
    monkeypatch.setattr(clips, "read", read)


HOW = {"crash": (lambda: os.kill(os.getpid(), signal.SIGSEGV), "its decoder crashed .SIGSEGV"), "hang": (lambda: time.sleep(600), "did not finish within 2 seconds")}


@pytest.mark.parametrize("how", HOW)
def test_a_video_that_ends_its_worker_is_named(videos, monkeypatch, how):
    monkeypatch.setattr(clips, "TIMEOUT", 2)
    ds = training(videos)
    spoiled(monkeypatch, ds.manifest.file(2), HOW[how][0])
    with pytest.raises(StudyError, match=f"^video '{ds.manifest.table['video_id'][2].as_py()}' of .*{HOW[how][1]}"): list(loader(ds, 3, num_workers=2))


@pytest.mark.parametrize("how", [*HOW, "damage"])
@pytest.mark.parametrize("train", [True, False])
def test_training_survives_a_few_bad_videos(videos, tmp_path, monkeypatch, how, train):
    "Another video takes the place in training, evaluation leaves it out, and both say so."
    monkeypatch.setattr(clips, "TIMEOUT", 2)
    monkeypatch.setenv("VIDEO_STUDY_OUTPUTS", str(tmp_path))
    m = broken(videos, tmp_path) if how == "damage" else videos.split("train")
    m.failed = {}
    make = lambda: ClipDataset(m, 8, 48, train=train, seed=3, preload="never", max_failures=0.25)
    bad = 3 if how == "damage" else 2
    if how != "damage": spoiled(monkeypatch, m.file(bad), HOW[how][0])
    a, b = (list(loader(make(), 3, epoch=1, shuffle_seed=5 if train else None, num_workers=n)) for n in (2, 1))
    assert same(a, b)
    if how == "damage": assert same(a, list(loader(make(), 3, epoch=1, shuffle_seed=5 if train else None)))
    seen = torch.cat([x.index for x in a]).tolist()
    assert sorted(seen) == [k for k in range(len(m)) if train or k != bad]
    assert m.coverage == (len(m) - 1, len(m))
    listed = json.loads((tmp_path / "unreadable" / f"{m.name}.json").read_text())
    assert list(listed) == [m.table["video_id"][bad].as_py()]
    m.failed.clear()


def test_too_many_bad_videos_stop_the_run(videos, tmp_path, monkeypatch):
    monkeypatch.setenv("VIDEO_STUDY_OUTPUTS", str(tmp_path))
    m = broken(videos, tmp_path)
    for k in 0, 5: open(m.file(k), "wb").close()
    with pytest.raises(StudyError, match=r"3 of 8 videos cannot be read, more than 25 %; the first is this: video '"):
        list(loader(ClipDataset(m, 8, 48, train=True, preload="never", max_failures=0.25), 2, num_workers=2))


STORE = """
    import sys
    from video_study.data import store
    from video_study.data.manifest import Manifest
    m, true_read = Manifest.read(sys.argv[1], root=sys.argv[2]), store.read
    def read(path, *rest):
        with open(sys.argv[3], "a") as f: f.write(f"{path}\\n")
        return true_read(path, *rest)
    store.read = read
    kept = store.open_store(m, 24)
    print(sum(int(kept[k].sum()) for k in range(len(m))))
"""


def test_several_processes_decode_once(videos, tmp_path):
    path = videos.write(tmp_path / "m.csv")
    processes = [subprocess.Popen([sys.executable, "-c", textwrap.dedent(STORE), str(path), str(videos.root), str(tmp_path / "log")], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    told = {p.communicate()[0] for p in processes}
    assert len(told) == 1 and told != {""}
    assert len((tmp_path / "log").read_text().splitlines()) == len(videos)


def test_no_space_left_for_decoded_frames(videos, tmp_path):
    path = videos.write(tmp_path / "m.csv")
    code = textwrap.dedent(STORE).replace("kept =", "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\nkept =")
    done = subprocess.run([sys.executable, "-c", code, str(path), str(videos.root), str(tmp_path / "log")], capture_output=True, text=True)
    assert "StudyError: cannot keep decoded frames" in done.stderr and "File too large; make room there" in done.stderr
    assert [p.name for p in (tmp_path / "data/.decoded").iterdir() if p.name != ".lock"] == []


def test_large_datasets_are_not_kept(videos, monkeypatch):
    from video_study.data import store
    monkeypatch.setattr(store, "LIMIT", 1000)
    assert ClipDataset(videos.split("val"), 8, 48).store is None


def test_the_card_decides_on_size_and_mirror_images(videos):
    from video_study.data.catalog import Card
    val = videos.split("val")
    val.card = Card("x", val.classes, {}, resize=None, flip={"a": "b", "b": "a"})
    ds = ClipDataset(val, 8, 48)
    assert (ds.short_side, ds.mirror.tolist()) == (None, [1, 0])
    val.card = Card("x", val.classes, {}, resize=80, flip="none")
    assert (ClipDataset(val, 8, 48).short_side, ClipDataset(val, 8, 48).mirror) == (80, None)


def test_videos_of_different_sizes_make_one_batch(tmp_path):
    for k, (h, w) in enumerate([(48, 64), (96, 128), (128, 96), (60, 60)]):
        (tmp_path / "ab"[k % 2]).mkdir(exist_ok=True)
        render(tmp_path / "ab"[k % 2] / f"{k}.mp4", 12, height=h, width=w, draw=lambda k, h, w: np.full((h, w, 3), 10 * k, np.uint8))
    m = from_folder(tmp_path)
    for crop in ("multiscale", "random", "jitter", "center"):
        (batch,) = loader(ClipDataset(m, 8, 32, train=True, crop=crop), 4)
        assert batch.clips.shape == (4, 8, 32, 32, 3)


def test_one_video_a_class_goes_all_the_way(tmp_path):
    for name in ("again", "bird", "book"):
        (tmp_path / name).mkdir()
        render(tmp_path / name / f"{name}.mkv", 30)
    m = from_folder(tmp_path)
    (train,), (val,) = (list(loader(ClipDataset(m.split(s), 8, 48, train=s == "train"), 4)) for s in ("train", "val"))
    assert train.labels.tolist() == val.labels.tolist() == [0, 1, 2]
    assert "memory, not generalisation" in m.notes[0]
