"""Serve a registered model over HTTP in the OpenAI shape, until SIGTERM or Ctrl-C has drained it."""

from __future__ import annotations

import sys

from pydantic import Field

from jobs import console
from jobs.main import main
from jobs.settings import JobSettings
from model.serve.config import ServeConfig
from model.serve.server import open_server


class Settings(JobSettings):
    """Serve a registered model over HTTP in the OpenAI shape."""

    model: str = Field("models:/quickstart@champion", description="models:/NAME@ALIAS or models:/NAME/VERSION")
    serve: ServeConfig = Field(default_factory=ServeConfig, description="settings of the server")


def run(settings: Settings) -> None:
    server = open_server(settings.model, lake=settings.lake, config=settings.serve)
    console.note(f"{server.served.name} version {server.served.version} at {server.address} (Ctrl-C ends it); try:")
    console.note(server.example)
    server.run()


if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
