"""Eight virtual devices for every test, set before jax starts; runs for those that need one.

Programs that were compiled once are shared by all processes of a test session, through a folder
that is removed at its end, and are compiled with less effort: most of the tests' time is that of
the compiler. What trains for minutes, the README's first run and the tutorial, has XLA's defaults.
"""

import os
import shutil
import tempfile
from importlib.util import find_spec

import jax
import pytest

_CACHE, _SHORTEST = "JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
_OWN_CACHE = _CACHE not in os.environ  # a worker inherits that of its session
if _OWN_CACHE:
    os.environ |= {_CACHE: tempfile.mkdtemp(prefix="mmljax-tests-"), _SHORTEST: "0.05"}
    jax.config.update("jax_compilation_cache_dir", os.environ[_CACHE])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)

# Half the compiler's time; level 0 makes some gradients NaN (JAX 0.10.2). libtpu ends its process
# at flags of the CPU's compiler.
QUICK = "--xla_backend_optimization_level=1 --xla_cpu_use_fusion_emitters=false"
if find_spec("libtpu") is None and QUICK not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK}".strip()

jax.config.update("jax_num_cpu_devices", 8)


def pytest_unconfigure() -> None:
    """Remove the compiled programs."""
    if _OWN_CACHE:
        shutil.rmtree(os.environ[_CACHE], ignore_errors=True)


@pytest.fixture
def loaded_once(monkeypatch):
    """Commands of one session compile the network of a run once."""
    import saved
    from mmljax.inference import embedder

    monkeypatch.setattr(embedder, "load_embedder", saved.load_once)


@pytest.fixture(scope="session")
def saved_run(tmp_path_factory):
    """A run's directory, its config and its states by step; only to be read."""
    import saved

    return saved.write_run(tmp_path_factory.mktemp("saved"))


@pytest.fixture(scope="session")
def colour_run(tmp_path_factory):
    """A network for colour images in files, with a folder of such images."""
    import numpy as np
    import tensorflow as tf

    import saved

    folder = tmp_path_factory.mktemp("colour")
    images = folder / "images"
    random = np.random.default_rng(0)
    rows = []
    for item in range(6):
        for view in range(4):
            name = f"img/item{item}/view {view}.{'png' if view % 2 else 'jpg'}"
            pixels = random.integers(0, 256, (17 + item, 15 + view, 3)).astype(np.uint8)
            encode = tf.io.encode_png if view % 2 else tf.io.encode_jpeg
            (images / name).parent.mkdir(parents=True, exist_ok=True)
            (images / name).write_bytes(encode(pixels).numpy())
            split = "train" if item < 3 else ("query", "gallery")[view % 2]
            rows.append((name.replace(" ", "_"), f"id_{item:08d}", split))
            (images / name).rename(images / name.replace(" ", "_"))
    lines = [str(len(rows)), "image_name item_id evaluation_status"]
    lines += [" ".join(row) for row in rows]
    (images / "Eval").mkdir()
    (images / "Eval/list_eval_partition.txt").write_text("\n".join(lines) + "\n")
    return saved.write_run(
        folder / "files",
        data__source="in_shop",
        data__directory=str(images),
        data__image_size=12,
        data__resize_size=14,
    )


@pytest.fixture(scope="session")
def shared(tmp_path_factory, worker_id):
    """A folder that all workers of this session share."""
    base = tmp_path_factory.getbasetemp()
    return base if worker_id == "master" else base.parent


@pytest.fixture(scope="session")
def quickstart(shared):
    """The README's first run, which takes minutes, once for all workers; only to be read."""
    import small_runs

    folder = shared / "quickstart"
    folder.mkdir(exist_ok=True)
    return small_runs.run_quickstart(folder)
