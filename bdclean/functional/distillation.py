"""Distillation from a suspect teacher, as in backdoor cleansing with unlabelled data (BCU).

Source: Pang, Sun, Ling, Chen, CVPR 2023; the temperature schedule is that of the authors' code
(luluppang/BCU), since the text names only a temperature.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from bdclean.errors import ConfigError


def rising_temperature(epoch: int, epochs: int, final: float = 4.0) -> float:
    """Returns T(e) = 1 + (final - 1)(e + 1) / E, which rises to `final` in the last epoch.

    Args:
        epoch: e, from 0 to `epochs` - 1.
        epochs: E, at least 1.
        final: Temperature of the last epoch, above 0.

    Raises:
        ConfigError: A value is out of its range.
    """
    if not 0 <= epoch < epochs:
        raise ConfigError(f"epoch is {epoch}; it must lie between 0 and epochs - 1 = {epochs - 1}")
    if final <= 0:
        raise ConfigError(f"final temperature is {final}; it must be above 0")
    return 1 + (final - 1) * (epoch + 1) / epochs


def tempered_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Computes the mean over the batch of KL(softmax(z_T / T) || softmax(z_S / T)).

    There is no factor T^2, so gradients shrink as T grows, as in the authors' code. Gradients
    flow into both arguments; the caller computes the teacher's logits without them.

    Args:
        student_logits: z_S (B, K).
        teacher_logits: z_T (B, K), the target distribution.
        temperature: T, above 0.

    Returns:
        A scalar of at least 0, computed in float32 also under autocast.

    Raises:
        ConfigError: The temperature is not positive.
    """
    if temperature <= 0:
        raise ConfigError(f"temperature is {temperature}; it must be above 0")
    student = log_softmax(student_logits.float() / temperature, dim=1)
    teacher = log_softmax(teacher_logits.float() / temperature, dim=1)
    return kl_div(student, teacher, reduction="batchmean", log_target=True)


def divergence(reference: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """Computes T^2 KL(softmax(reference / T) || softmax(logits / T)) of each image.

    With the factor T^2, gradients keep their size as T grows (Hinton, Vinyals and Dean, 2015).

    Args:
        reference: (B, K).
        logits: (B, K).
        temperature: T, above 0.

    Returns:
        (B,), in nats, computed in float32.
    """
    p = log_softmax(reference.float() / temperature, 1)
    q = log_softmax(logits.float() / temperature, 1)
    return temperature**2 * kl_div(q, p, reduction="none", log_target=True).sum(1)


def feature_distance(reference: Tensor, features: Tensor) -> Tensor:
    """Computes the squared distance of features over the mean square length of the reference's.

    Args:
        reference: (B, D).
        features: (B, D).

    Returns:
        (B,), computed in float32.
    """
    reference, features = reference.float(), features.float()
    scale = reference.square().sum(1).mean().clamp(min=torch.finfo(torch.float32).tiny)
    return (reference - features).square().sum(1) / scale


def hard_label_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Computes the cross entropy of the student with the teacher's most likely classes.

    The ablation of BCU's table 5; there is no temperature.

    Args:
        student_logits: (B, K).
        teacher_logits: (B, K).

    Returns:
        A scalar, the mean over the batch, computed in float32.
    """
    return cross_entropy(student_logits.float(), teacher_logits.argmax(dim=1))
