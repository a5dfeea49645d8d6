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
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from bdclean.backbones import SplitModel
from bdclean.backbones.batchnorm import momentum_of, reestimate_
from bdclean.backbones.perturber import BatchNormMode, Perturber, perturb_precision
from bdclean.checks import check_add_up, check_choice, check_positive
from bdclean.errors import ConfigError
from bdclean.functional.contrastive import nt_xent
from bdclean.functional.pgd import PGD, pgd
from bdclean.modules import Needs, Probe, Recipe, Stage, StageOptimizer, probe_stage
from bdclean.modules.reading import of_all_devices
from bdclean.purification.base import Purifier, replace_by_probe
from bdclean.purification.projection import Projection, Projections
from bdclean.types import Batch, ImageFacts, View

Reference = Literal["j", "i"]
Perturbed = Literal["student", "suspect"]
RECIPE = Recipe(epochs=15, lr=0.02, schedule="constant", augmentation="simclr")


class CBD(Purifier):
    """Purifies the backbone; see the module. Defaults are those of the paper for CIFAR-10.

    Presets of the paper: (lambda_pull, lambda_kd, lambda_sft) is (0, 0, 1) for contrastive
    fine-tuning, (.5, .5, 0) for Pull&KD, (.5, 0, .5) for Pull&SFT, (1, 0, 0) for Pull (tables 9
    and 11), and (.3, .7, 0) with epsilon 16 and lr 0.05 on ImageNet-100. Self-supervised
    backbones take 100 steps of PGD.

    Args:
        facts: Facts of the data; the probe has as many classes.
        lambda_pull: lambda_1, weight of pulling adversarial features to clean ones.
        lambda_kd: lambda_2, weight of embedding distillation.
        lambda_sft: lambda_3, weight of contrastive fine-tuning. The three add up to 1.
        temperature: tau of l_cl.
        symmetric: l_cl averages over the rows of both arguments, not of the first alone.
        pgd: The adversarial perturbations of eq. (1): the ball that they lie in, and the steps.
        adv_reference: Which view eq. (1) departs from: `j` as it reads with k for i, or `i`,
            which makes perturbation and pull one min-max objective.
        perturb: Whose features eq. (1) moves: those of the `student` (the paper), or of the frozen
            `suspect`, as in shortcut distillation. The student then need not become robust on its
            own.
        perturb_bn: Batch norm in eq. (1): `eval` (folded into the convolutions, faster) or
            `train` (statistics of the batch).
        adv_updates_bn: Whether adversarial batches change the running statistics.
        reestimate_bn: Estimate the running statistics again after training, by one pass over the
            stored defence images.
        recipe: Of the purification. Incomplete batches are left out, so that the number of
            negatives is fixed; several devices share the batch and its negatives. The augmentation
            makes the views.
        projection: Trains with a projection head h, which is thrown away. The teacher's h is the
            one that purification starts from.
        probe: The linear probe that follows; None gives a product without a head.
        **kwargs: `weights`, `arch`, `width` and `stem`; see `Purifier`.
    """

    name = "cbd"
    needs = Needs()

    def __init__(
        self,
        facts: ImageFacts,
        lambda_pull: float = 0.3,
        lambda_kd: float = 0.5,
        lambda_sft: float = 0.2,
        temperature: float = 0.5,
        symmetric: bool = True,
        pgd: PGD = PGD(8.0, 20),  # noqa: B008  (frozen)
        adv_reference: Reference = "j",
        perturb: Perturbed = "student",
        perturb_bn: BatchNormMode = "eval",
        adv_updates_bn: bool = True,
        reestimate_bn: bool = False,
        recipe: Recipe = RECIPE,
        projection: Projection | None = None,
        probe: Probe | None = Probe(),  # noqa: B008  (frozen)
        **kwargs: Any,
    ) -> None:
        super().__init__(facts, **kwargs)
        self.save_arguments()
        self.lambdas = {"pull": lambda_pull, "kd": lambda_kd, "sft": lambda_sft}
        check_add_up("lambda", self.lambdas)
        self.temperature, self.symmetric = check_positive("temperature", temperature), symmetric
        self.pgd, self.recipe = pgd, recipe
        self.adv_reference: Reference = check_choice("adv_reference", adv_reference, Reference)
        self.perturb: Perturbed = check_choice("perturb", perturb, Perturbed)
        self.perturb_bn: BatchNormMode = check_choice("perturb_bn", perturb_bn, BatchNormMode)
        self.adv_updates_bn, self.reestimate_bn = adv_updates_bn, reestimate_bn
        if recipe.batch_size < 2:
            raise ConfigError(
                f"recipe.batch_size={recipe.batch_size}: negatives need at least 2 images."
            )
        self.projection, self.probe = projection, probe
        self.probes = probe is not None
        self._perturber: Perturber | None = None

    def plan(self) -> tuple[Stage, ...]:
        """Optionally train a projection, purify, optionally re-estimate batch norm, then probe."""
        h, stages = self.projection, []
        if h is not None and h.mode == "pretrain":
            recipe = h.recipe(self.recipe)
            trained = partial(self.project_optimizer, recipe)
            views = self.two_views
            stages += [Stage("project", recipe, reads=views, step=self.project, optimizer=trained)]
        stages += [
            Stage(
                "purify",
                self.recipe,
                begin=self.take_projection,
                reads=self.needed_views,
                step=self.purify,
                optimizer=self.purify_optimizer,
            )
        ]
        if self.reestimate_bn:
            stages += [Stage("reestimate", begin=self.reestimate)]
        if self.probe is not None:
            stages += [probe_stage(self, self.probe)]
        return tuple(stages)

    def views(self, count: int) -> View:
        """Independent views of the clean, unlabelled images."""
        return self.recipe.view("defense", views=count, drop_last=True)

    # ------------------------------------------------------------------ projection

    def two_views(self) -> View:
        """What trains h."""
        return self.views(2)

    def project(self, batch: Batch) -> Tensor:
        """Eq. (4) on the projected features of the suspect, which stay as they are."""
        self.model.eval()
        with torch.no_grad():
            features = self.model.features(torch.cat(batch["views"]))
        loss = self.contrast(*self.projections(features).chunk(2))
        self.log_terms(project_loss=loss)
        return loss

    def project_optimizer(self, recipe: Recipe) -> StageOptimizer:
        """SGD on h."""
        return self.sgd(recipe, self.projections.student.parameters())

    def take_projection(self) -> None:
        """The teacher's projection is the one that the student starts from."""
        self.projections.snapshot_()

    # ------------------------------------------------------------------ purify

    @property
    def view_names(self) -> str:
        """Which of the views i, j, k the losses need."""
        pull, sft = self.lambdas["pull"] > 0, self.lambdas["sft"] > 0
        needs_j = sft or (pull and self.adv_reference == "j")
        return "i" + "j" * needs_j + "k" * pull

    def needed_views(self) -> View:
        """As many views as the losses need."""
        return self.views(len(self.view_names))

    def purify(self, batch: Batch) -> Tensor:
        """Eqs. (1) to (5); a term whose weight is 0 is not computed."""
        views = dict(zip(self.view_names, batch["views"], strict=True))
        terms: dict[str, Tensor] = {}
        if self.lambdas["pull"]:
            adversarial = self.perturbed(views["k"], views[self.adv_reference])
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
        return self.sgd(self.recipe, trained)

    def contrast(self, a: Tensor, b: Tensor) -> Tensor:
        """l_cl over the batch of all devices, in float32."""
        a, b = of_all_devices(self, a), of_all_devices(self, b)
        return nt_xent(a, b, self.temperature, symmetric=self.symmetric)

    def perturbed(self, images: Tensor, reference: Tensor) -> Tensor:
        """Eq. (1): adversarial versions of `images` (N, 3, H, W), detached."""
        own = self.perturb == "student"
        net = self.model if own else self.teacher
        project = self.projections.student if own else self.projections.teacher
        with perturb_precision(images.device.type) as dtype:
            if self._perturber is None:
                self._perturber = Perturber(net, self.perturb_bn, dtype)
            copy = self._perturber
            if own:
                copy.refresh_(net)
            with self.projections.perturbing(self.perturb_bn):
                with torch.no_grad():
                    fixed = project(copy.features(reference))
                return pgd(
                    images, lambda x: self.contrast(project(copy.features(x)), fixed), self.pgd
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

    def reestimate(self) -> None:
        """Running statistics become the plain mean over the batches of the defence images."""
        batches = self.read(View("defense", batch_size=self.recipe.batch_size))
        reestimate_(self.model, self.model.features, (batch["image"] for batch in batches))

    # ------------------------------------------------------------------ networks

    @property
    def needs_teacher(self) -> bool:
        """For distillation, and where eq. (1) perturbs the suspect."""
        moved = self.perturb == "suspect" and self.lambdas["pull"] > 0
        return self.lambdas["kd"] > 0 or moved

    def make_student(self, suspect: SplitModel) -> SplitModel:
        """The suspect's backbone; the head is that of the probe."""
        return replace_by_probe(suspect, self.facts.num_classes, self.probe)

    def add_networks(self) -> None:
        """Draws h."""
        super().add_networks()
        self._perturber = None
        outputs = None if self.projection is None else self.projection.dim
        self.projections = Projections(self.model.num_features, outputs)
