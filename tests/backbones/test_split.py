"""SplitModel: normalisation inside, names, head, copies."""

import json

import pytest
import torch
from torch import nn

from bdclean.backbones import ModelInfo, SplitModel, build
from bdclean.errors import ConfigError, WeightsError

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def _info(**changes):
    values = {"arch": "resnet18", "num_classes": 5, "input_size": 16, "mean": MEAN, "std": STD}
    return ModelInfo(**{**values, "width": 4, **changes})


def test_forward_is_head_of_features_of_normalised_pixels():
    model = build(_info()).eval()
    x = torch.rand(3, 3, 16, 16)
    normalised = torch.stack([(x[:, c] - MEAN[c]) / STD[c] for c in range(3)], dim=1)
    features = model.backbone(normalised)
    torch.testing.assert_close(model.features(x), features)
    torch.testing.assert_close(model(x), features @ model.head.weight.T + model.head.bias)
    assert model.features(x).shape == (3, 32)


def test_batch_norm_does_not_train_on_one_number():
    model = build(_info(stem="imagenet"))
    one = torch.rand(1, 3, 16, 16)
    with pytest.raises(
        ConfigError, match=r"^A batch is one image on each device, on which batch norm cannot train"
    ):
        model.features(one)
    assert model.eval().features(one).shape == (1, 32)
    assert build(_info()).features(one).shape == (1, 32)  # two pixels a side are enough


def test_state_dict_names():
    names = list(build(_info()).state_dict())
    assert names[:3] == ["normalize.mean", "normalize.std", "backbone.conv1.weight"]
    assert names[-2:] == ["head.weight", "head.bias"]
    assert {name.split(".")[0] for name in names} == {"normalize", "backbone", "head"}


def test_features_are_flat_for_any_backbone():
    model = SplitModel(nn.AdaptiveAvgPool2d(2), 12, None, MEAN, STD, _info())
    assert model.features(torch.rand(2, 3, 8, 8)).shape == (2, 12)


def test_without_a_head_there_are_features_and_no_classes():
    model = build(_info(num_classes=None))
    assert model.head is None
    assert model.features(torch.rand(2, 3, 16, 16)).shape == (2, 32)
    with pytest.raises(ConfigError, match="no classifier head"):
        model(torch.rand(2, 3, 16, 16))


def test_replace_head_follows_in_info():
    model = build(_info()).double()
    model.replace_head(7)
    assert model.info.num_classes == 7
    assert model.head.weight.shape == (7, 32)
    assert model.head.weight.dtype == torch.float64
    model.replace_head(None)
    assert model.head is None
    assert model.info.num_classes is None


def test_info_agrees_with_the_arguments():
    model = SplitModel(nn.Flatten(), 12, 3, MEAN, STD, _info(num_classes=9, mean=(0, 0, 0)))
    assert model.info.num_classes == 3
    assert model.info.mean == MEAN


def test_copy_shares_no_storage():
    model = build(_info())
    other = model.copy()
    state = other.state_dict()
    assert state.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name])
        assert tensor.untyped_storage().data_ptr() != state[name].untyped_storage().data_ptr()


def test_metadata_round_trip():
    info = _info(num_classes=None, mean=[0.1, 0.2, 1 / 3])
    metadata = info.to_metadata()
    assert all(isinstance(value, str) for value in metadata.values())
    assert ModelInfo.from_metadata({**metadata, "method": "cbd"}) == info
    assert metadata["bdclean_format"] == "1"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bdclean_format": "2"}, "bdclean_format='2'"),
        ({"width": "eight"}, "'width'"),
        ({"width": "8.5"}, "whole numbers"),
        ({"arch": "7"}, "arch is text"),
        ({"arch": "[" * 100_000}, "'arch'"),
        ({"std": "[1, 1]"}, "one number for each of R, G, B"),
        ({"std": "7"}, "does not describe a model"),
        ({"mean": json.dumps("abc")}, "does not describe a model"),
        ({"stem": '"wide"'}, "stem='wide'"),
    ],
)
def test_wrong_metadata_is_refused(changes, message):
    with pytest.raises(WeightsError, match=message):
        ModelInfo.from_metadata({**_info().to_metadata(), **changes})


def test_missing_metadata_is_refused():
    metadata = _info().to_metadata()
    del metadata["input_size"]
    with pytest.raises(WeightsError, match="'input_size'"):
        ModelInfo.from_metadata(metadata)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": 0}, "num_classes=0"),
        ({"input_size": -1}, "input_size=-1"),
        ({"width": 0}, "width=0"),
        ({"std": (0.1, 0.0, 0.1)}, "above 0"),
        ({"mean": (0.1, float("nan"), 0.1)}, "finite"),
        ({"stem": "big"}, "auto, cifar or imagenet"),
    ],
)
def test_values_out_of_range_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        _info(**changes)
