"""A network as a folder to publish: written, read again, refused where damaged, uploaded."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest

import saved
from commands import run
from mmljax.config import default_config
from mmljax.data import load
from mmljax.errors import UserError
from mmljax.inference import embedder, hub, model_card
from mmljax.inference.embedder import load_embedder
from mmljax.runs import writer

COMMIT = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture(scope="module")
def run_folder(saved_run: saved.SavedRun, tmp_path_factory: Any) -> Path:
    """A run that has ended, with scores and a ledger."""
    folder = Path(shutil.copytree(saved_run.folder, tmp_path_factory.mktemp("ended") / "clothes"))
    config = json.loads((folder / "config.json").read_text())
    scores = {"step": 5, "recall@1": 0.625, "map@r": 0.25, "queries": 24, "gallery": 24}
    writer.write_results(
        folder,
        scores=scores,
        config=config,
        sessions=[{"seconds": 2.0, "git": {"revision": "secret"}}],  # type: ignore[list-item]
        extra={"protocol": {"crop": 12, "ties": "irrelevant | relevant"}, "untrained": scores},
    )
    rows = [
        {"step": step, "kind": "train", "loss/pair": 1.0 + step, "weight/pair": 0.5, "loss": 2.0}
        for step in range(1, 6)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def published(run_folder: Path, tmp_path_factory: Any) -> Path:
    folder: Path = tmp_path_factory.mktemp("published") / "folder"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedder, "load_embedder", saved.load_once)
        words = ("--format=hub", "--license=apache-2.0", "--step=3")
        assert run("export", run_folder, "--output", folder, *words) == 0
    return folder


@pytest.fixture
def copy(published: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(published, tmp_path / "copy"))


def test_the_folder_gives_the_embeddings_of_the_run_to_the_bit(saved_run, run_folder, published):
    query = load.load_dataset(saved_run.config).query
    ours, theirs = load_embedder(published), saved.load_once(run_folder, step=3)
    found, expected = (np.asarray(x.embed(query.images)) for x in (ours, theirs))
    np.testing.assert_array_equal(found, expected)
    assert ours.identity == theirs.identity
    assert (ours.identity["run"], ours.channels) == ("clothes", 1)
    with pytest.raises(UserError, match=r"--step=5 is not in .* which has step 3 alone"):
        load_embedder(published, step=5)


@pytest.mark.slow
def test_adapters_are_merged(tmp_path):
    folder = saved.write_run(
        tmp_path,
        model__backbone="vit_s16",
        model__width=8,
        model__pooling="token",
        model__lora={"rank": 2, "alpha": 4.0, "targets": ("attention",), "blocks": 1},
        data__image_size=16,
        data__resize_size=16,
    ).folder
    trained = load_embedder(folder)
    hub.write_folder(trained, tmp_path / "out", run=folder, license_id="mit")
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 1), np.uint8)
    again = load_embedder(tmp_path / "out")
    np.testing.assert_array_equal(again.embed(images), trained.embed(images))
    assert not [name for name in hub.read_folder(tmp_path / "out").weights if "lora" in name]


def test_nothing_in_the_folder_is_a_pickle_or_of_this_machine(published, run_folder):
    assert sorted(path.name for path in published.iterdir()) == sorted(hub.FILES)
    for path in published.iterdir():
        contents = path.read_bytes()
        assert b"\x80\x04" not in contents[:2]
        assert str(run_folder.parent).encode() not in contents
    text = (published / "results.json").read_text()
    assert "secret" not in text
    assert json.loads(text)["scores"]["recall@1"] == 0.625


def test_the_card_says_what_the_run_has_written(published):
    card = (published / "README.md").read_text()
    head = card.split("---")[1].strip().splitlines()
    assert head[:3] == [
        "library_name: mmljax",
        "pipeline_tag: image-feature-extraction",
        "license: apache-2.0",
    ]
    for line in (
        "# clothes",
        "| Recall@1 | 62.5 | 62.5 |",
        "| ties | irrelevant / relevant |",
        "| pair | 4 | 0.5 | - | - |",
        "These weights are published under `apache-2.0`.",
    ):
        assert line in card.splitlines(), line
    assert "after step 3 of the run `clothes`" in card


def test_the_code_of_the_card_runs(published, monkeypatch):
    monkeypatch.chdir(published.parent)
    card = (published / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0].replace("FOLDER", published.name)
    names: dict[str, Any] = {}
    exec(code, names)
    np.testing.assert_allclose(np.linalg.norm(names["vectors"], axis=1), 1, rtol=1e-6)


def test_the_licence_and_the_source_of_pretrained_weights(saved_run, monkeypatch):
    trained = saved.load_once(saved_run.folder, step=3)
    model = trained.config.model
    source = f"hf:google/siglip@{COMMIT}"
    changed = SimpleNamespace(**vars(model) | {"pretrained": source})
    trained = trained._replace(config=SimpleNamespace(model=changed, data=trained.config.data))
    card = model_card.model_card(trained, results=None, ledger={}, license_id="unknown")
    assert "base_model: google/siglip\n" in card
    assert f"They were trained from the weights `{source}`, whose licence applies too." in card
    assert "The licence of these weights has not been stated." in card
    assert "None: the run has not ended." in card


def test_a_run_without_results_or_metrics(saved_run, tmp_path):
    trained = saved.load_once(saved_run.folder, step=3)
    sizes = hub.write_folder(trained, tmp_path, run=saved_run.folder, license_id="unknown")
    assert "results.json" not in sizes
    assert "contributed" not in (tmp_path / "README.md").read_text()


def test_keys_of_a_later_version_have_their_defaults(copy):
    stored = json.loads((copy / "config.json").read_text())
    del stored["model"]["matryoshka"]
    (copy / "config.json").write_text(json.dumps(stored))
    assert load_embedder(copy).config.model.matryoshka == default_config().model.matryoshka


def test_damaged_folders_are_refused(copy):
    weights = (copy / "model.safetensors").read_bytes()
    stored = json.loads((copy / "config.json").read_text())

    def refused(match: str) -> None:
        with pytest.raises(UserError, match=match):
            load_embedder(copy)

    (copy / "model.safetensors").write_bytes(weights[:-4] + b"\0\0\0\1")
    refused(r"model.safetensors has SHA-256 \w{64}, and config.json says \w{64}; fetch")
    (copy / "model.safetensors").write_bytes(weights)
    for change, match in (
        ({"format": "mmljax embedder 2"}, "has the format 'mmljax embedder 2', and this version"),
        ({"model": stored["model"] | {"embedding_size": 8}}, r"does not fit its config.json: netw"),
        ({"model": stored["model"] | {"later": 1}}, r"--config.model.later is unknown"),
        ({"identity": 3}, "is no complete export of a network .*export it again"),
    ):
        (copy / "config.json").write_text(json.dumps(stored | change))
        refused(match)
    (copy / "config.json").write_text("{")
    refused("is no complete export of a network")


def test_commands_take_the_folder(published, tmp_path, monkeypatch):
    monkeypatch.setattr(embedder, "load_embedder", load_embedder)
    with pytest.raises(UserError, match="exported network has no data set of its own; name --im"):
        run("embed", published, "--split=query", "--output", tmp_path / "x.parquet")


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (
            ("--format=hub", "--count=3"),
            "--count belongs to --format jax and onnx; omit one of them",
        ),
        (("--license=mit",), "--license belongs to --format hub"),
        (("--dry-run",), "--dry-run belongs to --format hub"),
        (("--format=hub", "--dry-run"), "--dry-run and --private belong to --upload OWNER/NAME"),
        (("--format=hub", "--upload=a/b"), "--upload needs --license ID"),
    ],
)
def test_flags_that_do_not_fit(saved_run, tmp_path, words, match):
    with pytest.raises(UserError, match=match):
        run("export", saved_run.folder, "--output", tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_not_written_into(saved_run):
    trained = saved.load_once(saved_run.folder, step=3)
    with pytest.raises(UserError, match=r"has a config.json of something else; name another"):
        hub.write_folder(trained, saved_run.folder, run=saved_run.folder, license_id="mit")


class Api:
    """The hub, as far as it is used."""

    calls: list[tuple[str, dict[str, Any]]] = []

    def create_repo(self, name: str, **options: Any) -> None:
        self.calls.append((name, options))

    def upload_folder(self, **options: Any) -> Any:
        self.calls.append(("upload", options))
        return SimpleNamespace(oid=COMMIT)


def test_upload(run_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(embedder, "load_embedder", saved.load_once)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    Api.calls.clear()
    words = ("--output", tmp_path, "--format=hub", "--license=mit", "--upload=me/clothes")
    assert run("export", run_folder, *words, "--dry-run") == 0
    assert "nothing was sent" in capsys.readouterr().out
    assert not Api.calls
    assert run("export", run_folder, *words, "--private") == 0
    assert f"hf:me/clothes@{COMMIT}: load it by" in capsys.readouterr().out
    (name, options), (_, sent) = Api.calls
    assert (name, options) == ("me/clothes", {"private": True, "exist_ok": True})
    assert sent["folder_path"] == str(tmp_path)
    assert set(sent["allow_patterns"]) == set(hub.FILES)


def test_a_hub_that_cannot_be_reached(tmp_path, monkeypatch):
    nowhere = functools.partial(huggingface_hub.HfApi, endpoint="http://127.0.0.1:9", token="x")
    monkeypatch.setattr(huggingface_hub, "HfApi", nowhere)
    with pytest.raises(UserError, match=r"--upload=me/clothes: .*refused.*; log in by hf auth"):
        hub.upload(tmp_path, "me/clothes", sizes={}, private=False)


def test_an_address_is_fetched_at_its_commit(published, monkeypatch):
    asked: dict[str, Any] = {}

    def download(repository: str, **options: Any) -> str:
        asked.update(options, repository=repository)
        return str(published)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert load_embedder(f"hf:me/clothes@{COMMIT}").identity["step"] == 3
    assert (asked["repository"], asked["revision"]) == ("me/clothes", COMMIT)
    with pytest.raises(UserError, match="must be hf:OWNER/NAME@COMMIT with the 40 hexadecimal"):
        load_embedder("hf:me/clothes@main")

    def offline(*_: Any, **__: Any) -> str:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UserError, match=r"cannot be downloaded: no network; without a network"):
        load_embedder(f"hf:me/clothes@{COMMIT}")
