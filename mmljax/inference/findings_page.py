"""The page of ``mmljax inspect``: each finding beside the image that it is about."""

from __future__ import annotations

import base64
import math

from jinja2 import Environment, PackageLoader, StrictUndefined

from mmljax.data.thumbnails import thumbnail, webp
from mmljax.errors import UserError
from mmljax.inference.inspect_data import Finding, Report
from mmljax.types import Split

SHOWN = 100
"""Findings of each reason that the page shows; the list has all."""

_SIDE, _QUALITY = 128, 60


def render(report: Report, split: Split, *, title: str, summary: str) -> str:
    """The page as HTML, without references to other files.

    Args:
      report: the findings.
      split: of all images, in which their rows count.
      title: the name of the data.
      summary: a line of text.
    """
    reasons = dict.fromkeys(finding.reason for finding in report.findings)
    sections = []
    for reason in reasons:
        found = [finding for finding in report.findings if finding.reason == reason]
        shown = [_shown(finding, split) for finding in found[:SHOWN]]
        sections.append((reason, shown, len(found)))
    environment = Environment(
        loader=PackageLoader("mmljax.runs"), autoescape=True, undefined=StrictUndefined
    )
    template = environment.get_template("findings.html")
    return template.render(title=title, summary=summary, sections=sections)


def _shown(finding: Finding, split: Split) -> dict[str, object]:
    names = (finding.name, finding.other)
    pictures = [
        (_picture(split, row), name) for row, name in zip(finding.rows, names, strict=True) if name
    ]
    value = "" if math.isnan(finding.value) else f"{finding.value:.3f}"
    return {"shown": pictures, "value": value}


def _picture(split: Split, row: int) -> str:
    """A small WebP file in base64; empty for an image that cannot be decoded."""
    try:
        image = thumbnail(split, row, side=_SIDE)
    except UserError:
        return ""
    return base64.b64encode(webp(image, side=_SIDE, quality=_QUALITY)).decode()
