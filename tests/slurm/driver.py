"""What a user's script would do: make a few experiments, dispatch them, print the table. Run as a process, so that it can be stopped and run again.

    python driver.py '{"data": "...", "grid": {...}, "options": {...}, "constants": {...}}'
"""
import json
import sys

from video_study.launch import slurm
from video_study.launch.dispatch import dispatch
from video_study.training.experiment import grid

if __name__ == "__main__":
    told = json.loads(sys.argv[1])
    slurm.GRACE = told.get("grace", 3.0)  # files appear at once here, and nobody has half a minute
    table = dispatch(grid(data=told["data"], frames=4, image_size=32, width=0.0625, warmup_epochs=0, batch_size=4, **told["grid"]), **told["options"])
    print(table[["key", "seed", "status", "error"]].to_json(orient="records"))
