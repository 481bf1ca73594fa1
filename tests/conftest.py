"""What holds for all tests."""

from collections.abc import Iterator
from typing import Any

import pytest

from onnx_utilrank import stages
from onnx_utilrank.repairing import repair
from onnx_utilrank.validation import validate
from onnx_utilrank.validation.bench import LatencyComparison, compare_latency

SECONDS = 0.2


@pytest.fixture(scope="session", autouse=True)
def short_timings() -> Iterator[None]:
    """Results are timed for a moment only, as no test asks how much faster they are."""

    def short(*args: Any, **options: Any) -> LatencyComparison:
        seconds = min(options.get("seconds", SECONDS), SECONDS)
        return compare_latency(*args, **{**options, "seconds": seconds})

    with pytest.MonkeyPatch.context() as patch:
        for module in (validate, stages, repair):
            patch.setattr(module, "compare_latency", short)
        yield
