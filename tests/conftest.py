"""Eight virtual devices for every test, set before jax starts; runs for those that need one."""

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="session")
def saved_run(tmp_path_factory):
    """A run's directory, its config and its states by step; only to be read."""
    import saved

    return saved.write_run(tmp_path_factory.mktemp("saved"))


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
