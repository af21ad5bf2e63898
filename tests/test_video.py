"""Whatever is in a video, `open_video` gives upright RGB frames at their times or one clear error."""

from __future__ import annotations

import collections
import gc
import itertools
import random
import struct
import subprocess
import sys
import warnings
import weakref

import numpy as np
import pytest
import torch
from PIL import Image

from vtprune.video import Video, VideoError, VideoNote, open_video, sample

av = pytest.importorskip("av")


def usable(codec):
    try:
        av.codec.Codec(codec, "w")
    except ValueError:
        return False
    return True


# container and encoder: B-frames (libx264), small ticks, no header count (WebM, TS), no time stamps at all (raw)
KINDS = [
    pytest.param(ending, codec, marks=pytest.mark.skipif(not usable(codec), reason=f"no encoder {codec}"))
    for ending, codec in [
        ("mp4", "mpeg4"),
        ("mp4", "libx264"),
        ("mkv", "libx264"),
        ("webm", "libvpx-vp9"),
        ("avi", "mpeg4"),
        ("ts", "mpeg2video"),
        ("ts", "libx264"),
        ("flv", "flv"),
        ("avi", "libx264"),
        ("mpg", "mpeg2video"),
        ("mp4", "libx265"),
        ("wmv", "wmv2"),
        ("mov", "mjpeg"),
    ]
]


def marked(i, width=64, height=48):
    """[height, width, 3]: the bits of i as eight white or black bars, which lossy codecs keep apart."""
    bits = np.array([i >> bit & 1 for bit in range(8)], dtype=np.uint8) * 255
    return np.repeat(np.broadcast_to(np.repeat(bits, width // 8), (height, width))[:, :, None], 3, axis=2)


def encode(path, stamps, codec="mpeg4", size=(64, 48), rate=10, gop=12, painted=None, audio=False, front=False):
    """A clip with frame i, marked so, shown from tick stamps[i] of 1 / rate s."""
    with av.open(str(path), "w", options={"movflags": "faststart"} if front else {}) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height = size
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.gop_size = gop
        stream.options = {"speed": "8", "deadline": "realtime"} if "vp9" in codec else {}
        sound = container.add_stream("aac", rate=16000) if audio else None
        for i, stamp in enumerate(stamps):
            pixels = marked(i % 256, *size) if painted is None else painted(i)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = stamp
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if sound is not None:
            for i in range(10):
                silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
                silence.sample_rate, silence.pts = 16000, i * 1024
                container.mux(sound.encode(silence))
            container.mux(sound.encode())
    return path


def seen(frame):
    """The number that `marked` wrote into a frame."""
    assert frame.image.mode == "RGB"
    bars = np.asarray(frame.image).mean(axis=(0, 2)).reshape(8, -1).mean(1)
    return sum(1 << bit for bit in range(8) if bars[bit] > 128)


def quiet(call):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return call()


@pytest.mark.parametrize("ending, codec", KINDS)
def test_a_clip(tmp_path, ending, codec):
    video = quiet(lambda: open_video(encode(tmp_path / f"a.{ending}", range(40), codec)))
    assert video.size == (64, 48) and video.rate == pytest.approx(10, rel=0.01)
    assert video.duration == pytest.approx(4.0, abs=0.11)
    frames = quiet(lambda: list(video.frames()))
    assert [seen(f) for f in frames] == list(range(40))
    assert [f.index for f in frames] == list(range(40))
    assert [f.time for f in frames] == pytest.approx([i / 10 for i in range(40)], abs=0.002)
    assert video.exact_count() == 40 == video.count


@pytest.mark.parametrize("ending, codec", KINDS)
def test_frames_found_by_seeking_are_those_of_a_pass(tmp_path, ending, codec):
    video = open_video(encode(tmp_path / f"a.{ending}", range(90), codec, gop=7))
    every = [np.asarray(f.image) for f in video.frames()]
    for wanted in ([0], [89], [3, 3, 60, 61, 88], [0, 20, 40, 60, 80], list(range(0, 90, 11)), [85, 86, 87, 88, 89]):
        found = quiet(lambda wanted=wanted: list(video.frames(wanted)))
        assert [f.index for f in found] == wanted
        for f in found:
            assert np.array_equal(np.asarray(f.image), every[f.index])
        by_time = quiet(lambda found=found: list(video.frames(times=[f.time for f in found])))
        assert [f.time for f in by_time] == [f.time for f in found]
        assert all(np.array_equal(np.asarray(f.image), np.asarray(g.image)) for f, g in zip(by_time, found, strict=True))


def test_seeking_skips(tmp_path, monkeypatch):
    from vtprune.video import _Reader

    video = open_video(encode(tmp_path / "a.mp4", range(600), gop=10))
    decoded = []
    step = _Reader.next
    monkeypatch.setattr(_Reader, "next", lambda self: decoded.append(1) or step(self))
    assert [f.time for f in video.frames(times=[0, 30, 59])] == pytest.approx([0, 30, 59])
    assert len(decoded) < 60
    # with one key frame in the whole clip nothing can be skipped: no second pass either
    video = open_video(encode(tmp_path / "b.mp4", range(600), gop=600))
    decoded.clear()
    assert len(list(video.frames(times=[i / 2 for i in range(118)]))) == 118
    assert len(decoded) < 4 * 600


def test_seeks_that_fail_or_land_late(tmp_path, monkeypatch):
    from vtprune.video import _Reader

    video = open_video(encode(tmp_path / "a.mp4", range(200), gop=10))
    find, decoded, step = _Reader._key_frame, [], _Reader.next
    monkeypatch.setattr(_Reader, "next", lambda self: decoded.append(1) or step(self))
    tick = round(0.1 / video.tick)
    for broken in (lambda self, target: None, lambda self, target: find(self, target + 35 * tick)):
        monkeypatch.setattr(_Reader, "_key_frame", broken)
        decoded.clear()
        assert [seen(f) for f in video.frames(times=[0, 3.05, 7, 11, 15, 19.9])] == [0, 30, 70, 110, 150, 199]
        assert len(decoded) < 3 * 200


def test_variable_rate(tmp_path):
    stamps = [0, 1, 2, 30, 31, 90, 200]
    path = encode(tmp_path / "a.mkv", stamps, rate=10)
    video = open_video(path)
    assert [f.time for f in video.frames()] == pytest.approx([s / 10 for s in stamps], abs=0.002)
    # the frame shown at a time is the last that began
    wanted = {0.0: 0, 0.15: 1, 1.9: 2, 2.99: 2, 3.0: 3, 5.0: 4, 8.9: 4, 9.0: 5, 19.9: 5, 20.0: 6}
    assert [seen(f) for f in video.frames(times=wanted)] == list(wanted.values())
    assert [seen(f) for f in video.frames([0, 3, 5, 6])] == [0, 3, 5, 6]
    # even in time, not in frames: the still stretch from 9 to 20 s is half of the clip
    picked = [f.time for f in sample(video, 21, repeats=True)]
    assert len(picked) == 21 and sum(t == pytest.approx(9.0) for t in picked) >= 8
    assert [seen(f) for f in sample(video, 21)] == sorted({seen(f) for f in sample(video, 21)})


def test_a_late_start(tmp_path):
    video = open_video(encode(tmp_path / "a.mkv", range(50, 70)))
    frames = list(video.frames())
    assert frames[0].time == 0.0 and frames[-1].time == pytest.approx(1.9, abs=0.002)
    assert [seen(f) for f in video.frames(times=[0, 1.0])] == [0, 10]
    assert video.duration == pytest.approx(2.0, abs=0.11)


@pytest.mark.skipif(not usable("libx264"), reason="no encoder libx264")
def test_raw_stream_without_time_stamps(tmp_path):
    path = encode(tmp_path / "a.h264", range(30), "libx264")
    video = open_video(path)
    assert [seen(f) for f in video.frames()] == list(range(30))
    assert [seen(f) for f in video.frames([0, 7, 29])] == [0, 7, 29]
    assert video.duration == pytest.approx(30 / video.rate)
    assert [seen(f) for f in video.frames(times=[0, 10 / video.rate, 100])] == [0, 10, 29]
    assert len(sample(video, 6)) == 6


def test_one_frame(tmp_path):
    for ending in ("mp4", "mkv", "avi"):
        video = quiet(lambda ending=ending: open_video(encode(tmp_path / f"a.{ending}", [0])))
        assert video.duration > 0
        assert len(quiet(lambda video=video: list(video.frames()))) == 1 == video.exact_count()
        for count in (1, 2, 9):
            assert len(quiet(lambda video=video, count=count: sample(video, count))) == 1
        assert len(sample(video, 4, repeats=True)) == 4
        assert [seen(f) for f in video.frames(times=[0, 5, 500])] == [0, 0, 0]


def test_sample(tmp_path):
    video = open_video(encode(tmp_path / "a.mp4", range(40)))
    assert [seen(f) for f in sample(video, 4)] == [0, 13, 26, 39]
    assert [seen(f) for f in sample(video, 1)] == [20]
    assert [seen(f) for f in sample(video, 40)] == list(range(40))
    assert [seen(f) for f in sample(video, 100)] == list(range(40))
    assert len(sample(video, 100, repeats=True)) == 100
    for count in (0, -1, 2.0, True):
        with pytest.raises(VideoError, match="count="):
            sample(video, count)


def test_size(tmp_path):
    video = open_video(encode(tmp_path / "a.mp4", range(3)))
    assert next(video.frames([1], size=(10, 20))).image.size == (10, 20)
    assert next(video.frames([1], size=32)).image.size == (32, 24)
    assert next(video.frames([1], size=999)).image.size == (64, 48)
    assert sample(video, 2, size=16)[0].image.size == (16, 12)
    for size in (0, (1,), (1, 2, 3), (0, 4), 1.5, "big", True):
        with pytest.raises(VideoError, match="size="):
            video.frames(size=size)


def test_sound_beside_the_picture(tmp_path):
    video = quiet(lambda: open_video(encode(tmp_path / "a.mp4", range(10), audio=True)))
    assert [seen(f) for f in video.frames()] == list(range(10))


# display matrix of a quarter turn etc. -> where the red corner (upper left when encoded) comes to lie, and the size
TURNS = {
    (1, 0, 0, 1): ((0, 0), (64, 48)),
    (0, 1, -1, 0): ((1, 0), (48, 64)),  # 90 degrees clockwise, a phone held upright
    (-1, 0, 0, -1): ((1, 1), (64, 48)),
    (0, -1, 1, 0): ((0, 1), (48, 64)),
    (-1, 0, 0, 1): ((1, 0), (64, 48)),
    (1, 0, 0, -1): ((0, 1), (64, 48)),
    (0, 1, 1, 0): ((0, 0), (48, 64)),
    (0, -1, -1, 0): ((1, 1), (48, 64)),
}


@pytest.mark.parametrize("matrix", TURNS)
def test_turned(tmp_path, matrix):
    def corner(_):
        pixels = np.zeros((48, 64, 3), dtype=np.uint8)
        pixels[:16, :16, 0] = 255
        return pixels

    path = encode(tmp_path / "a.mp4", range(5), painted=corner)
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 44
    a, b, c, d = (v << 16 for v in matrix)
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    (right, below), size = TURNS[matrix]
    video = open_video(path)
    assert video.size == size
    for frame in video.frames():
        image = frame.image
        assert image.size == size
        corners = {(x, y): image.getpixel((4 + x * (size[0] - 9), 4 + y * (size[1] - 9)))[0] for x in (0, 1) for y in (0, 1)}
        assert max(corners, key=corners.get) == (right, below)
        assert corners[right, below] > 150


def test_sound_alone(tmp_path):
    path = tmp_path / "a.m4a"
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(VideoError, match=r"'a.m4a' has no video stream, only audio"):
        open_video(path)


def test_no_video_at_all(tmp_path):
    for name, content, message in [
        ("text.mp4", b"dear diary\n" * 100, "it is text"),
        ("text.txt", b"dear diary\n" * 100, "it is text"),  # FFmpeg would render it
        ("empty.mp4", b"", r"empty \(0 bytes\)"),
        ("noise.mp4", random.Random(0).randbytes(5000), "cannot be read as a video"),
        ("paper.mp4", b"%PDF-1.7\n\xff", "a PDF"),
        ("packed.mkv", b"PK\x03\x04\0\0", "ZIP"),
        ("head.mkv", b"\x1aE\xdf\xa3\0\0", "Matroska"),
        ("zeros.avi", b"\0" * 4000, "cannot be read as a video"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(VideoError, match=message) as raised:
            open_video(tmp_path / name)
        assert name in str(raised.value) and str(tmp_path) not in str(raised.value)
    with pytest.raises(VideoError, match=r"no file 'none\.mp4'") as raised:
        open_video(tmp_path / "none.mp4")
    assert str(tmp_path) not in str(raised.value)
    with pytest.raises(VideoError, match="no picture"):
        open_video(tmp_path)
    for source in (None, 3, object(), {"a": 1}, iter([])):
        with pytest.raises(VideoError, match="is no video"):
            open_video(source)


@pytest.mark.parametrize(
    "source",
    ["http://example.org/a.mp4", "https://x", "concat:a.mp4|b.mp4", "file:///etc/passwd", "pipe:0", "rtsp://x", "data:,a"],
)
def test_no_protocols(source):
    with pytest.raises(VideoError, match="addresses are not read"):
        open_video(source)


def test_a_playlist_opens_nothing(tmp_path):
    encode(tmp_path / "a.ts", range(10), "mpeg2video")
    encode(tmp_path / "a.mp4", range(10))
    (tmp_path / "list.mp4").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:1,\n{tmp_path}/a.ts\n#EXT-X-ENDLIST\n")
    (tmp_path / "list.m3u8").write_text(
        "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n"
    )
    (tmp_path / "list.txt").write_text(f"ffconcat version 1.0\nfile '{tmp_path}/a.mp4'\n")
    for name in ("list.mp4", "list.m3u8", "list.txt"):
        with pytest.raises(VideoError, match="playlist"):
            open_video(tmp_path / name)


def test_an_mp4_without_its_index(tmp_path):
    path = encode(tmp_path / "a.mp4", range(200))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(VideoError, match="index is missing"):
        open_video(path)


def textured(i):
    """Noise, so that a truncated file loses frames and not just a few bytes of black."""
    return np.random.default_rng(i).integers(0, 255, (48, 64, 3), dtype=np.uint8)


@pytest.mark.parametrize("ending", ["mkv", "mp4"])
def test_a_missing_end(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    encode(path, range(200), painted=textured, front=ending == "mp4")  # the index in front, as for streaming
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 6 // 10])
    video = open_video(path)
    with pytest.warns(VideoNote, match=r"claims 20\.\d\d s, but its frames end at 1[12]"):
        frames = list(video.frames())
    assert 100 < len(frames) < 130 and video.notes
    # said once; the length is now the true one
    assert 10 < video.duration < 13
    assert len(quiet(lambda: list(video.frames()))) == len(frames)

    video = open_video(path)
    with pytest.warns(VideoNote):
        some = list(video.frames(times=[0, 5, 11, 15, 19]))
    assert [f.time for f in some] == pytest.approx([0, 5, 11], abs=0.06)  # what is not there is left out
    video = open_video(path)
    with pytest.warns(VideoNote):
        spread = sample(video, 5)
    assert len(spread) == 5 and spread[-1].time > 9.5  # over what there is


def test_most_is_missing(tmp_path):
    path = encode(tmp_path / "a.mkv", range(200), painted=textured)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 4])
    with pytest.warns(VideoNote, match="the rest is missing"):
        video = open_video(path)
        middle = sample(video, 1)
    end = list(video.frames())[-1].time
    assert 3 < end < 7
    assert [f.time for f in middle] == pytest.approx([end / 2], abs=0.15)  # of what there is


def test_an_avi_without_its_index(tmp_path):
    path = encode(tmp_path / "a.avi", range(200), painted=textured)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 6 // 10])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VideoNote)  # FFmpeg goes by the size of the file, so hardly anything is missing
        video = open_video(path)
        frames = list(video.frames())
        assert 100 < len(frames) < 130
        assert [f.time for f in frames] == pytest.approx([i / 10 for i in range(len(frames))])
        assert 10 < video.duration < 13
        with pytest.warns(VideoNote, match="claims 200 frames"):
            assert len(list(video.frames([0, 50, 199]))) == 2


def test_damage_in_the_middle(tmp_path):
    path = encode(tmp_path / "a.avi", range(100), painted=textured)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 3000] = random.Random(1).randbytes(3000)
    path.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VideoNote)
        frames = list(open_video(path).frames())
    assert len(frames) > 60
    assert all(a.time < b.time for a, b in itertools.pairwise(frames))


def test_any_damage_is_an_error_or_frames(tmp_path):
    """Random damage to every kind of container: frames or VideoError, nothing else."""
    chance = random.Random(2)
    ways = 0
    for ending, codec in (("mp4", "mpeg4"), ("mkv", "mpeg4"), ("avi", "mpeg4"), ("ts", "mpeg2video")):
        clean = encode(tmp_path / f"a.{ending}", range(30), codec).read_bytes()
        for _ in range(12):
            data = bytearray(clean)
            for _ in range(chance.randint(1, 40)):
                data[chance.randrange(len(data))] = chance.randrange(256)
            if chance.random() < 0.3:
                data = data[: chance.randrange(1, len(data))]
            (tmp_path / f"b.{ending}").write_bytes(data)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", VideoNote)
                try:
                    video = open_video(tmp_path / f"b.{ending}")
                    sample(video, 5)
                    list(video.frames([0]))
                    ways |= 1
                except VideoError:
                    ways |= 2
    assert ways == 3


def test_no_frames(tmp_path):
    path = tmp_path / "a.avi"
    data = encode(path, range(3)).read_bytes()
    # the header promises a stream, the packets are gone
    path.write_bytes(data[: data.index(b"movi") + 4])
    with pytest.raises(VideoError, match=r"no frame|cannot be read"):
        open_video(path)


def test_limits(tmp_path):
    path = encode(tmp_path / "a.mp4", range(30))
    with pytest.raises(VideoError, match=r"64 x 48 pixels; the limit is 1000 pixels \(max_pixels\)"):
        open_video(path, max_pixels=1000)
    with pytest.raises(VideoError, match=r"lasts 3 s; the limit is 2 s \(max_seconds\)"):
        open_video(path, max_seconds=2)
    assert open_video(path, max_seconds=None).exact_count() == 30
    with pytest.raises(VideoError, match="the limit is 5 s"):
        open_video([Image.new("RGB", (4, 4))] * 6, max_seconds=5)
    with pytest.raises(VideoError, match="limit is 10 pixels"):
        open_video([Image.new("RGB", (4, 4))], max_pixels=10)
    with pytest.raises(VideoError, match="times the short"):
        open_video([Image.new("RGB", (1, 400))])


def test_what_is_asked_is_checked(tmp_path):
    for video in (open_video(encode(tmp_path / "a.mp4", range(10))), open_video([Image.new("RGB", (4, 4))] * 10)):
        with pytest.raises(VideoError, match=r"frame 10 of .*10 frames"):
            video.frames([3, 10])
        with pytest.raises(VideoError, match="ascend"):
            video.frames([3, 1])
        for times in ([-1], [float("nan")], [float("inf")]):
            with pytest.raises(VideoError, match="finite"):
                video.frames(times=times)
        with pytest.raises(VideoError, match="not both"):
            video.frames([0], times=[0])
        with pytest.raises(VideoError, match="must be numbers"):
            video.frames(["a"])
        with pytest.raises(VideoError, match="must be numbers"):
            video.frames([0.5])
        assert list(video.frames([])) == list(video.frames(times=[])) == []
        assert open_video(video) is video
        assert "10 frames" in repr(video)


def test_a_folder(tmp_path):
    for i in (2, 10, 1):
        Image.fromarray(marked(i, 8, 6)).save(tmp_path / f"f{i}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / ".hidden.png").write_text("no picture")
    video = open_video(tmp_path, rate=2)
    assert (video.count, video.duration, video.size, video.rate) == (3, 1.5, (8, 6), 2.0)
    assert [seen(f) for f in video.frames()] == [1, 2, 10]  # by number, not by letter
    assert [f.time for f in video.frames()] == [0.0, 0.5, 1.0]
    assert [seen(f) for f in video.frames(times=[0.4, 0.5, 7])] == [1, 2, 10]
    (tmp_path / "f3.png").write_bytes((tmp_path / "f1.png").read_bytes()[:40])
    with pytest.raises(VideoError, match=r"picture 2 of .*f3\.png"):
        list(open_video(tmp_path).frames())
    for rate in (0, -1, float("nan"), "fast"):
        with pytest.raises(VideoError, match="rate="):
            open_video(tmp_path, rate=rate)


def test_lists_and_arrays(tmp_path):
    Image.fromarray(marked(1, 8, 6)).save(tmp_path / "a.png")
    channels_first = [torch.from_numpy(marked(i, 8, 6)).permute(2, 0, 1) for i in range(8)]
    items = [
        Image.fromarray(marked(0, 8, 6)).convert("L"),
        tmp_path / "a.png",
        (marked(2, 8, 6) / 255).astype(np.float32),
        marked(3, 8, 6)[:, :, 0],
        channels_first[4],
        channels_first[5][:1].long(),
        (channels_first[6] / 255).bfloat16(),
        np.dstack([marked(7, 8, 6), np.full((6, 8, 1), 255, np.uint8)]),
    ]
    video = open_video(items)
    assert [seen(f) for f in video.frames()] == list(range(8))
    assert all(f.image.size == (8, 6) for f in video.frames())
    clip = np.stack([marked(i, 8, 6) for i in range(5)])
    for array in (clip, torch.from_numpy(clip), torch.from_numpy(clip).permute(0, 3, 1, 2), list(clip)):
        assert [seen(f) for f in open_video(array).frames()] == list(range(5))
    assert open_video(Image.new("RGB", (4, 4))).count == 1
    assert np.asarray(next(open_video([np.eye(4, dtype=bool)]).frames()).image)[0, 0].tolist() == [255] * 3
    bad = {
        "shape": np.zeros((3, 4, 5, 6, 7)),
        "holds no picture": [],
        "NoneType": [None],
        "picture 0 of the sequence has shape": [np.zeros((2, 5, 7), np.uint8)],
        "values in": [np.full((4, 4), 300)],
        "give uint8": [np.full((4, 4), np.nan)],
        "in 0 .. 1": [np.full((4, 4, 3), 200.0)],
        "no file": ["none.png"],
    }
    for message, source in bad.items():
        with pytest.raises(VideoError, match=message):
            open_video(source)


def animation(path, durations, **options):
    frames = [Image.fromarray(marked(i, 16, 12)) for i in range(len(durations))]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0, **options)
    return path


@pytest.mark.parametrize("ending, options", [("gif", {}), ("webp", {"lossless": True}), ("png", {})])
def test_animations(tmp_path, ending, options):
    video = quiet(lambda: open_video(animation(tmp_path / f"a.{ending}", [100, 300, 50, 550], **options)))
    assert (video.count, video.size) == (4, (16, 12))
    assert video.duration == pytest.approx(1.0)
    assert [f.time for f in video.frames()] == pytest.approx([0, 0.1, 0.4, 0.45])
    assert [seen(f) for f in video.frames()] == [0, 1, 2, 3]
    assert [seen(f) for f in video.frames([1, 1, 3])] == [1, 1, 3]
    assert [seen(f) for f in video.frames(times=[0, 0.39, 0.44, 0.9, 5])] == [0, 1, 2, 3, 3]


def test_a_gif_without_times_and_a_still(tmp_path):
    video = open_video(animation(tmp_path / "a.gif", [0, 0, 0]))
    assert video.duration == pytest.approx(0.3)
    Image.new("RGB", (8, 6)).save(tmp_path / "b.jpg")
    assert (open_video(tmp_path / "b.jpg").count, open_video(str(tmp_path / "b.jpg")).size) == (1, (8, 6))
    (tmp_path / "c.jpg").write_bytes(b"no picture")
    with pytest.raises(VideoError, match="not a picture"):
        open_video(tmp_path / "c.jpg")


def test_a_png_with_a_cover(tmp_path):
    frames = [Image.fromarray(marked(i, 16, 12)) for i in range(3)]
    Image.new("RGB", (16, 12), "white").save(tmp_path / "a.png", save_all=True, append_images=frames, default_image=True)
    assert [seen(f) for f in open_video(tmp_path / "a.png").frames()] == [0, 1, 2]


def test_a_gif_cut_short(tmp_path):
    noise = [Image.fromarray(textured(i)) for i in range(10)]
    path = tmp_path / "a.gif"
    noise[0].save(path, save_all=True, append_images=noise[1:], duration=100)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.warns(VideoNote, match="cut short"):
        video = open_video(path)
    assert 0 < video.count < 10
    assert len(list(video.frames())) == video.count


def test_an_iterator_left_early_closes_its_file(tmp_path):
    video = open_video(encode(tmp_path / "a.mp4", range(30)))
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        two = video.frames(), video.frames()
        assert [seen(next(f)) for f in (*two, *two)] == [0, 0, 1, 1]  # independent of each other
        del two
        gc.collect()


def test_without_pyav(tmp_path, monkeypatch):
    path = encode(tmp_path / "a.mp4", range(3))
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(VideoError, match=r"vtprune\[video\]"):
        open_video(path)
    assert open_video(animation(tmp_path / "a.gif", [100, 100])).count == 2


HOUR = """
import gc, resource, sys
from vtprune.video import open_video, sample
video = open_video(sys.argv[1])
list(video.frames([0, 1]))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
gc.disable()  # frames in reference cycles would hide behind the collector here, and fill the memory at 4K
assert abs(video.duration - 3600) < 2, video
assert len(sample(video, 64, size=16)) == 64
assert [round(f.time) for f in video.frames(times=[0, 1800, 3599])] == [0, 1800, 3599]
assert sum(1 for _ in video.frames()) == 3600
print(peak() - before)
"""


def test_an_hour_in_bounded_memory(tmp_path):
    # 3600 frames of 128 x 96 are 133 MB decoded
    path = encode(tmp_path / "a.mp4", range(3600), size=(128, 96), rate=1, gop=60)
    done = subprocess.run([sys.executable, "-c", HOUR, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 40  # MB


def test_ten_thousand_pictures_are_not_held():
    pixels = torch.zeros(10_000, 1, 1, 3, dtype=torch.uint8).expand(-1, 64, 64, -1)  # no memory of their own
    video = open_video(pixels, rate=30)
    assert isinstance(video, Video) and video.count == 10_000
    alive = collections.Counter()
    for frame in video.frames():
        alive["now"] += 1
        weakref.finalize(frame.image, alive.subtract, ["now"])
        assert alive["now"] <= 3
    assert frame.index == 9_999
