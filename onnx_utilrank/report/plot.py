"""The curve of a sweep as a picture."""

import os
from pathlib import Path

from onnx_utilrank.errors import ConfigError
from onnx_utilrank.model.store import atomic_write
from onnx_utilrank.results import SweepResult

__all__ = ["check_plot", "plot_sweep"]

FORMATS = (".svg", ".png", ".pdf")


def check_plot(path: str | os.PathLike[str]) -> None:
    """Check before the work that the picture can be drawn.

    Raises:
        ConfigError: The format is not known.
    """
    if Path(path).suffix.lower() not in FORMATS:
        raise ConfigError(f"{path}: a plot is one of {', '.join(FORMATS)}")


def plot_sweep(result: SweepResult, path: str | os.PathLike[str]) -> None:
    """Draw quality, latency and FLOPs over the parameters that are kept.

    Raises:
        ConfigError: See `check_plot`.
    """
    check_plot(path)
    # It costs a second of start-up.
    from matplotlib.figure import Figure

    points = result.points
    kept = [100 * p.plan.param_ratio for p in points]
    figure = Figure(figsize=(7, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    drawn = [
        (x, p.quality.divergence)
        for x, p in zip(kept, points, strict=True)
        if p.quality.divergence is not None
    ]
    above.errorbar(
        [x for x, _ in drawn],
        [d.mean for _, d in drawn],
        yerr=[d.standard_error if len(points) and d.samples > 1 else 0.0 for _, d in drawn],
        marker="o",
        label="divergence, held-back samples",
    )
    predicted = [(x, p.plan.predicted_divergence) for x, p in zip(kept, points, strict=True)]
    if all(value is not None for _, value in predicted):
        above.plot([x for x, _ in predicted], [v for _, v in predicted], "--", label="predicted")
    if drawn and min(d.mean for _, d in drawn) > 0:
        above.set_yscale("log")
    above.set_ylabel("divergence")
    above.legend()
    above.set_title("Size against quality")
    times = [p.validation.providers[0].latency.ratio for p in points]
    below.plot(kept, times, marker="o", label="latency")
    flops = [(p.validation.candidate.flops, p.validation.reference.flops) for p in points]
    if all(new is not None and old for new, old in flops):
        shares = [new / old for new, old in flops if new is not None and old]
        below.plot(kept, shares, marker="s", label="FLOPs")
    below.axhline(1.0, color="grey", linewidth=0.8)
    below.set_xlabel("parameters kept, %")
    below.set_ylabel("ratio to the original")
    below.legend()
    target = Path(path)
    with atomic_write(target) as f:
        figure.savefig(f, format=target.suffix[1:].lower())
