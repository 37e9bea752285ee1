"""The examples of every public module of retrieval run as written."""

from __future__ import annotations

import doctest
import importlib
import inspect

import pytest

MODULES = ("checks", "compare", "diagnostics", "metrics", "search", "streaming")


@pytest.mark.parametrize("name", ["metrics", *(f"retrieval.{name}" for name in MODULES)])
def test_examples(name: str) -> None:
    module = importlib.import_module(f"mmljax.{name}")
    result = doctest.testmod(module)
    assert result.failed == 0
    assert result.attempted > 0


@pytest.mark.parametrize("name", ["metrics", "search", "streaming"])
def test_every_public_function_has_an_example(name: str) -> None:
    module = importlib.import_module(f"mmljax.retrieval.{name}")
    for key, function in inspect.getmembers(module, inspect.isfunction):
        if function.__module__ == module.__name__ and not key.startswith("_"):
            assert ">>>" in (function.__doc__ or ""), key
