"""What holds for all tests."""

from collections.abc import Iterator
from typing import Any

import pytest

from onnx_utilrank.validation import report
from onnx_utilrank.validation.bench import LatencyComparison


@pytest.fixture(scope="session", autouse=True)
def short_timings() -> Iterator[None]:
    """Models are timed for a moment where they are validated: no test rests on how long it took."""
    whole = report.compare_latency

    def short(*args: Any, **options: Any) -> LatencyComparison:
        return whole(*args, **{**options, "seconds": 0.2})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "compare_latency", short)
        yield
