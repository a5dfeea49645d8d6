"""What the training rows of every attack with fixed ones must be."""

import pytest
import torch
from torch import Tensor

from bdclean.attacks import Attack, InputAware
from bdclean.attacks import trigger as trigger_module
from bdclean.data import poisoning
from bdclean.data.datamodule import ImageDataModule
from bdclean.data.images import ImageSet
from bdclean.data.splits import Splits

C, N, SIZE = 10, 200, 16
LABELS = torch.arange(N) % C


def stored(count: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, SIZE, SIZE), generator=generator).to(torch.uint8)


def prepared(attack: Attack):
    """The call to test, the clean rows that it takes, and which of them are covers."""
    plan, trigger = attack.plan(LABELS, C), attack.make_trigger((SIZE, SIZE))
    covers = torch.isin(plan.touched_index, plan.cover_index)
    return lambda rows: attack.poison_rows(rows, plan, trigger), stored(len(covers)), covers


def changed(one: Tensor, other: Tensor) -> list[int]:
    return (one != other).flatten(1).any(1).nonzero().flatten().tolist()


def test_rows_are_new_and_keep_type_and_shape(static_attack):
    poison, rows, covers = prepared(static_attack)
    before = rows.clone()
    out = poison(rows)
    assert torch.equal(rows, before)
    assert out.untyped_storage().data_ptr() != rows.untyped_storage().data_ptr()
    assert out.dtype == torch.uint8
    assert out.shape == rows.shape
    assert covers.any() == (static_attack.cover_rate > 0)
    assert changed(out, rows) == list(range(len(rows)))


def test_rows_are_the_same_in_each_call_whatever_the_global_seed(static_attack):
    poison, rows, _ = prepared(static_attack)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        state = torch.get_rng_state()
        first = poison(rows)
        assert torch.equal(torch.get_rng_state(), state)  # nothing drawn from the global one
        torch.manual_seed(2)
        assert torch.equal(poison(rows), first)


@pytest.mark.parametrize("chunk", [1, 3])
def test_rows_do_not_depend_on_their_chunk(static_attack, chunk, monkeypatch):
    poison, rows, _ = prepared(static_attack)
    whole = poison(rows)
    monkeypatch.setattr(trigger_module, "_CHUNK_VALUES", chunk * rows[0].numel())
    assert torch.equal(poison(rows), whole)


def test_a_row_depends_on_no_other_row(static_attack):
    poison, rows, covers = prepared(static_attack)
    out = poison(rows)
    chosen = [int((~covers).nonzero()[-1]), *covers.nonzero().flatten().tolist()[:1]]
    for i in chosen:
        other = rows.clone()
        other[i] = stored(1, seed=2)[0]
        differ = changed(poison(other), out)
        assert i in differ
        others = set(differ) - {i}
        if isinstance(static_attack, InputAware):  # a cover carries the trigger of another row
            assert len(others) <= 1
            assert all(covers[j] for j in others)
        else:
            assert not others


class Noise(ImageDataModule):
    name, num_classes, input_size = "noise", C, SIZE
    mean, std = (0.5, 0.5, 0.5), (0.3, 0.3, 0.3)

    def read_train(self) -> ImageSet:
        return ImageSet(stored(N), LABELS)

    def read_test(self) -> ImageSet:
        return ImageSet(stored(C, seed=2), LABELS[:C])


def test_the_training_set_has_these_rows_and_leaves_the_others(static_attack, monkeypatch):
    def unperturbed(perturbation, images, labels, num_classes):
        return images  # there is no surrogate here

    monkeypatch.setattr(poisoning, "adversarial_rows", unperturbed)
    data = Noise(static_attack, Splits(val=40))
    clean, plan = stored(N)[data.rows.train], data.plan
    assert len(clean) == 160
    seen = data.role_images("train", labels=True).__getitems__(torch.arange(len(clean)))
    touched = plan.touched_index
    expected = static_attack.poison_rows(clean[touched], plan, data.trigger)
    assert torch.equal(seen["image"][touched], expected)
    assert torch.equal(seen["image"][plan.clean_index], clean[plan.clean_index])
    assert torch.equal(seen["label"], plan.labels_seen)
    assert torch.equal(data.stored.images, stored(N))
