"""The bill in words: in the progress line, at a stage's end, in the table at a job's end."""

from collections.abc import Sequence

from rich.box import SIMPLE
from rich.table import Table

from orchestrator.job.duration import as_time
from orchestrator.launch.stage import StageResult
from orchestrator.runs.bill import Account, Bill, add_bills, read_bill

_NAMED = 3  # causes of lost time in a table's row
_LITTLE = 0.005  # share of the time below which a cause is not named


def as_cost(bill: Bill) -> str:
    """GPU-hours, or CPU-hours where no GPU was used, and money where there is a price."""
    return bill.used if bill.money is None else f"{bill.used}, {bill.paid} to pay"


def in_brief(bill: Bill) -> str:
    """Time, cost and goodput of a stage."""
    return f"{as_time(bill.wall)}, {as_cost(bill)}, goodput {bill.goodput:.0%}"


def so_far(account: Account, steps: int, now: float) -> list[str]:
    """Goodput, cost and the time that is left, of a run that goes on."""
    bill = account.bill(now)
    left, measured = account.seconds_left(steps, now)
    parts = [f"goodput {bill.goodput:.0%}", as_cost(bill)]
    if left >= 1:
        parts.append(f"{'' if measured else 'at least '}{as_time(left)} left")
    return parts


def bill_table(results: Sequence[StageResult]) -> Table:
    """What each stage has cost, those before included that were not run again, and all together."""
    bills = {result.name: read_bill(result.run) for result in results}
    table = Table(title="The bill", title_justify="left", box=SIMPLE)
    for column in ("stage", "time", "hours", "to pay", "goodput", "lost to"):
        table.add_column(column, overflow="fold")
    for name, bill in bills.items():
        table.add_row(name, *_cells(bill))
    if len(bills) > 1:
        table.add_section()
        table.add_row("all", *_cells(add_bills(list(bills.values()))))
    return table


def _cells(bill: Bill) -> tuple[str, ...]:
    causes = [(cause, share) for cause, share in bill.causes[:_NAMED] if share > _LITTLE]
    return (
        as_time(bill.wall),
        bill.used,
        bill.paid,
        f"{bill.goodput:.0%}",
        ", ".join(f"{cause} {share:.0%}" for cause, share in causes),
    )
