"""Work that is shared: in parts, in any order, twice where a worker dies, and counted once."""

import json
import logging
import math
import pickle
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import numpy as np
import onnx
import pytest
from builders import Feed, activations, model, noise

import synthetic_vit
from onnx_utilrank import (
    CompressConfig,
    ModelError,
    QuantizeConfig,
    RepairConfig,
    quantize,
    repair,
)
from onnx_utilrank.calibration.collect import Progress, silent
from onnx_utilrank.cli.main import main
from onnx_utilrank.config import CalibrationConfig
from onnx_utilrank.engine.engine import IN_PLACE, Engine, EngineUse, shards
from onnx_utilrank.errors import ConfigError
from onnx_utilrank.job import Job
from onnx_utilrank.measurement import Measurement
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.ranking.two_sided import TwoSidedSite
from onnx_utilrank.report.table import sentences

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")
# Ray leaves processes to be collected, and looks at what changes with its next version.
of_ray = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)

TINY = synthetic_vit.VitShape(width=16, layers=1, heads=2, patch=4, image=8, classes=5)


def images(count: int) -> list[Feed]:
    """Feeds of one image, or of two now and then."""
    sizes = [2 if k % 5 == 4 else 1 for k in range(count)]
    return [
        {"image": noise(k, n, 3, 8, 8).astype(np.float32) + np.float32(k % 3)}
        for k, n in enumerate(sizes)
    ]


class Apart:
    """Does tasks in this process as if in many: all is sent, and the last task is done first.

    Attributes:
        tasks: Names of the functions whose results were taken.
    """

    in_place = False
    threads = 1
    use: EngineUse | None = None

    def __init__(self) -> None:
        self.tasks: list[str] = []

    def __enter__(self) -> "Apart":
        return self

    def __exit__(self, *raised: object) -> None:
        pass

    def map(
        self,
        function: Callable[..., Any],
        shared: tuple[Any, ...],
        tasks: Iterable[Any],
        *,
        memory: int = 0,
        runs_model: bool = False,
    ) -> Iterator[Any]:
        del memory, runs_model
        held = pickle.dumps(shared)
        results = {}
        for k, task in reversed(list(enumerate(tasks))):
            sent = pickle.loads(pickle.dumps(task))
            results[k] = pickle.loads(pickle.dumps(function(*pickle.loads(held), sent)))
        for k in sorted(results):
            self.tasks.append(function.__name__)
            yield results[k]

    def groups(self, function: Callable[[Any], Any], groups: Iterable[Any]) -> Iterator[Any]:
        return map(function, groups)


def measured(
    proto: onnx.ModelProto,
    data: list[Feed],
    engine: Engine,
    method: str = "two-sided",
    progress: Progress = silent,
    **options: Any,
) -> Measurement:
    """Every site, decomposed."""
    config = CompressConfig(param_ratio=0.5, method=method, **options)
    job = replace(Job.open(proto, data, config, progress), engine=engine)
    return job.measure(method, job.sites, range(len(job.data)), config)


def assert_alike(found: Measurement, wanted: Measurement, *, exactly: bool = False) -> None:
    """The same sites with the same rows, and sums that differ by their order alone.

    Products are formed in float32, of other rows together: of a few hundred rows here.
    """
    near = 0.0 if exactly else 2**-24 * math.sqrt(300)
    assert [m.site.key for m in found.sites] == [m.site.key for m in wanted.sites]
    assert [s.node for s in found.skips] == [s.node for s in wanted.skips]
    assert found.notes == wanted.notes
    for one, other in zip(found.sites, wanted.sites, strict=True):
        assert one.moment is not None
        assert other.moment is not None
        assert one.moment.rows == other.moment.rows  # nothing is missing, nothing counted twice
        pairs = [
            (one.moment.outer, other.moment.outer),
            (one.moment.total, other.moment.total),
        ]
        if isinstance(one, TwoSidedSite):
            assert isinstance(other, TwoSidedSite)
            pairs += [(one.gamma, other.gamma), (one.errors, other.errors)]
            parts, others = ((o.heads, o.units, *o.inner) for o in (one, other))
            for part, its in zip(parts, others, strict=True):
                assert (part is None) == (its is None)
                if part is not None and its is not None:
                    pairs.append((part.errors, its.errors))
        for a, b in pairs:
            np.testing.assert_allclose(a, b, rtol=0, atol=near * np.abs(b).max(initial=1e-300))


# --- parts, without Ray -------------------------------------------------------------------------


def test_parts_are_the_same_however_many_workers_there_are():
    for runs in (1, 5, 16, 17, 100):
        parts = shards(runs)
        assert [k for part in parts for k in part] == list(range(runs))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        # Who goes on in the midst of one meets the others.
        for first in range(runs):
            rest = shards(runs, first)
            assert [k for part in rest for k in part] == list(range(first, runs))
            assert {part.stop for part in rest} <= {part.stop for part in parts}


@pytest.mark.parametrize("method", ["one-sided", "utilized-rank", "svd", "two-sided"])
def test_sums_of_parts_are_those_of_one_process(method: str):
    proto, data = synthetic_vit.build(TINY), images(24)
    apart = Apart()
    found, wanted = (measured(proto, data, engine, method) for engine in (apart, IN_PLACE))
    if method == "svd":
        assert [m.site.key for m in found.sites] == [m.site.key for m in wanted.sites]
        return
    assert_alike(found, wanted)
    assert len(set(apart.tasks)) == (4 if method == "two-sided" else 2)


def test_a_pass_for_each_site_gives_the_same():
    """Groups of sites that do not fit the memory budget together."""
    proto, data = synthetic_vit.build(TINY), images(10)
    found = measured(proto, data, Apart(), memory_budget=2**20, moves=("low-rank",))
    assert_alike(found, measured(proto, data, IN_PLACE, memory_budget=2**20, moves=("low-rank",)))


def late() -> tuple[onnx.ModelProto, list[Feed]]:
    """A branch that counts in the fourth run first, of outputs whose number the values decide."""
    proto = model(
        "(float[n,6] x, float[n,1] gate) => (float[n,4] y, float[k,4] chosen)",
        """
        h = MatMul(x, A)
        closed = Mul(h, gate)
        sum = Add(closed, x)
        y = MatMul(sum, B)
        open = Greater(gate, zero)
        flat = Reshape(open, all)
        chosen = Compress <axis = 0> (y, flat)
        """,
        A=noise(1, 6, 6).astype(np.float32),
        B=noise(2, 6, 4).astype(np.float32),
        zero=np.float32(0),
        all=np.array([-1]),
    )
    return proto, [
        {
            "x": activations(k, 3, 6).astype(np.float32),
            "gate": np.array([[k > 2], [k % 3 == 2], [k % 4 == 1]], np.float32) * (k > 2),
        }
        for k in range(20)
    ]


def test_what_a_part_begins_with_is_mended_where_it_was_foretold_wrong():
    proto, data = late()
    apart = Apart()
    found = measured(proto, data, apart, moves=("low-rank",))
    assert_alike(found, measured(proto, data, IN_PLACE, moves=("low-rank",)))
    assert apart.tasks.count("_collected") > 0


def test_a_checkpoint_of_one_engine_serves_the_other(tmp_path, monkeypatch):
    proto, data = synthetic_vit.build(TINY), images(20)
    wanted = measured(proto, data, IN_PLACE, moves=("low-rank",))
    monkeypatch.setattr("onnx_utilrank.sensitivity.measure.CHECKPOINT_SECONDS", 0.0)
    kept = {"cache": tmp_path, "moves": ("low-rank",)}

    class Dying(Apart):
        def map(self, function: Callable[..., Any], *given: Any, **named: Any) -> Iterator[Any]:
            for k, result in enumerate(super().map(function, *given, **named)):
                if function.__name__ == "_collected" and k == 5:
                    raise KeyboardInterrupt
                yield result

    with pytest.raises(KeyboardInterrupt):
        measured(proto, data, Dying(), **kept)
    assert list(tmp_path.iterdir())
    assert_alike(measured(proto, data, IN_PLACE, **kept), wanted)


def test_a_repair_is_shared_too(monkeypatch):
    proto, data = synthetic_vit.build(TINY), images(12)
    small = quantize(proto, data, QuantizeConfig(scheme="int4")).model
    wanted = repair(proto, small, data, RepairConfig(rank=2))
    apart = Apart()
    monkeypatch.setattr("onnx_utilrank.job.find_engine", lambda *_: apart)
    found = repair(proto, small, data, RepairConfig(rank=2))
    assert {"_collected", "_predicted", "_decomposed"} <= set(apart.tasks)
    for one, other in zip(found.layers, wanted.layers, strict=True):
        assert one.rank == other.rank
        assert one.predicted_after == pytest.approx(other.predicted_after, rel=1e-6)


def test_weights_beside_a_model_have_to_be_where_a_worker_looks(tmp_path):
    proto = synthetic_vit.build(TINY)
    ModelStore.load(proto).save(tmp_path / "m.onnx", save_as_external_data=True)
    store = ModelStore.load(tmp_path / "m.onnx")
    there = pickle.dumps(store)
    tensor = store.proto.graph.initializer[0]
    np.testing.assert_array_equal(pickle.loads(there).array(tensor), store.array(tensor))
    (tmp_path / "m.onnx.data").unlink()
    with pytest.raises(ModelError, match=r"m\.onnx: node .*: tensor .*m\.onnx\.data"):
        pickle.loads(there)


# --- options ------------------------------------------------------------------------------------


def test_an_engine_that_is_none_is_refused():
    with pytest.raises(ConfigError, match="engine 'dask' is none of local, ray"):
        CalibrationConfig(engine="dask")


def test_ray_that_is_not_installed_is_told_at_once():
    script = (
        "import sys; sys.modules['ray'] = None\n"
        "from onnx_utilrank.cli.main import main\n"
        "sys.exit(main(['analyze', 'none.onnx', '--data', 'none.npz', '--engine', 'ray']))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert 'pip install "onnx-utilrank[ray]"' in line


@needs_ray
@pytest.mark.parametrize(
    ("address", "status", "said"),
    [("127.0.0.1:1", 4, "no cluster answers at 127.0.0.1:1"), ("here", 2, "host:port")],
)
def test_a_cluster_that_is_not_there_is_told_at_once(address, status, said, capsys):
    given = ["analyze", "none.onnx", "--data", "none.npz", "--engine", f"ray:{address}"]
    assert main(given) == status
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


# --- Ray ----------------------------------------------------------------------------------------


@pytest.fixture
def two_nodes() -> Iterator[Any]:
    """A Ray of two nodes of one core each, and what ends the second one as a crash would."""
    import ray
    from ray.cluster_utils import Cluster

    logging.getLogger("ray").setLevel(logging.ERROR)
    # A node that is gone is missed within some seconds; one that is slow is waited for.
    watch = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 1000}
    watch |= {"health_check_timeout_ms": 5000, "health_check_failure_threshold": 3}
    head = {"num_cpus": 1, "include_dashboard": False, "_system_config": watch}
    cluster = Cluster(initialize_head=True, head_node_args=head, shutdown_at_exit=False)
    try:
        second = cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, log_to_driver=False, configure_logging=False)
        yield lambda: cluster.remove_node(second, allow_graceful=False)
    finally:
        ray.shutdown()
        cluster.shutdown()


@needs_ray
@of_ray
def test_a_node_that_dies_on_the_way_changes_nothing(two_nodes, tmp_path):
    from onnx_utilrank.engine.ray import RayEngine

    proto, data = synthetic_vit.build(TINY), images(30)
    engine = RayEngine(None, gpus=False)
    with engine:  # both nodes do tasks before it begins, however slow they are to start
        while engine.use.nodes < 2:
            list(engine.map(time.sleep, (), [0.2] * 4))
    told: list[int] = []

    def kill(stage: str, done: int, total: int, detail: str = "") -> None:
        del detail
        if stage == "calibrating" and done < total:
            told.append(done)
            if len(told) == 3:  # parts are under way
                two_nodes()

    found = measured(proto, data, engine, progress=kill)
    assert len(told) > 3
    # To the last bit what comes of the same parts in one process, and up to the order of sums what
    # comes of all at once.
    assert_alike(found, measured(proto, data, Apart()), exactly=True)
    assert_alike(found, measured(proto, data, IN_PLACE))
    # The node that is left does the rest, and an error comes as what it is.
    data[20]["image"][:] = 1e25
    with pytest.raises(ModelError) as here:
        measured(proto, data, IN_PLACE, "one-sided")
    with pytest.raises(ModelError, match=re.escape(str(here.value))):
        measured(proto, data, engine, "one-sided")
    # So does one of a model whose weights are not there; groups of weights go side by side.
    ModelStore.load(proto).save(tmp_path / "m.onnx", save_as_external_data=True)
    store = ModelStore.load(tmp_path / "m.onnx")
    (tmp_path / "m.onnx.data").unlink()
    with engine, pytest.raises(ModelError, match=r"m\.onnx: node .*m\.onnx\.data"):
        list(engine.map(isinstance, (store,), [ModelStore]))
    small = {"method": "one-sided", "memory_budget": 2**20}
    rest = images(6)
    assert_alike(
        measured(proto, rest, engine, **small),
        measured(proto, rest, Apart(), **small),
        exactly=True,
    )


@needs_ray
@of_ray
def test_a_ray_of_our_own_lives_as_long_as_the_work(tmp_path, capsys):
    import ray

    onnx.save(synthetic_vit.build(TINY), tmp_path / "m.onnx")
    np.savez(tmp_path / "d.npz", image=np.concatenate([feed["image"] for feed in images(20)]))
    given = ["analyze", str(tmp_path / "m.onnx"), "--data", str(tmp_path / "d.npz"), "--json"]
    assert main([*given, "--engine", "ray"]) == 0
    assert not ray.is_initialized()
    shared, said = capsys.readouterr()
    assert not said
    assert main(given) == 0
    found, wanted = json.loads(shared), json.loads(capsys.readouterr().out)
    engine = found.pop("engine")
    assert wanted.pop("engine") is None
    assert found.pop("run")["verb"] == wanted.pop("run")["verb"]
    assert found == wanted
    assert (engine["name"], engine["nodes"]) == ("ray", 1)
    assert engine["tasks"] > engine["workers"] > 0
    use = EngineUse(name="ray", nodes=2, workers=3, tasks=40)
    said = [str(text) for text in sentences((), {}, use)]
    assert said == ["Statistics by ray: 40 tasks, done by 3 workers on 2 machines."]
