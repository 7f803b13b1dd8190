"""Row groups are loaded in time, within the room, and what a thread meets reaches the caller in its turn."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.errors import ModelError
from model.loader.readahead import HORIZON, Readahead

NEEDS = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True), max_size=30)


class Counted:
    """Values that know how many of them are there, and a size for each number."""

    def __init__(self, room: int) -> None:
        self.loads: Counter[int] = Counter()
        self.largest = 0
        self.reader = Readahead(self._load, self.size, room, 3)

    @staticmethod
    def size(number: int) -> int:
        return number % 4 + 1

    def _load(self, number: int, stop: threading.Event) -> int:
        self.loads[number] += 1
        return 100 * number

    def run(self, needs: list[list[int]]) -> None:
        handed = []
        followed = self.reader.follow((at, numbers) for at, numbers in enumerate(needs))
        for item, get in followed:
            handed.append(item)
            for number in needs[item]:
                assert get(number) == 100 * number
                self.largest = max(self.largest, sum(map(self.size, self.reader._held)))
        assert handed == list(range(len(needs)))


@given(NEEDS, st.integers(0, 25))
def test_each_is_given_in_its_turn_and_no_more_is_held_than_there_is_room(needs: list[list[int]], room: int) -> None:
    counted = Counted(room)
    counted.run(needs)
    assert counted.largest <= max(room, 4)
    if room >= 25:  # all ten fit
        assert set(counted.loads.values()) <= {1}
    counted.run(needs)  # what is held serves the next one


def test_no_further_is_looked_than_the_horizon() -> None:
    taken: list[int] = []

    def wanted() -> Iterator[tuple[int, list[int]]]:
        for number in itertools.count():
            taken.append(number)
            yield number, [number % 10]

    followed = Counted(100).reader.follow(wanted())
    next(followed)
    assert len(taken) == HORIZON


def test_an_error_comes_when_its_row_group_is_needed_and_not_before() -> None:
    def load(number: int, stop: threading.Event) -> int:
        if number == 5:
            raise ModelError("gone", 75)
        return number

    followed = Readahead(load, lambda number: 1, 100, 2).follow((n, [n]) for n in range(10))
    given = []
    with pytest.raises(ModelError, match="gone"):
        given.extend(get(number) for number, get in followed)
    assert given == [0, 1, 2, 3, 4]
