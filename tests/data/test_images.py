import builtins
import importlib.util
import io
import struct
import unicodedata
import warnings
import zlib

import numpy as np
import pytest
import tifffile
from helpers import coco_content, exif, gradient, save, truncate, write_coco_data, write_csv_data
from PIL import Image, ImageOps

from retinanet.data import checks, images
from retinanet.data.coco import CocoDataset
from retinanet.data.csv import CSVDataset
from retinanet.data.files import explain_missing, list_images
from retinanet.data.images import choose_pixel_range, open_image, read_header, read_image
from retinanet.errors import UserError, escaped

GRADIENT = gradient(24, 40)


def png_chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(path, width, height, bits, data, kind=0):
    """Write a PNG with any header; `kind` is 0 for grey, 2 for RGB, 4 for grey and alpha, 6 for RGBA."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0))
    end = png_chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(data)) + end)
    return path


def fresh_module():
    """The module `images`, imported afresh."""
    spec = importlib.util.spec_from_file_location("fresh", images.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Pixels


def palette():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 0])
    image.putpixel((1, 0), 1)
    return image, [[[10, 20, 30], [200, 100, 0]]]


def black_and_white():
    image = Image.new("1", (2, 1))
    image.putpixel((1, 0), 1)
    return image, [[[0] * 3, [255] * 3]]


def with_alpha(pixels, alpha):
    return Image.fromarray(np.concatenate([pixels, np.full((24, 40, 1), alpha, np.uint8)], axis=2))


@pytest.mark.parametrize(
    ("name", "image", "expected"),
    [
        ("rgb.png", Image.fromarray(GRADIENT), GRADIENT),
        ("grey.png", Image.fromarray(GRADIENT[..., 0]), GRADIENT[..., [0, 0, 0]]),
        ("grey_alpha.png", with_alpha(GRADIENT[..., :1], 99), GRADIENT[..., [0, 0, 0]]),
        *((f"alpha{alpha}.png", with_alpha(GRADIENT, alpha), GRADIENT) for alpha in (0, 128, 255)),
        ("palette.png", *palette()),
        ("bits.png", *black_and_white()),
    ],
)
def test_every_mode_becomes_rgb(tmp_path, name, image, expected):
    image.save(tmp_path / name)
    pixels = read_image(tmp_path / name)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, expected)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_all_decoders_of_jpeg_give_the_pixels_of_pillow(tmp_path, monkeypatch, mode):
    path = tmp_path / "a.jpg"
    source = Image.fromarray(gradient(33, 50)).convert(mode)
    source.save(path, quality=95)
    with Image.open(path) as saved:
        assert saved.mode == mode
        expected = np.asarray(saved.convert("RGB"))
    assert np.abs(expected.astype(int) - np.asarray(source.convert("RGB"))).mean() < 3  # and not inverted
    used = []
    for name, decoder in images.JPEG_DECODERS.items():
        decoders = {name: lambda data, name=name, decoder=decoder: used.append(name) or decoder(data)}
        with monkeypatch.context() as patch:
            patch.setattr(images, "JPEG_DECODERS", decoders)
            np.testing.assert_array_equal(read_image(path), expected, name)
    assert used == list(images.JPEG_DECODERS)
    monkeypatch.setattr(images, "JPEG_DECODERS", {})
    np.testing.assert_array_equal(read_image(path), expected)


@pytest.mark.parametrize("error", [ImportError, OSError, RuntimeError, AttributeError])
def test_a_decoder_that_cannot_be_imported_is_left_out(monkeypatch, error):
    real_import = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("torchcodec"):
            raise error("libavutil.so.60: cannot open shared object file")
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert list(fresh_module().JPEG_DECODERS) == ["torchvision"]


def test_every_format_is_read_and_can_be_written_to(tmp_path):
    for name in ("a.bmp", "a.gif", "a.jpg", "a.png", "a.ppm", "a.tif", "a.webp"):
        pixels = read_image(save(GRADIENT, tmp_path / name))
        assert np.abs(pixels.astype(int) - GRADIENT).mean() < 5, name
        pixels[:] = 0


def test_the_content_decides_not_the_name(tmp_path):
    for name, kind in (("a.jpg", "PNG"), ("b.png", "JPEG"), ("no suffix", "BMP")):
        Image.fromarray(GRADIENT).save(tmp_path / name, kind)
        assert np.abs(read_image(tmp_path / name).astype(int) - GRADIENT).max() < 16


@pytest.mark.parametrize("name", ["a#b=c d.png", "ä é 日本.jpg", " a.png", "%41;.png"])
def test_names_may_hold_any_character(tmp_path, name):
    save(GRADIENT, tmp_path / name)
    data = CSVDataset(*write_csv_data(tmp_path / "data", [f"{tmp_path}/{name},1,1,9,9,circle"]))
    assert data[0]["img"].shape == (24, 40, 3)


def test_the_first_image_of_an_mpo_is_read(tmp_path):
    others = [Image.fromarray(gradient(10, 10))]
    Image.fromarray(GRADIENT).save(tmp_path / "a.mpo", save_all=True, append_images=others, quality=95)
    with Image.open(tmp_path / "a.mpo") as image:
        assert image.format == "MPO" and image.n_frames == 2
    assert np.abs(read_image(tmp_path / "a.mpo").astype(int) - GRADIENT).max() < 12


# Pixels of all depths


def ramp(bits, bands=1):
    """[H, W, C] uint16 from 0 to 2 ** bits - 1, rising along x in band 1 and along y in band 2, flat in the others."""
    y, x = np.mgrid[:40, :64]
    top = 2**bits - 1
    return np.stack([x * top // 63, y * top // 39, x * 0 + top // 4, y * 0 + 9, x * 0][:bands], axis=2).astype(
        np.uint16
    )


def tif(path, values, **options):
    values = values[:, :, 0] if values.shape[-1] == 1 else values
    defaults = {"photometric": "minisblack"}
    if values.ndim == 3 and values.shape[2] <= 6:
        defaults = {"photometric": "rgb" if values.shape[2] > 2 else "minisblack", "planarconfig": "contig"}
    tifffile.imwrite(path, values, **defaults | options)
    return path


def test_12_bits_are_scaled_alike_in_all_formats(tmp_path):
    grey, colour = ramp(12), ramp(12, 3)
    files = {
        "a.png": Image.fromarray(grey[:, :, 0]),
        "b.tif": Image.fromarray(grey[:, :, 0]),
        "c.tif": ({"compression": "tiff_lzw"}, Image.fromarray(grey[:, :, 0])),
    }
    for name, image in files.items():
        options, image = image if isinstance(image, tuple) else ({}, image)
        image.save(tmp_path / name, **options)
    (tmp_path / "d.pgm").write_bytes(b"P5 64 40 4095\n" + grey.astype(">u2").tobytes())
    (tmp_path / "e.ppm").write_bytes(b"P6 64 40 4095\n" + colour.astype(">u2").tobytes())
    (tmp_path / "f.pgm").write_text("P2 64 40 4095\n" + " ".join(map(str, grey.ravel())))
    alpha = np.full_like(grey, 77)
    for name, bands, kind in (("g", [colour], 2), ("d_alpha", [grey, alpha], 4), ("g_alpha", [colour, alpha], 6)):
        rows = b"".join(b"\0" + row.tobytes() for row in np.dstack(bands).astype(">u2"))
        png(tmp_path / f"{name}.png", 64, 40, 16, rows, kind)
    for name, values, options in (
        ("h.tif", grey, {"byteorder": ">"}),
        ("i.tif", colour, {}),
        ("j.tif", colour, {"compression": "zlib", "predictor": True, "tile": (16, 16)}),
        ("k.tif", colour, {"bigtiff": True, "byteorder": ">", "compression": "zlib", "predictor": True}),
        ("l.tif", np.moveaxis(colour, -1, 0), {"photometric": "rgb", "planarconfig": "separate", "tile": (16, 32)}),
        ("m.tif", ramp(12, 5), {"photometric": "minisblack"}),
        ("n.tif", np.stack([grey[..., 0]] * 3), {"photometric": "minisblack"}),  # three pages
        ("o.tif", ramp(12, 2), {}),
        ("p.tif", 4095 - grey, {"photometric": "miniswhite"}),
        ("q.tif", grey.astype(np.int32) - 70_000, {}),
        ("r.tif", (colour / 4095).astype(np.float16), {}),
        ("s.tif", colour.astype(np.float64) * 1e6, {}),
    ):
        tif(tmp_path / name, values, **options)
    expected = np.rint(ramp(12, 3) * (255 / 4095))
    for path in sorted(tmp_path.iterdir()):
        pixels = read_image(path)
        is_colour = path.name[0] in "egijklmrs"
        wanted = expected if is_colour else expected[:, :, [0, 0, 0]]
        assert np.abs(pixels - wanted).max() <= 1, path.name  # the ends of the range are percentiles
        assert read_header(path) == (40, 64, 1)
        np.testing.assert_array_equal(open_image(path)[3:7, 5:30], pixels[3:7, 5:30])
        if path.name[0] < "p":  # the others have different units
            exact = read_image(path, (0, 4095))
            np.testing.assert_array_equal(exact, wanted, path.name)
            half = read_image(path, (0, 8190))
            np.testing.assert_array_equal(
                half, np.rint(ramp(12, 3) * (255 / 8190))[:, :, [0, 1, 2] if is_colour else [0] * 3]
            )


@pytest.mark.parametrize("orientation", range(1, 10))
def test_deep_tiff_files_are_turned_upright(tmp_path, orientation):
    path = tif(tmp_path / "a.tif", ramp(12, 3), extratags=[(274, 3, 1, orientation, True)])
    upright = Image.fromarray(np.rint(ramp(12, 3) * (255 / 4095)).astype(np.uint8))
    upright.getexif().update(exif(orientation))
    expected = np.asarray(ImageOps.exif_transpose(upright))
    np.testing.assert_array_equal(read_image(path, (0, 4095)), expected)
    assert read_header(path) == (*expected.shape[:2], orientation if orientation < 9 else 1)


def test_the_orientation_of_a_deep_tiff_that_pillow_reads_is_known(tmp_path):
    path = tmp_path / "a.tif"
    Image.fromarray(ramp(12)[:, :, 0]).save(path, compression="tiff_lzw", tiffinfo={274: 6})
    upright = np.rot90(np.rint(ramp(12)[:, :, 0] * (255 / 4095)), -1)
    np.testing.assert_array_equal(read_image(path, (0, 4095))[:, :, 0], upright)
    assert read_header(path) == (64, 40, 6)


def test_deep_png_files_are_turned_upright(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(ramp(12)[:, :, 0]).save(path, exif=exif(6))
    upright = np.rot90(np.rint(ramp(12)[:, :, 0] * (255 / 4095)), -1)
    np.testing.assert_array_equal(read_image(path, (0, 4095))[:, :, 0], upright)
    assert read_header(path) == (64, 40, 6)


def test_8_bits_stay_as_they_are_in_any_range(tmp_path):
    for name, values in (("a.png", GRADIENT), ("b.tif", GRADIENT), ("c.jpg", GRADIENT)):
        save(values, tmp_path / name)
        np.testing.assert_array_equal(read_image(tmp_path / name, (100, 4095)), read_image(tmp_path / name))
    bands = np.dstack([GRADIENT, GRADIENT[:, :, ::-1]])
    np.testing.assert_array_equal(read_image(tif(tmp_path / "d.tif", bands, photometric="minisblack")), GRADIENT)
    planes = np.moveaxis(bands, -1, 0)
    path = tif(tmp_path / "e.tif", planes, photometric="minisblack", planarconfig="separate")
    np.testing.assert_array_equal(read_image(path, (0, 9)), GRADIENT)


def test_missing_pixels_become_black_and_do_not_affect_the_range(tmp_path):
    values = ramp(12)[:, :, 0].astype(np.float32)
    for missing, tags in ((np.nan, ()), (-9999, ()), (-3.4e38, ()), (77777.1, [(42113, 2, 0, "77777.1", True)])):
        holes = values.copy()
        holes[:9, :50] = missing
        pixels = read_image(tif(tmp_path / "a.tif", holes, extratags=tags))
        assert (pixels[:9, :50] == 0).all(), missing
        assert np.abs(pixels[9:, :, 0] - values[9:] * (255 / 4095)).max() < 1.5, missing
    values[0, :2] = np.inf, -np.inf
    assert read_image(tif(tmp_path / "a.tif", values))[0, :3, 0].tolist() == [255, 0, 8]
    for constant in (0, 7, -2.5, np.nan):  # must not fail, nor amplify rounding
        pixels = read_image(tif(tmp_path / "a.tif", np.full((9, 9), constant, np.float32)))
        assert len(np.unique(pixels)) == 1


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ([], None),
        ([(281, 3, 1, 8191, True)], (0, 8191)),  # MaxSampleValue
        ([(280, 3, 1, 50, True), (281, 3, 1, 6000, True)], (50, 6000)),
        ([(340, 3, 1, 10, True), (341, 3, 1, 5000, True)], (10, 5000)),  # SMinSampleValue, SMaxSampleValue
        ([(281, 3, 1, 65535, True)], None),  # no more than the type says
        ([(281, 3, 1, 1, True)], None),  # all would be white
        ([(280, 3, 1, 60000, True), (281, 3, 1, 65000, True)], None),  # all would be black
    ],
)
def test_a_declared_range_is_used_unless_it_hides_the_image(tmp_path, tags, expected):
    path = tif(tmp_path / "a.tif", ramp(12), extratags=tags)
    low, high = choose_pixel_range([path])["uint16"]
    assert (low, high) == expected if expected else (0 <= low < 10 and 4085 < high <= 4095)
    np.testing.assert_array_equal(read_image(path), read_image(path, (low, high)))


def test_png_and_pgm_declare_their_bits(tmp_path):
    dark = ramp(12) // 3
    (tmp_path / "a.pgm").write_bytes(b"P5 64 40 4095\n" + dark.astype(">u2").tobytes())
    Image.fromarray(dark[:, :, 0]).save(tmp_path / "a.png")
    (tmp_path / "b.pgm").write_text("P2 64 40 4095\n" + " ".join(map(str, dark.ravel())))
    declared = {"uint16": (0, 4095)}
    assert choose_pixel_range([tmp_path / "a.pgm"]) == choose_pixel_range([tmp_path / "b.pgm"]) == declared
    assert choose_pixel_range([tmp_path / "a.png"]) != declared
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(content[:33] + png_chunk(b"sBIT", b"\x0c") + content[33:])
    assert choose_pixel_range([tmp_path / "a.png"]) == declared


def test_images_of_one_type_share_one_range(tmp_path, caplog):
    caplog.set_level("INFO")
    for index, name in enumerate(("a.tif", "b.tif", "c.png")):
        Image.fromarray(ramp(12)[:, :, 0] // (1 + index)).save(tmp_path / name)
    save(GRADIENT, tmp_path / "d.png")
    save(np.dstack([GRADIENT, GRADIENT[:, :, :1]]), tmp_path / "e.png")
    rows = [f"{name},1,1,9,9,circle" for name in ("a.tif", "b.tif", "c.png", "d.png", "e.png")]
    data = CSVDataset(*write_csv_data(tmp_path, rows))
    with data.scaled():
        low, high = data.pixel_range["uint16"]
        assert low < 10 and 4000 < high <= 4095
        for index in range(3):
            expected = (ramp(12)[:, :, 0] // (1 + index) - low) * 255 / (high - low)
            assert np.abs(data[index]["img"][:, :, 0] - expected.clip(0, 255)).max() <= 0.5
        np.testing.assert_array_equal(data[3]["img"], GRADIENT)
    assert data.pixel_range is None
    messages = [record.message for record in caplog.records]
    assert len(messages) == 2 and "e.png" in messages[0] and "pixels of uint16" in messages[1]
    tif(tmp_path / "b.tif", ramp(12) // 4095)
    with data.scaled((0, 4095)):
        assert data.pixel_range == (0, 4095) and "1 of 3 images of uint16 are nearly black" in caplog.text
    data.pixel_range = (5, 6)
    with data.scaled((0, 4095)):
        assert data.pixel_range == (5, 6)


def test_each_type_has_its_own_range(tmp_path):
    grey = ramp(12)[:, :, 0]
    values = {"a.tif": grey, "b.tif": grey / np.float32(4095), "c.tif": grey.astype(np.int32) * 1000}
    for name, array in values.items():
        tif(tmp_path / name, array)
    data = CSVDataset(*write_csv_data(tmp_path, [f"{name},1,1,9,9,circle" for name in values]))
    with data.scaled():
        assert data.pixel_range.keys() == {"uint16", "float32", "int32"}
        for index in range(3):
            assert np.abs(data[index]["img"][:, :, 0] - grey * (255 / 4095)).max() <= 1
    with data.scaled({"uint16": (0, 8190)}):  # of a model: what it has not seen is chosen here
        assert data.pixel_range["uint16"] == (0, 8190) and data.pixel_range["float32"][1] > 0.99
        assert [data[index]["img"].max() for index in range(3)] == [128, 255, 255]


@pytest.mark.parametrize("name", ["z.tif", "z.png", "z.pgm"])
def test_a_deep_image_among_very_many_others_is_found(tmp_path, monkeypatch, name):
    monkeypatch.setattr(images, "LOOKS", 2)
    for index in range(5):
        save(GRADIENT, tmp_path / f"{index}.png")
    Image.fromarray(ramp(12)[:, :, 0]).save(tmp_path / name)
    files = sorted(tmp_path.iterdir())
    assert choose_pixel_range([files[0], files[-1], *files[1:-1]]).keys() == {"uint16"}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rowsperstrip": 7},
        {"tile": (16, 32)},
        {"compression": "zlib", "rowsperstrip": 7, "predictor": True},
        {"compression": "zlib", "tile": (32, 16), "bigtiff": True, "byteorder": ">"},
    ],
)
@pytest.mark.parametrize("kind", ["uint8", "uint16", "float32", "planes"])
def test_parts_of_a_large_tiff_are_those_of_the_whole(tmp_path, monkeypatch, options, kind):
    values = np.random.default_rng(0).integers(0, 256, (70, 90, 3)).astype("uint8" if kind == "planes" else kind)
    options = {name: value for name, value in options.items() if name != "predictor" or kind != "float32"}
    if kind == "planes":
        options, values = options | {"planarconfig": "separate"}, np.moveaxis(values, -1, 0)
    path = tif(tmp_path / "a.tif", values, photometric="rgb", **options)
    whole = read_image(path, (0, 255))
    monkeypatch.setattr(images, "LARGE", 0)
    image = open_image(path, (0, 255))
    assert not isinstance(image, np.ndarray) and image.shape == (70, 90, 3) and image.dtype == np.uint8
    for rows, columns in ((slice(0, 70), slice(0, 90)), (slice(13, 40), slice(17, 80)), (slice(60, 99), slice(89, 90))):
        np.testing.assert_array_equal(image[rows, columns], whole[rows, columns])
    np.testing.assert_array_equal(whole, np.moveaxis(values, 0, -1) if kind == "planes" else values)


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("damage", ["cut", "no strips", "no size", "bomb", "noise"])
def test_a_damaged_deep_tiff_is_one_error(tmp_path, monkeypatch, damage, compression):
    path = tif(tmp_path / "a.tif", np.random.default_rng(0).random((64, 64, 3), np.float32), compression=compression)
    with tifffile.TiffFile(path, mode="r+b") as file:
        tags = file.pages.first.tags
        if damage == "no strips":
            tags["StripOffsets"].overwrite(10**9)
        elif damage == "no size":
            tags["ImageWidth"].overwrite(0)
        elif damage == "bomb":
            tags["ImageWidth"].overwrite(2**31), tags["ImageLength"].overwrite(2**31)
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[: len(content) * 3 // 4])
    elif damage == "noise":
        path.write_bytes(content[:4] + content[40:])
    with pytest.raises(UserError, match=r"a\.tif: ") as error:
        read_image(path)
    assert len(str(error.value).split("\n")) == 1
    monkeypatch.setattr(images, "LARGE", 0)
    with pytest.raises(UserError, match=r"a\.tif: "):
        open_image(path)[:, :]


def test_a_compression_that_needs_imagecodecs_says_so(tmp_path):
    path = tif(tmp_path / "a.tif", ramp(12, 5), photometric="minisblack")
    with tifffile.TiffFile(path, mode="r+b") as file:
        file.pages.first.tags["Compression"].overwrite(5)  # LZW, of five bands
    with pytest.raises(UserError, match=r"a\.tif: cannot be read as an image \(.*LZW.*'imagecodecs'"):
        read_image(path)


def test_a_large_png_has_the_same_pixels(tmp_path, monkeypatch):
    path = save(GRADIENT, tmp_path / "a.png")
    monkeypatch.setattr(images, "LARGE", 100)
    np.testing.assert_array_equal(read_image(path), GRADIENT)
    truncate(path, 0.8)
    with pytest.raises(UserError, match=r"a\.png: cannot be read as an image"):
        read_image(path)


# Orientation


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_every_orientation_is_turned_as_pillow_turns_it(tmp_path, suffix, orientation):
    path = save(GRADIENT, tmp_path / f"a.{suffix}", exif=exif(orientation), quality=100)
    upright = Image.fromarray(GRADIENT)
    upright.getexif().update(exif(orientation))
    expected = np.asarray(ImageOps.exif_transpose(upright))
    pixels = read_image(path)
    assert read_header(path)[:2] == pixels.shape[:2] == expected.shape[:2]
    assert np.abs(pixels.astype(int) - expected).max() < 12


def test_orientation_6_is_turned_clockwise(tmp_path):
    half = np.zeros((16, 32, 3), dtype=np.uint8)
    half[:, :16] = 255  # left half white
    pixels = read_image(save(half, tmp_path / "a.png", exif=exif(6)))
    assert pixels.shape == (32, 16, 3)
    assert (pixels[:16] == 255).all() and (pixels[16:] == 0).all()  # upper half white


def jpeg_with(path, value, kind):
    """Save a JPEG with an EXIF block of an orientation alone, of a TIFF type: 2 text, 3 short, 4 long."""
    block = b"Exif\0\0II*\0" + struct.pack("<IHHHIII", 8, 1, 0x0112, kind, 1, value, 0)
    buffer = io.BytesIO()
    Image.fromarray(GRADIENT).save(buffer, "JPEG", quality=95)
    content = buffer.getvalue()
    path.write_bytes(content[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + content[2:])
    return path


@pytest.mark.parametrize(("value", "kind"), [(0, 3), (9, 3), (65535, 3), (65537, 4), (65542, 4), (6, 2), (6, 99)])
@pytest.mark.parametrize("trailer", [b"", b"trailer"])  # with one, Pillow reads the image
def test_an_invalid_orientation_counts_as_upright_without_a_warning(tmp_path, value, kind, trailer):
    path = jpeg_with(tmp_path / "a.jpg", value, kind)
    path.write_bytes(path.read_bytes() + trailer)
    assert read_image(path).shape == (24, 40, 3) and read_header(path)[:2] == (24, 40)
    files = write_csv_data(tmp_path, ["a.jpg,1,1,9,9,circle"])
    assert checks.check_dataset(CSVDataset(*files), training=False).counts == {}


@pytest.mark.parametrize("kind", [3, 4])
def test_an_orientation_may_be_a_short_or_a_long_number(tmp_path, kind):
    path = jpeg_with(tmp_path / "a.jpg", 6, kind)
    assert np.abs(read_image(path).astype(int) - np.rot90(GRADIENT, -1)).max() < 12
    assert read_header(path) == (40, 24, 6)


# Broken files


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.bmp", "a.gif", "a.tif", "a.webp"])
@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.9])
def test_a_truncated_image_is_an_error_that_names_it(tmp_path, name, share):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    truncate(save(noise, tmp_path / name), share)
    with pytest.raises(UserError, match=f"{name}: cannot be read as an image"):
        read_image(tmp_path / name)


@pytest.mark.parametrize("read", [read_image, read_header])
def test_what_is_not_an_image_is_an_error_that_names_it(tmp_path, read):
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "hollow.jpg").write_bytes(b"\xff\xd8 a JPEG's ends, and nothing between \xff\xd9")
    Image.fromarray(GRADIENT).save(tmp_path / "program.eps")  # Pillow starts a program to read these
    for name in (
        "text.jpg",
        "hollow.jpg",
        "program.eps",
        "missing.jpg",
        ".",
        "/dev/zero",
        "a\0b",
        "\ud800",
        "x" * 5000,
    ):
        with pytest.raises(UserError, match="cannot be read as an image") as error:
            read(tmp_path / name)
        assert escaped(str(tmp_path / name)) in str(error.value)


@pytest.mark.parametrize("read", [read_image, read_header, open_image])
def test_an_image_above_the_limit_is_refused_with_the_flag_that_raises_it(tmp_path, read):
    message = r"bomb\.png: has 60000 x 60000 pixels, more than the limit of 179 million; --pixel_limit 3600 allows it"
    with pytest.raises(UserError, match=message):
        read(png(tmp_path / "bomb.png", 60_000, 60_000, 8, bytes(60_001)), pixel_limit=179)
    for name in ("a.png", "a.jpg", "a.tif"):
        save(gradient(100, 110), tmp_path / name)
        assert read(tmp_path / name, pixel_limit=0.011) is not None
        with pytest.raises(UserError, match=rf"{name}: has 110 x 100 pixels, more than the limit of 0\.01 "):
            read(tmp_path / name, pixel_limit=0.01)


def test_an_image_above_pillows_own_limit_is_read_and_that_limit_stays(tmp_path, monkeypatch):
    path = tmp_path / "a.tif"
    Image.fromarray(GRADIENT).save(path, compression="tiff_lzw")
    monkeypatch.setattr(images, "PILLOW_LIMIT", 100)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    np.testing.assert_array_equal(read_image(path), GRADIENT)
    assert Image.MAX_IMAGE_PIXELS == 50


def test_the_size_of_any_image_is_known_without_decoding_it(tmp_path):
    assert read_header(png(tmp_path / "bomb.png", 60_000, 70_000, 8, b"")) == (70_000, 60_000, 1)


def test_a_compressed_text_bomb_is_refused(tmp_path):
    path = png(tmp_path / "text.png", 4, 1, 8, bytes(5))
    content = path.read_bytes()
    text = png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2_000_000)))
    path.write_bytes(content[:33] + text + content[33:])
    with pytest.raises(UserError, match=r"text\.png: cannot be read as an image"):
        read_image(path)


# Lists of files


def test_images_of_a_folder_are_listed_by_path_without_suffix(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.png", "sub/a.jpg", "._b.png", "b.bmp"):  # ._b.png: of macOS, not an image of its own
        save(GRADIENT, tmp_path / name) if name[0] != "." else (tmp_path / name).write_text("")
    assert list(list_images(tmp_path, {"sub/a"})) == ["b", "sub/a"]
    with pytest.raises(UserError, match=r"b\.png: differs from b\.bmp only in its suffix"):
        list_images(tmp_path)
    with pytest.raises(UserError, match="none: cannot be read as a folder of images"):
        list_images(tmp_path / "none")


# Messages


@pytest.mark.parametrize("read", [read_image, read_header])
def test_errors_describe_broken_images_without_python_objects(tmp_path, read):
    (tmp_path / "page.jpg").write_text("<html>404</html>")
    with pytest.raises(UserError) as error:
        read(tmp_path / "page.jpg")
    start = "page.jpg: cannot be read as an image (it starts with b'<html>404</h', and is none of "
    assert str(error.value).endswith(f"{start}BMP, GIF, JPEG, PNG, PPM, TIFF, WEBP)")
    (tmp_path / "empty.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"it starts with b'', and is none of"):
        read(tmp_path / "empty.png")


def test_pillow_does_not_warn_of_images_that_are_read(tmp_path):
    Image.fromarray(GRADIENT).quantize(16).save(tmp_path / "palette.png", transparency=bytes(range(16)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read_image(tmp_path / "palette.png")
        assert len(caught) == 1
        fresh_module().read_image(tmp_path / "palette.png")  # pytest undoes the filters of imports
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("there", "listed", "hint"),
    [
        ("IMG_0.JPG", "img_0.jpg", "does not exist, but '{}' does"),
        ("Images/A/b.png", "images/a/B.png", "does not exist, but '{}' does"),
        (unicodedata.normalize("NFD", "bäume.png"), "bäume.png", "but '{}' does, in another Unicode form (NFC or NFD)"),
        ("images/4/p1.png", "images\\4\\p1.png", "does not exist, but '{}' does"),
        ("images/4/p1.png", "images\\4\\p2.png", "does not exist; is it a Windows path?"),
        ("images/p1.png", "image/p1.png", "does not exist, nor does its folder "),
        ("images/p1.png", "images/p2.png", "images/p2.png' does not exist"),
    ],
)
def test_the_error_about_a_missing_image_suggests_one_with_nearly_the_same_name(tmp_path, there, listed, hint):
    path = tmp_path / there
    path.parent.mkdir(parents=True, exist_ok=True)
    save(GRADIENT, path)
    assert hint.format(path) in explain_missing(listed, str(tmp_path))
    content = coco_content()
    content["images"][1]["file_name"] = listed
    root = write_coco_data(tmp_path / "coco", content)
    path = tmp_path / "coco" / "images" / "val2017" / there
    path.parent.mkdir(parents=True, exist_ok=True)
    save(GRADIENT, path)
    problem = checks.check_dataset(CocoDataset(root, "val2017")).examples["missing image"][0]
    assert problem.where.endswith("image 7") and hint.format(path) in problem.message
