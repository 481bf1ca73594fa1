"""Everything a caller can choose, with its defaults and its limits."""

from onnx_utilrank.config.compress import (
    FAST_MULTIPLE,
    OPTIMIZE_FOR,
    QUALITY_KEYS,
    SCHEME_KEYS,
    CompressConfig,
    QualityTarget,
    SchemeKey,
)
from onnx_utilrank.config.run import (
    DEFAULT_ENERGY,
    DEFAULT_MEMORY,
    AnalyzeConfig,
    CalibrationConfig,
    RunConfig,
    ValidateConfig,
)
from onnx_utilrank.config.training import (
    FINETUNE_METHODS,
    TRAIN_METHODS,
    FinetuneConfig,
    FinetuneMethod,
    TrainConfig,
    TrainingConfig,
    TrainMethod,
)

__all__ = [
    "DEFAULT_ENERGY",
    "DEFAULT_MEMORY",
    "FAST_MULTIPLE",
    "FINETUNE_METHODS",
    "OPTIMIZE_FOR",
    "QUALITY_KEYS",
    "SCHEME_KEYS",
    "TRAIN_METHODS",
    "AnalyzeConfig",
    "CalibrationConfig",
    "CompressConfig",
    "FinetuneConfig",
    "FinetuneMethod",
    "QualityTarget",
    "RunConfig",
    "SchemeKey",
    "TrainConfig",
    "TrainMethod",
    "TrainingConfig",
    "ValidateConfig",
]
