"""Every row of the tables can be named in a config, and what cannot be is refused by name."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import small_runs
from mmljax import config
from mmljax.errors import UserError
from mmljax.losses.relations import RELATIONS
from mmljax.mesh import make_mesh
from mmljax.training import registry
from mmljax.types import PairMasks
from test_config import load


def make(**changes: Any) -> config.Config:
    mapping = load("common")
    for key, value in changes.items():
        with mapping.unlocked():
            mapping.update_from_flattened_dict({key.replace("__", "."): value})
    return config.from_mapping(mapping)


@pytest.mark.parametrize("name", registry.OBJECTIVES)
def test_every_loss_is_one_override_away(name: str) -> None:
    """Its hyperparameters are in configs/common.py, and bound it gives a value per row."""
    row = registry.make_objectives(
        make(objectives__pair__loss=name, objectives__pair__mining__rule="none", centers=2)
    )[0]
    assert row.relation in RELATIONS
    positive = np.zeros((4, 8), bool)
    positive[:, :2] = True
    value, valid = row.loss(jnp.zeros((4, 8)), PairMasks(positive, ~positive))
    assert value.shape == valid.shape
    assert value.shape[-1] == 4
    assert np.isfinite(value).all()


@pytest.mark.parametrize("rule", registry.MINERS)
def test_every_rule_is_one_override_away(rule: str) -> None:
    pair, proxy, separation = registry.make_objectives(make(objectives__pair__mining__rule=rule))
    assert (pair.miner is None) == (rule == "none")
    assert proxy.miner is None
    assert separation.miner is None


@pytest.mark.parametrize("name", registry.COMBINATIONS)
def test_every_combination_is_one_override_away(name: str) -> None:
    combination = registry.make_combination(make(combination__name=name))
    params, state = combination.init(3)
    norms = jnp.array([[1.0, 2.0, 0.0], [0.0, 1.0, 1.0]])
    weights, gradient, _ = combination.apply(params, state, jnp.ones(3), norms)
    assert weights.shape == (3,)
    assert (weights > 0).all()
    assert jax.tree.structure(gradient) == jax.tree.structure(params)


def test_an_objective_can_set_its_own_hyperparameters() -> None:
    pair = registry.make_objectives(make(objectives__pair__params={"alpha": 7.0}))[0]
    assert pair.loss.keywords == {"alpha": 7.0, "beta": 40.0, "base": 0.5}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objectives__pair__loss": "circl"}, r"pair.loss='circl' is unknown.*'circle'"),
        ({"objectives__pair__params": {"alfa": 1.0}}, r"pair.params.alfa is unknown.*'alpha'"),
        ({"objectives__pair__params": {"alpha": "x"}}, r"pair.params.alpha must be of type float"),
        ({"losses__multi_similarity": {"alpha": 2.0}}, r"pair.params lacks beta, base"),
        ({"objectives__separation__mining__rule": "either"}, r"separation has proxies as columns"),
        ({"objectives__pair__memory": True}, r"pair.memory=True needs --config.memory.size"),
    ],
)
def test_bad_objectives_are_refused(changes: dict[str, Any], message: str) -> None:
    if "losses__multi_similarity" in changes:
        mapping = load("common").to_dict()
        mapping["losses"]["multi_similarity"] = changes["losses__multi_similarity"]
        wrong = config.from_mapping(mapping)
    else:
        wrong = make(**changes)
    with pytest.raises(UserError, match=message):
        registry.make_objectives(wrong)


@pytest.mark.parametrize(
    ("group", "value", "message"),
    [
        ("weights", {"pair": 1.0, "proxy": 1.0}, r"combination.weights lacks separation"),
        ("weights", {"pare": 1.0}, r"combination.weights.pare is no objective.*'pair'"),
        ("embedding_shares", {"pair": 0.9}, r"embedding_shares must sum to 1, found 0.9"),
    ],
)
def test_bad_combinations_are_refused(group: str, value: Any, message: str) -> None:
    mapping = load("common").to_dict()
    mapping["combination"][group] = value
    with pytest.raises(UserError, match=message):
        registry.make_combination(config.from_mapping(mapping))


def test_state_is_split_by_rows_and_padded() -> None:
    """Proxies, their moments and the memory over the devices; all else on each of them."""
    from mmljax.training import optim

    small = make(model__backbone="small", model__width=8, memory__size=100, centers=2)
    combination = registry.make_combination(small)
    schedules = optim.make_schedules(small.optimizer, config.RunSize(8, 80, 10))
    _, state = registry.make_state(
        small,
        classes=130,
        channels=1,
        objectives=3,
        combination=combination,
        optimizer=optim.make_optimizer(small.optimizer, schedules),
        mesh=make_mesh(),
    )
    assert state.params["proxies"].shape == (512, 512)  # 130 classes fill 256, two centres each
    assert state.memory["labels"].shape == (128,)
    split = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if not leaf.sharding.is_fully_replicated:
            assert leaf.addressable_shards[0].data.shape[0] == leaf.shape[0] // 8
            split.add(jax.tree_util.keystr(path))
    assert len(split) == 5  # proxies, two moments, memory's vectors and labels
    assert all("proxies" in name or "memory" in name for name in split)


def test_arrays_need_no_tensorflow_and_files_say_what_they_need(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    dataset = load.load_dataset(
        make(
            data__source="arrays",
            data__directory=str(small_runs.write_images(tmp_path / "images.npz")),
        )
    )
    monkeypatch.setitem(sys.modules, "mmljax.data.pipeline", None)  # as if it could not be imported
    monkeypatch.delattr("mmljax.data.pipeline", raising=False)
    small = make(data__batch_size=8, data__image_size=12, data__eval_batch_size=8)
    next(load.train_batches(dataset, small, make_mesh(), range(1)))
    files = dataset._replace(train=dataset.train._replace(images=np.array(["a.jpg"], object)))
    with pytest.raises(UserError, match="TensorFlow.*pip install 'mmljax\\[data\\]'"):
        next(load.train_batches(files, small, make_mesh(), range(1)))
