"""The README's first run: it learns, and ends with what it promises."""

from __future__ import annotations

import pytest

import small_runs

pytestmark = pytest.mark.slow


def test_it_learns(quickstart):
    results = small_runs.results(quickstart.folder)
    trained, untrained = results["scores"], results["untrained"]
    print("trained", trained, "untrained", untrained)
    assert trained["recall@1"] >= 3 * untrained["recall@1"]
    assert trained["recall@1"] >= 10 * trained["chance"]


def test_it_ends_with_what_it_promises(quickstart):
    assert "eta" in quickstart.stderr
    for line in ("Recall@1 ", "checkpoint ", "results ", "plot ", "page "):
        assert line in quickstart.stdout
    for name in ("contributions.png", "results.json", "metrics.jsonl", "page.html", "tensorboard"):
        assert (quickstart.folder / name).exists()
