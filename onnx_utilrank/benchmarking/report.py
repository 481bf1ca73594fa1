"""What a benchmark found."""

from dataclasses import dataclass
from typing import ClassVar

from onnx_utilrank.runtime.memory import PeakMemory
from onnx_utilrank.validation.bench import LatencyComparison

__all__ = ["BenchmarkCase", "BenchmarkReport"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkCase:
    """All models on one provider, at one size.

    Attributes:
        provider: ONNX Runtime's name of the provider.
        options: Options that it was given.
        batch: Samples of a run; None where the data hold whole runs of any size.
        dims: Lengths that were given to other free axes.
        latencies: Each candidate against the reference, timed in the same rounds.
        flops: Operations of matrix products and convolutions of each model, the reference first, on
            one sample (or the fewest that a run takes).
        memory: Of each model, the reference first.
    """

    provider: str
    options: tuple[tuple[str, str], ...]
    batch: int | None
    dims: tuple[tuple[str, int], ...]
    latencies: tuple[LatencyComparison, ...]
    flops: tuple[int, ...]
    memory: tuple[PeakMemory, ...]

    @property
    def flop_ratios(self) -> tuple[float | None, ...]:
        """Operations of each candidate over the reference's; None where either has none."""
        first, *others = self.flops
        return tuple(n / first if first and n else None for n in others)


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkReport:
    """Latency and memory of candidates beside their reference.

    Attributes:
        models: How messages name the models, the reference first.
        file_bytes: Sizes of their files.
        threads: Threads within an operator; 0 where ONNX Runtime chose.
        synthetic: Whether inputs were generated.
        cases: One for each provider, batch size and combination of lengths.
        notes: Sentences that a reader needs for the figures.
    """

    verb: ClassVar[str] = "benchmark"

    models: tuple[str, ...]
    file_bytes: tuple[int, ...]
    threads: int
    synthetic: bool
    cases: tuple[BenchmarkCase, ...]
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, object]:
        """The report as strict JSON's types."""
        return {
            "models": [
                {"model": model, "file_bytes": size}
                for model, size in zip(self.models, self.file_bytes, strict=True)
            ],
            "threads": self.threads,
            "synthetic": self.synthetic,
            "notes": list(self.notes),
            "cases": [self._case(case) for case in self.cases],
        }

    def _case(self, case: BenchmarkCase) -> dict[str, object]:
        first = case.latencies[0]
        runs: list[dict[str, object]] = [{"ms": first.reference_ms, **_spread(first, "reference")}]
        for time, flop_ratio in zip(case.latencies, case.flop_ratios, strict=True):
            runs.append(
                {
                    "ms": time.candidate_ms,
                    **_spread(time, "candidate"),
                    "ratio": time.ratio,
                    "ratio_low": time.ratio_low,
                    "ratio_high": time.ratio_high,
                    "faster": time.faster,
                    "slower": time.slower,
                    "flop_ratio": flop_ratio,
                }
            )
        return {
            "provider": case.provider,
            "options": dict(case.options),
            "batch": case.batch,
            "dims": dict(case.dims),
            "rounds": first.pairs,
            "copies": first.copies,
            "models": [
                {
                    "model": model,
                    **run,
                    "flops": flops,
                    "resident_bytes": memory.resident,
                    "device_bytes": memory.device,
                }
                for model, run, flops, memory in zip(
                    self.models, runs, case.flops, case.memory, strict=True
                )
            ],
        }


def _spread(time: LatencyComparison, role: str) -> dict[str, float]:
    spread = time.reference_spread if role == "reference" else time.candidate_spread
    return {} if spread is None else {"ms_low": spread.low_ms, "ms_high": spread.high_ms}
