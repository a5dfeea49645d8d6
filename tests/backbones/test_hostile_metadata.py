"""Weights files of ours whose metadata was changed by somebody."""

import pytest
from hostile import check, in_bounds, load, own, table

from bdclean.weights import read, write

pytestmark = pytest.mark.filterwarnings("ignore")
FIT = " does not fit resnet18 (width 4, stem cifar, input size 8): "
UNDESCRIBED = ": its metadata describes no model ("


# What is said after the path of each file, "..." for more.
METADATA = {
    f"{UNDESCRIBED}The metadata has no readable value for 'width').": {
        "huge int width": own(width="9" * 4000),
        "huger int width": own(width="9" * 5000),
    },
    f"{UNDESCRIBED}The metadata does not describe a model: ...": {
        "float width": own(width="1e400"),
        "width bool": own(width="true"),
        "mean text": own(mean='"abc"'),
        "mean of truths": own(mean="[true,false,true]"),
        "std of truths": own(std="[true,true,true]"),
        "std of texts": own(std='["0.5","0.5","0.5"]'),
        "mean 1e400": own(mean="[1e400,0,0]"),
        "std list list": own(std="[[1],[1],[1]]"),
        "stem list": own(stem="[1]"),
        "head dict": own(head='{"a":1}'),
        "arch list": own(arch='["resnet18"]'),
        "classes 0": own(num_classes="0"),
        "classes list": own(num_classes="[]"),
    },
    f"{UNDESCRIBED}The metadata has no readable value for 'mean').": {
        "mean huge": own(mean="[" + "9" * 4000 + ",0,0]"),
    },
    f"{UNDESCRIBED}The metadata has no readable value for 'stem').": {
        "stem long": own(stem='"' + "x" * 5000 + '"'),
    },
    f"{UNDESCRIBED}arch='resnet\\x1b[31m\\n18' is unknown. ...": {
        "arch escape": own(arch='"resnet\\u001b[31m\\n18"'),
    },
    f"{UNDESCRIBED}arch='timm:hf_hub:evil/model' is unknown. ...": {
        "arch hub": own(arch='"timm:hf_hub:evil/model"'),
    },
    f"{UNDESCRIBED}arch='torchvision:torchvision:resnet18' is unknown. ...": {
        "arch colons": own(arch='"torchvision:torchvision:resnet18"'),
    },
    f"{UNDESCRIBED}arch='torchvision:fasterrcnn_resnet50_fpn' is unknown. ...": {
        "arch detection": own(arch='"torchvision:fasterrcnn_resnet50_fpn"'),
    },
    f"{UNDESCRIBED}bdclean_format='2' in the metadata: this release reads '1').": {
        "format 2": own(bdclean_format="2"),
    },
    f"{UNDESCRIBED}The metadata has no readable value for 'arch').": {
        "missing arch": own(arch=None),
        "garbage json": own(arch="{{{"),
    },
}
LARGE = {
    f"{UNDESCRIBED}The metadata has no readable value for 'width').": {
        "deep json": own(width="[" * 100_000 + "]" * 100_000),
    },
    " does not fit timm:vit_gigantic_patch14_224 (width 64, stem imagenet, input size 224): ...": {
        "timm huge": own(
            arch='"timm:vit_gigantic_patch14_224"', width="64", stem='"imagenet"', input_size="224"
        ),
    },
    " does not fit torchvision:regnet_y_128gf (width 64, stem imagenet, input size 224): 538...": {
        "regnet": own(
            arch='"torchvision:regnet_y_128gf"', width="64", stem='"imagenet"', input_size="224"
        ),
    },
    ": no resnet18 can be built with the width, num_classes and input_size in its metadata.": {
        "width": own(width="1000000000"),
    },
    f"{FIT}2 misshaped (head.weight: float32 (4, 32) instead of float32 (1000000000000, 32),...": {
        "classes": own(num_classes="1000000000000"),
    },
    " does not fit resnet18 (width 4, stem imagenet, input size 1000000000): 1 misshaped (ba...": {
        "input": own(input_size="1000000000"),
    },
    f"{UNDESCRIBED}arch='timm:vit_tiny_patch16_224' does not take input_size=1000000:...": {
        "vit input": own(
            arch='"timm:vit_tiny_patch16_224"', width="64", stem='"imagenet"', input_size="1000000"
        ),
    },
    " does not fit timm:swin_tiny_patch4_window7_224 (width 64, stem imagenet, input size 10...": {
        "swin input": own(
            arch='"timm:swin_tiny_patch4_window7_224"',
            width="64",
            stem='"imagenet"',
            input_size="100000",
        ),
    },
    f"{UNDESCRIBED}The metadata has no readable value for 'arch').": {
        "arch 300k": own(arch='"' + "resnet18" * 40000 + '"'),
    },
}


@pytest.mark.parametrize(("make", "sentence"), table(METADATA))
def test_odd_metadata(make, sentence, tmp_path):
    make(tmp_path / "x.safetensors")
    check(load(tmp_path / "x.safetensors"), sentence)


@pytest.mark.parametrize(("make", "sentence"), table(LARGE))
def test_metadata_that_asks_for_everything(make, sentence, tmp_path):
    make(tmp_path / "x.safetensors")
    in_bounds(tmp_path / "x.safetensors", sentence)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("backbone.bn1.running_var", -0.5),
        ("backbone.layer4.1.bn2.running_var", -1e-9),
        ("normalize.std", -0.2),
    ],
)
def test_spreads_below_zero(name, value, tmp_path):
    own()(tmp_path / "good.safetensors")
    state, metadata = read(tmp_path / "good.safetensors")
    state[name].view(-1)[1] = value
    write(state, tmp_path / "x.safetensors", metadata)
    check(
        load(tmp_path / "x.safetensors"),
        f": {name} holds numbers below 0, and no variance or standard deviation is; take another "
        "copy of the file.",
    )
