"""Run experiments one after the other in a group of processes, started once for all of them.

Started with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in the environment and one argument: a JSON file with a list of

    {"experiment": {...}, "folder": "...", "stop_at": 3, "stop_in": 1}

After each run the first process appends a line of JSON to the file named by the second argument: "done", or the kind of error and its text, of every process.
"""
import json
import sys

import torch

from video_study.core import StudyError
from video_study.training import loop
from video_study.training.distributed import gather, join, rank
from video_study.training.experiment import Experiment
from video_study.training.trainer import Preempted


class Asked:
    """A request to stop that comes in one process after so many questions."""

    def __init__(self, at, where):
        self.left, self.here = at, where == rank()

    def __call__(self):
        self.left -= 1
        return self.here and self.left == 0


def attempt(experiment, folder, stop_at=-1, stop_in=0):
    try:
        loop.fit(Experiment.from_dict(experiment), folder, device="cpu", progress=False, stop=Asked(stop_at, stop_in), log_steps=1)
    except (StudyError, Preempted) as error:
        return f"{type(error).__name__}: {error}"
    return "done"


if __name__ == "__main__":
    torch.set_num_threads(1)
    join()
    for job in json.load(open(sys.argv[1])):
        told = gather(attempt(**job))
        if rank() == 0:
            with open(sys.argv[2], "a") as file:
                file.write(json.dumps(told) + "\n")
