"""What the original gives for the runs that train."""

from collections.abc import Sequence

import numpy as np

from onnx_utilrank.calibration.survey import expose
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.runtime.providers import Provider
from onnx_utilrank.runtime.sessions import Feed, open_session
from onnx_utilrank.statistics.spill import spilled

__all__ = ["Teacher"]


class Teacher:
    """The original on an execution provider; what it gave once is kept."""

    def __init__(
        self, store: ModelStore, names: Sequence[str], provider: Provider, *, budget: int
    ) -> None:
        """Load it.

        Args:
            store: The original.
            names: The values that are wanted of it, inner ones too.
            provider: Where it runs.
            budget: Bytes that may be kept.

        Raises:
            ModelError: ONNX Runtime cannot load it.
            ProviderUnavailableError: The provider cannot be had.
        """
        own = {o.name for o in store.outputs}
        self._session = open_session(expose(store, set(names) - own), provider)
        self._names = tuple(names)
        self._kept: dict[tuple[int, int], dict[str, np.ndarray]] = {}
        self._room = budget

    def __call__(self, feed: Feed, key: tuple[int, int]) -> dict[str, np.ndarray]:
        """The values for one run.

        Args:
            feed: The run.
            key: What tells it from all others.

        Raises:
            InferenceError: The run fails.
        """
        if key in self._kept:
            return self._kept[key]
        values = self._session.run(feed, self._names)
        size = sum(v.nbytes for v in values.values())
        if size <= self._room:
            self._room -= size
            self._kept[key] = {name: spilled(v) for name, v in values.items()}
        return values
