"""From videos to a budget: a network trained with sub-networks, its 96 configurations calibrated and costed, one file that serves every budget."""

import numpy as np
import pytest
import torch

from video_study.core import StudyError, rng
from video_study.models.adaptive import Config, extract
from video_study.models.budget import accuracy, load_adaptive, paper_grid, save_adaptive, tradeoff


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Twenty-four small H.264 files in two classes: brighter to the right, or to the left."""
    import av

    from video_study.data.manifest import from_folder
    root = tmp_path_factory.mktemp("videos")
    for split, count in ("train", 16), ("val", 8):
        for i in range(count):
            path = root / split / ("left", "right")[i % 2] / f"{split}_{i}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            ramp = np.linspace(20, 230, 64)[:: 1 if i % 2 else -1][None, :, None] + rng(0, split, i).normal(0, 20, (64, 64, 3))
            with av.open(str(path), "w") as file:
                stream = file.add_stream("libx264", rate=10)
                stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
                for _ in range(8):
                    file.mux(stream.encode(av.VideoFrame.from_ndarray(np.clip(ramp, 0, 255).astype(np.uint8), format="rgb24")))
                file.mux(stream.encode())
    path = root / "toy.csv"
    from_folder(root, "toy").write(path)
    return path


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory):
    """The adaptive network of a finished run, training clips, and validation clips with labels."""
    from video_study.data.catalog import dataset as find
    from video_study.data.clips import loader
    from video_study.training.experiment import experiment, resolve
    from video_study.training.loop import fit
    from video_study.training.mutual import adaptive_of
    from video_study.training.setup import make_clips
    exp = resolve(experiment(model="tam_resnet18", width=0.125, data=str(dataset), frames=8, image_size=56, resize=56, flip="none",
                             epochs=6, batch_size=8, lr=0.02, warmup_epochs=1, crop="random", mutual="0.016"))
    result = fit(exp, folder=tmp_path_factory.mktemp("run") / exp.key)
    net = adaptive_of(result)
    mean, std = (torch.tensor(v).view(3, 1, 1, 1) for v in (net.spec.mean, net.spec.std))
    ready = lambda clips: ((torch.as_tensor(np.asarray(clips)).permute(0, 4, 1, 2, 3).float() / 255 - mean) / std)
    parts = {split: [(ready(b.clips), torch.as_tensor(np.asarray(b.labels))) for b in loader(make_clips(exp, find(str(dataset)), split, train=False), 8)] for split in ("train", "val")}
    return net.eval(), [x for x, _ in parts["train"]], parts["val"]


def test_ninety_six_configurations_in_one_file(trained, tmp_path):
    net, calibration, validation = trained
    grid = paper_grid(frames=8, size=56)
    assert len(grid) == 96
    table = tradeoff(net, calibration, validation, grid)
    assert {tuple(r["config"]) for r in table.rows} == {(c.width, c.frames, c.size) for c in grid}
    assert [r["macs"] for r in table.rows] == sorted(r["macs"] for r in table.rows)

    save_adaptive(tmp_path / "budget.pt", net, table)
    again, read = load_adaptive(tmp_path / "budget.pt")
    x, y = validation[0]
    for gmacs in (table.rows[0]["macs"] / 1e9, table.rows[48]["macs"] / 1e9, 1.0):
        config = read.pick(gmacs=gmacs)
        row = next(r for r in read.rows if tuple(r["config"]) == (config.width, config.frames, config.size))
        assert row["macs"] <= gmacs * 1e9 and row["top1"] == max(r["top1"] for r in read.rows if r["macs"] <= gmacs * 1e9)
        assert accuracy(again, config, validation) == row["top1"]
        small = extract(again, config)
        assert sum(p.numel() for p in small.parameters()) == row["params"]
        assert torch.equal(again.configure(config)(x), net.configure(config)(x))
    with pytest.raises(StudyError, match="below the cheapest configuration"):
        read.pick(gmacs=table.rows[0]["macs"] / 1e9 * 0.999)
    with pytest.raises(StudyError, match="has no statistics"):
        again.configure(0.55, 3, 40)(x)


def test_the_trained_network_learned_at_every_width(trained):
    """Calibrated on the training clips, the easy classes are told apart by the full network and by its narrowest quarter alike."""
    net, calibration, validation = trained
    configs = [Config(1.0, 8, 56), Config(0.5, 2, 32)]
    table = tradeoff(net, calibration, validation, configs)
    assert all(r["top1"] > 50 for r in table.rows), table.to_pandas()
