"""From run folders to committed evidence: whole files, the same bytes every time, nothing older than its data."""
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from video_study.core import StudyError, content_hash, write_json
from video_study.evidence import results
from video_study.evidence.claims import judge_measured, judge_printed, ledger
from video_study.evidence.published import PAPERS, claims, published
from video_study.evidence.results import accuracies, collect, correct_table, provenance, save_figure, save_table, sidecar
from video_study.evidence.rules import rules

ROOT = Path(__file__).resolve().parents[1]


def make_run(model, data, seed, share, frames=16, videos=60):
    """The files that a finished run leaves: right on the first `share` of the videos, give or take a few by seed."""
    experiment = dict(model=f"{model}_resnet18", data=data, frames=frames, seed=seed, image_size=48, model_options={"width": 0.125}, recipe=dict(epochs=2))
    key = content_hash(experiment)
    folder = results.outputs() / "runs" / key
    labels = np.arange(videos) % 4
    right = np.arange(videos) < share * videos + seed
    scores = np.eye(4, dtype=np.float32)[np.where(right, labels, (labels + 1) % 4)]
    write_json(folder / "result.json", dict(
        format=1, key=key, experiment=experiment, metrics=dict(clip=dict(top1=float(right.mean()), top5=1.0, mean_class_accuracy=0.5, videos=videos)),
        coverage=dict(val=[videos, videos]), cost=dict(params=10, weights=9, macs=100, conv_macs=90), environment={}, commit="abc", manifest_hash=f"hash-{data}", wall_seconds=1.0))
    np.savez(folder / "scores.npz", clip=scores, clip_views=scores[:, None], labels=labels, video_ids=np.array([f"{data}-{i:03d}" for i in range(videos)]))
    return key


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Three systems on two datasets with five seeds."""
    monkeypatch.setenv("VIDEO_STUDY_OUTPUTS", str(tmp_path))
    share = dict(tsn=dict(motion=0.4, scene=0.9), tsm=dict(motion=0.8, scene=0.9), tam=dict(motion=0.92, scene=0.9))
    for model, by_data in share.items():
        for data, s in by_data.items():
            for seed in range(5):
                make_run(model, data, seed, s)
    return tmp_path


ASKED = ("DA-23", "DA-25", "DA-28", "DA-29", "DA-30", "BL-17", "BL-23")
ROLES = dict(order="motion", appearance="scene")
SYSTEMS = ["tsn", "tsm", "tam"]


def test_the_five_papers_are_packaged_with_locators():
    for paper in PAPERS:
        table = published(paper)
        assert (table["paper"] == paper).all() and (table["locator"] != "").all() and (table["metric"] != "").all()
    assert len(claims()) == 212 and claims()["id"].is_unique


def test_from_runs_to_verdicts(study):
    runs = collect()
    table = accuracies(runs)
    assert len(runs) == 30 and len(table) == 6 and set(table["seeds"]) == {5}
    parts = judge_measured(rules(*ASKED), runs, ROLES, systems=SYSTEMS)
    verdict = {(p["claim"], p["says"]): p["verdict"] for p in parts}
    assert verdict["DA-23", "tam > tsm, 16 frames"] == "holds"
    assert verdict["DA-23", "tsm > tsn, 16 frames"] == "holds"
    assert verdict["DA-25", "tam > tsn, 16 frames"] == "inconclusive"  # the same on scene
    assert verdict["DA-28", "tam - tsn > 19 points, 16 frames"] == "holds"
    assert {p["verdict"] for p in parts if p["claim"] in ("DA-30", "BL-23")} == {"untested"}  # one frame count
    book = ledger(rules(*ASKED), parts + [p for r in rules(*ASKED) for p in judge_printed(r)]).set_index("claim")
    assert book.loc["DA-23", ["printed", "measured", "tested"]].tolist() == ["supports", "holds", "2 of 2"]
    assert book.loc["BL-23", "printed"] == "not printed" and book.loc["BL-23", "command"].startswith("study run ablation_tam")


def test_one_seed_gives_no_verdict(study):
    parts = judge_measured(rules(*ASKED), collect(seed=0), ROLES, systems=SYSTEMS)
    assert {p["verdict"] for p in parts} == {"inconclusive", "untested"}
    assert all("needs seeds: 1 of at least 5" in p["why"] for p in parts if p["verdict"] == "inconclusive")


def test_pairing_is_by_video_and_not_by_position(study):
    keys = collect(system="tam", data="motion", protocol="clip")["key"]
    folder = study / "runs" / keys[0]
    before = correct_table(keys)
    with np.load(folder / "scores.npz") as f:
        shuffled = {name: f[name][::-1] for name in f}
    np.savez(folder / "scores.npz", **shuffled)
    os.utime(folder / "scores.npz", ns=(1, 1))
    pd.testing.assert_frame_equal(correct_table(keys), before)


def test_models_scored_on_different_videos_are_not_compared(study):
    for key in collect(system="tam", data="motion", protocol="clip")["key"]:
        folder = study / "runs" / key
        with np.load(folder / "scores.npz") as f:
            arrays = {name: f[name] for name in f}
        np.savez(folder / "scores.npz", **arrays | dict(video_ids=np.char.add(arrays["video_ids"], "x")))
        os.utime(folder / "scores.npz", ns=(1, 1))
    with pytest.raises(StudyError, match="'tam > tsm, 16 frames' compares runs on different videos of motion"):
        judge_measured(rules("DA-23"), collect(), ROLES, systems=SYSTEMS)


def test_a_damaged_or_foreign_result_is_named(study):
    path = study / "runs" / collect()["key"][0] / "result.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 7'))
    with pytest.raises(StudyError, match="is of format 7, this version reads 1"):
        collect()
    path.write_text("{")
    with pytest.raises(StudyError, match="is damaged"):
        collect()


def test_unfinished_runs_do_not_count(study):
    (study / "runs" / "unfinished").mkdir()
    (study / "runs" / "unfinished" / "checkpoint.pt").write_text("half")
    assert len(collect()) == 30


def test_a_failed_write_leaves_the_old_evidence(study, monkeypatch):
    told = provenance("example", collect()["key"])
    path = save_table("example", pd.DataFrame(dict(a=[1])), told)
    before = path.read_bytes(), sidecar(path).read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_table("example", pd.DataFrame(dict(a=[2])), told)
    assert (path.read_bytes(), sidecar(path).read_bytes()) == before
    assert not list(path.parent.glob("*.part"))


CHAIN = """
import torch
from video_study.evidence.results import *
from video_study.evidence.claims import judge_measured, ledger
from video_study.evidence.rules import rules
from video_study.evidence.plots import plot_accuracy
runs = collect()
told = provenance("chain", runs["key"])
path = save_table("accuracies", accuracies(runs), told)
asked = rules("DA-23", "DA-28", "DA-29", "BL-17")
save_table("verdicts", ledger(asked, judge_measured(asked, runs, dict(order="motion", appearance="scene"))), told)
save_figure(plot_accuracy(accuracies(runs), runs, dict(motion=50)), "accuracies", provenance("chain", runs["key"], tables=[path]))
"""


def test_the_same_runs_give_the_same_bytes(study):
    def run(hashseed, folder):
        env = os.environ | dict(PYTHONHASHSEED=hashseed, OMP_NUM_THREADS="1", MPLBACKEND="agg")
        subprocess.run([sys.executable, "-c", CHAIN], cwd=ROOT, env=env, check=True)
        files = {p.name: p.read_bytes() for d in ("evidence", "figures") for p in (study / d).iterdir()}
        for name in [n for n in files if n.endswith(".json")]:  # the code may be committed while the test runs
            files[name] = {k: v for k, v in json.loads(files[name]).items() if k != "commit"}
        for d in ("evidence", "figures"):
            (study / d).rename(study / f"{d}-{folder}")
        return files

    first, second = run("1", "first"), run("2", "second")
    assert set(first) == {"accuracies.csv", "accuracies.csv.json", "verdicts.csv", "verdicts.csv.json", "accuracies.png", "accuracies.png.json"}
    assert first == second


def test_saving_again_touches_nothing(study):
    import matplotlib.pyplot as plt
    told = provenance("example", collect()["key"], dict(frames=16))
    table = save_table("example", accuracies(collect()), told)
    fig = plt.figure(figsize=(1, 1))
    paths = [table, save_figure(fig, "example", provenance("example", tables=[table]))]
    ages = [q.stat().st_mtime_ns for p in paths for q in (p, sidecar(p))]
    save_table("example", accuracies(collect()), told)
    save_figure(fig, "example", provenance("example", tables=[table]))
    plt.close(fig)
    assert [q.stat().st_mtime_ns for p in paths for q in (p, sidecar(p))] == ages


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


COMMITTED = sorted((ROOT / "outputs" / "evidence").glob("*.csv")) + sorted((ROOT / "outputs" / "figures").glob("*.png"))


@pytest.mark.parametrize("path", COMMITTED, ids=lambda p: p.name)
def test_committed_evidence_has_its_provenance(path):
    side = json.loads(sidecar(path).read_text(encoding="utf-8"))
    assert side["file"] == path.name and side["sha256"] == digest(path), f"{path.name} was changed after its sidecar was written"
    assert {"notebook", "parameters", "runs", "manifests", "commit", "environment"} <= set(side)
    assert (ROOT / "nbs" / f"{side['notebook']}.ipynb").exists()
    for name, was in side["tables"].items():
        assert digest(ROOT / "outputs" / "evidence" / name) == was, f"{path.name} is older than {name}, from which it was drawn"
