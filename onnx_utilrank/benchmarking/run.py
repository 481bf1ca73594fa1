"""Time models in the same rounds, and look at the memory that each of them takes."""

import dataclasses
from collections.abc import Iterator, Sequence

from onnx_utilrank.benchmarking.cases import Inputs, cases_of_data, synthetic_cases
from onnx_utilrank.benchmarking.config import BenchmarkConfig
from onnx_utilrank.benchmarking.report import BenchmarkCase, BenchmarkReport
from onnx_utilrank.calibration.collect import Progress, silent
from onnx_utilrank.calibration.data import DataSource
from onnx_utilrank.calibration.survey import linear_flops
from onnx_utilrank.errors import ConfigError
from onnx_utilrank.model.store import ModelSource, ModelStore
from onnx_utilrank.runtime.memory import measure_memory
from onnx_utilrank.runtime.providers import CPU, Provider, find_providers
from onnx_utilrank.runtime.sessions import Session, open_session
from onnx_utilrank.validation.bench import LatencyComparison, compare_latencies, copies_note
from onnx_utilrank.validation.compare import float_types, require_same_names

__all__ = ["benchmark"]


def benchmark(
    reference: ModelSource,
    candidates: Sequence[ModelSource],
    data: DataSource | None = None,
    config: BenchmarkConfig | None = None,
    *,
    progress: Progress = silent,
) -> BenchmarkReport:
    """Compare models in latency and in memory.

    For each provider, batch size and combination of lengths, all models run in turn on the same
    feeds, after warming up: `compare_latencies`. Then each of them is loaded and run in a process
    of its own for the memory that it takes: `measure_memory`.

    Args:
        reference: The model that the others are compared with.
        candidates: One or several models of the same inputs and outputs.
        data: Samples in any form that `open_data` takes; None to generate inputs of the types and
            shapes that the reference states.
        config: Options.
        progress: Called with the stage, what is done of it and how much there is.

    Raises:
        UtilrankError: One of its children, by what is wrong: options, model, data, provider.
    """
    config = config or BenchmarkConfig()
    if not candidates:
        raise ConfigError("a benchmark needs a model to compare with the reference")
    providers = find_providers(
        config.providers, config.custom_op_libraries, config.provider_options
    )
    models = [ModelStore.load(source) for source in (reference, *candidates)]
    if data is None:
        inputs, notes = synthetic_cases(models[0], config)
    else:
        inputs, notes = cases_of_data(models[0], data, config)
    found: list[BenchmarkCase] = []
    flops = None
    for provider in providers:
        timed, said = _timed(models, provider, inputs, config, progress)
        notes += said
        flops = flops or _operations(models, inputs, config)
        for k, (case, latencies) in enumerate(zip(inputs, timed, strict=True)):
            progress(f"memory, {provider.key}", k, len(inputs))
            memory = tuple(
                measure_memory(model, provider, case.feeds[0], threads=config.threads)
                for model in models
            )
            notes += [f"Memory is not known: {m.failure}." for m in memory if m.failure]
            found.append(
                BenchmarkCase(
                    provider=provider.name,
                    options=provider.options,
                    batch=case.batch,
                    dims=case.dims,
                    latencies=latencies,
                    flops=flops[case.dims],
                    memory=memory,
                )
            )
    return BenchmarkReport(
        models=tuple(model.label for model in models),
        file_bytes=tuple(model.file_bytes for model in models),
        threads=config.threads,
        synthetic=data is None,
        cases=tuple(found),
        notes=tuple(dict.fromkeys(notes)),
    )


def _timed(
    models: Sequence[ModelStore],
    provider: Provider,
    inputs: Sequence[Inputs],
    config: BenchmarkConfig,
    progress: Progress,
) -> tuple[list[tuple[LatencyComparison, ...]], list[str]]:
    """Latencies of each case. A function of its own: leaving it frees the sessions."""
    sessions = [open_session(model, provider, threads=config.threads) for model in models]
    reference, *others = sessions
    for other in others:
        require_same_names(reference, other)
    found = []
    for k, case in enumerate(inputs):
        progress(f"timing, {provider.key}", k, len(inputs))
        found.append(compare_latencies(reference, others, case.feeds, seconds=config.seconds))
    copied = any(latencies[0].copies for latencies in found)
    return found, [*_notes(sessions), *([copies_note(provider.name)] if copied else [])]


def _notes(sessions: Sequence[Session]) -> Iterator[str]:
    reference, *others = sessions
    for session in sessions:
        placement = session.placement()
        if placement.fallen:
            yield (
                f"{len(placement.fallen)} of {placement.nodes} nodes of {session.label} do not run "
                f"on {session.provider.name}, though it was asked for; validate names them."
            )
    for other in others:
        for types in float_types(reference, other):
            if types.what == "input":
                yield (
                    f"Input {types.name!r} is {types.candidate} in {other.label} and "
                    f"{types.reference} in the reference: it was cast before the runs."
                )


def _operations(
    models: Sequence[ModelStore], inputs: Sequence[Inputs], config: BenchmarkConfig
) -> dict[tuple[tuple[str, int], ...], tuple[int, ...]]:
    """Operations of each model by the lengths of axes; they are the same on every provider."""
    where = dataclasses.replace(CPU, custom_op_libraries=config.custom_op_libraries)
    return {
        case.dims: tuple(linear_flops(model, case.single, where) for model in models)
        for case in {case.dims: case for case in inputs}.values()
    }
