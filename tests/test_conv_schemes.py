"""The tool that compares four ways to store a Conv, on weights of which the answer is known."""

import importlib
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from builders import model

TOOLS = Path(__file__).resolve().parent.parent / "tools"
RNG = np.random.default_rng(0)
WIDTH = 6 * 9
EYE = torch.eye(WIDTH, dtype=torch.float64)


@pytest.fixture
def schemes(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    return importlib.import_module("conv_schemes")


def drawn(*shape: int) -> torch.Tensor:
    return torch.from_numpy(RNG.standard_normal(shape))


def weight_of(scheme: str) -> torch.Tensor:
    """A weight [8, 6, 3, 3] that the scheme can hold in two ranks."""
    equation, shapes = {
        "A": ("mr,rchw->mchw", [(8, 2), (2, 6, 3, 3)]),
        "B": ("mrhw,rc->mchw", [(8, 2, 3, 3), (2, 6)]),
        "C": ("mrw,rch->mchw", [(8, 2, 3), (2, 6, 3)]),
        "D": ("mr,rshw,sc->mchw", [(8, 2), (2, 2, 3, 3), (2, 6)]),
    }[scheme]
    return torch.einsum(equation, *(drawn(*shape) for shape in shapes))


@pytest.mark.parametrize("scheme", "ABCD")
def test_each_holds_what_it_is_made_for(schemes, scheme):
    weight = weight_of(scheme)
    errors = {key: schemes.fitted_error(key, weight, 0.4, EYE, EYE) for key in schemes.SCHEMES}
    assert errors[scheme] < 1e-20
    # A and B hold what D can, which is a product of both; else none holds another's weights.
    others = {"A": "BC", "B": "AC", "C": "ABD", "D": "C"}[scheme]
    assert all(errors[key] > 1e-3 for key in others)


@pytest.mark.parametrize("share", [0.75, 0.5, 0.3])
@pytest.mark.parametrize("scheme", "ABCD")
def test_no_scheme_has_more_parameters_than_its_share(schemes, scheme, share):
    weight = drawn(8, 6, 3, 3)
    begin, make = schemes.SCHEMES[scheme]
    factors = begin(weight, share)
    assert sum(f.numel() for f in factors) <= share * weight.numel()
    assert make(factors, weight.shape).shape == weight.shape


def test_a_is_the_optimum_that_is_known(schemes):
    weight, rows = drawn(8, 6, 3, 3), drawn(200, WIDTH)
    moment = rows.T @ rows
    found = schemes.fitted_error("A", weight, 0.5, moment, moment)
    # Eckart and Young, on what the layer makes of the rows.
    spectrum = torch.linalg.svdvals(rows @ weight.reshape(8, -1).T) ** 2
    rank = int(0.5 * 8 * WIDTH / (8 + WIDTH))
    assert found == pytest.approx(float(spectrum[rank:].sum() / spectrum.sum()), rel=1e-6)


FAKE_ZOO = """
import sys
import numpy as np
images = np.random.default_rng(0).standard_normal((4, 6, 8, 8), dtype=np.float32)
np.savez(sys.argv[4], x=images)
"""


def test_it_prints_a_table(schemes, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "zoo"
    (folder / "tiny").mkdir(parents=True)
    (folder / "zoo.py").write_text(FAKE_ZOO)
    kernel = weight_of("C").numpy().astype(np.float32)
    signature = "(float[N, 6, 8, 8] x) => (float[N, 8, 8, 8] y)"
    made = model(signature, "y = Conv<pads=[1, 1, 1, 1]>(x, W)", W=kernel)
    onnx.save(made, folder / "tiny" / "model.onnx")
    monkeypatch.setattr(schemes, "SHARES", (0.5,))
    assert schemes.main(["--zoo", str(folder), "--models", "tiny"]) == 0
    row = capsys.readouterr().out.splitlines()[-1].split(" | ")
    assert row[:3] == ["| tiny", "1", "50 %"]
    assert float(row[5]) < 1e-9 < 1e-3 < float(row[3])  # C and A, in float32


def test_a_model_without_such_a_conv(schemes, tmp_path, capsys):
    folder = tmp_path / "zoo"
    (folder / "tiny").mkdir(parents=True)
    (folder / "zoo.py").write_text(FAKE_ZOO)
    signature = "(float[N, 6, 8, 8] x) => (float[N, 6, 8, 8] y)"
    onnx.save(model(signature, "y = Relu(x)"), folder / "tiny" / "model.onnx")
    assert schemes.main(["--zoo", str(folder), "--models", "tiny"]) == 5
    assert "no Conv of several taps" in capsys.readouterr().err
