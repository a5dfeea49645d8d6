"""What may be given as --ckpt_path: whole checkpoints of runs on this machine, never unpickled."""

import functools
import http.server
import os
import threading

import pytest
import torch

from bdclean.callbacks import AtomicCheckpointIO
from bdclean.errors import ConfigError


class Code:
    """Unpickled, it makes a folder."""

    def __init__(self, place):
        self.place = str(place)

    def __reduce__(self):
        return os.mkdir, (self.place,)


@pytest.fixture
def hostile(tmp_path):
    (tmp_path / "files").mkdir()
    path = tmp_path / "files" / "last.ckpt"
    torch.save({"pytorch-lightning_version": "2.6.0", "code": Code(tmp_path / "made")}, path)
    return path


@pytest.fixture
def server(hostile):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(hostile.parent))
    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{served.server_port}/last.ckpt"
    served.shutdown()
    served.server_close()


def test_a_url_is_not_read(server, tmp_path):
    with pytest.raises(ConfigError, match="there is no such file on this machine"):
        AtomicCheckpointIO().load_checkpoint(server)
    assert not (tmp_path / "made").exists()


def test_code_in_a_file_is_not_run(hostile, tmp_path):
    with pytest.raises(ConfigError, match="is not a readable checkpoint"):
        AtomicCheckpointIO().load_checkpoint(hostile)
    with pytest.raises(ConfigError, match="leave out weights_only"):
        AtomicCheckpointIO().load_checkpoint(hostile, weights_only=False)
    assert not (tmp_path / "made").exists()


def test_what_is_no_checkpoint_is_told(tmp_path):
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "weights.pth")
    with pytest.raises(ConfigError, match="give a weights file as --model"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "weights.pth")
    (tmp_path / "cut.ckpt").write_bytes((tmp_path / "weights.pth").read_bytes()[:99])
    with pytest.raises(ConfigError, match="is not a readable checkpoint"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "cut.ckpt")


def test_a_checkpoint_comes_back_whole(tmp_path):
    whole = {"pytorch-lightning_version": "2.6.0", "state_dict": {"w": torch.arange(3)}}
    AtomicCheckpointIO().save_checkpoint(whole, tmp_path / "deep" / "last.ckpt")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["last.ckpt"]
    again = AtomicCheckpointIO().load_checkpoint(tmp_path / "deep" / "last.ckpt")
    assert torch.equal(again["state_dict"]["w"], torch.arange(3))
