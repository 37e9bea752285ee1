"""Griffe extension: document public losses and miners, which are made at import, by inspection."""

import importlib
import inspect
import re
from typing import Any

import griffe

MODULES = ("mmljax.losses", "mmljax.miners", "mmljax.combinations")


class PublicFunctions(griffe.Extension):
    """Replace names whose function is made at import by what the imported function says."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Called when a package is loaded."""
        if pkg.path != "mmljax":
            return
        for path in MODULES:
            module = importlib.import_module(path)
            for name in module.__all__:
                parent = pkg[path.removeprefix("mmljax.")]
                parent.set_member(name, _function(getattr(module, name), name))
            parent.exports = list(module.__all__)


def _function(function: Any, name: str) -> griffe.Function:
    signature = inspect.signature(function)
    parameters = griffe.Parameters(
        *(
            griffe.Parameter(
                p.name,
                annotation=_annotation(p.annotation),
                kind=griffe.ParameterKind(p.kind.description),
                default=None if p.default is p.empty else repr(p.default),
            )
            for p in signature.parameters.values()
        )
    )
    return griffe.Function(
        name,
        parameters=parameters,
        returns=_annotation(signature.return_annotation),
        docstring=griffe.Docstring(inspect.getdoc(function) or "", parser="google"),
    )


def _annotation(annotation: Any) -> str:
    """The annotation without the modules of its types."""
    return re.sub(r"\b(?:\w+\.)+(?=\w)", "", inspect.formatannotation(annotation))
