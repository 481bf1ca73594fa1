"""Show what the accuracy engine costs beside plain inference of the same samples.

`onnx_utilrank.compress` runs as a user would run it, and is timed by the stages that it tells its
progress callback of. Plain inference of the samples it calibrates with is timed right before and
right after, and the mean of both taken: the machine may be busier at one time than at another.

    passes       gradients, predictions of the loss, and the refit: all that runs the model
    decomposing  spectra, factors and least squares of every weight, which does not depend on the
                 number of samples
    ratio        passes to plain inference
    memory       the most that the process held during these stages, above what it held before,
                 without pages of mapped files, which the system drops when it needs the room
    beside       the most that it held at other times, which no budget limits: while the model was
                 loaded, the new one made, and both compared
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from anonymous_memory import Peak, anonymous_bytes, peak_of_this_process
from command_line import failed, new_parser
from tables import command, markdown

from onnx_utilrank import CompressConfig, compress
from onnx_utilrank.calibration.data import Dataset, open_data
from onnx_utilrank.errors import UtilrankError
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.runtime.providers import find_provider
from onnx_utilrank.runtime.sessions import open_session

__all__ = ["Stages", "main", "plain_seconds"]

RECIPE = Path(__file__).resolve().parent.parent / "models" / "synthetic_vit.py"
SYNTHETIC = ("vit-s", "vit-b")
PASSES = ("calibrating", "predicting", "refitting")
DECOMPOSITIONS = ("decomposing", "solving")
# Samples of one plain run, as many as the engine takes at most.
BATCH = 16
COLUMNS = (
    *("model", "samples", "plain, s", *(f"{stage}, s" for stage in PASSES), "ratio"),
    *("decomposing, s", "memory budget, GiB", "memory, GiB", "beside, GiB"),
)


@dataclass(slots=True)
class Stages:
    """What each stage takes: what passes between two calls belongs to that of the earlier one.

    Attributes:
        peak: Looks at the memory meanwhile.
        seconds: By stage.
        bytes: The most memory, by stage.
    """

    peak: Peak
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    bytes: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    _stage: str = "opening"
    _since: float = field(default_factory=lambda: time.perf_counter())

    def __call__(self, stage: str, done: int, total: int, detail: str = "") -> None:
        """Take note that a stage has come so far."""
        del done, total, detail
        now = time.perf_counter()
        self.seconds[self._stage] += now - self._since
        self.bytes[self._stage] = max(self.bytes[self._stage], self.peak.take())
        self._stage, self._since = stage, now

    def memory(self) -> tuple[int, int]:
        """The most bytes in the stages of the engine, and in all others."""
        engine = {*PASSES, *DECOMPOSITIONS}
        inside, outside = (
            max((n for stage, n in self.bytes.items() if (stage in engine) == within), default=0)
            for within in (True, False)
        )
        return inside, outside


def plain_seconds(model: Path, data: Dataset, samples: Sequence[int]) -> float:
    """Seconds that ONNX Runtime takes for the samples; the first run is not counted twice."""
    session = open_session(ModelStore.load(model), find_provider("cpu"))
    feeds = list(data.feeds(samples, batch=BATCH))
    session.run(feeds[0])
    start = time.perf_counter()
    for feed in feeds:
        session.run(feed)
    return time.perf_counter() - start


def _row(label: str, model: Path, data: object, config: CompressConfig) -> tuple[str, ...]:
    dataset = open_data(data, ModelStore.load(model).inputs)  # type: ignore[arg-type]
    samples, _ = dataset.split(samples=config.samples, seed=config.seed)
    before = plain_seconds(model, dataset, samples)
    held = anonymous_bytes()
    with peak_of_this_process() as peak:
        stages = Stages(peak)
        compress(model, data, config, progress=stages)  # type: ignore[arg-type]
        stages("", 0, 0)
    plain = (before + plain_seconds(model, dataset, samples)) / 2
    passes = [stages.seconds[stage] for stage in PASSES]
    memory = [most - held for most in stages.memory()]
    return (
        *(label, str(len(samples)), f"{plain:.1f}", *(f"{s:.1f}" for s in passes)),
        f"{sum(passes) / plain:.2f}",
        f"{sum(stages.seconds[stage] for stage in DECOMPOSITIONS):.1f}",
        *(f"{n / 2**30:.1f}" for n in (config.memory_budget, *memory)),
    )


def _synthetic(shape: str, config: CompressConfig) -> tuple[str, ...]:
    """Measure a synthetic transformer on noise."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / f"{shape}.onnx"
        subprocess.run([sys.executable, RECIPE, shape, "-o", model], check=True)
        (wanted,) = ModelStore.load(model).inputs
        pixels = [config.samples or 1, *(int(n) for n in (wanted.shape or ())[1:] if n)]
        noise = np.random.default_rng(0).standard_normal(pixels, dtype=np.float32)
        return _row(shape, model, {wanted.name: noise}, config)


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("engine_cost.py", __doc__)
    parser.add_argument("--shapes", nargs="+", choices=SYNTHETIC, help="synthetic transformers")
    parser.add_argument("--model", type=Path, metavar="FILE", help="a model, with --data")
    parser.add_argument("--data", metavar="DATA", help="its samples")
    parser.add_argument(
        "--samples",
        type=int,
        default=320,
        metavar="N",
        help="of which a fifth is held back (default: %(default)s, which leaves 256)",
    )
    parser.add_argument(
        "--param-ratio", type=float, default=0.5, metavar="R", help="default: %(default)s"
    )
    parser.add_argument(
        "--memory-budget", type=float, default=4.0, metavar="GIB", help="default: %(default)s"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit status."""
    parser = _parser()
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parser.parse_args(given)
    if not Path("/proc/self/status").is_file():
        parser.error("this system does not tell anonymous memory from mapped files")
    if (options.model is None) != (options.data is None):
        parser.error("--model and --data belong together")
    try:
        config = CompressConfig(
            param_ratio=options.param_ratio,
            samples=options.samples,
            memory_budget=int(options.memory_budget * 2**30),
        )
        shapes = options.shapes or (() if options.model else SYNTHETIC)
        rows = [_synthetic(shape, config) for shape in shapes]
        if options.model:
            rows.append(_row(options.model.stem, options.model, options.data, config))
    except UtilrankError as e:
        return failed(parser.prog, e)
    print(f"{command(parser.prog, given)}\n")
    print(markdown(COLUMNS, rows, ["model"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
