"""Measure how calibration and decompositions get faster with workers of Ray.

A vision transformer with random weights is measured by the default method: in one process, and by
each number of workers, each of which has one core. Ray is started, and every worker has loaded the
model, before the clock runs. The ideal is the time of one worker over their number.

    calibrating   gradients and the sums that decompositions rest on
    predicting    the loss of every rank, by other gradients
    decomposing   eigenvectors and factors of every weight
    all           these and what is done between them, by the one process that hands out the work
"""

import argparse
import logging
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import ray
import torch
from command_line import new_parser
from tables import command, markdown

from onnx_utilrank.calibration.collect import silent
from onnx_utilrank.config import CompressConfig
from onnx_utilrank.job import Job

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "models"))

from synthetic_vit import CHANNELS, INPUT_NAME, VitShape, build

__all__ = ["main"]

STAGES = ("calibrating", "predicting", "decomposing")
COLUMNS = ("workers", *(f"{stage}, s" for stage in STAGES), "all, s", "ideal, s", "of the ideal")


class _Clock:
    """Seconds by stage: what passes before a call belongs to the stage that it tells of."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._since = time.perf_counter()

    def __call__(self, stage: str, done: int, total: int, detail: str = "") -> None:
        """Take note that a stage has come so far."""
        del done, total, detail
        now = time.perf_counter()
        self.seconds[stage] += now - self._since
        self._since = now


def _measured(model: object, data: object, engine: str, samples: int) -> list[float]:
    """Seconds by stage, and of all."""
    config = CompressConfig(param_ratio=0.5, augment=False, engine=engine)
    job = Job.open(model, data, config, silent)  # type: ignore[arg-type]
    job.measure("two-sided", job.sites, range(min(samples, 8)), config)  # loads what is needed
    clock = _Clock()
    job = Job.open(model, data, config, clock)  # type: ignore[arg-type]
    start = time.perf_counter()
    job.measure("two-sided", job.sites, range(samples), config)
    whole = time.perf_counter() - start
    return [*(clock.seconds[stage] for stage in STAGES), whole]


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("scaling_table.py", __doc__)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="(default: 1 2)")
    parser.add_argument("--width", type=int, default=256, help="(default: %(default)s)")
    parser.add_argument("--layers", type=int, default=6, help="(default: %(default)s)")
    parser.add_argument("--samples", type=int, default=128, help="(default: %(default)s)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; the exit status."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(given)
    torch.set_num_threads(1)  # as in a worker
    shape = VitShape(
        width=options.width, layers=options.layers, heads=4, patch=8, image=64, classes=64
    )
    pixels = (options.samples, CHANNELS, shape.image, shape.image)
    data = {INPUT_NAME: np.random.default_rng(0).standard_normal(pixels, dtype=np.float32)}
    model = build(shape)
    logging.getLogger("ray").setLevel(logging.ERROR)
    local = _measured(model, data, "local", options.samples)
    rows = [("none: one process", *(f"{s:.1f}" for s in local), "", "")]
    one: float | None = None
    for workers in options.workers:
        ray.init(
            address="local",
            num_cpus=workers,
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
            _node_ip_address="127.0.0.1",
        )
        try:
            *stages, whole = _measured(model, data, "ray", options.samples)
        finally:
            ray.shutdown()
        one = one or whole * workers
        ideal = one / workers
        times = (f"{s:.1f}" for s in (*stages, whole, ideal))
        rows.append((f"{workers}", *times, f"{ideal / whole:.2f}"))
    print(f"{command('scaling_table.py', given)}\n")
    print(markdown(COLUMNS, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
