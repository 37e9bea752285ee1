"""Sizes are refused before any memory is taken, and decoded pixels stay within their budget."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

import pytest

from configs import common
from mmljax.config import DataConfig, from_mapping
from mmljax.data import limits
from mmljax.data.limits import PixelBudget, check_sizes
from mmljax.errors import UserError


def config(**changes: int) -> DataConfig:
    return dataclasses.replace(from_mapping(common.get_config()).data, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resize_size": 223}, r"resize_size=223 is below --config.data.image_size=224; raise it"),
        ({"image_size": 10**6, "resize_size": 10**6}, "one image at .*resize_size=1000000 needs"),
        ({"image_size": 5000, "resize_size": 5000, "batch_size": 10**6}, "batch_size=1000000 at"),
        ({"eval_batch_size": 10**9}, "eval_batch_size=1000000000 at .*image_size=224 with .*=4"),
        ({"prefetch": 10**9}, "batch_size=180 at .* with --config.data.prefetch=1000000000"),
    ],
)
def test_sizes_that_no_machine_takes(changes: dict[str, int], message: str) -> None:
    check_sizes(config())
    with pytest.raises(UserError, match=message) as error:
        check_sizes(config(**changes))
    assert "\n" not in str(error.value)
    if "below" not in message:
        assert "GiB of memory, but" in str(error.value)
        assert "GiB is available; lower" in str(error.value)


def test_batches_are_divided_over_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    data = config(batch_size=1000, eval_batch_size=10, prefetch=3)
    share = 1000 * 224 * 224 * 3 * 5 // 4  # of the batches made ahead, the one placed and in use
    for total, fits in ((share, True), (share - 1, False)):
        monkeypatch.setattr(limits, "total_memory", lambda total=total: total)
        if fits:
            check_sizes(data, processes=4)
        else:
            with pytest.raises(UserError, match="batch_size=1000"):
                check_sizes(data, processes=4)


def test_memory_is_that_of_the_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = limits.total_memory()
    assert 2**28 < limits.available_memory() <= whole
    monkeypatch.setattr(limits, "_CGROUP", tmp_path / "memory.max")
    for text, total in (("max\n", None), ("1048576\n", 2**20)):
        (tmp_path / "memory.max").write_text(text)
        assert limits.total_memory() >= whole if total is None else limits.total_memory() == total
    assert limits.available_memory() == 2**20
    monkeypatch.setattr(limits, "_MEMINFO", tmp_path / "absent")
    assert limits.available_memory() == 2**20
    monkeypatch.setattr(limits, "_CGROUP", tmp_path / "absent")
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:  3000 kB\n")
    monkeypatch.setattr(limits, "_MEMINFO", tmp_path / "meminfo")
    assert limits.available_memory() == 3000 * 1024


@pytest.mark.parametrize("sizes", [[30] * 9, [60, 50, 10, 40, 60, 100], [500, 20, 20, 500, 20]])
def test_threads_hold_no_more_pixels_than_the_budget(sizes: list[int]) -> None:
    budget, lock = PixelBudget(100), threading.Lock()
    held: list[int] = []
    seen: list[list[int]] = []
    begin = threading.Barrier(len(sizes))

    def work(pixels: int) -> None:
        begin.wait()
        for _ in range(20):
            with budget.taken(pixels):
                with lock:
                    held.append(pixels)
                    seen.append(list(held))
                with lock:
                    held.remove(pixels)

    threads = [threading.Thread(target=work, args=(pixels,)) for pixels in sizes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 20 * len(sizes)
    assert all(sum(pixels) <= 100 or len(pixels) == 1 for pixels in seen)


def test_pixels_are_given_back_after_an_error() -> None:
    budget = PixelBudget(100)
    with pytest.raises(KeyError), budget.taken(80):
        raise KeyError
    with budget.taken(100):  # would wait for ever
        pass
