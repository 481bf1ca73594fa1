"""Tell what a large model takes to calibrate and decompose, and check the formulas on small ones.

`--shape 70b` prints the arithmetic for a decoder of that size: numbers of its layers, bytes of the
sums, passes over the samples, operations, and what each machine has to hold.

`--check` runs the default method on small transformers with random weights and prints, beside each
other, what the program did and what the formulas say: operations as torch counts them while it
runs, bytes of the sums as they are held, passes, and with `--times` seconds of one core an
operation. Only the move `low-rank` is looked at, without variations of samples.
"""

import argparse
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from command_line import failed, new_parser
from tables import command, markdown
from torch.utils.flop_counter import FlopCounterMode

from onnx_utilrank.calibration.collect import in_passes, silent
from onnx_utilrank.calibration.taps import ROWS_KEPT, ROWS_PER_FEATURE_KEPT
from onnx_utilrank.cli.options import size
from onnx_utilrank.config import CompressConfig
from onnx_utilrank.engine.engine import SHARDS
from onnx_utilrank.errors import ConfigError, UtilrankError
from onnx_utilrank.job import Job
from onnx_utilrank.measurement import Gradients
from onnx_utilrank.sensitivity.aspects import Aspects
from onnx_utilrank.sensitivity.effort import Effort, choose_effort
from onnx_utilrank.torch_graph.footprint import Footprint

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "models"))

from synthetic_vit import CHANNELS, INPUT_NAME, VitShape, build

__all__ = ["Cost", "Layer", "main", "predicted"]

METHOD = "two-sided"
PREDICTION_DRAWS = 2  # at most
SUM_BYTES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A weight W [m, d], applied to so many rows of each sample.

    Attributes:
        name: What it is called.
        m: Output features.
        d: Input features.
        rows: Tokens, say.
        reads: What it reads, as others may too.
        mixing: Operations on one sample between it and what it reads that are of no weight:
            scores of attention, and what they weigh.
    """

    name: str
    m: int
    d: int
    rows: int
    reads: str
    mixing: int = 0

    @property
    def side(self) -> int:
        """Features of the smaller side, p = min(m, d)."""
        return min(self.m, self.d)

    @property
    def sums(self) -> int:
        """Bytes of its two sums [p, p]: of the rows and of the gradients, float64."""
        return 2 * SUM_BYTES * self.side**2

    @property
    def product(self) -> int:
        """Operations of the layer on one sample; two a multiply-accumulate."""
        return 2 * self.rows * self.m * self.d

    @property
    def mapped(self) -> int:
        """Operations that bring the gradient of one sample to the smaller side, if it is x."""
        return self.product if self.m > self.d else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What the default method takes.

    Attributes:
        passes: Over the samples.
        sums: Bytes of all sums together.
        largest: Bytes of the sums of the largest pass.
        collecting: Operations of collecting, all passes together.
        predicting: Operations of predicting.
        decomposing: p³, summed over the decompositions: operations but for a factor.
    """

    passes: int
    sums: int
    largest: int
    collecting: int
    predicting: int
    decomposing: int


def predicted(layers: Sequence[Layer], effort: Effort, *, halves: bool) -> Cost:
    """What the default method takes.

    Args:
        layers: The weights, in the order of the graph.
        effort: How much of the samples is used.
        halves: Whether no samples are left over, so that each half of them predicts for the
            other, and three decompositions are made of each weight.
    """
    budget = effort.statistics_bytes // (2 if halves else 1)
    groups = list(in_passes([[each] for each in layers], lambda each: {each: each.sums}, budget))
    forward = _forward(layers)
    collecting = predicting = 0
    for group in groups:
        # Of weights no gradient is formed, and what comes before the first of a group needs none.
        behind = layers[layers.index(group[0]) + 1 :]
        backward = sum(each.product for each in behind if each.reads != group[0].reads)
        backward += 2 * sum(each.mixing for each in behind)
        run = forward + effort.draws * backward
        gamma = sum(2 * each.rows * each.side**2 + each.mapped for each in group)
        collecting += effort.gradients * (run + effort.draws * gamma)
        collecting += sum(2 * _kept(each, effort.gradients) * each.side**2 for each in group)
        draws = min(effort.draws, PREDICTION_DRAWS)
        bases = sum(2 * each.rows * each.side**2 for each in group)
        mapped = sum(each.mapped for each in group)
        run = forward + draws * (backward + bases + mapped) + bases
        predicting += effort.quadratics * run
    return Cost(
        passes=len(groups),
        sums=sum(each.sums for each in layers),
        largest=max(sum(each.sums for each in group) for group in groups),
        collecting=collecting,
        predicting=predicting,
        decomposing=(3 if halves else 1) * sum(each.side**3 for each in layers),
    )


def _forward(layers: Sequence[Layer]) -> int:
    """Operations of a plain run of one sample."""
    return sum(each.product + each.mixing for each in layers)


def _kept(layer: Layer, samples: int) -> int:
    """Rows that the moment is formed of: not all, where there are more than it takes."""
    rows = layer.rows * samples
    wanted = max(ROWS_PER_FEATURE_KEPT * layer.side, ROWS_KEPT)
    return math.ceil(rows / max(1, rows // wanted))


# --- a decoder of 70 billion numbers --------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """A decoder with gates and grouped queries.

    Attributes:
        width: Features of a token.
        layers: Blocks.
        heads: Heads of queries.
        shared: Heads of keys and values.
        hidden: Hidden units of an MLP.
        vocabulary: Tokens.
    """

    width: int
    layers: int
    heads: int
    shared: int
    hidden: int
    vocabulary: int

    def weights(self, tokens: int) -> list[Layer]:
        """The weights that are measured, for samples of so many tokens; tables of tokens apart."""
        narrow = self.width * self.shared // self.heads
        block = [
            ("query", self.width, self.width, "tokens", 0),
            ("key", narrow, self.width, "tokens", 0),
            ("value", narrow, self.width, "tokens", 0),
            # Queries with keys, and scores with values.
            ("projection", self.width, self.width, "mixed", 4 * tokens**2 * self.width),
            ("gate", self.hidden, self.width, "inner", 0),
            ("up", self.hidden, self.width, "inner", 0),
            ("down", self.width, self.hidden, "units", 0),
        ]
        found = [
            Layer(name=f"{k}.{name}", m=m, d=d, rows=tokens, reads=f"{k}.{reads}", mixing=mixing)
            for k in range(self.layers)
            for name, m, d, reads, mixing in block
        ]
        head = Layer(name="head", m=self.vocabulary, d=self.width, rows=tokens, reads="last")
        return [*found, head]

    @property
    def parameters(self) -> int:
        """Numbers of all weights, the table of tokens counted."""
        return sum(each.m * each.d for each in self.weights(1)) + self.vocabulary * self.width

    def kept(self, tokens: int) -> int:
        """Bytes of the values of one sample in float32, about: those that products read or make."""
        each = self.weights(tokens)
        scores = 2 * self.layers * self.heads * tokens**2
        return 4 * (scores + sum(layer.rows * (layer.m + layer.d) for layer in each))


SHAPES = {
    "7b": Decoder(width=4096, layers=32, heads=32, shared=32, hidden=11008, vocabulary=32000),
    "70b": Decoder(width=8192, layers=80, heads=64, shared=8, hidden=28672, vocabulary=128256),
}


def _arithmetic(name: str, options: argparse.Namespace) -> Iterator[tuple[str, str]]:
    shape, tokens = SHAPES[name], options.tokens
    layers = shape.weights(tokens)
    flops = _forward(layers)
    kept = shape.kept(tokens)
    effort = choose_effort(
        samples=options.samples,
        flops=flops,
        decisions=tokens,
        footprint=Footprint(kept=kept, live=kept),
        batch=1,
        budget=options.memory_budget,
    )
    if kept > options.memory_budget:
        raise ConfigError(f"the values of one sample take {_gib(kept)}: more than the budget")
    halves = effort.gradients + effort.quadratics > options.samples
    cost = predicted(layers, effort, halves=halves)
    done = cost.collecting + cost.predicting
    weights = 4 * shape.parameters
    yield "numbers of weights", f"{shape.parameters / 1e9:.1f} × 10⁹"
    yield "weights that are measured", f"{len(layers)}"
    yield "bytes of the weights, float16", _gib(weights // 2)
    yield "and in torch, float32", _gib(weights)
    yield "samples, tokens of each", f"{options.samples}, {tokens}"
    yield "samples that gradients are taken of", f"{effort.gradients}"
    yield "samples that losses are predicted on", f"{effort.quadratics}"
    yield "values of one sample with gradients", _gib(kept)
    yield "sums of all weights", _gib(cost.sums)
    yield "memory budget", _gib(options.memory_budget)
    yield "passes", f"{cost.passes}"
    yield "sums of the largest pass", _gib(cost.largest)
    yield "operations of one plain run of a sample", f"{flops:.2e}"
    yield "operations of all passes", f"{done:.2e}"
    yield "in plain runs of all samples", f"{done / (flops * options.samples):.1f}"
    yield "p³ of all decompositions", f"{cost.decomposing:.2e}"
    parts = min(effort.gradients, SHARDS)
    yield "tasks that collect", f"{parts * cost.passes}"
    yield "sums that the driver receives", _gib(parts * cost.sums)
    yield "hours of that at 100 Gbit/s", f"{parts * cost.sums * 8 / 1e11 / 3600:.2f}"
    need = weights + cost.largest + kept
    yield "memory of a worker: weights, sums, values of a sample", _gib(need)
    for machines in options.machines:
        hours = done / (options.tflops * 1e12 * machines) / 3600
        what = f"hours of passes, {machines} workers of {options.tflops:g} TFLOP/s, ideal"
        yield what, f"{hours:.1f}"


def _gib(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB"


# --- what is really done --------------------------------------------------------------------------


def _small(shape: VitShape) -> list[Layer]:
    """The weights of a synthetic vision transformer."""
    tokens, width, hidden = shape.tokens, shape.width, shape.width * shape.mlp_ratio
    pixels = CHANNELS * shape.patch**2
    block = [
        *((name, width, width, "tokens", 0) for name in ("query", "key", "value")),
        ("projection", width, width, "mixed", 4 * tokens**2 * width),
        ("up", hidden, width, "inner", 0),
        ("down", width, hidden, "units", 0),
    ]
    return [
        Layer(name="patches", m=width, d=pixels, rows=tokens - 1, reads="image"),
        *(
            Layer(name=f"{k}.{name}", m=m, d=d, rows=tokens, reads=f"{k}.{reads}", mixing=mixing)
            for k in range(shape.layers)
            for name, m, d, reads, mixing in block
        ),
        Layer(name="head", m=shape.classes, d=width, rows=1, reads="last"),
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Done:
    """What the program did: operations, bytes of sums, passes, seconds of a core by stage."""

    flops: int
    sums: int
    passes: int
    running: float
    decomposing: float
    gradients: Gradients


def _counted(shape: VitShape, samples: int, budget: int) -> _Done:
    pixels = (samples, CHANNELS, shape.image, shape.image)
    data = {INPUT_NAME: np.random.default_rng(0).standard_normal(pixels, dtype=np.float32)}
    config = CompressConfig(
        method=METHOD, moves=("low-rank",), augment=False, memory_budget=budget, param_ratio=0.5
    )
    torch.set_num_threads(1)
    seconds: dict[str, float] = {}
    passes, before, since = 0, "", time.process_time()

    def progress(stage: str, done: int, total: int, detail: str = "") -> None:
        nonlocal passes, before, since
        del detail
        now = time.process_time()
        seconds[before] = seconds.get(before, 0.0) + now - since
        before, since = stage, now
        passes += stage == "calibrating" and done == total

    job = Job.open(build(shape), data, config, silent)
    chosen = range(samples)
    gradients = job.gradients(chosen, config)
    aspects = Aspects.of(job.index, job.sites, (), gradients.losses, moves=(), changes=None)
    # As they are held, by every collector.
    states = [each.state for each in aspects.collectors(job.sites).values()]
    sums = sum(
        array.nbytes
        for state in states
        for name, array in state.items()
        if name.endswith((" outer", " gamma"))
    )
    with FlopCounterMode(display=False) as counter:
        replace(job, progress=progress).measure(METHOD, job.sites, chosen, config)
    # One run tells the footprint of a sample.
    footprint = _forward(_small(shape))
    return _Done(
        flops=counter.get_total_flops() - footprint,
        sums=sums,
        passes=passes,
        running=seconds.get("calibrating", 0.0) + seconds.get("predicting", 0.0),
        decomposing=seconds.get("decomposing", 0.0),
        gradients=gradients,
    )


COLUMNS = (
    *("layers", "width", "samples", "budget, MiB", "operations", "of the formula"),
    *("sums, MiB", "of the formula", "passes", "of the formula"),
)
TIMES = ("s an operation, relative", "decomposing: s a p³, relative")


def _checked(
    cases: Sequence[tuple[int, int, int, int]], *, times: bool
) -> Iterator[tuple[str, ...]]:
    base: tuple[float, float] | None = None
    for layers, width, samples, budget in cases:
        shape = VitShape(width=width, layers=layers, heads=4, patch=8, image=64, classes=64)
        done = _counted(shape, samples, budget * 2**20)
        cost = predicted(_small(shape), done.gradients.effort, halves=True)
        flops = cost.collecting + cost.predicting
        rates = done.running / flops, done.decomposing / cost.decomposing
        base = base or rates
        yield (
            *(f"{layers}", f"{width}", f"{samples}", f"{budget}"),
            *(f"{done.flops:.3e}", f"{done.flops / flops:.3f}"),
            *(f"{done.sums / 2**20:.1f}", f"{done.sums / cost.sums:.3f}"),
            *(f"{done.passes}", f"{done.passes / cost.passes:.3f}"),
            *(f"{rate / first:.2f}" for rate, first in zip(rates, base, strict=True) if times),
        )


def _cases(quick: bool) -> list[tuple[int, int, int, int]]:
    if quick:
        return [(1, 16, 4, 64), (2, 16, 4, 1)]
    deep = [(layers, 64, 32, 4096) for layers in (2, 4, 8)]
    wide = [(2, width, 32, 4096) for width in (128, 256)]
    long = [(2, 64, samples, 4096) for samples in (64, 128)]
    return [*deep, *wide, *long, (2, 128, 32, 8), (4, 128, 32, 8)]


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("large_model_cost.py", __doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--shape", choices=SHAPES, help="print the arithmetic for this decoder")
    what.add_argument("--check", action="store_true", help="hold formulas to what is done")
    parser.add_argument(
        "--times", action="store_true", help="check seconds too; on a machine that is idle"
    )
    parser.add_argument("--quick", action="store_true", help="check two tiny cases only")
    for name, kind, default, said in (
        ("--samples", int, 512, "samples to calibrate with"),
        ("--tokens", int, 2048, "tokens of each"),
        ("--memory-budget", size, 320 * 2**30, "of a worker, such as 64G"),
        ("--tflops", float, 1.0, "what a machine does of float32 products, in 10¹² a second"),
    ):
        shown = "320G" if kind is size else default
        parser.add_argument(name, type=kind, default=default, help=f"{said} (default: {shown})")
    parser.add_argument(
        "--machines", type=int, nargs="+", default=[1, 8, 16], help="(default: 1 8 16)"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table; the exit status."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(given)
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]
    try:
        if options.shape:
            head, words = ("what", options.shape), ["what"]
            rows = list(_arithmetic(options.shape, options))
        else:
            head, words = (*COLUMNS, *(TIMES if options.times else ())), []
            rows = list(_checked(_cases(options.quick), times=options.times))
    except UtilrankError as e:
        return failed("large_model_cost.py", e)
    print(f"{command('large_model_cost.py', given)}\n")
    print(markdown(head, rows, words))
    return 0


if __name__ == "__main__":
    sys.exit(main())
