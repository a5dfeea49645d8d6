"""Names that other libraries give to the networks of torchvision and timm.

A dialect says the names of one library's state dicts in those of torchvision or timm. The tensors
are the same numbers: only names, dimensions of length 1, and the cut of queries, keys and values
differ. So a model can go back into the very layout, see `bdclean.backbones.layout`.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice, pairwise

import torch
from torch import Tensor

from bdclean.errors import WeightsError
from bdclean.printable import printable
from bdclean.weights import Nest, bytes_of

_Rules = tuple[tuple[str, str], ...]
_CUT = re.compile(r"(.*\.attn\.)([qkv])(\.(?:weight|bias))")  # as rules name parts of `attn.qkv`
_PLACES = 4  # of a state dict that are looked at
_THREE = ("cls_token", "pos_embed")  # have three dimensions in timm


@dataclass(frozen=True)
class Dialect:
    """How a library names a network.

    Attributes:
        library: Library and network, for people.
        roots: What stands before the names of the network; "" where it may stand alone.
        sign: A name under a root that tells of it, with that root before it.
        more: Pattern of another one that must be there too.
        rules: Patterns of names under a root, and what stands in their place, one after the other.
        heads: How names of the classifier begin, and what stands in their place.
        beside: Pattern of names, with the root, that belong to other parts of the library's module.
    """

    library: str
    roots: tuple[str, ...]
    sign: str
    more: str
    rules: _Rules
    heads: _Rules = ()
    beside: str = r"(?!)"

    def found_in(self, names: Mapping[str, object]) -> str | None:
        """What stands before the library's own names, None if they are not there."""
        places = ((before, root) for name in names for before, root in self._places(name))
        for before, root in islice(places, _PLACES):
            more = re.compile(re.escape(before + root) + self.more)
            if any(map(more.fullmatch, names)):
                return before
        return None

    def _places(self, name: str) -> Iterator[tuple[str, str]]:
        """What stands before the root, and the root, if a name is the sign."""
        if name.endswith(self.sign):
            before = name.removesuffix(self.sign)
            for root in self.roots:
                outer = before.removesuffix(root)
                if before.endswith(root) and (not outer or outer.endswith(".")):
                    yield outer, root
                    return

    def said(self, name: str) -> str:
        """A name in the words of torchvision or timm."""
        for pattern, words in self.heads:
            if re.search(pattern, name):
                return re.sub(pattern, words, name)
        root = next((root for root in self.roots if name.startswith(root)), None)
        if root is None:
            return name
        name = name.removeprefix(root)
        for pattern, words in self.rules:
            name = re.sub(pattern, words, name)
        return name


_BLOCKS = r"^(?:encoder\.layers?|layers)\.(\d+)\."
_VIT = (
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^layernorm\.", "norm."),
    (_BLOCKS, r"blocks.\1."),
    (r"\.attention\.attention\.([qkv])(?:uery|ey|alue)\.", r".attn.\1."),
    (r"\.attention\.([qkv])_proj\.", r".attn.\1."),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
)
_RESNET = (
    (r"^embedder\.embedder\.convolution\.", "conv1."),
    (r"^embedder\.embedder\.normalization\.", "bn1."),
    *((rf"^encoder\.stages\.{i}\.layers\.", f"layer{i + 1}.") for i in range(4)),
    (r"\.shortcut\.convolution\.", ".downsample.0."),
    (r"\.shortcut\.normalization\.", ".downsample.1."),
    *((rf"\.layer\.{i}\.convolution\.", f".conv{i + 1}.") for i in range(3)),
    *((rf"\.layer\.{i}\.normalization\.", f".bn{i + 1}.") for i in range(3)),
)
_CLIP_OF_TRANSFORMERS = (
    (r"^embeddings\.class_embedding$", "cls_token"),
    (r"^embeddings\.position_embedding\.weight$", "pos_embed"),
    (r"^embeddings\.patch_embedding\.", "patch_embed.proj."),
    (r"^pre_layrnorm\.", "norm_pre."),
    (r"^post_layernorm\.", "norm."),
    (_BLOCKS, r"blocks.\1."),
    (r"\.self_attn\.([qkv])_proj\.", r".attn.\1."),
    (r"\.self_attn\.out_proj\.", ".attn.proj."),
    (r"\.layer_norm([12])\.", r".norm\1."),
)
_CLIP = (
    (r"^class_embedding$", "cls_token"),
    (r"^positional_embedding$", "pos_embed"),
    (r"^conv1\.", "patch_embed.proj."),
    (r"^ln_pre\.", "norm_pre."),
    (r"^ln_post\.", "norm."),
    (r"^transformer\.resblocks\.", "blocks."),
    (r"\.attn\.in_proj_", ".attn.qkv."),
    (r"\.attn\.out_proj\.", ".attn.proj."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)
_CLIP_RESNET = (
    (r"^conv(\d)\.", r"stem.conv\1.conv."),
    (r"^bn(\d)\.", r"stem.conv\1.bn."),
    *((rf"^layer{i + 1}\.", f"stages.{i}.") for i in range(4)),
    (r"^(stages\.\d+\.\d+\.)downsample\.0\.", r"\1shortcut.conv.conv."),
    (r"^(stages\.\d+\.\d+\.)downsample\.1\.", r"\1shortcut.conv.bn."),
    *(
        (rf"^(stages\.\d+\.\d+\.){old}{i}\.", rf"\1conv{i}_{size}.{new}.")
        for i, size in ((1, "1x1"), (2, "kxk"), (3, "1x1"))
        for old, new in (("conv", "conv"), ("bn", "bn"))
    ),
    (r"^attnpool\.positional_embedding$", "head.pos_embed"),
    (r"^attnpool\.([qkv])_proj\.", r"head.\1."),
)
_TEXT_OF_CLIP = (
    r"(?:(?:transformer|token_embedding|ln_final|text)\..*|positional_embedding|text_projection"
    r"|logit_scale|logit_bias|attn_mask|input_resolution|context_length|vocab_size"
)
_MMPRETRAIN = (
    (r"^patch_embed\.projection\.", "patch_embed.proj."),
    (r"^ln1\.", "norm."),
    (r"^pre_norm\.", "norm_pre."),
    (_BLOCKS, r"blocks.\1."),
    (r"\.ln([12])\.", r".norm\1."),
    (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
)

DIALECTS = (
    Dialect(
        "transformers ViT",
        ("vit.", "deit.", ""),
        "embeddings.patch_embeddings.projection.weight",
        r".*\.layernorm_before\.weight",
        _VIT,
        (
            (r"^(?:cls_)?classifier\.", "head."),
            (r"^distillation_classifier\.", "head_dist."),
        ),
        beside=r"(?:(?:vit|deit)\.)?(?:pooler\..*|embeddings\.mask_token)",
    ),
    Dialect(
        "transformers ResNet",
        ("resnet.", ""),
        "embedder.embedder.convolution.weight",
        r"encoder\.stages\.3\.layers\.0\.layer\.0\.convolution\.weight",
        _RESNET,
        ((r"^classifier\.1\.", "fc."),),
    ),
    Dialect(
        "transformers CLIP",
        ("vision_model.",),
        "embeddings.class_embedding",
        r"pre_layrnorm\.weight",
        _CLIP_OF_TRANSFORMERS,
        beside=r"text_model\..*|(?:visual|text)_projection\.weight|logit_scale"
        r"|vision_model\.embeddings\.position_ids",
    ),
    Dialect(
        "CLIP ViT",
        ("visual.",),
        "class_embedding",
        r"transformer\.resblocks\.0\.attn\.in_proj_weight",
        _CLIP,
        beside=_TEXT_OF_CLIP + r"|visual\.proj)",
    ),
    Dialect(
        "CLIP ResNet",
        ("visual.",),
        "attnpool.positional_embedding",
        r"layer4\.0\.conv1\.weight",
        _CLIP_RESNET,
        beside=_TEXT_OF_CLIP + r"|visual\.attnpool\.c_proj\..*)",
    ),
    Dialect(
        "MMPretrain ViT",
        ("backbone.", ""),
        "patch_embed.projection.weight",
        r"layers\.0\.ffn\.layers\.0\.0\.weight",
        _MMPRETRAIN,
        ((r"^head\.layers\.head\.", "head."),),
    ),
    Dialect(
        "DINOv2",
        ("",),
        "mask_token",
        r"blocks\.0(?:\.0)?\.ls1\.gamma",
        ((r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),),
        beside="mask_token",
    ),
)
# Networks of transformers whose names are read by no dialect, and what follows them in names.
_UNREAD = frozenset(
    {
        *("beit", "convnext", "convnextv2", "data2vec_vision", "dinov2", "dinov3_vit", "levit"),
        *("mobilevit", "mobilenet_v1", "mobilenet_v2", "poolformer", "regnet", "segformer"),
        *("swin", "swinv2", "van", "vit_mae", "vit_msn"),
    }
)
_PARTS = frozenset({"embeddings", "embedder", "encoder", "conv_stem"})
_DEPTH = 4  # parts of a name that are looked at


@dataclass(frozen=True)
class Translated:
    """A state dict by the names of torchvision or timm.

    Attributes:
        nest: By those names.
        origin: By those of the file.
        names: Of each tensor of `nest`, the names in `origin` of what it is made of.
        beside: Names in `origin` of what belongs to other parts of the library's module.
        library: Whose names they are in the file; "" for torchvision's and timm's.
    """

    nest: Nest
    origin: Nest
    names: dict[str, tuple[str, ...]]
    beside: tuple[str, ...] = ()
    library: str = ""


def translated(nest: Nest, weights: object) -> Translated:
    """Says the names of a state dict in those of torchvision or timm, where they are others.

    Args:
        nest: The state dict; no two of its tensors are one object.
        weights: The file.

    Raises:
        WeightsError: If it is of a network that is known and cannot be read.
    """
    for dialect in DIALECTS:
        before = dialect.found_in(nest.tensors)
        if before is not None:
            if f"{before}register_tokens" in nest.tensors:
                raise WeightsError(
                    f"{printable(weights)} holds a DINOv2 with registers, whose position of the "
                    "class token timm adds to the token itself; take the file that timm publishes "
                    "(vit_*_reg4_dinov2), or a DINOv2 without registers."
                )
            return _said_in(dialect, before, nest)
    _refuse_unread(nest, weights)
    return Translated(nest, nest, {name: (name,) for name in nest.tensors})


def _said_in(dialect: Dialect, before: str, nest: Nest) -> Translated:
    names: dict[str, tuple[str, ...]] = {}
    beside: list[str] = []
    cut: dict[str, dict[str, str]] = {}
    for name in nest.tensors:
        inner = name.removeprefix(before)
        if not name.startswith(before):
            names[name] = (name,)
        elif re.fullmatch(dialect.beside, inner):
            beside.append(name)
        elif (part := _CUT.fullmatch(said := before + dialect.said(inner))) is not None:
            cut.setdefault(f"{part[1]}qkv{part[3]}", {})[part[2]] = name
        else:
            names[name if said in names else said] = (name,)
    left = bytes_of(nest.tensors)  # many tensors may show the same memory
    for said, parts in cut.items():
        tensors = [nest.tensors[name] for name in parts.values()]
        left -= sum(tensor.nbytes for tensor in tensors)
        if len(parts) == len("qkv") and said not in names and left >= 0 and _are_alike(tensors):
            names[said] = tuple(parts[letter] for letter in "qkv")
        else:
            names |= {name: (name,) for name in parts.values()}
    tensors_by_name = {
        said: _shaped(said.removeprefix(before), [nest.tensors[name] for name in several])
        for said, several in names.items()
    }
    translation = replace(nest, tensors=tensors_by_name)
    return Translated(translation, nest, names, tuple(beside), dialect.library)


def _are_alike(tensors: list[Tensor]) -> bool:
    first = tensors[0]
    return first.ndim > 0 and all(
        (each.shape, each.dtype) == (first.shape, first.dtype) for each in tensors
    )


def _shaped(name: str, parts: list[Tensor]) -> Tensor:
    """A tensor of parts of a file, as timm has it."""
    whole = torch.cat(parts) if len(parts) > 1 else parts[0]
    while name in _THREE and 0 < whole.ndim < len("BND"):
        whole = whole[None]
    return whole


def _refuse_unread(nest: Nest, weights: object) -> None:
    pairs = (pair for name in nest.tensors for pair in pairwise(name.split(".", _DEPTH)[:_DEPTH]))
    kind = next((kind for kind, part in pairs if kind in _UNREAD and part in _PARTS), None)
    if kind is not None:
        raise WeightsError(
            f"{printable(weights)} holds a network of transformers ({kind}) by names that are "
            "not read; those of its ResNet, ViT, DeiT and CLIP are. Load it where transformers is "
            "at hand, copy its tensors into the same network of timm, and save that state dict."
        )
