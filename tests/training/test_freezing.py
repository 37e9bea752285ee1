"""What is not trained: it stays, has no moments and no gradient; runs with adapters."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import small_runs
from mmljax.config import Config, load_config
from mmljax.data import load
from mmljax.errors import UserError
from mmljax.inference import features
from mmljax.inference.embedder import Weights, load_embedder
from mmljax.inference.export import lower
from mmljax.inference.interpolate import save
from mmljax.mesh import make_mesh
from mmljax.models.lora import is_adapter
from mmljax.retrieval.evaluate import embed_batches
from mmljax.training import loop
from mmljax.training.trainer import Trainer, make_trainer

pytestmark = pytest.mark.filterwarnings(
    # orbax reads checkpoints without shardings in small_runs.final_state, on purpose
    "ignore:Sharding info not provided when restoring:UserWarning"
)

LORA = {"model__lora__rank": 2, "model__lora__alpha": 8.0}
HEAD = {"optimizer__freeze_backbone": "20 steps"}  # the whole run
SGD = {"optimizer__name": "sgd", "optimizer__b1": 0.0, "optimizer__warmup": "0 steps"}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function from changes to the config of a run with a ViT of three blocks."""
    images = small_runs.write_images(tmp_path / "images.npz")
    vit = small_runs.add_tiny_vit(monkeypatch)

    def make(**changes: Any) -> Config:
        path = small_runs.write_config(tmp_path / "small.py", images, **{**vit, **changes})
        return load_config(str(path))

    return make


def make(config: Config, *, devices: int = 8, channels: int = 1) -> Trainer:
    mesh = make_mesh(jax.devices()[:devices])
    return make_trainer(config, classes=12, channels=channels, train_examples=72, mesh=mesh)


def steps(config: Config, count: int, *, devices: int = 8) -> tuple[dict[str, Any], Any]:
    """The arrays of the state before and after some steps, by name."""
    trainer = make(config, devices=devices)
    mesh = make_mesh(jax.devices()[:devices])
    state, first = trainer.state, by_name(trainer.state)
    for batch in load.train_batches(load.load_dataset(config), config, mesh, range(count)):
        state, _ = trainer.step(state, batch)
    return first, by_name(state)


def by_name(tree: Any) -> dict[str, np.ndarray]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    }


def frozen_names(arrays: dict[str, Any], *, adapters: bool) -> set[str]:
    return {
        name
        for name in arrays
        if name.startswith("params.network.backbone.") and not (adapters and is_adapter(name))
    }


@pytest.mark.parametrize("changes", [LORA, HEAD], ids=["lora", "head"])
def test_only_the_rest_moves_and_has_moments(config: Any, changes: dict[str, Any]) -> None:
    """The bytes of the optimiser's state are two of Adam's moments of what trains, and counters."""
    made = config(**changes, optimizer__ema_decay=0.9)
    first, last = steps(made, 3)
    frozen = frozen_names(first, adapters=True)
    assert len(frozen) > 30
    trained = {name for name in first if name.startswith("params.network.")} - frozen
    assert any(map(is_adapter, trained)) == (changes is LORA)
    for name, value in first.items():
        if name in frozen:
            np.testing.assert_array_equal(last[name], value, err_msg=name)
        if name in trained | {"params.proxies"}:
            assert np.abs(last[name] - value).max() > 0, name
    moments = [name for name in first if name.startswith("optimizer_state.")]
    assert not [n for n in moments if any(n.endswith(f.partition("network")[2]) for f in frozen)]
    arrays, counters = by_name(make(made, devices=1).state), 7 * 4
    optimizer = sum(x.nbytes for name, x in arrays.items() if name.startswith("optimizer_state."))
    wanted = sum(arrays[name].nbytes for name in trained | {"params.proxies"})
    assert optimizer == 2 * wanted + counters
    averaged = {f"params.{name[8:]}" for name in arrays if name.startswith("average.")}
    assert averaged == trained


@pytest.mark.slow
def test_the_compiled_step_does_less(config: Any) -> None:
    """Against full fine-tuning: adapters save the weights' gradients, a head the backward pass."""
    flops = {}
    kinds: dict[str, Any] = {"full": {}, "lora": LORA, "head": HEAD}
    for name, changes in (kinds | {"patches": {"model__patch_keep": 0.5}}).items():
        made = config(**changes, model__width=256)
        trainer, mesh = make(made, devices=1), make_mesh(jax.devices()[:1])
        batch = next(load.train_batches(load.load_dataset(made), made, mesh, range(1)))
        step: Any = trainer.step
        flops[name] = step.lower(trainer.state, batch).compile().cost_analysis()["flops"]
    assert flops["lora"] < 0.8 * flops["full"]  # two products of three, and the adapters'
    assert flops["head"] < 0.5 * flops["full"]  # one of three
    assert flops["patches"] < 0.7 * flops["full"]  # 5 tokens of 10


@pytest.mark.slow
def test_eight_devices_equal_one(config: Any) -> None:
    made = config(**LORA, **SGD, model__patch_keep=0.5)
    (_, one), (_, eight) = steps(made, 4, devices=1), steps(made, 4)
    names = [name for name in one if name.startswith("params.network.")]
    for name in names:
        np.testing.assert_allclose(one[name], eight[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_a_backbone_that_never_moves_gives_the_same_head(config: Any) -> None:
    """With and without a gradient for it."""
    rate = {"optimizer__backbone__learning_rate": 0.0}
    (_, frozen), (_, still) = steps(config(**HEAD), 3), steps(config(**rate), 3)
    for name, value in frozen.items():
        if name.startswith(("params.", "model_state.")):
            np.testing.assert_allclose(value, still[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_a_backbone_frozen_for_a_part_of_the_run_trains_later(config: Any) -> None:
    made = config(optimizer__freeze_backbone="2 steps", **LORA)
    first, early = steps(made, 2)
    _, late = steps(made, 3)
    adapters = [name for name in first if name.startswith("params.") and is_adapter(name)]
    assert adapters
    for name in adapters:
        np.testing.assert_array_equal(early[name], first[name], err_msg=name)
    assert all(np.abs(late[name] - first[name]).max() > 0 for name in adapters if name[-1] == "b")


def test_adapters_have_the_rate_of_their_blocks_layer(config: Any) -> None:
    """One step of plain descent with and without the decay; ``B`` alone has a gradient."""
    kind = {**LORA, **SGD, "optimizer__backbone__learning_rate": 10.0}
    (first, plain), (_, decayed) = (
        steps(config(**kind, optimizer__layer_decay=decay), 1) for decay in (1.0, 0.5)
    )
    found = set()
    for name, start in first.items():
        if name.startswith("params.") and name.endswith("lora_b"):
            block = int(name.split("blocks.")[1][0])
            found.add(block)
            ratio = np.vdot(decayed[name] - start, plain[name] - start)
            ratio /= np.vdot(plain[name] - start, plain[name] - start)
            assert ratio == pytest.approx(0.5 ** (4 - (block + 1)), rel=1e-4), name
    assert found == {0, 1, 2}


def assert_merged_equals_adapted(config: Config, run: Path, trainer: Trainer) -> Any:
    """A run loaded and exported, so merged, embeds as its adapted network.

    Returns a function that embeds the queries by a network, and the loaded network.
    """
    mesh = make_mesh()
    saved = loop.checkpoints.Checkpoints(run / "checkpoints", keep_last=2, keep_best=1)
    state = saved.restore(trainer.state)
    saved.close()
    assert state is not None
    query = load.load_dataset(config).query
    embed = loop.make_embed(trainer.graphdef)

    def by(function: Any) -> np.ndarray:
        return embed_batches(function, load.eval_batches(query, config, mesh))[0]

    wanted = by(lambda images: embed(*state.evaluated, images))
    trained = load_embedder(run)
    assert not any(map(is_adapter, by_name(trained.network)))
    np.testing.assert_allclose(by(trained.embed), wanted, atol=1e-5)
    np.testing.assert_allclose(by(jax.jit(lower(trained).exported.call)), wanted, atol=1e-5)
    return by, trained


@pytest.mark.slow
def test_a_trained_run_is_loaded_merged_and_saved(
    config: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its embeddings are those of the adapted network, from run, export and a copy of the run."""
    caplog.set_level(logging.INFO, "mmljax")
    rate = {"optimizer__backbone__learning_rate": 0.02}
    made = config(**LORA, **rate, optimizer__ema_decay=0.5, evaluation__untrained=False)
    loop.train(made, tmp_path / "run")
    assert "frozen" in caplog.text
    by, trained = assert_merged_equals_adapted(made, tmp_path / "run", trainer := make(made))
    unadapted = by_name(trainer.state.params["network"])
    moved = by_name(trained.network)
    assert all(
        np.abs(moved[f"backbone.blocks.{i}.{layer}.kernel"] - unadapted[name]).max() > 1e-3
        for i in range(3)
        for layer in ("attn.qkv", "mlp.fc2")
        for name in [f"backbone.blocks.{i}.{layer}.kernel"]
    )
    own = Weights(trained.network, trained.model_state)
    save(trained, own, alpha=1.0, source="", folder=tmp_path / "copy")
    copied = load_embedder(tmp_path / "copy")
    np.testing.assert_array_equal(by(copied.embed), by(trained.embed))


@pytest.fixture
def foods(tmp_path: Path) -> Path:
    """Some of the shared photographs of dishes, 12 to train and 6 to search, in class folders."""
    return small_runs.write_dishes(tmp_path / "foods", train=12, test=6)


@pytest.mark.slow
def test_adapters_on_photographs(
    config: Any, foods: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was broken off equals the whole one to the bit, and merged equals adapted."""
    made = config(
        **LORA,
        data__source="folder",
        data__directory=str(foods),
        data__image_size=24,
        data__resize_size=28,
        data__images_per_class=2,
        optimizer__backbone__learning_rate=0.02,
        evaluation__untrained=False,
    )
    loop.train(made, tmp_path / "whole")
    small_runs.train_broken_off(made, tmp_path / "run", steps=12, monkeypatch=monkeypatch)
    loop.train(made, tmp_path / "run")
    arrays = small_runs.assert_same_run(tmp_path / "whole", tmp_path / "run")
    moved = [x for name, x in arrays.items() if name.startswith("params.") and name[-1] == "b"]
    assert len(moved) == 3 * 4
    assert all(np.abs(x).max() > 1e-3 for x in moved)  # they start as 0
    assert_merged_equals_adapted(made, tmp_path / "run", make(made, channels=3))


def test_adapters_that_cannot_train_are_refused(config: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"freeze_backbone='20 steps' would freeze the adapters"):
        make(config(**LORA, **HEAD))
    made = config(**LORA)
    message = r"lora.rank=2 does not go with cached features.*set --config.model.lora.rank=0"
    with pytest.raises(UserError, match=message):
        features.write_features(made, tmp_path / "features", views=0)
    features.write_features(config(), tmp_path / "features", views=0)
    data = dataclasses.replace(made.data, source="features", directory=str(tmp_path / "features"))
    with pytest.raises(UserError, match=message):
        loop.train(dataclasses.replace(made, data=data), tmp_path / "run")
