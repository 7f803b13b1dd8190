"""The registered model as MLflow runs it. MLflow stores this file's text beside the weights and executes it on load.

Input: a column ``prompt``, one text a row; output: the completions, in order. Nothing in it is pickled.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel

from model.network.generate import SamplingConfig, generate
from model.registry.load import open_folder


class Completions(PythonModel):
    """Completes prompts; params are max_tokens, temperature, top_p and seed."""

    def load_context(self, context: Any) -> None:
        self.transformer, self.tokenizer, _ = open_folder(Path(context.artifacts["weights"]).parent)

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> list[str]:
        sampling = SamplingConfig(**(params or {}))
        return [
            "".join(piece.text for piece in generate(self.transformer, self.tokenizer, str(prompt), sampling))
            for prompt in model_input["prompt"]
        ]


set_model(Completions())
