"""Whatever a config says, a checkpoint is neither unpickled nor fetched."""

import functools
import http.server
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.plugins import AsyncCheckpointIO, TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy

from bdclean.cli import main
from bdclean.commands.run_place import check_plugins, check_strategy
from bdclean.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore")
VICTIM = [
    *("fit", "-c", "trainer/cpu", "-c", "data/digits", "-c", "train/supervised/fast"),
    *("--model.width", "4", "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2"),
    *("--test_after_fit", "false", "--run", "run"),
]
TORCHS = "lightning.pytorch.plugins.TorchCheckpointIO"
JOB = {
    **{"SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "victim", "SLURM_NTASKS": "1"},
    **{"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"},
}


class Code:
    """Unpickled, it makes a folder."""

    def __init__(self, place):
        self.place = str(place)

    def __reduce__(self):
        return os.mkdir, (self.place,)


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """Works in a folder with a checkpoint that runs code, where `made` is the canary."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "files").mkdir()
    code = {"pytorch-lightning_version": "2.6.0", "code": Code(tmp_path / "made")}
    torch.save(code, "files/last.ckpt")
    yield
    assert not (tmp_path / "made").exists()


@pytest.fixture
def asked(tmp_path):
    """What a server of that file was asked for, after its address."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            super().do_GET()

        do_HEAD = do_GET  # noqa: N815

    handler = functools.partial(Handler, directory=str(tmp_path / "files"))
    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{served.server_port}/last.ckpt", asked
    served.shutdown()
    served.server_close()


def refused(capsys, *words):
    with pytest.raises(SystemExit, match="2"):
        main([*VICTIM, *words])
    told = capsys.readouterr().err.splitlines()
    assert not any("Arbitrary code" in line or "weights_only` argument" in line for line in told)
    return told[-1].removeprefix("bdclean: ")


UNPICKLE = (
    "TorchCheckpointIO can unpickle checkpoints, which runs what is in them, and fetch them from "
    "the network; leave it out."
)
NEVER = "--weights_only=False: checkpoints are never unpickled; leave it out."
CONFIGS = {
    "Lightning's reader": (
        {"trainer": {"plugins": [{"class_path": TORCHS}]}},
        f"--trainer.plugins: {UNPICKLE}",
    ),
    "its switch": ({"weights_only": False}, NEVER),
    "both": ({"trainer": {"plugins": [{"class_path": TORCHS}]}, "weights_only": False}, NEVER),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_does_not_have_a_checkpoint_unpickled(case, capsys, tmp_path):
    config, sentence = CONFIGS[case]
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config | {"ckpt_path": "files/last.ckpt"}))
    assert refused(capsys, "-c", "c.yaml") == sentence
    assert not (tmp_path / "run").exists()


def test_a_strategy_does_not_have_a_checkpoint_unpickled(capsys, tmp_path):
    strategy = {
        "class_path": "lightning.pytorch.strategies.SingleDeviceStrategy",
        "init_args": {"device": "cpu", "checkpoint_io": {"class_path": TORCHS}},
    }
    config = {"trainer": {"strategy": strategy}, "ckpt_path": "files/last.ckpt"}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    assert refused(capsys, "-c", "c.yaml") == f"--trainer.strategy.checkpoint_io: {UNPICKLE}"


def test_a_word_does_not_have_a_checkpoint_unpickled(capsys):
    assert refused(capsys, "--ckpt_path", "files/last.ckpt", "--weights_only", "false") == NEVER


def test_the_code_in_a_checkpoint_is_named(capsys):
    assert refused(capsys, "--ckpt_path", "files/last.ckpt") == (
        "--ckpt_path files/last.ckpt is not a readable checkpoint: it asks for the Python object "
        "'posix.mkdir', and no run keeps one."
    )


@pytest.mark.parametrize("plugin", [None, TORCHS, "SLURMEnvironment"])
def test_a_config_does_not_have_a_checkpoint_fetched(plugin, asked, capsys, tmp_path):
    address, requests = asked
    plugins = [] if plugin is None else [{"class_path": plugin}]
    config = {"trainer": {"plugins": plugins}, "ckpt_path": address}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    said = refused(capsys, "-c", "c.yaml")
    assert said == f"--ckpt_path {address}: there is no such file on this machine."
    assert requests == []


@pytest.mark.parametrize("given", ["s3://a/b.ckpt", "hf://a/b.ckpt", "registry:a", "file:///x"])
def test_other_places_are_not_asked(given, capsys):
    said = refused(capsys, "--ckpt_path", given)
    assert said == f"--ckpt_path {given}: there is no such file on this machine."


def test_readers_and_strategies_of_lightning():
    for reader in TorchCheckpointIO(), AsyncCheckpointIO():
        with pytest.raises(ConfigError, match=rf"^trainer\.plugins: {type(reader).__name__} can"):
            check_plugins([reader])
    check_plugins([type("Own", (TorchCheckpointIO,), {"__module__": "mine"})()])
    check_strategy(DDPStrategy())
    with pytest.raises(ConfigError, match=r"^trainer\.strategy: FSDPStrategy unpickles check"):
        check_strategy(FSDPStrategy())


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """The folder of a run that was stopped before its first checkpoint."""
    folder = tmp_path_factory.mktemp("begun")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(VICTIM)
    for file in (folder / "run").iterdir():
        if file.name != "config.yaml":
            shutil.rmtree(file) if file.is_dir() else file.unlink()
    return folder / "run"


FOUND = "run/hpc_ckpt_1.ckpt"
REQUEUED = {
    "a folder": (
        lambda: Path(FOUND).mkdir(),
        ": it is a folder where the checkpoint of a requeued job belongs; move it.",
    ),
    "rubbish": (
        lambda: Path(FOUND).write_text("rubbish"),
        " is not a readable checkpoint (it is no zip archive).",
    ),
    "code": (
        lambda: shutil.copy("files/last.ckpt", FOUND),
        " is not a readable checkpoint: it asks for the Python object 'posix.mkdir', and no run "
        "keeps one.",
    ),
}


@pytest.mark.parametrize("case", REQUEUED)
def test_a_file_that_nobody_typed_is_named_alone(case, begun, capsys, monkeypatch):
    """Lightning finds the checkpoint of a requeued job by itself."""
    for name, value in JOB.items():
        monkeypatch.setenv(name, value)
    make, sentence = REQUEUED[case]
    shutil.copytree(begun, "run")
    make()
    before = {file: file.stat().st_mtime_ns for file in Path("run").rglob("*")}
    assert refused(capsys) == f"{FOUND}{sentence}"
    assert {file: file.stat().st_mtime_ns for file in before} == before
