"""Microsoft Olive runs this package as one pass of a workflow (extra `olive`).

    python -m onnx_utilrank.olive > passes.json
    olive run --config workflow.json --package-config passes.json

The first line writes Olive's own list of passes with `UtilizedRank` added, which a workflow then
names as any other: `{"type": "UtilizedRank", "data": "samples.npz", "param_ratio": 0.5}`.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

from olive.common.config_utils import ParamCategory
from olive.exception import OlivePassError
from olive.hardware.accelerator import AcceleratorSpec
from olive.model import ONNXModelHandler
from olive.model.utils import resolve_onnx_path
from olive.package_config import OlivePackageConfig
from olive.passes import Pass
from olive.passes.pass_config import BasePassConfig, PassConfigParam

from onnx_utilrank.config import QUALITY_KEYS, CompressConfig, QualityTarget
from onnx_utilrank.errors import ConfigError, UtilrankError
from onnx_utilrank.pipeline import compress

__all__ = ["UtilizedRank", "package_config"]

MODULE = "onnx_utilrank.olive.UtilizedRank"
RATIOS = ("param_ratio", "size_ratio", "flop_ratio", "latency_ratio", "energy")


class UtilizedRank(Pass):  # type: ignore[misc, unused-ignore]
    """`onnx_utilrank.compress` on an ONNX model, for the execution provider of the workflow.

    A target that cannot be reached, and any other error, fails the pass with the one line that the
    command would print. The verdict, sizes and notes are in the model's attributes.
    """

    @classmethod
    def _default_config(cls, accelerator_spec: AcceleratorSpec) -> dict[str, PassConfigParam]:
        del accelerator_spec
        targets = {
            name: PassConfigParam(type_=float, default_value=None, description=f"See {name} there.")
            for name in (*RATIOS, *QUALITY_KEYS)
        }
        return {
            "data": PassConfigParam(
                type_=str,
                required=True,
                category=ParamCategory.DATA,
                description="Samples: a file or folder, as `compress --data` takes it.",
            ),
            **targets,
            "options": PassConfigParam(
                type_=dict,
                default_value=None,
                description="Further fields of `onnx_utilrank.CompressConfig`, by name.",
            ),
        }

    def _run_for_config(
        self, model: ONNXModelHandler, config: type[BasePassConfig], output_model_path: str
    ) -> ONNXModelHandler:
        given = config.model_dump()
        provider = self.accelerator_spec.execution_provider or "CPUExecutionProvider"
        try:
            result = compress(model.model_path, given["data"], options_of(given, provider))
            target = resolve_onnx_path(output_model_path, Path(model.model_path).name)
            result.save(target)
        except UtilrankError as e:
            raise OlivePassError(str(e)) from e
        assert result.validation is not None
        attributes = dict(model.model_attributes or {})
        attributes["onnx_utilrank"] = {
            "verdict": result.verdict,
            "notes": list(result.notes),
            "reference": dataclasses.asdict(result.validation.reference),
            "candidate": dataclasses.asdict(result.validation.candidate),
        }
        return ONNXModelHandler(target, model_attributes=attributes)


def options_of(given: dict[str, Any], provider: str) -> CompressConfig:
    """The options of a pass as those of `compress`.

    Args:
        given: Its configuration.
        provider: ONNX Runtime's name of the execution provider of the workflow.

    Raises:
        ConfigError: They are out of range, contradict each other, or name no field.
    """
    fields: dict[str, Any] = {"provider": provider}
    fields |= {key: given[key] for key in RATIOS if given.get(key) is not None}
    qualities = [key for key in QUALITY_KEYS if given.get(key) is not None]
    if len(qualities) > 1:
        raise ConfigError(f"{' and '.join(qualities)} exclude each other")
    if qualities:
        fields["quality"] = QualityTarget(key=qualities[0], limit=given[qualities[0]])
    further = given.get("options") or {}
    unknown = further.keys() - {field.name for field in dataclasses.fields(CompressConfig)}
    if unknown:
        raise ConfigError(f"options: there is no {', '.join(sorted(unknown))}")
    return CompressConfig(**fields | further)


def package_config() -> OlivePackageConfig:
    """Olive's own passes, and this one."""
    config = OlivePackageConfig.load_default_config().model_dump()
    config["passes"]["utilizedrank"] = {
        "module_path": MODULE,
        "supported_providers": ["*"],
        "supported_accelerators": ["*"],
        "supported_precisions": ["*"],
        "supported_algorithms": [],
        "supported_quantization_encodings": [],
    }
    return OlivePackageConfig.model_validate(config)


if __name__ == "__main__":
    sys.stdout.write(package_config().model_dump_json(indent=2) + "\n")
