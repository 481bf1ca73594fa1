"""The layers of the package, its fences to other packages, and the shape of its modules."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import onnx_utilrank

PACKAGE = Path(onnx_utilrank.__file__).parent
MODULES = {
    path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text(encoding="utf8"))
    for path in sorted(PACKAGE.rglob("*.py"))
}

# What each part may import, lowest first: a part only names parts that stand above it.
LAYERS = {
    "errors": "",
    "statistics": "errors",
    "config": "errors statistics",
    "model": "errors",
    "runtime": "errors model",
    "sites": "errors model statistics",
    "torch_graph": "config errors model",
    "moves": "errors model sites statistics",
    "engine": "errors runtime",
    "calibration": "engine errors model runtime sites statistics",
    "surgery": "errors model moves sites statistics",
    "latency": "calibration model moves runtime sites statistics surgery torch_graph",
    "ranking": "config engine errors latency model moves sites statistics",
    "sensitivity": "calibration engine errors model moves ranking sites statistics torch_graph",
    "refit": "model ranking sensitivity sites statistics torch_graph",
    "validation": "calibration errors model runtime statistics",
    "benchmarking": "calibration errors model runtime validation",
    "quantization": ("calibration config errors model ranking runtime sites statistics validation"),
    "inspection": ("benchmarking calibration errors model moves ranking runtime sites torch_graph"),
    "measurement": (
        "calibration engine model ranking runtime sensitivity sites statistics torch_graph"
    ),
    "comparison": "calibration config errors model ranking runtime validation",
    "job": (
        "calibration comparison config engine errors measurement model moves ranking runtime"
        " sensitivity sites statistics torch_graph validation"
    ),
    "remarks": "config measurement ranking",
    "quantizing": "config errors job model quantization runtime validation",
    "compression": (
        "config errors job measurement model moves quantizing ranking refit runtime sensitivity"
        " sites statistics surgery torch_graph validation"
    ),
    "quality": "calibration config errors job model runtime statistics validation",
    "stages": (
        "comparison config job model quality quantization quantizing remarks runtime sites"
        " validation"
    ),
    "training": ("calibration config errors model runtime sites statistics torch_graph"),
    "results": "engine errors model quality ranking stages training validation",
    "repairing": (
        "calibration comparison config engine errors job measurement model moves quality ranking"
        " results runtime sensitivity sites statistics surgery validation"
    ),
    "planning": (
        "calibration compression config errors job latency measurement model moves quantizing"
        " ranking repairing runtime sites validation"
    ),
    "plain_quantization": (
        "calibration errors job model quality quantization quantizing results stages"
    ),
    "finetuning": (
        "calibration comparison config errors model results runtime statistics surgery"
        " torch_graph training validation"
    ),
    "low_rank_training": (
        "calibration config errors model ranking results runtime sites statistics surgery"
        " training validation"
    ),
    "search": "compression config errors job measurement model quality quantizing ranking",
    "pipeline": (
        "calibration comparison compression config errors finetuning job model planning quality"
        " quantizing ranking remarks repairing results runtime search sites stages statistics"
        " torch_graph training validation"
    ),
    "sweeping": (
        "calibration compression config errors job model planning quality ranking remarks results"
    ),
    "installation": "errors runtime",
    "olive": "config errors pipeline",
    "report": (
        "benchmarking engine errors inspection installation model plain_quantization quality"
        " ranking repairing results runtime stages training validation"
    ),
    "__init__": (
        "benchmarking config errors finetuning inspection installation low_rank_training pipeline"
        " plain_quantization quantization ranking repairing report results sweeping validation"
    ),
    "cli": (
        "__init__ benchmarking config errors finetuning inspection installation low_rank_training"
        " model moves pipeline plain_quantization quantization ranking repairing report runtime"
        " sites statistics sweeping training"
    ),
    "__main__": "cli",
}

# Packages that only some modules may import; nothing may import those with no module.
FENCES = {
    "onnx_graphsurgeon": (
        *("model/surgeon.py", "sites/", "moves/", "surgery/recurrent.py"),
        *("quantization/blockwise.py", "repairing/branch.py"),
    ),
    "onnxruntime": ("runtime/", "quantization/"),
    "rich": ("cli/", "report/"),
    "argparse": ("cli/",),
    "jinja2": ("report/html/",),
    "jsonschema": ("report/read.py",),
    "matplotlib": ("report/",),
    "packaging": ("installation/",),
    "shtab": ("cli/completion.py",),
    "olive": ("olive.py",),
    "ray": ("engine/ray.py",),
    "onnx_ir": (),
    "torch": ("torch_graph/", "sensitivity/", "refit/", "training/", "low_rank_training.py"),
}

LONGEST = 400


def imported(tree: ast.Module) -> Iterator[str]:
    """Dotted names of all modules that a module imports, also within functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative import"
            yield str(node.module)


def part(name: str) -> str:
    return name.split("/")[0].removesuffix(".py")


def public(tree: ast.Module) -> set[str]:
    kinds = (ast.ClassDef, ast.FunctionDef)
    return {n.name for n in tree.body if isinstance(n, kinds) and not n.name.startswith("_")}


def exported(tree: ast.Module) -> list[str] | None:
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    return None


def test_every_part_has_its_layer():
    assert {part(name) for name in MODULES} == set(LAYERS)


def test_layers_import_one_way():
    below: set[str] = set()
    for name, allowed in LAYERS.items():
        assert set(allowed.split()) <= below
        below.add(name)


@pytest.mark.parametrize("name", MODULES)
def test_module_imports_only_what_its_layer_may(name: str):
    inner = [m.split(".") for m in imported(MODULES[name]) if m.split(".")[0] == "onnx_utilrank"]
    parts = {m[1] if len(m) > 1 else "__init__" for m in inner}
    assert parts <= {part(name), *LAYERS[part(name)].split()}


@pytest.mark.parametrize("package", FENCES)
def test_packages_are_imported_only_inside_their_fence(package: str):
    users = {
        n for n, tree in MODULES.items() if package in {m.split(".")[0] for m in imported(tree)}
    }
    assert all(user.startswith(FENCES[package]) for user in users)
    assert bool(users) == bool(FENCES[package])


@pytest.mark.parametrize("name", MODULES)
def test_module_is_short_and_says_what_it_is_for(name: str):
    assert ast.get_docstring(MODULES[name])
    lines = (PACKAGE / name).read_text(encoding="utf8").splitlines()
    assert len(lines) <= LONGEST


@pytest.mark.parametrize("name", MODULES)
def test_module_lists_its_public_names(name: str):
    tree = MODULES[name]
    listed = exported(tree)
    if public(tree):
        assert listed
    if listed is not None:
        assert len(set(listed)) == len(listed)
        bound = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
        bound |= {
            alias.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for alias in n.names
        }
        assert set(listed) <= bound | public(tree)


def test_public_names_can_be_had():
    assert {name for names in onnx_utilrank._HOMES.values() for name in names} == set(
        onnx_utilrank.__all__
    )
    for name in onnx_utilrank.__all__:
        assert getattr(onnx_utilrank, name).__module__.startswith("onnx_utilrank.")
    with pytest.raises(AttributeError, match="'analyse'"):
        _ = onnx_utilrank.analyse
