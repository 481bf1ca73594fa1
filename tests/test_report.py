"""Reports as pages: what they say, that they let nothing in, and that they show in a browser."""

import json
import random
import re
import shlex
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from builders import model, noise

import onnx_utilrank
from onnx_utilrank.cli.main import main
from onnx_utilrank.errors import ModelError
from onnx_utilrank.report.html.parts import number, quantity
from onnx_utilrank.report.html.render import render, shortened
from onnx_utilrank.report.read import read_content

HOSTILE = "\"><img src=x onerror=alert(1)><script>alert(1)</script>\u202e\x07$x$ & 'é'"
LONG = "very/long/" * 200

SCHEMA = json.loads(
    (Path(onnx_utilrank.__file__).parent / "report" / "schema.json").read_text(encoding="utf8")
)
VERBS = SCHEMA["$defs"]["RunRecord"]["properties"]["verb"]["enum"]


class Page(HTMLParser):
    """A page as its elements; it fails where they are not closed in order."""

    VOID = frozenset({"meta", "input", "img"})

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.within: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        assert not self.within

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.within.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.within.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def sections(self) -> list[str]:
        return [str(a["id"]) for tag, a in self.elements if tag == "section"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model with hostile names of nodes and weights, data, and a report of its compression."""
    folder = tmp_path_factory.mktemp("report")
    proto = model(
        "(float[n,96] x) => (float[n,10] y)",
        "h = MatMul(x, A) t = Tanh(h) z = MatMul(t, C) y = MatMul(z, B)",
        A=(noise(1, 96, 96) / 9 * 0.9 ** np.arange(96)).astype(np.float32),
        B=(noise(2, 96, 10) / 9).astype(np.float32),
        C=(noise(3, 96, 96) / 9 * 0.9 ** np.arange(96)).astype(np.float32),
    )
    renamed = {"A": HOSTILE, "C": LONG}
    for each in proto.graph.initializer:
        each.name = renamed.get(each.name, each.name)
    for node in proto.graph.node:
        for k, name in enumerate(node.input):
            node.input[k] = renamed.get(name, name)
    proto.graph.node[0].name, proto.graph.node[2].name = HOSTILE, LONG
    onnx.save(proto, folder / "m.onnx")
    np.savez(folder / "d.npz", x=noise(5, 200, 96).astype(np.float32))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        words = ["compress", "m.onnx", "--data", "d.npz", "-o", "s.onnx", "--param-ratio", "0.7"]
        assert main([*words, "--report", "r.json"]) == 0
        assert main(["report", "r.json", "-o", "r.html"]) == 0
    return folder


@pytest.fixture(scope="module")
def text(folder) -> str:
    return (folder / "r.html").read_text(encoding="utf8")


def test_a_page_has_all_sections_of_a_compression(text):
    assert Page(text).sections == [
        *("summary", "comparison", "utilization", "spectra", "parameters", "time", "depth"),
        *("calibration", "left-alone", "plan", "provenance"),
    ]


def test_a_page_says_what_the_report_says(folder, text):
    content = read_content(folder / "r.json")
    shown = " ".join("".join(Page(text).words).split())
    plan, found = content["plan"], content["validation"]
    kept = plan["parameters_after"] / plan["parameters_before"]
    assert kept <= 0.7
    assert "Asked for 0.7" in shown.replace("Asked for0.7", "Asked for 0.7")
    for figure in (f"{kept:.3f}", f"{plan['parameters_after']:,} of {plan['parameters_before']:,}"):
        assert figure in shown
    assert found["providers"][0]["provider"] in shown
    for file in content["run"]["files"]:
        assert file["sha256"] in shown
    assert "onnx-utilrank compress m.onnx --data d.npz -o s.onnx --param-ratio 0.7" in shown
    for entry in plan["entries"]:
        assert entry["reason"] in shown
    # The plan can be copied from the page, and is the plan.
    code = re.search(r"<code>(\{.*?\})\n</code>", text, re.DOTALL)
    assert code is not None
    written = "".join(Page(f"<p>{code[1]}</p>").words)
    assert json.loads(written) == plan


def test_the_command_can_be_copied_to_a_shell(folder):
    content = read_content(folder / "r.json")
    words = [
        *content["run"]["command"],
        "--labels",
        "a b",
        "--cache",
        f"/{LONG[:60]}",
        "--no-augment",
    ]
    text = render({**content, "run": {**content["run"], "command": words}})
    code = re.search(r"<code>(onnx-utilrank .*?)\n</code>", text, re.DOTALL)
    assert code is not None
    lines = "".join(Page(f"<p>{code[1]}</p>").words).split("\n")
    assert len(lines) > 1
    assert shlex.split("".join(line.removesuffix("\\") for line in lines)) == words


def test_it_needs_nothing_from_elsewhere(text):
    page = Page(text)
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == 1
    assert not {"link", "img", "iframe", "object", "embed", "base", "form"} & set(tags)
    for tag, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes), tag
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#")
    assert "url(http" not in text
    (policy,) = (a["content"] or "" for _, a in page.elements if "http-equiv" in a)
    assert policy.startswith("default-src 'none'; ")
    assert "script-src 'sha256-" in policy
    assert len(text) < 1_000_000


def test_hostile_names_are_shown_and_are_nothing_else(text):
    page = Page(text)
    assert "<img" not in text.replace("&lt;img", "")
    assert "alert(1)</script>" not in text
    assert any("<script>alert(1)</script>" in word for word in page.words)
    # What turns writing round, and what a terminal would obey, are spelled out.
    assert "\u202e" not in text
    assert "\x07" not in text
    assert r"\u202e\x07" in text
    # Long names lose their middle where they are shown, and are whole where one points.
    assert any(LONG in word for word in page.words)  # in the plan
    assert any(a.get("title") == LONG for _, a in page.elements)


def test_names_keep_their_ends_when_they_are_shortened():
    short = shortened("/model/encoder/" + "x" * 200 + "/query/MatMul")
    assert len(short) <= 90
    assert short.startswith("/model/encoder/")
    assert short.endswith("/query/MatMul")
    assert shortened("x" * 90) == "x" * 90


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        *((None, "–"), (0, "0"), (0.0, "0"), (1234567, "1,234,567"), (0.12345, "0.123")),
        *((1.5e-7, "1.50e−07"), (-0.25, "−0.25"), ("Infinity", "∞"), (123456.7, "123,457")),
        (999.6, "1,000"),
    ],
)
def test_figures_are_written_for_people(value, shown):
    assert number(value) == shown


def test_bytes_are_written_in_the_unit_that_fits():
    assert [quantity(n) for n in (None, 12, 2048, 3 * 2**20, 5 * 2**30)] == [
        *("–", "12 bytes", "2.00 KiB", "3.00 MiB", "5.00 GiB")
    ]


# --- anything that has the form -----------------------------------------------------------------


def instance(schema: dict[str, Any], rng: random.Random, most: int) -> Any:
    """Something that fits a schema: lists of at most so many items, odd figures, hostile texts."""
    if "$ref" in schema:
        return instance(SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]], rng, most)
    if "anyOf" in schema:
        return instance(rng.choice(schema["anyOf"]), rng, most)
    if "enum" in schema:
        return rng.choice(schema["enum"])
    kind = schema["type"]
    if isinstance(kind, list):
        kind = rng.choice(kind)
    if kind == "object":
        if "properties" in schema:
            wanted = schema["required"]
            return {k: instance(schema["properties"][k], rng, most) for k in wanted}
        inner = schema["additionalProperties"]
        return {f"k{k}": instance(inner, rng, most) for k in range(rng.randint(0, most))}
    if kind == "array":
        if "prefixItems" in schema:
            return [instance(each, rng, most) for each in schema["prefixItems"]]
        return [instance(schema["items"], rng, most) for _ in range(rng.randint(0, most))]
    return {
        "null": lambda: None,
        "boolean": lambda: rng.random() < 0.5,
        "string": lambda: rng.choice(["", HOSTILE, "w"]),
        "integer": lambda: rng.choice([0, 1, 7, -3, 10**17]),
        "number": lambda: rng.choice([0.0, 0.3, 1.0, -2.5, 1e-300, 1e17]),
    }[kind]()


@pytest.mark.parametrize("most", [0, 2])
@pytest.mark.parametrize("verb", VERBS)
def test_whatever_fits_the_schema_becomes_a_page(verb, most, tmp_path):
    rng = random.Random(f"{verb} {most}")
    content = instance(SCHEMA["$defs"][verb], rng, most)
    content["run"]["verb"] = verb
    path = tmp_path / "any.json"
    path.write_text(json.dumps(content), encoding="utf8")
    page = Page(render(read_content(path)))
    assert page.sections[0] == "summary"
    assert page.sections[-1] == "provenance"
    assert sum(tag == "script" for tag, _ in page.elements) == 1
    assert not any(tag == "img" for tag, _ in page.elements)


# --- files --------------------------------------------------------------------------------------


def altered(folder: Path, **changes: Any) -> str:
    content = json.loads((folder / "r.json").read_text(encoding="utf8"))
    return json.dumps(content | changes)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("NaN", "NaN is no number of JSON"),
        ('{"run": {"verb": "compress"}, "samples": 1e999}', "1e999 is too large"),
        ("[]", "it names no verb"),
        ('{"run": 3}', "it names no verb"),
        ('{"run": {"verb": ["compress"]}}', "it names no verb"),
        ('{"run": {"verb": "completion"}}', "it names no verb"),
        ('{"run": {"verb": "compress"}}', "not a report of `compress` in this version"),
        ({"more": 1}, "'more' was unexpected"),
        ({"samples": "many"}, "$.samples: 'many' is not of type 'integer'"),
    ],
)
def test_what_is_no_report_ends_in_one_line(content, said, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = content if isinstance(content, str) else altered(folder, **content)
    Path("given.json").write_text(given, encoding="utf8")
    assert main(["report", "given.json", "-o", "out.html"]) == 5
    (line,) = capsys.readouterr().err.splitlines()
    assert "given.json" in line
    assert said in line
    assert not Path("out.html").exists()


def test_files_that_are_not_there_and_outputs_that_may_not_be(folder, tmp_path, capsys):
    out = str(tmp_path / "o.html")
    assert main(["report", str(tmp_path / "no.json"), "-o", out]) == 5
    assert main(["report", str(folder / "m.onnx"), "-o", out]) == 5
    given = str(folder / "r.json")
    assert main(["report", given, "-o", given]) == 2
    assert main(["report", given, "-o", str(tmp_path / "no" / "o.html")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 4
    assert list(tmp_path.iterdir()) == []


def test_a_page_at_once_says_the_same_as_one_made_later(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    words = ["analyze", "m.onnx", "--data", "d.npz", "--report"]
    assert main([*words, str(tmp_path / "a.HTML")]) == 0
    assert main([*words, str(tmp_path / "a.json")]) == 0
    assert main(["report", str(tmp_path / "a.json"), "-o", str(tmp_path / "b.html")]) == 0

    def told(name: str) -> str:
        text = (tmp_path / name).read_text(encoding="utf8")
        text = re.sub(r"\d{4}-\d\d-\d\dT[\d:+]*", "", text).replace("a.HTML", "a.json")
        return re.sub(r"[\d.]+ s\b", "", text)

    assert told("a.HTML") == told("b.html")


def test_from_python(folder, tmp_path):
    report = onnx_utilrank.analyze(folder / "m.onnx", folder / "d.npz")
    onnx_utilrank.write_report(report, tmp_path / "a.html")
    text = (tmp_path / "a.html").read_text(encoding="utf8")
    assert "Called from Python: onnx_utilrank.analyze." in text
    onnx_utilrank.write_report(report, tmp_path / "a.json")
    content = read_content(tmp_path / "a.json")
    assert content["run"]["command"] is None
    assert content["layers"] == json.loads(json.dumps(report.as_dict()))["layers"]
    onnx_utilrank.write_report(tmp_path / "a.json", tmp_path / "b.html")
    assert Page((tmp_path / "b.html").read_text(encoding="utf8")).sections == Page(text).sections
    with pytest.raises(ModelError, match="cannot be written"):
        onnx_utilrank.write_report(report, tmp_path / "no" / "a.html")


# --- in a browser -------------------------------------------------------------------------------

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_a_browser_runs_nothing_but_the_tables(text, tmp_path):
    """Titles tell what ran: that of the page, or what a name or our script made of it."""
    probe = "<script>document.title='in'</script><img src=x onerror=document.title='in'>"
    for name, page in (("page", text), ("probed", text.replace("</main>", f"{probe}</main>"))):
        path = tmp_path / f"{name}.html"
        path.write_text(page, encoding="utf8")
        done = subprocess.run(
            [
                *(str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom"),
                *(f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=1000"),
                path.as_uri(),
            ],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        shown = done.stdout
        assert "<title>compress m.onnx</title>" in shown, done.stderr
        # The script made heads into buttons, and gave the long table a field.
        assert 'aria-sort="none"' in shown
        assert shown.count("<img") == (name == "probed")
