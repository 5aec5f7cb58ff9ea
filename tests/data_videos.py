"""Videos whose frames carry their number, in the forms in which real datasets come."""
from fractions import Fraction
import av
import numpy as np


def numbered(k: int, height: int = 96, width: int = 128) -> np.ndarray:
    "Draw a frame number as twelve fields, white for a 1."
    bits = np.array([k >> b & 1 for b in range(12)], np.uint8).reshape(3, 4)
    return np.kron(bits * 215 + 20, np.ones((height // 3, width // 4), np.uint8))[..., None].repeat(3, 2)


def number(frame: np.ndarray) -> int:
    "Read the number of a frame."
    h, w = frame.shape[0] / 3, frame.shape[1] / 4
    return sum(int(frame[int((b // 4 + 0.5) * h), int((b % 4 + 0.5) * w)].mean() > 128) << b for b in range(12))


def render(path, num_frames=60, codec="libx264", options=None, varying=False, height=96, width=128, draw=numbered, **codec_options):
    "Write a video; `varying` gives every frame its own duration."
    rng, time = np.random.RandomState(0), 0
    with av.open(str(path), "w", **codec_options) as out:
        stream = out.add_stream(codec, rate=25, options={"g": "12", "bf": "2", **(options or {})})
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = width, height, "yuv420p", 2_000_000
        if varying: stream.codec_context.time_base = Fraction(1, 1000)
        for k in range(num_frames):
            frame = av.VideoFrame.from_ndarray(draw(k, height, width))
            if varying: frame.pts, frame.time_base, time = time, Fraction(1, 1000), time + int(rng.randint(20, 120))
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def copy_stream(source, path, start=0.0, **options):
    "Copy without re-encoding from the key frame before `start` (seconds); what precedes `start` is hidden by an edit list."
    with av.open(str(source)) as given, av.open(str(path), "w", **options) as out:
        stream = given.streams.video[0]
        copy = out.add_stream_from_template(stream) if hasattr(out, "add_stream_from_template") else out.add_stream(template=stream)
        offset = int(start / stream.time_base)
        given.seek(offset, stream=stream)
        for packet in given.demux(stream):
            if packet.dts is None: continue
            packet.pts, packet.dts, packet.stream = packet.pts - offset, packet.dts - offset, copy
            out.mux(packet)
    return path


def cut(folder, path):
    "Cut a clip between key frames, the way many copies of Kinetics are made."
    whole = render(folder / "whole.mp4", 120, options={"x264-params": "scenecut=0"})
    return copy_stream(whole, path, 2.9)


def truth(path) -> list:
    "Read the numbers of all frames by a sequential decode with PyAV."
    with av.open(str(path)) as container: return [number(f.to_ndarray(format="rgb24")) for f in container.decode(video=0)]


OPEN = "open-gop=1:keyint=12:min-keyint=6:bframes=3:b-adapt=0:scenecut=0"
# name -> (how it is made, whether jumping with decord is exact)
FORMS = {
    "closed.mp4": (lambda folder, path: render(path), True),
    "closed.mkv": (lambda folder, path: render(path), True),
    "varying.mp4": (lambda folder, path: render(path, varying=True), True),
    "vp9.webm": (lambda folder, path: render(path, codec="libvpx-vp9", options={"deadline": "realtime", "cpu-used": "8"}), True),
    "mpeg4_no_b.avi": (lambda folder, path: render(path, codec="mpeg4", options={"bf": "0"}), True),
    "open.mp4": (lambda folder, path: render(path, options={"x264-params": OPEN}), False),
    "x265.mp4": (lambda folder, path: render(path, codec="libx265", options={"x265-params": "keyint=12:min-keyint=6:log-level=none"}), False),
    "x265_default.mp4": (lambda folder, path: render(path, 300, codec="libx265", options={"g": "250", "x265-params": "log-level=none"}), False),
    "mpeg4.avi": (lambda folder, path: render(path, codec="mpeg4"), False),
    "mpeg4.mp4": (lambda folder, path: render(path, codec="mpeg4"), False),
    "mpeg2.mpg": (lambda folder, path: render(path, codec="mpeg2video"), False),
    "cut.mp4": (cut, False),
}
