"""The metadata entry that says which plan made a model, so that no plan is applied twice."""

import onnx

from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.ranking.plan import RankPlan

__all__ = ["stamp", "stamped"]

PLAN_KEY = "onnx_utilrank.plan_sha256"


def stamp(store: ModelStore) -> onnx.StringStringEntryProto | None:
    """The metadata entry that says which plan made a model, if one did."""
    return next((e for e in store.proto.metadata_props if e.key == PLAN_KEY), None)


def stamped(store: ModelStore, plan: RankPlan) -> ModelStore:
    """A model that was just made, with the metadata entry that says by which plan."""
    entry = stamp(store) or store.proto.metadata_props.add(key=PLAN_KEY)
    entry.value = plan.fingerprint()
    return store
