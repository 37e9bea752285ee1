"""Eight virtual devices for every test, set before jax starts; quick compilation."""

import jax

jax.config.update("jax_num_cpu_devices", 8)
# Most of the tests' time is compilation. The runs in processes of their own compile as users' do.
jax.config.update("jax_disable_most_optimizations", True)
