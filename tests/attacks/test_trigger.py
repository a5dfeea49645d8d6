"""What every trigger must do."""

import hashlib
import json
import time
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from bdclean.attacks import (
    SIG,
    AdaptiveBlend,
    AdaptivePatch,
    BadNets,
    Blend,
    InputAware,
    Trigger,
    WaNet,
)
from bdclean.errors import AttackError, BdcleanError

SIZE = 32


def floats(count: int = 5, size: int = SIZE) -> Tensor:
    images = torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1))
    images[0], images[1] = 0.0, 1.0  # where clipping matters
    return images


def stored(count: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(0, 256, (count, 3, SIZE, SIZE), generator=generator)
    images[0], images[1] = 0, 255
    return images.to(torch.uint8)


def test_forward_keeps_shape_type_range_and_input(attack):
    trigger = attack.make_trigger((SIZE, SIZE))
    images = floats()
    before = images.clone()
    out = trigger(images)
    assert out.shape == images.shape
    assert out.dtype == images.dtype
    assert out.min() >= 0
    assert out.max() <= 1
    assert not torch.equal(out, images)
    assert torch.equal(images, before)
    assert trigger(images.double()).dtype == torch.float64


def test_batch_equals_images_one_by_one(attack):
    trigger = attack.make_trigger((SIZE, SIZE))
    images = floats()
    assert torch.equal(trigger(images), torch.stack([trigger(image) for image in images]))
    rows = stored()
    assert torch.equal(trigger.poison(rows), torch.stack([trigger.poison(row) for row in rows]))


def test_two_triggers_of_one_attack_agree_whatever_the_global_seed(attack):
    images = floats()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        first = attack.make_trigger((SIZE, SIZE))
        state = torch.get_rng_state()
        torch.manual_seed(2)
        second = attack.make_trigger((SIZE, SIZE))
        torch.manual_seed(1)
        assert torch.equal(torch.get_rng_state(), state)  # nothing drawn from the global one
    assert torch.equal(first(images), second(images))
    assert torch.equal(first(images), first(images))
    assert first.fingerprint == second.fingerprint


@pytest.mark.parametrize("size", [8, 33, 64])
def test_other_sizes(attack, size):
    if isinstance(attack, AdaptiveBlend) and size % 4:
        with pytest.raises(
            AttackError, match=f"divisor of both sides of an image of {size}x{size}"
        ):
            attack.make_trigger((size, size))
        return
    assert attack.make_trigger((size, size))(floats(2, size)).shape == (2, 3, size, size)


def test_poison_is_forward_rounded_to_8_bits(attack):
    trigger = attack.make_trigger((SIZE, SIZE))
    images = stored()
    before = images.clone()
    exact = trigger(images.double() / 255) * 255
    out = trigger.poison(images)
    assert out.dtype == torch.uint8
    assert torch.equal(images, before)
    below = exact - out.double()
    if attack.quantize == "floor":  # 2e-4 levels for the rounding of float32
        assert below.min() >= -2e-4
        assert below.max() < 1
    else:
        assert below.abs().max() <= 0.5 + 2e-4


def test_chunks_change_nothing_and_are_few(attack, monkeypatch):
    trigger = attack.make_trigger((SIZE, SIZE))
    images = stored(1500)
    expected = torch.cat([trigger.poison(part) for part in images.split(100)])
    sizes = []
    stamp = type(trigger).stamp
    monkeypatch.setattr(
        type(trigger), "stamp", lambda self, x: (sizes.append(len(x)), stamp(self, x))[1]
    )
    assert torch.equal(trigger.poison(images), expected)
    assert sum(sizes) == 1500
    assert 2 <= len(sizes) <= 20  # not the whole set as floats, and never image by image


def test_3000_cifar_images_take_well_under_a_second():
    images = stored(3000)
    for attack in (BadNets(), Blend(), SIG(), WaNet()):
        trigger = attack.make_trigger((SIZE, SIZE))
        trigger.poison(images[:10])
        start = time.perf_counter()
        trigger.poison(images)
        assert time.perf_counter() - start < 1.0


def test_saved_trigger_is_bit_equal(attack, tmp_path):
    trigger = attack.make_trigger((SIZE, SIZE))
    path = tmp_path / "trigger.safetensors"
    trigger.save(path)
    loaded = Trigger.load(path)
    assert type(loaded) is type(trigger)
    assert loaded.quantize == attack.quantize
    assert loaded.fingerprint == trigger.fingerprint
    for name, value in trigger.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert torch.equal(loaded(floats()), trigger(floats()))
    assert torch.equal(loaded.poison(stored()), trigger.poison(stored()))


def test_state_dict_round_trip(attack):
    trigger = attack.make_trigger((SIZE, SIZE))
    other = attack.make_trigger((SIZE, SIZE))
    for buffer in other.buffers():
        buffer.zero_()
    other.load_state_dict(trigger.state_dict())
    assert other.fingerprint == trigger.fingerprint
    assert not list(trigger.parameters())


def test_fingerprint_tells_triggers_apart(attacks):
    attacks = [*attacks.values(), BadNets(quantize="floor"), Blend(image_seed=1), Blend(alpha=0.1)]
    prints = {attack.make_trigger((SIZE, SIZE)).fingerprint for attack in attacks}
    assert len(prints) == len(attacks)


def test_loading_refuses_what_is_not_a_saved_trigger(tmp_path):
    path = tmp_path / "trigger.safetensors"
    with pytest.raises(BdcleanError, match=r"trigger\.safetensors"):
        Trigger.load(path)
    path.write_bytes(b"not a safetensors file")
    with pytest.raises(BdcleanError, match=r"trigger\.safetensors"):
        Trigger.load(path)


def test_loading_refuses_a_changed_file_and_an_unknown_class(tmp_path):
    path = tmp_path / "trigger.safetensors"
    Blend().make_trigger((8, 8)).save(path)
    with safe_open(path, framework="pt") as stream:
        metadata = stream.metadata()
        tensors = {name: stream.get_tensor(name) for name in ("picture", "mask")}
    tensors["picture"][0, 0, 0] += 0.25
    save_file(tensors, path, metadata)
    with pytest.raises(AttackError, match="was changed"):
        Trigger.load(path)
    save_file(tensors, path, {**metadata, "trigger": "os.system"})
    with pytest.raises(AttackError, match=r"unknown trigger class 'os\.system'"):
        Trigger.load(path)
    save_file(tensors, path, {**metadata, "arguments": json.dumps({"colour": 1})})
    with pytest.raises(AttackError, match="not a saved"):
        Trigger.load(path)


@pytest.mark.parametrize(
    "images",
    [torch.rand(2, 3, 16, 16), torch.rand(2, 1, SIZE, SIZE), torch.rand(SIZE, SIZE)],
    ids=["size", "channels", "dimensions"],
)
def test_images_of_another_shape_are_refused(images):
    trigger = Blend().make_trigger((SIZE, SIZE))
    with pytest.raises(AttackError, match=r"shape .*\(B, 3, 32, 32\)"):
        trigger(images)
    with pytest.raises(AttackError, match=r"shape .*\(B, 3, 32, 32\)"):
        trigger.poison(images.byte())


def test_images_of_another_type_are_refused():
    trigger = Blend().make_trigger((SIZE, SIZE))
    with pytest.raises(AttackError, match="uint8"):
        trigger(stored())
    with pytest.raises(AttackError, match="uint8"):
        trigger.poison(floats())


def test_quantize_none_keeps_floats_and_refuses_uint8():
    trigger = Blend(quantize="none").make_trigger((SIZE, SIZE))
    assert torch.equal(trigger(floats()), Blend().make_trigger((SIZE, SIZE))(floats()))
    with pytest.raises(AttackError, match=r"^quantize=none: it must be round or floor"):
        trigger.poison(stored())


def test_floor_takes_the_floor_of_the_real_value():
    # with alpha 1/5 the real value is (4 x + t) / 5 levels: integers give the exact floor, also
    # where float32 puts a whole number just below itself
    trigger = Blend(alpha=0.2, quantize="floor").make_trigger((SIZE, SIZE))
    picture = (trigger.picture * 255).round().long()
    images = stored(20)
    expected = (4 * images.long() + picture).div(5, rounding_mode="floor")
    assert torch.equal(trigger.poison(images).long(), expected)


def test_gradients_flow_through_the_trigger():
    images = torch.full((1, 3, SIZE, SIZE), 0.5, requires_grad=True)
    (gradient,) = torch.autograd.grad(
        Blend(alpha=0.25).make_trigger((SIZE, SIZE))(images).sum(), images
    )
    assert torch.allclose(gradient, torch.full_like(gradient, 0.75))


def test_no_warnings_from_reading_a_loaded_trigger(tmp_path):
    path = tmp_path / "deep" / "trigger.safetensors"
    BadNets().make_trigger((SIZE, SIZE)).save(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Trigger.load(str(path)).poison(stored())


# What earlier versions wrote, whose triggers were square: a file must stay what it was.
EARLIER = {
    "badnets.PatchTrigger": (BadNets(), '{"quantize": "round"}'),
    "blend.BlendTrigger": (Blend(), '{"quantize": "round", "alpha": 0.2}'),
    "sig.SIGTrigger": (
        SIG(variant="convex", alpha=0.3, quantize="floor"),
        '{"quantize": "floor", "variant": "convex", "alpha": 0.3}',
    ),
    "wanet.WaNetTrigger": (WaNet(), '{"quantize": "round"}'),
    "adaptive_patch.PatchSetTrigger": (
        AdaptivePatch(),
        '{"quantize": "round", "alphas": [1.0, 1.0, 1.0, 1.0]}',
    ),
    "input_aware.UnlearnedTrigger": (InputAware(), '{"quantize": "round", "input_size": 16}'),
    "input_aware.InputAwareTrigger": (None, '{"quantize": "round", "input_size": 16}'),
}


@pytest.mark.parametrize("name", EARLIER)
def test_files_of_earlier_versions_load(name, learned_trigger, tmp_path):
    attack, arguments = EARLIER[name]
    attack = attack or InputAware(trigger=learned_trigger)
    trigger = attack.make_trigger((16, 16))
    tensors = dict(trigger.state_dict())
    full = f"bdclean.attacks.{name}"
    digest = hashlib.sha256(f'["{full}", {arguments}]'.encode())
    for key in sorted(tensors):
        value = tensors[key].contiguous()
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.numpy().tobytes())
    metadata = {"trigger": full, "arguments": arguments, "fingerprint": digest.hexdigest()}
    save_file(tensors, tmp_path / "earlier.safetensors", metadata)
    loaded = Trigger.load(tmp_path / "earlier.safetensors")
    assert loaded.size == (16, 16)
    assert loaded.fingerprint == trigger.fingerprint == digest.hexdigest()
    trigger.save(tmp_path / "today.safetensors")
    with safe_open(tmp_path / "today.safetensors", framework="pt") as stream:
        assert metadata.items() <= stream.metadata().items()
