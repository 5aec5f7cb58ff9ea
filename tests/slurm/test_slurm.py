"""Runs on a real cluster: submitted once, preempted, out of time, cancelled, killed, on a node that fails; and what is refused before anything is queued."""
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from cluster import Cluster, missing  # noqa: E402

pytestmark = pytest.mark.skipif(bool(missing()), reason=f"a SLURM cluster {missing()}")
ROOT, DRIVER = Path(__file__).resolve().parents[2], Path(__file__).with_name("driver.py")
TINY = dict(frames=4, image_size=32, width=0.0625, warmup_epochs=0, batch_size=4, model="tsn_resnet18")
LONG = dict(epochs=300, bn_clips=2)  # two processes, each with statistics of its own: half a minute at the very least


@pytest.fixture(scope="module")
def cluster():
    with Cluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    import av
    import numpy as np
    from video_study.data.manifest import from_folder
    home = tmp_path_factory.mktemp("videos")
    for k in range(32):
        path = home / ("dark" if k % 2 else "bright") / f"{k}.mp4"
        path.parent.mkdir(exist_ok=True)
        with av.open(str(path), "w") as out:
            stream = out.add_stream("libx264", rate=25)
            stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
            for t in range(8):
                out.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((64, 64, 3), (20 if k % 2 else 180) + t + k // 2, np.uint8))))
            out.mux(stream.encode(None))
    return str(from_folder(home, "light").write(home / "light.csv"))


@pytest.fixture
def here(cluster, tmp_path, monkeypatch):
    """This process as a user's on the cluster, with outputs of its own."""
    for name, value in dict(cluster.env, VIDEO_STUDY_OUTPUTS=str(tmp_path / "out"), VIDEO_STUDY_ROOT=str(ROOT), OMP_NUM_THREADS="1").items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("IN_TEST", raising=False)
    yield tmp_path / "out" / "runs"
    cluster.run("scancel", "--full", "--user=root", check=False)
    wait(lambda: not live(cluster), 60)


@pytest.fixture
def start(here, data):
    """Start a script that dispatches, as a process; it is gone after the test."""
    started = []

    def start(package=ROOT, **told):
        words = [sys.executable, str(DRIVER), json.dumps(dict(data=data) | told)]
        env = os.environ | dict(PYTHONPATH=str(package))
        started.append(subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate(timeout=60)


def rows(process, seconds=600):
    out, err = process.communicate(timeout=seconds)
    assert process.returncode == 0, err
    return {row["seed"]: row for row in json.loads(out.splitlines()[-1])}


def wait(condition, seconds=280):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.2)


def live(cluster):
    """Ids and states of jobs that have not ended."""
    return dict(line.split() for line in cluster.run("squeue", "-h", "-r", "-o", "%i %T").splitlines())


def submitted(cluster):
    """Numbers of all arrays and jobs the controller remembers."""
    return {line.partition("_")[0] for line in cluster.run("squeue", "-h", "-r", "-t", "all", "-o", "%i").split()}


def folders(here):
    """Run folder by seed."""
    return {int(json.loads(p.read_text())["label"].split()[-1]): p.parent for p in here.glob("*/slurm.json")}


def epochs(folder):
    return (folder / "log.jsonl").read_bytes().count(b"\n") if (folder / "log.jsonl").exists() else 0


def job(folder):
    return json.loads((folder / "slurm.json").read_text())["job"]


def told(cluster, job, name):
    return re.search(rf"\b{name}=(\S+)", cluster.run("scontrol", "show", "job", job))[1]


def processes(job):
    """Processes of training of a job, by rank."""
    found = {}
    for p in psutil.process_iter():
        try:
            env = p.environ() if "submitit.core._submit" in p.cmdline() else {}
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        if f"{env.get('SLURM_ARRAY_JOB_ID')}_{env.get('SLURM_ARRAY_TASK_ID')}" == job and "SLURM_PROCID" in env:
            found[int(env["SLURM_PROCID"])] = p
    return found


def weights(folder):
    return torch.load(folder / "weights.pt", weights_only=True)["state_dict"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def local(data, folder, ranks, **fields):
    """Start an uninterrupted run of so many processes on this machine, which no cluster knows of."""
    code = ("import json, sys, torch; torch.set_num_threads(1); from video_study.training.experiment import grid; from video_study.training.loop import fit; "
            "fit(grid(**json.loads(sys.argv[1]))[0], folder=sys.argv[2], progress=False)")
    words = [sys.executable, "-c", code, json.dumps(dict(TINY, data=data, **fields)), str(folder)]
    env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")} | dict(OMP_NUM_THREADS="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="28461")
    variables = [dict(RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE=str(ranks)) if ranks > 1 else {} for r in range(ranks)]
    return [subprocess.Popen(words, cwd=ROOT, env=env | v, stderr=subprocess.PIPE, text=True) for v in variables]


REFUSED = {
    "unknown partition 'gqu'; did you mean 'gpu'": dict(partition="gqu"),
    "at most 4 GPUs": dict(gpus=8),
    "partition gpu has 2 such nodes": dict(nodes=3),
    "partition short allows 30": dict(partition="short"),
    "a batch of 4 clips cannot be shared out evenly to 3 processes": dict(gpus=3),
    "nodes=1 with 1 GPUs, 1 cores and 100 GB, but partition gpu has 0 such nodes": dict(memory=100),
    "unknown way to keep the code 'snap'": dict(code="snap"),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_the_cluster_cannot_give_is_refused_before_anything_is_queued(here, cluster, data, message):
    from video_study.core import StudyError
    from video_study.launch.dispatch import dispatch
    from video_study.training.experiment import grid
    before = submitted(cluster)
    with pytest.raises(StudyError, match=re.escape(message)):
        dispatch(grid(data=data, epochs=1, **TINY), where="slurm", **REFUSED[message])
    assert submitted(cluster) <= before and not list(here.glob("*/slurm.json"))


def test_submitit_without_slurm_is_one_error(here, cluster, data, monkeypatch, tmp_path):
    from video_study.core import StudyError
    from video_study.launch.dispatch import dispatch
    from video_study.training.experiment import grid
    runs = grid(data=data, epochs=1, **TINY)
    conf = re.sub("SlurmctldPort=.*", "SlurmctldPort=9\nMessageTimeout=2\nSlurmctldTimeout=3", (cluster.folder / "slurm.conf").read_text())  # nobody answers there
    (tmp_path / "slurm.conf").write_text(conf)
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    with pytest.raises(StudyError, match="SLURM does not answer: sinfo"):
        dispatch(runs, where="slurm")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StudyError, match="needs SLURM, whose command sinfo is not found here"):
        dispatch(runs, where="slurm")
    assert not list(here.glob("*/slurm.json"))


def test_arrays_are_short_enough_and_nothing_is_submitted_twice(here, cluster, data):
    from video_study.core import StudyError
    from video_study.launch.dispatch import dispatch
    from video_study.launch.status import cancel, status
    from video_study.training.experiment import grid
    runs = grid(data=data, epochs=1, seed=range(6), **TINY)
    cluster.run("scontrol", "update", "nodename=n[1-2]", "state=drain", "reason=test")  # nothing starts, and that is no reason to refuse
    try:
        before = submitted(cluster)
        assert list(dispatch(runs, where="slurm", jobs=1, wait=False).status) == ["queued"] * 6
        made = submitted(cluster) - before
        assert len(made) == 2  # this cluster's arrays have at most 4 jobs
        assert {told(cluster, i, "ArrayTaskThrottle") for i in made if "ArrayTaskThrottle" in cluster.run("scontrol", "show", "job", i)} == {"1"}
        assert "afterany" in told(cluster, max(made, key=int), "Dependency")  # one at once, of all six
        assert list(dispatch(runs, where="slurm", jobs=1, wait=False).status) == ["queued"] * 6
        assert submitted(cluster) - before == made
        lost = here / runs_key(runs[0]) / "slurm.json"  # the submitting process died before it had written the number of the job
        lost.write_text(json.dumps(json.loads(lost.read_text()) | dict(job="")))
        assert list(dispatch(runs, where="slurm", jobs=1, wait=False).status) == ["queued"] * 6
        assert submitted(cluster) - before == made
        with pytest.raises(StudyError, match="is pending as SLURM job .*, so it cannot be run with where=\"local\""):
            dispatch(runs, where="local")
        assert list(status()[0]["state"]) == ["queued"] * 6
        assert len(cancel(["all"])) == 6
        wait(lambda: not live(cluster), 30)
        table = dispatch(runs, where="slurm", wait=False)  # nobody has looked since: now it is told, and nothing is submitted
        assert submitted(cluster) - before == made
        assert table.error.str.contains("was cancelled, before its first checkpoint").all(), list(table.error)
    finally:
        cluster.run("scontrol", "update", "nodename=n[1-2]", "state=resume")


def runs_key(experiment):
    from video_study.training.experiment import resolve
    return resolve(experiment).key


@pytest.mark.timeout(900)
def test_runs_survive_what_happens_on_a_cluster(start, here, cluster, data, tmp_path):
    call = dict(grid=dict(LONG, model=TINY["model"], seed=[0, 1, 2]), options=dict(where="slurm", gpus=2))
    reference = local(data, tmp_path / "reference", 2, seed=0, **LONG)
    first = start(**call)
    wait(lambda: len(folders(here)) == 3 and all(job(f) for f in folders(here).values()))
    run, cancelled, killed = (folders(here)[seed] for seed in range(3))
    arrays = submitted(cluster)

    # the notebook is closed; one process of a run is killed before there is a checkpoint, as when memory is full
    first.kill()
    wait(lambda: 1 in processes(job(killed)))
    processes(job(killed))[1].kill()
    # the time of another is nearly up once it trains: with a notice of 90 seconds, which SLURM looks after twice a minute
    wait(lambda: epochs(run) > 0)
    minutes = sum(int(t) * m for t, m in zip(told(cluster, job(run), "RunTime").split(":"), (60, 1, 1 / 60)))
    cluster.run("scontrol", "update", f"jobid={job(run)}", f"TimeLimit={int(minutes) + 2}")
    # the notebook is opened again
    second = start(**call)
    wait(lambda: told(cluster, job(run), "Restarts") == "1")
    cluster.run("scontrol", "update", f"jobid={job(run)}", "TimeLimit=240")
    timed_out_after = epochs(run)
    assert not (run / "result.json").exists(), "it was done before its time was up"
    wait(lambda: epochs(run) > timed_out_after and epochs(cancelled) > 0)
    cluster.run("sbatch", "-p", "urgent", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")
    wait(lambda: told(cluster, job(run), "Restarts") == "2" and told(cluster, job(cancelled), "Restarts") == "1")
    subprocess.run([str(Path(sys.executable).with_name("study")), "cancel", job(cancelled)], env=os.environ | dict(PYTHONPATH=str(ROOT)), check=True, timeout=60)

    table = rows(second)
    assert table[0]["status"] == "done", table
    assert (run / "result.json").exists() and json.loads((run / "result.json").read_text())["processes"] == 2
    assert "was cancelled" in table[1]["error"] and "the next call goes on from its checkpoint" in table[1]["error"], table
    assert "died" in table[2]["error"] and "before its first checkpoint" in table[2]["error"], table
    assert "Killed" in json.loads((killed / "failed.json").read_text())["details"]  # the end of its log
    assert len(submitted(cluster) - arrays) <= 1  # none but the urgent job
    for process in reference:
        assert process.wait(timeout=200) == 0, process.stderr.read()
    assert same(weights(run), weights(tmp_path / "reference"))


@pytest.mark.timeout(600)
def test_the_code_that_runs_is_the_code_that_was_submitted_also_after_a_node_fails(start, here, cluster, data, tmp_path):
    import shutil
    for part in ("video_study", "data_manifests"):
        shutil.copytree(ROOT / part, tmp_path / "tree" / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "settings.ini", tmp_path / "tree")
    os.environ["VIDEO_STUDY_ROOT"] = str(tmp_path / "tree")  # set back by `here`
    reference = local(data, tmp_path / "reference", 1, seed=7, epochs=60)
    watcher = start(tmp_path / "tree", grid=dict(epochs=60, model=TINY["model"], seed=[7]), options=dict(where="slurm", gpus=0))
    wait(lambda: folders(here) and job(folders(here)[7]))
    (tmp_path / "tree" / "video_study" / "training" / "loop.py").write_text("raise ImportError('edited meanwhile')")
    run = folders(here)[7]
    wait(lambda: epochs(run) > 1)
    node = told(cluster, job(run), "NodeList")
    for state in ("drain", "down"):  # drained, or it would be given the job again at once, with the old processes still on it
        cluster.run("scontrol", "update", f"nodename={node}", f"state={state}", "reason=test")
    try:
        assert rows(watcher)[7]["status"] == "done"
    finally:
        cluster.run("scontrol", "update", f"nodename={node}", "state=resume")
    for process in reference:
        assert process.wait(timeout=200) == 0, process.stderr.read()
    assert same(weights(run), weights(tmp_path / "reference"))


@pytest.mark.timeout(600)
def test_the_command_line_plans_and_refuses(here, cluster):
    study = [str(Path(sys.executable).with_name("study"))]
    env = os.environ | dict(PYTHONPATH=str(ROOT), VIDEO_STUDY_DATA=str(ROOT / "outputs" / "data"))  # where the embedded videos may have been rendered already
    settings = "ablation_tam -p where slurm -p data motion -p seeds 3 -p gpus 2".split()
    before = submitted(cluster)
    done = subprocess.run([*study, "plan", *settings, "--clips-per-second", "100"], env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert "9 experiments, 0 of them done; 9 to run" in done.stdout
    assert re.search(r"about \S+ GPU-hours", done.stdout) and "3 array(s) of at most 4" in done.stdout
    done = subprocess.run([*study, "run", *settings, "-p", "partition", "gqu"], env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 1 and "unknown partition 'gqu'; did you mean 'gpu'" in done.stderr
    assert submitted(cluster) <= before
