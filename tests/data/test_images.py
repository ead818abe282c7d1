import io
import struct
import zlib

import numpy as np
import pytest
import torch
from helpers import gradient, save, truncate, write_csv_data
from PIL import Image

from retinanet.data import checks
from retinanet.data import images as pictures
from retinanet.data.csv import CSVDataset
from retinanet.data.images import read_header, read_image
from retinanet.data.loader import make_loader
from retinanet.errors import UserError


def tiff_exif(value, kind=3):
    """An EXIF block that holds an orientation alone, of a TIFF type: 2 text, 3 short, 4 long."""
    return b"Exif\0\0II*\0" + struct.pack("<IHHHIII", 8, 1, 0x0112, kind, 1, value, 0)


def jpeg_with(exif, path, size=(24, 40)):
    """Save a JPEG with an EXIF block put in as it is."""
    buffer = io.BytesIO()
    Image.fromarray(gradient(*size)).save(buffer, "JPEG", quality=95)
    content = buffer.getvalue()
    path.write_bytes(content[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + content[2:])
    return path


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_pillow_reads_a_jpeg_as_torchvision_does(tmp_path, monkeypatch, mode):
    path = tmp_path / "a.jpg"
    Image.fromarray(gradient(33, 50)).convert(mode).save(path)
    expected = read_image(path)
    monkeypatch.setattr(pictures, "decode_jpeg", None)
    np.testing.assert_array_equal(read_image(path), expected)


@pytest.mark.parametrize(("value", "kind"), [(0, 3), (9, 3), (65535, 3), (65537, 4), (65542, 4), (6, 2), (6, 99)])
@pytest.mark.parametrize("whole", [True, False])
def test_an_invalid_orientation_does_not_turn_and_is_reported(tmp_path, value, kind, whole):
    path = jpeg_with(tiff_exif(value, kind), tmp_path / "a.jpg")
    if not whole:  # something after its end: the other reader
        path.write_bytes(path.read_bytes() + b"trailer")
    assert read_image(path).shape == (24, 40, 3) and read_header(path)[:2] == (24, 40)
    files = write_csv_data(tmp_path, ["a.jpg,1,1,9,9,circle"])
    expected = {} if kind == 99 else {"invalid EXIF orientation": 1}  # Pillow skips an unknown type
    report = checks.check_dataset(CSVDataset(*files), training=False)
    assert report.counts == expected


@pytest.mark.parametrize("kind", [3, 4])
@pytest.mark.parametrize("trailer", [b"", b"trailer"])
def test_both_jpeg_readers_turn_alike(tmp_path, kind, trailer):
    path = jpeg_with(tiff_exif(6, kind), tmp_path / "a.jpg")
    path.write_bytes(path.read_bytes() + trailer)
    expected = np.rot90(gradient(24, 40), -1)
    image = read_image(path)
    assert image.shape == expected.shape == (40, 24, 3)
    assert np.abs(image.astype(int) - expected).max() < 12
    assert read_header(path) == (40, 24, 6)


@pytest.mark.parametrize("suffix", ["tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_other_formats_are_turned_once(tmp_path, suffix, orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    path = save(
        gradient(24, 40), tmp_path / f"a.{suffix}", exif=tags, **({"lossless": True} if suffix == "webp" else {})
    )
    undo = pictures.TURNS[{6: 8, 8: 6}.get(orientation, orientation)]
    np.testing.assert_array_equal(undo(read_image(path)), gradient(24, 40))
    assert read_header(path)[:2] == read_image(path).shape[:2]


def test_what_a_file_is_counts_not_what_it_is_called(tmp_path):
    for name, format in (("a.jpg", "PNG"), ("b.png", "JPEG"), ("no suffix", "BMP")):
        Image.fromarray(gradient(24, 40)).save(tmp_path / name, format)
        assert np.abs(read_image(tmp_path / name).astype(int) - gradient(24, 40)).max() < 16


@pytest.mark.parametrize("name", ["a#b=c d.png", "ä é 日本.jpg", " a.png", "%41;.png"])
def test_names_may_hold_any_sign(tmp_path, name):
    save(gradient(24, 40), tmp_path / name)
    data = CSVDataset(*write_csv_data(tmp_path / "data", [f"{tmp_path}/{name},1,1,9,9,circle"]))
    assert data[0]["img"].shape == (24, 40, 3)


def test_the_first_picture_of_an_mpo_counts(tmp_path):
    first, second = Image.fromarray(gradient(24, 40)), Image.fromarray(gradient(10, 10))
    first.save(tmp_path / "a.mpo", save_all=True, append_images=[second], quality=95)
    with Image.open(tmp_path / "a.mpo") as image:
        assert image.format == "MPO" and image.n_frames == 2
    assert np.abs(read_image(tmp_path / "a.mpo").astype(int) - gradient(24, 40)).max() < 12


def png_of_size(width, height, path):
    """A PNG that says that it is large, and holds one row."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(width + 1))) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    return path


@pytest.mark.parametrize("read", [read_image, read_header])
def test_a_picture_above_the_limit_is_refused_with_the_limit(tmp_path, read, monkeypatch):
    with pytest.raises(UserError, match=r"bomb\.png: .*limit of 178,?956,?970"):
        read(png_of_size(60_000, 60_000, tmp_path / "bomb.png"))
    monkeypatch.setattr(pictures, "MAX_PIXELS", 100)
    for name in ("a.png", "a.jpg"):
        save(gradient(10, 10), tmp_path / name)
        assert read(tmp_path / name)[0] is not None
        save(gradient(10, 11), tmp_path / name)
        with pytest.raises(UserError, match=rf"{name}: has 11 x 10 pixels, more than the limit of 100 "):
            read(tmp_path / name)


def test_a_compressed_text_bomb_is_refused(tmp_path):
    path = png_of_size(4, 1, tmp_path / "text.png")
    content = path.read_bytes()
    text = b"zTXt" + b"a\0\0" + zlib.compress(bytes(100_000_000))
    chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    path.write_bytes(content[:33] + chunk + content[33:])
    with pytest.raises(UserError, match=r"text\.png: cannot be read as a picture"):
        read_image(path)


def test_formats_whose_readers_start_programs_are_refused(tmp_path):
    Image.fromarray(gradient(24, 40)).save(tmp_path / "a.eps")
    with pytest.raises(UserError, match=r"a\.eps: cannot be read as a picture"):
        read_image(tmp_path / "a.eps")


def test_what_is_no_file_is_refused(tmp_path):
    for path in ("/dev/zero", tmp_path, "a\0b", "\ud800", "x" * 5000):
        with pytest.raises(UserError, match="cannot be read as a picture"):
            read_image(path)


def test_an_error_in_a_worker_names_the_picture(tmp_path):
    data = CSVDataset(*write_csv_data(tmp_path, ["a.png,1,1,9,9,circle", "b.png,1,1,9,9,circle"]))
    truncate(tmp_path / "b.png")
    with pytest.raises(UserError, match=r"b\.png: cannot be read as a picture"):
        list(make_loader(data, 1, workers=1))


def test_boxes_are_clipped_to_the_picture_and_dropped_outside_it(tmp_path):
    lines = [
        "a.png,-3,-4,10,12,circle",
        "a.png,50,40,90,80,circle",
        "a.png,64,10,70,20,circle",
        "a.png,63.5,1,80,9,circle",
    ]
    data = CSVDataset(*write_csv_data(tmp_path, lines))  # a.png is 64 wide, 48 high
    assert data[0]["annot"].tolist() == [[0, 0, 10, 12, 0], [50, 40, 64, 48, 0]]
    assert len(data.load_annotations(0)) == 4
    assert torch.as_tensor(data[0]["annot"]).dtype == torch.float32
