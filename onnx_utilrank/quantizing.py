"""Quantize a model of a job, and what was made of it, with the samples that calibrate."""

from collections.abc import Sequence

from onnx_utilrank.config import CompressConfig
from onnx_utilrank.errors import TargetMissedError
from onnx_utilrank.job import SAMPLES_LOOKED_AT, Job
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.quantization.scheme import Calibration, Quantized
from onnx_utilrank.quantization.schemes import find_scheme
from onnx_utilrank.validation.divergence import find_losses, open_judged

__all__ = ["Quantizing"]


class Quantizing:
    """One scheme on one set of samples: every model gets the same.

    Attributes:
        scheme: The scheme.
    """

    def __init__(self, job: Job, samples: Sequence[int], config: CompressConfig) -> None:
        """Check that it can be done.

        Args:
            job: The original.
            samples: Those that calibrate; none that are held back.
            config: Says the scheme, and what counts at the outputs.

        Raises:
            ProviderUnavailableError: What would be written cannot be run.
        """
        assert config.then is not None
        self.scheme = find_scheme(config.then)
        self.scheme.check(job.provider)
        self._job = job
        looked_at = job.feeds(job.data.first(samples, SAMPLES_LOOKED_AT))
        session = open_judged(job.source, job.provider)
        self._calibration = Calibration(
            data=job.data,
            samples=samples,
            provider=job.provider,
            batch=job.batch,
            losses=find_losses(job.source, session, looked_at, config.weighting),
            progress=job.progress,
        )
        self._plain: Quantized | None = None
        self._last: tuple[ModelStore, Quantized] | None = None

    @property
    def plain(self) -> Quantized:
        """The original, quantized.

        Raises:
            ModelError: It cannot be.
        """
        if self._plain is None:
            self._plain = self.scheme.quantize(self._job.source, self._calibration)
        return self._plain

    def __call__(self, store: ModelStore, in_float: Sequence[str] | None = None) -> Quantized:
        """Quantize a model that was made of the original; the last one is kept.

        Args:
            store: The model.
            in_float: Nodes that are to stay in float, as a plan says.

        Raises:
            ModelError: It cannot be quantized.
            TargetMissedError: It would be larger than the original.
        """
        if self._last is None or self._last[0] is not store:
            if store is self._job.source and in_float is None:
                made = self.plain
            else:
                made = self.scheme.quantize(store, self._calibration, in_float)
            self._last = store, made
        made, before = self._last[1], self._job.source.file_bytes
        if made.store.file_bytes > before:
            raise TargetMissedError(
                f"{self._job.store.label}: the result of {self.scheme.key} would be larger, "
                f"{made.store.file_bytes:,} bytes after {before:,}; nothing is gained"
            )
        return made
