"""Presets: their counts are the published ones, and the network on the meta device has exactly as many parameters."""

from __future__ import annotations

import pytest
import torch

from model.config import ModelConfig, dump_config, load_preset, parse_config, preset_names
from model.errors import ModelError
from model.network.transformer import Transformer


def test_presets_are_the_table_of_the_design() -> None:
    assert preset_names() == ["dbrx", "grok-1", "mixtral-8x7b", "olmoe", "quickstart"]


@pytest.mark.parametrize(
    ("name", "parameters", "active"),
    [("dbrx", 131_596_523_520, 36_469_708_800), ("mixtral-8x7b", 46_702_792_704, 12_879_925_248)],
)
def test_counts_equal_the_published_to_the_last(name: str, parameters: int, active: int) -> None:
    config = load_preset(name)
    assert (config.parameters, config.active_parameters) == (parameters, active)


@pytest.mark.parametrize(("name", "parameters", "active"), [("grok-1", "315.7", "83.8"), ("olmoe", "6.919", "1.282")])
def test_counts_equal_the_published_digits(name: str, parameters: str, active: str) -> None:
    config = load_preset(name)
    digits = len(parameters.split(".")[1])
    assert f"{config.parameters / 1e9:.{digits}f}" == parameters
    assert f"{config.active_parameters / 1e9:.{digits}f}" == active


@pytest.mark.parametrize("name", preset_names())
def test_network_on_meta_has_the_counted_parameters(name: str) -> None:
    config = load_preset(name)
    with torch.device("meta"):
        network = Transformer(config)
    assert sum(p.numel() for p in network.parameters()) == config.parameters


def test_expert_combinations_of_dbrx_are_65_times_mixtrals() -> None:
    assert load_preset("dbrx").expert_combinations == 1820
    assert load_preset("mixtral-8x7b").expert_combinations == 28


def test_config_survives_yaml() -> None:
    config = load_preset("grok-1", layers=2)
    assert parse_config(dump_config(config), source="test") == config


def test_unknown_preset_and_key_are_sentences() -> None:
    with pytest.raises(ModelError, match="no model preset 'gpt'; take one of dbrx") as unknown:
        load_preset("gpt")
    assert unknown.value.exit_code == 2
    with pytest.raises(ModelError, match=r"dbrx\.yaml: widht: Extra inputs"):
        load_preset("dbrx", widht=1)
    with pytest.raises(ModelError, match="not valid YAML"):
        parse_config("a: [", source="x.yaml")


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of kv_heads"):
        ModelConfig(heads=6, kv_heads=4)
    with pytest.raises(ValueError, match="at most experts"):
        ModelConfig(experts=4, experts_chosen=5)
