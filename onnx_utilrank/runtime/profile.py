"""Where the time of a run goes, as ONNX Runtime's own profiler tells it."""

import json
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.runtime.provider import Provider
from onnx_utilrank.runtime.providers import CPU
from onnx_utilrank.runtime.sessions import Feed, open_session

__all__ = ["OperatorTime", "operator_times"]

# The first run plans its memory, and does not count.
WARM_UPS = 1
RUNS = 3

# Nodes within them are timed by themselves.
_HOLDERS = frozenset({"If", "Loop", "Scan"})


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorTime:
    """What the nodes of one operator take together in a run.

    Attributes:
        op_type: The operator, as ONNX Runtime runs it: fused with others where it does so.
        nodes: How many nodes of it ran.
        ms: Milliseconds a run, the mean of a few. Writing the profile down adds to it.
    """

    op_type: str
    nodes: int
    ms: float


def operator_times(
    model: ModelStore, provider: Provider, feed: Feed, outputs: Sequence[str] | None = None
) -> tuple[OperatorTime, ...]:
    """Profile some runs of a model on one feed.

    Args:
        model: The model.
        provider: Where it runs.
        feed: What it runs on.
        outputs: Outputs that are asked for; None for all.

    Returns:
        One entry an operator, the dearest first. None on other providers than the CPU, where a
        node's time is that of handing it over, and where the profile cannot be read.

    Raises:
        ModelError: The model does not load or run.
    """
    if provider.key != CPU.key:
        return ()
    with tempfile.TemporaryDirectory(prefix="onnx_utilrank_") as folder:
        session = open_session(model, provider, profile=Path(folder) / "run")
        for _ in range(WARM_UPS + RUNS):
            session.run(feed, outputs)
        text = Path(session.raw.end_profiling()).read_text(encoding="utf8", errors="replace")
    try:
        events = json.loads(text, strict=False)
    except ValueError:  # it holds names of nodes, which ONNX Runtime may not have escaped
        return ()
    starts = sorted(e["ts"] for e in events if e.get("name") == "model_run")
    time: defaultdict[str, float] = defaultdict(float)
    count: defaultdict[str, int] = defaultdict(int)
    for event in events:
        operator = event.get("args", {}).get("op_name")
        whole = event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
        if whole and operator not in _HOLDERS and event["ts"] >= starts[WARM_UPS]:
            time[operator] += event["dur"] / 1e3 / RUNS
            count[operator] += 1
    found = (
        OperatorTime(op_type=name, nodes=round(count[name] / RUNS), ms=ms)
        for name, ms in time.items()
    )
    return tuple(sorted(found, key=lambda each: -each.ms))
