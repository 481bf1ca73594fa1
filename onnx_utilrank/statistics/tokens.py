"""How often each token was looked up in a table, and what that says of those that were not."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from onnx_utilrank.statistics.moments import SecondMoment

__all__ = ["TokenCounts"]

# Columns of a table that are weighed at once: a copy of all of a large one is not made.
COLUMNS = 8192


@dataclass(slots=True, kw_only=True)
class TokenCounts:
    """Sums over samples of tokens, of a vocabulary of d.

    Attributes:
        counts: How often each token came, int64 [d].
        holders: In how many samples it did, int64 [d].
        samples: Samples with any token.
    """

    counts: np.ndarray
    holders: np.ndarray
    samples: int = 0

    @classmethod
    def zero(cls, d: int) -> "TokenCounts":
        """The counts of no samples."""
        return cls(counts=np.zeros(d, np.int64), holders=np.zeros(d, np.int64))

    def add(self, ids: np.ndarray, live: np.ndarray | None = None) -> None:
        """Count the tokens of some samples.

        Args:
            ids: Integers in [-d, d), those below 0 counted from the end, [samples, positions].
            live: Which of them count, boolean of the same shape; None for all.
        """
        d = len(self.counts)
        sample, _ = found = np.nonzero(np.ones(ids.shape, bool) if live is None else live)
        tokens = ids[found].astype(np.int64) % d
        self.counts += np.bincount(tokens, minlength=d)
        self.holders += np.bincount(np.unique(sample * d + tokens) % d, minlength=d)
        self.samples += len(np.unique(sample))

    @property
    def state(self) -> dict[str, np.ndarray]:
        """All there is to go on from; see `restore`."""
        held = np.array(self.samples)
        return {"counts": self.counts, "holders": self.holders, "samples": held}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on where `state` was taken."""
        self.counts, self.holders = state["counts"], state["holders"]
        self.samples = int(state["samples"])

    def __add__(self, other: "TokenCounts") -> "TokenCounts":
        return TokenCounts(
            counts=self.counts + other.counts,
            holders=self.holders + other.holders,
            samples=self.samples + other.samples,
        )

    @property
    def rows(self) -> int:
        """How many tokens came."""
        return int(self.counts.sum())

    @property
    def unseen(self) -> float:
        """The share that tokens which never came have in a further sample, in (0, 1].

        Each sample in turn is left out: what no other one holds would have been unseen. For single
        tokens that is the estimate of Good and Turing (Good, "The population frequencies of species
        and the estimation of population parameters", Biometrika 40(3/4), 1953); tokens of one
        sample repeat and go together, hence whole samples. By the rule of succession one sample
        more counts, of nothing but new tokens, so that no number of samples rules those out.
        """
        alone = int(self.counts[self.holders == 1].sum())
        another = self.rows / max(self.samples, 1)
        return (alone + another) / (self.rows + another) if self.rows else 1.0

    @property
    def weights(self) -> np.ndarray:
        """How often each token is to be expected, float64 [d], of sum 1.

        As often as it came, with the share of the unseen spread over the whole vocabulary (additive
        smoothing).
        """
        seen = self.counts / max(self.rows, 1)
        return np.asarray((1 - self.unseen) * seen + self.unseen / len(seen))

    def moment(self, weight: np.ndarray) -> SecondMoment:
        """The moment of W x, of x one-hot and distributed like `weights`.

        Args:
            weight: W [m, d].
        """
        moment = SecondMoment.zero(len(weight))
        expected = self.rows * self.weights
        for start in range(0, len(expected), COLUMNS):
            columns = weight[:, start : start + COLUMNS].astype(np.float64, copy=False)
            weighed = columns * expected[start : start + COLUMNS]
            moment.add(total=weighed.sum(1), outer=weighed @ columns.T, rows=0)
        moment.rows = self.rows
        return moment
