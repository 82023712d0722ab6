"""The card beside exported weights, and sending a folder to the Hub."""

import json
from pathlib import Path
from typing import Any

import pytest

from cmae_scale.config.cmae import CmaeConfig
from cmae_scale.config.run_file import Run
from cmae_scale.core.errors import ConfigError
from cmae_scale.models.export import MARK, build_card, describe_run, write_card
from cmae_scale.models.formats.hub import push_folder


def build_run(**cmae: Any) -> Run:
    ours = {"model": {"encoder": "vit_base"}, "data": {"shards": "/home/me/secret/imagenet/train"}, **cmae}
    deepspeed = {"train_batch_size": 4096, "optimizer": {"type": "AdamW", "params": {"lr": 2.4e-3}}}
    return Run(Path("vitb.json"), CmaeConfig.model_validate_json(json.dumps(ours)), deepspeed)


METRICS = {"step": 93_600, "samples": 383_385_600, "loss": 0.5, "pixel": 0.4, "contrast": 0.71428}


def test_a_card_says_what_the_encoder_saw_and_how_to_load_it() -> None:
    facts = describe_run(build_run(), metrics=METRICS)
    card = build_card("vitb", facts=facts, library="timm", license_name="cc-by-nc-4.0")
    front = card.split("---\n")[1].splitlines()
    assert "license: cc-by-nc-4.0" in front
    assert "library_name: timm" in front
    for told in (
        "| data | imagenet/train |",
        "383,385,600 images seen in 93,600 steps",
        "vision transformer, vit_base, patches of 16 px",
        "65% hidden in cells of 2 x 2 patches",
        "loss 0.5000, pixel 0.4000, contrast 0.7143",
        "peak learning rate 0.0024",
        'timm.create_model("local-dir:FOLDER", pretrained=True)',
    ):
        assert told in card, told
    assert "secret" not in card


def test_a_card_says_of_a_hybrid_how_this_project_loads_it() -> None:
    run = build_run(model={"encoder": "convvit_base"}, loss={"weight": 0.0})
    card = build_card("mae", facts=describe_run(run, metrics={}), library="cmae-scale")
    assert 'read_encoder("FOLDER")' in card
    assert "timm" not in card
    assert "| method | masked autoencoder, trained with cmae-scale |" in card
    assert "license: unknown" in card
    assert "| last training losses | not known |" in card


def test_the_hub_library_reads_the_front_matter() -> None:
    hub = pytest.importorskip("huggingface_hub")
    card = hub.ModelCard(build_card("x", facts=describe_run(build_run(), metrics=METRICS), library="timm"))
    assert card.data.library_name == "timm"
    assert card.data.tags == ["self-supervised-learning", "masked-autoencoder", "cmae"]


def test_a_card_is_renewed_until_somebody_makes_it_their_own(tmp_path: Path) -> None:
    for title in ("first", "second"):
        write_card(tmp_path, build_card(title, facts={}, library="timm"))
        assert f"# {title}" in (tmp_path / "README.md").read_text()
    mine = (tmp_path / "README.md").read_text().replace(MARK, "")
    (tmp_path / "README.md").write_text(mine)
    write_card(tmp_path, build_card("third", facts={}, library="timm"))
    assert (tmp_path / "README.md").read_text() == mine


class Hub:
    """In the place of huggingface_hub.HfApi: writes down what it is asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.error: Exception | None = None

    def create_repo(self, name: str, **options: Any) -> None:
        self.asked.append(("create", {"name": name, **options}))

    def upload_folder(self, **options: Any) -> None:
        if self.error:
            raise self.error
        self.asked.append(("upload", options))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    module = pytest.importorskip("huggingface_hub")
    hub = Hub()
    monkeypatch.setattr(module, "HfApi", lambda: hub)
    return hub


def test_a_folder_is_pushed_to_a_private_repository(hub: Hub, tmp_path: Path) -> None:
    push_folder(tmp_path, repository="me/vitb")
    assert hub.asked[0] == ("create", {"name": "me/vitb", "private": True, "exist_ok": True})
    assert hub.asked[1][1]["repo_id"] == "me/vitb"
    assert hub.asked[1][1]["folder_path"] == tmp_path


def test_what_the_hub_refuses_is_told_in_one_sentence(hub: Hub, tmp_path: Path) -> None:
    hub.error = ConnectionError("no route\nmore lines")
    with pytest.raises(ConfigError, match=r"is written, but the Hub did not take it as me/vitb \(no route\)"):
        push_folder(tmp_path, repository="me/vitb")
