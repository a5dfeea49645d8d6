"""The input-aware attack: networks, learned trigger, frozen sets.

The contract of all triggers is tested here and not in test_trigger.py: this trigger has a file,
one image size and two networks.
"""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from bdclean.attacks import BadNets, InputAware, Trigger
from bdclean.attacks.input_aware import (
    InputAwareTrigger,
    TriggerGenerator,
    UnlearnedTrigger,
    mix,
    threshold,
)
from bdclean.errors import AttackError
from bdclean.types import BatchPlace

SIZE, MEAN, STD = 16, (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)


def floats(count=6, size=SIZE):
    images = torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1))
    images[0], images[1] = 0.0, 1.0
    return images


def stored(count=6):
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, 256, (count, 3, SIZE, SIZE), generator=generator).to(torch.uint8)


def network(channels, seed):
    """Random weights, and the running statistics of a batch, as after training."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = TriggerGenerator(channels, MEAN, STD)
    norms = [layer for layer in made.modules() if isinstance(layer, nn.BatchNorm2d)]
    for layer in norms:
        layer.momentum = 1.0
    made(floats(16))
    for layer in norms:
        layer.momentum = 0.05
    return made


@pytest.fixture(scope="module")
def trigger():
    return InputAwareTrigger(network(3, 1), network(1, 2), SIZE)


@pytest.fixture(scope="module")
def file(trigger, tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "trigger.safetensors"
    trigger.save(path)
    return str(path)


# ---------------------------------------------------------------------- networks and formulas


def test_parameter_counts_are_those_of_the_public_code():
    counts = [sum(p.numel() for p in network(c, 0).parameters()) for c in (3, 1)]
    assert counts == [723_273, 722_691]


def test_network_is_a_literal_transcription():
    made = network(3, 5).eval()
    convolutions = [m for m in made.modules() if isinstance(m, nn.Conv2d)]
    norms = [m for m in made.modules() if isinstance(m, nn.BatchNorm2d)]
    widths = [32, 32, 64, 64, 128, 128, 128, 128, 64, 64, 32, 32, 3]
    assert [m.out_channels for m in convolutions] == widths
    assert {m.momentum for m in norms} == {0.05}

    x = (floats() - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    for i in range(13):
        if i in (7, 9, 11):
            x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
        c, n = convolutions[i], norms[i]
        x = F.conv2d(x, c.weight, c.bias, stride=1, padding=1)
        x = F.batch_norm(x, n.running_mean, n.running_var, n.weight, n.bias)
        x = torch.relu(x) if i < 12 else x
        if i in (1, 3, 5):
            x = F.max_pool2d(x, 2)
    torch.testing.assert_close(made(floats()), torch.tanh(x) / (2 + 1e-7) + 0.5)


def test_outputs_lie_in_the_unit_interval_in_float32_under_autocast():
    for channels in (1, 3):
        made = network(channels, 3)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = made(floats())
        assert out.dtype == torch.float32
        assert out.shape == (6, channels, SIZE, SIZE)
        assert 0 < out.min() < out.max() < 1
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = made.eval()(floats())
        assert torch.equal(inside, made(floats()))


def test_threshold_has_the_golden_values():
    values = threshold(torch.tensor([0.5, 0.45, 0.4, 0.25], dtype=torch.float64))
    assert values.tolist() == pytest.approx([0.5, 0.1192, 0.0180, 4.54e-5], abs=5e-5)
    assert values[3].item() == pytest.approx(4.54e-5, rel=1e-2)


def test_mask_zero_is_the_image_and_mask_one_the_pattern():
    images, pattern = floats(), floats().flip(0)
    mask = torch.zeros(6, 1, SIZE, SIZE)
    assert torch.equal(mix(images, pattern, mask), images)
    torch.testing.assert_close(mix(images, pattern, mask + 1), pattern)


def test_mixing_commutes_with_normalisation():
    made, images, pattern = network(3, 0), floats(), floats().flip(0)
    mask = torch.rand(6, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(
        made.normalize(mix(images, pattern, mask)),
        mix(made.normalize(images), made.normalize(pattern), mask),
    )


# ---------------------------------------------------------------------- the trigger


def test_trigger_is_the_formula(trigger):
    g, m, images = network(3, 1).eval(), network(1, 2).eval(), floats()
    mask = torch.tanh(20 * m(images) - 10) / (2 + 1e-7) + 0.5
    wanted = images * (1 - mask) + g(images) * mask
    torch.testing.assert_close(trigger(images), wanted)
    donors = images.roll(2, 0)
    mask = torch.tanh(20 * m(donors) - 10) / (2 + 1e-7) + 0.5
    wanted = images * (1 - mask) + g(donors) * mask
    torch.testing.assert_close(trigger.cross(images, donors), wanted)


def test_every_image_has_a_trigger_of_its_own(trigger):
    """Root-mean-square distance of any two; seen with three networks: 0.25 at least."""
    images = floats()
    on_one_image = trigger.cross(images[2].expand_as(images), images)
    for made in (trigger.pattern(images), threshold(trigger.mask(images)), on_one_image):
        distance = (made[:, None] - made).square().flatten(2).mean(2).sqrt()
        assert distance[~torch.eye(6, dtype=torch.bool)].min() > 0.1


def test_contract_of_forward(trigger):
    images = floats()
    before = images.clone()
    out = trigger(images)
    assert out.shape == images.shape
    assert out.dtype == torch.float32
    assert out.min() >= 0
    assert out.max() <= 1
    assert torch.equal(images, before)
    assert trigger(images.double()).dtype == torch.float64
    assert torch.equal(trigger(images), out)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(trigger(images), out)


def test_an_image_gets_the_same_bits_alone_in_a_chunk_and_in_another_memory_format(trigger):
    images, rows = floats(), stored(20)
    out = trigger(images)
    assert torch.equal(out, torch.stack([trigger(image) for image in images]))
    assert torch.equal(out, trigger(images.to(memory_format=torch.channels_last)))
    whole = trigger.poison(rows)
    assert torch.equal(whole, torch.stack([trigger.poison(row) for row in rows]))
    for size in (2, 7, 19):
        assert torch.equal(whole, torch.cat([trigger.poison(part) for part in rows.split(size)]))
    exact = trigger(rows.double() / 255) * 255
    assert (whole.double() - exact).abs().max() <= 0.5 + 2e-4
    assert torch.equal(trigger.as_stored(trigger(rows.float() / 255)), whole.float() / 255)


def test_trigger_has_buffers_only_and_stays_in_evaluation_mode(trigger):
    g = network(3, 1)
    made = InputAwareTrigger(g, network(1, 2), SIZE)
    assert not list(made.parameters())
    assert not any(layer.training for layer in made.train().modules())
    before = made.fingerprint
    made(floats())
    assert made.fingerprint == before == trigger.fingerprint
    with torch.no_grad():
        g.layers[0].weight.zero_()  # the networks go on training; the trigger is a copy
    assert made.fingerprint == before


def test_state_dict_and_file_round_trip(trigger, file):
    loaded = Trigger.load(file)
    assert isinstance(loaded, InputAwareTrigger)
    assert loaded.fingerprint == trigger.fingerprint
    assert torch.equal(loaded.poison(stored()), trigger.poison(stored()))
    other = InputAwareTrigger(network(3, 7), network(1, 8), SIZE)
    assert other.fingerprint != trigger.fingerprint
    other.load_state_dict(trigger.state_dict())
    assert other.fingerprint == trigger.fingerprint


def test_a_changed_file_is_refused(file, tmp_path):
    from safetensors import safe_open

    with safe_open(file, framework="pt") as stream:
        metadata = stream.metadata()
    tensors = load_file(file)
    changed = tmp_path / "trigger.safetensors"
    name = "mask.layers.0.bias"
    save_file(tensors | {name: tensors[name] + 1}, changed, metadata)
    with pytest.raises(AttackError, match="was changed"):
        Trigger.load(changed)
    del tensors[name]
    save_file(tensors, changed, metadata)
    with pytest.raises(AttackError, match=r"not a saved .*: the network mask in it has"):
        Trigger.load(changed)


def test_sizes_are_refused():
    with pytest.raises(AttackError, match=r"input_size=20: it must be a multiple of 8"):
        InputAwareTrigger(network(3, 1), network(1, 2), 20)


# ---------------------------------------------------------------------- with a learned trigger


def test_learned_trigger_is_an_ordinary_attack(file, trigger):
    attack = InputAware(trigger=file, quantize="floor")
    assert not attack.dynamic
    made = attack.make_trigger((SIZE, SIZE))
    assert made.quantize == "floor"
    assert torch.equal(made(floats()), trigger(floats()))
    assert attack.describe()["trigger"] == "trigger.safetensors"
    assert attack.describe()["cover_rate"] == 0.1
    with pytest.raises(AttackError, match=r"^trigger=.*for images of 32x32 pixels, not 16x16"):
        attack.make_trigger((32, 32))


def test_another_trigger_is_refused(tmp_path):
    BadNets().make_trigger((SIZE, SIZE)).save(tmp_path / "t.safetensors")
    attack = InputAware(trigger=str(tmp_path / "t.safetensors"))
    with pytest.raises(AttackError, match="the file of a learned input-aware trigger"):
        attack.make_trigger((SIZE, SIZE))


def test_frozen_set_crosses_covers_and_keeps_their_labels(file, trigger):
    attack, labels = InputAware(target=3, rate=0.2, trigger=file), torch.arange(50) % 10
    plan, images = attack.plan(labels, 10), stored(50)
    assert (len(plan.poison_index), len(plan.cover_index)) == (10, 5)
    assert (plan.labels_seen[plan.poison_index] == 3).all()
    assert torch.equal(plan.labels_seen[plan.cover_index], labels[plan.cover_index])
    rows = images[plan.touched_index]
    before = rows.clone()
    out = attack.poison_rows(rows, plan, attack.make_trigger((SIZE, SIZE)))
    assert torch.equal(rows, before)
    cover = torch.isin(plan.touched_index, plan.cover_index)
    own = trigger.poison(rows)
    assert torch.equal(out[~cover], own[~cover])
    donors = []
    for image, made in zip(rows[cover], out[cover], strict=True):
        crossed = trigger.change(
            image.expand_as(rows), lambda x, part: trigger.cross(x, rows[part].float() / 255)
        )
        found = (crossed == made).flatten(1).all(1).nonzero().flatten().tolist()
        assert len(found) == 1
        donors += found
    assert not set(zip(donors, cover.nonzero().flatten().tolist(), strict=True)) & {
        (i, i) for i in range(15)
    }
    assert len(set(donors)) == 5


def test_cross_test_gives_every_image_the_trigger_of_another(file, trigger):
    images, labels = stored(9), torch.arange(9) % 10
    attack = InputAware(trigger=file)
    tests = attack.further_tests(images, labels, attack.make_trigger((SIZE, SIZE)))
    assert list(tests) == ["cross_acc"]
    test = tests["cross_acc"]
    assert torch.equal(test.rows, torch.arange(9))
    assert torch.equal(test.wanted, labels)
    donors = attack._donors("test", torch.arange(9))
    assert donors.sort().values.tolist() == list(range(9))
    assert (donors != torch.arange(9)).all()
    wanted = trigger.cross(images.float() / 255, images[donors].float() / 255)
    assert torch.equal(test.images, (wanted * 255).round().to(torch.uint8))
    assert not torch.equal(donors, InputAware(trigger=file, seed=1)._donors("test", test.rows))


@pytest.mark.parametrize("count", [0, 1, 2, 500])
def test_donors_have_no_fixed_point(count):
    rows = torch.arange(count)
    donors = InputAware()._donors("rows", rows)
    assert torch.equal(donors.sort().values, rows)
    assert count == 1 or (donors != rows).all()


# ---------------------------------------------------------------------- before it is learned


def test_unlearned_trigger_changes_nothing_and_can_be_saved(tmp_path):
    attack = InputAware()
    assert attack.dynamic
    made = attack.make_trigger((33, 33))
    assert isinstance(made, UnlearnedTrigger)
    images = floats(size=33)
    assert torch.equal(made(images), images)
    assert made(images) is not images
    made.save(tmp_path / "trigger.safetensors")
    assert Trigger.load(tmp_path / "trigger.safetensors").fingerprint == made.fingerprint
    plan = attack.plan(torch.arange(50) % 10, 10)
    assert len(plan.touched_index) == 0
    assert attack.describe()["trigger"] is None


def test_nothing_but_the_module_that_holds_it_may_use_it(file):
    attack = InputAware()
    assert attack.stamped_by_module
    attack.require_stamper(SimpleNamespace(attack=attack))
    for module in (None, object(), SimpleNamespace(attack=InputAware())):
        with pytest.raises(AttackError, match=r"^trigger=None: .*InputAwareTraining"):
            attack.require_stamper(module)
    learned = InputAware(trigger=file)
    assert not learned.stamped_by_module
    learned.require_stamper(None)
    with pytest.raises(AttributeError):
        attack.stamped_by_module = False


def test_it_leaves_all_images_to_that_module():
    attack, images = InputAware(), floats()
    made, labels = attack.make_trigger((SIZE, SIZE)), torch.arange(6)
    same = attack.poison_batch(images, labels, made, 10, BatchPlace(), torch.Generator())
    assert torch.equal(same[0], images)
    assert torch.equal(same[1], labels)
    test = attack.further_tests(stored(), labels, made)["cross_acc"]
    # in any order but that of the test set, which may be sorted by class
    assert sorted(test.rows.tolist()) == list(range(6)) != test.rows.tolist()
    assert torch.equal(test.images, stored()[test.rows])
    assert torch.equal(test.wanted, labels[test.rows])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cover_rate": -0.1}, r"cover_rate=-0\.1: it must be in \[0, 0\.9\] with rate 0\.1"),
        ({"cover_rate": 0.6, "rate": 0.5}, r"in \[0, 0\.5\]"),
        ({"rate_base": "target_class"}, "^rate_base=.*dataset, before there is a trigger file"),
        ({"label_rule": "clean_label"}, "^label_rule=.*all_to_one or all_to_all, before"),
        ({"exclude_target": True}, "^exclude_target=.*false, before"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(AttackError, match=message):
        InputAware(**arguments)
