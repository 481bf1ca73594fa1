"""Make a trained ONNX model smaller by the rank its data really uses, and prove that it works.

import onnx_utilrank

report = onnx_utilrank.analyze("model.onnx", "calibration.npz")
result = onnx_utilrank.compress(
    "model.onnx", "calibration.npz", onnx_utilrank.CompressConfig(param_ratio=0.5)
)
result.save("smaller.onnx")
"""

from importlib.metadata import version

from onnx_utilrank.config import AnalyzeConfig, CompressConfig, QualityTarget, ValidateConfig
from onnx_utilrank.errors import (
    ConfigError,
    DataError,
    ModelError,
    ProviderUnavailableError,
    TargetMissedError,
    UtilrankError,
)
from onnx_utilrank.pipeline import analyze, compress, sweep, validate
from onnx_utilrank.ranking.plan import RankPlan
from onnx_utilrank.results import (
    CompressResult,
    LayerUtilization,
    SweepPoint,
    SweepResult,
    UtilizationReport,
)
from onnx_utilrank.validation.report import ValidationReport

__version__ = version("onnx-utilrank")

__all__ = [
    "AnalyzeConfig",
    "CompressConfig",
    "CompressResult",
    "ConfigError",
    "DataError",
    "LayerUtilization",
    "ModelError",
    "ProviderUnavailableError",
    "QualityTarget",
    "RankPlan",
    "SweepPoint",
    "SweepResult",
    "TargetMissedError",
    "UtilizationReport",
    "UtilrankError",
    "ValidateConfig",
    "ValidationReport",
    "analyze",
    "compress",
    "sweep",
    "validate",
]
