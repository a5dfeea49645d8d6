"""What every attack of `configs/attack` does to random images, for `fingerprints.py`.

Hashes of the plan, the trigger, the training rows that are touched, and all test sets.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentParser
from torch import Tensor

from bdclean.attacks import Attack
from bdclean.attacks.input_aware import InputAwareTrigger, TriggerGenerator
from bdclean.backbones import ModelInfo, build, save_model
from bdclean.data import ImageDataModule, ImageSet
from bdclean.types import BatchPlace

FOLDER = Path(__file__).resolve().parents[2] / "configs/attack"
# Name, file, size of the images, classes.
ATTACK_TABLE = """
adaptive_blend_advrbd       adaptive_blend/advrbd        32  10
adaptive_blend_toolbox      adaptive_blend/toolbox       32  10
adaptive_patch_advrbd       adaptive_patch/advrbd        32  10
adaptive_patch_toolbox      adaptive_patch/toolbox       32  10
badnets                     badnets/cbd                  32  10
badnets_advrbd              badnets/advrbd               32  10
badnets_advrbd_imagenette   badnets/advrbd_imagenette    224 10
badnets_advrbd_tinyimagenet badnets/advrbd_tinyimagenet  64  200
badnets_bcu                 badnets/bcu                  32  10
badnets_imagenet100         badnets/cbd_imagenet100      224 100
badnets_imagenet100_ssl     badnets/cbd_imagenet100_ssl  224 100
badnets_digits              badnets/digits               32  10
badnets_ssl                 badnets/cbd_ssl              32  10
blend                       blend/cbd                    32  10
blend_advrbd                blend/advrbd                 32  10
blend_bcu                   blend/bcu                    32  10
blend_ssl                   blend/cbd_ssl                32  10
input_aware                 input_aware/official         32  10
input_aware_learned         input_aware/official         32  10
label_consistent            label_consistent/cbd         32  10
label_consistent_bcu        label_consistent/bcu         32  10
label_consistent_bcu_gtsrb  label_consistent/bcu_gtsrb   32  43
none                        none                         32  10
physical_advrbd             physical/advrbd              32  10
physical_backdoorbox        physical/backdoorbox         32  10
sig                         sig/cbd                      32  10
sig_advrbd                  sig/advrbd                   32  10
sig_bcu                     sig/bcu                      32  10
sig_bcu_gtsrb               sig/bcu_gtsrb                32  43
sig_ssl                     sig/cbd_ssl                  32  10
tact_advrbd                 tact/advrbd                  32  10
tact_toolbox                tact/toolbox                 32  10
wanet                       wanet/cbd                    32  10
wanet_advrbd                wanet/advrbd                 32  10
wanet_bcu                   wanet/bcu                    32  10
"""
ATTACKS = {
    name: (file, int(size), int(classes))
    for name, file, size, classes in map(str.split, ATTACK_TABLE.strip().splitlines())
}

Values = dict[str, Any]
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.2, 0.25)


class Noise(ImageDataModule):
    """Random images of any size with random labels."""

    name, mean, std = "noise", MEAN, STD

    def __init__(self, attack: Attack | None, input_size: int, num_classes: int):
        self.input_size, self.num_classes = input_size, num_classes
        super().__init__(attack=attack)

    def read(self, count: int, seed: int) -> ImageSet:
        draw = torch.Generator().manual_seed(seed)
        shape = (count, 3, self.input_size, self.input_size)
        images = torch.randint(256, shape, dtype=torch.uint8, generator=draw)
        return ImageSet(images, torch.randint(self.num_classes, (count,), generator=draw))

    def read_train(self):
        return self.read(1_000 if self.input_size <= 64 else 300, 1)

    def read_test(self):
        return self.read(100 if self.input_size <= 64 else 20, 2)


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes, by name."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def files_left_out() -> set[str]:
    """Attack files that the table does not name."""
    files = {str(path.relative_to(FOLDER).with_suffix("")) for path in FOLDER.glob("**/*.yaml")}
    return files - {file for file, *_ in ATTACKS.values()}


def learned_trigger(path: Path, input_size: int) -> str:
    """The file of an input-aware trigger with random weights."""
    networks = []
    for channels in (3, 1):
        torch.manual_seed(channels)
        network = TriggerGenerator(channels, MEAN, STD)
        network(torch.rand(8, 3, input_size, input_size))  # statistics of batch norm
        networks.append(network)
    InputAwareTrigger(*networks, input_size).save(path)
    return str(path)


def surrogate(path: Path, input_size: int, num_classes: int) -> str:
    """The file of a small network with random weights."""
    torch.manual_seed(5)
    model = build(ModelInfo("resnet18", num_classes, input_size, MEAN, STD, 4))
    model(torch.rand(16, 3, input_size, input_size))
    save_model(model, path)
    return str(path)


def make_attack(name: str, root: Path) -> Attack | None:
    """The attack of a config file, with a surrogate or a learned trigger where it needs one."""
    file, size, classes = ATTACKS[name]
    tree = yaml.safe_load((FOLDER / f"{file}.yaml").read_text())
    entry = tree["data"]["init_args"]["attack"]
    if entry is not None and "surrogate" in entry["init_args"]:
        entry["init_args"]["surrogate"] = surrogate(root / f"{name}.safetensors", size, classes)
    if name == "input_aware_learned":
        entry["init_args"]["trigger"] = learned_trigger(root / f"{name}.safetensors", size)
    parser = ArgumentParser()
    parser.add_argument("--attack", type=Attack | None)
    return parser.instantiate_classes(parser.parse_object({"attack": entry}))["attack"]


def attacked(name: str, root: Path) -> Values:
    """What an attack does to random images."""
    attack, (_, size, classes) = make_attack(name, root), ATTACKS[name]
    data = Noise(attack, size, classes)
    found: Values = {"training_rows": digest({"": data.training_images(torch.arange(200))})}
    if attack is None:
        return found
    many = torch.randint(classes, (50_000,), generator=torch.Generator().manual_seed(3))
    plan, trigger = data.plan, data.trigger
    shown = {"images": data.training_images(plan.touched_index), "labels": plan.labels_seen}
    found |= {
        "plan": plan.hash,
        "plan_of_many": attack.plan(many, classes).hash,
        "trigger/fingerprint": trigger.fingerprint,
        "trigger/tensors": digest(trigger.state_dict()),
        "trigger/arguments": json.dumps(trigger.arguments()),
        "poison_rows": digest(shown),
        "num_touched": len(plan.touched_index),
        "settings": json.dumps(attack.describe()),
    }
    if name == "input_aware":  # a module that learns its trigger stamps all images
        return found
    if attack.dynamic:
        found["poison_batch"] = digest(batches(attack, data))
    for number, loader in enumerate(data.test_dataloader()):
        parts = list(loader)
        keys = [key for key, value in parts[0].items() if isinstance(value, Tensor)]
        shown = {key: torch.cat([part[key] for part in parts]) for key in keys}
        found[f"test/{number}"] = digest(shown)
    return found


def batches(attack: Attack, data: Noise) -> dict[str, Tensor]:
    """Three batches of an epoch as a dynamic attack poisons them."""
    draw, made = torch.Generator().manual_seed(4), {}
    for first in range(0, 300, 100):
        part = slice(first, first + 100)
        images, labels = data.stored.images[part] / 255, data.stored.labels[part]
        images, labels = attack.poison_batch(
            images, labels, data.trigger, data.num_classes, BatchPlace(first), draw
        )
        made |= {f"images {first}": images, f"labels {first}": labels}
    return made
