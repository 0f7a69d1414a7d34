"""Pictures as files: what is read, how, and what a bad one costs."""

from __future__ import annotations

import csv
import struct
import zlib

import numpy as np
import pytest
import torch
from comfyui_pcpo.pcpo.pictures.tensors import pixels_of
from comfyui_pcpo.pcpo.rewards import load_reward
from comfyui_pcpo.trainers.cli.command import main
from PIL import Image
from PIL.PngImagePlugin import PngInfo

RAMP = np.linspace(0, 65535, 64 * 48).reshape(48, 64).astype(np.uint16)
ROUNDED = ((RAMP.astype(np.uint32) + 128) // 257).astype(np.uint8)
COLOUR = np.stack([ROUNDED, ROUNDED[::-1], np.full_like(ROUNDED, 30)], -1)


def png(header: tuple[int, ...], rows: bytes) -> bytes:
    """A PNG file: width, height, bits, colour type; rows with their filter bytes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    start = chunk(b"IHDR", struct.pack(">IIBBBBB", *header, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + start + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def png16(pixels: np.ndarray, colour: int) -> bytes:
    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    return png((width, height, 16, colour), rows)


def scored(folder, *files, code=0):
    """The rows of `pcpo score --reward brightness` by file name."""
    table = folder / "table.csv"
    names = [str(folder / file) for file in files] or [str(folder)]
    assert main(["score", *names, "--reward", "brightness", "--csv", str(table)]) == code
    with table.open(newline="", encoding="utf-8") as opened:
        return {
            row["file"].removeprefix(f"{folder}").strip("/\\"): row
            for row in csv.DictReader(opened)
        }


def brightness(pixels):
    picture = Image.fromarray(np.broadcast_to(pixels.T, (3, *pixels.T.shape)).T.astype(np.uint8))
    return load_reward("brightness").score([picture], [""]).values.item()


def test_16_bit_grey_is_as_bright_as_comfyui_loads_it(tmp_path):
    files = {"a.png": png16(RAMP, 0), "b.png": png16(np.full_like(RAMP, 32768), 0)}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    Image.fromarray(RAMP).save(tmp_path / "c.tif")
    Image.frombytes("I;16B", (64, 48), RAMP.astype(">u2").tobytes()).save(tmp_path / "d.tif")
    Image.fromarray((RAMP / 65535).astype(np.float32)).save(tmp_path / "e.tif")
    rows = scored(tmp_path, *files, "c.tif", "d.tif", "e.tif")
    grey, half = brightness(ROUNDED), brightness(np.full_like(ROUNDED, 128))
    for name, wanted in {
        "a.png": grey,
        "b.png": half,
        "c.tif": grey,
        "d.tif": grey,
        "e.tif": grey,
    }.items():
        assert float(rows[name]["score"]) == pytest.approx(wanted, abs=1e-4), name


def test_a_picture_of_16_bit_is_no_white_one():
    assert torch.equal(pixels_of(Image.fromarray(RAMP))[0, 0], torch.from_numpy(ROUNDED))
    with_nan = Image.fromarray(np.full((4, 4), np.nan, np.float32))
    found = load_reward("brightness").score([with_nan, Image.new("RGB", (4, 4))], ["", ""])
    assert found.values[0].isnan() and found.values[1] == 0 and "0 to 1" in found.errors[0]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_a_picture_is_turned_as_its_exif_says(tmp_path, orientation, suffix):
    from comfyui_pcpo.pcpo.pictures.files import open_picture, picture_size

    exif = Image.Exif()
    exif[0x112] = orientation
    kept = {"lossless": True} if suffix == ".webp" else {}
    Image.fromarray(COLOUR).save(tmp_path / f"a{suffix}", exif=exif, **kept)
    upright = {1: COLOUR, 2: COLOUR[:, ::-1], 3: COLOUR[::-1, ::-1], 4: COLOUR[::-1]}
    turned = np.swapaxes(COLOUR, 0, 1)
    upright |= {5: turned, 6: turned[:, ::-1], 7: turned[::-1, ::-1], 8: turned[::-1]}
    opened = open_picture(tmp_path / f"a{suffix}")
    assert picture_size(tmp_path / f"a{suffix}") == opened.size
    found = np.asarray(opened, dtype=int)
    assert found.shape == upright[orientation].shape
    assert abs(found - upright[orientation]).max() <= (0 if suffix != ".jpg" else 40)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "transparent"])
def test_alpha_is_dropped_and_every_mode_is_read(tmp_path, mode):
    from comfyui_pcpo.pcpo.pictures.files import open_picture

    picture, file = Image.fromarray(COLOUR), tmp_path / "a.tif"
    if mode == "transparent":
        file = tmp_path / "a.png"
        picture = picture.convert("P")
        picture.save(file, transparency=bytes(range(256)))
    else:
        picture = picture.convert(mode) if mode != "PA" else picture.convert("P")
        picture.save(file)
    wanted = np.asarray(picture.convert("RGB"))
    assert np.array_equal(np.asarray(open_picture(file)), wanted)


def test_16_bit_colour_is_within_a_level(tmp_path):
    from comfyui_pcpo.pcpo.pictures.files import open_picture

    for colour, channels in ((2, 3), (6, 4), (4, 2)):
        (tmp_path / "a.png").write_bytes(png16(np.stack([RAMP] * channels, -1), colour))
        found = np.asarray(open_picture(tmp_path / "a.png"), dtype=int)[..., 0]
        assert abs(found - ROUNDED).max() <= 1


def test_of_an_animation_the_first_picture_counts(tmp_path):
    frames = [Image.new("RGB", (8, 8), (level,) * 3) for level in (10, 200)]
    for suffix in (".gif", ".webp", ".png"):
        frames[0].save(tmp_path / f"a{suffix}", save_all=True, append_images=frames[1:])
    rows = scored(tmp_path, "a.gif", "a.webp", "a.png")
    assert {round(float(row["score"]), 2) for row in rows.values()} == {0.04}


def bad_files():
    """Name and content of files that are no usable pictures."""
    text = PngInfo()
    text.add_text("workflow", "a" * 3_000_000, zip=True)
    whole = png16(RAMP, 0)
    yield "text.png", lambda file: Image.fromarray(COLOUR).save(file, pnginfo=text)
    yield "icc.png", lambda file: Image.fromarray(COLOUR).save(file, icc_profile=bytes(3_000_000))
    yield "cut.png", lambda file: file.write_bytes(whole[: len(whole) // 2])
    yield "huge.png", lambda file: file.write_bytes(png((30_000, 30_000, 8, 0), b"\0"))
    yield "none.png", lambda file: file.write_bytes(png((0, 5, 8, 0), b"\0"))
    yield "empty.png", lambda file: file.write_bytes(b"")
    yield "broken.webp", lambda file: file.write_bytes(b"RIFF\x10\0\0\0WEBPVP8 \xff\xff\xff\xff")
    yield "postscript.png", lambda file: Image.fromarray(COLOUR).save(file, "EPS")
    yield "icon.png", lambda file: Image.fromarray(COLOUR).save(file, "ICO")
    yield "wide.tif", lambda file: Image.fromarray(RAMP.astype(np.int32)).save(file)
    yield "bright.tif", lambda file: Image.fromarray(RAMP.astype(np.float32)).save(file)


BAD = dict(bad_files())


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("name", "write"), BAD.items(), ids=[*BAD])
def test_one_bad_file_costs_itself_alone(tmp_path, name, write, monkeypatch):
    import subprocess

    monkeypatch.setattr(subprocess, "check_call", lambda *a, **k: pytest.fail("Ghostscript ran"))
    write(tmp_path / name)
    Image.fromarray(COLOUR).save(tmp_path / "good.bmp")
    rows = scored(tmp_path, name, "good.bmp", code=1)
    assert rows["good.bmp"]["score"] and not rows["good.bmp"]["error"]
    assert rows[name]["score"] == "" and "cannot be read as an image" in rows[name]["error"]
    assert str(tmp_path) not in rows[name]["error"] and "0x7" not in rows[name]["error"]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_metadata_that_is_broken_does_not_hide_a_picture(tmp_path):
    Image.fromarray(COLOUR).save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert scored(tmp_path, "a.jpg")["a.jpg"]["error"] == ""
