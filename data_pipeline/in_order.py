"""Calls on threads, their results in order, and an end that leaves no thread behind."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from itertools import islice
from typing import Generic, Self, TypeVar

import cv2

_Group = TypeVar("_Group")
_Result = TypeVar("_Result")


class InOrder(Generic[_Group, _Result]):
    """Runs the calls of each group on threads; yields groups with their results, in order.

    While the consumer holds a group, `ahead` more are running or done. The first exception of a
    call is raised at its group's turn. The threads end when it is exhausted, has raised (also what
    interrupts the consumer while it waits), is dropped or is closed, the last by any thread: a
    consumer that waits meanwhile finds the end. Calls that are running are waited for.
    """

    def __init__(
        self,
        groups: Iterable[tuple[_Group, list[Callable[[], _Result]]]],
        threads: int,
        ahead: int,
    ) -> None:
        cv2.setNumThreads(0)  # ours are threads enough; OpenCV's own would compete with them
        self._groups: Iterator[tuple[_Group, list[Callable[[], _Result]]]] = iter(groups)
        self._ahead = ahead
        self._running: deque[tuple[_Group, list[Future[_Result]]]] = deque()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="atrous-loader")
        self._closed = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> tuple[_Group, list[_Result]]:
        if self._closed:
            raise StopIteration
        try:
            self._submit()
            if not self._running:
                raise StopIteration
            group, futures = self._running.popleft()
            return group, [future.result() for future in futures]
        except (CancelledError, RuntimeError):  # RuntimeError: the pool takes no more calls
            if not self._closed:
                self.close()
                raise
            raise StopIteration from None
        except BaseException:
            self.close()
            raise

    def _submit(self) -> None:
        for group, calls in islice(self._groups, self._ahead + 1 - len(self._running)):
            self._running.append((group, [self._pool.submit(call) for call in calls]))

    def close(self) -> None:
        """End the threads; nothing more is yielded."""
        self._closed = True
        self._pool.shutdown(cancel_futures=True)
        self._running.clear()
        self._groups = iter(())  # a generator that is dropped ends what it holds open

    def __del__(self) -> None:
        if hasattr(self, "_pool"):  # absent when an argument was refused
            self.close()
