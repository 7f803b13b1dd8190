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
    ("name", "parameters", "active", "published"),
    [
        ("dbrx", 131_596_523_520, 36_469_708_800, ("131,596,523,520", "36,469,708,800")),
        ("mixtral-8x7b", 46_702_792_704, 12_879_925_248, ("46,702,792,704", "12,879,925,248")),
        ("grok-1", 315_684_820_992, 83_756_587_008, ("315.7 B", "83.8 B")),
        ("olmoe", 6_919_161_856, 1_282_017_280, ("6.919 B", "1.282 B")),
    ],
)
def test_counts_are_the_published(name: str, parameters: int, active: int, published: tuple[str, str]) -> None:
    """To the last where they are published so, else to their digits; pinned to the last all the same."""
    config = load_preset(name)
    assert (config.parameters, config.active_parameters) == (parameters, active)
    for count, digits in zip((parameters, active), published, strict=True):
        places = len(digits.removesuffix(" B").partition(".")[2])
        assert digits == (f"{count / 1e9:.{places}f} B" if digits.endswith("B") else f"{count:,}")


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
    with pytest.raises(ModelError, match=r"dbrx\.yaml with overrides of widht: widht: Extra inputs"):
        load_preset("dbrx", widht=1)
    with pytest.raises(ModelError, match="not valid YAML"):
        parse_config("a: [", source="x.yaml")


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of kv_heads"):
        ModelConfig(heads=6, kv_heads=4)
    with pytest.raises(ValueError, match="at most experts"):
        ModelConfig(experts=4, experts_chosen=5)
