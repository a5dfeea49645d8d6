"""Contrastive backdoor defence (CBD): purifies a backbone with unlabelled clean images.

Xiong, Wu, Wang, Wang: Rethinking the Necessity of Labels in Backdoor Removal. BANDS workshop at
ICLR 2023. For a batch of N images, with three independent views v_i, v_j, v_k of each, the
student f (which starts as the suspect f*), and the contrastive loss l_cl (NT-Xent, eq. 7):

    delta = argmax l_cl(f(v_k + delta), sg f(v_j))   over |delta| <= epsilon, by PGD     (1)
    pull  = l_cl(sg f(v_i), f(v_k + delta))                                              (2)
    kd    = l_cl(f(v_i), f*(v_i))                                                        (3)
    sft   = l_cl(f(v_i), f(v_j))                                                         (4)
    total = lambda_pull * pull + lambda_kd * kd + lambda_sft * sft                       (5)

sg is the stop-gradient. The paper keeps no classifier: a linear probe on a few labelled images
follows, as a stage of its own. docs/methods/cbd.md lists every default with its source.
"""

from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from bdclean.backbones import SplitModel
from bdclean.backbones.attacker import Attacker, BatchNormMode, attack_precision
from bdclean.backbones.batchnorm import momentum_of, reestimate_
from bdclean.backbones.head import ProbeHead, cache_features
from bdclean.backbones.source import WeightsSource
from bdclean.errors import ConfigError
from bdclean.functional.contrastive import nt_xent
from bdclean.functional.perturbation import PGD, Norm, StepUnit, pgd
from bdclean.functional.probe import PROBE_MILESTONES
from bdclean.functional.schedules import Schedule
from bdclean.metrics.fitting import scheduled
from bdclean.purification.base import check_choice, check_positive
from bdclean.purification.staged import Stage, StagedPurifier, StageOptimizer
from bdclean.types import AugmentationName, Batch, View

Reference = Literal["j", "i"]
Probe = Literal["sgd", "lbfgs", "none"]


class CBD(StagedPurifier):
    """Purifies the backbone; see the module. Defaults are those of the paper for CIFAR-10.

    Presets of the paper: (lambda_pull, lambda_kd, lambda_sft) is (0, 0, 1) for contrastive
    fine-tuning, (.5, .5, 0) for Pull&KD, (.5, 0, .5) for Pull&SFT, (1, 0, 0) for Pull (tables 9
    and 11), and (.3, .7, 0) with epsilon 16 and lr 0.05 on ImageNet-100. Self-supervised
    backbones take pgd_steps 100.

    Args:
        num_classes: K of the probe; comes from the data module.
        input_size: Side of the images; comes from the data module.
        mean: Normalisation of foreign files; comes from the data module.
        std: As `mean`.
        weights: The suspect file.
        arch: Its architecture, for foreign files.
        width: Channels of its first layer, for foreign files; None takes 64.
        lambda_pull: lambda_1, weight of pulling adversarial features to clean ones.
        lambda_kd: lambda_2, weight of embedding distillation.
        lambda_sft: lambda_3, weight of contrastive fine-tuning. The three add up to 1.
        temperature: tau of l_cl.
        symmetric: l_cl averages over the rows of both arguments, not of the first alone.
        epsilon: Radius of the attack in 8-bit pixel values.
        pgd_steps: Gradient steps of the attack.
        step_size: Of the attack, in `step_unit`.
        step_unit: See `bdclean.functional.perturbation.PGD`.
        norm: Of the ball.
        random_start: Of the attack.
        adv_reference: Which view the attack departs from: `j` as eq. (1) reads with k for i, or
            `i`, which makes attack and pull one min-max objective.
        attack_bn: Batch norm in the attack: `eval` (folded into the convolutions, faster) or
            `train` (statistics of the batch).
        adv_updates_bn: Whether adversarial batches change the running statistics.
        reestimate_bn: Estimate the running statistics anew after training, by one pass over the
            stored defence images.
        epochs: Of the purification.
        lr: Of SGD.
        momentum: Of SGD.
        weight_decay: Of SGD.
        schedule: Of the learning rate, per step.
        batch_size: N, per device. Incomplete batches are left out, so that the number of
            negatives is fixed; negatives come from the own device.
        augmentation: Makes the views.
        probe: `sgd` (the protocol of SSL-Backdoor), `lbfgs` (logistic regression on cached
            features of un-augmented images) or `none` (the product has no head).
        probe_epochs: For `sgd`.
        probe_lr: For `sgd`; times 0.1 after 3/8 and 3/4 of the epochs.
        probe_batch_size: Per device.
        probe_c: For `lbfgs`: C of the penalty.
    """

    def __init__(
        self,
        num_classes: int,
        input_size: int,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        weights: str | None = None,
        arch: str | None = None,
        width: int | None = None,
        lambda_pull: float = 0.3,
        lambda_kd: float = 0.5,
        lambda_sft: float = 0.2,
        temperature: float = 0.5,
        symmetric: bool = True,
        epsilon: float = 8.0,
        pgd_steps: int = 20,
        step_size: float = 0.1,
        step_unit: StepUnit = "relative",
        norm: Norm = "linf",
        random_start: bool = True,
        adv_reference: Reference = "j",
        attack_bn: BatchNormMode = "eval",
        adv_updates_bn: bool = True,
        reestimate_bn: bool = False,
        epochs: int = 15,
        lr: float = 0.02,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        schedule: Schedule = "constant",
        batch_size: int = 128,
        augmentation: AugmentationName = "simclr",
        probe: Probe = "sgd",
        probe_epochs: int = 40,
        probe_lr: float = 0.01,
        probe_batch_size: int = 256,
        probe_c: float = 0.1,
    ) -> None:
        super().__init__(WeightsSource(weights, arch, width, input_size, mean, std))
        self.save_hyperparameters()
        self.num_classes = num_classes
        self.lambdas = _checked_lambdas(lambda_pull, lambda_kd, lambda_sft)
        self.temperature, self.symmetric = temperature, symmetric
        self.pgd = PGD(epsilon, pgd_steps, step_size, step_unit, norm, random_start)
        self.adv_reference: Reference = check_choice("adv_reference", adv_reference, Reference)
        self.attack_bn: BatchNormMode = check_choice("attack_bn", attack_bn, BatchNormMode)
        self.adv_updates_bn, self.reestimate_bn = adv_updates_bn, reestimate_bn
        self.epochs, self.lr, self.momentum = check_positive("epochs", epochs), lr, momentum
        self.weight_decay, self.schedule = weight_decay, schedule
        self.batch_size, self.augmentation = batch_size, augmentation
        self.probe: Probe = check_choice("probe", probe, Probe)
        self.probe_epochs = check_positive("probe_epochs", probe_epochs)
        self.probe_lr, self.probe_batch_size, self.probe_c = probe_lr, probe_batch_size, probe_c
        self._attacker: Attacker | None = None

    def plan(self) -> tuple[Stage, ...]:
        """Purify, optionally re-estimate batch norm, then probe."""
        stages = [Stage("purify", self.epochs)]
        if self.reestimate_bn:
            stages.append(Stage("reestimate", 0))
        if self.probe != "none":
            stages.append(Stage("probe", self.probe_epochs if self.probe == "sgd" else 0))
        return tuple(stages)

    # ------------------------------------------------------------------ purify

    @property
    def view_names(self) -> str:
        """Which of the views i, j, k the losses need."""
        pull, sft = self.lambdas["pull"] > 0, self.lambdas["sft"] > 0
        needs_j = sft or (pull and self.adv_reference == "j")
        return "i" + "j" * needs_j + "k" * pull

    def purify_view(self) -> View:
        """Independent views of the clean, unlabelled images."""
        count = len(self.view_names)
        return View("defense", self.augmentation, count, self.batch_size, drop_last=True)

    def purify_step(self, batch: Batch) -> Tensor:
        """Eqs. (1) to (5); a term whose weight is 0 is not computed."""
        views = dict(zip(self.view_names, batch["views"], strict=True))
        terms: dict[str, Tensor] = {}
        if self.lambdas["pull"]:
            adversarial = self.attack(views["k"], views[self.adv_reference])
        z_i, z_j = self._clean_features(views)
        if self.lambdas["pull"]:
            terms["pull"] = self.contrast(z_i.detach(), self._adversarial_features(adversarial))
        if self.lambdas["kd"]:
            with torch.no_grad():
                t_i = self.teacher.features(views["i"])
            terms["kd"] = self.contrast(z_i, t_i)
        if self.lambdas["sft"]:
            terms["sft"] = self.contrast(z_i, z_j)
        loss = torch.stack([self.lambdas[name] * term for name, term in terms.items()]).sum()
        self.log_terms(loss=loss, **terms)
        return loss

    def purify_optimizer(self) -> StageOptimizer:
        """SGD on the backbone."""
        optimizer = torch.optim.SGD(
            self.model.backbone.parameters(), self.lr, self.momentum, weight_decay=self.weight_decay
        )
        return scheduled(self.trainer, optimizer, self.schedule, self.epochs)

    def contrast(self, a: Tensor, b: Tensor) -> Tensor:
        """l_cl, in float32."""
        return nt_xent(a, b, self.temperature, symmetric=self.symmetric)

    def attack(self, images: Tensor, reference: Tensor) -> Tensor:
        """Eq. (1): adversarial versions of `images` (N, 3, H, W), detached."""
        with attack_precision(images.device.type) as dtype:
            if self._attacker is None:
                self._attacker = Attacker(self.model, self.attack_bn, dtype)
            attacker = self._attacker
            attacker.refresh_(self.model)
            with torch.no_grad():
                fixed = attacker.features(reference)
            return pgd(images, lambda x: self.contrast(attacker.features(x), fixed), self.pgd)

    def _clean_features(self, views: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """z_i, and z_j where the loss needs it (else z_i again), in one forward pass."""
        wanted = [views[name] for name in ("ij" if self.lambdas["sft"] else "i")]
        z = self.model.features(torch.cat(wanted)).chunk(len(wanted))
        return z[0], z[-1]

    def _adversarial_features(self, images: Tensor) -> Tensor:
        with nullcontext() if self.adv_updates_bn else momentum_of(self.model, 0.0):
            return self.model.features(images)

    # ------------------------------------------------------------------ after training

    def begin_reestimate(self) -> None:
        """Running statistics become the plain mean over the batches of the defence images."""
        batches = self.scan(View("defense", batch_size=self.batch_size))
        reestimate_(self.model, self.model.features, (batch["image"] for batch in batches))

    def begin_probe(self) -> None:
        """Statistics of the probe's images, un-augmented, and for `lbfgs` the whole solution."""
        self.model.eval()
        batches = self.scan(self.probe_view())
        features, labels = cache_features(self.model.features, batches)
        if self.probe == "lbfgs":
            self._head.solve_(features, labels, self.probe_c)
        else:
            self._head.measure_(features)

    def probe_view(self) -> View:
        """The few labelled images; the one place where CBD sees labels."""
        return View("probe", "weak", batch_size=self.probe_batch_size, labels=True)

    def probe_step(self, batch: Batch) -> Tensor:
        """Cross-entropy of the head on frozen features."""
        self.model.eval()  # batch norm included
        with torch.no_grad():
            features = self.model.features(batch["image"])
        loss = F.cross_entropy(self._head(features).float(), batch["label"])
        self.log("train/probe_loss", loss.detach(), on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def probe_optimizer(self) -> StageOptimizer:
        """SGD on the head, as in SSL-Backdoor's eval_linear.py."""
        head = self._head.parameters()
        optimizer = torch.optim.SGD(head, self.probe_lr, momentum=0.9, weight_decay=1e-4)
        return scheduled(self.trainer, optimizer, "multistep", self.probe_epochs, PROBE_MILESTONES)

    # ------------------------------------------------------------------ networks and record

    @property
    def needs_teacher(self) -> bool:
        """Only for distillation."""
        return self.lambdas["kd"] > 0

    def make_student(self, suspect: SplitModel) -> SplitModel:
        """The suspect's backbone; its head, if any, is replaced by that of the probe."""
        self._attacker = None
        suspect.replace_head(None if self.probe == "none" else self.num_classes, "probe")
        return suspect

    def freeze_parts(self) -> None:
        """A head that is solved for gets no gradient."""
        if self.probe == "lbfgs" and isinstance(self.model.head, ProbeHead):
            self.model.head.requires_grad_(False)

    @property
    def _head(self) -> ProbeHead:
        if not isinstance(self.model.head, ProbeHead):
            raise ConfigError("The model has no probe head; set model.init_args.probe.")
        return self.model.head

    def protocol(self) -> dict[str, Any]:
        """The probe sees clean labels; purification sees none."""
        facts = super().protocol() | {"method": "cbd", "labels": "none"}
        if isinstance(self.model.head, ProbeHead):
            facts |= {"head": "probe", "probe": self.probe, "probe_labels": "clean"}
        return facts


def _checked_lambdas(pull: float, kd: float, sft: float) -> dict[str, float]:
    lambdas = {"pull": pull, "kd": kd, "sft": sft}
    if min(lambdas.values()) < 0 or abs(sum(lambdas.values()) - 1) > 1e-6:
        raise ConfigError(
            f"lambda_pull={pull}, lambda_kd={kd}, lambda_sft={sft}: they must be 0 or above and "
            "add up to 1."
        )
    return lambdas
