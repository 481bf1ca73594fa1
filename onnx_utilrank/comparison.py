"""Compare two models on samples of a data set: outputs, size, operations and latency."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

from onnx_utilrank.calibration.data import Dataset
from onnx_utilrank.calibration.labels import Labels
from onnx_utilrank.calibration.survey import linear_flops
from onnx_utilrank.config import ValidateConfig
from onnx_utilrank.errors import ModelError
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.ranking.cost import count_parameters
from onnx_utilrank.runtime.providers import Provider
from onnx_utilrank.runtime.sessions import Feed
from onnx_utilrank.validation.depth import LayerError, error_through_depth
from onnx_utilrank.validation.report import ModelFigures, ValidationReport
from onnx_utilrank.validation.validate import validate as compare_models

__all__ = ["check_alike", "compare"]

# Samples that the error is followed through the layers on.
FOLLOWED = 4


def compare(
    reference: ModelStore,
    candidate: ModelStore,
    data: Dataset,
    samples: Sequence[int],
    batch: int,
    providers: Sequence[Provider],
    config: ValidateConfig,
    *,
    timed: int | None = None,
    counted: ModelStore | None = None,
) -> ValidationReport:
    """Compare two models on the given samples of a data set.

    Args:
        reference: The model that is right by definition.
        candidate: The other.
        data: The data set.
        samples: Numbers of the samples.
        batch: Samples of a run.
        providers: Where they run.
        config: Tolerances, and which array of the data holds the right classes.
        timed: Samples of a run that is timed; None for `batch`.
        counted: The model that a quantized candidate was made of: its parameters and operations
            are those of this one, as in fewer bits they are no longer to be seen.
    """
    single = next(data.feeds(samples, batch=1))
    feeds = list(data.feeds(samples, batch=batch))
    depth: tuple[LayerError, ...] = ()
    if candidate is not reference:
        followed = islice(data.feeds(samples, batch=1), FOLLOWED)
        depth = error_through_depth(reference, candidate, followed, providers[0])
    report = compare_models(
        reference,
        candidate,
        feeds,
        timed=feeds if timed is None else list(data.feeds(samples, batch=timed)),
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
        labels=None if config.labels is None else Labels.parse(config.labels),
        max_drop=config.max_drop,
        where=data.label,
    )
    return replace(report, depth=depth)


def check_alike(reference: ModelStore, candidate: ModelStore) -> None:
    """Both models have to take and give the same.

    Raises:
        ModelError: They do not.
    """
    for what in ("inputs", "outputs"):
        one, other = (
            [(v.name, v.dtype) for v in getattr(store, what)] for store in (reference, candidate)
        )
        if one != other:
            raise ModelError(
                f"{candidate.label}: its {what} are not those of {reference.label}: no candidate "
                "for it"
            )


def _figures(store: ModelStore, feed: Feed, provider: Provider) -> ModelFigures:
    return ModelFigures(
        parameters=count_parameters(store),
        file_bytes=store.file_bytes,
        flops=linear_flops(store, feed, provider),
    )
