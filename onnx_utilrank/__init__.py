"""Make a trained ONNX model smaller by the rank its data really uses, and prove that it works.

import onnx_utilrank

report = onnx_utilrank.analyze("model.onnx", "calibration.npz")
result = onnx_utilrank.compress(
    "model.onnx", "calibration.npz", onnx_utilrank.CompressConfig(param_ratio=0.5)
)
result.save("smaller.onnx")
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnx_utilrank.benchmarking.config import BenchmarkConfig
    from onnx_utilrank.benchmarking.report import BenchmarkReport
    from onnx_utilrank.benchmarking.run import benchmark
    from onnx_utilrank.config import (
        AnalyzeConfig,
        CompressConfig,
        FinetuneConfig,
        QualityTarget,
        TrainConfig,
        ValidateConfig,
    )
    from onnx_utilrank.errors import (
        ConfigError,
        DataError,
        ModelError,
        ProviderUnavailableError,
        TargetMissedError,
        UtilrankError,
    )
    from onnx_utilrank.finetuning import finetune
    from onnx_utilrank.inspection.inspect import inspect
    from onnx_utilrank.inspection.report import InspectionReport
    from onnx_utilrank.installation.doctor import doctor
    from onnx_utilrank.installation.report import DoctorReport
    from onnx_utilrank.low_rank_training import train
    from onnx_utilrank.pipeline import analyze, compress, validate
    from onnx_utilrank.plain_quantization import QuantizeResult, quantize
    from onnx_utilrank.quantization.config import QuantizeConfig
    from onnx_utilrank.ranking.plan import RankPlan
    from onnx_utilrank.ranking.utilization import LayerUtilization, UtilizationReport
    from onnx_utilrank.repairing.config import RepairConfig
    from onnx_utilrank.repairing.repair import repair
    from onnx_utilrank.repairing.result import RepairedLayer, RepairResult
    from onnx_utilrank.report.write import write_report
    from onnx_utilrank.results import (
        CompressResult,
        FinetuneResult,
        SweepPoint,
        SweepResult,
        TrainResult,
    )
    from onnx_utilrank.sweeping import sweep
    from onnx_utilrank.validation.report import ValidationReport

__version__ = version("onnx-utilrank")

__all__ = [
    "AnalyzeConfig",
    "BenchmarkConfig",
    "BenchmarkReport",
    "CompressConfig",
    "CompressResult",
    "ConfigError",
    "DataError",
    "DoctorReport",
    "FinetuneConfig",
    "FinetuneResult",
    "InspectionReport",
    "LayerUtilization",
    "ModelError",
    "ProviderUnavailableError",
    "QualityTarget",
    "QuantizeConfig",
    "QuantizeResult",
    "RankPlan",
    "RepairConfig",
    "RepairResult",
    "RepairedLayer",
    "SweepPoint",
    "SweepResult",
    "TargetMissedError",
    "TrainConfig",
    "TrainResult",
    "UtilizationReport",
    "UtilrankError",
    "ValidateConfig",
    "ValidationReport",
    "analyze",
    "benchmark",
    "compress",
    "doctor",
    "finetune",
    "inspect",
    "quantize",
    "repair",
    "sweep",
    "train",
    "validate",
    "write_report",
]

# Where the names come from. They are imported when they are asked for: torch takes seconds, and a
# broken package must not keep `doctor` from saying so.
_HOMES = {
    "benchmarking.config": ("BenchmarkConfig",),
    "benchmarking.report": ("BenchmarkReport",),
    "benchmarking.run": ("benchmark",),
    "config": (
        "AnalyzeConfig",
        "CompressConfig",
        "FinetuneConfig",
        "QualityTarget",
        "TrainConfig",
        "ValidateConfig",
    ),
    "errors": (
        "ConfigError",
        "DataError",
        "ModelError",
        "ProviderUnavailableError",
        "TargetMissedError",
        "UtilrankError",
    ),
    "finetuning": ("finetune",),
    "inspection.inspect": ("inspect",),
    "inspection.report": ("InspectionReport",),
    "installation.doctor": ("doctor",),
    "installation.report": ("DoctorReport",),
    "low_rank_training": ("train",),
    "pipeline": ("analyze", "compress", "validate"),
    "plain_quantization": ("QuantizeResult", "quantize"),
    "quantization.config": ("QuantizeConfig",),
    "ranking.plan": ("RankPlan",),
    "ranking.utilization": ("LayerUtilization", "UtilizationReport"),
    "repairing.config": ("RepairConfig",),
    "repairing.repair": ("repair",),
    "repairing.result": ("RepairResult", "RepairedLayer"),
    "report.write": ("write_report",),
    "results": (
        "CompressResult",
        "FinetuneResult",
        "SweepPoint",
        "SweepResult",
        "TrainResult",
    ),
    "sweeping": ("sweep",),
    "validation.report": ("ValidationReport",),
}


def __getattr__(name: str) -> object:
    home = next((module for module, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{home}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
