"""What does the work that can be shared: this process, or workers elsewhere.

Work is cut into tasks that depend on nothing but what they are given. A task may be done twice
where a worker dies on the way, and its result is taken once.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, Self, TypeVar

__all__ = ["IN_PLACE", "SHARDS", "Engine", "EngineUse", "shards"]

# Parts that the runs of a pass are cut into, however many workers there are: so that the order of
# sums, and with it the last bits of a result, does not hang on their number. More parts keep more
# workers busy, and make more sums to send and to add.
SHARDS = 16

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineUse:
    """Who did the work.

    Attributes:
        name: The engine.
        nodes: Machines that tasks were done on.
        workers: Processes that did tasks.
        tasks: Tasks that were done.
    """

    name: str
    nodes: int
    workers: int
    tasks: int


class Engine(Protocol):
    """What does tasks; it is entered for the time of the work."""

    @property
    def in_place(self) -> bool:
        """Whether it is this process, so that sums may be added where they are."""
        ...

    @property
    def threads(self) -> int:
        """Threads of a session of ONNX Runtime in a task; 0 leaves it to ONNX Runtime."""
        ...

    @property
    def use(self) -> EngineUse | None:
        """Who did the work so far; None where it was this process."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *raised: object) -> None: ...

    def map(
        self,
        function: Callable[..., R],
        shared: tuple[Any, ...],
        tasks: Iterable[Any],
        *,
        memory: int = 0,
        runs_model: bool = False,
    ) -> Iterator[R]:
        """Results of `function(*shared, task)`, in the order of the tasks.

        Args:
            function: A function of a module; it may not change what it is given.
            shared: What every task needs; sent to a worker once.
            tasks: One a call.
            memory: Bytes that a task takes, about.
            runs_model: Whether it runs the model, on the provider.

        Raises:
            UtilrankError: What the function raised; or a task could not be done.
        """
        ...

    def groups(self, function: Callable[[T], R], groups: Iterable[T]) -> Iterator[R]:
        """Results of a function of this process that maps tasks itself, in order.

        Several calls may be under way at once, so that no worker waits for the end of one.
        """
        ...


class _InPlace:
    """Does everything here, one task after the other."""

    in_place = True
    threads = 0
    use = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        pass

    def map(
        self,
        function: Callable[..., R],
        shared: tuple[Any, ...],
        tasks: Iterable[Any],
        *,
        memory: int = 0,  # noqa: ARG002
        runs_model: bool = False,  # noqa: ARG002
    ) -> Iterator[R]:
        return (function(*shared, task) for task in tasks)

    def groups(self, function: Callable[[T], R], groups: Iterable[T]) -> Iterator[R]:
        return map(function, groups)


IN_PLACE: Engine = _InPlace()


def shards(runs: int, first: int = 0) -> list[range]:
    """The runs of a pass in the parts that a task each adds up.

    Args:
        runs: How many there are.
        first: The first that counts: those before it are done.
    """
    cuts = sorted({runs * k // SHARDS for k in range(SHARDS + 1)} | {first})
    return [range(a, b) for a, b in itertools.pairwise(cuts) if a >= first]
