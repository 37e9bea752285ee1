"""The parser and the runner that all verbs share."""

from __future__ import annotations

import importlib
import logging
import subprocess
import sys

import pytest

import small_runs
from mmljax.cli import main
from mmljax.cli.command import VERBS, parse
from mmljax.errors import Preempted, Unreachable, UserError


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], r"verb 'trian' is unknown; did you mean 'train'\?"),
        (["train", "--confg=x"], r"--confg is unknown; did you mean '--config'\?"),
        (["embed", "run", "--imags", "x"], r"--imags is unknown; did you mean '--images'\?"),
        (["page", "run", "--config.seed=1"], r"--config\.seed is unknown"),
        (["page", "run", "--wor=3"], r"--wor is unknown; did you mean '--worst'\?"),
        (["train", "extra"], "extra"),
        (["page"], "RUN.*mmljax page --help"),
        ([], "VERB"),
        (["compare", "a", "b", "--resamples=0"], "--resamples: must be at least 1, found 0"),
        (["compare", "a", "b", "--seed=many"], "--seed: invalid whole number value: 'many'"),
        (["embed", "a", "--images", "b", "--split=query", "--output=c"], "not allowed with"),
        (["train", "--config.data.flip"], "--config.data.flip needs a value"),
        (["train", "--config.data.flip", "--workdir=x"], "--config.data.flip needs a value"),
    ],
)
def test_a_wrong_word_is_named_with_the_nearest(words, message):
    with pytest.raises(UserError, match=message):
        parse(words)


def test_overrides_are_collected_in_order():
    given = ["--config.a.b=1", "--config", "x.py", "--config.c", "-2", "--config.d=e=f g"]
    options = parse(["train", *given, "--config.a.b", "(1, 2)"])
    assert options.overrides == ["a.b=1", "c=-2", "d=e=f g", "a.b=(1, 2)"]
    assert options.config == "x.py"


def test_words_after_a_double_dash_are_no_flags():
    assert str(parse(["page", "--worst=3", "--", "--config.odd"]).run) == "--config.odd"


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_an_example(verb, capsys):
    with pytest.raises(SystemExit) as end:
        main([verb, "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert f"\n    mmljax {verb} " in shown
    example = shown.partition(f"\n    mmljax {verb} ")[2].partition("\n")[0].split()
    assert parse([verb, *example]).verb == verb


def test_help_imports_neither_jax_nor_numpy():
    program = (
        "import sys\n"
        "from mmljax.cli import main\n"
        "for words in (['--help'], ['embed', '--help']):\n"
        "    try: main(words)\n"
        "    except SystemExit as end: assert end.code == 0\n"
        "assert main(['trian']) == 2\n"
        "print(sorted({'jax', 'numpy', 'tensorflow', 'absl'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=small_runs.ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert done.stderr == "mmljax: error: verb 'trian' is unknown; did you mean 'train'?\n"


@pytest.mark.parametrize("module", ["mmljax", "mmljax.main"])
def test_modules_that_start_the_command_line(module):
    words = ["train"] if module == "mmljax" else []
    done = subprocess.run(
        [sys.executable, "-m", module, *words, "--help"],
        cwd=small_runs.ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: mmljax train ")


WORDS = {  # valid arguments of each verb
    **{verb: [] for verb in ("train", "doctor", "sweep", "plan", "evaluate")},
    **{verb: ["RUN"] for verb in ("page", "atlas", "interpolate", "threshold")},
    "features": ["--output=x"],
    "embed": ["RUN", "--split=query", "--output=x"],
    "search": ["RUN", "--split=query", "--embeddings=x"],
    "demo": ["RUN", "--gallery=x"],
    "inspect": ["photos", "--output=x"],
    "export": ["RUN", "--output=x"],
    "compare": ["RUN_A", "RUN_B"],
    "prepare": ["MANUAL_DIR", "DATA_DIR"],
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("wrong\n\x1b[31mfile \udcff"), 2, "error: wrong \\x1b[31mfile \\udcff"),
        (UserError("no " + "x" * 5000), 2, f"error: no {'x' * 150}...{'x' * 40}"),
        (Unreachable("gs://b/r is away"), 1, "error: gs://b/r is away"),
        (Preempted("saved at step 3"), 75, "saved at step 3; the same command resumes the run"),
        (KeyboardInterrupt(), 130, "interrupted; run the same command again"),
        (PermissionError(13, "Permission denied", "a/b"), 2, "error: a/b: Permission denied"),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(verb, error, code, line, monkeypatch, capsys):
    def fail(options):
        raise error

    monkeypatch.setattr(importlib.import_module(f"mmljax.cli.{verb}"), "run", fail)
    assert main([verb, *WORDS[verb]]) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"mmljax: {line}")
    assert shown.err.count("\n") == 1


@pytest.mark.parametrize(
    ("verb", "flag"),
    [
        *(
            (verb, "--output")
            for verb in ("atlas", "embed", "export", "features", "inspect", "page", "search")
        ),
        ("interpolate", "--output"),
        ("threshold", "--output"),
        ("search", "--embeddings"),
        ("plan", "--cache"),
    ],
)
def test_an_address_is_refused_where_only_files_of_this_machine_will_do(verb, flag, capsys):
    assert main([verb, *WORDS[verb], f"{flag}=gs://bucket/x"]) == 2
    said = capsys.readouterr().err
    text = "'gs://bucket/x' is an address; give a path of this machine (--workdir and runs may be"
    assert said.startswith(f"mmljax: error: argument {flag}: {text}")
    assert said.count("\n") == 1


def test_an_error_of_the_program_is_no_users_mistake(monkeypatch):
    from mmljax.cli import page

    def fail(options):
        raise ValueError("a defect")

    monkeypatch.setattr(page, "run", fail)
    with pytest.raises(ValueError, match="a defect"):
        main(["page", "RUN"])


def test_log_lines_are_escaped_and_the_logger_is_restored(monkeypatch, capsys):
    from mmljax.cli import page

    log = logging.getLogger("mmljax.data")
    monkeypatch.setattr(page, "run", lambda options: log.info("a\x1b[2Jb\nc") or 0)
    before = logging.getLogger("mmljax").handlers[:], sys.unraisablehook
    assert main(["page", "RUN"]) == 0
    assert capsys.readouterr().err == "a\\x1b[2Jb\nc\n"
    assert (logging.getLogger("mmljax").handlers, sys.unraisablehook) == before
