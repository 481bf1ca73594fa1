"""When weights go into orthonormal bases, and when those turn and lose directions (OIALR)."""

import functools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import torch

from onnx_utilrank.model.graph import GraphIndex
from onnx_utilrank.sites.find import find_sites, site_kind
from onnx_utilrank.sites.site import Site, Use
from onnx_utilrank.training.student import Student
from onnx_utilrank.training.subspaces import Subspace, rotate, subspace
from onnx_utilrank.training.weights import Plain

__all__ = ["AdaptiveRanks", "dense_subspace", "eligible", "factor_pairs", "pair_subspace"]

Storing: TypeAlias = Callable[[torch.Tensor], torch.Tensor]

# After so many looks at the bases all layers take part: each time a share more, from the last one
# on (the authors' code, which has a tenth).
ALL_JOINED = 10
# Thinner matrices than this, the shorter side to the longer, have no directions to spare (there).
THINNEST = 0.1


@dataclass(slots=True)
class AdaptiveRanks:
    """A `loop.Hook`: turns bases every ν steps, and cuts what is below β (OIALR, algorithm 1).

    Attributes:
        share: β.
        delay: Steps before weights go into bases, in which they are trained as they are.
        interval: ν.
        into: How a weight goes into bases, by name; those that are in bases from the start are
            not in it.
    """

    share: float
    delay: int
    interval: int
    into: dict[str, Callable[[torch.Tensor], Subspace]] = field(default_factory=dict)

    def __call__(self, step: int, student: Student, optimizer: torch.optim.Optimizer) -> None:
        """See `loop.Hook`."""
        if step == self.delay:
            for k, part in enumerate(student.parts):
                if isinstance(part, Plain) and part.name in self.into:
                    student.parts[k] = self._enter(part, optimizer)
        elif step > self.delay and (step - self.delay) % self.interval == 0:
            parts = [part for part in student.parts if isinstance(part, Subspace)]
            rounds = (step - self.delay) // self.interval
            joined = -(-min(rounds, ALL_JOINED) * len(parts) // ALL_JOINED)
            for part in parts[len(parts) - joined :]:
                old = part.core
                moments = rotate(part, self.share, _moments(optimizer, old))
                _hand_over(optimizer, old, part.core, moments)

    def catch_up(self, done: int, student: Student) -> None:
        """See `loop.Hook`."""
        if done > self.delay:
            student.parts = [
                self.into[part.name](part.tensor.detach())
                if isinstance(part, Plain) and part.name in self.into
                else part
                for part in student.parts
            ]

    def _enter(self, part: Plain, optimizer: torch.optim.Optimizer) -> Subspace:
        made = self.into[part.name](part.tensor.detach())
        moments = []
        for power, moment in enumerate(_moments(optimizer, part.tensor), start=1):
            matrix = made.matrix_of(moment).double()
            moments.append(made.left.T.double() ** power @ matrix @ made.right.T.double() ** power)
        _hand_over(optimizer, part.tensor, made.core, [m.to(made.core) for m in moments])
        return made


def _moments(optimizer: torch.optim.Optimizer, tensor: torch.Tensor) -> list[torch.Tensor]:
    """Adam's running means of a gradient and of its square; none before the first step."""
    held = optimizer.state.get(tensor, {})
    return [held[name] for name in ("exp_avg", "exp_avg_sq") if name in held]


def _hand_over(
    optimizer: torch.optim.Optimizer,
    old: torch.Tensor,
    new: torch.Tensor,
    moments: Sequence[torch.Tensor],
) -> None:
    """Let the optimizer go on with another tensor in the place of one."""
    for group in optimizer.param_groups:
        group["params"] = [new if tensor is old else tensor for tensor in group["params"]]
    held = optimizer.state.pop(old, None)
    if held and moments:
        held["exp_avg"], held["exp_avg_sq"] = moments
        optimizer.state[new] = held


def eligible(sites: Sequence[Site], trained: Collection[str]) -> tuple[list[Site], list[str]]:
    """Weights that go into bases, and for the others why they do not.

    Args:
        sites: All of a model, in the order of its nodes.
        trained: Names of initializers that are trained.

    Returns:
        The weights, and sentences that name the rest.
    """
    found: list[Site] = []
    left: dict[str, list[str]] = {}
    for site in sites:
        reason = None
        if site.weight not in trained:
            reason = "not trained"
        elif not site.freed:
            reason = "read by other nodes too"
        elif site.one_hot:
            reason = "tables"
        elif site.full_rank <= THINNEST * max(site.m, site.d):
            reason = "too thin to have directions to spare"
        elif site is sites[-1]:
            reason = "the last layer"
        if reason is None:
            found.append(site)
        else:
            left.setdefault(reason, []).append(repr(site.weight))
    reasons = [f"Not in bases ({why}): {', '.join(names)}." for why, names in left.items()]
    return found, reasons


def dense_subspace(site: Site, weight: torch.Tensor) -> Subspace:
    """A dense weight, as its operator stores it, in bases of its own."""
    use = site.uses[0]
    kind, name = site_kind(site.op_type), site.weight
    held = weight.numpy(force=True)
    stored = _storing(use, held, (site.m, site.d))

    def layout(left: torch.Tensor, right: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name: stored(left @ right)}

    def matrix(values: torch.Tensor) -> torch.Tensor:
        found = kind.matrix(use, values.numpy(force=True))
        return torch.from_numpy(np.ascontiguousarray(found)).to(values)

    whole = matrix(weight)
    eye = torch.eye(site.full_rank).to(whole)
    pair = (eye, whole) if site.wide else (whole, eye)
    return subspace(name, *pair, layout, matrix_of=matrix)


def factor_pairs(index: GraphIndex) -> list[tuple[Site, Site]]:
    """Two weights after each other whose inner value nothing else sees: the factors of one."""
    sites, _ = find_sites(index)
    readers = {site.uses[0].inputs.tensor: site for site in sites if len(site.uses) == 1}
    found = []
    for first in sites:
        use = first.uses[0]
        inner = use.result.tensor
        second = readers.get(inner)
        alone = len(first.uses) == 1 and len(index.consumers.get(inner, ())) == 1
        if second is None or not alone or inner in index.pinned or second is first:
            continue
        small = first.m < min(first.d, second.m)
        bare = first.bias in ("new", "none") and use.bias.kind in ("new", "none")
        gains = use.gain == 1.0 and second.uses[0].gain == 1.0
        if small and bare and gains and use.affine and first.freed and second.freed:
            found.append((first, second))
    return found


def pair_subspace(
    first: Site, second: Site, tensors: tuple[torch.Tensor, torch.Tensor]
) -> Subspace:
    """Two factors, as their operators store them, in common bases."""
    rank, uses = first.m, (first.uses[0], second.uses[0])
    held = [tensor.numpy(force=True) for tensor in tensors]
    taps = second.d // rank

    @functools.lru_cache(maxsize=2)  # ranks fall seldom, and layouts are asked for at every step
    def storing(r: int) -> tuple[Storing, Storing]:
        return (
            _storing(uses[0], held[0], (r, first.d)),
            _storing(uses[1], held[1], (second.m, r * taps)),
        )

    def layout(left: torch.Tensor, right: torch.Tensor) -> dict[str, torch.Tensor]:
        r = len(right)
        # Taps of the second kernel count as outputs of the product.
        mixing = left.reshape(second.m, taps, r).swapaxes(1, 2).reshape(second.m, r * taps)
        one, other = storing(r)
        return {first.weight: one(right), second.weight: other(mixing)}

    def matrix(use: Use, values: np.ndarray) -> torch.Tensor:
        found = site_kind(use.op_type).matrix(use, values)
        return torch.from_numpy(np.array(found, order="C")).to(tensors[0])

    right, mixing = (matrix(use, values) for use, values in zip(uses, held, strict=True))
    left = mixing.reshape(second.m, rank, taps).swapaxes(1, 2).reshape(second.m * taps, rank)
    return subspace(first.weight, left, right, layout)


def _storing(use: Use, held: np.ndarray, shape: tuple[int, int]) -> Storing:
    """How a matrix becomes a tensor as its operator stores it, with gradients."""
    m, d = shape
    places = np.arange(m * d).reshape(m, d)
    spots = site_kind(use.op_type).stored(use, held, places)
    if np.array_equal(spots.ravel(), places.ravel()):
        return lambda matrix: matrix.reshape(spots.shape)
    if np.array_equal(spots.ravel(), places.T.ravel()):
        return lambda matrix: matrix.T.reshape(spots.shape)
    order = torch.from_numpy(spots.ravel())
    return lambda matrix: matrix.reshape(-1)[order].reshape(spots.shape)
