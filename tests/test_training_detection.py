"""People in key frames and several classes in a video: trained, killed, continued and judged by the loop that does the rest."""
import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from test_training_resume import assert_same, start  # noqa: F401  (a fixture)
from video_study.core import StudyError, root
from video_study.data import staged
from video_study.data.catalog import card, dataset
from video_study.data.manifest import Manifest
from video_study.training.detection import detection_metrics
from video_study.training.experiment import experiment, resolve
from video_study.training.loop import fit
from video_study.training.metrics import metrics


def few(name, folder, videos):
    """A few videos of an embedded dataset, as a manifest file with its card."""
    staged.render(name, folder, videos)
    Manifest(pa.Table.from_pylist(staged.rows(name, videos)), card(name).classes, name).write(folder / f"{name}.csv")
    shutil.copy(root() / "data_manifests" / f"{name}.yaml", folder / f"{name}.yaml")
    return str(folder / f"{name}.csv")


@pytest.fixture(scope="module")
def ava(tmp_path_factory):
    """Six updates of a narrow network on crops of 32 pixels, which leave some people out."""
    data = few("ava", tmp_path_factory.mktemp("ava"), 12)
    return resolve(experiment(model="slow_resnet50", width=0.0625, data=data, frames=4, stride=4, image_size=32, resize=40, crop="random", loss="sigmoid", epochs=2, batch_size=4, lr=0.02, warmup_epochs=0))


@pytest.fixture(scope="module")
def reference(start, ava, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("reference")
    process = start(ava, folder, every=0).end()
    assert process.updates() == list(range(6))
    return folder, process


def test_people_are_scored_and_counted(ava, reference):
    result = fit(ava, reference[0], progress=False)
    told, val = result.metrics["clip"], dataset(ava.data).split("val")
    assert told["videos"] == 12 and 0 < told["mAP"] < 1 and 0.8 < told["precision"] <= 1 and 0.7 < told["recall"] <= 1
    arrays = dict(np.load(reference[0] / "scores.npz"))
    assert detection_metrics(arrays, "clip") == told and list(arrays["video_ids"]) == val.table["video_id"].to_pylist()
    assert arrays["boxes"].shape == (len(arrays["clip"]), 4) and set(arrays["of"]) <= set(range(12)) and (arrays["person"] > 0.8).all()
    assert "mAP" in repr(result)


def test_killed_and_continued_to_the_same_bits(start, ava, reference, tmp_path):  # noqa: F811
    undisturbed = reference[1].checkpoints()
    for at, workers in (3, 0), (4, 2):
        process = start(ava, tmp_path, workers=workers, every=0)
        process.read(lambda lines: len(process.events()) >= at).kill()
        assert [step for step, digest in process.checkpoints().items() if undisturbed[step] != digest] == []
    assert start(ava, tmp_path, every=0).end().updates()[:1] != [0]
    assert_same(tmp_path, reference[0])


def test_cut_on_the_device_of_the_model(ava, reference, tmp_path):
    """On a CPU both ways use the same whole numbers, so the run is the same to the bit."""
    fit(ava, tmp_path, progress=False, augment="device", device="cpu", threads=1)
    assert_same(tmp_path, reference[0])


def test_averaged_weights_and_new_statistics(ava, tmp_path):
    late = replace(ava, recipe=replace(ava.recipe, epochs=1, ema=0.9, calibrate=2))
    assert fit(late, tmp_path, progress=False, threads=1).metrics["clip"]["videos"] == 12


@pytest.mark.parametrize("changes, says", [
    (dict(evaluation="3x10"), "is judged at key frames, each in the one clip around it; use evaluation=\"clip\" instead of '3x10'"),
    (dict(loss="cross_entropy"), "have several classes, which the loss 'cross_entropy' cannot learn"),
    (dict(sampling="uniform", stride=None), "a clip lies around its key frame: one clip, dense sampling"),
])
def test_what_cannot_be_with_key_frames(ava, tmp_path, changes, says):
    values = dict(model="slow_resnet50", width=0.0625, data=ava.data, frames=4, stride=4, image_size=32, loss="sigmoid") | changes
    with pytest.raises(StudyError, match=says): fit(experiment(**values), tmp_path, progress=False)
    assert not (tmp_path / "result.json").exists()


def test_a_box_that_cannot_be_stops_before_any_work(ava, tmp_path):
    m = dataset(ava.data)
    boxes = ["[[0.5, 0.5, 1.5, 0.9, [0]]]", *m.table["boxes"].to_pylist()[1:]]
    bad = Manifest(m.table.set_column(m.table.column_names.index("boxes"), "boxes", pa.array(boxes)), m.classes, "ava")
    bad.write(tmp_path / "ava.csv")
    shutil.copy(root() / "data_manifests" / "ava.yaml", tmp_path)
    for split in "train", "val": shutil.copytree(m.root / split, tmp_path / split)
    with pytest.raises(StudyError, match="boxes of 'train/000' lie outside the frame"):
        fit(replace(ava, data=str(tmp_path / "ava.csv"), manifest_hash=None), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_only_the_classes_that_count(ava, reference, tmp_path):
    """A card may name the classes that evaluation looks at, as AVA counts 60 of 80."""
    arrays = dict(np.load(reference[0] / "scores.npz"))
    each = [detection_metrics(arrays, "clip", [c])["mAP"] for c in range(4)]
    assert np.isclose(np.mean(each[:2]), detection_metrics(arrays, "clip", [0, 1])["mAP"]) and len(set(each)) == 4


def test_several_classes_take_the_maximum_of_the_clips(tmp_path):
    """Charades: a sigmoid for each class, the maximum over clips spread over the long video, mean average precision."""
    data = few("charades", tmp_path / "data", 12)
    exp = resolve(experiment(model="tam_resnet18", width=0.0625, data=data, frames=8, loss="sigmoid", epochs=2, batch_size=6, lr=0.02, warmup_epochs=0, evaluation=("clip", "max")))
    assert (exp.sampling, exp.stride) == ("dense", 2)
    result = fit(exp, tmp_path / "run", progress=False, threads=1)
    scores = result.scores("max")
    assert scores["views"].shape == (12, 10, 6)
    assert np.allclose(scores["scores"], torch.as_tensor(scores["views"]).sigmoid().amax(1))
    assert metrics(scores["scores"], scores["labels"]) == result.metrics["max"] and scores["labels"].sum(1).max() > 1
    with pytest.raises(StudyError, match="use loss=\"sigmoid\""): fit(replace(exp, recipe=replace(exp.recipe, loss="cross_entropy")), tmp_path / "other", progress=False)


def test_mirrored_clips_teach_the_mirrored_classes(tmp_path):
    """With the rule of the card a mirrored clip of something that moves right says that it moves left."""
    from video_study.data.clips import ClipDataset, plan, sample
    m = dataset(few("charades", tmp_path, 4)).split("train")
    ds = ClipDataset(m, 4, 32, "dense", 2, train=True)
    for i in range(4):
        plain = m.targets([i])[0]
        for epoch in range(6):
            says = sample(ds, epoch, i)[1]
            assert (says == (plain[[1, 0, 2, 3, 4, 5]] if plan(ds, epoch, i).mirrored else plain)).all()
