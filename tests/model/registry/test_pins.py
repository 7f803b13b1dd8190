"""Who needs an old version: also a training whose folder lies outside its lake, as long as it is not finished."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from model.registry.pins import Pin, pins
from model.train import trainer
from model.train.config import TrainConfig
from tests.model.conftest import SMALLEST, WriteSequences

SETTINGS: dict[str, Any] = {"steps": 2, "global_batch_size": 4, "warmup_steps": 1, "device": "cpu"}
SETTINGS |= {"overrides": SMALLEST, "validate_every": 0}


def test_a_training_with_its_output_elsewhere_pins_until_it_is_done(
    write_sequences: WriteSequences, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lake, other = write_sequences(), write_sequences("other", seed=1)
    here = TrainConfig(**SETTINGS, name="here")
    elsewhere = TrainConfig(**SETTINGS, name="elsewhere", output=str(tmp_path / "out"))
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")

        def killed(*arguments: object) -> None:
            raise KeyboardInterrupt

        with patch.context() as kill:
            kill.setattr(trainer, "_run", killed)
            for config in (here, elsewhere):
                with pytest.raises(KeyboardInterrupt):
                    trainer.train(lake, config)
        unfinished = "which is not finished,"
        assert list(pins(lake)) == [
            Pin(
                holder=f"The training elsewhere in {tmp_path / 'out'}, {unfinished}", table="gold.sequences", version=0
            ),
            Pin(holder=f"The training here, {unfinished}", table="gold.sequences", version=0),
        ]
        assert list(pins(other)) == [], "another table's"
        trainer.train(lake, elsewhere)
        assert [pin.holder for pin in pins(lake)] == [f"The training here, {unfinished}"]
