"""Decoding image files into the memory-mapped cache."""

import errno
import io
import os
import shutil
import sys
import time
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from bdclean import pictures, progress
from bdclean.data import decoding
from bdclean.errors import DataError

NO_CACHE = decoding.Reading(cache=False)


@pytest.fixture
def files(tmp_path, monkeypatch, write):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for k in range(5):
        write(tmp_path / "set" / f"{k}.png", 40 * k, size=(20, 10))
    found = sorted((tmp_path / "set").iterdir())
    return found, [file.name for file in found]


def load(files, names, size, **how):
    return decoding.load_images(files, names, size, **how).images


def cached(tmp_path):
    return sorted(p.name for p in (tmp_path / "cache").rglob("*") if p.is_file())


def test_decoding_writes_to_a_mapped_file_and_maps_it_again(files, tmp_path, monkeypatch, levels):
    decode, arrays = decoding._decode, []
    monkeypatch.setattr(decoding, "_decode", lambda i, *r: (arrays.append(i), decode(i, *r))[1])
    monkeypatch.setattr(torch, "from_numpy", lambda a: (arrays.append(a), torch.as_tensor(a))[1])
    first = load(*files, 8)
    assert [type(a) for a in arrays] == [np.memmap, np.memmap]
    (name,) = cached(tmp_path)
    assert name.endswith(".npy")
    first.zero_()  # stays in memory
    arrays.clear()
    again = load(*files, 8)
    assert [type(a) for a in arrays] == [np.memmap]
    assert levels(again) == [0, 40, 80, 120, 160]
    arrays.clear()
    assert torch.equal(load(*files, 8, reading=NO_CACHE), again)
    assert [type(a) for a in arrays] == [np.ndarray, np.ndarray]
    assert cached(tmp_path) == [name]


def test_each_way_of_resizing_has_a_key_of_its_own(files, tmp_path):
    found = [load(*files, 8, resizing=r) for r in ("fill", "stretch", "imagenet")]
    assert len(cached(tmp_path)) == 3
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])
    for images, way in zip(found, ("fill", "stretch", "imagenet"), strict=True):
        assert torch.equal(images, load(*files, 8, resizing=way, reading=NO_CACHE))


def test_a_failed_decoding_leaves_nothing_behind(files, tmp_path):
    files[0][3].write_bytes(b"no image")
    with pytest.raises(DataError, match=r"3\.png is not a readable image"):
        load(*files, 8)
    assert cached(tmp_path) == []


def _bomb(path):
    """A small picture that says it is a large one."""
    Image.new("RGB", (8, 8)).save(path)
    content = bytearray(path.read_bytes())
    content[16:24] = (60_000).to_bytes(4) * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4)
    path.write_bytes(content)


def _long_text(path):
    text = PngInfo()
    text.add_text("a", "b" * 3_000_000, zip=True)
    Image.new("RGB", (8, 8)).save(path, pnginfo=text)


def _deep(mode):
    return lambda path: Image.new(mode, (8, 8)).save(path, "tiff")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_bomb, "is not a readable image .*more than 100 million pixels"),
        (_long_text, "is not a readable image .*too large"),
        (lambda path: path.write_bytes(b"P6 a b 255"), "is not a readable image"),
        (
            _deep("I"),
            r"is not .* \(mode I has more than 8 bits of unknown range\); convert it to 8",
        ),
        (
            _deep("F"),
            r"is not .* \(mode F has more than 8 bits of unknown range\); convert it to 8",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_files_made_to_do_harm_and_deep_ones_are_refused(files, spoil, message):
    spoil(files[0][3])
    with pytest.raises(DataError, match=rf"3\.png {message}"):
        load(*files, 8)


def test_a_full_disk_is_found_out_before_decoding(files, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=5 * 192 - 1))
    with pytest.raises(DataError, match=r"5 decoded images.*XDG_CACHE_HOME.*cache to false"):
        load(*files, 8)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=5 * 192))
    load(*files, 8)


def test_a_cache_that_cannot_be_written_is_told_and_left_out(files, tmp_path, monkeypatch):
    wanted = load(*files, 8, reading=NO_CACHE)
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match=r"file/bdclean/images cannot be written \(Not a dir"):
        found = load(*files, 8)
    assert torch.equal(found, wanted)


def test_what_lies_in_a_cache_that_cannot_be_written_is_read(files, tmp_path, monkeypatch):
    wanted = load(*files, 8).clone()

    def refused(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(decoding, "TemporaryFile", refused)
    assert torch.equal(load(*files, 8), wanted)  # without a warning
    with pytest.warns(UserWarning, match="Permission denied"):
        load(*files, 16)
    (stored,) = (tmp_path / "cache").rglob("*.npy")
    stored.write_bytes(b"damaged")
    with pytest.warns(UserWarning, match="Permission denied"):
        assert torch.equal(load(*files, 8), wanted)


def npy(array, **how):
    def write(path):
        with path.open("wb") as file:
            np.save(file, array, **how)

    return write


DAMAGED = {
    "empty": (".npy", lambda path: path.write_bytes(b"")),
    "cut": (".npy", lambda path: path.write_bytes(path.read_bytes()[:-1])),
    "pickle": (".npy", npy(np.array([{}], dtype=object), allow_pickle=True)),
    "zip": (".npy", lambda path: path.write_bytes(b"PK\3\4")),
    "more rows": (".npy", npy(np.zeros((6, 3, 8, 8), np.uint8))),
    "fewer rows": (".npy", npy(np.zeros((4, 3, 8, 8), np.uint8))),
    "other size": (".npy", npy(np.zeros((5, 3, 4, 4), np.uint8))),
    "other type": (".npy", npy(np.zeros((5, 3, 8, 8), np.float32))),
    "scalar": (".npy", npy(np.array(3, np.uint8))),
    "brace": (".json", lambda path: path.write_text("{")),
    "number": (".json", lambda path: path.write_text("[1]")),
    "no row": (".json", lambda path: path.write_text('[[999, "a", "b"]]')),
    "negative": (".json", lambda path: path.write_text('[[-1, "a", "b"]]')),
    "text": (".json", lambda path: path.write_text('[["a", "b", "c"]]')),
    "bytes": (".json", lambda path: path.write_bytes(b"\xff")),
    "deep": (".json", lambda path: path.write_text("[" * 100_000)),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_cache_is_written_again(case, files, tmp_path):
    wanted = load(*files, 8).clone()
    (stored,) = (tmp_path / "cache").rglob("*.npy")
    suffix, damage = DAMAGED[case]
    damage(stored.with_suffix(suffix))
    assert torch.equal(load(*files, 8), wanted)
    assert torch.equal(load(*files, 8), wanted)
    assert cached(tmp_path) == [stored.name]


def test_a_missing_cache_folder_is_made(files, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "not" / "there"))
    load(*files, 8)
    assert len(list((tmp_path / "not" / "there").rglob("*.npy"))) == 1


def test_a_disk_that_fills_while_decoding_is_told(files, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np.lib.format, "open_memmap", full)
    with pytest.raises(DataError, match=r"No space left on device.*XDG_CACHE_HOME.*cache to false"):
        load(*files, 8)


def test_long_decoding_shows_progress(files, capsys, monkeypatch):
    load(*files, 8, reading=NO_CACHE)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "FIRST_LINE", 0.0)
    monkeypatch.setattr(progress, "BETWEEN_LINES", 0.0)
    monkeypatch.setattr(progress, "_SHARE", 0.0)
    load(*files, 8, reading=NO_CACHE)
    assert "decoding images: 4/5 images  " in capsys.readouterr().err

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    load(*files, 8, reading=NO_CACHE)
    assert "decoding images" in sys.stderr.getvalue()


def test_names_need_not_be_utf_8(files, tmp_path, levels):
    odd = tmp_path / "set" / os.fsdecode(b"caf\xe9.png")
    shutil.copy(files[0][2], odd)
    assert levels(load([odd], [odd.name], 8)) == [80]


@pytest.mark.parametrize("ending", ["bmp", "ppm", "tif"])
def test_plain_pictures_of_equal_size_and_date_are_told_apart(
    files, tmp_path, write, levels, ending
):
    found = []
    for k in (10, 200):
        picture = tmp_path / str(k) / f"1.{ending}"
        write(picture, k)
        os.utime(picture, (0, 0))
        found += levels(load([picture], [picture.name], 8))
    assert found == [10, 200]


# ---------------------------------------------------------------------- broken files

SKIP = decoding.Reading(on_error="skip")
HELD = decoding.Reading(cache=False, on_error="skip")


@pytest.fixture
def broken(files):
    """The second and the fourth of five files are broken."""
    for row, text in ((1, b"<html>404"), (3, b"")):
        files[0][row].write_bytes(text)
    return files


@pytest.mark.parametrize("reading", [decoding.Reading(), NO_CACHE])
def test_the_first_broken_file_and_the_switch_are_named(broken, reading, tmp_path):
    with pytest.raises(DataError) as refusal:
        load(*broken, 8, reading=reading)
    assert str(refusal.value) == (
        f"{tmp_path}/set/1.png is not a readable image (it holds a web page); convert it to BMP, "
        "JPEG, PNG, PPM, TIFF or WebP, or remove it, or leave out such files with "
        "--data.on_error skip."
    )
    assert cached(tmp_path) == []


@pytest.mark.parametrize("reading", [SKIP, HELD])
def test_broken_files_are_skipped(broken, reading, levels, tmp_path, monkeypatch):
    found = decoding.load_images(*broken, 8, reading=reading)
    assert levels(found.images) == [0, 80, 160]
    reasons = {1: "it holds a web page", 3: "it is empty"}
    assert {row: error.reason for row, error in found.broken.items()} == reasons
    if reading.cache:
        assert [name[-4:] for name in cached(tmp_path)] == ["json", ".npy"]
        monkeypatch.setattr(decoding, "_decode", None)
        again = decoding.load_images(*broken, 8, reading=reading)
        assert torch.equal(again.images, found.images)
        assert {row: error.reason for row, error in again.broken.items()} == reasons
        with pytest.raises(DataError, match=r"1\.png is not .*--data\.on_error skip\.$"):
            load(*broken, 8)


def test_what_is_skipped_does_not_depend_on_the_order_of_threads(broken, monkeypatch):
    def late(file, **how):
        time.sleep(0.05 * (file.name < "3"))
        return pictures.decoded(file, **how)

    monkeypatch.setattr(decoding, "decoded", late)
    assert list(decoding.load_images(*broken, 8, reading=HELD).broken) == [1, 3]


def test_a_cache_without_broken_files_serves_both(files, tmp_path):
    load(*files, 8)
    load(*files, 8, reading=SKIP)
    assert len(cached(tmp_path)) == 1


def test_a_folder_of_broken_files_is_refused(files):
    for file in files[0]:
        file.write_bytes(b"")
    with pytest.raises(
        DataError, match=r"^None of 5 image files can be read; the first .*0\.png is"
    ):
        load(*files, 8, reading=SKIP)


@pytest.mark.parametrize("reading", [SKIP, HELD])
def test_files_that_the_disk_withholds_are_not_skipped(files, reading, monkeypatch):
    def fail(file, **how):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(pictures.Image, "open", fail)
    with pytest.raises(DataError, match=r"0\.png is not .* \(Permission denied\); see that it is"):
        load(*files, 8, reading=reading)


# ---------------------------------------------------------------------- orientation


def test_turned_and_stored_photos_have_keys_of_their_own(tmp_path, monkeypatch, write):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write(tmp_path / "x.png", 100)
    exif = Image.Exif()
    exif[0x0112] = 3
    with Image.open(tmp_path / "x.png") as picture:
        picture.save(tmp_path / "x.jpg", exif=exif, quality=100)
    files = [[tmp_path / "x.jpg"], ["x.jpg"], 12]
    off = decoding.Reading(exif_orientation=False)
    for _ in range(2):
        turned, stored = load(*files), load(*files, reading=off)
        assert (turned[0, 0, 5, :5] > 90).all()
        assert (stored[0, 0, 5, -5:] > 90).all()
        assert torch.equal(turned, stored.flip(2, 3))
    assert len(cached(tmp_path)) == 2


def test_a_very_long_picture_is_refused_where_it_would_be_enlarged(tmp_path):
    Image.new("L", (20_000, 1)).save(tmp_path / "x.png")
    for way in ("fill", "stretch"):
        load([tmp_path / "x.png"], ["x.png"], 224, resizing=way, reading=NO_CACHE)
    with pytest.raises(DataError, match="it is far longer than wide"):
        load([tmp_path / "x.png"], ["x.png"], 224, resizing="imagenet", reading=NO_CACHE)
