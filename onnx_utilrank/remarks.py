"""What is said of a plan, in sentences for the user."""

from onnx_utilrank.config import CompressConfig
from onnx_utilrank.measurement import Measurement
from onnx_utilrank.ranking.decide import Offers
from onnx_utilrank.ranking.plan import RankPlan

__all__ = ["FULL", "fullness", "refit_note"]

# A predicted divergence (nats a decision, or ½ of the relative squared error) that users will see
# in their metric: a model that comes to it has no more room.
FULL = 0.05


def fullness(offers: Offers, plan: RankPlan) -> tuple[str, ...]:
    """A sentence where a plan goes further than the model has room for, as far as is predicted."""
    predicted = plan.predicted_divergence
    if predicted is None or predicted <= FULL:
        return ()
    reach = offers.reach(FULL)
    unit = offers.ledger.unit
    until = "at any size" if reach is None else f"below {100 * reach:.0f} % of its {unit}"
    return (
        f"The model uses its space: {until} a divergence of more than {FULL:g} is predicted "
        f"({predicted:.2g} at {100 * plan.param_ratio:.0f} % of the parameters); expect its "
        "quality to suffer.",
    )


def refit_note(plan: RankPlan, config: CompressConfig, found: Measurement) -> tuple[str, ...]:
    """A sentence where a refit was tried and left out."""
    if not config.refit or found.gradients is None or plan.refit or not plan.changes:
        return ()
    return (
        "No layer was refitted to what it gets behind compressed ones: on calibration samples kept "
        "apart for it that was no better, or there were too few to tell.",
    )
