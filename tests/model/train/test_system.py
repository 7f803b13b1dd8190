"""The machine's metrics by MLflow's names; what cannot be read ends no training."""

from __future__ import annotations

import pytest
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

from model.train import system
from model.train.system import SystemMetrics


def test_monitors_that_fail_are_left_out_and_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "INTERVAL", 0.0)

    def fails(self: object) -> None:
        raise AttributeError("no /proc here")

    monkeypatch.setattr(NetworkMonitor, "__init__", fails)
    said: list[str] = []
    metrics = SystemMetrics(True, said.append)
    assert said == ["no metrics of NetworkMonitor (no /proc here)"]
    first = metrics.line()
    assert {"system/cpu_utilization_percentage", "system/disk_usage_percentage"} <= set(first)
    monkeypatch.setattr(CPUMonitor, "collect_metrics", fails)
    for _ in range(2):
        assert not any("cpu" in name for name in metrics.line())
    assert said[1:] == ["no metrics of CPUMonitor (no /proc here)"]


def test_they_are_of_one_process_and_every_few_seconds() -> None:
    said: list[str] = []
    assert SystemMetrics(True, said.append).line() == {}
    assert SystemMetrics(False, said.append)._monitors == []
