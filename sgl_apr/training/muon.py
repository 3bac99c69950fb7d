"""The Muon optimizer, in float32: PyTorch's own computes in bfloat16, which few CPUs support."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# The iteration brings singular values to between about 0.7 and 1.2.
NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_ITERATIONS = 5


def orthogonalize(matrices: Tensor) -> Tensor:
    """Nearly orthogonal matrices with the same row and column spaces, by Newton-Schulz iterations.

    As in "Muon: An optimizer for hidden layers in neural networks" (Jordan et al., 2024).

    Args:
        matrices: (n, rows, columns).
    """
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    wide = matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices
    x = wide / (wide.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(NEWTON_SCHULZ_ITERATIONS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if matrices.shape[1] > matrices.shape[2] else x


class Muon(torch.optim.Optimizer):  # type: ignore[misc]  # untyped there
    """Muon for the matrices of a model and Adam for its other parameters, with updates of similar size, so that they share a rate.

    Two-dimensional parameters in groups with `matrices=True` take orthogonal updates, scaled to the size of Adam's
    (0.2 times the root of the larger side, "Muon is Scalable for LLM Training", section 2.2). All others take Adam's.
    """

    def __init__(
        self, groups: list[dict[str, Any]], lr: float = 0.0, momentum: float = 0.95, beta: float = 0.95
    ) -> None:
        super().__init__(
            groups, {"lr": lr, "momentum": momentum, "beta": beta, "weight_decay": 0.0, "matrices": False}
        )

    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Update all parameters that have a gradient."""
        with torch.no_grad():
            for group in self.param_groups:
                self._step(group, [p for p in group["params"] if p.grad is not None])

    def _step(self, group: dict[str, Any], own: list[Tensor]) -> None:
        for p in own:
            p.mul_(1 - group["lr"] * group["weight_decay"])
        if not group["matrices"]:
            for p in own:
                p.sub_(self._adam(p, group), alpha=group["lr"])
            return
        for shape in {p.shape for p in own}:  # stacked, since single matrices are too small to use a CPU well
            same_shape = [p for p in own if p.shape == shape]
            updates = orthogonalize(torch.stack([self._momentum(p, group["momentum"]) for p in same_shape]))
            for p, update in zip(same_shape, updates, strict=True):
                p.sub_(update, alpha=group["lr"] * 0.2 * max(shape) ** 0.5)

    def _momentum(self, p: Tensor, share: float) -> Tensor:
        """Nesterov momentum."""
        state, grad = self.state[p], p.grad
        assert grad is not None
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(p)
        state["momentum"].lerp_(grad, 1 - share)
        return grad.lerp(state["momentum"], share)

    def _adam(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        state, grad, first, second = self.state[p], p.grad, 0.9, group["beta"]
        assert grad is not None
        if "steps" not in state:
            state.update(steps=0, mean=torch.zeros_like(p), square=torch.zeros_like(p))
        state["steps"] += 1
        state["mean"].lerp_(grad, 1 - first)
        state["square"].lerp_(grad.square(), 1 - second)
        mean, square = (
            state["mean"] / (1 - first ** state["steps"]),
            state["square"] / (1 - second ** state["steps"]),
        )
        update: Tensor = mean / (square.sqrt() + 1e-8)
        return update
