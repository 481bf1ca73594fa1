"""How much of the data a model is worth: from what it costs to run, and never from a clock."""

from dataclasses import dataclass

from onnx_utilrank.torch_graph.footprint import Footprint

__all__ = ["Effort", "choose_effort", "choose_variants"]

# Up to this many operations over all samples, about the work of a minute, nothing is spared.
CHEAP_FLOPS = 10**12
DRAWS = 4
# Of each sample so many are taken, itself and variations of it, as far as that is cheap.
VARIANTS = 4
# The samples of a dear model that gradients are taken of, that losses are predicted on, and that
# layers are refitted to: shares, the dearer the less, and at least so many samples where each holds
# few decisions.
GRADIENT_SHARES, QUADRATIC_SHARE, REFIT_SHARES = (1 / 6, 1 / 2), 1 / 16, (1 / 6, 1.0)
LEAST_DECISIONS = 4096
LEAST_SAMPLES = 16
# Samples of one run, at most; smaller where the memory budget asks for it.
BATCH = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much of the data is used, from the price of the model and never from a clock.

    Attributes:
        draws: Directions drawn at the outputs for each run.
        gradients: Samples that Γ and Cov(x) are collected from.
        quadratics: Samples that the losses are predicted on.
        refit: Samples that layers are refitted to.
        again: Whether a refit that was better is made once more, of what judged it too.
        batch: Samples of one run with gradients.
        run: Samples of one run without.
        statistics_bytes: What the sums of one group of sites may take.
    """

    draws: int
    gradients: int
    quadratics: int
    refit: int
    again: bool
    batch: int
    run: int
    statistics_bytes: int


def choose_effort(
    *,
    samples: int,
    flops: int,
    decisions: int,
    footprint: Footprint,
    batch: int,
    budget: int,
    run: int = 1,
) -> Effort:
    """How many samples and draws a model is worth.

    A run with gradients and its sums costs several without (`tools/engine_cost.py` says how many).
    So a model that is dear to run gets one draw, and gradients of a part of its samples: half of
    them down to a sixth the dearer it is, or fewer where each sample makes many decisions (the
    pixels of an image, the tokens of a text). Its layers are refitted to all of the samples down to
    a sixth.

    Args:
        samples: Samples to calibrate with.
        flops: Operations of one sample.
        decisions: Rows of the outputs that one sample has.
        footprint: Bytes that one sample takes.
        batch: Samples that one run may take.
        budget: Bytes that statistics and activations may take together.
        run: Samples of one run, where the model fixes them.
    """
    batch = max(1, min(batch, BATCH))
    # A quarter is for activations, a quarter for what comes and goes, and sums get the rest.
    of_gradients = min(batch, max(1, budget // (4 * max(footprint.kept, 1))))
    sums = max(budget * 3 // 4 - of_gradients * footprint.kept, budget // 2)
    if flops * samples <= CHEAP_FLOPS:
        draws, gradients, quadratics, refit = DRAWS, samples, samples, samples
        again = True
    else:
        cheap = CHEAP_FLOPS / (flops * samples)
        enough = max(LEAST_SAMPLES, -(-LEAST_DECISIONS // max(decisions, 1)))
        draws, again = 1, False
        gradients = min(_share(samples, cheap, *GRADIENT_SHARES), enough)
        quadratics = min(_share(samples, QUADRATIC_SHARE, 0.0, 1.0), enough)
        refit = _share(samples, 2 * cheap, *REFIT_SHARES)
    # Whole runs: what is left over of one cannot be used.
    gradients, quadratics, refit = (-(-n // run) * run for n in (gradients, quadratics, refit))
    return Effort(
        draws=draws,
        gradients=min(gradients, samples),
        quadratics=min(quadratics, samples),
        refit=min(refit, samples),
        again=again,
        batch=of_gradients,
        run=batch,
        statistics_bytes=sums,
    )


def choose_variants(samples: int, flops: int) -> int:
    """How many of each sample a model is worth, itself counted.

    Args:
        samples: Samples to calibrate with.
        flops: Operations of one sample.
    """
    return max(1, min(VARIANTS, CHEAP_FLOPS // max(flops * samples, 1)))


def _share(samples: int, share: float, low: float, high: float) -> int:
    return max(int(samples * min(max(share, low), high)), 1)
