"""From official layouts on a disk to a manifest that trains, on miniature copies."""
import json
import data_layouts as layouts
import numpy as np
import pytest
from data_layouts import TURNS, write
from data_videos import number
from video_study.core import StudyError, root
from video_study.data import annotations
from video_study.data.build import build
from video_study.data.catalog import card, dataset, read_card
from video_study.data.clips import ClipDataset, make_batch


@pytest.fixture()
def project(tmp_path, monkeypatch):
    for name in ("ROOT", "DATA", "OUTPUTS"): monkeypatch.delenv(f"VIDEO_STUDY_{name}", raising=False)
    monkeypatch.setenv("VIDEO_STUDY_ROOT", str(layouts.project(tmp_path / "project")))
    return tmp_path


def made(name, folder, **options):
    return build(name, folder / "a", **({"videos": folder / "v"} | options))


def table(m): return [(r["video_id"], m.classes[r["label"]], r["split"]) for r in map(m.row, range(len(m)))]


def test_kinetics(project):
    m, told = made("kinetics_small", layouts.kinetics(project))
    assert m.classes == ("air drumming", "eating cake")
    assert table(m) == [("abc_000005_000015", "eating cake", "train"), ("def_000000_000010", "eating cake", "train"), ("ghi_000000_000010", "air drumming", "train"),
                        ("jkl_000000_000010", "eating cake", "val"), ("mno_000003_000013", "air drumming", "val")]
    assert m.problems.values.tolist() == [["gone_000000_000010", "train", "missing: no file is called gone_000000_000010"]]
    assert m.split("train").coverage == (3, 4) and m.split("val").coverage == (2, 2)
    text = "\n".join(told)
    assert "5 of 6 listed videos are here" in text and "1 files are named by no annotation and are left alone: 'val/air_drumming/unnamed.mp4'" in text
    assert "A table prints 4 train videos; here are 3 (75.0 %)" in text and "prints 1k val videos; here are 2 (0.2 %)" in text
    assert dataset("kinetics_small").hash == m.hash


def test_the_order_of_classes_is_the_official_one(project):
    m, _ = made("moments_small", layouts.moments(project))
    assert m.classes == ("applauding", "barking")
    assert {r["path"]: m.classes[r["label"]] for r in map(m.row, range(4))}["validation/applauding/dog_1.mp4"] == "applauding"  # the name is there twice


def test_something_videos_and_frames_are_the_same(project):
    folder = layouts.extracted(project)
    videos, _ = made("something_small", folder)
    a = make_batch(ClipDataset(videos.split("val"), 4, 32, resize=None), 0, np.arange(3))
    frames, _ = made("something_small", folder, videos=None, frames=folder / "f")
    b = make_batch(ClipDataset(frames.split("val"), 4, 32, resize=None, preload="never"), 0, np.arange(3))
    assert frames.row(0)["fps"] == 12 and frames.row(0)["num_frames"] == 12
    assert a.labels.tolist() == b.labels.tolist() and np.abs(a.clips.numpy().astype(int) - b.clips.numpy()).mean() < 4


def test_mirror_images_by_number_become_names(project):
    m, _ = made("something_small", layouts.something(project))
    assert m.card.flip == {TURNS[0]: TURNS[1], TURNS[1]: TURNS[0]}


def test_a_class_that_lost_its_mirror_image_is_not_flipped(project):
    write(project / "classes.txt", TURNS[1])
    m, _ = made("mini_something_small", layouts.something(project), classes=project / "classes.txt")
    assert m.classes == (TURNS[1],) and len(m) == 2 and m.card.flip == {TURNS[1]: None}
    ds = ClipDataset(m.split("train"), 4, 32, train=True, resize=None)
    assert ds.mirror.tolist() == [-1]
    clips = [make_batch(ds, epoch, np.array([0])).clips[0] for epoch in range(8)]
    assert all(number(np.kron(c[0].numpy(), np.ones((1, 1, 1), np.uint8))) is not None for c in clips)


def test_half_of_the_classes_by_seed(project):
    layouts.something(project)
    names = {made("mini_something_small", project, seed=s)[0].classes for s in range(6)}
    assert len(names) > 1 and all(len(n) == 1 for n in names)
    assert made("mini_something_small", project, seed=3)[0].name == "mini_something_small_seed3"


@pytest.mark.parametrize("name, layout, counts", [("ucf_small", layouts.ucf101, (4, 2)), ("hmdb_small", layouts.hmdb51, (2, 2))])
def test_splits_of_ucf101_and_hmdb51(project, name, layout, counts):
    m, _ = made(name, layout(project))
    assert m.name == f"{name}_1" and tuple((m.column("split") == s).sum() for s in ("train", "test")) == counts
    assert not m.column("seek_exact").any()  # not proven yet
    clips = make_batch(ClipDataset(m.split("train"), 4, 32, resize=None, preload="never"), 0, np.arange(2)).clips
    assert clips.shape == (2, 4, 32, 32, 3)


def test_another_fold_is_another_dataset(project):
    layouts.ucf101(project)
    one, two = made("ucf_small", project)[0], made("ucf_small", project, fold=2)[0]
    assert {one.name, two.name} == {"ucf_small_1", "ucf_small_2"} and one.hash != two.hash
    with pytest.raises(StudyError, match="has 3 official divisions; fold 4"): made("ucf_small", project, fold=4)


def test_charades_has_several_labels(project):
    m, _ = made("charades_small", layouts.charades(project))
    assert m.targets(range(4)).tolist() == [[1, 1], [0, 0], [1, 0], [0, 1]]
    assert m.card.task == "multilabel" and m.card.stride == 2


def test_ava_has_key_frames_boxes_and_proposals(project):
    m, _ = made("ava_small", layouts.ava(project), detections=project / "found.csv", begins=900)
    rows = [m.row(k) for k in range(len(m))]
    assert [(r["video_id"], r["key"], r["path"]) for r in rows] == [("film@0902", 50, "film.mkv"), ("movie@0902", 50, "movie.mkv"), ("movie@0903", 75, "movie.mkv")]
    assert json.loads(rows[0]["boxes"]) == [[0.1, 0.2, 0.5, 0.9, [0, 1]], [0.6, 0.1, 0.9, 0.8, [0]]]
    assert json.loads(rows[1]["proposals"]) == [[0.1, 0.2, 0.5, 0.9, 0.95]]
    assert sorted(m.problems.error) == ["box (0.6, 0.1, 1.9, 0.8) is not inside the frame", "the key frame lies outside the file; see --begins"]


def test_lists_of_other_projects(project):
    folder = layouts.extracted(project, "img_{:05d}.jpg")
    write(folder / "names.txt", "push", "close")
    write(folder / "train.txt", "1 1 12 0", "2 4 9 1"); write(folder / "val.txt", "4 1 12 0", "5 1 12 1")
    m, _ = build("mine", frames=folder / "f", lists={"train": folder / "train.txt", "val": folder / "val.txt"}, class_names=folder / "names.txt")
    assert [(m.row(k)["num_frames"], m.row(k)["first"]) for k in range(2)] == [(12, 0), (6, 3)]
    clips = make_batch(ClipDataset(m.split("train"), 2, 48, resize=None, preload="never"), 0, np.arange(2)).clips
    stored = make_batch(ClipDataset(m.split("train"), 2, 48, resize=None, preload="always"), 0, np.arange(2)).clips
    whole = read_frames(folder / "f" / "2", [3 + 1, 3 + 4])
    assert (clips[1].numpy() == whole[:, :, 8:56]).all() and (stored == clips).all()
    write(folder / "train2.csv", "1.mp4 0", "2.mp4 1"); write(folder / "val2.csv", "4.mp4 0", "5.mp4 7")
    with pytest.raises(StudyError, match="class number 7, but 2 classes are named"):
        build("mine", videos=folder / "v", lists={"train": folder / "train2.csv", "val": folder / "val2.csv"}, class_names=folder / "names.txt")


def read_frames(path, idx):
    from video_study.data.decode import read
    return read(path, idx)


BAD = {
    "another dataset": (lambda f: (layouts.something(f), None), "kinetics_small", "has not one train list|is no Kinetics file"),
    "another version": (lambda f: (layouts.kinetics(f), write(f / "a/val.csv", "label,youtube_id,time_start,time_end,split", "eating pie,jkl,0,10,val")), "kinetics_small",
                        "name 3 classes, kinetics_small has 2; they belong to another dataset or version"),
    "a label that is not listed": (lambda f: (layouts.moments(f), write(f / "a/validationSet.csv", "x/dog_2.mp4,howling,3,0")), "moments_small", "the label 'howling' is not in the list of classes"),
    "labels in another order": (lambda f: (layouts.something(f), write(f / "a/labels.json", json.dumps({c: str(k) for k, c in enumerate(TURNS[::-1])}))), "something_small", "which their names deny"),
    "no videos of it": (lambda f: (layouts.moments(f), layouts.clip(f / "v2/other.mp4"), __import__("shutil").rmtree(f / "v"), (f / "v2").rename(f / "v")), "moments_small", "none of the 4 videos"),
    "a video twice": (lambda f: (layouts.moments(f), write(f / "a/validationSet.csv", "barking/dog_1.mp4,barking,3,0")), "moments_small", "the video 'barking/dog_1' is listed more than once"),
    "a broken AVA line": (lambda f: (layouts.ava(f), write(f / "a/ava_val_v2.1.csv", "movie,0902,0.1,0.2,x,0.9,17,0")), "ava_small", "line 1 has no number as x2"),
    "an action that is not in the map": (lambda f: (layouts.ava(f), write(f / "a/ava_val_v2.1.csv", "movie,0902,0.1,0.2,0.5,0.9,99,0")), "ava_small", "unknown action in ava_val_v2.1.csv '99'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_annotations_are_refused_in_one_line(project, case):
    spoil, name, says = BAD[case]
    spoil(project)
    with pytest.raises(StudyError, match=says): made(name, project)
    assert not list((project / "project/data_manifests").glob("local/*"))


JUNK = {"nothing": b"", "no text": bytes(range(256)), "another encoding": "caf\u00e9,1,2\n".encode("latin1"), "zeros": b"\0" * 50, "words": b"one two three\nfour\n", "numbers": b"1\n2\n",
        "a JSON list": b'["a", "b"]', "a JSON object": b'{"a": "b"}', "JSON of nothing": b"null", "lists in a list": b"[[1, 2], [3, 4]]", "another CSV file": b"a,b,c,d,e\n1,2,3,4,5\n"}


@pytest.mark.parametrize("kind", annotations.FORMATS)
def test_whatever_stands_in_an_annotation_file_it_is_read_or_refused(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(layouts, "clip", lambda *a, **k: None)
    getattr(layouts, kind)(tmp_path)
    refused = 0
    for path in sorted(p for p in (tmp_path / "a").iterdir()):
        good = path.read_bytes()
        *lines, last = good.decode().rstrip("\n").split("\n")
        fields = last.split(",")
        spoilt = ["\n".join([*lines, ",".join([*fields[:k], v, *fields[k + 1:]])]).encode() for k in range(len(fields)) for v in ("", "x", "-1", "1e400", "nan")]
        for data in [*JUNK.values(), good[:len(good) * 2 // 3], *spoilt]:
            path.write_bytes(data)
            try: annotations.read_annotations(kind, tmp_path / "a")
            except StudyError: refused += 1
        path.write_bytes(good)
    assert refused > 10 and len(annotations.read_annotations(kind, tmp_path / "a").rows)


def test_a_damaged_video_is_a_line_not_a_crash(project):
    layouts.kinetics(project)
    (project / "v/train/eating_cake/def.mkv").write_bytes(b"\0" * 4000)
    m, told = made("kinetics_small", project)
    assert len(m) == 4 and any("cannot be opened" in line for line in told)


def test_committed_cards_can_be_read():
    for path in sorted((root() / "data_manifests").glob("*.yaml")):
        told = read_card(path)
        assert told.title and told.licence != "unknown" and told.source and told.size >= 2, path.name
        assert told.half_of is None or card(told.half_of).size > told.size
