"""Ends of the loader's threads: errors, closing and interruptions while the consumer waits."""

import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from data_pipeline.in_order import InOrder


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    threads = [t for t in threading.enumerate() if t.name.startswith("atrous-loader")]
    for thread in threads:
        thread.join(60)  # an interrupted consumer does not wait for its last call
    assert not any(thread.is_alive() for thread in threads)


def groups(*calls: Callable[[], Any]) -> Iterator[tuple[int, list[Callable[[], Any]]]]:
    return ((number, [call]) for number, call in enumerate(calls))


def fail() -> None:
    raise KeyError("broken")


def test_results_come_in_order_and_then_the_end() -> None:
    calls = InOrder(groups(*(lambda i=i: i * i for i in range(20))), threads=4, ahead=3)
    assert list(calls) == [(i, [i * i]) for i in range(20)]
    assert list(calls) == []


def test_an_error_comes_at_its_turn_and_is_the_end() -> None:
    calls = InOrder(groups(lambda: 1, fail, lambda: 3), threads=2, ahead=2)
    assert next(calls) == (0, [1])
    with pytest.raises(KeyError, match="broken"):
        next(calls)
    assert list(calls) == []


def test_an_error_of_the_groups_is_raised() -> None:
    def broken() -> Iterator[tuple[int, list[Callable[[], int]]]]:
        yield 0, [lambda: 1]
        raise RuntimeError("no plan")

    calls = InOrder(broken(), threads=2, ahead=0)
    assert next(calls) == (0, [1])
    with pytest.raises(RuntimeError, match="no plan"):
        next(calls)
    assert list(calls) == []


def test_another_thread_may_close_while_the_consumer_waits() -> None:
    started, release, found = threading.Event(), threading.Event(), []

    def stuck() -> str:
        started.set()
        release.wait(60)
        return "late"

    calls = InOrder(groups(stuck, stuck, stuck), threads=1, ahead=2)
    consumer = threading.Thread(target=lambda: found.extend(calls))
    consumer.start()
    assert started.wait(60)
    closer = threading.Thread(target=calls.close)
    closer.start()
    release.set()
    consumer.join(60)
    closer.join(60)
    assert not consumer.is_alive()
    assert not closer.is_alive()
    assert len(found) <= 1  # the call that ran; those that waited are given up
    assert list(calls) == []


def test_an_interrupted_consumer_ends_the_threads() -> None:
    release = threading.Event()

    def interrupting() -> None:
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, signal.SIGINT)  # it waits for this call
        release.wait(60)

    def handler(*_: Any) -> None:
        release.set()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, handler)
    try:
        calls = InOrder(groups(interrupting, lambda: 1), threads=1, ahead=1)
        with pytest.raises(KeyboardInterrupt):
            next(calls)
        assert list(calls) == []
    finally:
        signal.signal(signal.SIGINT, before)


def test_closing_ends_what_the_groups_hold() -> None:
    ended = []

    def holding() -> Iterator[tuple[int, list[Callable[[], int]]]]:
        try:
            for number in range(100):
                yield number, [lambda: 1]
        finally:
            ended.append(True)

    calls = InOrder(holding(), threads=1, ahead=1)
    next(calls)
    assert not ended
    calls.close()
    assert ended
