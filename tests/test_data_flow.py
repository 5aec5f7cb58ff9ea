"""Two streams, end to end: flow computed once, two trainings, one averaged answer."""
import shutil

import numpy as np
import pyarrow as pa
import pytest
from video_study.core import root
from video_study.data import embedded
from video_study.data.catalog import card, dataset
from video_study.data.flow import make_flow, two_streams
from video_study.data.manifest import Manifest
from video_study.training.experiment import experiment
from video_study.training.loop import fit
from video_study.training.metrics import metrics


def test_two_streams_are_trained_and_averaged(tmp_path, monkeypatch):
    pytest.importorskip("cv2")
    for name in ("DATA", "OUTPUTS"): monkeypatch.setenv(f"VIDEO_STUDY_{name}", str(tmp_path / name))
    project = tmp_path / "project"
    (project / "data_manifests").mkdir(parents=True)
    (project / "settings.ini").write_text("lib_name = video_study")
    folder = tmp_path / "DATA" / "motion"
    embedded.render("motion", folder, 2)
    Manifest(pa.Table.from_pylist(embedded.rows("motion", 2)), card("motion").classes, "motion").write(folder / "motion.csv")
    shutil.copy(root() / "data_manifests" / "motion.yaml", folder)
    monkeypatch.setenv("VIDEO_STUDY_ROOT", str(project))
    make_flow(folder / "motion.csv", 32, workers=2)
    flow = dataset("motion_flow32")
    assert len(flow) == 40 and flow.card.flip == "none" and flow.card.resize == 32
    runs = [fit(experiment(model="tsn_resnet18", width=0.0625, data=d, frames=4, epochs=1, lr=0.02, warmup_epochs=0), progress=False, threads=1) for d in (str(folder / "motion.csv"), "motion_flow32")]
    rgb, other = (dict(np.load(r.folder / "scores.npz")) for r in runs)
    scores, labels = two_streams(rgb, other)
    assert scores.shape == (20, 10) and np.allclose(scores.sum(1), 1) and (labels == rgb["labels"]).all()
    assert metrics(scores, labels)["videos"] == 20
    softmax = lambda s: np.exp(s) / np.exp(s).sum(1, keepdims=True)
    assert np.allclose(scores, (softmax(rgb["clip"].astype(float)) + softmax(other["clip"].astype(float))) / 2)
