"""The compare command: runs of different protocols are refused unless forced."""

from __future__ import annotations

import numpy as np
import pytest

from commands import run
from mmljax.errors import UserError
from mmljax.retrieval import records as record_files

PROTOCOL = {"queries": 6, "crop": 28}


def records(values: list[float], *, protocol: dict | None = None) -> record_files.Records:
    names = np.array([f"image {i}" for i in range(len(values))])
    labels = np.array([0, 0, 0, 1, 1, 2][: len(values)])
    scores = {"recall@1": np.array(values, np.float32)}
    return record_files.Records(protocol or PROTOCOL, 7, names, labels, scores)


def test_runs_of_other_protocols_are_refused_unless_forced(tmp_path, capsys) -> None:
    for name, protocol in (("a", PROTOCOL), ("b", PROTOCOL | {"crop": 32})):
        (tmp_path / name).mkdir()
        record_files.write_records(tmp_path / name, records([1, 0, 0, 1, 0, 0], protocol=protocol))
    paths = tmp_path / "a", tmp_path / "b"
    with pytest.raises(UserError, match="crop: 28"):
        run("compare", *paths)
    run("compare", *paths, "--force")
    shown = capsys.readouterr()
    assert "crop" in shown.err
    assert "+0.00 to +0.00" in shown.out
