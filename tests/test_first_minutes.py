"""What a newcomer types first: nothing, --help, a verb that is not quite right."""

import argparse
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from onnx_utilrank.cli.completion import FILES
from onnx_utilrank.cli.main import START, VERBS, build_parser, main


@pytest.fixture
def call(capsys):
    """Run a command line: exit status, stdout, stderr."""

    def run(*words):
        try:
            status = main(words)
        except SystemExit as e:  # argparse
            status = e.code
        streams = capsys.readouterr()
        return status, streams.out, streams.err

    return run


def verbs_of(parser):
    (verbs,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return verbs.choices


def test_nothing_is_answered_with_a_start(call):
    status, out, err = call()
    assert (status, out) == (2, "")
    assert err == f"{START}\n"
    assert set(re.findall(r"onnx-utilrank (\w+)", START)) - {"makes", "VERB"} <= set(VERBS)
    assert max(map(len, START.splitlines())) <= 80


def test_commands_of_the_start_are_commands():
    parser = build_parser()
    for line in START.splitlines():
        if line.startswith("  onnx-utilrank"):
            parser.parse_args(shlex.split(line)[1:])


def test_little_is_loaded_before_a_verb_is_known():
    code = (
        "import sys; from onnx_utilrank.cli.main import main; main([]); "
        "print([m for m in ('torch', 'onnx', 'onnxruntime', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("verb", VERBS)
def test_help_fits_and_ends_with_an_example(verb, call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    status, out, _ = call(verb, "--help")
    assert status == 0
    assert max(map(len, out.splitlines())) <= 80
    assert len(out.splitlines()[0]) == len(out.split("\n\n")[0])  # usage in one line
    _, example = out.split("example:\n")
    command = shlex.split(re.sub(r"\\\n", " ", example))
    assert command[:2] == ["onnx-utilrank", verb]
    build_parser(verb).parse_args(command[1 : command.index(">") if ">" in command else None])


def test_every_verb_is_listed_in_one_line(call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    _, out, _ = call("--help")
    for verb, summary in VERBS.items():
        assert re.search(rf"^    {verb} +{re.escape(summary)}$", out, re.MULTILINE)


def test_files_are_known_to_completion():
    for verb in verbs_of(build_parser()).values():
        models = {a.metavar for a in verb._actions if not a.option_strings} - {"SHELL"}
        assert models <= FILES


def test_only_help_is_in_no_group():
    for verb in verbs_of(build_parser()).values():
        titles = [group.title for group in verb._action_groups]
        assert len(set(titles)) == len(titles)
        (loose,) = (g for g in verb._action_groups if g.title == "options")
        assert [a.dest for a in loose._group_actions] == ["help"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["compres"], "onnx-utilrank: error: there is no verb 'compres'; did you mean compress?"),
        (["xyzzy"], "onnx-utilrank: error: there is no verb 'xyzzy' ("),
        (["--hlep"], "onnx-utilrank: error: there is no option --hlep; did you mean --help?"),
        # Not that --data is missing, which is what argparse would say.
        (
            ["compress", "m", "--dta", "d"],
            "compress: error: there is no option --dta; did you mean",
        ),
        (
            ["inspect", "m", "--jsn=1"],
            "inspect: error: there is no option --jsn; did you mean --js",
        ),
        (["inspect", "m", "n"], "onnx-utilrank inspect: error: unrecognized arguments: n"),
        (["compress", "m"], "are required: --data"),
        (["compress", "m", "--data", "d"], "one of the arguments --param-ratio"),
        (["analyze", "m", "--data", "d", "--energy", "2"], "argument --energy: 2 is not in [0, 1]"),
    ],
)
def test_wrong_words_end_in_one_line(call, words, said):
    status, out, err = call(*words)
    assert (status, out) == (2, "")
    (line,) = err.splitlines()
    assert said in line
    assert "--help" in line


def test_options_may_be_cut_short_and_values_look_like_options(call):
    assert call("inspect", "--js", "missing.onnx")[0] == 5
    assert call("inspect", "--", "--missing.onnx")[0] == 5
    assert call("inspect", "--report=--r", "missing.onnx")[0] == 5


def test_completion_without_its_library_says_what_to_install(call, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        "onnx_utilrank.cli.completion.find_spec", lambda n: None if n == "shtab" else real(n)
    )
    status, out, err = call("completion", "bash")
    assert (status, out) == (2, "")
    assert "onnx-utilrank[completion]" in err


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_knows_verbs_and_options(call, shell):
    pytest.importorskip("shtab", reason="completion needs shtab")
    status, out, _ = call("completion", shell)
    assert status == 0
    for word in (*VERBS, "param-ratio", "provider"):
        assert word in out


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("onnx-utilrank ins", "inspect"),
        ("onnx-utilrank compress --param", "--param-ratio"),
        ("onnx-utilrank compress --method two", "two-sided"),
        ("onnx-utilrank inspect mod", "model.onnx"),
        ("onnx-utilrank completion z", "zsh"),
    ],
)
def test_bash_completes(call, line, found, tmp_path):
    pytest.importorskip("shtab", reason="completion needs shtab")
    _, script, _ = call("completion", "bash")
    (tmp_path / "model.onnx").touch()
    Path(tmp_path / "c.bash").write_text(
        f"{script}\nCOMP_WORDS=({line}); COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 ))\n"
        f"COMP_LINE='{line}'; COMP_POINT=${{#COMP_LINE}}\n"
        'set -- onnx-utilrank "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}"\n'
        '_shtab_onnx_utilrank "$@"; printf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    done = subprocess.run(
        ["bash", "c.bash"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert found in done.stdout.split(), done.stderr
