"""Frame-exact reading, file by file, against a full sequential decode by PyAV."""
import subprocess
import sys
import av
import numpy as np
import pytest
from data_videos import FORMS, copy_stream, number, render, truth
from video_study.core import StudyError
from video_study.data.decode import read, torchcodec_reader
from video_study.data.probing import probe


@pytest.fixture(scope="module")
def folder(tmp_path_factory): return tmp_path_factory.mktemp("videos")


@pytest.fixture(scope="module", params=FORMS)
def video(request, folder):
    "One video of each form: file, whether jumping in it is exact, the numbers of its frames, what `probe` says."
    (make, exact), path = FORMS[request.param], folder / request.param
    try: make(folder, path)
    except av.codec.codec.UnknownCodecError as e: pytest.skip(f"this PyAV cannot encode {e}")
    return path, exact, truth(path), probe(path)


def test_probe_finds_out(video):
    path, exact, expected, info = video
    assert (info.num_frames, info.height, info.width, info.seek_exact) == (len(expected), 96, 128, exact)


@pytest.mark.parametrize("short_side", [None, 48])
def test_every_frame_is_the_one_asked_for(video, short_side):
    path, _, expected, info = video
    chance = np.random.RandomState(0)
    asked = [list(range(len(expected))), *(sorted(chance.choice(len(expected), 8)) for _ in range(10)), *([k] for k in range(0, len(expected), 7))]
    for idx in asked:
        got = read(path, idx, short_side=short_side, seek_exact=info.seek_exact, size=(96, 128))
        assert [number(f) for f in got] == [expected[k] for k in idx]


def test_the_danger_is_real(video):
    "Where `probe` says so, jumping does return wrong frames, and elsewhere it does not."
    path, exact, expected, _ = video
    assert exact == all(number(read(path, [k])[0]) == n for k, n in enumerate(expected))


def torchcodec():
    try: torchcodec_reader("no such file")
    except StudyError: pytest.skip("torchcodec or the FFmpeg it takes is not installed")
    except (RuntimeError, ValueError): pass  # it could look for the file


@pytest.mark.parametrize("decoder", ["pyav", "torchcodec"])
def test_other_decoders_agree(video, decoder):
    if decoder == "torchcodec": torchcodec()
    path, _, expected, _ = video
    idx = [len(expected) - 1, 0, 7, 7]
    assert [number(f) for f in read(path, idx, decoder=decoder, seek_exact=False)] == [expected[k] for k in idx]


@pytest.mark.parametrize("decoder", ["pyav", "torchcodec"])
@pytest.mark.parametrize("short_side", [None, 48])
def test_decoders_show_the_same_picture(folder, decoder, short_side):
    if decoder == "torchcodec": torchcodec()
    path = render(folder / "same.mp4")
    a, b = (read(path, [3, 30], short_side, decoder=d).astype(int) for d in ("decord", decoder))
    assert a.shape == b.shape and np.abs(a - b).mean() < 2  # their colour conversions round differently


def test_torchcodec_jumps_exactly_where_probe_says_so(video):
    torchcodec()
    path, _, expected, _ = video
    info = probe(path, "torchcodec")
    for k in range(0, len(expected), 7):
        assert number(read(path, [k], decoder="torchcodec", seek_exact=info.seek_exact)[0]) == expected[k]


def test_an_edit_list_hides_frames(folder):
    "A cut clip holds more packets than frames: the ones before its start are decoded and thrown away."
    path = FORMS["cut.mp4"][0](folder, folder / "hidden.mp4")
    with av.open(str(path)) as container: packets = sum(p.size > 0 for p in container.demux(video=0))
    assert probe(path).num_frames == len(truth(path)) < packets
    assert truth(path)[0] > 60


@pytest.mark.parametrize("name, source, share", [("whole_index.mp4", "closed.mp4", 0.6), ("index_first.mp4", "first.mp4", 0.6), ("half.mkv", "closed.mkv", 0.6),
                                                 ("half.avi", "mpeg4_no_b.avi", 0.6), ("half.webm", "vp9.webm", 0.6), ("half.mpg", "mpeg2.mpg", 0.6), ("tail.mp4", "first.mp4", 0.98)])
def test_truncated_files_are_refused(folder, name, source, share):
    if source == "first.mp4": copy_stream(render(folder / "to_copy.mp4"), folder / source, options={"movflags": "faststart"})
    else: FORMS[source][0](folder, folder / source)
    data = (folder / source).read_bytes()
    (folder / name).write_bytes(data[:int(len(data) * share)])
    with pytest.raises(StudyError, match=f"{name} is not used"): probe(folder / name)


def test_a_file_that_ends_between_two_frames_is_refused(folder):
    "No packet is cut, there are only fewer of them than the file says."
    path = copy_stream(render(folder / "to_end.mp4"), folder / "ends.mp4", options={"movflags": "faststart"})
    with av.open(str(path)) as container: places = sorted(p.pos for p in container.demux(video=0) if p.size)
    path.write_bytes(path.read_bytes()[:places[40]])
    with pytest.raises(StudyError, match="ends.mp4 is not used: it ends after 40 of 60 frames"): probe(path)


def test_damaged_files_are_refused_or_whole(folder):
    "Flipped bits either give an error or all frames, never a crash or fewer frames than promised."
    data = render(folder / "good.mp4").read_bytes()
    for k in range(12):
        chance, bad = np.random.RandomState(k), bytearray(data)
        for place in chance.choice(len(bad), 30): bad[place] ^= 1 << chance.randint(8)
        (folder / "bad.mp4").write_bytes(bad)
        try: info = probe(folder / "bad.mp4")
        except StudyError: continue
        assert len(read(folder / "bad.mp4", range(info.num_frames), seek_exact=info.seek_exact)) == info.num_frames


def test_a_file_that_shrank_after_it_was_listed(folder):
    path = render(folder / "shrinking.mp4", 60)
    listed = probe(path).num_frames
    render(path, 30)
    for decoder in ("decord", "pyav"):
        with pytest.raises(StudyError, match="shrinking.mp4 ends"): read(path, [0, listed - 1], decoder=decoder)


def test_transport_streams_are_refused(folder):
    with pytest.raises(StudyError, match="transport stream"): probe(render(folder / "stream.ts", format="mpegts"))


def test_sound_alone_is_no_video(folder):
    with av.open(str(folder / "sound.mp4"), "w") as out:
        stream = out.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 44100, 0
        out.mux(stream.encode(frame)); out.mux(stream.encode(None))
    with pytest.raises(StudyError, match="no video stream"): probe(folder / "sound.mp4")


def test_what_decord_cannot_read_pyav_can(folder):
    try: path = render(folder / "av1.mkv", codec="libsvtav1", options={"preset": "12", "svtav1-params": "enable-stat-report=0"})
    except av.codec.codec.UnknownCodecError: pytest.skip("this PyAV cannot encode AV1")
    import decord
    if decord.__version__ != "0.6.0": pytest.skip("decord2 reads AV1")
    with pytest.raises(StudyError, match="decord cannot read .*av1.mkv"): probe(path)
    assert probe(path, decoder="pyav").num_frames == 60


def test_decord_is_imported_after_torch():
    code = "import video_study.data.decode as d, sys; assert 'torch' not in sys.modules and 'decord' not in sys.modules and 'av' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
