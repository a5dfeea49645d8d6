"""A projection head for purification, thrown away afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal, Self

from torch import Tensor, nn

from bdclean.backbones.batchnorm import momentum_of
from bdclean.checks import check_choice, check_not_negative, check_positive
from bdclean.modules import Recipe

Mode = Literal["pretrain", "joint"]


@dataclass(frozen=True)
class Projection:
    """A projection head h between features and loss.

    Attributes:
        mode: `pretrain`: h is trained on the frozen suspect first, then along with the student;
            `joint`: h is drawn and trained along with the student.
        dim: Outputs of h.
        epochs: For `pretrain`.
        lr: For `pretrain`.

    Raises:
        ConfigError: If a value is out of its range.
    """

    mode: Mode = "pretrain"
    dim: int = 128
    epochs: int = 10
    lr: float = 0.05

    def __post_init__(self) -> None:
        """Checks the values."""
        check_choice("projection.mode", self.mode, Mode)
        check_positive("projection.dim", self.dim)
        check_positive("projection.epochs", self.epochs)
        check_not_negative("projection.lr", self.lr)

    def recipe(self, purification: Recipe) -> Recipe:
        """How h is trained first: as the purification, but with a length and rate of its own."""
        return replace(
            purification, epochs=self.epochs, lr=self.lr, momentum=0.9, schedule="constant"
        )


class Projections(nn.Module):
    """The projection h of the student, and the constant one of the teacher.

    h is linear, batch norm, ReLU, linear; or the identity.

    Args:
        num_features: D.
        output_dim: Of h; None makes it the identity.
    """

    def __init__(self, num_features: int, output_dim: int | None) -> None:
        super().__init__()
        self.student, self.teacher = (_make(num_features, output_dim) for _ in range(2))
        self.snapshot_()
        self.teacher.requires_grad_(False).eval()

    def snapshot_(self) -> None:
        """The teacher's projection becomes the student's as it is."""
        self.teacher.load_state_dict(self.student.state_dict())

    def train(self, mode: bool = True) -> Self:
        """As of any module, but the teacher's stays in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, features: Tensor) -> Tensor:
        """Maps features (B, D) of the student to (B, output_dim)."""
        projected: Tensor = self.student(features)
        return projected

    @contextmanager
    def perturbing(self, batch_norm: Literal["eval", "train"]) -> Iterator[None]:
        """While inputs are perturbed: batch norm in that mode, its running statistics stay."""
        self.train(batch_norm == "train")
        with momentum_of(self, 0.0):
            yield
        self.train()


def _make(num_features: int, output_dim: int | None) -> nn.Module:
    if output_dim is None:
        return nn.Identity()
    norm = nn.BatchNorm1d(num_features)
    blocks = [(num_features, num_features, norm, nn.ReLU(), True)]
    # Here, because a refused command need not wait for it: it brings timm and more.
    from lightly.models.modules.heads import ProjectionHead

    head: nn.Module = ProjectionHead([*blocks, (num_features, output_dim, None, None)])
    return head
