"""Griffe extension: show doctests in docstrings as code, and Sphinx roles as names."""

from __future__ import annotations

import re
from typing import Any

import griffe

_DOCTEST = re.compile(r"^( *)>>> .*(?:\n(?! *$).*)*", re.MULTILINE)
_ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):(?=`)")


class Docstrings(griffe.Extension):
    """Puts a fence around every paragraph that begins with ``>>>``, and removes roles."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Called when a package is loaded."""
        if pkg.path == "mmljax":
            _rewrite(pkg)


def _rewrite(item: griffe.Object) -> None:
    if item.docstring is not None:
        text = _ROLE.sub("", item.docstring.value)
        item.docstring.value = _DOCTEST.sub(r"\1```pycon\n\g<0>\n\1```", text)
    for member in item.members.values():
        if isinstance(member, griffe.Object):  # an alias is an object of another module
            _rewrite(member)
