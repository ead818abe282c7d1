import sys
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
from helpers import frame_image, truncate, write_clip

from retinanet.data import video
from retinanet.data.report import FileError
from retinanet.data.video import Video, is_video, video_writer
from retinanet.errors import UserError

av = pytest.importorskip("av", reason="NO TEST OF VIDEOS: pip install av")


def square(image):
    """x, y of the white square."""
    ys, xs = (image.min(axis=2) > 128).nonzero()
    return xs.min(), ys.min()


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi", "a.ts"])
def test_frames_come_in_order_with_numbers_and_times(tmp_path, name, caplog):
    clip = Video(write_clip(tmp_path / name, codec="mpeg4" if name == "a.avi" else "libx264"))
    for _ in range(2):  # it can be read again
        frames = list(clip)
        assert [frame.number for frame in frames] == list(range(12))
        assert [float(frame.seconds) for frame in frames] == pytest.approx([number / 25 for number in range(12)])
        assert [square(frame.image) for frame in frames] == [(2 * number, 8) for number in range(12)]
        assert np.abs(frames[0].image[30, 30].astype(int) - (0, 160, 0)).max() < 8
    assert caplog.text == "" and clip.total == 12


def test_every_third_frame_keeps_its_time(tmp_path):
    clip = Video(write_clip(tmp_path / "a.mp4", ticks=range(11)), every=3)
    assert [(frame.number, float(frame.seconds)) for frame in clip] == [(0, 0), (3, 0.12), (6, 0.24), (9, 0.36)]
    assert clip.total == 4


def test_a_turned_clip_is_upright(tmp_path):
    # Counterclockwise by 90 degrees: what was at the right is at the top.
    frames = list(Video(write_clip(tmp_path / "a.mp4", rotation=90)))
    assert frames[0].image.shape == (64, 40, 3)
    assert square(frames[3].image) == (8, 64 - 6 - 8)


@pytest.mark.parametrize("encoder", list(video.ENCODERS))
@pytest.mark.parametrize(
    ("ticks", "time_base"), [([0, 1, 7, 8, 30], Fraction(1, 30)), ([5, 95, 400], Fraction(1, 1000))]
)
def test_a_written_clip_has_the_times_of_its_source(tmp_path, monkeypatch, encoder, ticks, time_base):
    if encoder not in av.codecs_available:
        pytest.skip(f"PyAV without {encoder}")
    monkeypatch.setattr(video, "ENCODERS", {encoder: video.ENCODERS[encoder]})
    source = Video(write_clip(tmp_path / "a.mkv", ticks, time_base, size=(41, 65), codec="ffv1"))
    with video_writer(tmp_path / "b.mp4", source) as write:
        for frame in source:
            write(frame.image, frame.seconds)
    written = list(Video(tmp_path / "b.mp4"))
    expected = [float(frame.seconds) for frame in source]
    assert expected == pytest.approx(
        [float((tick - ticks[0]) * time_base) for tick in ticks], abs=6e-4
    )  # mkv: 1/1000 s
    assert [float(frame.seconds) for frame in written] == pytest.approx(expected, abs=1e-5)
    for number, frame in enumerate(written):
        assert frame.image.shape == (42, 66, 3)  # even
        assert np.abs(frame.image[:41, :65].astype(int) - frame_image(number, 41, 65)).mean() < 4
    with av.open(str(tmp_path / "b.mp4")) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        assert len(container.streams) == 1


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4"])
def test_a_truncated_video_is_read_as_far_as_possible_with_one_warning(tmp_path, caplog, name):
    options = {"movflags": "+faststart"} if name == "a.mp4" else {}
    path = write_clip(tmp_path / name, range(0, 250, 10), noise=120, **options)  # 10 seconds
    truncate(path, 0.6)
    frames = list(Video(path))
    assert 3 <= len(frames) < 25 and [frame.number for frame in frames] == list(range(len(frames)))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"{path} is damaged: {len(frames)} frames" in caplog.text and "of 9.6 s" in caplog.text


def test_broken_packets_are_left_out_with_one_warning(tmp_path, caplog):
    path = write_clip(tmp_path / "a.mp4", range(25))
    with av.open(str(path)) as container:
        starts = [packet.pos for packet in container.demux(video=0) if packet.size]
    content = bytearray(path.read_bytes())
    for start in starts[10:12]:
        content[start : start + 4] = b"\x7f\xff\xff\xff"  # the length of what follows
    path.write_bytes(content)
    assert 10 < len(list(Video(path))) < 25
    assert len(caplog.records) == 1 and "is damaged" in caplog.text


@pytest.mark.parametrize("content", [b"", b"no video\n" * 100, b"#EXTM3U\n#EXTINF:1,\nhttp://localhost/a.ts\n"])
def test_a_file_that_is_not_a_video_is_an_error_that_names_it(tmp_path, content):
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    with pytest.raises(FileError, match=r"a\.mp4: cannot be read as a video"):
        list(Video(path))
    with pytest.raises(FileError, match="does not exist"):
        Video(tmp_path / "http:b.mp4")


def test_without_pyav_one_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r"a\.mp4: videos need PyAV: pip install av"):
        Video(tmp_path / "a.mp4")


def test_a_clip_that_cannot_be_written_is_an_error_that_names_it(tmp_path):
    source = Video(write_clip(tmp_path / "a.mkv"))
    with (
        pytest.raises(UserError, match=r"b\.mp4: cannot be written"),
        video_writer(tmp_path / "no" / "b.mp4", source) as write,
    ):
        write(frame_image(0), Fraction(0))


def test_memory_does_not_grow_with_the_length(tmp_path):
    peaks = []
    for number in (10, 60):
        source = Video(write_clip(tmp_path / f"{number}.mkv", range(number), codec="mpeg4", size=(64, 128)))
        tracemalloc.start()
        with video_writer(tmp_path / "out.mp4", source) as write:
            for frame in source:
                write(frame.image, frame.seconds)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]


def test_videos_are_recognised_by_name():
    assert is_video("a.MP4") and is_video("b.webm") and not is_video("a.gif") and not is_video("mp4")
