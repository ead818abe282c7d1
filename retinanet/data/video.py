"""Videos -> frames, and drawn frames -> videos, without audio; needs PyAV."""

import contextlib
import os
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from retinanet.data.report import FileError, counted
from retinanet.errors import UserError, output_file
from retinanet.process import log

VIDEO_SUFFIXES = {
    *(".3gp", ".asf", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".mxf", ".ogv"),
    *(".ts", ".vob", ".webm", ".wmv"),
}
# Encoders of H.264 with their options; the first that PyAV has is used. Frames are converted to the YUV of BT.709.
ENCODERS = {
    "libx264": {"colorspace": "bt709", "crf": "20", "preset": "veryfast"},
    "libopenh264": {"colorspace": "bt709"},
}
MISSING_SECONDS, MISSING_SHARE = 0.5, 0.02  # a video that lacks more than the larger of these at its end is damaged


class Frame(NamedTuple):
    """A frame of a video."""

    image: np.ndarray  # [H, W, 3] uint8 RGB, upright
    number: int  # in the video, from 0
    seconds: Fraction  # since the first frame


def is_video(path: str | Path) -> bool:
    """Whether a file is named like a video."""
    return Path(path).suffix.lower() in VIDEO_SUFFIXES


class Video:
    """The frames of a video file, upright; every iteration reads the file anew.

    A damaged file is read as far as possible, with one warning.

    Args:
        every: give only frames 0, `every`, 2 * `every`, ...

    Raises:
        UserError: PyAV is not installed.
        FileError: the file is missing or not a video, or no frame can be read.
    """

    def __init__(self, path: str | Path, every: int = 1):
        try:
            import av
        except ImportError as error:
            raise UserError(f"{path}: videos need PyAV: pip install av") from error
        self.path, self.every, self.av = str(path), every, av
        with self._open() as container:
            stream = container.streams.best("video")
            if stream is None:
                raise FileError(self.path, "has streams, but no video among them")
            self.rate = stream.average_rate or stream.guessed_rate or Fraction(25)  # frames per second
            self.time_base = stream.time_base or 1 / self.rate  # seconds per tick
            self.pixel_aspect = stream.sample_aspect_ratio or Fraction(1)  # width / height, as stored
            ticks, microseconds = stream.duration or 0, container.duration or 0
            self.duration = float(ticks * self.time_base or Fraction(microseconds, av.time_base))  # 0: unknown
            total = stream.frames or round(self.duration * self.rate)
            self.total = -(-total // every) or None  # expected number of frames, according to the file

    def _open(self) -> Any:
        if not os.path.exists(self.path):  # noqa: PTH110, pathlib raises errors of its own for impossible names
            raise FileError(self.path, "the file does not exist")
        try:  # as a local file only, because FFmpeg also follows URLs, and playlists of them
            return self.av.open(f"file:{self.path}", options={"protocol_whitelist": "file"}, metadata_errors="replace")
        except self.av.FFmpegError as error:
            raise FileError(self.path, f"cannot be read as a video ({error.strerror})") from error

    def __iter__(self) -> Iterator[Frame]:
        count, start, seconds, end, damage = 0, None, Fraction(0), Fraction(0), []
        with self._open() as container:
            for frame in self._decode(container, damage):
                time = None if frame.pts is None else frame.pts * frame.time_base
                start = time if start is None else start
                seconds = max(seconds, end if time is None else time - start)
                end = seconds + (frame.duration * frame.time_base if frame.duration else 1 / self.rate)
                if count % self.every == 0:
                    image = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
                    yield Frame(np.ascontiguousarray(image), count, seconds)
                count += 1
        if not count:
            raise FileError(self.path, "has no frame that can be read")
        missing = self.duration - end
        if damage or missing > max(MISSING_SECONDS, MISSING_SHARE * self.duration):
            of = f" of {self.duration:.1f} s" if missing > 0 else ""
            found = counted(count, "frame")
            log.warning("warning: %s is damaged: %s could be read, up to %.1f s%s", self.path, found, end, of)

    def _decode(self, container: Any, damage: list[str]) -> Iterator[Any]:
        """All frames that can be decoded, in order; messages of errors are added to `damage`."""
        stream = container.streams.best("video")
        stream.thread_type = "AUTO"  # decodes in several threads
        packets = container.demux(stream)
        while True:
            try:
                yield from next(packets).decode()
            except StopIteration:
                return
            except self.av.FFmpegError as error:
                damage.append(error.strerror)  # other packets may follow


@contextlib.contextmanager
def video_writer(path: str | Path, video: Video) -> Iterator[Callable[[np.ndarray, Fraction], None]]:
    """Open an mp4 file (H.264) for drawn frames of `video`; yields a function of a frame and its time since the first.

    Frames are [H, W, 3] uint8. Their sides are made even, as H.264 needs, by repeating the last row or column. Frames
    that differ in size from the first are scaled to its size.
    """
    av, stream = video.av, None

    def write(image: np.ndarray, seconds: Fraction) -> None:
        nonlocal stream
        height, width = image.shape[:2]
        image = np.pad(image, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        if stream is None:  # it has the size of the first frame
            name = next((name for name in ENCODERS if name in av.codecs_available), None)
            if name is None:
                raise UserError(f"{path}: cannot be written, because this PyAV has no H.264 encoder")
            stream = container.add_stream(name, rate=video.rate, options=ENCODERS[name])
            (stream.height, stream.width), stream.pix_fmt = image.shape[:2], "yuv420p"
            stream.codec_context.time_base = video.time_base
            stream.codec_context.sample_aspect_ratio = video.pixel_aspect
        frame = av.VideoFrame.from_ndarray(image, format="rgb24")
        frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709")
        frame.time_base = stream.codec_context.time_base
        frame.pts = round(seconds / frame.time_base)
        container.mux(stream.encode(frame))

    try:
        with av.open(f"file:{output_file(path)}", "w", format="mp4") as container:
            try:
                yield write
            finally:
                if stream:
                    container.mux(stream.encode(None))
    except av.FFmpegError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error
