"""Complete a prompt with a registered model; the prompt and its completion go to standard output as they come."""

from __future__ import annotations

import sys

from pydantic import Field

from jobs.main import main
from jobs.settings import JobSettings, UsageError
from model.network.generate import SamplingConfig, generate
from model.registry.load import load


class Settings(JobSettings):
    """Complete a prompt with a registered model, on standard output."""

    prompt: str = Field(description="text to continue; - reads standard input")
    model: str = Field("models:/quickstart@champion", description="models:/NAME@ALIAS or models:/NAME/VERSION")
    sampling: SamplingConfig = Field(default_factory=SamplingConfig, description="how tokens are chosen")


def run(settings: Settings) -> None:
    raw = sys.stdin.buffer.read() if settings.prompt == "-" else settings.prompt.encode("utf-8", "surrogateescape")
    try:
        prompt = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"The prompt is not UTF-8 ({error.reason} at byte {error.start}); convert it first.") from None
    loaded = load(settings.model, lake=settings.lake)
    pieces = generate(loaded.transformer, loaded.tokenizer, prompt, settings.sampling)
    print(prompt, end="", flush=True)
    for piece in pieces:
        print(piece.text, end="", flush=True)
    print()


if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]]))
