"""The attack: bad arguments, altered files, kills. Its counts are printed at the end.

`MOE_ENVS_ATTACK=20 make test-attack` runs twenty times as many cases of each kind as `make test`.
"""

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, TypeVar, get_type_hints

import gymnasium
import numpy as np
import pytest

from moe_envs import SPECS

Case = TypeVar("Case")
VERDICTS = "right", "clear", "unclear", "silent", "lost", "traceback"
SCALE = int(os.environ.get("MOE_ENVS_ATTACK", "1"))


@dataclass
class Outcomes:
    """Counts of the cases by what came of them, and what the bad ones said."""

    counts: Counter[str] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)

    def add(self, verdict: str, case: str, said: object = "") -> None:
        """Count a case: "right" is one that was rightly accepted, "clear" one that was refused in one clear line."""
        assert verdict in VERDICTS
        self.counts[verdict] += 1
        if verdict not in ("right", "clear"):
            self.bad.append(f"{verdict}: {case}: ...{repr(said)[-300:]}")

    def attempt(
        self,
        case: str,
        action: Callable[[], Any],
        wrong: Callable[[Any], str | None] = lambda result: None,
        refused: tuple[type[BaseException], ...] = (ValueError,),
        names: str = "",
    ) -> None:
        """Do what is attempted: it is refused in one line that has `names` in it, or its result is not `wrong`."""
        try:
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                result = action()
                why = wrong(result)
        except refused as error:
            said = str(error)
            clear = 10 < len(said) < 1000 and said.count("\n") == 0 and names in said
            self.add("clear" if clear else "unclear", case, error)
        except Exception as error:  # which a user would see as a traceback
            self.add("traceback", case, error)
        else:
            if why and any("left out" in (text := str(each.message)) or "goes unnoticed" in text for each in warned):
                self.add("clear", case)
            else:
                self.add("silent" if why else "right", case, why)


@pytest.fixture
def attack(record_property: Callable[[str, object], None]) -> Iterator[Outcomes]:
    """Outcomes of a test, none of which may be bad."""
    outcomes = Outcomes()
    yield outcomes
    record_property("attack", dict(outcomes.counts))
    assert outcomes.counts.total(), "no case was tried"
    assert not outcomes.bad, "\n".join([f"{len(outcomes.bad)} of {outcomes.counts.total()}", *outcomes.bad[:20]])


def some(cases: Iterable[Case], every: int, first: int = 0) -> list[Case]:
    """Each `every`-th case in the short attack, from case `first % every` on, all in the long one."""
    return list(cases)[first % every :: every] if SCALE == 1 else list(cases)


@pytest.fixture
def draw() -> np.random.Generator:
    """Where to alter a file, the same in each run."""
    return np.random.default_rng(0)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the counts of all tests."""
    counts: dict[str, Counter[str]] = {}
    for report in [each for reports in terminalreporter.stats.values() for each in reports]:
        for name, value in getattr(report, "user_properties", ()):
            if name == "attack" and report.when == "teardown":
                test = report.nodeid.rpartition("::")[2].partition("[")[0].removeprefix("test_")
                counts.setdefault(test, Counter()).update(value)
    if counts:
        counts["all"] = sum(counts.values(), Counter())
        terminalreporter.section("attack")
        terminalreporter.write_line(f"{'':70s}{'cases':>8s}" + "".join(f"{name:>10s}" for name in VERDICTS))
        for test, found in counts.items():
            terminalreporter.write_line(
                f"{test:70.70s}{found.total():8d}" + "".join(f"{found[name]:10d}" for name in VERDICTS)
            )


def arguments_of(env_id: str) -> dict[str, Any]:
    """The annotations of a problem's arguments, which a problem added later has, too."""
    vector = type(gymnasium.make(env_id, **SPECS[env_id].small).unwrapped.vector)  # type: ignore[attr-defined]
    hints = get_type_hints(vector.__init__, include_extras=True)
    return {
        name: hints[name]
        for name, each in signature(vector.__init__).parameters.items()
        if each.kind is each.KEYWORD_ONLY
    }
