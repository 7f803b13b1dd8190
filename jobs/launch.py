"""Start a training in several processes: by torchrun on this machine, or by Spark's TorchDistributor in barrier mode.

Both set torchrun's environment variables and enter by the same door, ``jobs.train.train_here``; model/train/world.py
reads the variables. On several machines, start ``torchrun ... -m jobs.train`` on each, or let Spark place them.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import uuid
from pathlib import Path
from typing import Literal

import yaml

from jobs import console
from jobs.main import TRY_AGAIN
from model.errors import ModelError
from model.train.config import TrainConfig

Launcher = Literal["torchrun", "spark"]


def is_main() -> bool:
    """Whether this process is a training's first, or its only one."""
    return os.environ.get("RANK", "0") == "0"


def launch(launcher: Launcher, processes: int, lake: str, config: TrainConfig) -> int:
    """Train in so many processes; the exit code. What they print is theirs."""
    return (_torchrun if launcher == "torchrun" else _spark)(processes, lake, config)


def _torchrun(processes: int, lake: str, config: TrainConfig) -> int:
    """torch.distributed.run by its Python interface, because its command line hides the processes' exit codes."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The processes save before they end, which may take longer than the half minute that they are given.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "3600")
    # What it has to say the processes have said.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # One thread a core in all: every process would take all of them.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    with tempfile.TemporaryDirectory(prefix="lakemoe-") as folder:
        file = Path(folder) / "train.yaml"
        file.write_text(yaml.safe_dump({"train": config.model_dump(mode="json", exclude_defaults=True)}))
        how = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            monitor_interval=0.2,
        )
        try:
            elastic_launch(how, sys.executable)("-m", "jobs.train", "--lake", lake, "--config", str(file))
        except ChildFailedError as error:
            # Where one fails alone, others fail for want of it in the same moment; a signal's number is negative.
            codes = {failure.exitcode for failure in error.failures.values()}
            first = error.get_first_failure()[1].exitcode
            return TRY_AGAIN if TRY_AGAIN in codes or first <= 0 else first
        except SignalException:
            return TRY_AGAIN
    return 0


def _spark(processes: int, lake: str, config: TrainConfig) -> int:
    """One barrier stage of Spark with a process a task."""
    import torch
    from pyspark.ml.torch.distributor import TorchDistributor

    from pipelines.session import spark_session

    spark = spark_session()
    slots = spark.sparkContext.defaultParallelism
    if slots < processes:
        raise ModelError(
            f"Spark has {slots} slots for tasks that run at the same time, and {processes} processes need as many; "
            "lower --processes or give Spark more cores.",
            2,
        )
    console.note(f"train: {processes} processes by Spark; what they print is in the tasks' logs")
    distributor = TorchDistributor(num_processes=processes, local_mode=False, use_gpu=torch.cuda.is_available())
    distributor.run(train_task, lake, config.model_dump_json())
    return 0


def train_task(lake: str, config: str) -> None:
    """What each of TorchDistributor's processes runs. config: a TrainConfig as JSON."""
    from jobs.train import train_here

    train_here(lake, TrainConfig.model_validate_json(config))
