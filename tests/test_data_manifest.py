"""Manifests and cards where files, processes and full disks are involved."""
import json
import subprocess
import sys
import textwrap
import numpy as np
import pandas as pd
import pytest
from data_videos import FORMS, render
from video_study.core import StudyError
from video_study.data.catalog import add_dataset, card, dataset, list_datasets
from video_study.data.manifest import Manifest, from_folder


def grey(k, height, width): return np.full((height, width, 3), 20 + 10 * k, np.uint8)


def small(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    return render(path, 8, draw=grey, height=48, width=64)


@pytest.fixture()
def project(tmp_path, monkeypatch):
    "An empty project of its own."
    (tmp_path / "data_manifests").mkdir()
    monkeypatch.setenv("VIDEO_STUDY_ROOT", str(tmp_path))
    for name, folder in ("DATA", "data"), ("OUTPUTS", "outputs"): monkeypatch.setenv(f"VIDEO_STUDY_{name}", str(tmp_path / folder))
    return tmp_path


def test_unreadable_files_become_a_table(tmp_path):
    for clip in ("run/1", "run/2", "sit/1", "sit/2"): small(tmp_path / f"{clip}.mp4")
    whole = (tmp_path / "run/1.mp4").read_bytes()
    (tmp_path / "run/3.mp4").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "run/4.mp4").touch()
    (tmp_path / "sit/3.mp4").write_text("a letter")
    render(tmp_path / "sit/4.ts", 8, draw=grey, format="mpegts")
    (tmp_path / "sit/notes.txt").write_text("not a video, and not taken for one")
    m = from_folder(tmp_path)
    assert m.coverage == (4, 8)
    assert m.problems.path.tolist() == ["run/3.mp4", "run/4.mp4", "sit/3.mp4", "sit/4.ts"]
    for said, expected in zip(m.problems.error, ("damaged, truncated", "is empty", "no video", "transport stream")): assert expected in said
    assert "4 of 8 listed videos cannot be read" in m.notes[0]
    again = Manifest.read(m.write(tmp_path / "kept.parquet"))
    assert (again.hash, again.coverage, again.problems.equals(m.problems)) == (m.hash, (4, 8), True)


def test_split_folders_are_kept(tmp_path):
    for clip in ("training/run/1", "training/sit/1", "validation/run/2", "validation/sit/2"): small(tmp_path / f"{clip}.mp4")
    m = from_folder(tmp_path)
    assert m.to_pandas()[["split", "class"]].values.tolist() == [["train", "run"], ["train", "sit"], ["val", "run"], ["val", "sit"]]
    (tmp_path / "validation/sit/bad.mp4").touch()
    m = from_folder(tmp_path)
    assert [m.split(s).coverage for s in ("train", "val")] == [(2, 2), (2, 3)]


def test_a_class_that_cannot_be_read_is_no_class(tmp_path):
    small(tmp_path / "run/1.mp4")
    (tmp_path / "sit").mkdir()
    (tmp_path / "sit/1.mp4").touch()
    with pytest.raises(StudyError, match="the class 'sit' has no videos that can be read"): from_folder(tmp_path)


def test_the_split_depends_on_names_alone(tmp_path):
    for k in range(10): small(tmp_path / f"one/run/{k}.mp4")
    first = from_folder(tmp_path / "one").to_pandas().set_index("video_id").split
    assert (first == "val").sum() == 2
    (tmp_path / "one").rename(tmp_path / "two")
    small(tmp_path / "two/sit/1.mp4"); small(tmp_path / "two/sit/2.mp4")
    second = from_folder(tmp_path / "two").to_pandas().set_index("video_id").split
    assert second[first.index].equals(first)


def test_seeking_is_found_out_per_file(tmp_path):
    for name in ("mpeg4.avi", "closed.mp4"):
        for k in "ab":
            (tmp_path / name.split(".")[0]).mkdir(exist_ok=True)
            FORMS[name][0](tmp_path, tmp_path / name.split(".")[0] / f"{k}.{name.split('.')[1]}")
    m = from_folder(tmp_path)
    assert dict(zip(m.column("video_id"), m.column("seek_exact"))) == {"closed/a": True, "closed/b": True, "mpeg4/a": False, "mpeg4/b": False}


FULL_DISK = """
    import resource, sys
    from video_study.core import StudyError
    from video_study.data.manifest import Manifest
    import pyarrow as pa
    small, path = Manifest.read(sys.argv[1]), sys.argv[2]
    many = Manifest(pa.concat_tables([small.table] * 500), small.classes, "many")
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    try: many.write(path, replace=True)
    except StudyError as e: print(e)
"""


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_no_space_left_keeps_the_old_manifest(tmp_path, suffix):
    small(tmp_path / "run/1.mp4"); small(tmp_path / "sit/1.mp4")
    m = from_folder(tmp_path)
    path = m.write(tmp_path / f"kept.{suffix}")
    before = path.read_bytes()
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(FULL_DISK), str(path), str(path)], capture_output=True, text=True)
    assert "File too large; what was there before is untouched" in done.stdout, done.stderr
    assert path.read_bytes() == before
    assert [p for p in tmp_path.iterdir() if p.name.endswith(".part")] == []


def test_a_user_can_add_videos_and_use_them(project):
    for clip in ("run/1", "run/2", "sit/1"): small(project / f"own/{clip}.mp4")
    m = add_dataset(project / "own", "mine")
    assert (project / "data_manifests/local/mine.csv").exists()
    assert dataset("mine").hash == m.hash and card("mine").splits == {"train": 2, "val": 2}
    assert any("1 of 2 val videos are also training videos" in note for note in m.notes)
    assert list_datasets().loc["mine", "videos"] == "here"
    (project / "own/run/1.mp4").unlink()
    (project / "data_manifests/local/mine.csv").touch()
    with pytest.raises(StudyError, match="1 of 4 files are missing .*run/1.mp4"): dataset("mine")


def test_lost_videos_show_in_the_coverage(project):
    "The card says how many videos there should be; a manifest of fewer says so."
    for clip in ("run/1", "run/2", "run/3", "sit/1", "sit/2", "sit/3"): small(project / f"own/{clip}.mp4")
    assert add_dataset(project / "own", "mine").split("train").coverage == (4, 4)
    path = project / "data_manifests/local/mine.csv"
    lines = path.read_text().splitlines()
    lines.remove(next(line for line in lines if ",train," in line))
    path.write_text("\n".join(lines) + "\n")
    m = dataset("mine")
    assert (m.split("train").coverage, m.split("val").coverage, m.coverage) == ((3, 4), (2, 2), (5, 6))


def test_a_card_without_videos_says_how_to_get_them(project):
    (project / "data_manifests/far.yaml").write_text("name: far\nclasses: [a, b]\nsplits: {train: 5, val: 5}\nsource: Ask its authors.\n")
    with pytest.raises(StudyError, match="the videos of 'far' are not here. Ask its authors."): dataset("far")
    assert list_datasets().loc["far", "videos"] == "to be fetched"


RENDER = """
    import json, sys, time
    from pathlib import Path
    from video_study.core import data_home
    from video_study.data.catalog import _render
    from video_study.data.manifest import Manifest
    m = Manifest.read(sys.argv[1], root=data_home() / "made", name="made")
    def render(name, folder):
        with open(sys.argv[2], "a") as f: f.write("rendered\\n")
        for k in range(len(m)):
            Path(m.file(k)).parent.mkdir(parents=True, exist_ok=True)
            if not Path(m.file(k)).exists():
                time.sleep(0.1); Path(m.file(k)).write_bytes(b"video")
                if len(sys.argv) > 3 and k == 2: sys.exit("killed")
    _render(m, render)
    print(sorted(p.name for p in (data_home() / "made").rglob("*.mp4")))
"""


def listed(path):
    "A manifest of six videos that are still to be made."
    columns = dict(video_id=list("abcdef"), path=[f"{v}.mp4" for v in "abcdef"], label=[0, 1] * 3, split=["train"] * 6, num_frames=[8] * 6, fps=[25.] * 6,
                   height=[64] * 6, width=[64] * 6, seek_exact=[True] * 6)
    pd.DataFrame(columns).to_csv(path, index=False)
    return path


def run(code, *args): return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_several_processes_render_once(project):
    path = listed(project / "made.csv")
    processes = [run(RENDER, path, project / "log") for _ in range(4)]
    told = [p.communicate() for p in processes]
    assert [out.strip() for out, _ in told] == [str([f"{v}.mp4" for v in "abcdef"])] * 4, told
    assert (project / "log").read_text() == "rendered\n"


def test_half_a_dataset_is_finished(project):
    path, log = listed(project / "made.csv"), project / "log"
    assert "killed" in run(RENDER, path, log, "die").communicate()[1]
    assert len(list((project / "data/made").glob("*.mp4"))) == 3
    out, err = run(RENDER, path, log).communicate()
    assert len(json.loads(out.replace("'", '"'))) == 6, err


def test_no_space_left_for_videos(project):
    code = RENDER.replace('b"video"', "bytes(30000)").replace("_render(m, render)", "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); _render(m, render)")
    out, err = run(code, listed(project / "made.csv"), project / "log").communicate()
    assert "StudyError: cannot render made into data/made: File too large; make room there" in err
