"""Measure what a manifest of a million rows costs: `python tests/measure_manifest.py [rows]`.

The goals are 2 s (of CPU, so that a busy machine does not count) for building, for reading and for laying out an epoch, and 50 MB of memory of its own for each of 8 loader workers.
"""
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from video_study.data.clips import ClipDataset, batches, plan
from video_study.data.manifest import Manifest


def own_memory():  # MB that this process shares with nobody
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Clean", "Private_Dirty"))) / 1024


def worker(ds, parts, pipe):
    before = own_memory()
    for rows in parts:
        for i in rows: plan(ds, 0, int(i)), ds.manifest.file(int(i))
    pipe.send((before, own_memory()))


def timed(what, make):
    start = time.process_time()
    made = make()
    print(f"{what}: {time.process_time() - start:.2f} s", flush=True)
    return made


def main(rows=1_000_000):
    import torch  # noqa: F401  (imported before the processes are made, as in training)
    k = np.arange(rows)
    columns = dict(video_id=[f"class_{n % 400}/video_{n:07d}" for n in range(rows)], path=[f"train/class_{n % 400}/video_{n:07d}.mp4" for n in range(rows)], label=k % 400,
                   split=np.where(k % 20, "train", "val"), num_frames=np.full(rows, 300), fps=np.full(rows, 30.), height=np.full(rows, 256), width=np.full(rows, 340), seek_exact=np.ones(rows, bool))
    folder = Path(tempfile.mkdtemp())
    built = timed("building", lambda: Manifest(pa.table(columns), [f"class_{n}" for n in range(400)], "million", folder).validate(files=False))
    timed("hashing", lambda: built.hash)
    timed("writing", lambda: built.write(folder / "million.parquet"))
    m = timed("reading and checking", lambda: Manifest.read(folder / "million.parquet", folder, "million", built.classes).validate(files=False))
    assert m.hash == built.hash
    train = timed("splitting", lambda: m.split("train"))
    ds = timed("a dataset of clips", lambda: ClipDataset(train, 8, 224, train=True, preload="never"))
    parts = timed("an epoch", lambda: batches(len(ds), 64, 0, 0))
    timed("columns", lambda: (ds.columns, ds.labels, ds.mirror))
    context, pipes = multiprocessing.get_context("fork"), []
    for w in range(8):
        ours, theirs = context.Pipe()
        process = context.Process(target=worker, args=(ds, parts[w:160:8], theirs))
        process.start(); pipes.append((process, ours))
    own = [ours.recv() for _, ours in pipes]
    for process, _ in pipes: process.join()
    print(f"own memory of 8 workers after 20 batches of 64: {min(b for _, b in own):.0f} to {max(b for _, b in own):.0f} MB; of that {max(a for a, _ in own):.0f} MB at most when they began")
    print(f"whole process: {int(next(l for l in open('/proc/self/status') if l.startswith('VmRSS')).split()[1]) / 1024:.0f} MB; {os.cpu_count()} cores")


if __name__ == "__main__": main(*map(int, sys.argv[1:]))
