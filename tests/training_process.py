"""Run experiments, each in a process of its own that says what happens, so that a test can kill it at a chosen moment.

A server reads one JSON object a line and forks a process for it, which spares every run the import of torch; it answers with the process id.

    {"experiment": {...}, "folder": "...", "out": "...", "workers": 0, "every": 0}

The process writes its events to the file `out`. The event of a checkpoint carries a digest of all that is in it but the seconds it took.
"""
import hashlib
import json
import os
import resource
import signal
import sys
import traceback

import torch

from video_study.core import StudyError
from video_study.data import store
from video_study.training import loop, state, trainer
from video_study.training.experiment import Experiment, clip_cost

save, write_result, update = state.save, state.write_result, trainer.update


def say(*words):
    print(*words, flush=True)


def digest(value):
    """Hash tensors and plain values by content and memory layout, leaving out the seconds."""
    if isinstance(value, torch.Tensor):
        return hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest() + str(value.stride())
    if isinstance(value, dict):
        return hashlib.sha256(json.dumps([[str(k), digest(v)] for k, v in value.items() if k != "seconds"]).encode()).hexdigest()
    if isinstance(value, (list, tuple)):
        return digest(dict(enumerate(value)))
    return repr(value)


def run(experiment, folder, workers=0, every=float("inf"), full_at=None):
    def announced_update(training, *args):
        say("update", training.step)
        if training.step == full_at:  # from here on no file may hold more than a few bytes: a disk that fills up
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        update(training, *args)

    def announced_save(path, values):
        say("save", path.name, values.get("step", ""), digest(values))
        save(path, values)

    def announced_result(result, **more):
        say("save result.json")
        write_result(result, **more)

    if workers:
        store.LIMIT = 0  # do not keep these few frames in memory, where workers would have nothing to do
    trainer.update, state.save, state.write_result = announced_update, announced_save, announced_result
    torch.set_num_threads(1)
    say("ready")
    result = loop.fit(Experiment.from_dict(experiment), folder, workers=workers, device="cpu", progress=False, every=every)
    say("done", json.dumps(result.metrics, sort_keys=True))


def child(options):
    out = os.open(options.pop("out"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1), os.dup2(out, 2)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        run(**options)
    except StudyError as error:
        say("error", error)
    except BaseException:
        say(traceback.format_exc())
    os._exit(0)


if __name__ == "__main__":
    torch.optim.SGD([torch.zeros(1)], lr=0.1)  # imports what every run imports
    clip_cost("tam_resnet18", (("width", 0.0625),), 4, 32, 2)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the processes
    say("serving")
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            child(json.loads(line))
        say(pid)
