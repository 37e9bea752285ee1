"""The README's own code runs and does what it is shown for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_losses_alone_in_a_loop() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    namespace: dict[str, Any] = {}
    exec(block, namespace)
    similarity = namespace["l2_normalize"](namespace["z"])
    similarity = similarity @ similarity.T
    same = namespace["labels"][:, None] == namespace["labels"][None]
    assert float(similarity[same].min()) > float(similarity[~same].max())  # items are apart


def test_commands_that_ci_reads_are_there() -> None:
    for marker in ("run-command", "test-command"):
        assert re.search(rf"<!-- {marker} -->\n```bash\n.+\n```\n", README)
