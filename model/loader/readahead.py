"""Row groups loaded before they are needed, and kept as long as there is room.

What is held: the row groups that are needed next, in the order of need, as many as there is room for, and those needed
before, the latest ones longest, as long as nothing else wants their place. Threads load, and the caller itself what no
thread has begun with when it is needed. What is loaded when has no influence on what is handed out, and an error in a
thread is raised where its row group is needed.

Memory: at most `room` bytes of row groups, or one row group where that is larger, and while a row group is loaded its
bytes as they lie in the file (times THREADS_REMOTE for an object store, nothing for memory-mapped files).
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

THREADS_LOCAL, THREADS_REMOTE = 2, 8
HORIZON = 64  # batches that are looked at ahead of the one asked for, at most

Value = TypeVar("Value")
Item = TypeVar("Item")


class Readahead(Generic[Value]):
    """load: makes row group number g, in a thread, until the event is set; nbytes: what it then takes, known before.

    at_once: whether threads load the first item's row groups as well, side by side; for a store that has latency.
    """

    def __init__(
        self,
        load: Callable[[int, threading.Event], Value],
        nbytes: Callable[[int], int],
        room: int,
        threads: int,
        at_once: bool = True,
    ) -> None:
        self._load, self._nbytes, self.room, self._threads, self._at_once = load, nbytes, room, threads, at_once
        self._held: dict[int, Future[Value]] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # held, and not needed by what was looked at
        self._needs: Counter[int] = Counter()
        self._used = 0

    def follow(self, wanted: Iterator[tuple[Item, Sequence[int]]]) -> Generator[tuple[Item, Callable[[int], Value]]]:
        """Each item with a function that gives its row groups, which must be asked for one after the other, in order.

        wanted: items, each with the row groups that it needs; taken up to HORIZON items ahead. Closing the iterator
        ends the threads. One iterator at a time.
        """
        items: deque[tuple[Item, Sequence[int]]] = deque()
        ahead: deque[int] = deque()  # needs of the items that are loaded or being loaded
        later: deque[int] = deque()  # needs for which there was no room yet
        stop = threading.Event()
        pool = ThreadPoolExecutor(self._threads, thread_name_prefix="loader")

        def submit(group: int) -> None:
            self._used += self._nbytes(group)
            self._held[group] = pool.submit(self._load, group, stop)

        def hold(group: int) -> None:
            self._used += self._nbytes(group)
            self._held[group] = Future()

        def look(horizon: int) -> None:
            while len(items) < horizon and (more := next(wanted, None)) is not None:
                items.append(more)
                later.extend(more[1])

        def advance() -> None:
            look(HORIZON)
            while later and self._admit(later[0], submit):
                ahead.append(later.popleft())

        def get(group: int) -> Value:
            if ahead:
                expected = ahead.popleft()
            else:
                expected = later.popleft()
                self._admit(expected, hold, must=True)
            assert group == expected, "row groups are asked for in the order in which they were announced"
            future = self._held[group]
            try:
                if not future.cancel():
                    return future.result()
                value = self._load(group, stop)  # nobody has begun with it
                self._held[group] = Future()
                self._held[group].set_result(value)
                return value
            except BaseException:
                self._drop(group)
                raise
            finally:
                self._needs[group] -= 1
                if not self._needs[group]:
                    del self._needs[group]
                    if group in self._held:
                        self._idle[group] = None

        try:
            if self._at_once:
                advance()
            else:
                look(1)
            while items:
                yield items.popleft()[0], get
                advance()
        finally:
            stop.set()
            self._needs.clear()
            for group, future in list(self._held.items()):
                if not future.cancel() and future.done() and future.exception() is None:
                    self._idle.setdefault(group)
                else:
                    self._drop(group)
            pool.shutdown(wait=False)

    def _admit(self, group: int, submit: Callable[[int], None], must: bool = False) -> bool:
        """Have the row group loaded where there is room, or there must be; what is not needed any more makes room."""
        if group in self._held:
            self._idle.pop(group, None)
        else:
            size = self._nbytes(group)
            while self._idle and self._used + size > self.room:
                self._drop(next(iter(self._idle)))
            if self._used + size > self.room and not must:
                return False
            submit(group)
        self._needs[group] += 1
        return True

    def _drop(self, group: int) -> None:
        if self._held.pop(group, None) is not None:
            self._used -= self._nbytes(group)
        self._idle.pop(group, None)
