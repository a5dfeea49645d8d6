"""Contrastive backdoor defence (CBD): purifies a backbone with unlabelled clean images.

Xiong, Wu, Wang, Wang: Rethinking the Necessity of Labels in Backdoor Removal. BANDS workshop at
ICLR 2023. For a batch of N images, with three independent views v_i, v_j, v_k of each, the
student f (which starts as the suspect f*), and the contrastive loss l_cl (NT-Xent, eq. 7):

    delta = argmax l_cl(f(v_k + delta), sg f(v_j))   over |delta| <= epsilon, by PGD     (1)
    pull  = l_cl(sg f(v_i), f(v_k + delta))                                              (2)
    kd    = l_cl(f(v_i), f*(v_i))                                                        (3)
    sft   = l_cl(f(v_i), f(v_j))                                                         (4)
    total = lambda_pull * pull + lambda_kd * kd + lambda_sft * sft                       (5)

sg is the stop-gradient. With a projection head h (for self-supervised ImageNet backbones), h(f)
stands for f everywhere, and h is thrown away. The paper keeps no classifier: a linear probe on a
few labelled images follows, as a stage of its own. docs/methods/cbd.md lists every default with
its source.
"""

from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

from bdclean.backbones import SplitModel
from bdclean.backbones.attacker import Attacker, BatchNormMode, attack_precision
from bdclean.backbones.batchnorm import momentum_of, reestimate_
from bdclean.backbones.source import WeightsSource
from bdclean.backbones.split import Stem
from bdclean.errors import ConfigError, check_not_negative, check_positive
from bdclean.functional.contrastive import nt_xent
from bdclean.functional.perturbation import PGD, Norm, StepUnit, pgd
from bdclean.functional.schedules import Schedule
from bdclean.metrics.fitting import scheduled
from bdclean.purification.base import check_add_up, check_choice
from bdclean.purification.probed import Probe, ProbedPurifier
from bdclean.purification.projection import Projection, Projections
from bdclean.purification.staged import Stage, StageOptimizer
from bdclean.types import AugmentationName, Batch, View

Reference = Literal["j", "i"]


class CBD(ProbedPurifier):
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
        stem: Of ResNets, for foreign files; None takes the CIFAR stem up to 64 pixels.
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
        projection: `none`; `pretrain`: h is trained on the frozen suspect by (4) first, then along
            with the student; `joint`: h is drawn and trained along with the student. The
            teacher's h is the one that purification starts from.
        projection_dim: Outputs of h.
        projection_epochs: For `pretrain`.
        projection_lr: For `pretrain`.
        probe: `sgd` (the protocol of SSL-Backdoor), `lbfgs` (logistic regression on cached
            features of un-augmented images) or `none` (the product has no head).
        probe_epochs: For `sgd`.
        probe_lr: For `sgd`; times 0.1 after 3/8 and 3/4 of the epochs.
        probe_batch_size: Per device.
        probe_augmentation: For `sgd`.
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
        stem: Stem | None = None,
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
        projection: Projection = "none",
        projection_dim: int = 128,
        projection_epochs: int = 10,
        projection_lr: float = 0.05,
        probe: Probe = "sgd",
        probe_epochs: int = 40,
        probe_lr: float = 0.01,
        probe_batch_size: int = 256,
        probe_augmentation: AugmentationName = "weak",
        probe_c: float = 0.1,
    ) -> None:
        source = WeightsSource(weights, arch, width, input_size, mean, std, stem)
        probing = (probe, probe_epochs, probe_lr, probe_batch_size, probe_augmentation, probe_c)
        super().__init__(source, num_classes, *probing)
        self.save_hyperparameters()
        self.lambdas = {"pull": lambda_pull, "kd": lambda_kd, "sft": lambda_sft}
        check_add_up("lambda", self.lambdas)
        self.temperature, self.symmetric = check_positive("temperature", temperature), symmetric
        self.pgd = PGD(epsilon, pgd_steps, step_size, step_unit, norm, random_start)
        self.adv_reference: Reference = check_choice("adv_reference", adv_reference, Reference)
        self.attack_bn: BatchNormMode = check_choice("attack_bn", attack_bn, BatchNormMode)
        self.adv_updates_bn, self.reestimate_bn = adv_updates_bn, reestimate_bn
        self.epochs, self.lr = check_positive("epochs", epochs), check_not_negative("lr", lr)
        self.momentum = check_not_negative("momentum", momentum)
        self.weight_decay = check_not_negative("weight_decay", weight_decay)
        if batch_size < 2:
            raise ConfigError(f"batch_size={batch_size}: negatives need at least 2 images.")
        self.schedule, self.batch_size, self.augmentation = schedule, batch_size, augmentation
        self.projection: Projection = check_choice("projection", projection, Projection)
        self.projection_dim = check_positive("projection_dim", projection_dim)
        self.projection_epochs = check_positive("projection_epochs", projection_epochs)
        self.projection_lr = check_not_negative("projection_lr", projection_lr)
        self._attacker: Attacker | None = None

    def plan(self) -> tuple[Stage, ...]:
        """Optionally train a projection, purify, optionally re-estimate batch norm, then probe."""
        stages = [Stage("purify", self.epochs)]
        if self.projection == "pretrain":
            stages.insert(0, Stage("project", self.projection_epochs))
        if self.reestimate_bn:
            stages.append(Stage("reestimate", 0))
        return *stages, *self.probe_stages()

    # ------------------------------------------------------------------ projection

    def project_view(self) -> View:
        """Two views of the clean, unlabelled images."""
        return View("defense", self.augmentation, 2, self.batch_size, drop_last=True)

    def project_step(self, batch: Batch) -> Tensor:
        """Eq. (4) on the projected features of the suspect, which stay as they are."""
        self.model.eval()
        with torch.no_grad():
            features = self.model.features(torch.cat(batch["views"]))
        loss = self.contrast(*self.projections(features).chunk(2))
        self.log_terms(project_loss=loss)
        return loss

    def project_optimizer(self) -> StageOptimizer:
        """SGD on h."""
        h = self.projections.student.parameters()
        optimizer = torch.optim.SGD(h, self.projection_lr, 0.9, weight_decay=self.weight_decay)
        return scheduled(self.trainer, optimizer, "constant", self.projection_epochs)

    # ------------------------------------------------------------------ purify

    def begin_purify(self) -> None:
        """The teacher's projection is the one that the student starts from."""
        self.projections.snapshot_()

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
                t_i = self.projections.teacher(self.teacher.features(views["i"]))
            terms["kd"] = self.contrast(z_i, t_i)
        if self.lambdas["sft"]:
            terms["sft"] = self.contrast(z_i, z_j)
        loss = torch.stack([self.lambdas[name] * term for name, term in terms.items()]).sum()
        self.log_terms(loss=loss, **terms)
        return loss

    def purify_optimizer(self) -> StageOptimizer:
        """SGD on the backbone, and on h."""
        trained = [*self.model.backbone.parameters(), *self.projections.student.parameters()]
        optimizer = torch.optim.SGD(trained, self.lr, self.momentum, weight_decay=self.weight_decay)
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
            with self.projections.attacked(self.attack_bn):
                with torch.no_grad():
                    fixed = self.projections(attacker.features(reference))
                return pgd(
                    images,
                    lambda x: self.contrast(self.projections(attacker.features(x)), fixed),
                    self.pgd,
                )

    def _clean_features(self, views: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """z_i, and z_j where the loss needs it (else z_i again), in one forward pass."""
        wanted = [views[name] for name in ("ij" if self.lambdas["sft"] else "i")]
        z = self.projections(self.model.features(torch.cat(wanted))).chunk(len(wanted))
        return z[0], z[-1]

    def _adversarial_features(self, images: Tensor) -> Tensor:
        with nullcontext() if self.adv_updates_bn else momentum_of(self, 0.0):
            embedded: Tensor = self.projections(self.model.features(images))
        return embedded

    # ------------------------------------------------------------------ after training

    def begin_reestimate(self) -> None:
        """Running statistics become the plain mean over the batches of the defence images."""
        batches = self.scan(View("defense", batch_size=self.batch_size))
        reestimate_(self.model, self.model.features, (batch["image"] for batch in batches))

    # ------------------------------------------------------------------ networks and record

    @property
    def needs_teacher(self) -> bool:
        """Only for distillation."""
        return self.lambdas["kd"] > 0

    def make_student(self, suspect: SplitModel) -> SplitModel:
        """The suspect's backbone."""
        self._attacker = None
        return super().make_student(suspect)

    def _install(self, model: SplitModel, teacher: SplitModel | None) -> None:
        super()._install(model, teacher)
        outputs = None if self.projection == "none" else self.projection_dim
        self.projections = Projections(model.num_features, outputs)

    def protocol(self) -> dict[str, Any]:
        """Names the method."""
        return super().protocol() | {"method": "cbd"}
