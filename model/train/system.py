"""What the machine does while it trains, by MLflow's own monitors, under the names of MLflow's system metrics.

They are sampled between steps and go into the journal's line, so that they reach MLflow as the losses do: batched, by
a thread, and later where the tracking server is down (MLflow's own thread ends at the first failure). Of several nodes
the first one's alone. A GPU's need nvidia-ml-py, which the extra ``gpu`` installs.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import psutil
from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

INTERVAL = 10.0  # seconds between samples, MLflow's own default


class SystemMetrics:
    """system/cpu_utilization_percentage, system/gpu_0_power_usage_watts and so on, of the main process alone.

    A monitor that fails is said once and left out: the training goes on.
    """

    def __init__(self, main: bool, say: Callable[[str], None]) -> None:
        self._monitors: list[BaseMetricsMonitor] = []
        self._say = say
        kinds: tuple[type[BaseMetricsMonitor], ...] = (CPUMonitor, DiskMonitor, NetworkMonitor, GPUMonitor)
        for kind in kinds if main else ():
            try:
                self._monitors.append(kind())
                if kind is CPUMonitor:
                    psutil.cpu_percent()  # each call tells of the time since the one before
            except Exception as error:  # what a restricted /proc gives; of GPUs: no nvidia-ml-py, or none here
                if not (kind is GPUMonitor and isinstance(error, ImportError | RuntimeError)):
                    self._left_out(kind, error)
        self._next = time.monotonic() + INTERVAL

    def _left_out(self, kind: type[BaseMetricsMonitor], error: Exception) -> None:
        self._say(f"no metrics of {kind.__name__} ({error})")

    def line(self) -> dict[str, float]:
        """The metrics where the last ones are INTERVAL seconds old, else none."""
        if time.monotonic() < self._next:
            return {}
        self._next = time.monotonic() + INTERVAL
        found: dict[str, float] = {}
        for monitor in list(self._monitors):
            try:
                monitor.collect_metrics()
                found |= {f"system/{name}": float(value) for name, value in monitor.aggregate_metrics().items()}
                monitor.clear_metrics()
            except Exception as error:
                self._monitors.remove(monitor)
                self._left_out(type(monitor), error)
        return found
