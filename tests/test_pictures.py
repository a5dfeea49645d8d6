"""Picture files that people hand over: each is read, or refused in one sentence."""

import ast
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image
from PIL.PngImagePlugin import PngInfo

import bdclean
from bdclean import pictures
from bdclean.attacks.assets import from_file
from bdclean.errors import AttackError
from bdclean.pictures import UnreadableError, decoded, size_of

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
KINDS = r"BMP, JPEG, PNG, PPM, TIFF or WebP"
CONVERT = f"convert it to {KINDS}, or remove it"
REPAIR = "repair or remove it"
SMALLER = "make it smaller or remove it"


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + zlib.crc32(kind + content).to_bytes(4)


def png(width, height, bits, colour, rows):
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def plain(mode="RGB", value=(200, 100, 50), size=(12, 8)):
    if mode == "P":
        return Image.new("RGB", size, value).quantize(4)
    return Image.new("RGB", size, value).convert(mode)


def saved(picture, form="PNG", **how):
    return lambda path: picture.save(path, form, **how)


def content(data):
    return lambda path: path.write_bytes(data)


def cut(form):
    def write(path):
        noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path, form)
        path.write_bytes(path.read_bytes()[:2000])

    return write


def jpeg_of(width, height, **how):
    """A small JPEG file that says it is a large one."""

    def write(path):
        plain().save(path, "JPEG", **how)
        data = bytearray(path.read_bytes())
        frame = data.index(b"\xff\xc2" if how else b"\xff\xc0")
        data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
        path.write_bytes(data)

    return write


def damaged_crc(path):
    plain().save(path, "PNG")
    data = bytearray(path.read_bytes())
    data[data.index(b"IDAT") + 6] ^= 255
    path.write_bytes(data)


def long_text(path):
    text = PngInfo()
    text.add_text("a", "b" * 3_000_000, zip=True)
    plain().save(path, "PNG", pnginfo=text)


def most(millions):
    return f"it has more than {millions} million pixels, the most that is read of its kind"


REFUSED = {
    "EPS": (content(EPS), "it holds PostScript", CONVERT),
    "EPS with a preview": (content(b"\xc5\xd0\xd3\xc6" + EPS), "it holds PostScript", CONVERT),
    "PDF": (content(b"%PDF-1.7\n"), "it holds PDF", CONVERT),
    "SVG": (content(b"\xef\xbb\xbf \n<svg xmlns='x'/>"), "it holds SVG", CONVERT),
    "XML": (content(b"<?xml version='1.0'?><svg/>"), "it holds XML", CONVERT),
    "DDS": (content(b"DDS |\0\0\0" + bytes(120)), "it holds DDS", CONVERT),
    "AVIF": (content(b"\0\0\0\x1cftypavif" + bytes(40)), "it holds AVIF", CONVERT),
    "HEIC": (content(b"\0\0\0\x18ftypheic" + bytes(40)), "it holds HEIC", CONVERT),
    "Photoshop": (content(b"8BPS\0\1" + bytes(40)), "it holds Photoshop", CONVERT),
    "JPEG 2000": (content(b"\0\0\0\x0cjP  \r\n\x87\n"), "it holds JPEG 2000", CONVERT),
    "web page": (content(b"\n<HTML>404</html>"), "it holds a web page", CONVERT),
    "newer web page": (content(b"<!DOCTYPE html><p>404"), "it holds a web page", CONVERT),
    "zip": (content(b"PK\3\4" + bytes(40)), "it holds a zip archive", CONVERT),
    "icon": (saved(plain(size=(16, 16)), "ICO"), f"it holds no picture in {KINDS}", REPAIR),
    "text": (content(b"no picture"), f"it holds no picture in {KINDS}", REPAIR),
    "empty": (content(b""), "it is empty", REPAIR),
    "cut PNG": (cut("PNG"), "image file is truncated", REPAIR),
    "cut JPEG": (cut("JPEG"), "image file is truncated", REPAIR),
    "cut TIFF": (content(b"II*\0\xff\xff\xff\x7f"), f"it holds no picture in {KINDS}", REPAIR),
    "damaged PNG": (damaged_crc, "broken data stream when reading image file", REPAIR),
    "long text": (long_text, "Decompressed data too large for PngImagePlugin", REPAIR),
    "13,000 pixels": (content(png(13_000, 13_000, 8, 2, b"")), most(100), SMALLER),
    "60,000 pixels": (content(png(60_000, 60_000, 8, 2, b"")), most(100), SMALLER),
    "large JPEG": (jpeg_of(20_000, 20_000), most(250), SMALLER),
    "progressive JPEG": (jpeg_of(9_000, 9_000, progressive=True), most(66), SMALLER),
    "32 bits": (
        saved(Image.new("I", (8, 8)), "TIFF"),
        "mode I has more than 8 bits of unknown range",
        "convert it to 8 bits",
    ),
    "floats": (
        saved(Image.new("F", (8, 8)), "TIFF"),
        "mode F has more than 8 bits of unknown range",
        "convert it to 8 bits",
    ),
}


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Programs that decoders start; each leaves a file. Nothing has looked for them yet."""
    folder, told = tmp_path / "bin", tmp_path / "started"
    folder.mkdir()
    for name in ("gs", "gswin32c", "xv", "display"):
        (folder / name).write_text(f"#!/bin/sh\necho $0 >> {told}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    return told


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning", "ignore:Corrupt EXIF")
def test_a_file_is_refused_in_one_sentence(kind, tmp_path, programs):
    write, reason, cure = REFUSED[kind]
    photo = tmp_path / "photo.png"
    write(photo)
    with pytest.raises(UnreadableError) as refusal, decoded(photo):
        pass
    told = str(refusal.value)
    assert told.startswith(f"{photo} is not a readable image ({reason}")
    assert told.endswith(f"); {cure}.")
    assert "\n" not in told
    assert refusal.value.broken
    assert not programs.exists()


def test_a_pointer_in_place_of_a_file_is_told(tmp_path):
    (tmp_path / "x.png").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(UnreadableError, match="a Git LFS pointer; `git lfs pull` fetches the fil"):
        size_of(tmp_path / "x.png")


@pytest.mark.parametrize(("name", "reason"), [("gone", "No such file"), ("", "Is a directory")])
def test_what_cannot_be_opened_is_not_broken(tmp_path, name, reason):
    with pytest.raises(UnreadableError, match=rf"{reason}.*; see that it is there") as refusal:
        size_of(tmp_path / name)
    assert not refusal.value.broken


def test_the_canary_sings(tmp_path, programs):
    """Without the list of formats, the EPS file starts a program."""
    (tmp_path / "photo.png").write_bytes(EPS)
    with (
        pytest.raises(OSError),  # noqa: PT011
        Image.open(tmp_path / "photo.png") as photo,
    ):
        photo.load()
    assert programs.exists()


# ---------------------------------------------------------------------- what is read

GREY = struct.pack(">H", 0xC8FF)
ROWS_16 = (b"\0" + GREY * 12) * 8
COLOUR_16 = (b"\0" + struct.pack(">HHH", 200 << 8 | 9, 100 << 8, 50 << 8 | 255) * 12) * 8
RGB, DEEP = (200, 100, 50), (200, 200, 200)
TURNED = Image.Exif()
TURNED[0x0112] = 6


def frames(form, **how):
    return saved(plain(), form, save_all=True, append_images=[plain(value=(0, 0, 0))], **how)


def transparent(mode):
    picture = plain().convert("RGBA")
    picture.putalpha(0)
    return picture.convert(mode)


ACCEPTED = {
    "RGB": (saved(plain()), RGB),
    "grey": (saved(plain("L")), (124,) * 3),
    "grey with alpha": (saved(transparent("LA")), (124,) * 3),
    "transparent": (saved(transparent("RGBA")), RGB),
    "transparent colour": (saved(plain(), transparency=RGB), RGB),
    "palette": (saved(plain("P")), RGB),
    "palette with one transparent colour": (saved(plain("P"), transparency=0), RGB),
    "palette with transparency": (saved(plain("P"), transparency=bytes(4)), RGB),
    "black and white": (saved(Image.new("1", (12, 8), 1)), (255,) * 3),
    "CMYK": (saved(plain("CMYK"), "JPEG", quality=100), RGB),
    "YCbCr": (saved(plain("YCbCr"), "TIFF"), RGB),
    "16 bits of grey, PNG": (content(png(12, 8, 16, 0, ROWS_16)), DEEP),
    "16 bits of grey, TIFF": (saved(Image.new("I;16", (12, 8), 0xC8FF), "TIFF"), DEEP),
    "16 bits of grey, the other end first": (
        saved(Image.new("I;16B", (12, 8), 0xC8FF), "TIFF"),
        DEEP,
    ),
    "16 bits of grey, PGM": (content(b"P5 12 8 65535\n" + GREY * 96), DEEP),
    "16 bits of colour, PNG": (content(png(12, 8, 16, 2, COLOUR_16)), RGB),
    "16 bits of colour, PPM": (
        content(b"P6 12 8 65535\n" + struct.pack(">HHH", 200 * 257, 100 * 257, 50 * 257) * 96),
        RGB,
    ),
    "BMP": (saved(plain(), "BMP"), RGB),
    "GIF": (saved(plain("P"), "GIF"), RGB),
    "moving GIF": (frames("GIF"), RGB),
    "moving PNG": (frames("PNG"), RGB),
    "moving WebP": (
        saved(plain(), "WEBP", save_all=True, append_images=[plain()], lossless=True),
        RGB,
    ),
    "pages": (frames("TIFF"), RGB),
    "photo for two eyes": (frames("MPO"), RGB),
    "turned": (saved(plain(), exif=TURNED), RGB),
    "packed TIFF": (saved(plain(), "TIFF", compression="tiff_lzw"), RGB),
}


@pytest.mark.parametrize("kind", ACCEPTED)
def test_a_file_is_read_whatever_its_name(kind, tmp_path):
    write, colour = ACCEPTED[kind]
    photo = tmp_path / "photo.png"
    write(photo)
    assert size_of(photo) == (12, 8)
    with decoded(photo) as picture:
        pixels = np.asarray(picture)
    assert pixels.shape == ((12, 8, 3) if kind == "turned" else (8, 12, 3))
    assert np.abs(pixels.astype(int) - colour).max() <= 2


@pytest.mark.parametrize("kind", [k for k in ACCEPTED if "16" not in k and k != "turned"])
@pytest.mark.filterwarnings("ignore:Palette images")
def test_pixels_are_those_of_pillow(kind, tmp_path):
    """Runs of earlier versions had them."""
    ACCEPTED[kind][0](tmp_path / "photo.png")
    with decoded(tmp_path / "photo.png") as picture, Image.open(tmp_path / "photo.png") as stored:
        assert np.array_equal(np.asarray(picture), np.asarray(stored.convert("RGB")))


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_photos_are_turned_as_viewers_do(orientation, form, tmp_path):
    upright = np.zeros((12, 8, 3), dtype=np.uint8)
    upright[:6, :4] = 255  # top left
    how = pictures._TURNS.get(orientation)
    back = {
        Image.Transpose.ROTATE_90: Image.Transpose.ROTATE_270,
        Image.Transpose.ROTATE_270: Image.Transpose.ROTATE_90,
    }
    shown = Image.fromarray(upright)
    stored = shown if how is None else shown.transpose(back.get(how, how))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "x.jpg", form, exif=exif, **({"quality": 100} if form == "JPEG" else {}))
    with decoded(tmp_path / "x.jpg") as picture:
        assert np.abs(np.asarray(picture).astype(int) - upright).max() < 60
    with decoded(tmp_path / "x.jpg", exif_orientation=False) as picture:
        assert picture.size == stored.size
        assert np.abs(np.asarray(picture).astype(int) - np.asarray(stored)).max() < 60


def test_a_damaged_orientation_is_none(tmp_path):
    plain().save(tmp_path / "x.jpg", exif=b"Exif\0\0II*\0\xff\xff")
    with decoded(tmp_path / "x.jpg") as picture:
        assert picture.size == (12, 8)


# ---------------------------------------------------------------------- memory


def test_a_large_jpeg_is_decoded_smaller_and_no_other_picture(tmp_path, monkeypatch):
    for form in ("jpg", "png"):
        plain(size=(64, 32)).save(tmp_path / f"x.{form}")
    plain(size=(64, 32)).save(tmp_path / "deep.jpg", progressive=True)
    monkeypatch.setattr(pictures, "MEMORY", 64 * 32 * 8)
    monkeypatch.setattr(pictures, "_ROOM", pictures._Room())
    for form in ("jpg", "png"):
        with decoded(tmp_path / f"x.{form}") as picture:
            assert picture.size == (64, 32)
    monkeypatch.setattr(pictures, "MEMORY", 64 * 32 * 8 - 1)
    with decoded(tmp_path / "x.jpg") as picture:
        assert picture.size == (32, 16)
        assert np.abs(np.asarray(picture).astype(int) - RGB).max() <= 2
    for name in ("x.png", "deep.jpg"):
        with pytest.raises(UnreadableError, match="more than 0 million"), decoded(tmp_path / name):
            pass


def test_a_picture_of_text_may_be_smaller_than_others(tmp_path):
    file = tmp_path / "x.ppm"
    for side, fits in ((20, True), (3000, False)):
        file.write_bytes(b"P2 %d %d 255\n" % (side, side) + b"7 " * 400)
        if fits:
            with decoded(file) as picture:
                assert picture.getpixel((0, 0)) == (7, 7, 7)
        else:
            with pytest.raises(UnreadableError, match="it has more than 8 million pixels"):
                decoded(file).__enter__()


def test_threads_share_the_memory(tmp_path, monkeypatch):
    plain(size=(10, 10)).save(tmp_path / "x.png")
    monkeypatch.setattr(pictures, "MEMORY", 2000)
    monkeypatch.setattr(pictures, "_ROOM", pictures._Room())
    open_now, highest, lock = [], [], Lock()

    def read(_):
        with decoded(tmp_path / "x.png") as picture:
            with lock:
                open_now.append(picture)
                highest.append(len(open_now))
            for _ in range(1000):
                sum(range(10))
            with lock:
                open_now.remove(picture)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read, range(40)))
    assert max(highest) <= 2  # 10 x 10 pixels of 8 bytes
    assert pictures._ROOM._left == 2000


# ---------------------------------------------------------------------- the one place


def test_nothing_else_opens_pictures():
    package = Path(bdclean.__file__).parent
    found = set()
    for file in package.rglob("*.py"):
        text = file.read_text()
        suspicious = "Image.open" in text or any(name in text for name in OPENERS)
        for node in ast.walk(ast.parse(text if suspicious else "")):
            named = isinstance(node, ast.Attribute | ast.Name) and ast.unparse(node)
            last = named.rpartition(".")[2] if named else ""
            if named == "Image.open" or last in OPENERS:
                found.add((file.relative_to(package).as_posix(), named))
    assert found == {("pictures.py", "Image.open"), ("pictures.py", "JpegImageFile")}


OPENERS = {
    *("imread", "read_image", "decode_image", "decode_jpeg", "decode_png", "pil_loader"),
    *("default_loader", "ImageFile", "JpegImageFile", "PngImageFile"),
}


def test_pictures_of_triggers_are_opened_alike(tmp_path, programs):
    (tmp_path / "patch.png").write_bytes(EPS)
    with pytest.raises(AttackError, match=r"^image=file:.*patch\.png: it cannot be read as a pic"):
        from_file(str(tmp_path / "patch.png"), (8, 8))
    assert not programs.exists()
