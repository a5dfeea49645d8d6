"""`bdclean weights`: what it tells of a file, and what it writes."""

import hashlib
import json
import os
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file

from bdclean.backbones import ModelInfo, build, export_onnx, load_model, save_model
from bdclean.backbones.exporting import _head_of, library_state
from bdclean.cli import main
from bdclean.errors import ConfigError, WeightsError
from bdclean.extras import EXTRAS

HALF = (0.5, 0.5, 0.5)


@pytest.fixture(autouse=True)
def _place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def _own(arch="resnet18", classes=3, size=32, width=4, **values):
    torch.manual_seed(0)
    return build(ModelInfo(arch, classes, size, HALF, HALF, width, **values)).eval()


def _narrow():
    """A state dict of our ResNet-18 by the names of torchvision."""
    return library_state(_own(stem="cifar"))


def _files(folder="."):
    return sorted(each.name for each in Path(folder).iterdir())


def run(capsys, *words):
    """Runs the command; gives its exit status and what it printed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            main(["weights", *words])
            status = 0
        except SystemExit as end:
            status = end.code
    return status, capsys.readouterr()


def _json(capsys, file):
    status, said = run(capsys, "inspect", file, "--json")
    return status, json.loads(said.out)


def test_a_nested_checkpoint_is_told_whole(capsys):
    state = {f"module.{name}": tensor for name, tensor in _narrow().items()}
    copy = {name: tensor + 1 for name, tensor in state.items()}
    state["module.projector.0.weight"] = torch.full((2, 32), torch.inf)
    torch.save({"state_dict": state, "ema": copy, "epoch": 3}, "x.pth")
    status, said = run(capsys, "inspect", "x.pth")
    lines = [" ".join(line.split()) for line in said.out.splitlines()]
    assert (status, said.err) == (0, "")
    content = Path("x.pth").read_bytes()
    assert lines[0] == f"x.pth: zip archive of torch.save, {len(content):,} bytes"
    assert lines[1] == f"SHA-256 {hashlib.sha256(content).hexdigest()}"
    text = " ".join(lines)
    for part in (
        f"state dicts state_dict ({len(state)} tensors), ema ({len(copy)} tensors)",
        "network in state_dict.module copies also in ema.module, which are not read",
        "architecture resnet18, width 4, stem cifar, images of 32 pixels, mean 0.485",
        f"{len(copy)} tensors have its names and shapes; first layer module.conv1.weight "
        "(4, 3, 3, 3); classifier module.fc.weight (3, 32) classes 3",
        "left over 1 tensor: module.projector.0.weight",
        "not finite state_dict.module.projector.0.weight",
    ):
        assert part in text, part


def test_json_holds_the_same_and_more(capsys):
    save_file({k: v.half() if v.is_floating_point() else v for k, v in _narrow().items()}, "x.st")
    status, found = _json(capsys, "x.st")
    assert (status, found["path"], found["file"]["kind"]) == (0, "x.st", "safetensors")
    (candidate,) = found["candidates"]
    assert (candidate["arch"], candidate["width"], candidate["num_classes"]) == ("resnet18", 4, 3)
    assert (found["unreadable"], found["unusable"], found["leftovers"]) == (None, None, [])
    numbers = sum(tensor.numel() for tensor in _narrow().values() if tensor.is_floating_point())
    assert found["dtypes"]["float16"][1] == numbers


def test_a_file_of_ours_says_what_it_is(capsys):
    save_model(_own(), "x.safetensors", {"method": "ours"})
    status, found = _json(capsys, "x.safetensors")
    assert status == 0
    assert found["metadata"]["method"] == "ours"
    assert found["evidence"] == "The metadata of the file says so."
    assert found["candidates"][0]["mean"] == list(HALF)


def test_all_candidates_are_listed(capsys):
    torch.save(library_state(_own("mobilenet_v2", width=32)), "x.pth")
    status, found = _json(capsys, "x.pth")
    stems = [each["stem"] for each in found["candidates"]]
    assert (status, stems) == (0, ["cifar", "imagenet"])
    assert "fits several architectures" in found["unusable"]
    lines = run(capsys, "inspect", "x.pth")[1].out.splitlines()
    assert sum("mobilenet_v2, width 32, stem" in line for line in lines) == 2
    status, said = run(capsys, "export", "x.pth", "y.pth")
    assert (status, said.err[-60:]) == (
        2,
        "name one with input_size, on the command line --input_size.\n",
    )
    assert run(capsys, "export", "x.pth", "y.pth", "--input_size", "32")[0] == 0


def test_a_file_of_no_known_network_is_readable(capsys):
    torch.save({"a.weight": torch.ones(2, 3), "b": torch.tensor([1.0, torch.nan])}, "x.pth")
    status, found = _json(capsys, "x.pth")
    assert (status, found["candidates"], found["not_finite"]) == (0, [], ["b"])
    assert "does not say which architecture it is for; name it with arch" in found["unusable"]


class _Call:
    """Makes a folder when it is loaded without care."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


def _zipped(file):
    torch.save({"x": torch.ones(3), "y": _Call()}, file)


def _legacy(file):
    torch.save({"y": _Call()}, file, _use_new_zipfile_serialization=False)


def _plain_pickle(protocol):
    return lambda file: Path(file).write_bytes(pickle.dumps([_Call(), _Call()], protocol))


@pytest.mark.parametrize("write", [_zipped, _legacy, *map(_plain_pickle, (2, 3, 4, 5))])
def test_what_a_pickle_would_do_is_told_and_not_done(write, capsys):
    write("x.pth")
    status, said = run(capsys, "inspect", "x.pth")
    assert status == 2
    assert f"{os.mkdir.__module__}.mkdir; whoever loads it without care runs them" in said.out
    assert "SHA-256" in said.out
    assert said.err.startswith("bdclean: x.pth ")
    assert _files() == ["x.pth"]


@pytest.mark.parametrize(
    ("name", "write", "kind", "way_out"),
    [
        (
            "x.npz",
            lambda: np.savez("x.npz", a=np.ones(3)),
            "an archive of NumPy arrays (.npz)",
            "convert it to a PyTorch state dict",
        ),
        (
            "x.pkl",
            lambda: Path("x.pkl").write_bytes(pickle.dumps({"a": np.ones(3)})),
            "file of torch.save of before torch 1.6",
            "write its state dict anew",
        ),
        (
            "x.pth",
            lambda: Path("x.pth").write_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
            "a Git LFS pointer, not the file",
            "run git lfs pull",
        ),
        (
            "x.safetensors",
            lambda: Path("x.safetensors").write_bytes(b"\x09" + bytes(7) + b'{"a": 1}'),
            "safetensors",
            "is not a readable safetensors file",
        ),
    ],
)
def test_other_files_are_told_with_the_way_out(name, write, kind, way_out, capsys):
    write()
    status, said = run(capsys, "inspect", name)
    assert status == 2
    assert said.out.startswith(f"{name}: {kind}")
    assert way_out in said.err
    assert run(capsys, "inspect", name, "--json")[0] == 2


def test_a_file_that_is_not_there(capsys):
    status, said = run(capsys, "inspect", "x.pth")
    assert (status, said.out) == (2, "")
    assert said.err == "bdclean: x.pth: there is no such weights file.\n"


def test_a_damaged_archive_is_told(capsys):
    torch.save(_narrow(), "x.pth")
    content = Path("x.pth").read_bytes()
    for size in (10, len(content) // 2, len(content) - 30):
        Path("x.pth").write_bytes(content[:size])
        assert run(capsys, "inspect", "x.pth")[0] == 2


def _lines(said):
    """The code that is printed after `Load it:`."""
    return "\n".join(line.strip() for line in said.partition("Load it:\n")[2].splitlines())


@pytest.mark.parametrize("out", ["new/y.safetensors", "y.pth"])
def test_a_state_dict_loads_into_the_library_by_the_lines_that_are_printed(out, capsys):
    network = torchvision.models.mobilenet_v3_small(num_classes=3)
    state = {f"model.{name}": tensor for name, tensor in network.state_dict().items()}
    torch.save({"state_dict": state}, "x.ckpt")
    arch = ["--arch", "mobilenet_v3_small"] if out == "y.pth" else []
    status, said = run(capsys, "export", "x.ckpt", out, *arch)
    assert status == 0
    assert "Names are those of torchvision:mobilenet_v3_small" in said.out
    assert "mean (0.485, 0.456, 0.406)" in said.out
    place = {}
    exec(_lines(said.out), place)  # noqa: S102
    for name, tensor in network.state_dict().items():
        assert torch.equal(place["network"].state_dict()[name], tensor)


def test_ours_to_a_plain_file_and_back_is_the_same_model(capsys):
    model = _own()
    save_model(model, "x.safetensors")
    for out, options in (("plain.safetensors", ()), ("back.safetensors", ("--to", "bdclean"))):
        status, said = run(capsys, "export", "x.safetensors", out, *options)
        place = {}
        exec(_lines(said.out), place)  # noqa: S102
        x = torch.rand(2, 3, 32, 32)
        assert status == 0
        with torch.no_grad():
            assert torch.equal(place["model"].eval()(x), model(x))
        assert place["model"].info == model.info
    assert load_file("plain.safetensors").keys() >= {"conv1.weight", "fc.weight"}
    assert Path("back.safetensors").read_bytes() == Path("x.safetensors").read_bytes()


def test_a_folder_for_the_hub_loads_in_timm(capsys):
    model = _own("timm:test_vit", size=32, width=64)
    save_model(model, "x.safetensors")
    status, said = run(capsys, "export", "x.safetensors", "vit")
    assert status == 0
    place = {}
    exec(_lines(said.out), place)  # noqa: S102
    network = place["network"].eval()
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(network((x - 0.5) / 0.5), model(x))
    settings = timm.data.resolve_model_data_config(network)
    assert (settings["mean"], settings["input_size"]) == ([0.5] * 3, (3, 32, 32))
    card = Path("vit/README.md").read_text()
    assert card.startswith("---\nlibrary_name: timm\npipeline_tag: image-classification\n")
    told = "timm:test\\_vit, 3 classes, images of 32 pixels. It takes normalised images: "
    assert told in card
    assert _files("vit") == ["README.md", "config.json", "model.safetensors"]


def test_a_folder_for_the_hub_of_a_network_of_ours(capsys):
    save_model(_own(classes=None), "x.safetensors")
    status, said = run(capsys, "export", "x.safetensors", "net", "--to", "hf")
    assert status == 0
    config = json.loads(Path("net/config.json").read_text())
    assert (config["library"], config["architecture"], config["width"]) == (
        "bdclean",
        "resnet18",
        4,
    )
    place = {}
    exec(_lines(said.out), place)  # noqa: S102
    assert place["model"].head is None


def test_a_classifier_goes_into_the_two_that_a_network_averages():
    head = torch.nn.Linear(6, 3)
    like = {"a.weight": torch.empty(3, 4), "a.bias": ..., "b.weight": torch.empty(3, 2, 1, 1)}
    state = _head_of(head, ("a", "b"), like | {"b.bias": ...}, "timm:x")
    x = torch.rand(5, 6)
    with torch.no_grad():
        first = torch.nn.functional.linear(x[:, :4], state["a.weight"], state["a.bias"])
        weight = state["b.weight"]
        second = torch.nn.functional.linear(x[:, 4:], weight.flatten(1), state["b.bias"])
        assert torch.allclose((first + second) / 2, head(x), atol=1e-6)
    assert weight.shape == (3, 2, 1, 1)


def test_a_model_without_a_classifier_leaves_it_out():
    state = library_state(_own("timm:test_vit", classes=None, width=64))
    assert not any(name.startswith("head") for name in state)
    state = library_state(_own("torchvision:mobilenet_v3_small", classes=None, width=64))
    assert "classifier.0.weight" in state
    assert "classifier.3.weight" not in state


def test_the_head_of_a_probe_has_no_place():
    model = _own()
    model.replace_head(3, "probe")
    with pytest.raises(WeightsError, match=r"normalises features first, .* Export it to ONNX"):
        library_state(model)


WRONG = {
    "a kind": (["y.pth", "--to", "keras"], "--to keras: it must be safetensors, state_dict, onnx"),
    "an ending": (["y.zip"], "OUT y.zip: it must end in .onnx, .safetensors or .pth, or be"),
    "another ending": (["y.pth", "--to", "onnx"], "OUT y.pth: it must end in .onnx."),
    "a file": (["x.safetensors"], "OUT x.safetensors exists already; give a new name."),
    "a width": (["y.pth", "--width", "8"], "width=8, but x.safetensors was made with width=4."),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_words_write_nothing(wrong, capsys):
    save_model(_own(), "x.safetensors")
    words, told = WRONG[wrong]
    status, said = run(capsys, "export", "x.safetensors", *words)
    assert status == 2
    assert said.err.startswith(f"bdclean: {told}")
    assert _files() == ["x.safetensors"]


@pytest.mark.parametrize("command", ["weights", "check"])
def test_messages_name_the_options_of_the_command(command, capsys):
    torch.save(_narrow(), "x.pth")
    words = {"weights": ["weights", "export", "x.pth", "y.pth"], "check": ["check", "x.pth"]}
    with pytest.warns(UserWarning, match=r"taken for resnet18 .*; --arch names another\.$"):
        main(words[command]) if command == "weights" else _until_exit(words[command])
    torch.save({"a": torch.ones(2, 3)}, "odd.pth")
    words[command][words[command].index("x.pth")] = "odd.pth"
    with pytest.raises(SystemExit):
        main([each.replace("y.pth", "z.pth") for each in words[command]])
    assert "on the command line --arch (for example" in capsys.readouterr().err


def _until_exit(words):
    try:
        main(words)
    except SystemExit as end:
        assert end.code == 3  # noqa: PT017  (no test applies without images)


def test_onnx_without_its_packages_is_one_sentence(capsys, monkeypatch):
    save_model(_own(), "x.safetensors")
    monkeypatch.setitem(EXTRAS, "onnx", ("json>=1", "no_such_package>=2.3"))
    status, said = run(capsys, "export", "x.safetensors", "y.onnx")
    told = "ONNX needs no_such_package, which is not installed: pip install 'no_such_package>=2.3'."
    assert (status, said.err) == (2, f"bdclean: {told}\n")


@pytest.mark.parametrize("classes", [3, None])
def test_onnx_answers_as_the_model(classes, capsys):
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name)
    runtime = pytest.importorskip("onnxruntime")
    model = _own(classes=classes)
    save_model(model, "x.safetensors")
    status, said = run(capsys, "export", "x.safetensors", "y.onnx")
    assert status == 0
    assert "the normalisation is inside" in said.out
    session = runtime.InferenceSession("y.onnx", providers=["CPUExecutionProvider"])
    x = torch.rand(5, 3, 32, 32)
    (found,) = session.run(None, {"images": x.numpy()})
    with torch.no_grad():
        expected = model(x) if classes else model.features(x)
    assert torch.allclose(torch.from_numpy(found), expected, atol=1e-5)


def test_onnx_that_answers_otherwise_is_not_kept(monkeypatch):
    monkeypatch.setitem(EXTRAS, "onnx", ())
    monkeypatch.setattr("bdclean.backbones.exporting._write_onnx", lambda _, file: file.touch())
    for difference in (0.01, float("nan")):
        value = difference
        monkeypatch.setattr("bdclean.backbones.exporting._difference", lambda *_: value)  # noqa: B023
        with pytest.raises(WeightsError, match=r"y\.onnx: ONNX answers otherwise than the model"):
            export_onnx(_own(), "y.onnx")
        assert _files() == []
    Path("y.onnx").touch()
    with pytest.raises(ConfigError, match="exists already"):
        export_onnx(_own(), "y.onnx")


def test_a_file_too_large_to_read_is_not_hashed(capsys, monkeypatch):
    torch.save(_narrow(), "x.pth")
    monkeypatch.setenv("BDCLEAN_MAX_WEIGHTS_GB", "0.00001")
    status, said = run(capsys, "inspect", "x.pth")
    assert status == 2
    assert "not computed: the file is too large to be read" in said.out


def test_the_original_stays_as_it_is(capsys):
    torch.save(_narrow(), "x.pth")
    before = Path("x.pth").read_bytes()
    run(capsys, "export", "x.pth", "y.pth")
    assert Path("x.pth").read_bytes() == before
    assert load_model("y.pth", arch="resnet18", width=4).info.num_classes == 3


def test_why_a_file_does_not_load_is_told_in_the_words_of_the_commands(capsys):
    torch.save({"x": torch.zeros(2), "y": torch.zeros(0)}, "odd.pth")
    said = " ".join(run(capsys, "inspect", "odd.pth")[1].out.split())
    assert "name it with arch, on the command line --arch" in said
    torch.save({"x": torch.zeros(2).to("meta")}, "empty.pth")
    assert " numbers none " in " ".join(run(capsys, "inspect", "empty.pth")[1].out.split())
