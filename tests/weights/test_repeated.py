"""A pickle of a few bytes may go through one large value thousands of times: it is not loaded."""

import struct
import time

import pytest
from hostile import number, one, pickled, text, zipped

from bdclean.errors import WeightsError
from bdclean.weights import bounds

LARGE = 60_000


def put(place):
    return b"r" + struct.pack("<I", place)


def get(place):
    return b"j" + struct.pack("<I", place)


def kept(value, place):
    """A value in the list that is made, and where it is found again."""
    return value + put(place) + b"a"


def listed(*parts):
    return b"\x80\x02]" + b"".join(parts) + b"."


def repeated(function, large, count=20_000):
    """Calls `function` of (large,) so many times, each in a few bytes."""
    calls = (get(0) + get(1) + b"Ra") * count
    return listed(kept(function, 0), kept(b"(" + large + b"t", 1), calls)


def keyed():
    """A long tuple is a key again and again."""
    key = b"(" + number(3) + put(0) + get(0) * LARGE + b"t"
    return listed(kept(key, 1), b"}" + (get(1) + b"Ns") * 900 + b"a")


def built():
    """A state of many entries is put into one dictionary again and again."""
    many = b"}" + (text("_metadata") + b"Ns") * LARGE
    return listed(kept(many, 1), b"ccollections\nOrderedDict\n)R" + (get(1) + b"b") * LARGE + b"a")


WORDS = text("\u00e9" * (LARGE * 10))
ENCODED = WORDS + text("latin1")
ITEMS = b"](" + text("a") * LARGE + b"e"
CASES = {
    "key": keyed,
    "build": built,
    "set": lambda: repeated(b"cbuiltins\nset\n", ITEMS),
    "OrderedDict": lambda: repeated(b"ccollections\nOrderedDict\n", ITEMS),
    "by its name of Python 2": lambda: repeated(b"cUserList\nOrderedDict\n", ITEMS),
    "Size": lambda: repeated(b"ctorch\nSize\n", b"(" + number(1) * LARGE + b"t"),
    "encode": lambda: repeated(b"c_codecs\nencode\n", ENCODED),
    "bytearray": lambda: repeated(b"cbuiltins\nbytearray\n", ENCODED),
}


@pytest.mark.parametrize("case", CASES)
def test_work_that_is_repeated_is_counted(case, tmp_path):
    zipped(CASES[case]())(tmp_path / "x.pt")
    begin = time.perf_counter()
    with pytest.raises(WeightsError, match="more than 2,000,000 instructions in its pickle"):
        bounds.check_torch_file(tmp_path / "x.pt", "x.pt")
    assert time.perf_counter() - begin < 20


@pytest.mark.parametrize("name", ["collections\ndefaultdict", "UserList\nOrderedDict"])
@pytest.mark.parametrize("hidden", ["items", "values", "keys"])
def test_no_dictionary_hides_its_methods(name, hidden, tmp_path):
    state = pickled((text(hidden), b"K\1"))[2:-1]
    zipped(one(b"c" + name.encode() + b"\n)R" + state + b"b"))(tmp_path / "x.pt")
    with pytest.raises(WeightsError, match=rf"attributes of its own \({hidden}\)"):
        bounds.check_torch_file(tmp_path / "x.pt", "x.pt")
