"""From decompositions to a plan, in the unit of what was asked for; what is made is checked."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from onnx_utilrank.calibration.survey import linear_flops, survey
from onnx_utilrank.compression import build
from onnx_utilrank.config import CompressConfig
from onnx_utilrank.errors import TargetMissedError
from onnx_utilrank.job import Job
from onnx_utilrank.latency.costs import LatencyCosts
from onnx_utilrank.latency.measure import measure_latency
from onnx_utilrank.measurement import Measurement
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.moves.shrink import SHRINK
from onnx_utilrank.quantizing import Quantizing
from onnx_utilrank.ranking.cost import NODE_BYTES, Ledger, Unit, count_parameters
from onnx_utilrank.ranking.decide import Offers, kinds_offered
from onnx_utilrank.ranking.plan import RankPlan
from onnx_utilrank.repairing.repairs import repaired
from onnx_utilrank.runtime.sessions import open_session
from onnx_utilrank.sites.hidden import Hidden
from onnx_utilrank.sites.site import Site
from onnx_utilrank.validation.bench import compare_latency
from onnx_utilrank.validation.report import ValidationReport

__all__ = ["check_latency", "fit", "make_ledger", "make_offers"]

# Plans that are made, at most, for a model to take no more than was asked for; and to take no less
# than so near to it, in operations.
FITS = 8
NEAR_OPERATIONS = 0.005

# Models that are made and timed, at most, to meet a latency; what a trial may take; how far below
# the limit is aimed, as it is measured once more in the end; and what is near enough to that.
TRIALS = 6
TRIAL_SECONDS = 2.0
AIM = 0.985
NEAR = 0.03


# What becomes of a model with factors in the end.
Final = Callable[[ModelStore], ModelStore]


def make_offers(
    job: Job,
    found: Measurement,
    samples: Sequence[int],
    config: CompressConfig,
    quantizing: Quantizing | None = None,
) -> Offers:
    """What can be done to the sites of a model, in the unit of the ratio that was asked for.

    Bytes are those of the final file: quantized, where it will be; no move then takes more of them
    than the dense weight, whatever the unit. Time is that of the layers in
    floats all the same; a plan for a latency is then made by timing whole models.

    Args:
        job: The model.
        found: The decompositions of its sites.
        samples: Samples to learn shapes from, and to time the model on where latency counts.
        config: Options.
        quantizing: What is done to the result.

    Raises:
        ConfigError: The options name a move that there is not, or none of the method's.
        ModelError: The model does not run, or a node by itself does not, where it is timed.
    """
    unit: Unit = "parameters"
    if config.size_ratio:
        unit = "bytes"
    elif config.flop_ratio:
        unit = "operations"
    elif config.latency_ratio or (config.latency_aware and config.quality):
        unit = "latency"
    hidden = found.hidden if config.moves is None or SHRINK in config.moves else ()
    sites = [m.site for m in found.sites]
    latency = _latency(job, found, hidden, samples, config) if config.latency_aware else None
    ledger = make_ledger(job, unit, sites, samples, latency)
    if quantizing is not None:
        plain = float(quantizing.plain.store.file_bytes) if unit == "bytes" else None
        ledger = replace(ledger, storage=quantizing.scheme, dense_total=plain)
    skips = (*job.skips, *found.skips)
    return Offers.of(job.index, found.sites, hidden, skips, found.method, config, ledger)


def make_ledger(
    job: Job,
    unit: Unit,
    sites: Sequence[Site],
    samples: Sequence[int],
    latency: LatencyCosts | None = None,
) -> Ledger:
    """What a model and its sites cost in a unit."""
    single = next(job.data.feeds(samples, batch=1))
    names = {use.result.tensor for site in sites for use in site.uses}
    shown = survey(job.index.store, names, single, job.provider)
    rows = {s.key: sum(shown[u.result.tensor].size for u in s.uses) / s.m for s in sites}
    if unit == "latency":
        assert latency is not None
        total = latency.total
    elif unit == "parameters":
        total = float(count_parameters(job.store))
    elif unit == "bytes":
        total = float(job.source.file_bytes)
    else:
        total = linear_flops(job.store, single, job.provider) / 2
    return Ledger(unit=unit, total=total, rows=rows, latency=latency)


def _latency(
    job: Job,
    found: Measurement,
    hidden: Sequence[Hidden],
    samples: Sequence[int],
    config: CompressConfig,
) -> LatencyCosts:
    sites = [m.site for m in found.sites]
    return measure_latency(
        job.index,
        sites,
        hidden,
        {s.key: kinds_offered(job.index, s, found.method, config) for s in sites},
        next(job.data.feeds(samples, batch=config.latency_batch or job.batch)),
        job.provider,
        multiple=config.multiple,
        cache=None if config.cache is None else Path(config.cache),
        progress=job.progress,
    )


def fit(
    job: Job,
    found: Measurement,
    offers: Offers,
    samples: Sequence[int],
    config: CompressConfig,
    quantizing: Quantizing | None = None,
) -> tuple[RankPlan, ModelStore]:
    """Plan for the ratio or the energy that was asked for, and make the model.

    Args:
        job: The source.
        found: The decompositions of its sites.
        offers: What can be done to them.
        samples: Samples to time models on, where latency was asked for.
        config: Options.
        quantizing: What is done to the result: bytes and time are those of the final file.

    Raises:
        TargetMissedError: It cannot be reached.
    """

    def final(store: ModelStore) -> ModelStore:
        if quantizing is None:
            return store
        made = quantizing(store).store
        if not config.repair_rank:
            return made
        return repaired(job, store, made, samples, config, config.repair_rank)

    if config.latency_ratio is not None:
        plan = _fit_latency(job, found, offers, samples, config, final)
        return build(job, plan, found, config)
    if config.size_ratio is not None:
        whole = job.source.file_bytes

        def file_bytes(store: ModelStore) -> int:
            return final(store).file_bytes

        what = f"a file of {config.size_ratio:g} of its bytes"
        return _fit_made(job, found, offers, config, whole, what, NODE_BYTES, file_bytes)
    if config.param_ratio is not None:
        whole = count_parameters(job.store)
        what = f"a ratio of {config.param_ratio:g} of its parameters"
        return _fit_made(job, found, offers, config, whole, what, 0, count_parameters)
    if config.flop_ratio is not None:
        plan = _fit_operations(job, found, offers, samples, config.flop_ratio, config)
        return build(job, plan, found, config)
    return build(job, offers.plan(config.ratio), found, config)


def _fit_made(
    job: Job,
    found: Measurement,
    offers: Offers,
    config: CompressConfig,
    whole: int,
    what: str,
    slack: int,
    taken: Callable[[ModelStore], int],
) -> tuple[RankPlan, ModelStore]:
    """What a model takes is known when it is made: where the first plan misses what was asked for,
    the next ones aim lower by what was too much.

    Args:
        job: The source.
        found: The decompositions of its sites.
        offers: What can be done to them.
        config: Options.
        whole: What the source takes.
        what: What was asked for, as messages say it.
        slack: How much lower to aim beyond what was too much.
        taken: What a model takes.

    Raises:
        TargetMissedError: It cannot be reached.
    """
    assert config.ratio is not None
    ratio, least = config.ratio, math.inf
    for _ in range(FITS):
        plan, store = build(job, offers.plan(ratio), found, config)
        made = taken(store)
        excess = made - math.floor(config.ratio * whole)
        if excess <= 0:
            return plan, store
        least = min(least, made / whole)
        # From what the plan counts on, which may be less than it was allowed.
        ratio = offers.counted(ratio) - (excess + slack) / whole
        if ratio <= 0:
            break
    raise TargetMissedError(
        f"{job.store.label}: {what} cannot be reached: {least:.4f} is the least that was made"
    )


def _fit_operations(
    job: Job,
    found: Measurement,
    offers: Offers,
    samples: Sequence[int],
    asked: float,
    config: CompressConfig,
) -> RankPlan:
    """The mildest plan of those that take no more operations than were asked for.

    Where features shrink, products between them and Convs of each by itself take fewer too, which
    no plan counts. What a model that was made has left, the next one spends.
    """
    single = next(job.data.feeds(samples, batch=1))
    whole = linear_flops(job.store, single, job.provider)
    best = None
    # Planned against made: within the limit, and beyond it, as a model is that stays as it is.
    within: tuple[float, float] | None = None
    beyond = 1.0, 1.0
    planned = asked
    for _ in range(FITS):
        plan = offers.plan(planned)
        made = 1.0
        if plan.changes:
            # Operations do not depend on values.
            _, store = build(job, replace(plan, refit=False), found, config)
            made = linear_flops(store, single, job.provider) / whole
        if made > asked:
            beyond = planned, made
        else:
            best, within = plan, (planned, made)
        if within is None:
            planned -= made - asked
            continue
        if asked - within[1] <= NEAR_OPERATIONS:
            break
        share = (asked - within[1]) / (beyond[1] - within[1])
        planned = within[0] + share * (beyond[0] - within[0])
    return best or offers.plan(asked)


def _fit_latency(
    job: Job,
    found: Measurement,
    offers: Offers,
    samples: Sequence[int],
    config: CompressConfig,
    final: Final,
) -> RankPlan:
    """The mildest plan that was measured, on the whole model, to be as fast as was asked for.

    What layers take by themselves says which to change; how far to go is found by timing whole
    models. Those need no refit, as time does not depend on values.
    """
    assert config.latency_ratio is not None
    wanted = config.latency_ratio
    feeds = list(job.data.feeds(samples, batch=config.latency_batch or job.batch))
    reference = open_session(job.source, job.provider)
    # Planned against measured shares of the time: nothing changed takes all of it.
    slow, slow_measured = 1.0, 1.0
    fast: tuple[float, float] | None = None
    best: RankPlan | None = None
    ratio = max(AIM * wanted, offers.least * (1 + 1e-6))
    fastest = math.inf
    for trial in range(TRIALS):
        job.progress("timing models", trial, TRIALS)
        plan = offers.plan(min(ratio, 1.0))
        if not plan.changes:
            break
        _, store = build(job, replace(plan, refit=False), found, config)
        measured = compare_latency(
            reference, open_session(final(store), job.provider), feeds, seconds=TRIAL_SECONDS
        ).ratio
        fastest = min(fastest, measured)
        if measured <= AIM * wanted:
            best, fast = plan, (ratio, measured)
            if measured >= (AIM - NEAR) * wanted or ratio >= 1.0:
                break
        else:
            slow, slow_measured = ratio, measured
            if ratio <= offers.least * (1 + 1e-6):
                break
        ratio = _next_ratio(slow, slow_measured, fast, AIM * wanted, offers.least * (1 + 1e-6))
    job.progress("timing models", TRIALS, TRIALS)
    if best is None:
        reached = "no move is faster" if fastest == math.inf else f"{fastest:.3f} was measured"
        raise TargetMissedError(
            f"{job.store.label}: a latency ratio of {wanted:g} cannot be reached on "
            f"{job.provider.name}: {reached}, with {offers.least:.3f} expected of every layer at "
            "its fastest"
        )
    return best


def _next_ratio(
    slow: float, slow_measured: float, fast: tuple[float, float] | None, aim: float, least: float
) -> float:
    """On the line between one that is too slow and one that is fast enough, or below the former."""
    if fast is None:
        return max(min(slow - (slow_measured - aim), 0.97 * slow), least)
    (a, b), (x, y) = (fast[0], slow), (fast[1], slow_measured)
    if y <= x:
        return (a + b) / 2
    share = (aim - x) / (y - x)
    return a + (b - a) * min(max(share, 0.1), 0.9)


def check_latency(job: Job, config: CompressConfig, report: ValidationReport) -> None:
    """Where latency counts, a model that is slower than was asked for is no success.

    Raises:
        TargetMissedError: It is slower than the original, or than the ratio that was asked for, by
            more than the noise of the measurement.
    """
    if not config.latency_aware:
        return
    for each in report.providers:
        time = each.latency
        limit = config.latency_ratio or 1.0
        if time.slower or time.exceeds(limit):
            raise TargetMissedError(
                f"{job.store.label}: on {each.provider} the result takes {time.ratio:.3f} of the "
                f"original's time ({time.ratio_low:.3f} to {time.ratio_high:.3f} in {time.pairs} "
                f"pairs of runs), more than the {limit:g} that was asked for"
            )
