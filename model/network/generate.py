"""Text from a model: one prompt, one token at a time over a KV cache, given out in pieces as it comes.

Leaves out batching of several prompts and log-probabilities.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from model.errors import ModelError
from model.network.cache import KVCache
from model.network.transformer import Transformer
from pipelines.tables import END_OF_TEXT


class SamplingConfig(BaseModel):
    """How the next token is chosen and when to end. The names and defaults are those of OpenAI's completions."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_tokens: int = Field(default=16, ge=1, description="most tokens to generate (tokens)")
    temperature: float = Field(
        default=1.0, ge=0, le=2, description="divides the logits; 0 takes the most probable token"
    )
    top_p: float = Field(
        default=1.0, gt=0, le=1, description="sample from the fewest tokens with this much probability"
    )
    seed: int | None = Field(
        default=None, ge=-(2**63), lt=2**63, description="the same seed gives the same text; null: any"
    )
    stop: tuple[str, ...] = Field(
        default=(), max_length=4, description="texts that end the completion and are not in it"
    )


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Text that no later token changes; the last piece, and only it, has a finish_reason (and may have no text).

    completion_tokens counts the tokens so far, an end-of-text token included.
    """

    text: str
    prompt_tokens: int
    completion_tokens: int
    finish_reason: Literal["stop", "length"] | None = None


def load_tokenizer(path: str) -> Tokenizer:
    """The tokenizer of a JSON file. Special tokens written in a text are text, as in training, never control tokens."""
    try:
        tokenizer = Tokenizer.from_file(path)
    except Exception as error:  # tokenizers raises Exception itself
        raise ModelError(f"{path} is not a readable tokenizer ({error}); restore it.") from error
    if tokenizer.token_to_id(END_OF_TEXT) is None:
        raise ModelError(f"{path} has no token {END_OF_TEXT}; take a tokenizer made by train-tokenizer.")
    tokenizer.encode_special_tokens = True
    return tokenizer


def end_of_text_id(tokenizer: Tokenizer) -> int:
    """The end-of-text token's id. Errors: ValueError where the tokenizer has none."""
    token = tokenizer.token_to_id(END_OF_TEXT)
    if token is None:
        raise ValueError(f"tokenizer: there is no token {END_OF_TEXT}")
    return token


def encode_prompt(model: Transformer, tokenizer: Tokenizer, prompt: str, max_tokens: int) -> list[int]:
    """The prompt's tokens; an empty prompt is the end-of-text token. Errors: ModelError (2) where it does not fit."""
    ids: list[int] = tokenizer.encode(prompt, add_special_tokens=False).ids or [end_of_text_id(tokenizer)]
    limit = model.config.max_seq_len
    if len(ids) + max_tokens > limit:
        raise ModelError(
            f"The prompt's {len(ids)} tokens and max_tokens {max_tokens} do not fit the model's {limit} tokens; "
            "shorten the prompt or lower max_tokens.",
            2,
        )
    return ids


def generate(
    model: Transformer, tokenizer: Tokenizer, prompt: str, sampling: SamplingConfig | None = None
) -> Iterator[Piece]:
    """Continues the prompt until end of text, a stop text or max_tokens; the joined pieces are the completion.

    With temperature 0 the tokens are those of the full forward without a cache.
    Errors: ModelError (2), at once and not at the first piece, where prompt and max_tokens do not fit the model.
    """
    sampling = sampling or SamplingConfig()
    return _pieces(model, tokenizer, encode_prompt(model, tokenizer, prompt, sampling.max_tokens), sampling)


def _pieces(model: Transformer, tokenizer: Tokenizer, prompt: list[int], sampling: SamplingConfig) -> Iterator[Piece]:
    generator = torch.Generator()
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed)
    end = end_of_text_id(tokenizer)
    known = tokenizer.get_vocab_size()
    cache = KVCache(
        model.config, 1, len(prompt) + sampling.max_tokens, device=model.device, dtype=model.embedding.weight.dtype
    )
    text = _Text(tokenizer, sampling.stop)
    read = prompt
    for count in range(1, sampling.max_tokens + 1):
        # Not a decorator: inference mode would stay on in the caller between two pieces.
        with torch.inference_mode():
            state_D = model.hidden(torch.tensor([read], device=model.device), cache=cache).states[0, -1]
            # A vocabulary rounded up has rows that no tokenizer knows.
            token = sample(F.linear(state_D, model.head_weight)[:known], sampling, generator)
        if token == end:
            new, stopped = text.close(), True
        else:
            new, stopped = text.add(token)
        last = count == sampling.max_tokens
        if last and not stopped:
            new += text.close()
        if new or stopped or last:
            yield Piece(
                text=new,
                prompt_tokens=len(prompt),
                completion_tokens=count,
                finish_reason="stop" if stopped else "length" if last else None,
            )
        if stopped:
            return
        read = [token]


def sample(logits_V: Tensor, sampling: SamplingConfig, generator: torch.Generator) -> int:
    """One token id by temperature and top_p (nucleus sampling, Holtzman et al. 2020), drawn on the CPU."""
    logits = logits_V.detach().double().cpu()
    if sampling.temperature == 0:
        return int(logits.argmax())
    # The largest is subtracted first, so that a small temperature cannot overflow.
    probability, order = ((logits - logits.max()) / sampling.temperature).softmax(dim=0).sort(descending=True)
    before = probability.cumsum(dim=0) - probability
    probability[before >= sampling.top_p] = 0.0
    probability[0] = probability[0].clamp(min=torch.finfo(torch.float64).tiny)
    return int(order[torch.multinomial(probability, 1, generator=generator)])


class _Text:
    """Turns tokens into text that is final: whole characters, and nothing that may be the start of a stop text."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...]) -> None:
        self.tokenizer = tokenizer
        self.stop = tuple(s for s in stop if s)
        self.tokens: list[int] = []
        self.held = ""

    def add(self, token: int) -> tuple[str, bool]:
        """The new final text, and whether a stop text ended it."""
        self.tokens.append(token)
        text = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        # A character's bytes may be spread over tokens; half of one decodes to U+FFFD.
        if text.endswith("\ufffd"):
            return "", False
        self.tokens.clear()
        return self._release(text)

    def close(self) -> str:
        """What is still held back, once no token follows."""
        rest, stopped = self._release(self.tokenizer.decode(self.tokens, skip_special_tokens=True))
        self.tokens.clear()
        return rest if stopped else rest + self.held

    def _release(self, text: str) -> tuple[str, bool]:
        self.held += text
        found = [at for at in (self.held.find(s) for s in self.stop) if at >= 0]
        if found:
            return self.held[: min(found)], True
        keep = max((n for s in self.stop for n in range(len(s)) if self.held.endswith(s[:n])), default=0)
        cut = len(self.held) - keep
        out, self.held = self.held[:cut], self.held[cut:]
        return out, False
