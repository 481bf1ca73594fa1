"""Running sums over rows of features and over the gradients there."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from onnx_utilrank.statistics.moments import SecondMoment

__all__ = ["RowSums"]

# A product of few rows takes as long to be added to its sum as to be formed: rows wait until they
# are this share of their width.
WAITING = 1 / 4
BYTES = 8  # of a number in a sum


class RowSums:
    """Sums over rows, and over their gradients; rows are thinned before their moment is formed.

    Products are formed in the type of the rows and added up in float64. Those of rows are about a
    shift near their mean, which is taken out in the end.
    """

    def __init__(self, width: int, rows_wanted: int, *, gradients: bool = True) -> None:
        """Begin with nothing.

        Args:
            width: Features.
            rows_wanted: Rows that the moment is formed from, about.
            gradients: Whether there will be gradients.
        """
        self._wanted = rows_wanted
        self._shift: torch.Tensor | None = None
        self._rows = 0
        self._waiting: list[torch.Tensor] = []
        self._total = torch.zeros(width, dtype=torch.float64)
        self._outer = torch.zeros(width, width, dtype=torch.float64)
        self._gamma = torch.zeros(*2 * (width * gradients,), dtype=torch.float64)

    @staticmethod
    def bytes(width: int, *, gradients: bool = True) -> int:
        """What the sums take, with the rows that wait."""
        return BYTES * (1 + gradients) * width**2 + int(4 * WAITING * width**2)

    @property
    def state(self) -> dict[str, np.ndarray]:
        """All there is to go on from; see `restore`."""
        held = {"total": self._total.numpy(), "outer": self._outer.numpy()}
        held |= {"gamma": self._gamma.numpy(), "rows": np.array(self._rows)}
        held["waiting"] = self._waiting_rows().cpu().numpy()
        return held if self._shift is None else held | {"shift": self._shift.cpu().numpy()}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on where `state` was taken.

        Raises:
            KeyError: An array is missing.
            ValueError: An array has another shape.
        """
        for name, held in (("total", self._total), ("outer", self._outer), ("gamma", self._gamma)):
            np.copyto(held.numpy(), state[name], casting="no")
        self._rows = int(state["rows"])
        self._waiting = [torch.from_numpy(state["waiting"].copy())]
        self._shift = torch.from_numpy(state["shift"].copy()) if "shift" in state else None
        self._form(len(self._total) * WAITING)

    @property
    def shift(self) -> np.ndarray | None:
        """What is taken off rows before they are summed; None before the first."""
        return None if self._shift is None else self._shift.cpu().numpy()

    @shift.setter
    def shift(self, value: np.ndarray) -> None:
        self._shift = torch.from_numpy(value.copy())

    @property
    def gamma(self) -> np.ndarray:
        """Σ g g^T, [width, width]."""
        return self._gamma.numpy()

    @property
    def moment(self) -> SecondMoment:
        """The moment of the rows."""
        self._form(1)
        found = SecondMoment.zero(len(self._total))
        if self._shift is not None:
            found.add(
                total=self._total.numpy(),
                outer=self._outer.numpy(),
                rows=self._rows,
                shift=self._shift.double().cpu().numpy(),
            )
        return found

    def add(
        self,
        x: torch.Tensor,
        gradients: Sequence[torch.Tensor],
        live: torch.Tensor,
        share: float,
        phase: int,
    ) -> None:
        """Count the rows of one run, [samples, positions, features].

        Args:
            x: The rows.
            gradients: For each draw, at the same positions; none where none are wanted.
            live: Where the outputs depend on them, [samples, positions].
            share: Which share of all samples the run is.
            phase: Number of the run, which the choice of rows moves with.
        """
        for gradient in gradients:
            flat = gradient.reshape(-1, gradient.shape[-1])
            self._gamma += (flat.T @ flat).cpu()
        x = x.reshape(-1, x.shape[-1])[live.reshape(-1)]
        stride = max(1, int(len(x) / max(self._wanted * share, 4.0)))
        x = x[phase % stride :: stride]
        if not len(x):
            return
        if self._shift is None:
            self._shift = x.mean(0, dtype=torch.float64).to(x)
        z = x - self._shift.to(x)
        self._total += z.sum(0, dtype=torch.float64).cpu()
        self._rows += len(z)
        self._waiting.append(z)
        self._form(len(self._total) * WAITING)

    def _form(self, least: float) -> None:
        """Add up the products of the rows that wait, if they are not fewer."""
        if sum(map(len, self._waiting)) >= least:
            z = self._waiting_rows()
            self._waiting = []
            self._outer += (z.T @ z).cpu()

    def _waiting_rows(self) -> torch.Tensor:
        """The rows that wait, [rows, width]; those of a state come from another device."""
        if not self._waiting:
            return torch.zeros(0, len(self._total))
        return torch.cat([rows.to(self._waiting[-1]) for rows in self._waiting])
