"""Checkpoints and small files in ``gs://``, in an emulator of Cloud Storage."""

from __future__ import annotations

import time
from pathlib import Path

import jax
import numpy as np
import pytest

from mmljax.errors import UserError
from mmljax.runs import remote
from mmljax.training.checkpoints import Checkpoints, PartialCheckpoint, steps_in

gcsfs = pytest.importorskip("gcsfs", reason="needs pip install 'mmljax[gcs]'")
emulator = pytest.importorskip(
    "gcp_storage_emulator.server", reason="needs pip install gcp-storage-emulator"
)

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # its own and Google's
RUN = "gs://bucket/run"


@pytest.fixture(scope="module")
def files():
    """The file system of an emulator that orbax, tensorstore and gcsfs use."""
    server = emulator.create_server("localhost", 0, in_memory=True, default_bucket="bucket")
    server.start()
    address = f"http://localhost:{server._api._httpd.server_port}"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
            patch.setenv(name, address)
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "any")
        patch.setenv("GOOGLE_CLOUD_PROJECT", "any")
        patch.setattr(remote, "PAUSES", (0.1,))
        yield gcsfs.GCSFileSystem(use_listings_cache=False)
        server.stop()


def state(step: int) -> dict[str, jax.Array]:
    return {"weights": jax.device_put(np.arange(6.0, dtype=np.float32) + step)}


def test_the_last_checkpoints_are_kept_and_a_torn_one_is_set_aside(files):
    folder = f"{RUN}/checkpoints"
    assert steps_in(folder) == []
    saved = Checkpoints(folder, keep_last=2, keep_best=1)
    for step in (5, 10, 15):
        saved.save(state(step), step=step, metrics={"recall@1": 1 / step})
    saved.close()
    assert steps_in(folder) == [5, 10, 15]  # 5 is the best
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0)
    )
    found = PartialCheckpoint(folder, step=10).restore(target)["weights"]
    np.testing.assert_array_equal(found, np.arange(6) + 10)

    for name in files.find("bucket/run/checkpoints/15"):
        if "/d/" in name:
            files.pipe_file(name, b"torn")
    saved = Checkpoints(folder, keep_last=2, keep_best=1)
    saved.close()
    assert steps_in(folder) == [5, 10]
    torn = files.find("bucket/run/torn")
    assert "bucket/run/torn/15.txt" in torn
    assert any(name.endswith("_METADATA") for name in torn)


def test_small_files_and_the_lock(files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(remote, "BEAT", 0.3)
    monkeypatch.setattr(remote, "DEAD", 3.0)
    with remote._mirrored(RUN, tmp_path / "a") as push:
        (tmp_path / "a/metrics.jsonl").write_text("1\n")
        push()
        with monkeypatch.context() as patch:
            patch.setattr(remote, "_machine", lambda: "another")
            with pytest.raises(UserError, match="is in use by another run"):
                remote._mirrored(RUN, tmp_path / "b").__enter__()
        time.sleep(1)
        push()
    with remote._mirrored(RUN, tmp_path / "b"):
        assert (tmp_path / "b/metrics.jsonl").read_text() == "1\n"
    with pytest.raises(UserError, match="gs://other/run cannot be written .*that the bucket ex"):
        remote._mirrored("gs://other/run", tmp_path / "c").__enter__()
