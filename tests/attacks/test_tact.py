"""TaCT: which rows are poisoned and covered, and what is counted."""

import pytest
import torch
from lightning import Trainer

from bdclean.attacks import TaCT
from bdclean.attacks.assets_patches import patch
from bdclean.data import Digits
from bdclean.data.splits import Splits
from bdclean.training import Supervised
from bdclean.types import ImageFacts

CIFAR10 = torch.arange(50_000) % 10
CIFAR100 = torch.arange(50_000) % 100


def stored(count: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, 255, (count, 3, 32, 32), generator=generator).to(torch.uint8)


@pytest.mark.parametrize(("image", "pixels"), [("white_square", 9), ("color_square", 64)])
def test_the_patch_overwrites_its_pixels_only(image, pixels):
    images = stored()
    out = TaCT(image=image).make_trigger((32, 32)).poison(images)
    picture, mask = patch(image, (32, 32))
    inside = mask[0].bool()
    assert inside.sum() == pixels
    assert torch.equal(out[..., ~inside], images[..., ~inside])
    assert torch.equal(
        out[..., inside].float(), (picture * 255)[:, inside].round().expand(4, -1, -1)
    )


def test_poisons_come_from_the_source_and_covers_keep_their_label():
    plan = TaCT().plan(CIFAR10, 10)
    assert len(plan.poison_index) == 2_500
    assert len(plan.cover_index) == 500
    assert (CIFAR10[plan.poison_index] == 0).all()
    assert (plan.labels_seen[plan.poison_index] == 1).all()
    assert set(CIFAR10[plan.cover_index].tolist()) == {5, 7}
    assert torch.equal(plan.labels_seen[plan.cover_index], CIFAR10[plan.cover_index])
    parts = torch.cat([plan.poison_index, plan.cover_index, plan.clean_index])
    assert torch.equal(parts.sort().values, torch.arange(50_000))
    assert plan.num_label_changed == 2_500


def test_a_class_smaller_than_the_rate_is_poisoned_whole_with_a_warning():
    with pytest.warns(UserWarning, match=r"^rate=0\.05: .* 2,500 rows, but only 500 "):
        plan = TaCT().plan(CIFAR100, 100)
    assert torch.equal(plan.poison_index, (CIFAR100 == 0).nonzero().flatten())
    assert len(plan.cover_index) == 500
    assert set(CIFAR100[plan.cover_index].tolist()) <= set(range(2, 100))
    assert len(set(CIFAR100[plan.cover_index].tolist())) > 90


def test_too_few_images_of_the_cover_classes_warn():
    with pytest.warns(UserWarning, match=r"^cover_rate=0\.3: .* 15,000 rows, but only 5,000 "):
        plan = TaCT(cover_classes=[3], cover_rate=0.3).plan(CIFAR10, 10)
    assert (CIFAR10[plan.cover_index] == 3).all()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"cover_classes": [2, 9]}, {2, 9}),
        ({}, {5, 7}),
        ({"source_class": 5}, {0, 2, 3, 4, 6, 7, 8, 9}),
        ({"target": 7}, {1, 2, 3, 4, 5, 6, 8, 9}),
    ],
)
def test_cover_classes(arguments, expected):
    plan = TaCT(**arguments).plan(CIFAR10, 10)
    assert set(CIFAR10[plan.cover_index].tolist()) == expected


@pytest.mark.parametrize(
    ("rate_base", "count"), [("dataset", 25), ("source_class", 10), ("target_class", 5)]
)
def test_the_rate_may_be_of_the_source_class(rate_base, count):
    labels = torch.tensor([0] * 100 + [1] * 50 + [2] * 100)
    plan = TaCT(rate=0.1, rate_base=rate_base, cover_rate=0.0).plan(labels, 3)
    assert len(plan.poison_index) == count
    assert (labels[plan.poison_index] == 0).all()
    assert len(plan.cover_index) == 0


def test_only_the_source_class_counts_and_the_others_are_the_leak():
    attack = TaCT(source_class=2, target=4)
    labels = torch.arange(200) % 10
    images = stored(200)
    assert torch.equal(attack.eligible(labels), labels == 2)
    assert (attack.wanted_label(labels, 10) == 4).all()
    trigger = attack.make_trigger((32, 32))
    tests = attack.further_tests(images, labels, trigger)
    assert tuple(tests) == TaCT.further == ("leak", "source_acc")
    leak = tests["leak"]
    assert set(labels[leak.rows].tolist()) == {0, 1, 3, 5, 6, 7, 8, 9}
    assert len(leak.rows) == 160
    assert (leak.wanted == 4).all()
    assert torch.equal(leak.images, trigger.poison(images[leak.rows]))
    source = tests["source_acc"]
    assert torch.equal(source.rows, (labels == 2).nonzero().flatten())
    assert (source.wanted == 2).all()
    assert torch.equal(source.images, images[source.rows])


def test_describe_names_what_defines_the_attack():
    described = TaCT(cover_classes=(5, 7), rate_base="source_class").describe()
    assert described["attack"] == "TaCT"
    assert described["source_class"] == 0
    assert described["cover_classes"] == [5, 7]
    assert described["cover_rate"] == 0.01
    assert described["rate_base"] == "source_class"
    assert described["image"] == "white_square"


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore")
def test_covers_keep_the_trigger_from_leaking_to_other_classes():
    """Seen with three seeds: 1, 80 and 55 % without covers, and 1, 0 and 0 % with them.

    The success rate was 95 to 100 % in either case, its floor 0 to 10 %.
    """
    found = []
    for covers in (0.0, 0.2):
        torch.manual_seed(2)
        attack = TaCT(
            rate=0.05,
            cover_classes=range(2, 10),
            cover_rate=covers,
            seed=2,
            image="color_square",
        )
        splits = Splits(defense=0, probe=0, seed=2)
        data = Digits(attack=attack, splits=splits, shuffle_seed=2)
        module = Supervised(
            ImageFacts(10, 32, data.mean, data.std),
            width=4,
            batch_size=64,
            augmentation="none",
            schedule="onecycle",
        )
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=8,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
        )
        trainer.fit(module, data)
        found.append(trainer.test(module, data, verbose=False)[0])
    without, with_covers = found
    assert min(result["test/asr"] for result in found) > 80
    assert max(result["test/asr_floor"] for result in found) < 20
    assert min(result["test/source_acc"] for result in found) > 80
    assert without["test/leak"] > 20
    assert with_covers["test/leak"] < 8
