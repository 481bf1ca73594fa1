"""Compare two models on samples of a data set: outputs, size, operations and latency."""

from collections.abc import Sequence
from dataclasses import replace

from onnx_utilrank.calibration.data import Dataset
from onnx_utilrank.calibration.survey import linear_flops
from onnx_utilrank.config import ValidateConfig
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.ranking.cost import count_parameters
from onnx_utilrank.runtime.providers import Provider
from onnx_utilrank.runtime.sessions import Feed
from onnx_utilrank.validation.report import ModelFigures, ValidationReport
from onnx_utilrank.validation.report import validate as compare_models

__all__ = ["compare"]


def compare(
    reference: ModelStore,
    candidate: ModelStore,
    data: Dataset,
    samples: Sequence[int],
    batch: int,
    providers: Sequence[Provider],
    config: ValidateConfig,
    *,
    counted: ModelStore | None = None,
) -> ValidationReport:
    """Compare two models on the given samples of a data set.

    Parameters and operations of a candidate that was quantized are those of the model `counted`
    that it was made of: in fewer bits they are no longer to be seen.
    """
    single = next(data.feeds(samples, batch=1))
    feeds = list(data.feeds(samples, batch=batch))
    return compare_models(
        reference,
        candidate,
        feeds,
        samples=len(samples),
        providers=providers,
        figures=(
            _figures(reference, single, providers[0]),
            replace(
                _figures(counted or candidate, single, providers[0]),
                file_bytes=candidate.file_bytes,
            ),
        ),
        max_error=config.max_error,
        min_agreement=config.min_agreement,
    )


def _figures(store: ModelStore, feed: Feed, provider: Provider) -> ModelFigures:
    return ModelFigures(
        parameters=count_parameters(store),
        file_bytes=store.file_bytes,
        flops=linear_flops(store, feed, provider),
    )
