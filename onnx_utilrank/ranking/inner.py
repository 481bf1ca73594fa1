"""What lies around a weight, decomposed: the features it makes, those or the units it reads."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnx_utilrank.statistics.factorize import (
    Decomposition,
    Factors,
    Metric,
    factored,
    grouped,
    optimal,
)
from onnx_utilrank.statistics.moments import SecondMoment, shrinkage
from onnx_utilrank.statistics.selection import Selection, select_together
from onnx_utilrank.statistics.sensitivity import Sensitivity

__all__ = ["Heads", "InnerFeatures", "Reading", "Units", "forgiven"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """Hidden features that a site makes, decomposed.

    Attributes:
        groups: Rows of each group, and whether the mean of what they lose is made up for by the
            bias of the weight that reads them.
        gammas: Γ [n, n] of each group.
        found: The decomposition, see `statistics.factorize.grouped`.
        errors: Predicted loss of the model at each rank of it.
        seen: The same with Γ as it was seen.
        mean: E[W x + b], [m].
        behind: What of b an Add behind the node adds, [m].
    """

    groups: tuple[tuple[slice, bool], ...]
    gammas: tuple[np.ndarray, ...]
    found: Decomposition
    errors: np.ndarray
    seen: np.ndarray
    mean: np.ndarray
    behind: np.ndarray

    @classmethod
    def of(
        cls,
        groups: Sequence[tuple[slice, bool]],
        gammas: Sequence[np.ndarray],
        observed: Sequence[np.ndarray],
        mean: np.ndarray,
        covariance: np.ndarray,
        behind: np.ndarray,
    ) -> "Heads":
        """Decompose features of this mean [m] and covariance [m, m]; the rest as above.

        `observed` are the Γ as they were seen, where `gammas` are sure of no more than that.
        """
        rest = mean - forgiven(groups, mean)
        second = covariance + np.outer(rest, rest)
        found = grouped(gammas, second, [rows for rows, _ in groups])
        whole = np.zeros(second.shape)
        for (rows, _), gamma in zip(groups, observed, strict=True):
            whole[rows, rows] = gamma
        return cls(
            groups=tuple(groups),
            gammas=tuple(gammas),
            found=found,
            errors=found.errors / 2,
            seen=found.errors_under(whole, second) / 2,
            mean=mean,
            behind=behind,
        )

    @property
    def met(self) -> np.ndarray:
        """1 for the rows that are in none of the groups and only meet them, else 0, [m]."""
        others = np.ones(len(self.mean))
        for rows, _ in self.groups:
            others[rows] = 0.0
        return others


@dataclass(frozen=True, slots=True, kw_only=True)
class InnerFeatures:
    """What the first of two Convs reads, decomposed: x ≈ L K (x − μ) + μ at every position.

    Attributes:
        move: Key of the move that makes them: `Split.features` says which they are.
        found: L and K.
        errors: Predicted loss of the model at each rank.
        seen: The same of rows and gradients as they were seen.
        mean: μ where the bias makes up for what is lost of it, else 0, [features].
    """

    move: str
    found: Decomposition
    errors: np.ndarray
    seen: np.ndarray
    mean: np.ndarray

    @classmethod
    def of(cls, move: str, known: Sensitivity, *, centred: bool) -> "InnerFeatures":
        """Decompose features of which rows and gradients were seen.

        A change of the input is worth what its gradient there says, as a change of the output is:
        the optimum is that of a weight which is the identity, in the metric of the input's
        gradients.
        """
        moment = known.moment
        eye, metric = np.eye(moment.width), Metric.of(known.fisher())
        found = optimal(eye, metric, outputs=moment, centred=centred)
        mean = moment.mean if centred else np.zeros(moment.width)
        seen = found.errors_under(known.observed, moment.second(centred=centred))
        return cls(move=move, found=found, errors=found.errors / 2, seen=seen / 2, mean=mean)

    def factors(self, weight: np.ndarray, rank: int) -> Factors:
        """W' [m, r taps] and K [r, features], balanced."""
        m, features = len(weight), len(self.found.expand)
        taps = weight.reshape(m, features, -1)
        reduced = np.einsum("mct,cr->mtr", taps, self.found.expand[:, :rank], optimize=True)
        both = factored(reduced.reshape(-1, rank), self.found.reduce[:rank])
        left = both.left.reshape(m, -1, rank).transpose(0, 2, 1).reshape(m, -1)
        return Factors(left=left, right=both.right)

    def lost(self, weight: np.ndarray, rank: int) -> np.ndarray:
        """What a rank loses of the mean output away from the borders, [m]."""
        taps = weight.reshape(len(weight), len(self.mean), -1).sum(-1)
        return np.asarray(taps @ self.found.lost(self.mean, rank))


@dataclass(frozen=True, slots=True, kw_only=True)
class Units:
    """The hidden units that a site reads, a choice of which can stand for all.

    Attributes:
        selection: Which, and how the others follow from them.
        errors: Predicted loss of the model for each number that is kept.
        seen: The same of rows and gradients as they were seen.
        mean: Their mean where the bias makes up for what is lost of it, else 0, [n].
    """

    selection: Selection
    errors: np.ndarray
    seen: np.ndarray
    mean: np.ndarray

    @classmethod
    def of(cls, readings: Sequence["Reading"]) -> list["Units"]:
        """Rank units for all who read them: the same are kept for each."""
        views = [(each.root, each.shrunk) for each in readings]
        return [
            cls(
                selection=selection,
                errors=selection.errors / 2,
                seen=selection.found.errors_under(each.observed, each.second) / 2,
                mean=each.mean,
            )
            for each, selection in zip(readings, select_together(views), strict=True)
        ]

    def lost(self, weight: np.ndarray, kept: int) -> np.ndarray:
        """What is lost of the mean output, of a Conv away from the borders, [m]."""
        taps = weight.reshape(len(weight), len(self.mean), -1).sum(-1)
        return np.asarray(taps @ self.selection.lost(self.mean, kept))


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """Hidden units as a site reads them.

    Attributes:
        root: B [q, n]: a change δ of theirs counts ‖B δ‖².
        observed: What it counts as it was seen: ‖B δ‖² without what is added to that, [n, n].
        moment: Of their values.
        centred: Whether the bias makes up for what is lost of their mean.
    """

    root: np.ndarray
    observed: np.ndarray
    moment: SecondMoment
    centred: bool

    @property
    def second(self) -> np.ndarray:
        """Their second moment [n, n]."""
        return self.moment.second(centred=self.centred)

    @property
    def shrunk(self) -> np.ndarray:
        """The same, shrunk where few rows were seen."""
        second = self.second
        if self.moment.enough_rows:
            return second
        mixed = shrinkage(second, self.moment.rows)
        level = float(np.trace(second)) / self.moment.width
        return np.asarray((1 - mixed) * second + mixed * level * np.eye(self.moment.width))

    @property
    def mean(self) -> np.ndarray:
        """What of their mean may be lost, [n]."""
        return self.moment.mean if self.centred else np.zeros(self.moment.width)


def forgiven(groups: Sequence[tuple[slice, bool]], mean: np.ndarray) -> np.ndarray:
    """The part of a mean output [m] that may be lost, as the bias of the next weight takes it."""
    part = np.zeros(len(mean))
    for rows, centred in groups:
        part[rows] = mean[rows] * centred
    return part
