"""Make a trained ONNX model smaller by the rank its data really uses, and prove that it works.

import onnx_utilrank

report = onnx_utilrank.analyze("model.onnx", "calibration.npz")
result = onnx_utilrank.compress(
    "model.onnx", "calibration.npz", onnx_utilrank.CompressConfig(param_ratio=0.5)
)
result.save("smaller.onnx")
"""

from importlib.metadata import version

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
from onnx_utilrank.low_rank_training import train
from onnx_utilrank.pipeline import analyze, compress, sweep, validate
from onnx_utilrank.ranking.plan import RankPlan
from onnx_utilrank.results import (
    CompressResult,
    FinetuneResult,
    LayerUtilization,
    SweepPoint,
    SweepResult,
    TrainResult,
    UtilizationReport,
)
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
    "FinetuneConfig",
    "FinetuneResult",
    "InspectionReport",
    "LayerUtilization",
    "ModelError",
    "ProviderUnavailableError",
    "QualityTarget",
    "RankPlan",
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
    "finetune",
    "inspect",
    "sweep",
    "train",
    "validate",
]
