"""Quantization-aware distillation: the KL divergence from a teacher's next-token distribution."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..errors import ShapeError


def distillation_loss(
    student: Tensor, teacher: Tensor, *, mask: Tensor | None = None, temperature: float = 1.0, chunk: int = 1024
) -> Tensor:
    """Mean over tokens of KL(teacher ‖ student), times temperature².

    Args:
        student: logits (…, V), any float dtype.
        teacher: logits of the same shape; no gradient flows into them.
        mask: (…) bool, which tokens count; all by default.
        temperature: divides both logits.
        chunk: tokens at a time, for which float32 probabilities are in memory; the backward pass computes them again.

    Returns:
        float32 ().

    Raises:
        ShapeError: shapes differ, the temperature or chunk is not positive, or no token counts.
    """
    if student.shape != teacher.shape or student.dim() < 2:
        raise ShapeError(
            f"student has shape {tuple(student.shape)}, teacher {tuple(teacher.shape)}; need the same (…, V)"
        )
    if mask is not None and (mask.shape != student.shape[:-1] or mask.dtype != torch.bool):
        raise ShapeError(f"mask is {mask.dtype} {tuple(mask.shape)}; needs torch.bool {tuple(student.shape[:-1])}")
    if not temperature > 0 or chunk < 1:
        raise ShapeError(f"temperature={temperature}, chunk={chunk}: both must be positive")
    s, t = student.flatten(0, -2), teacher.detach().flatten(0, -2)
    if mask is not None:
        chosen = mask.flatten()
        s, t = s[chosen], t[chosen]
    if s.shape[0] == 0:
        raise ShapeError("no token counts: the mask is False everywhere, or there are no tokens")
    total = s.new_zeros((), dtype=torch.float32)
    for rows, targets in zip(s.split(chunk), t.split(chunk), strict=True):
        total = total + checkpoint(_divergence, rows, targets, temperature, use_reentrant=False)
    return total * (temperature**2 / s.shape[0])


def _divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    log_s = torch.log_softmax(student.float() / temperature, -1)
    log_t = torch.log_softmax(teacher.float() / temperature, -1)
    p = log_t.exp()
    return torch.where(p > 0, p * (log_t - log_s), 0.0).sum()  # a logit of -inf, such as padding's: 0·log 0 = 0
