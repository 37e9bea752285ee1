"""Commands, settings and files that the README and the docs name, also within a sentence, exist.

``tests/test_documented.py`` runs the blocks of code.
"""

from __future__ import annotations

import re
import shlex

import pytest

import mmljax
from documented import PAGES, ROOT
from mmljax.cli import command
from mmljax.config import Config, from_mapping, load_config

README = (ROOT / "README.md").read_text()
COMMAND = re.compile(
    r"(?:\w+=\S+ )*(?:\S*/)?(?:mmljax|python -m mmljax(?P<module>\.[\w.]+)?)(?: +|$)"
)


def test_commands_that_ci_reads_are_there():
    for marker in ("run-command", "test-command"):
        (block,) = re.findall(rf"<!-- {marker} -->\n```bash\n(.+)\n```\n", README)
        assert block.count("\n") == 0
        assert block.count(" && ") == 2


def bind(config: Config) -> None:
    """Bind the losses, miners and combination of a config, so that wrong names are errors."""
    mmljax.MultiObjective(
        config.objectives,
        classes=10_000,
        dimension=8,
        combination=config.combination.name,
        combination_params=config.combination.params,
        surgery=config.combination.surgery,
    )


def documented_commands() -> list[tuple[str, str]]:
    """``(page, command)`` of every command line of mmljax in the README and the docs."""
    found = []
    for page in PAGES:
        text = page.read_text()
        blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
        spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
        lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
        for line in [*lines, *spans]:
            for part in line.split(" && "):
                if match := COMMAND.match(part):
                    verb = {None: "", ".main": "train "}.get(match["module"], f"{match['module']} ")
                    found.append((str(page.relative_to(ROOT)), verb + part[match.end() :]))
    return found


@pytest.mark.parametrize(("page", "line"), documented_commands())
def test_documented_command_parses(page, line, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(re.sub(r"\$\([^)]*\)", "FILE", line), comments=True)
    if not words or words[0] == "VERB" or words[-1] in ("...", "--help"):
        return  # prose that names the program or a form of command
    if len(words) == 1 and words[0] in command.VERBS:
        return  # prose that names a verb
    options = command.parse(words)
    if getattr(options, "config", None) in (None, "mine.py", "FILE.py"):
        return
    bind(load_config(options.config, options.overrides))


def test_documented_settings_are_keys_of_the_config():
    """Also settings that are named outside a command, such as ``--config.row_block=8192``."""
    settings = {
        match[1]
        for page in PAGES
        for match in re.finditer(r"--config\.([a-z_]+(?:\.[a-z0-9_]+)*)", page.read_text())
    }
    assert settings
    defaults = mmljax.default_config()
    from_mapping(defaults)
    for setting in settings:
        node = defaults
        for name in setting.split("."):
            if name in ("params", "mining_params"):
                break  # hyperparameters are checked when they are bound
            assert name in node, setting
            node = node[name]


def test_files_and_tests_named_in_the_docs_exist():
    text = "\n".join(page.read_text() for page in PAGES)
    folders = "benchmarks|configs|examples|launch|mmljax|notebooks|tests"
    files = set(re.findall(rf"`((?:{folders})/[\w/]+\.(?:py|ipynb|sh))", text))
    modules = {f"{name.replace('.', '/')}.py" for name in re.findall(r"benchmarks\.[a-z_]+", text)}
    assert not [name for name in files | modules if not (ROOT / name).is_file()]
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    named = set(re.findall(r"`(test_[a-z0-9_]+)`", text))
    assert not [name for name in named if f"def {name}(" not in tests]
