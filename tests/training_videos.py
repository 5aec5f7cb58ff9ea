"""Thirty small H.264 files in two classes: brighter to the right, or to the left."""
import numpy as np

from video_study.core import rng


def toy_dataset(root):
    """Render the videos into a folder and return the path of their manifest."""
    import av

    from video_study.data.manifest import from_folder
    for split, count in ("train", 24), ("val", 6):
        for i in range(count):
            noise, label = rng(0, split, i), i % 2
            path = root / split / ("left", "right")[label] / f"{split}_{i}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            ramp = np.linspace(40, 200, 40)[:: 1 if label else -1][None, :, None]
            with av.open(str(path), "w") as file:
                stream = file.add_stream("libx264", rate=10)
                stream.width, stream.height, stream.pix_fmt = 40, 32, "yuv420p"
                for _ in range(10):
                    frame = np.clip(ramp + noise.normal(0, 60, (32, 40, 3)), 0, 255).astype(np.uint8)
                    file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
                file.mux(stream.encode())
    path = root / "toy.csv"
    from_folder(root, "toy").write(path)
    return path
