"""Weights in orthonormal bases whose mixing is trained (OIALR: Coquelin et al., arXiv 2401.08505).

W [m, d] = U Σ V^T, with U [m, r] and V [d, r] orthonormal and frozen, and Σ [r, r] a full matrix
that is trained. From time to time Σ = U' S V'^T is decomposed: U and V take U' and V' in, Σ becomes
S, and directions whose singular value is small go.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

__all__ = ["Subspace", "rotate", "subspace"]

# At one cut at most this share of the directions goes, and this share of all always stays
# (the authors' code).
MOST_CUT, LEAST_KEPT = 0.5, 0.01


def _unseen(values: torch.Tensor) -> torch.Tensor:
    raise NotImplementedError


@dataclass(slots=True, kw_only=True)
class Subspace:
    """One weight W = U Σ V^T; a `weights.Part`.

    Attributes:
        name: What messages call it.
        left: U [m, r], frozen.
        core: Σ [r, r], trained.
        right: V^T [r, d], frozen.
        layout: Gives the initializers for U Σ and V^T, or U and Σ V^T, or their product.
        matrix_of: Sees a tensor that is stored like the weight as a matrix [m, d]; of factors there
            is no such thing.
        smallest: The rank that always stays.
    """

    name: str
    left: torch.Tensor
    core: torch.Tensor
    right: torch.Tensor
    layout: Callable[[torch.Tensor, torch.Tensor], dict[str, torch.Tensor]]
    matrix_of: Callable[[torch.Tensor], torch.Tensor] = _unseen
    smallest: int = 1

    @property
    def rank(self) -> int:
        """r."""
        return len(self.core)

    @property
    def shape(self) -> tuple[int, int]:
        """(m, d)."""
        return len(self.left), self.right.shape[1]

    @property
    def trained(self) -> Sequence[torch.Tensor]:
        """See `weights.Part`."""
        return (self.core,)

    def state(self) -> dict[str, torch.Tensor]:
        """See `weights.Part`."""
        return {"left": self.left, "core": self.core.detach(), "right": self.right}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """See `weights.Part`."""
        left, core, right = (
            state[name].to(self.core, copy=True) for name in ("left", "core", "right")
        )
        self.left, self.right = left.detach(), right.detach()
        self.core = core.detach().requires_grad_()

    def made(self) -> dict[str, torch.Tensor]:
        """See `weights.Part`; Σ goes to the smaller factor."""
        if len(self.left) <= self.right.shape[1]:
            return self.layout(self.left @ self.core, self.right)
        return self.layout(self.left, self.core @ self.right)


def subspace(
    name: str,
    left: torch.Tensor,
    right: torch.Tensor,
    layout: Callable[[torch.Tensor, torch.Tensor], dict[str, torch.Tensor]],
    matrix_of: Callable[[torch.Tensor], torch.Tensor] = _unseen,
) -> Subspace:
    """The product of two factors [m, r] and [r, d] in orthonormal bases."""
    wide, deep = left.double(), right.double()
    u, first = torch.linalg.qr(wide)
    v, second = torch.linalg.qr(deep.T)
    turn, values, back = torch.linalg.svd(first @ second.T, full_matrices=False)
    return Subspace(
        name=name,
        left=(u @ turn).to(left.dtype),
        core=torch.diag(values).to(left.dtype).requires_grad_(),
        right=(back @ v.T).to(left.dtype),
        layout=layout,
        matrix_of=matrix_of,
        smallest=max(1, round(LEAST_KEPT * min(len(left), right.shape[1]))),
    )


def rotate(
    part: Subspace, share: float, moments: Sequence[torch.Tensor] = ()
) -> list[torch.Tensor]:
    """Take the singular vectors of Σ into the bases, and drop directions that are worth little.

    Args:
        part: The weight; it changes.
        share: β: directions with singular values below this share of the largest one go, at most
            half of them at once.
        moments: Running means that an optimizer keeps of Σ's gradient and of its square.

    Returns:
        The moments in the new bases: the gradient's turns with them; its square, elementwise, by
        the squares of the turn, as it would if the entries were independent.
    """
    with torch.no_grad():
        turn, values, back = torch.linalg.svd(part.core.double())
        kept = int((values >= share * values[0]).sum())
        kept = max(kept, math.ceil(len(values) * MOST_CUT), min(part.smallest, len(values)))
        turn, back = turn[:, :kept], back[:kept]
        dtype = part.core.dtype
        part.left = (part.left.double() @ turn).to(dtype)
        part.right = (back @ part.right.double()).to(dtype)
        part.core = torch.diag(values[:kept]).to(dtype).requires_grad_()
        found = []
        for power, moment in enumerate(moments, start=1):
            found.append((turn.T**power @ moment.double() @ back.T**power).to(dtype))
    return found
