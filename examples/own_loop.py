"""MultiObjective in your own training loop: a Flax NNX model, optax, one device or several.

python examples/own_loop.py
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import mmljax


class Network(nnx.Module):
    """Any network that maps a batch of inputs to embeddings ``[b d]``."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.hidden = nnx.Linear(64, 128, rngs=rngs)
        self.out = nnx.Linear(128, 32, rngs=rngs)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Embeddings of any length; the objective normalises them."""
        return self.out(nnx.relu(self.hidden(inputs)))


objective = mmljax.MultiObjective(
    {
        "pair": mmljax.Objective("multi_similarity", embedding_share=0.8, mining="either"),
        "proxy": mmljax.Objective(
            "proxy_anchor", weight=0.03, embedding_share=0.2, proxy_share=0.9
        ),
        "separation": mmljax.Objective("nearest_proxy", weight=0.3, proxy_share=0.1),
    },
    classes=20,
    dimension=32,
    multiple_of=8,  # only for several devices: proxies are padded so that they divide over them
)
optimizer = optax.partition(
    {
        "network": optax.adamw(1e-3),
        "proxies": optax.adam(1e-2),
        "weights": optax.sgd(0.05),  # the contribution weights take plain gradient descent
    },
    {"network": "network", "proxies": "proxies", "weights": "weights"},
)
graphdef, network = nnx.split(Network(nnx.Rngs(0)))


def gradients(params, state, inputs, labels, axis_name=None):
    """Gradients for network, proxies and contribution weights, the next state, the ledger."""

    def loss(params):
        embeddings = nnx.merge(graphdef, params["network"])(inputs)
        return objective(params, state, embeddings, labels, axis_name=axis_name)

    return jax.grad(loss, has_aux=True)(params)


@jax.jit
def step(params, optimizer_state, state, inputs, labels):
    """One update on one device."""
    grads, (state, ledger) = gradients(params, state, inputs, labels)
    updates, optimizer_state = optimizer.update(grads, optimizer_state, params)
    return optax.apply_updates(params, updates), optimizer_state, state, ledger


def sharded_step(mesh):
    """The same update with the batch and the proxies split over a mesh's axis ``data``."""
    rows, whole = jax.P("data"), jax.P()
    params_specs, state_specs = objective.partition_specs("data")
    layout = {"network": whole, **params_specs}
    sharded = jax.shard_map(
        lambda *arguments: gradients(*arguments, axis_name="data"),
        mesh=mesh,
        in_specs=(layout, state_specs, rows, rows),
        out_specs=(layout, (state_specs, whole)),
    )

    @jax.jit
    def step(params, optimizer_state, state, inputs, labels):
        grads, (state, ledger) = sharded(params, state, inputs, labels)
        updates, optimizer_state = optimizer.update(grads, optimizer_state, params)
        return optax.apply_updates(params, updates), optimizer_state, state, ledger

    return step


def start():
    """Parameters, optimiser state and objective state before the first step."""
    objective_params, state = objective.init(jax.random.key(0))
    params = {"network": network, **objective_params}
    return params, optimizer.init(params), state


def batch(index):
    """Noisy views of 20 classes, 32 at a time."""
    centers = jax.random.normal(jax.random.key(7), (20, 64))
    key = jax.random.key(index)
    labels = jnp.repeat(jax.random.permutation(key, 20)[:8], 4)
    return centers[labels] + jax.random.normal(key, (32, 64)), labels


def main() -> None:
    """Train for 100 steps and print the last ledger."""
    params, optimizer_state, state = start()
    for index in range(100):
        params, optimizer_state, state, ledger = step(params, optimizer_state, state, *batch(index))
    for name, value in ledger.items():
        print(f"{name:<32}{value:8.3f}")


if __name__ == "__main__":
    main()
