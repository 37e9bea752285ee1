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
def quickstart(tmp_path_factory, worker_id):
    """The README's first run, which takes minutes, once for all workers; only to be read."""
    import small_runs

    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "quickstart"
    folder.mkdir(exist_ok=True)
    return small_runs.run_quickstart(folder)
