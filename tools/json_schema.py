"""Write the JSON Schema of what `--json`, `--report` and `--plan-out` give.

    python tools/json_schema.py > onnx_utilrank/report/schema.json

Types and descriptions are those of the dataclasses that results are made of; what results add or
leave out on their way to JSON is stated here, once. A test holds the file to this program, and what
the verbs print to the file.
"""

import dataclasses
import inspect
import json
import re
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from onnx_utilrank.benchmarking.report import BenchmarkReport
from onnx_utilrank.engine.engine import EngineUse
from onnx_utilrank.inspection.report import InspectionReport
from onnx_utilrank.installation.report import DoctorReport
from onnx_utilrank.plain_quantization import QuantizeResult
from onnx_utilrank.quality import Quality
from onnx_utilrank.ranking.plan import RankPlan, SkippedNode
from onnx_utilrank.ranking.spectrum import LayerSpectrum
from onnx_utilrank.ranking.utilization import LayerUtilization, UtilizationReport
from onnx_utilrank.repairing.result import RepairedLayer, RepairResult
from onnx_utilrank.report.run import RunRecord
from onnx_utilrank.results import (
    CompressResult,
    FinetuneResult,
    SweepPoint,
    TrainResult,
)
from onnx_utilrank.runtime.placement import PlacedNode
from onnx_utilrank.runtime.profile import OperatorTime
from onnx_utilrank.stages import QuantizationReport, Stage
from onnx_utilrank.validation.bench import LatencyComparison
from onnx_utilrank.validation.compare import OutputComparison
from onnx_utilrank.validation.report import ModelFigures, ProviderResult, ValidationReport

__all__ = ["main", "schema"]

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
WHOLE: Schema = {"type": "integer"}
NUMBER: Schema = {"type": "number"}
TRUTH: Schema = {"type": "boolean"}
# JSON has no infinity; see `ValidationReport.as_dict`.
ENDLESS: Schema = {"anyOf": [NUMBER, {"enum": ["Infinity", "-Infinity"]}]}
COUNTS: Schema = {"type": "object", "additionalProperties": WHOLE}
LINES: Schema = {"type": "array", "items": TEXT}


class Definitions:
    """Schemas by name, made of dataclasses as they are asked for."""

    def __init__(self) -> None:
        self.made: dict[str, Schema] = {}

    def ref(
        self,
        kind: type,
        *,
        name: str = "",
        without: frozenset[str] = frozenset(),
        **fields: Schema,
    ) -> Schema:
        """A reference to the schema of a dataclass.

        Args:
            kind: The dataclass.
            name: What it is called; by default as its class is.
            without: Its fields that JSON leaves out.
            fields: What JSON has beside the others, or in another form.
        """
        name = name or kind.__name__
        if name not in self.made:
            self.made[name] = {}  # it may refer to itself
            self.made[name] = self._object(kind, without, fields)
        return {"$ref": f"#/$defs/{name}"}

    def _object(self, kind: type, without: frozenset[str], fields: Mapping[str, Schema]) -> Schema:
        hints = typing.get_type_hints(kind)
        said = _attributes(kind)
        properties = {
            f.name: self.of(hints[f.name])
            for f in dataclasses.fields(kind)
            if f.name not in without and f.name not in fields
        } | dict(fields)
        for field, text in said.items():
            if field in properties:
                properties[field] = {"description": text} | properties[field]
        return {
            "description": (inspect.getdoc(kind) or "").split("\n\n")[0],
            "type": "object",
            "properties": properties,
            "required": list(properties),
            "additionalProperties": False,
        }

    def of(self, hint: Any) -> Schema:
        """The schema of a type."""
        plain = {str: TEXT, int: WHOLE, float: NUMBER, bool: TRUTH, type(None): {"type": "null"}}
        if hint in plain:
            return plain[hint]
        origin, inner = typing.get_origin(hint), typing.get_args(hint)
        if origin in (typing.Union, types.UnionType):
            return {"anyOf": [self.of(each) for each in inner]}
        if origin is Literal:
            return {"enum": list(inner)}
        if origin is tuple:
            items = inner[0] if len(inner) == 2 and inner[1] is ... else None
            if items is not None:
                return {"type": "array", "items": self.of(items)}
            return {
                "type": "array",
                "prefixItems": [self.of(each) for each in inner],
                "minItems": len(inner),
                "maxItems": len(inner),
            }
        if origin is dict:
            return {"type": "object", "additionalProperties": self.of(inner[1])}
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            return self.ref(hint)
        raise TypeError(f"no schema is known of {hint}")


def _attributes(kind: type) -> dict[str, str]:
    """The descriptions in the docstring of a dataclass, and of those it inherits from."""
    found: dict[str, str] = {}
    for each in reversed(kind.__mro__):
        text = inspect.cleandoc(each.__doc__ or "").partition("Attributes:\n")[2]
        block = text.partition("\n\n")[0]
        for name, said in re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", block, re.MULTILINE):
            found[name] = " ".join(said.split())
    return found


def _listed(item: Schema) -> Schema:
    return {"type": "array", "items": item}


def _or_null(item: Schema) -> Schema:
    return {"anyOf": [item, {"type": "null"}]}


def schema() -> Schema:
    """The whole schema: one definition a verb, and those they share."""
    known = Definitions()
    quality = known.ref(Quality)
    latency = known.ref(LatencyComparison)
    judged = known.ref(LatencyComparison, name="JudgedLatency", slower=TRUTH, faster=TRUTH)
    outputs = _listed(
        known.ref(
            OutputComparison,
            relative_error=_or_null(ENDLESS),
            snr_db=_or_null(ENDLESS),
            max_abs_error=_or_null(ENDLESS),
        )
    )
    nodes: Schema = {
        "type": "object",
        "properties": {"counts": COUNTS, "fallen": _listed(known.ref(PlacedNode))},
        "required": ["counts", "fallen"],
        "additionalProperties": False,
    }
    operators = _listed(known.ref(OperatorTime))
    provider = known.ref(
        ProviderResult,
        without=frozenset(
            {"reference_nodes", "candidate_nodes", "reference_operators", "candidate_operators"}
        ),
        options={"type": "object", "additionalProperties": TEXT},
        outputs=outputs,
        against_first=outputs,
        latency=judged,
        nodes={
            "type": "object",
            "properties": {"reference": nodes, "candidate": nodes},
            "required": ["reference", "candidate"],
            "additionalProperties": False,
        },
        operators={
            "description": "Where the time goes, the dearest operator first; on the CPU alone.",
            "type": "object",
            "properties": {"reference": operators, "candidate": operators},
            "required": ["reference", "candidate"],
            "additionalProperties": False,
        },
    )
    validation = known.ref(
        ValidationReport,
        passed=TRUTH,
        notes=LINES,
        relative_error=_or_null(ENDLESS),
        snr_db=_or_null(ENDLESS),
        agreement=_or_null(NUMBER),
        providers=_listed(provider),
    )
    training = known.ref(
        FinetuneResult, name="Training", without=frozenset({"store", "validation", "notes"})
    )
    known.ref(FinetuneResult, name="finetune", without=frozenset({"store"}), validation=validation)
    known.ref(TrainResult, name="train", without=frozenset({"store"}))
    plan = known.ref(RankPlan, name="plan")
    quantized = known.ref(
        QuantizationReport,
        left_alone=COUNTS,
        stages=_listed(known.ref(Stage, quality=quality, validation=validation)),
        beside_plain=_or_null(latency),
    )
    known.ref(
        QuantizeResult,
        name="quantize",
        without=frozenset({"store", "report"}),
        verdict={"enum": ["slower", "smaller", "faster"]},
        quantized=quantized,
    )
    known.ref(
        UtilizationReport,
        name="analyze",
        layers=_listed(known.ref(LayerUtilization, rank=WHOLE, utilization=NUMBER)),
        mean_layer_utilization=_or_null(NUMBER),
    )
    known.ref(
        CompressResult,
        name="compress",
        without=frozenset({"store"}),
        verdict={"enum": ["planned", "unchanged", "larger", "slower", "smaller", "faster"]},
        left_alone=COUNTS,
        plan=plan,
        quality=_or_null(quality),
        searched=_or_null(quality),
        recovered=_or_null(training),
        quantized=_or_null(quantized),
        validation=_or_null(validation),
    )
    point = known.ref(SweepPoint, quality=quality, validation=validation, plan=plan)
    known.made["sweep"] = {
        "type": "object",
        "properties": {
            "model": TEXT,
            "engine": _or_null(known.ref(EngineUse)),
            "notes": LINES,
            "layers": _listed(known.ref(LayerSpectrum)),
            "points": _listed(point),
        },
        "required": ["model", "engine", "notes", "layers", "points"],
        "additionalProperties": False,
    }
    known.ref(
        RepairResult,
        name="repair",
        without=frozenset({"store", "kept"}),
        verdict={"enum": ["unchanged", "slower", "repaired"]},
        recovered=_or_null(NUMBER),
        extra_bytes=NUMBER,
        left_alone=COUNTS,
        layers=_listed(known.ref(RepairedLayer)),
        skipped=_listed(known.ref(SkippedNode)),
        before=quality,
        after=quality,
        searched=_or_null(quality),
        quantized=validation,
        validation=validation,
        latency=_or_null(latency),
    )
    known.made["benchmark"] = _benchmark()
    spec: Schema = {
        "type": "object",
        "properties": {
            "name": TEXT,
            "dtype": _or_null(TEXT),
            "shape": _or_null(_listed({"type": ["integer", "string", "null"]})),
        },
        "required": ["name", "dtype", "shape"],
        "additionalProperties": False,
    }
    known.ref(
        InspectionReport,
        name="inspect",
        inputs=_listed(spec),
        outputs=_listed(spec),
        factorable=WHOLE,
    )
    known.ref(DoctorReport, name="doctor", works=TRUTH)
    known.ref(ModelFigures)
    verbs = (
        *("analyze", "benchmark", "compress", "doctor", "finetune", "inspect", "quantize"),
        *("repair", "sweep", "train", "validate"),
    )
    run = known.ref(RunRecord, verb={"enum": list(verbs)})
    _with_run(known, verbs, run)
    for name in ("Divergence", "Look", "Quality"):
        _nullable(known.made[name])
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "onnx-utilrank",
        "description": "What the verbs print with --json, by verb, and the file of a plan.",
        "$defs": dict(sorted(known.made.items())),
    }


def _with_run(known: Definitions, verbs: Sequence[str], run: Schema) -> None:
    """Reports say what they came from, beside what verbs give.

    A validation is a part of other reports too, and has no run of its own there.
    """
    for verb in verbs:
        part = known.made["ValidationReport"] if verb == "validate" else known.made[verb]
        own = known.made[verb] = dict(part)
        own["properties"] = {"run": run} | own["properties"]
        own["required"] = ["run", *own["required"]]


def _nullable(definition: Schema) -> None:
    """What is not finite is null: see `onnx_utilrank.results.strict`."""
    for field, each in definition["properties"].items():
        if each.get("type") == "number":
            rest = {k: v for k, v in each.items() if k != "type"}
            definition["properties"][field] = rest | _or_null(NUMBER)


def _benchmark() -> Schema:
    """`BenchmarkReport.as_dict` turns its tables by a quarter: one entry a model in each case."""
    model: Schema = {
        "type": "object",
        "properties": {
            "model": TEXT,
            **dict.fromkeys(
                ("ms", "ms_low", "ms_high", "ratio", "ratio_low", "ratio_high"), NUMBER
            ),
            **dict.fromkeys(("faster", "slower"), TRUTH),
            "flop_ratio": _or_null(NUMBER),
            "flops": WHOLE,
            **dict.fromkeys(("resident_bytes", "device_bytes"), _or_null(WHOLE)),
        },
        "required": ["model", "ms", "flops", "resident_bytes", "device_bytes"],
        "additionalProperties": False,
    }
    case: Schema = {
        "type": "object",
        "properties": {
            "provider": TEXT,
            "options": {"type": "object", "additionalProperties": TEXT},
            "batch": _or_null(WHOLE),
            "dims": COUNTS,
            "rounds": WHOLE,
            "copies": TRUTH,
            "models": _listed(model),
        },
        "required": ["provider", "options", "batch", "dims", "rounds", "copies", "models"],
        "additionalProperties": False,
    }
    said = _attributes(BenchmarkReport)
    properties: Schema = {
        "models": _listed(
            {
                "type": "object",
                "properties": {"model": TEXT, "file_bytes": WHOLE},
                "required": ["model", "file_bytes"],
                "additionalProperties": False,
            }
        ),
        "threads": {"description": said["threads"]} | WHOLE,
        "synthetic": {"description": said["synthetic"]} | TRUTH,
        "notes": LINES,
        "cases": _listed(case),
    }
    return {
        "description": inspect.getdoc(BenchmarkReport),
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def main() -> int:
    """Print the schema; the exit status."""
    print(json.dumps(schema(), indent=1, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
