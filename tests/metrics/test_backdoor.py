import copy
import doctest
import math
import multiprocessing

import pytest
import torch
import torch.distributed as dist
from torchmetrics import MetricCollection

import bdclean.metrics.backdoor as module
from bdclean.metrics import AttackSuccessRate, CleanAccuracy, PoisonedAccuracy

NUM_CLASSES = 5


def triggered_stream(n=301, seed=0):
    """Predictions, true labels, and wanted labels that never equal the true ones."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(NUM_CLASSES, (n,), generator=generator)
    target = (label + torch.randint(1, NUM_CLASSES, (n,), generator=generator)) % NUM_CLASSES
    logits = torch.randn(n, NUM_CLASSES, generator=generator)
    logits[torch.arange(n), target] += 0.8
    logits[torch.arange(n), label] += 0.3
    return logits, label, target


def loop_percentages(logits, label, target):
    """The definitions over plain lists: ASR and PA in percent."""
    successes = robust = total = 0
    for scores, y, t in zip(logits.tolist(), label.tolist(), target.tolist(), strict=True):
        prediction = scores.index(max(scores))
        successes += prediction == t
        robust += prediction == y
        total += 1
    return 100 * successes / total, 100 * robust / total


def both(outputs, label, target):
    values = []
    for metric in (AttackSuccessRate(), PoisonedAccuracy()):
        metric.update(outputs, label, target)
        values.append(metric.compute().item())
    return tuple(values)


def test_metrics_equal_a_loop_over_lists():
    logits, label, target = triggered_stream()
    expected = loop_percentages(logits, label, target)
    assert expected[0] > expected[1] > 0  # the stream can tell the two apart
    assert both(logits, label, target) == pytest.approx(expected, abs=1e-4)
    assert both(logits.argmax(1), label, target) == pytest.approx(expected, abs=1e-4)
    accuracy = CleanAccuracy()
    accuracy.update(logits, label)
    assert accuracy.compute().item() == pytest.approx(expected[1], abs=1e-4)


def test_a_classifier_that_always_gives_the_target():
    label = torch.tensor([1, 2, 3, 4, 1])
    target = torch.zeros(5, dtype=torch.long)
    assert both(target, label, target) == (100.0, 0.0)


def test_a_perfectly_robust_classifier():
    label = torch.tensor([1, 2, 3, 4, 1])
    assert both(label, label, torch.zeros(5, dtype=torch.long)) == (0.0, 100.0)


@pytest.mark.parametrize("seed", range(5))
def test_asr_and_pa_leave_the_share_of_other_errors(seed):
    logits, label, target = triggered_stream(seed=seed)
    asr, pa = both(logits, label, target)
    prediction = logits.argmax(1)
    other = ((prediction != label) & (prediction != target)).sum().item()
    assert asr + pa <= 100
    assert 100 - asr - pa == pytest.approx(100 * other / len(label), abs=1e-4)


def test_a_sample_whose_label_is_the_target_counts_in_both():
    same = torch.tensor([3])
    assert both(same, same, same) == (100.0, 100.0)


@pytest.mark.parametrize("metric", [CleanAccuracy, AttackSuccessRate, PoisonedAccuracy])
def test_two_half_streams_merge_into_one(metric):
    stream = triggered_stream()
    arguments = stream[:2] if metric is CleanAccuracy else stream
    whole, first, second, step_by_step = metric(), metric(), metric(), metric()
    whole.update(*arguments)
    first.update(*(x[:100] for x in arguments))
    second.update(*(x[100:] for x in arguments))
    for start in range(0, 301, 64):
        step_by_step(*(x[start : start + 64] for x in arguments))
    first.merge_state(second)
    assert first.compute() == whole.compute() == step_by_step.compute()
    assert first.count == whole.count == step_by_step.count == 301


def test_accuracy_is_micro_averaged():
    label = torch.tensor([0] * 9 + [1])
    metric = CleanAccuracy()
    metric.update(torch.zeros(10, dtype=torch.long), label)
    assert metric.compute().item() == 90.0


@pytest.mark.parametrize("metric", [CleanAccuracy(), AttackSuccessRate(), PoisonedAccuracy()])
def test_states_are_integers_and_reset(metric):
    label = torch.tensor([0, 1])
    assert {getattr(metric, name).dtype for name in metric._defaults} == {torch.long}
    metric.update(label, *[label] * (1 if isinstance(metric, CleanAccuracy) else 2))
    assert (metric.hits, metric.count) == (2, 2)
    metric.reset()
    assert (metric.hits, metric.count) == (0, 0)


def test_no_sample_gives_nan():
    metric = AttackSuccessRate()
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        assert math.isnan(metric.compute())
    empty = torch.zeros(0, dtype=torch.long)
    metric.update(empty, empty, empty)
    assert math.isnan(metric.compute())
    assert metric.count == 0


def test_a_collection_keeps_metrics_apart_that_begin_alike():
    """Metrics with equal states after one batch are merged by MetricCollection."""
    collection = MetricCollection({"asr": AttackSuccessRate(), "pa": PoisonedAccuracy()})
    label, target = torch.tensor([1, 2]), torch.tensor([0, 0])
    collection.update(torch.tensor([0, 2]), label, target)
    collection.update(torch.tensor([0, 0]), label, target)
    values = {key: value.item() for key, value in collection.compute().items()}
    assert values == {"asr": 75.0, "pa": 25.0}


def test_a_copy_counts_on_its_own():
    metric = CleanAccuracy()
    other = copy.deepcopy(metric)
    metric.update(torch.tensor([1]), torch.tensor([1]))
    assert (metric.count, other.count) == (1, 0)


def test_examples_in_the_docstrings_run():
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


def _count_a_share(rank, folder, results):
    torch.set_num_threads(1)  # the thread pool of the parent does not survive a fork
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    logits, label, target = triggered_stream()
    share = slice(0, 37) if rank == 0 else slice(37, None)
    asr, pa = AttackSuccessRate(), PoisonedAccuracy()
    for metric in (asr, pa):
        metric.update(logits[share], label[share], target[share])
    values = (asr.compute().item(), pa.compute().item())
    results.put((rank, asr.count, asr.total_count(), *values))
    dist.destroy_process_group()


@pytest.mark.ddp
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork")
def test_two_processes_with_unequal_shares_equal_one(tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [
        context.Process(target=_count_a_share, args=(rank, str(tmp_path), results), daemon=True)
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    found = sorted(results.get(timeout=60) for _ in processes)
    for process in processes:
        process.join()
    expected = both(*triggered_stream())
    assert found == [(0, 37, 301, *expected), (1, 264, 301, *expected)]
