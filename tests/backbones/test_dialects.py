"""Files by the names of other libraries: read as the same network, and written back as they came.

The names are those that transformers 4 and 5, open_clip 3, MMPretrain 1 and DINOv2 save; the
networks of transformers and open_clip were compared by their answers once by hand.
"""

import re

import pytest
import timm
import torch
from torch.nn import functional as F

from bdclean.backbones import ModelInfo, build, load_model, save_like
from bdclean.backbones.dialects import translated
from bdclean.errors import WeightsError
from bdclean.weights import Nest

HALF = (0.5, 0.5, 0.5)
CLASSES = 3
ONES = torch.ones(2)


def _named(state, *rules):
    """The same tensors, each name through all rules."""
    named = {}
    for name, tensor in state.items():
        for pattern, words in rules:
            name = re.sub(pattern, words, name)
        named[name] = tensor
    return named


def _cut(state, *, as_names):
    """Queries, keys and values apart."""
    apart = {}
    for name, tensor in state.items():
        if ".attn.qkv." in name:
            parts = zip(as_names, tensor.chunk(3), strict=True)
            apart |= {name.replace(".attn.qkv.", part): values for part, values in parts}
        else:
            apart[name] = tensor
    return apart


def _flat(state, *names):
    """Without the dimensions of length 1 of the batch."""
    return {k: v.flatten(0, -2).squeeze(0) if k in names else v for k, v in state.items()}


def _transformers(state, root="vit."):
    state = _cut(
        state, as_names=[f".attention.attention.{part}." for part in ("query", "key", "value")]
    )
    return _named(
        state,
        (r"^head\.", "classifier." if root == "vit." else "cls_classifier."),
        (r"^head_dist\.", "distillation_classifier."),
        (r"^cls_token$", f"{root}embeddings.cls_token"),
        (r"^dist_token$", f"{root}embeddings.distillation_token"),
        (r"^pos_embed$", f"{root}embeddings.position_embeddings"),
        (r"^patch_embed\.proj\.", f"{root}embeddings.patch_embeddings.projection."),
        (r"^norm\.", f"{root}layernorm."),
        (r"\.attn\.proj\.", ".attention.output.dense."),
        (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."),
        (r"\.norm1\.", ".layernorm_before."),
        (r"\.norm2\.", ".layernorm_after."),
        (r"^blocks\.", f"{root}encoder.layer."),
    )


def _transformers_5(state):
    state = _cut(state, as_names=[f".attention.{part}_proj." for part in "qkv"])
    return _named(
        _transformers(state),
        (r"\.encoder\.layer\.", ".layers."),
        (r"\.attention\.output\.dense\.", ".attention.o_proj."),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"(\.layers\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    )


def _resnet_of_transformers(state):
    for i in range(1, 4):
        state = _named(
            state,
            (rf"^(layer\d\.\d\.)conv{i}\.", rf"\1layer.{i - 1}.convolution."),
            (rf"^(layer\d\.\d\.)bn{i}\.", rf"\1layer.{i - 1}.normalization."),
        )
    return _named(
        state,
        (r"^conv1\.", "resnet.embedder.embedder.convolution."),
        (r"^bn1\.", "resnet.embedder.embedder.normalization."),
        (r"\.downsample\.0\.", ".shortcut.convolution."),
        (r"\.downsample\.1\.", ".shortcut.normalization."),
        *((rf"^layer{i + 1}\.", f"resnet.encoder.stages.{i}.layers.") for i in range(4)),
        (r"^fc\.", "classifier.1."),
    )


def _clip_of_transformers(state):
    state = _flat(
        _cut(state, as_names=[f".self_attn.{part}_proj." for part in "qkv"]),
        *("cls_token", "pos_embed"),
    )
    named = _named(
        state,
        (r"^cls_token$", "embeddings.class_embedding"),
        (r"^pos_embed$", "embeddings.position_embedding.weight"),
        (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
        (r"^norm_pre\.", "pre_layrnorm."),
        (r"^norm\.", "post_layernorm."),
        (r"^blocks\.", "encoder.layers."),
        (r"\.attn\.proj\.", ".self_attn.out_proj."),
        (r"\.norm([12])\.", r".layer_norm\1."),
        ("^", "vision_model."),
    )
    return named | {"visual_projection.weight": torch.ones(4, 256), "logit_scale": torch.ones(())}


def _open_clip(state):
    named = _named(
        _flat(state, "cls_token", "pos_embed"),
        (r"^cls_token$", "class_embedding"),
        (r"^pos_embed$", "positional_embedding"),
        (r"^patch_embed\.proj\.", "conv1."),
        (r"^norm_pre\.", "ln_pre."),
        (r"^norm\.", "ln_post."),
        (r"^blocks\.", "transformer.resblocks."),
        (r"\.attn\.qkv\.", ".attn.in_proj_"),
        (r"\.attn\.proj\.", ".attn.out_proj."),
        (r"\.norm([12])\.", r".ln_\1."),
        (r"\.mlp\.fc1\.", ".mlp.c_fc."),
        (r"\.mlp\.fc2\.", ".mlp.c_proj."),
        ("^", "visual."),
    )
    return named | {
        "visual.proj": torch.ones(256, 4),
        "positional_embedding": torch.ones(7, 4),
        "transformer.resblocks.0.attn.in_proj_weight": torch.ones(12, 4),
        "transformer.resblocks.0.ln_1.weight": torch.ones(4),
        "token_embedding.weight": torch.ones(9, 4),
        "ln_final.weight": torch.ones(4),
        "text_projection": torch.ones(4, 4),
        "logit_scale": torch.ones(()),
    }


def _mmpretrain(state):
    return _named(
        state,
        (r"^head\.", "head.layers.head."),
        (r"^(?!head\.)", "backbone."),
        (r"\.patch_embed\.proj\.", ".patch_embed.projection."),
        (r"^backbone\.norm\.", "backbone.ln1."),
        (r"\.blocks\.", ".layers."),
        (r"\.norm([12])\.", r".ln\1."),
        (r"\.mlp\.fc1\.", ".ffn.layers.0.0."),
        (r"\.mlp\.fc2\.", ".ffn.layers.1."),
    )


def _dinov2(state):
    chunks = _named(
        state, *((rf"^blocks\.{i}\.(?=[a-z])", f"blocks.{i // 4}.{i}.") for i in range(8))
    )
    return chunks | {"mask_token": torch.ones(1, 64)}


def _under(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def _mae(state):
    decoder = {"decoder_blocks.0.norm1.weight": ONES, "decoder_pred.weight": ONES}
    return {"model": state | {"mask_token": ONES, "decoder_embed.weight": ONES} | decoder}


TEXT = "ln_final, logit_scale, positional_embedding, text_projection, token_embedding, transformer"
OTHERS = "belong to other parts of the model and are left out"
# name: (architecture, layout, keys to the network, whether it has a classifier, what is told)
LAYOUTS = {
    "transformers 4 ViT": ("timm:test_vit", _transformers, (), True, ""),
    "transformers 5 ViT": ("timm:test_vit", _transformers_5, (), True, ""),
    "transformers ResNet": ("resnet18", _resnet_of_transformers, (), True, ""),
    "transformers ResNet, a run of Lightning": (
        "resnet18",
        lambda state: {"state_dict": _under("model.", _resnet_of_transformers(state))},
        ("state_dict",),
        True,
        "",
    ),
    "open_clip": (
        "timm:vit_xsmall_patch16_clip_224",
        lambda state: {"state_dict": _under("module.", _open_clip(state))},
        ("state_dict",),
        False,
        f"8 tensors under {TEXT}, visual.proj {OTHERS}",
    ),
    "MMPretrain": (
        "timm:test_vit",
        lambda state: {"state_dict": _mmpretrain(state), "meta": {"epoch": 3}},
        ("state_dict",),
        True,
        "",
    ),
    "DINOv2": (
        "timm:test_vit2",
        lambda state: {"teacher": _under("backbone.", _dinov2(state))},
        ("teacher",),
        False,
        "1 tensor under mask_token belongs to another part of the model and is left out",
    ),
    "MAE": (
        "timm:test_vit",
        _mae,
        ("model",),
        False,
        "4 tensors under decoder_blocks, decoder_embed, decoder_pred, mask_token serve training "
        "alone and are left out",
    ),
}


def _network(arch):
    """A network as its library names it, and ours with its weights."""
    torch.manual_seed(0)
    if arch == "resnet18":
        model = build(ModelInfo(arch, CLASSES, 32, HALF, HALF, 4, "imagenet"))
        head = {f"fc.{name}": tensor for name, tensor in model.head.state_dict().items()}
        return model.backbone.state_dict() | head
    whole = timm.create_model(arch.removeprefix("timm:"), num_classes=CLASSES, img_size=32)
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.add_(torch.rand_like(parameter) * 0.1)
    return whole.state_dict()


def _load(path, arch):
    own = {"width": 4, "stem": "imagenet"} if arch == "resnet18" else {}
    return load_model(path, arch=arch, input_size=32, mean=HALF, std=HALF, **own).eval()


def _in(content, keys):
    for key in keys:
        content = content[key]
    return content


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_is_read_and_written_back(layout, tmp_path, recwarn):
    arch, laid_out, keys, has_head, told = LAYOUTS[layout]
    state = _network(arch)
    if not has_head:
        state = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
    content = laid_out(state)
    given = {k: v.half() if v.is_floating_point() else v for k, v in _in(content, keys).items()}
    for key in reversed(keys):
        given = {key: given}
    torch.save(given, tmp_path / "x.pth")
    model = _load(tmp_path / "x.pth", arch)
    said = [str(warning.message) for warning in recwarn]
    assert [told in each for each in said] == ([True] if told else [])
    assert (model.head is not None) == has_head
    for name, tensor in model.backbone.state_dict().items():
        assert torch.equal(tensor, state[name].half().float().to(tensor.dtype)), name

    save_like(tmp_path / "x.pth", model, tmp_path / "same.pth")
    there, back = (
        _in(torch.load(tmp_path / name, weights_only=True), keys) for name in ("x.pth", "same.pth")
    )
    left_out = {name for name in there if layout == "MAE" and name not in state}
    assert there.keys() - left_out == back.keys()
    for name, tensor in back.items():
        assert tensor.dtype == there[name].dtype, name
        assert torch.equal(tensor, there[name]), name  # of the same shape too

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)  # without rounding
    _, notes = save_like(tmp_path / "x.pth", model, tmp_path / "changed.pth")
    assert "Computed in float32 and rounded to the precision of the file: float16." in notes
    again = _load(tmp_path / "changed.pth", arch).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.allclose(again[name].float(), tensor.float(), atol=1e-6), name


@torch.no_grad()
def _answers(file, x, heads=2):
    """Of a ViT of transformers, computed from the tensors of its file."""

    def linear(x, name):
        return F.linear(x, file[f"{name}.weight"], file[f"{name}.bias"])

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], file[f"{name}.weight"], file[f"{name}.bias"], 1e-6)

    first = "vit.embeddings.patch_embeddings.projection"
    x = F.conv2d(x, file[f"{first}.weight"], file[f"{first}.bias"], stride=16)
    x = x.flatten(2).transpose(1, 2)
    token = file["vit.embeddings.cls_token"].expand(len(x), -1, -1)
    x = torch.cat([token, x], 1) + file["vit.embeddings.position_embeddings"]
    for i in range(6):
        layer = f"vit.encoder.layer.{i}"
        inner = norm(x, f"{layer}.layernorm_before")
        q, k, v = (
            linear(inner, f"{layer}.attention.attention.{part}").unflatten(2, (heads, -1))
            for part in ("query", "key", "value")
        )
        mixed = F.scaled_dot_product_attention(*(each.transpose(1, 2) for each in (q, k, v)))
        x = x + linear(mixed.transpose(1, 2).flatten(2), f"{layer}.attention.output.dense")
        inner = F.gelu(linear(norm(x, f"{layer}.layernorm_after"), f"{layer}.intermediate.dense"))
        x = x + linear(inner, f"{layer}.output.dense")
    return linear(norm(x, "vit.layernorm")[:, 0], "classifier")


def test_a_vit_of_transformers_answers_the_same(tmp_path):
    file = _transformers(_network("timm:test_vit"))
    torch.save(file, tmp_path / "x.pth")
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        found = _load(tmp_path / "x.pth", "timm:test_vit")(x)
    assert torch.allclose(found, _answers(file, (x - 0.5) / 0.5), rtol=1e-4, atol=1e-4)


def _resnet_of_clip(state):
    named = _named(
        state,
        *((rf"^stages\.{i}\.", f"layer{i + 1}.") for i in range(4)),
        (r"^stem\.conv(\d)\.conv\.", r"conv\1."),
        (r"^stem\.conv(\d)\.bn\.", r"bn\1."),
        (r"\.shortcut\.conv\.conv\.", ".downsample.0."),
        (r"\.shortcut\.conv\.bn\.", ".downsample.1."),
        (r"\.conv(\d)_(?:1x1|kxk)\.conv\.", r".conv\1."),
        (r"\.conv(\d)_(?:1x1|kxk)\.bn\.", r".bn\1."),
        (r"^head\.([qkv])\.", r"attnpool.\1_proj."),
        (r"^head\.pos_embed$", "attnpool.positional_embedding"),
        ("^", "visual."),
    )
    text = {"logit_scale": ONES, "transformer.resblocks.0.ln_1.weight": ONES}
    return named | {"visual.attnpool.c_proj.weight": ONES} | text


@pytest.mark.parametrize(
    ("arch", "classes", "laid_out", "library", "beside"),
    [
        ("resnet50_clip", 0, _resnet_of_clip, "CLIP ResNet", 3),
        ("vit_xsmall_patch16_clip_224", 0, _clip_of_transformers, "transformers CLIP", 2),
        (
            "deit_tiny_distilled_patch16_224",
            CLASSES,
            lambda state: _transformers(state, "deit."),
            "transformers ViT",
            0,
        ),
    ],
)
def test_every_name_of_a_large_network_is_known(arch, classes, laid_out, library, beside):
    """By names and shapes alone: loading takes seconds."""
    with torch.device("meta"):
        network = timm.create_model(arch, num_classes=classes)
    expected = {name: torch.empty(each.shape) for name, each in network.state_dict().items()}
    found = translated(Nest("", laid_out(expected)), "x.pth")
    assert found.nest.tensors.keys() == expected.keys()
    assert all(found.nest.tensors[name].shape == expected[name].shape for name in expected)
    assert (found.library, len(found.beside)) == (library, beside)


def test_what_timm_and_torchvision_name_is_left_as_it_is():
    for arch in ("test_vit", "test_vit2", "test_resnet", "test_byobnet"):
        with torch.device("meta"):
            state = timm.create_model(arch).state_dict()
        found = translated(Nest("", state), "x.pth")
        assert (found.library, found.nest.tensors.keys()) == ("", state.keys())


def test_a_network_of_transformers_that_is_not_read_is_named(tmp_path):
    torch.save({"swin.embeddings.norm.weight": ONES, "classifier.weight": ONES}, tmp_path / "x.pth")
    told = r"x\.pth holds a network of transformers \(swin\) by names that are not read.*timm"
    with pytest.raises(WeightsError, match=told):
        load_model(tmp_path / "x.pth", arch="timm:swin_tiny_patch4_window7_224")
    with pytest.raises(WeightsError, match=told):
        load_model(tmp_path / "x.pth")


def test_a_dinov2_with_registers_is_named():
    state = {"mask_token": ONES, "blocks.0.ls1.gamma": ONES, "register_tokens": ONES}
    with pytest.raises(WeightsError, match=r"x\.pth holds a DINOv2 with registers, .*timm publ"):
        translated(Nest("", state), "x.pth")


def test_parts_that_do_not_fit_together_stay_apart():
    state = _transformers(_network("timm:test_vit"))
    key = "vit.encoder.layer.0.attention.attention.key.weight"
    for odd in (torch.ones(5, 64), torch.ones(64, 64).half(), torch.tensor(1.0)):
        found = translated(Nest("", state | {key: odd}), "x.pth")
        assert "blocks.0.attn.qkv.weight" not in found.nest.tensors
        assert found.nest.tensors[key] is odd


def test_parts_that_show_one_memory_many_times_take_no_more_of_it():
    once = torch.ones(64, 64)
    state = {
        f"vit.encoder.layer.{i}.attention.attention.{part}.weight": once
        for i in range(1000)
        for part in ("query", "key", "value")
    }
    signs = {
        "vit.embeddings.patch_embeddings.projection.weight": ONES,
        "vit.encoder.layer.0.layernorm_before.weight": ONES,
    }
    found = translated(Nest("", state | signs), "x.pth")
    assert not any(".qkv." in name for name in found.nest.tensors)
