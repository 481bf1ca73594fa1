"""What only a CUDA device can show."""

import dataclasses

import numpy as np
import pytest
from builders import model

from onnx_utilrank import BenchmarkConfig, ValidateConfig, benchmark, validate
from onnx_utilrank.errors import ConfigError, ProviderUnavailableError
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.runtime.cuda_driver import device_fault
from onnx_utilrank.runtime.memory import measure_memory
from onnx_utilrank.runtime.providers import PROVIDERS, find_provider
from onnx_utilrank.runtime.sessions import open_session

pytestmark = pytest.mark.gpu

RNG = np.random.default_rng(0)
WEIGHT = RNG.standard_normal((256, 256), dtype=np.float32) / 16
FEED = {"x": RNG.standard_normal((8, 256), dtype=np.float32)}


def linear(dtype: str = "float") -> ModelStore:
    weight = WEIGHT.astype(np.float16 if dtype == "float16" else np.float32)
    signature = f"({dtype}[N, 256] x) => ({dtype}[N, 256] y)"
    return ModelStore.load(model(signature, "[product] h = MatMul(x, W) y = Relu(h)", W=weight))


@pytest.fixture(params=[p.key for p in PROVIDERS if p.nvidia])
def provider(request):
    try:
        found = find_provider(request.param)
        open_session(linear(), found)
    except ProviderUnavailableError as e:
        pytest.skip(device_fault() or str(e))
    return found


def test_nodes_run_there_and_nothing_is_copied(provider):
    session = open_session(linear(), provider)
    assert session.placement().fallen == ()
    binding = session.bind(FEED)
    assert not binding.copies
    assert binding.run() > 0


def test_options_pass_and_wrong_ones_are_named(provider):
    given = dataclasses.replace(provider, options=(("device_id", "0"),))
    assert (
        open_session(linear(), given).raw.get_provider_options()[provider.name]["device_id"] == "0"
    )
    wrong = dataclasses.replace(provider, options=(("device_id", "0"), ("nonsense", "1")))
    with pytest.raises(ConfigError, match="refuses option nonsense=1"):
        open_session(linear(), wrong)


@pytest.mark.parametrize(("dtype", "limit"), [("float", 1e-2), ("float16", 2e-2)])
def test_outputs_agree_between_providers_and_types(provider, dtype, limit):
    # Products may be of TensorFloat-32, whose significand has the 11 bits of float16.
    config = ValidateConfig(providers=("cpu", provider.key), max_error=limit)
    report = validate(linear(), linear(dtype), [FEED], config)
    assert report.passed, report.failures
    (itself,) = report.providers[1].against_first
    assert itself.relative_error < limit


def test_memory_of_the_device_is_measured(provider):
    found = measure_memory(linear(), provider, FEED)
    assert found.failure is None
    assert found.device >= WEIGHT.nbytes


def test_benchmark_tells_memory_of_the_device(provider):
    config = BenchmarkConfig(providers=(provider.key,), seconds=0.0)
    (case,) = benchmark(linear(), [linear("float16")], config=config).cases
    assert all(m.device for m in case.memory)
    assert not case.latencies[0].copies
