import json
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from grouping import make_of
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file

from bdclean.attacks import BadNets, WaNet
from bdclean.backbones import build
from bdclean.backbones.perturber import Perturber
from bdclean.callbacks.suspects import Suspects
from bdclean.data import ImageSet, Splits
from bdclean.errors import ConfigError, DivergedError
from bdclean.functional.ranking import share_of
from bdclean.functional.seeds import derive_seed
from bdclean.modules import Recipe
from bdclean.sifting import AdvrBD
from bdclean.sifting.base import chosen
from bdclean.types import ImageFacts

# Networks of two epochs may flag the whole of a class.
pytestmark = pytest.mark.filterwarnings("ignore:More than 95% of the samples")

SMALL = Recipe(epochs=2, lr=0.05, batch_size=16, augmentation="crop")


@pytest.fixture
def make(facts):
    def make(**arguments):
        torch.manual_seed(2)
        few = {
            "width": 4,
            "recipe": SMALL,
            "finetune": replace(SMALL, epochs=1),
            "rounds": {"count": 2, "of_all": 0, "partition_rate": 0.2, "ascent_steps": 1},
            "patch": {"pgd": {"steps": 2}},
            "enhance_steps": 8,
        }
        return make_of(AdvrBD, facts, few, arguments)

    return make


@pytest.fixture
def make_poisoned(make_data):
    """Sixty-four training images, an eighth of them with a patch and the label 1."""

    def make():
        data = make_data()
        data.splits = Splits()
        data.attack = BadNets(target=1, rate=0.125, patch_size=3)
        return data

    return make


def run(module, data, make_trainer, *callbacks, **arguments):
    torch.manual_seed(0)
    make_trainer(*callbacks, **arguments).fit(module, data)
    return module


def outcome(module):
    return {**module.model.state_dict(), **module.results}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_the_outline(make):
    names = [stage.outline for stage in make().plan()]
    one_round = [("partition", 0), ("relearn", 1), ("unlearn", 1)]
    first = [("train", 2), ("score", 0), *one_round * 2, ("enhance", 1), ("identify", 0)]
    retrained = [*first, ("retrain", 2), ("propose", 0)]
    assert names == [*retrained, ("relabel", 0), ("finetune", 1)]
    assert [s.outline for s in make(until="retrain").plan()] == retrained
    assert [s.outline for s in make(until="identify").plan()] == first
    assert [s.name for s in make(until="score").plan()] == ["train", "score"]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_findings_follow_from_the_networks(make, make_poisoned, make_trainer, precision):
    data = make_poisoned()
    module = run(make(confidence=0.3), data, make_trainer, precision=precision)
    found = module.findings()
    assert found.score.shape == found.flagged.shape == found.proposed.shape == (64,)
    assert found.rounds.shape == (4, 64)
    assert found.round_epochs.tolist() == [1, 3, 5, 6]  # two of training, then two a round
    assert found.further.keys() == {"consistency"}
    assert (found.further["consistency"] <= 0).all()
    assert module.results["clean_part"].sum() == 2 * int(0.2 * 64)
    assert module.results["forgotten"][found.rounds[1:3].sum(0) == 0].all()
    # what is flagged has the label that the enhanced network gives
    images = data.training_images(torch.arange(64)).float() / 255
    labels = data.training_set().labels
    net = module.model.copy().eval()
    kept = {k.removeprefix("enhanced/"): v for k, v in module.results.items() if "enhanced/" in k}
    net.load_state_dict(kept)
    with torch.no_grad():
        logits = net(images)
    named = logits.softmax(1).gather(1, labels[:, None])[:, 0]
    assert torch.equal(found.flagged, named > 0.3)
    assert torch.equal(found.flagged, found.rounds[-1])
    assert 0 < found.flagged.sum() < 64
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(found.score, -losses, atol=1e-4, rtol=1e-4)
    assert torch.equal(found.proposed >= 0, found.flagged)
    wanted = torch.where(found.flagged, found.proposed, labels)
    assert torch.equal(module.results["labels"], wanted)


@pytest.mark.parametrize("of_all", [False, True])
def test_the_clean_part_is_what_scores_highest(make, make_poisoned, make_trainer, of_all):
    """Of what is scored anew, which is what scored highest before."""
    module = make(
        rounds={"count": 2, "of_all": 2 * of_all, "partition_rate": 0.15, "candidates": 2}
    )
    scores, asked, held = [], [], []

    def watched(subset, score=module.inconsistency):
        scores.append(score(subset))
        asked.append(subset)
        held.append(module.results.get("clean_part"))
        return scores[-1]

    module.inconsistency = watched
    run(module, make_poisoned(), make_trainer)
    labels, known = module.labels_of_each() * (not of_all), module.results["rounds"][0]
    assert known.any()
    assert asked[0] is None
    least = scores[0]
    for turn, after in ((1, held[2]), (2, module.results["clean_part"])):
        before, near = held[turn], torch.zeros(64, dtype=torch.bool)
        near[asked[turn].rows] = True
        first = least.where(known, -1)  # not learned: last, and the first of them first
        least = least.where(~near, torch.minimum(least, scores[turn]))
        then = least.where(known & near, -1)
        for mine in (labels == label for label in labels.unique()):
            size = int(mine.sum())
            assert (mine & before).sum() == share_of(size, 0.15 * (turn - 1))
            assert (mine & (before | near)).sum() == share_of(size, 0.15 * (turn + 1))
            assert (mine & after).sum() == share_of(size, 0.15 * turn)
            assert first[mine & near].min() >= first[mine & ~near & ~before].max()
            joined, left = mine & after & ~before, mine & near & ~after
            assert then[joined].min() >= then[left].max()
    assert torch.equal(module.results["least"], least)
    assert torch.equal(module.results["consistency"], -scores[0])


def test_labels_that_lack_their_share_catch_up(make, make_poisoned, make_trainer):
    rounds = {"count": 2, "of_all": 1, "partition_rate": 0.25, "candidates": 1}
    module = make(rounds=rounds, until="identify")
    held = []

    def score(_, of=module.labels_of_each):
        held.append(module.results.get("clean_part"))
        return 1 + (of() == 3) + torch.arange(64) / 64  # the largest have the label 3

    module.inconsistency = score
    close, odd = module.close_round, torch.arange(64) % 2 == 1
    module.close_round = lambda _: close(odd | ("rounds" not in module.results))
    run(module, make_poisoned(), make_trainer)
    labels = module.labels_of_each()
    sizes = labels.bincount(minlength=4)
    first, last = (part.int() for part in (held[2], module.results["clean_part"]))
    in_first = torch.zeros(4, dtype=torch.int).index_add(0, labels, first)
    in_last = torch.zeros(4, dtype=torch.int).index_add(0, labels, last)
    assert in_first.sum() == share_of(64, 0.25)
    assert in_first[3] == min(int(sizes[3]), 16)
    lacking = torch.tensor([share_of(int(size), 0.5) for size in sizes])
    assert torch.equal(in_last, torch.maximum(in_first, lacking.int()))
    assert (in_last > in_first).any()
    assert ((last - first) >= 0).all()


def test_what_was_not_learned_joins_last(make, make_poisoned, make_trainer):
    """A sample that the first network does not know cannot be forgotten."""
    module = make(rounds={"count": 3}, until="identify")
    learned = torch.arange(64) % 2 == 0

    def close_round(_, close=module.close_round):
        close(learned if "rounds" not in module.results else ~learned)

    def highest_where_not_learned(_):
        return torch.arange(64) % 2 + torch.rand(64)

    module.close_round = close_round
    module.inconsistency = highest_where_not_learned
    run(module, make_poisoned(), make_trainer)
    held, labels = module.results["clean_part"], module.labels_of_each()
    for label in range(4):
        mine = labels == label
        assert held[mine].sum() == share_of(int(mine.sum()), 0.6)
        left = learned & mine & ~held
        assert not left.any() or not (held & mine & ~learned).any()


@pytest.mark.parametrize(("agreement", "least"), [(0.3, 1), (0.5, 2), (0.67, 3), (1.0, 3)])
def test_what_most_rounds_forget_is_clean(make, make_poisoned, make_trainer, agreement, least):
    module = make(rounds={"count": 3, "agreement": agreement, "label_share": 0.4}, until="identify")
    generator = torch.Generator().manual_seed(4)
    named = list(torch.rand(4, 64, generator=generator) < 0.5)
    shown, kept, seen = iter(named), {}, []

    def close_round(now, close=module.close_round):
        close(next(shown, now))

    def watched(batch, step=module.enhance):
        kept.setdefault("start", {k: v.clone() for k, v in module.model.state_dict().items()})
        seen.append(batch["index"])
        return step(batch)

    module.close_round, module.enhance = close_round, watched
    module.enhancement, module.enhance_steps = replace(module.enhancement, batch_size=8), 5
    run(module, make_poisoned(), make_trainer)
    clean = module.results["forgotten"]
    often, labels = torch.stack(named[1:]).sum(0), module.labels_of_each()
    assert clean[often < least].all()
    middle = int(labels.bincount().median())
    for mine in (labels == label for label in labels.unique()):
        few = (mine & (often < least)).sum()
        wanted = share_of(min(int(mine.sum()), middle), 0.4)
        assert (mine & clean).sum() == max(int(few), wanted)
        more = clean & mine & (often >= least)
        assert not more.any() or often[more].max() <= often[mine & ~clean].min()
    assert [len(index) for index in seen] == [8] * 5
    often = torch.cat(seen).bincount(minlength=64)
    for part in (clean, ~clean):
        assert often[part].sum() == 20
        assert often[part].max() - often[part].min() <= 1
    for key, value in kept["start"].items():
        assert torch.equal(value, module.results[f"suspect/{key}"]), key


def test_enhancing_lowers_the_rest_and_raises_the_clean_part(make, make_poisoned, make_trainer):
    module = run(make(), make_poisoned(), make_trainer)
    batch = {"image": torch.rand(8, 3, 8, 8), "index": torch.arange(8)}
    batch["label"] = torch.arange(8) % 4
    module.results["forgotten"] = clean = torch.arange(64) % 2 == 0
    logged = {}
    module.log_terms = lambda **terms: logged.update(terms)
    losses = torch.nn.functional.cross_entropy(
        module.model(batch["image"]), batch["label"], reduction="none"
    )
    rest, ascent = losses[~clean[:8]].mean(), losses[clean[:8]].clamp(max=math.log(4)).mean()
    wanted = (0.3 * rest - ascent).item()
    assert module.enhance(batch).item() == pytest.approx(wanted, abs=1e-5)
    assert logged.keys() == {"enhance_loss"}


def test_scores_alone(make, make_poisoned, make_trainer):
    found = run(make(until="score"), make_poisoned(), make_trainer).findings()
    assert torch.equal(found.score, found.further["consistency"])
    assert found.flagged is None


def test_the_clean_part_grows_no_further_than_told(make, make_poisoned, make_trainer):
    module = run(
        make(rounds={"count": 3, "max_clean_fraction": 0.3}), make_poisoned(), make_trainer
    )
    labels = module.labels_of_each()
    counts = [int(n) for n in labels[module.results["clean_part"]].bincount(minlength=4)]
    assert counts == [int(0.3 * int(n)) for n in labels.bincount(minlength=4)]


def test_the_score_is_a_literal_transcription(make, make_poisoned, make_trainer):
    """Every step of algorithm 1, written out, with the same draws."""
    module = run(
        make(rounds={"count": 1}, patch={"num_masks": 2, "radius": 1}),
        make_poisoned(),
        make_trainer,
    )
    net = module.double().model.eval()
    images, radius = torch.rand(6, 3, 8, 8).double(), 8 / 255
    module._stage = 1  # the first scores
    score = module._score(Perturber(net), {"image": images, "index": torch.arange(12, 18)})
    draw = torch.Generator().manual_seed(derive_seed("patches", 0, 0, 12))
    wanted = torch.full((6,), torch.inf)
    for _ in range(2):
        mask = torch.zeros(6, 1, 8, 8)
        for i, (c1, c2) in enumerate(torch.randint(8, (6, 2), generator=draw).tolist()):
            mask[i, :, max(0, c1 - 1) : c1 + 2, max(0, c2 - 1) : c2 + 2] = 1
        delta = torch.empty(6, 3, 8, 8).double().uniform_(-radius, radius, generator=draw)
        delta = (images + delta).clamp(0, 1) - images
        with torch.no_grad():
            p = net(images).log_softmax(1)
        for _ in range(2):
            delta.requires_grad_()
            q = net(images + mask * delta).log_softmax(1)
            ((p.exp() * (p - q)).sum()).backward()
            step = delta.grad.sign() * radius * 0.25
            delta = (delta.detach() + step).clamp(-radius, radius)
            delta = (images + delta).clamp(0, 1) - images
        with torch.no_grad():
            q = net(images + mask * delta).log_softmax(1)
        wanted = torch.minimum(wanted, (p.exp() * (p - q)).sum(1).float())
    torch.testing.assert_close(score, wanted, atol=5e-7, rtol=1e-3)
    assert score.min() > 0


def test_scores_are_those_of_the_running_statistics(make, make_poisoned, make_trainer):
    module, modes = make(), []

    def watched(attacker, batch, score=module._score):
        norms = [m for m in attacker._net.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        modes.append(module.model.training or any(norm.training for norm in norms))
        return score(attacker, batch)

    module._score = watched
    run(module, make_poisoned(), make_trainer)
    assert modes
    assert not any(modes)


def test_scores_do_not_depend_on_labels(make, make_poisoned, make_trainer):
    keys = []
    module = make()

    def watched(attacker, batch, score=module._score):
        keys.append(frozenset(batch))
        return score(attacker, batch)

    module._score = watched
    run(module, make_poisoned(), make_trainer)
    assert set(keys) == {frozenset({"image", "index"})}


def test_nothing_depends_on_the_truth(make, make_poisoned, make_data, make_trainer):
    """The poisoned set handed over as if it were clean gives the same bits."""
    poisoned = make_poisoned()
    first = run(make(), poisoned, make_trainer)
    frozen = make_data()
    frozen.splits = Splits()
    images = poisoned.training_images(torch.arange(64))
    frozen.read_train = lambda: ImageSet(images, poisoned.training_set().labels)
    second = run(make(), frozen, make_trainer, name="frozen")
    assert second.trainer.datamodule.training_set().poisoned is None
    assert same(outcome(first), outcome(second))


def test_retraining_starts_from_new_weights_of_the_seed(make, make_poisoned, make_trainer):
    module, seen = make(seed=3, rounds={"count": 1}), {}

    def watched(batch, step=module.cross_entropy):
        if module.stage_name == "retrain" and not seen:
            seen.update((n, p.detach().clone()) for n, p in module.model.named_parameters())
        return step(batch)

    module.cross_entropy = watched
    run(module, make_poisoned(), make_trainer)
    torch.manual_seed(derive_seed("advrbd retrain", 3))
    for name, parameter in build(module.model.info).named_parameters():
        assert torch.equal(parameter, seen[name]), name


def test_nothing_is_scored_once_the_clean_part_is_full(make, make_poisoned, make_trainer):
    module, asked = make(rounds={"count": 4, "max_clean_fraction": 0.45}, until="identify"), []

    def watched(subset, score=module.inconsistency):
        asked.append(subset)
        return score(subset)

    module.inconsistency = watched
    run(module, make_poisoned(), make_trainer)
    assert len(asked) == 1 + 3


def test_a_network_without_numbers_is_told(make, make_poisoned, make_trainer):
    module = make(recipe=replace(SMALL, lr=1e30))
    with pytest.raises(DivergedError, match=r"has diverged: .* lower the learning rate"):
        run(module, make_poisoned(), make_trainer)


def test_scores_without_numbers_are_told(make, make_poisoned, make_trainer):
    module = run(make(until="score"), make_poisoned(), make_trainer)
    with torch.no_grad():
        module.model.head.bias[0] = torch.nan
    with pytest.raises(ConfigError, match="its training diverged; lower the learning rate"):
        module.logits_of_each()


def test_the_first_network_has_an_augmentation_of_its_own(make):
    module = make(first_augmentation=None)
    assert module.plan()[0].reads() == module.labelled()
    module = make()
    assert module.plan()[0].reads() == replace(module.labelled(), augmentation="none")
    module.results["flagged"] = torch.tensor([True, False])
    retrain = next(stage for stage in module.plan() if stage.name == "retrain")
    assert retrain.reads().augmentation == SMALL.augmentation == "crop"


def test_the_first_network_has_a_length_of_its_own(make, make_poisoned, make_trainer):
    module = run(make(first_epochs=1, until="retrain"), make_poisoned(), make_trainer)
    lengths = {stage.name: stage.length for stage in module.plan()}
    assert (lengths["train"], lengths["retrain"]) == (1, SMALL.epochs) == (1, 2)
    short = run(make(recipe=replace(SMALL, epochs=1), until="score"), make_poisoned(), make_trainer)
    # Its schedule is as short as it is: the network is that of a recipe with one epoch.
    same_part = {key: value for key, value in module.results.items() if key[:8] == "suspect/"}
    assert same_part
    assert all(torch.equal(value, short.results[key]) for key, value in same_part.items())
    with pytest.raises(ConfigError, match="first_epochs=0"):
        make(first_epochs=0)


def test_a_class_that_is_flagged_is_told_and_kept(make, make_poisoned, make_trainer):
    module = make(until="retrain")

    def flag_class_two_and_half_of_one(look=module.identify):
        look()
        labels = module.labels_of_each()
        module.results["flagged"] = flagged = labels == 2
        flagged[(labels == 1).nonzero().flatten()[::2]] = True

    module.identify = flag_class_two_and_half_of_one
    with pytest.warns(UserWarning, match=r"95% of the samples of the classes \[2\] are flagged"):
        run(module, make_poisoned(), make_trainer)
    assert module.protocol()["lost_classes"] == [2]


@pytest.mark.parametrize(("kept", "lost"), [(1, [1]), (2, [])])
def test_a_class_is_lost_where_nearly_all_of_it_is_flagged(make, kept, lost):
    module = make()
    labels = torch.cat((torch.zeros(10, dtype=torch.long), torch.ones(40, dtype=torch.long)))
    module.labels_of_each = lambda: labels
    module.results["flagged"] = flagged = labels == 1
    flagged[-kept:] = False
    module.warn_of_lost_classes()
    assert module.results["lost_classes"].tolist() == lost


def test_networks_on_the_way_are_written(make, make_poisoned, make_trainer, tmp_path):
    module = run(make(), make_poisoned(), make_trainer)
    module.save_artifacts(tmp_path)
    networks = {p.stem: load_file(p) for p in tmp_path.glob("*.safetensors")}
    assert networks.keys() == {"suspect", "enhanced", "before_relabelling"}
    head = next(key for key in networks["enhanced"] if key.endswith("head.weight"))
    assert not torch.equal(networks["enhanced"][head], networks["before_relabelling"][head])
    scored = run(make(until="score"), make_poisoned(), make_trainer, name="scored")
    trained = scored.model.state_dict()
    assert all(torch.equal(trained[key], value) for key, value in networks["suspect"].items())
    assert json.loads(json.dumps(module.protocol()))["labels"] == "untrusted"


def test_the_ascent_raises_the_loss_as_far_as_the_cap(make, make_poisoned, make_trainer):
    module = make()
    assert module.cap == pytest.approx(math.log(4))
    run(module, make_poisoned(), make_trainer)
    batch = {"image": torch.rand(8, 3, 8, 8), "index": torch.arange(8)}
    batch["label"] = module.model(batch["image"]).argmax(1)  # not beyond the cap yet
    module.log_terms = lambda **terms: None
    parameters = list(module.model.parameters())

    def loss(cap=math.inf):
        logits = module.model(batch["image"])
        each = torch.nn.functional.cross_entropy(logits, batch["label"], reduction="none")
        return each.clamp(max=cap).mean()

    before = loss(module.cap)
    assert module.ascend(batch).item() == pytest.approx(-before.item(), abs=1e-5)
    ahead = torch.autograd.grad(module.ascend(batch), parameters)
    with torch.no_grad():
        for parameter, slope in zip(parameters, ahead, strict=True):
            parameter -= 0.01 * slope
    assert loss(module.cap) > before
    module.cap = 1e-4  # every sample is beyond it
    assert not any(g.any() for g in torch.autograd.grad(module.ascend(batch), parameters))
    module.cap = None
    assert module.ascend(batch).item() == pytest.approx(-loss().item(), abs=1e-5)


def test_a_small_clean_part_is_passed_over_until_there_are_steps_enough(
    make, make_poisoned, make_trainer
):
    unlearn = Recipe(epochs=1, lr=0.01, schedule="constant", batch_size=6)
    data, steps = make_poisoned(), []
    module = make(unlearn=unlearn, rounds={"ascent_steps": 5}, until="identify")

    def watched(batch, step=module.ascend):
        steps.append(batch["index"])
        return step(batch)

    module.ascend = watched
    run(module, data, make_trainer)
    # a fifth of 64 samples are 12, and 3 times 12 are enough for 5 steps of 6; then 2 times 24
    seen = torch.cat(steps).bincount(minlength=64)
    held = module.results["clean_part"]
    assert set(seen[held].tolist()) == {2, 3 + 2}
    assert not seen[~held].any()
    assert len(steps) == 6 + 8


def test_steps_are_those_of_the_optimizer(make, make_poisoned, make_trainer):
    short = Recipe(epochs=1, lr=0.01, schedule="constant", batch_size=6)
    steps = Counter()
    module = make(
        unlearn=short,
        enhance=short,
        rounds={"ascent_steps": 5, "count": 1},
        enhance_steps=4,
        until="identify",
    )

    class Count(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            steps[module.plan()[module._stage].name] += 1

    trainer = make_trainer(Count(), accumulate_grad_batches=3)
    trainer.fit(module, make_poisoned())
    assert steps["unlearn"] in (5, 6)  # as many as are asked for, and a part of a pass
    assert steps["enhance"] == 4


def test_double_precision(make, make_poisoned, make_trainer):
    module = run(make(until="identify"), make_poisoned(), make_trainer, precision="64-true")
    assert module.finished
    assert module.results["score"].isfinite().all()


def test_something_must_be_left_to_learn(make, make_poisoned, make_trainer):
    module = make(rounds={"partition_rate": 1.0, "max_clean_fraction": 1.0}, until="identify")
    with pytest.raises(ConfigError, match="no sample is left, besides those considered clean"):
        run(module, make_poisoned(), make_trainer)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"rounds": {"partition_rate": 0.0}},
            "partition_rate=0.0: .* above 0 and at most 1",
        ),
        ({"rounds": {"max_clean_fraction": 1.5}}, r"rounds\.max_clean_fraction=1.5"),
        ({"rounds": {"count": 0}}, r"rounds\.count=0"),
        ({"rounds": {"candidates": 0}}, r"rounds\.candidates=0: it must be above 0"),
        ({"patch": {"inner": "mse"}}, r"patch\.inner='mse': it must be one of kl, ce"),
        ({"until": "sift"}, r"until='sift': it must be one of score"),
        ({"patch": {"shape": "star"}}, r"patch\.shape='star'"),
        ({"rounds": {"ascent_steps": 0}}, r"rounds\.ascent_steps=0"),
        ({"ascent_cap": 0.0}, r"ascent_cap=0.0"),
        ({"enhance_steps": 0}, r"enhance_steps=0"),
        ({"rest_weight": -0.1}, r"rest_weight=-0.1: it must be 0 or above"),
        ({"confidence": 0.0}, r"confidence=0.0: .* above 0 and at most 1"),
        ({"rounds": {"agreement": 1.1}}, r"rounds\.agreement=1.1"),
        ({"rounds": {"label_share": -0.1}}, r"rounds\.label_share=-0.1"),
        ({"rounds": {"of_all": -1}}, r"rounds\.of_all=-1: it must be 0 or above"),
        ({"patch": {"radius": -1}}, r"patch\.radius=-1: it must be 0 or above"),
        ({"scoring_batch_size": 0}, r"scoring_batch_size=0"),
        ({"facts": ImageFacts(1, 8, (0.5,) * 3, (0.2,) * 3)}, r"num_classes=1: .* at least two"),
    ],
)
def test_wrong_settings(make, wrong, message):
    with pytest.raises(ConfigError, match=message):
        make(**wrong)


@pytest.mark.parametrize(
    "wrong",
    [{"epochs": 0}, {"batch_size": 0}, {"lr": -0.1}, {"momentum": -1}, {"weight_decay": -1}],
)
def test_a_recipe_is_checked(wrong):
    (key, value) = next(iter(wrong.items()))
    with pytest.raises(ConfigError, match=f"{key}={value}: it must be at least"):
        Recipe(**wrong)
    with pytest.raises(ConfigError, match="nesterov=true: it needs a momentum"):
        Recipe(nesterov=True, momentum=0)


def test_an_empty_part_is_told():
    with pytest.raises(ConfigError, match="no sample is left"):
        chosen(torch.zeros(4, dtype=torch.bool), "left")


def test_what_was_found_is_written_even_if_nothing_is_left(
    make, make_poisoned, make_trainer, tmp_path
):
    module = make()

    def flag_all(look=module.identify):
        look()
        module.results["flagged"][:] = True

    module.identify = flag_all
    with pytest.raises(ConfigError, match="no sample is left, since all are flagged"):
        run(module, make_poisoned(), make_trainer, Suspects(str(tmp_path)))
    assert len((tmp_path / "suspects.csv").read_text().splitlines()) == 65
    assert (tmp_path / "scores.png").is_file()


def test_too_few_samples_are_told_before_training(make, make_poisoned, make_trainer):
    module = make(rounds={"partition_rate": 0.01})
    with pytest.raises(
        ConfigError, match=r"rounds\.partition_rate=0.01: .* less than one of the 64"
    ):
        run(module, make_poisoned(), make_trainer)
    assert module.trainer.global_step == 0


def test_an_attack_on_batches_is_refused_before_training(make, make_poisoned, make_trainer):
    data, module = make_poisoned(), make()
    data.attack = WaNet(target=1, rate=0.1, mode="dynamic")
    with pytest.raises(ConfigError, match="attack=WaNet: it poisons batches"):
        run(module, data, make_trainer)
    assert module.trainer.global_step == 0


DDP = """
import sys
import torch
from lightning.pytorch import Trainer, seed_everything
from bdclean.attacks import BadNets
from bdclean.backbones import build
from bdclean.data import Digits, Splits
from bdclean.functional.consistency import PatchScore
from bdclean.functional.pgd import PGD
from bdclean.modules import Recipe
from bdclean.sifting import AdvrBD
from bdclean.types import ImageFacts, Subset

seed_everything(0)
data = Digits(attack=BadNets(target=0, rate=0.1), splits=Splits(defense=1000, probe=100))
facts = ImageFacts(10, 32, data.mean, data.std)
module = AdvrBD(facts, width=4, recipe=Recipe(epochs=1, lr=0.0001),
                patch=PatchScore(pgd=PGD(8.0, 2, 0.25)), until="score", scoring_batch_size=50)
devices = int(sys.argv[1])
strategy = "ddp" if devices > 1 else "auto"
seen = {}
def watched(subset, score=module.inconsistency):
    module.model.load_state_dict(torch.load(sys.argv[2], weights_only=True))
    few = Subset(torch.arange(250, 290))  # a single batch: none for the second process
    seen["score"] = torch.stack((score(subset), score(few)))
    return seen["score"][0]
module.inconsistency = watched
if devices == 1:
    torch.save(build(module.info).state_dict(), sys.argv[2])
Trainer(accelerator="cpu", devices=devices, strategy=strategy, max_epochs=-1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, limit_val_batches=0,
        enable_model_summary=False, limit_train_batches=2,
        reload_dataloaders_every_n_epochs=1).fit(module, data)
if module.trainer.is_global_zero:
    torch.save(seen["score"], sys.argv[3])
"""


@pytest.mark.slow
@pytest.mark.ddp
def test_two_processes_score_as_one(tmp_path, run_script):
    scores = []
    for devices in (1, 2):
        out = tmp_path / f"scores{devices}.pt"
        run_script(DDP, devices, tmp_path / "net.pt", out, devices=devices)
        scores.append(torch.load(out, weights_only=True))
    assert scores[0].shape == (2, 300)
    assert scores[0].any(1).all()
    assert not scores[0][1, :250].any()
    assert torch.equal(*scores)
