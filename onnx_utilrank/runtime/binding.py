"""One feed bound to a session: inputs and outputs where its provider has them, for timing."""

import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnxruntime as ort

from onnx_utilrank.runtime.creation import InferenceError, one_line
from onnx_utilrank.runtime.providers import ort_errors

__all__ = ["Binding"]

# Kind and number of a device, as ONNX Runtime's Python names them.
_HOST = ("cpu", 0)


class Binding:
    """A session with the values of one feed, to be run again and again.

    Inputs lie where ONNX Runtime wants them, on a device or on the host, and outputs stay where
    they come to be: a run copies neither. Where that cannot be had (sequences, strings, devices
    that numpy arrays cannot be put on), a run is from numpy arrays to numpy arrays.

    Attributes:
        copies: Whether a run includes such copies.
    """

    __slots__ = ("_binding", "_devices", "_feed", "_label", "_session", "copies")

    def __init__(
        self,
        session: ort.InferenceSession,
        feed: Mapping[str, np.ndarray],
        outputs: Sequence[str],
        *,
        nvidia: bool,
        label: str,
    ) -> None:
        """Put the inputs where they belong.

        Args:
            session: The session.
            feed: Arrays by input name, all of which it has.
            outputs: Names of the outputs that are wanted.
            nvidia: Whether what is not on the host is on CUDA devices.
            label: How messages name the model.

        Raises:
            InferenceError: ONNX Runtime refuses an array.
        """
        self._session, self._feed, self._label = session, feed, label
        wanted = dict(_places(session.get_inputs(), session.get_input_memory_infos()))
        made = dict(_places(session.get_outputs(), session.get_output_memory_infos()))
        values = {v.name: v for v in (*session.get_inputs(), *session.get_outputs())}
        used = [*(name for name in feed if name in wanted), *outputs]
        self._devices = {name: made[name] for name in outputs}
        self.copies = not all(
            _bindable(values[name].type) and (nvidia or (wanted | made)[name] == _HOST)
            for name in used
        )
        self._binding = None if self.copies else session.io_binding()
        try:
            if self._binding is not None:
                for name, array in feed.items():
                    # What has a default value in the model too has no place of its own.
                    self._binding.bind_ortvalue_input(name, _put(array, wanted.get(name, _HOST)))
        except ort_errors() as e:
            raise self._failure(e) from e

    def run(self) -> float:
        """Run once, until the device is done too; give the seconds that it took.

        Raises:
            InferenceError: ONNX Runtime refuses the feed, or a node fails.
        """
        try:
            if self._binding is None:
                start = time.perf_counter()
                self._session.run(list(self._devices), dict(self._feed))
                return time.perf_counter() - start
            # Anew each time: their shapes may depend on more than the shapes of the inputs.
            for name, (device, number) in self._devices.items():
                self._binding.bind_output(name, device, number)
            self._binding.synchronize_inputs()
            start = time.perf_counter()
            self._session.run_with_iobinding(self._binding)
            self._binding.synchronize_outputs()
            return time.perf_counter() - start
        except ort_errors() as e:
            raise self._failure(e) from e

    def _failure(self, error: Exception) -> InferenceError:
        return InferenceError(f"{self._label}: ONNX Runtime: {one_line(error)}")


def _places(
    values: Sequence[ort.NodeArg], infos: Sequence[ort.OrtMemoryInfo]
) -> Iterator[tuple[str, tuple[str, int]]]:
    """Name of each value, and where ONNX Runtime has it: kind of the device, and its number."""
    for value, info in zip(values, infos, strict=True):
        host = info.name == "Cpu" or info.device_mem_type == ort.OrtDeviceMemoryType.HOST_ACCESSIBLE
        yield value.name, (_HOST if host else ("cuda", info.device_id))


def _bindable(ort_type: str) -> bool:
    return ort_type.startswith("tensor(") and ort_type != "tensor(string)"


def _put(array: np.ndarray, place: tuple[str, int]) -> ort.OrtValue:
    return ort.OrtValue.ortvalue_from_numpy(np.asarray(array, order="C"), *place)
