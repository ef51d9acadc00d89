import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from orchestrator.job.duration import Duration, is_time, to_steps

DURATION: TypeAdapter[int | str] = TypeAdapter(Duration)


@pytest.mark.parametrize(
    ("text", "steps"), [(7, 7), ("2 epochs", 20), ("0.5 epochs", 5), ("1 epoch", 10)]
)
def test_durations_become_steps(text: int | str, steps: int) -> None:
    assert to_steps(DURATION.validate_python(text), steps_per_epoch=10) == steps


@pytest.mark.parametrize("text", [0, -1, "3", "0 epochs", "two epochs", "2 epochs!"])
def test_what_is_no_duration(text: int | str) -> None:
    with pytest.raises(ValidationError):
        DURATION.validate_python(text)


@given(last=st.integers(1, 300), every=st.integers(1, 400))
def test_the_last_step_always_counts(last: int, every: int) -> None:
    times = [step for step in range(1, last + 1) if is_time(step, every, last)]
    assert times[-1] == last
    assert times[:-1] == list(range(every, last, every))
