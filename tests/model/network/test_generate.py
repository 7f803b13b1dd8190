"""Generation: equal to the full forward, deterministic by seed, whole characters, stop texts, limits."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from model.config import ModelConfig
from model.errors import ModelError
from model.network.generate import SamplingConfig, _Text, encode_prompt, generate, load_tokenizer, sample
from model.network.transformer import Transformer
from pipelines.tables import SPECIAL_TOKENS


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """One token a byte: every character beyond ASCII is spread over several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(list(SPECIAL_TOKENS))
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return load_tokenizer(str(path))


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Transformer:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=tokenizer.get_vocab_size() + 11,
        max_seq_len=64,
        layers=2,
        width=32,
        heads=4,
        head_width=8,
        expert_width=16,
        init_std=0.3,
    )
    return Transformer(config).eval()


def complete(model: Transformer, tokenizer: Tokenizer, prompt: str, sampling: SamplingConfig) -> str:
    return "".join(piece.text for piece in generate(model, tokenizer, prompt, sampling))


def test_greedy_is_the_full_forward_without_a_cache(model: Transformer, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("def main", add_special_tokens=False).ids
    prompt = len(ids)
    known = tokenizer.get_vocab_size()
    with torch.no_grad():
        for _ in range(24):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1, :known].argmax()))
    wanted = tokenizer.decode(ids[prompt:], skip_special_tokens=True)
    pieces = list(generate(model, tokenizer, "def main", SamplingConfig(max_tokens=24, temperature=0)))
    assert "".join(p.text for p in pieces) == wanted
    assert pieces[-1].finish_reason == "length"
    assert (pieces[-1].prompt_tokens, pieces[-1].completion_tokens) == (prompt, 24)
    assert all(p.finish_reason is None for p in pieces[:-1])


def test_a_seed_gives_the_same_text_and_another_seed_another(model: Transformer, tokenizer: Tokenizer) -> None:
    one, again, other = (
        complete(model, tokenizer, "x = ", SamplingConfig(max_tokens=30, seed=seed)) for seed in (1, 1, 2)
    )
    assert one == again != other


def test_stop_text_ends_the_completion_and_is_not_in_it(model: Transformer, tokenizer: Tokenizer) -> None:
    whole = complete(model, tokenizer, "a", SamplingConfig(max_tokens=40, seed=5))
    stop = whole[len(whole) // 2 :][:3]
    pieces = list(generate(model, tokenizer, "a", SamplingConfig(max_tokens=40, seed=5, stop=(stop,))))
    assert "".join(p.text for p in pieces) == whole[: whole.index(stop)]
    assert pieces[-1].finish_reason == "stop"


def test_end_of_text_ends_and_is_not_shown(model: Transformer, tokenizer: Tokenizer) -> None:
    end = tokenizer.token_to_id(SPECIAL_TOKENS[0])
    biased = Transformer(model.config).eval()
    biased.load_state_dict(model.state_dict())
    with torch.no_grad():
        first = biased.hidden(torch.tensor([tokenizer.encode("a").ids])).states[0, -1]
        biased.head_weight[end] = 100 * first
    (piece,) = generate(biased, tokenizer, "a", SamplingConfig(temperature=0))
    assert (piece.text, piece.finish_reason, piece.completion_tokens) == ("", "stop", 1)


def test_pieces_are_whole_characters_and_hold_back_a_stop_text(tokenizer: Tokenizer) -> None:
    text = _Text(tokenizer, ("STOP",))
    out = [text.add(token) for token in tokenizer.encode("aé🙂STxSTOPb").ids]
    released = [piece for piece, _ in out if piece]
    assert released[:3] == ["a", "é", "🙂"]
    stopped = next(i for i, (_, done) in enumerate(out) if done)
    assert "".join(piece for piece, _ in out[: stopped + 1]) == "aé🙂STx"


def test_special_tokens_in_a_prompt_are_text(model: Transformer, tokenizer: Tokenizer) -> None:
    special = {tokenizer.token_to_id(s) for s in SPECIAL_TOKENS}
    ids = encode_prompt(model, tokenizer, "a<|endoftext|>b", 1)
    assert not special & set(ids)
    assert tokenizer.decode(ids) == "a<|endoftext|>b"
    assert encode_prompt(model, tokenizer, "", 1) == [tokenizer.token_to_id(SPECIAL_TOKENS[0])]


def test_a_prompt_that_does_not_fit_is_a_sentence_at_once(model: Transformer, tokenizer: Tokenizer) -> None:
    with pytest.raises(ModelError, match="60 tokens and max_tokens 5 do not fit the model's 64 tokens") as error:
        generate(model, tokenizer, "a" * 60, SamplingConfig(max_tokens=5))
    assert error.value.exit_code == 2
    assert list(generate(model, tokenizer, "a" * 60, SamplingConfig(max_tokens=4)))[-1].finish_reason


def test_top_p_keeps_the_fewest_tokens_and_at_least_one() -> None:
    logits = torch.tensor([0.1, 0.5, 0.3, 0.1]).log()
    generator = torch.Generator().manual_seed(0)

    def drawn(**fields: float) -> set[int]:
        return {sample(logits, SamplingConfig(**fields), generator) for _ in range(400)}  # type: ignore[arg-type]

    assert drawn(top_p=0.01) == {1}
    assert drawn(top_p=0.6) == {1, 2}
    assert drawn() == {0, 1, 2, 3}
    assert drawn(temperature=1e-300) == {1}


def test_sampling_follows_the_probabilities() -> None:
    probability = torch.tensor([0.5, 0.3, 0.2])
    generator = torch.Generator().manual_seed(1)
    counts = torch.zeros(3)
    for _ in range(3000):
        counts[sample(probability.log(), SamplingConfig(), generator)] += 1
    torch.testing.assert_close(counts / 3000, probability, rtol=0, atol=0.03)
    assert all(a > b for a, b in pairwise(counts.tolist()))


def test_an_unreadable_tokenizer_is_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match="not a readable tokenizer"):
        load_tokenizer(str(path))
