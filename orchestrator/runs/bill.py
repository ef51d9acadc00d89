"""What a run has cost, and where its time went: a pure function of the events in its directory.

Events it reads, beside `time` (seconds since 1970) and `kind`:

attempt    a command takes the run up: gpus_per_worker, cpus_per_worker, price_per_gpu_hour, and
           `seen`, the last sign of life of the workers before
workers    workers are up: world, and `seen` as above
device     what they compute on: ideal_step (`orchestrator.training.ledger`)
start      training starts or goes on at `step`: what was trained behind it is trained again
time       `step` steps are done; `seconds` since the workers came up (or went back) that were no
           training, by cause; one at each checkpoint, so that nothing after the last one is kept
hang       the workers end themselves after `silence` seconds
rollback   the run goes back, after a loss or gradient that was not finite
ended      the command has let go of the run: status

An attempt without `ended` was killed. Time between two events belongs to the later one.
"""

import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from orchestrator.job.sections import Cluster
from orchestrator.runs.liveness import read_beats
from orchestrator.runs.run import Run

Event = Mapping[str, Any]

WAITING, START_UP, RESTART = "waiting for workers", "start-up", "restart"
LOST, ROLLBACK, HANG = "lost steps", "rollback", "hang"
GONE, CLOSING = "driver gone", "closing"


@dataclass(frozen=True, kw_only=True)
class Bill:
    """The cost of one or more runs.

    `wall` is the seconds in which a command had the run, and until the next one took it up where a
    command was killed; stops and failures end it. `lost` is by cause; the rest is training that
    was kept. GPUs and CPUs count from when workers are up until the attempt ends. `spans` are the
    times, as seconds since 1970, between which a command had a run.
    """

    wall: float
    lost: Mapping[str, float]
    gpu_seconds: float
    cpu_seconds: float
    money: float | None  # None: no GPUs, or no price
    spans: tuple[tuple[float, float], ...] = ()

    @property
    def hours(self) -> float:
        """Hours in which a command had any of the runs; those side by side count once."""
        seconds, until = 0.0, 0.0
        for begin, end in sorted(self.spans):
            seconds += max(0.0, end - max(begin, until))
            until = max(until, end)
        return seconds / 3600

    @property
    def used(self) -> str:
        """GPU-hours, or CPU-hours where no GPU was used."""
        seconds, of = (self.gpu_seconds, "GPU") if self.gpu_seconds else (self.cpu_seconds, "CPU")
        return f"{_few_digits(seconds / 3600)} {of}-hours"

    @property
    def paid(self) -> str:
        """Money, or a dash where nothing has a price."""
        return "-" if self.money is None else f"{self.money:.2f}"

    @property
    def goodput(self) -> float:
        """Share of the time that went into training that was kept."""
        return max(0.0, 1 - sum(self.lost.values()) / self.wall) if self.wall else 0.0

    @property
    def causes(self) -> list[tuple[str, float]]:
        """(cause, share of the time), the largest first."""
        ordered = sorted(self.lost.items(), key=lambda item: -item[1])
        return [(cause, seconds / self.wall) for cause, seconds in ordered if seconds]

    def as_record(self) -> dict[str, Any]:
        """For run.json."""
        return {
            "seconds": self.wall,
            "goodput": self.goodput,
            "lost_seconds": dict(self.lost),
            "gpu_hours": self.gpu_seconds / 3600,
            "cpu_hours": self.cpu_seconds / 3600,
            "money": self.money,
        }


def _few_digits(hours: float) -> str:
    return f"{hours:.3f}" if hours < 1 else f"{hours:.1f}" if hours < 1000 else f"{hours:.0f}"


def read_bill(run: Run) -> Bill:
    """The bill of a run until now, or until its last sign of life."""
    return read_account(run.events()).bill(time.time() if run.is_driven() else last_seen(run))


def last_seen(run: Run) -> float | None:
    """Time of the last heartbeat of any worker."""
    return max((beat["time"] for beat in read_beats(run)), default=None)


def begin(run: Run, cluster: Cluster) -> None:
    """An attempt begins: what its workers will cost; heartbeats of earlier ones are still there."""
    run.note(
        "attempt",
        seen=last_seen(run),
        gpus_per_worker=cluster.gpus_per_worker,
        cpus_per_worker=cluster.cpus_per_worker,
        price_per_gpu_hour=cluster.price_per_gpu_hour,
    )


def end(run: Run, status: str, **fields: Any) -> None:
    """Close the record of a run, with its bill."""
    run.note("ended", status=status)
    run.update(status=status, bill=read_account(run.events()).bill().as_record(), **fields)


def add_bills(bills: Sequence[Bill]) -> Bill:
    """The bill of several runs together."""
    lost: defaultdict[str, float] = defaultdict(float)
    for bill in bills:
        for cause, seconds in bill.lost.items():
            lost[cause] += seconds
    prices = [bill.money for bill in bills if bill.money is not None]
    return Bill(
        wall=sum(bill.wall for bill in bills),
        lost=lost,
        gpu_seconds=sum(bill.gpu_seconds for bill in bills),
        cpu_seconds=sum(bill.cpu_seconds for bill in bills),
        money=sum(prices) if prices else None,
        spans=tuple(span for bill in bills for span in bill.spans),
    )


def read_account(events: Iterable[Event]) -> "Account":
    """The account of a run's events."""
    account = Account()
    for event in events:
        account.take(event)
    return account


@dataclass
class _Piece:
    """Training from one step to another."""

    begin: int
    end: int
    seconds: float

    def cut(self, step: int) -> float:
        """Keep what lies before a step; the seconds of the rest."""
        if self.end <= step:
            return 0.0
        behind = (self.end - max(self.begin, step)) / max(self.end - self.begin, 1)
        seconds = self.seconds if self.begin >= step else behind * self.seconds
        self.end, self.seconds = max(self.begin, step), self.seconds - seconds
        return seconds


@dataclass(kw_only=True)
class Account:
    """Walks along a run's events."""

    _at: float = 0.0  # all time until then is booked
    _open: bool = False  # an attempt runs, or was killed
    _since: float = 0.0  # its begin
    _spans: list[tuple[float, float]] = field(default_factory=list)  # of attempts before
    _doing: str | None = None  # what the time after `_at` goes to; None: training
    _step: int = 0
    _pace_from: tuple[int, float] | None = None  # step and time of the workers' first entry
    _ideal_step: float | None = None
    _world: int = 0  # of workers that are up
    _terms: Event = field(default_factory=dict)  # the attempt's
    _known: Mapping[str, float] = field(default_factory=dict)  # `seconds` that are booked
    _trained: list[_Piece] = field(default_factory=list)
    _redo: str = LOST  # why steps would have been trained in vain
    _wall: float = 0.0
    _lost: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    _gpu_seconds: float = 0.0
    _cpu_seconds: float = 0.0
    _money: float | None = None

    def take(self, event: Event) -> None:
        """The next event; kinds that cost nothing are passed over."""
        handle = {
            "attempt": self._attempt,
            "workers": self._workers,
            "device": self._device,
            "start": self._start,
            "time": self._time,
            "hang": self._hang,
            "rollback": self._rollback,
            "ended": self._ended,
        }.get(event["kind"])
        if handle is not None:
            handle(event)

    def bill(self, now: float | None = None) -> Bill:
        """The bill until `now`, if an attempt is not known to have ended; None: the last event."""
        account = self
        if now is not None and self._open:
            account = replace(self, _lost=self._lost.copy(), _trained=[])
            account._pass_until(now, self._doing)
        return Bill(
            wall=account._wall,
            lost={cause: seconds for cause, seconds in account._lost.items() if seconds > 0},
            gpu_seconds=account._gpu_seconds,
            cpu_seconds=account._cpu_seconds,
            money=account._money,
            spans=(*self._spans, *([(self._since, account._at)] if self._open else ())),
        )

    def seconds_left(self, steps: int, now: float) -> tuple[float, bool]:
        """Until `steps` steps are done, and whether that is measured: evaluations, checkpoints and
        waiting included. Before, it is the least possible time, at the device's peak."""
        if self._pace_from is not None and self._step > self._pace_from[0]:
            step, since = self._pace_from
            pace = (self._at - since) / (self._step - step)
            return max(0.0, (steps - self._step) * pace - max(0.0, now - self._at)), True
        return (steps - self._step) * (self._ideal_step or 0.0), False

    def _pass_until(self, when: float, cause: str | None) -> None:
        """Book the time until then on a cause; None: training."""
        seconds = max(0.0, when - self._at)
        self._at += seconds
        self._wall += seconds
        if cause is not None:
            self._lost[cause] += seconds
        gpus = seconds * self._world * self._terms.get("gpus_per_worker", 0)
        self._gpu_seconds += gpus
        self._cpu_seconds += seconds * self._world * self._terms.get("cpus_per_worker", 0)
        price = self._terms.get("price_per_gpu_hour")
        if price is not None and gpus:
            self._money = (self._money or 0.0) + gpus / 3600 * price

    def _attempt(self, event: Event) -> None:
        if self._open:
            self._die(event)
            self._spans.append((self._since, self._at))
            self._world = 0
            self._pass_until(event["time"], GONE)
        self._at, self._open, self._doing = event["time"], True, WAITING
        self._since = self._at
        self._world, self._terms = 0, event

    def _die(self, event: Event) -> None:
        """The workers from before were killed after their last sign of life."""
        seen = min(event.get("seen") or self._at, event["time"])
        self._pass_until(seen, self._doing or LOST)

    def _workers(self, event: Event) -> None:
        first = self._doing == WAITING
        if not first:
            self._die(event)
        self._pass_until(event["time"], WAITING if first else RESTART)
        self._world = event["world"]
        self._come_up(START_UP if first else RESTART)

    def _device(self, event: Event) -> None:
        self._ideal_step = event["ideal_step"]

    def _come_up(self, doing: str) -> None:
        self._doing, self._known, self._pace_from = doing, {}, None

    def _start(self, event: Event) -> None:
        self._step = event["step"]
        self._lost[self._redo] += sum(piece.cut(self._step) for piece in self._trained)
        self._redo = LOST

    def _time(self, event: Event) -> None:
        """Share the time since the last entry between training and all else."""
        seconds = max(0.0, event["time"] - self._at)
        known, self._known = self._known, event["seconds"]
        spent = {cause: value - known.get(cause, 0.0) for cause, value in self._known.items()}
        if self._doing == RESTART:
            spent[RESTART] = spent.pop(START_UP, 0.0)
        total = sum(spent.values())
        scale = min(1.0, seconds / total) if total > 0 else 0.0  # clocks differ a little
        for cause, value in spent.items():
            self._lost[cause] += value * scale
        self._trained.append(_Piece(self._step, event["step"], seconds - total * scale))
        self._pass_until(event["time"], None)
        self._step, self._doing = event["step"], None
        self._pace_from = self._pace_from or (self._step, self._at)

    def _hang(self, event: Event) -> None:
        self._pass_until(event["time"] - event.get("silence", 0.0), self._doing or LOST)
        self._pass_until(event["time"], HANG)

    def _rollback(self, event: Event) -> None:
        self._pass_until(event["time"], self._doing or ROLLBACK)
        self._redo = ROLLBACK
        self._come_up(RESTART)

    def _ended(self, event: Event) -> None:
        tail = LOST if event["status"] == "failed" else CLOSING
        self._pass_until(event["time"], self._doing or tail)
        self._spans.append((self._since, self._at))
        self._open = False
