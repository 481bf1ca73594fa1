"""Tasks on a cluster of Ray, or on a Ray that lives in this machine as long as they do."""

import collections
import importlib.metadata
import itertools
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn, Self, TypeVar

from onnx_utilrank.engine.engine import SHARDS, EngineUse
from onnx_utilrank.errors import (
    ConfigError,
    EngineUnavailableError,
    ProviderUnavailableError,
    UtilrankError,
)

try:
    import ray
    from ray.exceptions import RayError, RaySystemError, RayTaskError
except ImportError as e:
    raise ConfigError(
        f'engine ray: Ray cannot be imported ({e}); pip install "onnx-utilrank[ray]"'
    ) from e

__all__ = ["RayEngine"]

# How often a task is done again where its worker, or the machine of it, dies.
RETRIES = 3

# Seconds that the head of a cluster may take to answer.
PATIENCE = 5.0

# Shared values that are kept for further calls: the model is one of them.
KEPT = 8

T = TypeVar("T")
R = TypeVar("R")


class RayEngine:
    """Does tasks on workers of Ray."""

    in_place = False
    # A worker has one core; ONNX Runtime would take all.
    threads = 1

    def __init__(self, address: str | None, *, gpus: bool) -> None:
        """Look whether the cluster is there; nothing is started yet.

        Args:
            address: Host and port of its head, or 'auto'; None for a Ray of our own.
            gpus: Whether a task that runs the model needs a GPU.

        Raises:
            EngineUnavailableError: It does not answer.
        """
        self._address = address or os.environ.get("RAY_ADDRESS")
        self._gpus = gpus
        self._ours = False
        self._kept: collections.OrderedDict[int, tuple[object, Any]] = collections.OrderedDict()
        self._workers: set[tuple[str, int]] = set()
        self._tasks = 0
        # Groups are measured in threads.
        self._lock = threading.Lock()
        self._open = False
        if self._address and not ray.is_initialized():
            _answers(self._address)

    @property
    def use(self) -> EngineUse:
        """Who did the work so far."""
        return EngineUse(
            name="ray",
            nodes=len({node for node, _ in self._workers}),
            workers=len(self._workers),
            tasks=self._tasks,
        )

    def __enter__(self) -> Self:
        """Connect, or start.

        Raises:
            EngineUnavailableError: Ray does not start, or the cluster has no GPU.
        """
        self._ours = not ray.is_initialized()  # one that the caller has is used, and left running
        if self._ours:
            # Nothing is told to anybody; what matters of what Ray logs comes as an error.
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            logging.getLogger("ray").setLevel(logging.ERROR)
            # A Ray of our own cannot be reached from other machines.
            own: dict[str, Any] = {"include_dashboard": False, "_node_ip_address": "127.0.0.1"}
            try:
                ray.init(
                    address=self._address or "local",
                    log_to_driver=False,
                    configure_logging=False,
                    **({} if self._address else own),
                )
            except (OSError, RuntimeError, ValueError, RayError) as e:
                raise EngineUnavailableError(f"engine ray: {_first_line(e)}") from e
        if self._gpus and not _resources().get("GPU"):
            self.__exit__()
            raise EngineUnavailableError("engine ray: no node of the cluster has a GPU")
        self._open = True
        return self

    def __exit__(self, *raised: object) -> None:
        self._open = False
        self._kept.clear()
        if self._ours:
            ray.shutdown()

    def map(
        self,
        function: Callable[..., R],
        shared: tuple[Any, ...],
        tasks: Iterable[Any],
        *,
        memory: int = 0,
        runs_model: bool = False,
    ) -> Iterator[R]:
        """See `Engine.map`."""
        gpus = 1 if runs_model and self._gpus else 0
        self._check_room(memory)
        task: Any = _task.options(num_cpus=1, num_gpus=gpus, memory=memory, max_retries=RETRIES)
        refs = [self._held(each) for each in shared]
        own = importlib.metadata.version("onnx-utilrank")
        waiting = iter(tasks)
        pending: collections.deque[Any] = collections.deque()
        # What nobody waits for any more is done for nothing: Ray 2.60 ends the whole process where
        # a task is done as it is cancelled.
        while True:
            # A few more than are done at once; all of them would fill the memory of the nodes.
            room = 2 * self._slots(gpus) - len(pending) if self._open else 0
            pending += [
                task.remote(function, refs, each, own)
                for each in itertools.islice(waiting, max(room, 0))
            ]
            if not pending:
                return
            yield self._result(pending.popleft())

    def groups(self, function: Callable[[T], R], groups: Iterable[T]) -> Iterator[R]:
        """See `Engine.groups`: as many at once as have parts for all workers, and one more."""
        at_once = -(-self._slots(int(self._gpus)) // SHARDS) + 1
        pool = ThreadPoolExecutor(at_once)
        waiting = iter(groups)
        pending = collections.deque(
            pool.submit(function, group) for group in itertools.islice(waiting, at_once)
        )
        try:
            while pending:
                yield pending.popleft().result()
                pending += [pool.submit(function, group) for group in itertools.islice(waiting, 1)]
        finally:
            # Where one failed, the others find the engine closed.
            pool.shutdown(wait=False, cancel_futures=True)

    def _held(self, value: object) -> Any:
        """The reference of a value in the store of Ray, which is put there once."""
        with self._lock:
            if id(value) not in self._kept:
                self._kept[id(value)] = (value, ray.put(value))
            self._kept.move_to_end(id(value))
            ref = self._kept[id(value)][1]
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return ref

    def _result(self, ref: Any) -> Any:
        try:
            node, process, value = ray.get(ref)
        except RayTaskError as e:
            _raise_cause(e)
        except RayError as e:
            raise UtilrankError(
                f"engine ray: a task was not done, after {RETRIES} more trials: {_first_line(e)}"
            ) from e
        with self._lock:
            self._workers.add((node, process))
            self._tasks += 1
        return value

    def _slots(self, gpus: int) -> int:
        """Tasks that are done at once."""
        return max(int(_resources().get("GPU" if gpus else "CPU", 1)), 1)

    def _check_room(self, memory: int) -> None:
        found: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
        nodes = [node["Resources"].get("memory", 0) for node in found if node["Alive"]]
        if memory > max(nodes, default=0):
            raise EngineUnavailableError(
                f"engine ray: a task takes about {memory:,} bytes, and the largest node of the "
                f"cluster has {int(max(nodes, default=0)):,}; a smaller memory budget takes less"
            )


@ray.remote
def _task(
    function: Callable[..., R], shared: list[Any], task: Any, version: str
) -> tuple[str, int, R]:
    """Do one task, on a worker; also tell who did it."""
    node = socket.gethostname()
    own = importlib.metadata.version("onnx-utilrank")
    if own != version:
        raise EngineUnavailableError(
            f"engine ray: node {node} has onnx-utilrank {own}, and not {version}"
        )
    try:
        value = function(*map(_received, shared), task)
    except (ConfigError, ProviderUnavailableError) as e:
        # It was fine where it was asked for.
        raise type(e)(f"node {node}: {e}") from e
    return ray.get_runtime_context().get_node_id(), os.getpid(), value


# What this worker was sent, by its reference.
_RECEIVED: collections.OrderedDict[str, Any] = collections.OrderedDict()


def _received(ref: Any) -> Any:
    key = ref.hex()
    if key not in _RECEIVED:
        try:
            _RECEIVED[key] = ray.get(ref)
        except RaySystemError as e:  # what was raised while a value was made anew
            if isinstance(e.client_exc, UtilrankError):
                raise e.client_exc from None
            raise
    _RECEIVED.move_to_end(key)
    while len(_RECEIVED) > KEPT:
        _RECEIVED.popitem(last=False)
    return _RECEIVED[key]


def _raise_cause(error: RayTaskError) -> NoReturn:
    """Raise what a task raised, as if it had been raised here."""
    cause = error.cause
    if isinstance(cause, UtilrankError):
        raise cause from None
    if isinstance(cause, ImportError) or "failed to import on the worker" in str(cause):
        raise EngineUnavailableError(
            f"engine ray: a worker cannot import what it needs ({cause}); every node needs the "
            "same packages"
        ) from error
    raise error


def _resources() -> dict[str, float]:
    """What the nodes of the cluster have together, by name."""
    found: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return found


def _answers(address: str) -> None:
    """Ask whether anybody listens: Ray itself would wait for minutes.

    Raises:
        ConfigError: It is no address.
        EngineUnavailableError: Nobody does.
    """
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(f"engine ray: {address!r} is not of the form host:port, nor auto")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=PATIENCE).close()
    except (OSError, OverflowError) as e:
        raise EngineUnavailableError(
            f"engine ray: no cluster answers at {address} ({_first_line(e)})"
        ) from e


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
