"""A mixture gives each domain its weight, phase by phase, whatever ranks and restarts."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.errors import ModelError
from model.loader.loader import Batch, SequenceLoader
from model.loader.mixture import Mixture, Phase
from model.loader.snapshot import open_sequences
from model.train.config import TrainConfig

WriteSequences = Callable[..., str]
DOMAINS = ("code", "text", "web")


@st.composite
def phases(draw: st.DrawFn) -> list[Phase]:
    weights = st.dictionaries(st.sampled_from(DOMAINS), st.sampled_from([0.0, 0.01, 1.0, 3.0]), min_size=1)
    found = draw(st.lists(weights.filter(lambda w: sum(w.values()) > 0), min_size=1, max_size=3))
    steps = [draw(st.integers(1, 40)) for _ in found[1:]]
    return [Phase(steps=s, weights=w) for s, w in zip([*steps, None], found, strict=True)]


@settings(max_examples=60, deadline=None)
@given(phases(), st.integers(1, 9), st.integers(0, 5), st.integers(0, 700), st.integers(0, 700))
def test_each_domain_has_its_weight_in_each_phase(
    given: list[Phase], batch: int, seed: int, start: int, more: int
) -> None:
    mixture = Mixture(given, DOMAINS, batch, seed)
    found = mixture.domains(start, start + more)
    assert len(found) == more
    assert found.tolist() == mixture.domains(0, start + more)[start:].tolist()
    assert mixture.counts(start + more).tolist() == np.bincount(mixture.domains(0, start + more), minlength=3).tolist()
    begin = 0
    for phase in given:
        end = start + more if phase.steps is None else min(start + more, begin + phase.steps * batch)
        if end <= begin:
            break
        counts = np.bincount(mixture.domains(begin, end), minlength=3)
        for name, count in zip(DOMAINS, counts.tolist(), strict=True):
            share = phase.weights.get(name, 0.0) / sum(phase.weights.values())
            assert abs(count - share * (end - begin)) <= 4
            assert share > 0 or count == 0
        begin = end


def _take(loader: SequenceLoader, steps: int) -> list[Batch]:
    return list(itertools.islice(iter(loader), steps))


CURRICULUM = (Phase(steps=3, weights={"text": 1}), Phase(weights={"code": 3, "text": 1}))


def test_a_curriculum_by_phases_and_epochs_of_each_domain(write_sequences: WriteSequences) -> None:
    snapshot = open_sequences(write_sequences(count=20))
    of_code = int(snapshot.rows_C[snapshot.domain_C == 0].sum())
    said: list[str] = []
    batches = _take(SequenceLoader(snapshot, 8, seed=5, mixture=CURRICULUM, say=said.append), 20)
    assert {d for b in batches[:3] for d in b.domains} == {"text"}
    later = Counter(d for b in batches[3:] for d in b.domains)
    assert abs(later["code"] - 0.75 * 17 * 8) <= 4
    code = [name for b in batches for name, d in zip(b.sequence_ids, b.domains, strict=True) if d == "code"]
    for at in range(0, len(code) - of_code, of_code):
        assert len(set(code[at : at + of_code])) == of_code
    assert code[:of_code] != code[of_code : 2 * of_code]
    assert f"the domain code begins its epoch {len(code) // of_code + 1}" in said


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_share_each_global_batch_and_resume_anywhere(write_sequences: WriteSequences, world: int) -> None:
    snapshot = open_sequences(write_sequences(count=20))
    whole = [b.sequence_ids for b in _take(SequenceLoader(snapshot, 8, seed=5, mixture=CURRICULUM), 6)]
    state = SequenceLoader(snapshot, 8, seed=5, mixture=CURRICULUM).state_dict()
    for step in range(6):
        loaders = [SequenceLoader(snapshot, 8, rank, world, seed=5, mixture=CURRICULUM) for rank in range(world)]
        for loader in loaders:
            kept: dict[str, Any] = json.loads(json.dumps(state))
            if loader.rank % 2:
                del kept["domain_samples"]  # it is counted then
            loader.load_state_dict(kept)
        parts = [next(iter(loader)).sequence_ids for loader in loaders]
        assert list(itertools.chain(*zip(*parts, strict=True))) == whole[step]
        state = loaders[0].state_dict()


def test_what_does_not_fit_is_refused(write_sequences: WriteSequences) -> None:
    snapshot = open_sequences(write_sequences(count=20))
    state = SequenceLoader(snapshot, 8, mixture=CURRICULUM).state_dict()
    for other in ((), CURRICULUM[1:]):
        with pytest.raises(ModelError, match="mixture"):
            SequenceLoader(snapshot, 8, mixture=other).load_state_dict(state)
    with pytest.raises(ModelError, match="mixture None, here"):
        SequenceLoader(snapshot, 8, mixture=CURRICULUM).load_state_dict(SequenceLoader(snapshot, 8).state_dict())
    for wrong, said in (
        ([Phase(weights={"prose": 1})], "weighs prose, but the domains are code, text"),
        ([Phase(weights={"code": 0})], "one above 0"),
        ([Phase(weights={"code": -1, "text": 2})], "0 and more"),
        ([Phase(weights={"code": float("nan")})], "0 and more"),
        ([Phase(steps=3, weights={"code": 1})], "has steps"),
        ([Phase(weights={"code": 1}), Phase(weights={"code": 1})], "Phase 1 of the mixture has no steps"),
    ):
        with pytest.raises(ModelError, match=said) as refused:
            SequenceLoader(snapshot, 8, mixture=wrong)
        assert refused.value.exit_code == 2


def test_a_mixture_is_part_of_what_decides_the_weights() -> None:
    before = {key: value for key, value in TrainConfig().identity().items() if key != "mixture"}
    assert TrainConfig.identity_of(before) == TrainConfig().identity(), (
        "trainings from before there were mixtures go on"
    )
    mixed = TrainConfig(mixture=CURRICULUM).identity()
    assert mixed["mixture"][0] == {"steps": 3, "weights": {"text": 1.0}}
    assert TrainConfig.identity_of(mixed) == mixed != TrainConfig().identity()
