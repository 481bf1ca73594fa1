"""How much of its space each layer uses: the measurement of Garg et al., arXiv 2407.04797."""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from onnx_utilrank.engine.engine import EngineUse
from onnx_utilrank.ranking.method import Measured
from onnx_utilrank.ranking.plan import SkippedNode
from onnx_utilrank.ranking.spectrum import Curve, tail_curve
from onnx_utilrank.ranking.utilized_rank import UTILIZED_RANK, UtilizedSite

__all__ = ["LayerUtilization", "UtilizationReport"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerUtilization:
    """How much of its space one weight uses (Garg et al., arXiv 2407.04797).

    Attributes:
        site: Key of the site.
        nodes: Names of the nodes that share the weight.
        op_type: Their operator.
        m: Output features.
        d: Input features.
        input_rank: k_S, input directions that hold the energy.
        output_rank: k_T, output directions that do.
        rows: Rows that the measurement rests on.
        trusted: False where those are fewer than four times the width: then the utilization is
            an underestimate.
        input_energy: (k, share of the inputs' energy beyond k directions) for some k.
        output_energy: The same of the outputs.
    """

    site: str
    nodes: tuple[str, ...]
    op_type: str
    m: int
    d: int
    input_rank: int
    output_rank: int
    rows: int
    trusted: bool
    input_energy: Curve
    output_energy: Curve

    @classmethod
    def of(cls, measured: Measured, energy: float) -> "LayerUtilization":
        """What a weight uses, that was measured by the paper's rule.

        Args:
            measured: What was measured of it.
            energy: Share of the energy that a subspace has to hold.
        """
        assert isinstance(measured, UtilizedSite)
        site, moment = measured.site, measured.moment
        input_rank, output_rank = UTILIZED_RANK.ranks(measured, energy)
        return cls(
            site=site.key,
            nodes=tuple(use.label for use in site.uses),
            op_type=site.op_type,
            m=site.m,
            d=site.d,
            input_rank=input_rank,
            output_rank=output_rank,
            rows=moment.rows,
            trusted=moment.enough_rows,
            input_energy=tail_curve(measured.found.input_values),
            output_energy=tail_curve(measured.found.output_values),
        )

    @property
    def rank(self) -> int:
        """The utilized rank r = min(k_S, k_T)."""
        return min(self.input_rank, self.output_rank)

    @property
    def utilization(self) -> float:
        """r / min(d, m)."""
        return self.rank / min(self.m, self.d)


@dataclass(frozen=True, slots=True, kw_only=True)
class UtilizationReport:
    """The paper's measurement of a whole model.

    Attributes:
        model: How messages name the model.
        model_sha256: Its fingerprint.
        energy: Share of the energy that a subspace has to hold.
        samples: Samples that were run.
        engine: Who ran them, where it was not this process alone.
        layers: One entry a weight, in graph order.
        skipped: Nodes that were not measured, and why.
        notes: Sentences that a reader of the figures has to know.
    """

    verb: ClassVar[str] = "analyze"

    model: str
    model_sha256: str
    energy: float
    samples: int
    engine: EngineUse | None
    layers: tuple[LayerUtilization, ...]
    skipped: tuple[SkippedNode, ...]
    notes: tuple[str, ...]

    @property
    def mean_layer_utilization(self) -> float | None:
        """MLU, the mean of the layers' utilization; None for a model without layers."""
        if not self.layers:
            return None
        return sum(layer.utilization for layer in self.layers) / len(self.layers)

    def as_dict(self) -> dict[str, object]:
        """The report as JSON types."""
        layers = [
            dataclasses.asdict(layer) | {"rank": layer.rank, "utilization": layer.utilization}
            for layer in self.layers
        ]
        return dataclasses.asdict(self) | {
            "mean_layer_utilization": self.mean_layer_utilization,
            "layers": layers,
        }
