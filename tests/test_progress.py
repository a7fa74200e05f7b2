"""Progress is a bar on a terminal, and whole lines now and then in a file or a pipe."""

import io

from rich.console import Console

from hyperattention.report.progress import progress


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def lines_of(steps: int, seconds: float) -> list[str]:
    file, clock = io.StringIO(), Clock()
    with progress(Console(file=file, width=40), "calibrate", steps, clock) as on_step:
        for step in range(steps):
            on_step(f"document 1 of 2, which has a long name: layer [{step}]")
            clock.now += seconds
    return file.getvalue().splitlines()


def test_a_file_gets_a_line_for_each_of_few_steps() -> None:
    first, *others = lines_of(4, 65.0)
    assert first == "calibrate: 0 of 4 done in 0:00; next: document 1 of 2, which has a long name: layer [0]"
    assert others[1].startswith("calibrate: 2 of 4 done in 2:10, about 2:10 left; next: ")
    assert others[3:] == ["calibrate: finished in 4:20"]


def test_a_file_gets_few_lines_of_many_quick_steps_and_one_every_half_minute_of_slow_ones() -> None:
    assert 20 <= len(lines_of(1000, 0.01)) <= 22
    slow = lines_of(1000, 1.0)
    assert 33 <= len(slow) <= 50
    assert len(lines_of(1000, 31.0)) == 1001


def test_a_step_more_than_was_announced_is_no_error() -> None:
    file = io.StringIO()
    with progress(Console(file=file), "read", 1) as on_step:
        on_step("one")
        on_step("two")
    assert "1 of 1 done" in file.getvalue()


def test_nothing_is_called_finished_that_was_interrupted() -> None:
    file = io.StringIO()
    try:
        with progress(Console(file=file), "read", 2) as on_step:
            on_step("one")
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert "finished" not in file.getvalue()


def test_a_terminal_gets_a_bar_and_no_lines() -> None:
    file = io.StringIO()
    with progress(Console(file=file, force_terminal=True, width=120), "read", 2) as on_step:
        on_step("one")
        on_step("two")
    assert "1/2" in file.getvalue()
    assert "done in" not in file.getvalue()
