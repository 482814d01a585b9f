"""The shipped YAML files and the checks of their values."""

import dataclasses

import pytest
import yaml

from infogrowth.config import load_config
from infogrowth.errors import UserError
from train.pretrain_gain import PretrainConfig
from train.train_retrieval import RetrievalConfig

REQUIRED = {"output_dir": "out", "annotations": "a.json", "images": "lmdb"}


@pytest.mark.parametrize(
    ("name", "config_class"),
    [("pretrain_cc3m_gain.yaml", PretrainConfig), ("retrieval_coco.yaml", RetrievalConfig)],
)
def test_the_main_files_hold_every_key(repository, name, config_class):
    path = repository / "train" / "configs" / name
    config = load_config(config_class, path)
    keys = yaml.safe_load(path.read_text()).keys()
    assert set(keys) == {field.name for field in dataclasses.fields(config)}


@pytest.mark.parametrize(
    ("name", "config_class"),
    [
        ("pretrain_sample.yaml", PretrainConfig),
        ("pretrain_tiny.yaml", PretrainConfig),
        ("retrieval_sample.yaml", RetrievalConfig),
    ],
)
def test_the_other_files_hold_only_what_differs_from_the_defaults(repository, name, config_class):
    path = repository / "train" / "configs" / name
    config = load_config(config_class, path)
    defaults = {f.name: f.default for f in dataclasses.fields(config)}
    for key in yaml.safe_load(path.read_text()):
        assert getattr(config, key) != defaults[key], key


@pytest.mark.parametrize("name", ["pretrain_cc3m_gain.yaml", "retrieval_coco.yaml"])
def test_every_key_of_the_main_files_is_explained(repository, name):
    text = (repository / "train" / "configs" / name).read_text()
    section = text.split("# --- data ---")[1]
    for line in section.splitlines():
        if line and line[0].isalpha():
            assert "#" in line, line


def test_defaults_are_the_documented_commands_two_phase_run(repository):
    config = load_config(PretrainConfig, repository / "train/configs/pretrain_cc3m_gain.yaml")
    assert PretrainConfig(**REQUIRED).sampler == config.sampler == "two_phase"
    assert config.annotations == "processed_data/InfoGrowth_400k_samples.json"
    assert config.init_lr == 3e-4  # text for a safe YAML loader


def test_misspelt_sampler_is_an_error_with_the_nearest_name(tmp_path):
    (tmp_path / "c.yaml").write_text("sampler: proptional\n")
    with pytest.raises(UserError, match="'proportional'"):
        load_config(PretrainConfig, tmp_path / "c.yaml", REQUIRED)


def test_unknown_key_is_an_error_with_the_nearest_name(tmp_path):
    (tmp_path / "c.yaml").write_text("warmup_step: 10\n")
    with pytest.raises(UserError, match="'warmup_steps'"):
        load_config(PretrainConfig, tmp_path / "c.yaml", REQUIRED)


@pytest.mark.parametrize(
    ("key", "value", "pattern"),
    [
        ("batch_size", 0, "batch-size .* 1"),
        ("keep_checkpoints", 0, "keep-checkpoints .* 1"),
        ("queue_size", -1, "queue-size .* 0"),
        ("alpha", 1.5, "alpha"),
        ("clip_grad_norm", 0, "clip-grad-norm"),
        ("init_lr", "fast", "init-lr"),
        ("precision", "fp8", "precision"),
    ],
)
def test_values_that_no_run_can_use_are_refused(key, value, pattern):
    with pytest.raises(UserError, match=pattern):
        load_config(PretrainConfig, None, {**REQUIRED, key: value})
