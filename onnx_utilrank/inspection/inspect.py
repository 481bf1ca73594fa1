"""Look at a model without data."""

from collections.abc import Sequence

from onnx_utilrank.benchmarking.cases import free_axes, synthetic_cases
from onnx_utilrank.benchmarking.config import BenchmarkConfig
from onnx_utilrank.calibration.survey import survey
from onnx_utilrank.errors import DataError, ModelError
from onnx_utilrank.inspection.contents import (
    count_operators,
    external_data,
    fixed_batch,
    quantized_nodes,
)
from onnx_utilrank.inspection.report import InspectedHidden, InspectedSite, InspectionReport
from onnx_utilrank.model.functions import inlined
from onnx_utilrank.model.graph import GraphIndex
from onnx_utilrank.model.heads import hidden_scores
from onnx_utilrank.model.plain import index_model
from onnx_utilrank.model.store import ModelSource, ModelStore
from onnx_utilrank.moves.moves import MOVES
from onnx_utilrank.moves.shrink import SHRINK
from onnx_utilrank.ranking.cost import count_parameters
from onnx_utilrank.ranking.skipped import skipped_nodes
from onnx_utilrank.runtime.providers import find_provider
from onnx_utilrank.runtime.sessions import open_session
from onnx_utilrank.sites.find import find_sites, has_sites_in_functions
from onnx_utilrank.sites.find_hidden import find_hidden
from onnx_utilrank.sites.follow_units import values_followed
from onnx_utilrank.sites.hidden import Hidden
from onnx_utilrank.sites.site import Site
from onnx_utilrank.sites.tied import find_tied
from onnx_utilrank.torch_graph.support import obstacles

__all__ = ["inspect"]

# Bytes of a model up to which it is loaded and run on a generated sample: a larger one is looked at
# in its files alone, which takes little memory.
LARGEST_RUN = 2**30

# Lengths that free axes get in that sample, one after another until one runs: enough for a
# sentence, or for what some models cut off the edges of an image.
LENGTHS = (16, 224)


def inspect(model: ModelSource, *, custom_op_libraries: Sequence[str] = ()) -> InspectionReport:
    """Tell what a model file holds, and what could be done to it, without data.

    A model of at most 1 GiB is loaded in ONNX Runtime and run once, on one generated sample, as
    features that could shrink are found by the shapes that values really have.

    Args:
        model: Path, proto or store.
        custom_op_libraries: Files of operators that ONNX Runtime does not have.

    Raises:
        ConfigError: A library cannot be loaded.
        ModelError: The file is no model, or is broken.
    """
    provider = find_provider("cpu", custom_op_libraries)
    store = ModelStore.load(model)
    index = index_model(inlined(store) if has_sites_in_functions(store) else store)
    sites, skips = find_sites(index)
    notes: list[str] = []
    load_fault, hidden = None, None
    if store.file_bytes > LARGEST_RUN:
        notes.append(
            f"The model is larger than {LARGEST_RUN:,} bytes: it was not loaded in ONNX Runtime, "
            "so that hidden features were not looked for."
        )
    else:
        try:
            open_session(store, provider)
        except ModelError as e:
            load_fault = str(e).removeprefix(f"{store.label}: ")
        else:
            hidden = _hidden(index, sites, custom_op_libraries, notes) if sites else ()
    tied = dict[str, str]()
    for table, head in find_tied(index, sites):
        tied |= {table.key: head.key, head.key: table.key}
    total = count_parameters(store)
    external_bytes, external_files = external_data(store)
    return InspectionReport(
        model=store.label,
        producer=f"{store.proto.producer_name} {store.proto.producer_version}".strip(),
        ir_version=int(store.proto.ir_version),
        opsets={o.domain or "ai.onnx": int(o.version) for o in store.proto.opset_import},
        file_bytes=store.file_bytes,
        external_bytes=external_bytes,
        external_files=external_files,
        parameters=total,
        nodes=len(store.proto.graph.node),
        functions=len(store.proto.functions),
        inputs=store.inputs,
        outputs=store.outputs,
        batch=fixed_batch(store.inputs),
        operators=count_operators(GraphIndex.build(store)),
        sites=tuple(_inspected(index, site, total, hidden or (), tied) for site in sites),
        hidden=None if hidden is None else tuple(map(_features, hidden)),
        skipped=skipped_nodes(skips),
        quantized_nodes=quantized_nodes(store),
        gradients=_gradients(index.store),
        load_fault=load_fault,
        notes=tuple(notes),
    )


def _hidden(
    index: GraphIndex,
    sites: Sequence[Site],
    custom_op_libraries: Sequence[str],
    notes: list[str],
) -> tuple[Hidden, ...] | None:
    """Features that may shrink, by the values of a generated sample; None where none runs."""
    store, failure = index.store, None
    provider = find_provider("cpu", custom_op_libraries)
    for length in LENGTHS:
        try:
            dims = {name: (length,) for name, batch in free_axes(store).items() if not batch}
            (case, *_), _ = synthetic_cases(store, BenchmarkConfig(dims=dims))
            values = survey(store, values_followed(index), case.single, provider)
        except (DataError, ModelError) as e:
            failure = failure or e
            if not isinstance(e, DataError):
                continue
            break
        return find_hidden(index, sites, values)
    reason = str(failure).removeprefix(f"{store.label}: ")
    notes.append(
        f"Hidden features were not looked for: a generated sample does not run ({reason})."
    )
    return None


def _inspected(
    index: GraphIndex, site: Site, total: int, hidden: Sequence[Hidden], tied: dict[str, str]
) -> InspectedSite:
    moves = {move.key: move.top_rank(site) for move in MOVES if move.applies(index, site)}
    moves = {key: rank for key, rank in moves.items() if rank}
    sizes = [each.size for each in hidden if site.key in each.sites]
    if sizes:
        moves[SHRINK] = min(sizes)
    return InspectedSite(
        site=site.key,
        op_type=site.op_type,
        nodes=tuple(use.label for use in site.uses),
        m=site.m,
        d=site.d,
        dtype=site.dtype.name,
        parameters=site.parameters,
        share=site.parameters / total,
        break_even_rank=site.break_even_rank,
        moves=moves,
        freed=site.freed,
        tied=tied.get(site.key),
    )


def _features(hidden: Hidden) -> InspectedHidden:
    return InspectedHidden(
        hidden=hidden.key,
        kind="units" if hidden.units else "heads",
        size=hidden.size,
        groups=len(hidden.made),
        sites=hidden.sites,
    )


def _gradients(store: ModelStore) -> tuple[str, ...]:
    found = obstacles(store)
    floats = any(spec.dtype is not None and spec.dtype.kind in "fV" for spec in store.outputs)
    floats = floats or bool(hidden_scores(store))
    return found if floats or not store.outputs else (*found, "no output holds floating values")
