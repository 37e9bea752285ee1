"""Eight virtual devices for every test, set before jax starts; a run for those that need one."""

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="session")
def saved_run(tmp_path_factory):
    """A run's directory, its config and its states by step; only to be read."""
    import saved

    return saved.write_run(tmp_path_factory.mktemp("saved"))
