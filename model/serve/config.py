"""Settings of the HTTP server: where it listens and what it refuses."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from model.device import DeviceName


class ServeConfig(BaseModel):
    """Where the server listens, on which device it computes, and its limits."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = Field(
        default="127.0.0.1",
        min_length=1,
        description="address to listen on; there is no access control yet, so others than loopback are open to all",
    )
    port: int = Field(default=8000, ge=0, le=65535, description="TCP port; 0 takes a free one")
    device: DeviceName = Field(default="auto", description="where the model computes; auto is cuda where there is one")
    queue: int = Field(
        default=32, ge=0, description="most requests that wait beside the one that runs; more are told 429 (requests)"
    )
    timeout: float = Field(default=120.0, gt=0, description="most time a request may take, waiting included (s)")
    drain: float = Field(
        default=30.0, ge=0, description="most time that accepted requests have to finish after SIGTERM (s)"
    )
    max_prompts: int = Field(default=16, ge=1, description="most prompts in one request (prompts)")
    max_body: int = Field(default=1_048_576, ge=1, description="largest request body (bytes)")
