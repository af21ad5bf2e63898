"""Whatever is in a picture file, `open_image` gives 8-bit upright RGB or one clear error."""

from __future__ import annotations

import random
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from vtprune.images import MAX_ASPECT, ImageError, ImageNote, open_image


@pytest.fixture
def picture():
    """Left half red, right half blue."""
    pixels = np.zeros((20, 30, 3), dtype=np.uint8)
    pixels[:, :15, 0] = 255
    pixels[:, 15:, 2] = 255
    return Image.fromarray(pixels)


def at(image, x, y):
    assert image.mode == "RGB"
    return image.getpixel((x, y))


@pytest.mark.parametrize("ending", ["png", "jpg", "gif", "webp", "bmp", "tiff", "ppm"])
def test_formats(tmp_path, picture, ending):
    path = tmp_path / f"a.{ending}"
    picture.save(path)
    read = open_image(path)
    assert read.size == (30, 20)
    assert np.allclose(at(read, 3, 10), (255, 0, 0), atol=12)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK"])
def test_modes(tmp_path, picture, mode):
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    picture.convert(mode).save(path)
    assert open_image(path).mode == "RGB"
    if mode in ("P", "RGBA", "CMYK"):
        assert np.allclose(at(open_image(path), 27, 3), (0, 0, 255), atol=30)


def test_transparency_is_white(tmp_path, picture):
    clear = picture.convert("RGBA")
    clear.putalpha(0)
    clear.save(tmp_path / "a.png")
    assert at(open_image(tmp_path / "a.png"), 0, 0) == (255, 255, 255)
    palette = picture.convert("P")
    palette.save(tmp_path / "b.png", transparency=palette.getpixel((0, 0)))
    read = open_image(tmp_path / "b.png")
    assert at(read, 0, 0) == (255, 255, 255)
    assert np.allclose(at(read, 29, 0), (0, 0, 255), atol=5)


def test_16_bit_is_scaled_not_clipped(tmp_path):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, 0)
    for name in ("a.png", "a.tiff"):
        Image.fromarray(ramp).save(tmp_path / name)
        got = np.asarray(open_image(tmp_path / name))[0, :, 0].astype(int)
        assert np.abs(got - np.arange(256)).max() <= 1
    # a dark 16-bit picture stays dark
    Image.fromarray(np.full((4, 4), 257, dtype=np.uint16)).save(tmp_path / "dark.png")
    assert at(open_image(tmp_path / "dark.png"), 0, 0) == (1, 1, 1)


def test_float_tiff(tmp_path):
    Image.fromarray(np.full((4, 4), 0.5, dtype=np.float32)).save(tmp_path / "a.tiff")
    assert at(open_image(tmp_path / "a.tiff"), 0, 0) == (128, 128, 128)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, picture, orientation):
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    picture.save(tmp_path / "a.png", exif=exif.tobytes())
    with Image.open(tmp_path / "a.png") as raw:
        expected = ImageOps.exif_transpose(raw)
    assert open_image(tmp_path / "a.png").tobytes() == expected.tobytes()


def test_broken_exif_is_a_note(tmp_path, picture):
    picture.save(tmp_path / "a.jpg", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ImageNote)
        assert open_image(tmp_path / "a.jpg").size == (30, 20)


@pytest.mark.parametrize("ending", ["gif", "webp", "png"])
def test_animation_gives_its_first_frame_and_says_so(tmp_path, picture, ending):
    path = tmp_path / f"a.{ending}"
    other = Image.new("RGB", picture.size, "white")
    picture.save(path, save_all=True, append_images=[other, picture], duration=50)
    with pytest.warns(ImageNote, match="3 frames"):
        read = open_image(path)
    assert np.allclose(at(read, 3, 10), (255, 0, 0), atol=12)


def test_not_a_picture(tmp_path, picture):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "page.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    for name, said in [
        ("none.png", "no file"),
        (".", "folder"),
        ("empty.png", "empty"),
        ("text.png", "not a picture"),
        ("page.eps", "not a picture"),
    ]:
        with pytest.raises(ImageError, match=said):
            open_image(tmp_path / name)
    with pytest.raises(ImageError, match="no regular file"):
        open_image("/dev/null")


@pytest.mark.parametrize("ending", ["png", "jpg", "gif", "webp", "bmp", "tiff"])
def test_cut_short_or_scrambled(tmp_path, ending):
    """Every truncation and many byte flips: a picture or an ImageError, nothing else."""
    rng = random.Random(0)
    noise = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / f"a.{ending}")
    data = (tmp_path / f"a.{ending}").read_bytes()
    broken = [data[: len(data) * i // 25] for i in range(1, 25)]
    for _ in range(60):
        scrambled = bytearray(data)
        for _ in range(rng.choice([1, 3, 20])):
            scrambled[rng.randrange(min(len(data), rng.choice([64, len(data)])))] = rng.randrange(256)
        broken.append(bytes(scrambled))
    refused = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for blob in broken:
            (tmp_path / "b").write_bytes(blob)
            try:
                assert open_image(tmp_path / "b").mode == "RGB"
            except ImageError as error:
                refused += 1
                assert "\n" not in str(error)
    assert refused >= 5


def test_bombs_are_refused_by_their_header(tmp_path):
    def png(width: int, height: int) -> bytes:
        def chunk(kind: bytes, body: bytes) -> bytes:
            return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

        header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")

    for width, height in ((10_001, 10_000), (30_000, 30_000), (2**31 - 1, 2**31 - 1)):
        (tmp_path / "bomb.png").write_bytes(png(width, height))
        with pytest.raises(ImageError, match="megapixels"):
            open_image(tmp_path / "bomb.png")


def test_tiny_and_thin(tmp_path):
    Image.new("RGB", (1, 1), "red").save(tmp_path / "a.png")
    assert at(open_image(tmp_path / "a.png"), 0, 0) == (255, 0, 0)
    Image.new("RGB", (1, MAX_ASPECT), "red").save(tmp_path / "b.png")
    assert open_image(tmp_path / "b.png").size == (1, MAX_ASPECT)
    Image.new("RGB", (1, MAX_ASPECT + 1), "red").save(tmp_path / "c.png")
    with pytest.raises(ImageError, match="long side"):
        open_image(tmp_path / "c.png")


def test_cut_files_are_refused_whatever_other_libraries_set(tmp_path, monkeypatch):
    from PIL import ImageFile

    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    path = tmp_path / "cut.png"
    Image.effect_noise((200, 200), 50).save(path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ImageError, match="cut short"):
        open_image(path)
    assert ImageFile.LOAD_TRUNCATED_IMAGES
