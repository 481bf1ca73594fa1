"""The page: sections by what a report holds, in one file that needs nothing else."""

import base64
import hashlib
from collections.abc import Callable
from importlib.resources import files

import jinja2
from markupsafe import Markup

from onnx_utilrank.errors import printable
from onnx_utilrank.report.html.comparing import (
    before_and_after,
    benchmark,
    depth,
    time,
    trade_off,
)
from onnx_utilrank.report.html.contents import inspection, installation
from onnx_utilrank.report.html.layers import (
    adequacy,
    left_alone,
    parameters,
    plan,
    repairs,
)
from onnx_utilrank.report.html.parts import Content, Section
from onnx_utilrank.report.html.provenance import provenance
from onnx_utilrank.report.html.spectra import spectra, utilization
from onnx_utilrank.report.html.summary import page_title, summary
from onnx_utilrank.report.html.training import training

__all__ = ["render"]

# In the order of the page. Each gives None where a report says nothing of it.
SECTIONS: tuple[Callable[[Content], Section | None], ...] = (
    *(summary, trade_off, before_and_after, benchmark, inspection, installation),
    *(utilization, spectra, parameters, repairs, time, depth, adequacy, left_alone),
    *(training, plan, provenance),
)

# Names are shortened in their middle from here on; the whole is shown where one points at it.
LONGEST = 90


def render(content: Content) -> str:
    """The page of a report.

    Args:
        content: What `schema.json` states of the verb that `content["run"]["verb"]` names.
    """
    folder = files("onnx_utilrank.report.html")
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: folder.joinpath(name).read_text("utf8")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["shortened"] = shortened
    script = folder.joinpath("tables.js").read_text("utf8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    sections = [made for section in SECTIONS if (made := section(content)) is not None]
    return environment.get_template("page.html").render(
        title=page_title(content),
        sections=sections,
        run=content["run"],
        style=Markup(folder.joinpath("page.css").read_text("utf8")),
        cards=Markup(folder.joinpath("cards.css").read_text("utf8")),
        script=Markup(script),
        digest=Markup(digest),
    )


def shortened(text: str, longest: int = LONGEST) -> str:
    """A text without its middle, where it is long: names of nodes differ at their ends."""
    if len(text) <= longest:
        return text
    return f"{text[: longest // 2]}…{text[-longest // 2 + 1 :]}"


def _shown(value: object) -> object:
    """What is put in, with characters that are not seen or turn others round spelled out."""
    if isinstance(value, Markup):
        return value
    return printable(str(value))
