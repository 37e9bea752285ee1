"""A run's rows as a tidy table: one value per line, for pandas and for plots.

============  ============================================================================
``run``       label of the run; runs that differ in their seed alone share one
``seed``      of the run
``step``      after how many updates
``kind``      ``train`` (the ledger), ``evaluation``, ``rates``; ``target``: what the config
              asks of the shares
``quantity``  ``loss``, ``weight``, ``share_embeddings``, ``recall@1``, ...
``name``      the objective (``conflict``: both, as ``pair_proxy``; ``learning_rate``: the
              group); empty for what is the run's own
``value``     float
============  ============================================================================
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # at run time pandas is loaded when a table is made
    from pandas import DataFrame

COLUMNS = ("run", "seed", "step", "kind", "quantity", "name", "value")


def tidy(rows: Iterable[Mapping[str, Any]], *, run: str, seed: int) -> DataFrame:
    """The table of one run.

    Args:
      rows: as :func:`mmljax.runs.writer.read_metrics` gives them.
      run: the run's label.
      seed: the run's seed.
    """
    import pandas as pd

    lines = []
    for row in rows:
        for key, value in row.items():
            if key not in ("step", "kind"):
                quantity, _, name = key.partition("/")
                lines.append((run, seed, row["step"], row["kind"], quantity, name, float(value)))
    table = pd.DataFrame(lines, columns=list(COLUMNS))
    return table.astype({"seed": "int64", "step": "int64", "value": "float64"})


def share_targets(config: Mapping[str, Any]) -> dict[str, float]:
    """What a run's config asks of the shares, keyed as a row of the ledger; empty if nothing.

    Args:
      config: what ``config.json`` holds.
    """
    combination = config["combination"]
    if combination["name"] != "share":
        return {}
    groups = {"embeddings": "embedding_shares", "proxies": "proxy_shares"}
    return {
        f"share_{group}/{name}": float(share)
        for group, key in groups.items()
        for name, share in combination[key].items()
    }
