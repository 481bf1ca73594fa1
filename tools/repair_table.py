"""Show what low-rank branches bring back of what quantization lost, and what they cost.

Each model of a zoo (see `zoo_commands.py`) is quantized by `onnxruntime.quantization` in several
ways, and each of those is repaired with several shares of its bytes. Divergence and time are
measured on calibration samples held back, `zoo.py eval` measures the metric on data that no choice
is made by.

    int8       QDQ, weights of 8 bits with a scale for each output, activations of 8 bits, static
    int8-whole the same with one scale for each weight
    dynamic    weights of 8 bits, activations of 8 bits in a range that is found at run time
    int4-32    MatMulNBits in blocks of 32, symmetric; Convs and Gemms stay as they are
    int4-128   the same in blocks of 128
"""

import argparse
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import onnx
from command_line import failed, new_parser
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from tables import NOTHING, command, markdown
from zoo_commands import SAID, StepError, Zoo, add_zoo_option, check_zoo, open_zoo

from onnx_utilrank import RepairConfig, RepairResult, repair
from onnx_utilrank.errors import UtilrankError
from onnx_utilrank.quality import Quality
from onnx_utilrank.validation.bench import LatencyComparison

__all__ = ["QUANTIZERS", "main", "rows_of"]

MODELS = ("vit_cifar10", "minilm_l6", "kwt1", "mobilenet_v2")
WAYS = ("int4-32", "int4-128", "int8")
SHARES = (0.02, 0.05, 0.1)
# Samples that ranges of activations are found on.
RANGES = 32
COLUMNS = (
    *("model", "quantized", "repair", "bytes", "added, %", "time to original", "to quantized"),
    *("divergence", "recovered, %", "metric", "drop", "recovered, %"),
)


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    """The first samples of a file, one a run."""

    def __init__(self, data: str) -> None:
        self._feeds = self._read(data)

    @staticmethod
    def _read(data: str) -> Iterator[dict[str, np.ndarray]]:
        with np.load(data) as file:
            arrays = {name: file[name] for name in file.files}
        count = min(RANGES, *(len(values) for values in arrays.values()))
        for k in range(count):
            yield {name: values[k : k + 1] for name, values in arrays.items()}

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next sample."""
        return next(self._feeds, None)


def _static(source: str, target: str, data: str, *, per_channel: bool) -> None:
    quantize_static(
        source,
        target,
        _Reader(data),
        quant_format=QuantFormat.QDQ,
        per_channel=per_channel,
        weight_type=QuantType.QInt8,
    )


def _dynamic(source: str, target: str, data: str) -> None:
    del data
    operators = ["MatMul", "Gemm", "Conv"]
    quantize_dynamic(source, target, op_types_to_quantize=operators, per_channel=True)


def _four_bits(source: str, target: str, data: str, *, block: int) -> None:
    del data
    quantizer = MatMulNBitsQuantizer(onnx.load(source), block_size=block, is_symmetric=True)
    quantizer.process()
    onnx.save_model(quantizer.model.model, target)


QUANTIZERS: Mapping[str, Callable[[str, str, str], None]] = {
    "int8": lambda *files: _static(*files, per_channel=True),
    "int8-whole": lambda *files: _static(*files, per_channel=False),
    "dynamic": _dynamic,
    "int4-32": lambda *files: _four_bits(*files, block=32),
    "int4-128": lambda *files: _four_bits(*files, block=128),
}


def rows_of(zoo: Zoo, name: str, way: str, shares: Sequence[float]) -> Iterator[list[str]]:
    """The rows of one model quantized in one way.

    Raises:
        StepError: A command of the zoo failed.
        UtilrankError: A repair failed.
    """
    source, data = zoo.model(name), str(zoo.work / f"{name}.npz")
    small, made = str(zoo.work / f"{name}_{way}.onnx"), str(zoo.work / "repaired.onnx")
    QUANTIZERS[way](source, small, data)
    plain = zoo.metric(name, small)
    first = True
    for share in shares:
        config = RepairConfig(extra_bytes=share, cache=zoo.work / f"{name}.cache")
        result = repair(source, small, data, config)
        if first:
            first = False
            yield _plain_row(name, way, result, plain)
        after = plain
        if result.kept:
            result.save(made)
            after = zoo.metric(name, made)
        yield _row(name, way, share, result, plain, after)


def _plain_row(name: str, way: str, result: RepairResult, metric: Mapping[str, float]) -> list[str]:
    model = result.quantized
    saved = 100 * (model.candidate.file_bytes / model.reference.file_bytes - 1)
    return [
        *(name, way, NOTHING, f"{model.candidate.file_bytes:,}", f"{saved:+.1f}"),
        *(_time(model.providers[0].latency), NOTHING, _divergence(result.before), NOTHING),
        *(f"{metric['after']:.2f} (n={metric['samples']})", f"{metric['drop']:.2f}", NOTHING),
    ]


def _row(
    name: str,
    way: str,
    share: float,
    result: RepairResult,
    before: Mapping[str, float],
    after: Mapping[str, float],
) -> list[str]:
    model = result.validation
    gained = NOTHING
    if result.kept and before["drop"] > 0:
        gained = f"{100 * (1 - after['drop'] / before['drop']):.0f}"
    return [
        *(name, way, f"{100 * share:g} %" + ("" if result.kept else " (not kept)")),
        *(f"{model.candidate.file_bytes:,}", f"{100 * result.extra_bytes:+.2f}"),
        _time(model.providers[0].latency),
        NOTHING if result.latency is None else _time(result.latency),
        _divergence(result.after),
        NOTHING if result.recovered is None else f"{100 * result.recovered:.0f}",
        *(f"{after['after']:.2f} (n={after['samples']})", f"{after['drop']:.2f}", gained),
    ]


def _time(found: LatencyComparison) -> str:
    return f"{found.ratio:.2f} ({found.ratio_low:.2f} to {found.ratio_high:.2f})"


def _divergence(quality: Quality) -> str:
    found = quality.divergence
    if found is None:
        return NOTHING
    return f"{found.mean:.2g} ± {found.standard_error:.1g} (n={found.samples})"


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("repair_table.py", __doc__)
    add_zoo_option(parser)
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="NAME")
    parser.add_argument(
        "--ways", nargs="+", choices=list(QUANTIZERS), default=list(WAYS), metavar="WAY"
    )
    parser.add_argument(
        "--shares",
        nargs="+",
        type=float,
        default=list(SHARES),
        metavar="F",
        help="of the quantized file's bytes, that branches may add (default: 0.02 0.05 0.1)",
    )
    parser.add_argument(
        "--samples", type=int, default=256, metavar="N", help="calibration samples (default: 256)"
    )
    parser.add_argument(
        "--limit", type=int, metavar="N", help="samples to measure metrics on (default: all)"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison; the exit status."""
    parser = _parser()
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parser.parse_args(given)
    where = check_zoo(parser, options.zoo)
    logging.getLogger().setLevel(logging.ERROR)  # the quantizers advise at length
    rows = []
    with open_zoo(where, samples=options.samples, limit=options.limit) as zoo:
        try:
            for name in options.models:
                zoo.calibrate(name)
                for way in options.ways:
                    for row in rows_of(zoo, name, way, options.shares):
                        rows.append(row)
                        print(f"| {' | '.join(row)} |", file=sys.stderr, flush=True)
        except (StepError, UtilrankError) as e:
            return failed(parser.prog, e)
    print(f"{command(parser.prog, given, SAID)}\n")
    print(markdown(COLUMNS, rows, COLUMNS[:3]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
