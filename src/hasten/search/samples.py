"""What candidates are measured on: windows of text, and questions of the tasks that a budget names.

The search has one sample; each attempt at a proof has one of its own, that nothing has seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hasten.backends.batch import Int32
from hasten.errors import BudgetError
from hasten.evaluate.paired import fewest_questions
from hasten.evaluate.tasks import Task
from hasten.search import texts
from hasten.search.budget import Budget, Budgets
from hasten.search.trials import digest

SEARCHED = 1 / 3
"""Of a task's questions; the others prove."""
AMPLE = 4.0
"""So many times the fewest questions that can prove a loss make a slice of their own."""


@dataclass(frozen=True)
class Sample:
    windows: list[Int32]
    tasks: Mapping[Path, Task] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Those that are scored."""
        return sum(len(w) - 1 for w in self.windows)

    def size(self, budget: Budget) -> int:
        """Tokens or questions that a part of a budget is measured on."""
        return len(self.tasks[budget.file]) if budget.file else sum(len(w) for w in self.windows)

    def sizes(self, budgets: Budgets) -> tuple[int, ...]:
        return tuple(self.size(b) for b in budgets.parts)

    def digest(self) -> str:
        """A hash of the tokens and of the questions."""
        text = texts.digest(self.windows)
        return digest([text, [t.digest() for t in self.tasks.values()]]) if self.tasks else text


def cut(
    windows: list[Int32], slices: Sequence[list[Int32]], tasks: Mapping[Path, Task], budgets: Budgets
) -> tuple[Sample, list[Sample]]:
    """The search's sample and one for each attempt: as many as the text has slices, and questions suffice for."""
    count = len(slices)
    shares = {b.file: b for b in budgets.tasks if b.file}
    for path, budget in shares.items():
        count = min(count, max(1, int(_left(tasks[path]) / (AMPLE * fewest_questions(budget.limit)))))
    search = {path: searched(task) for path, task in tasks.items()}
    finals = []
    for number in range(count):
        parts = {}
        for path, task in tasks.items():
            begin, left = len(task) - _left(task), _left(task)
            parts[path] = task.part(begin + number * left // count, begin + (number + 1) * left // count)
        finals.append(Sample(slices[number], parts))
    return Sample(windows, search), finals


def check(tasks: Mapping[Path, Task], budgets: Budgets) -> None:
    """Raises BudgetError where a task's file is too short to prove its part of the budget by any answers."""
    for budget in budgets.tasks:
        assert budget.file is not None
        task, needed = tasks[budget.file], fewest_questions(budget.limit)
        if _left(task) < needed or len(task) < 3:
            fewest = round(needed / (1 - SEARCHED)) + 1
            raise BudgetError(
                f"the budget '{budget}' cannot be proven with {len(task)} questions, {_left(task)} of which prove: "
                "even a model that answers just as the original does might lose more",
                f"give at least {fewest} questions, a few times as many to leave room for the search; or more points",
            )


def searched(task: Task) -> Task:
    """The questions that the search may use."""
    return task.part(0, len(task) - _left(task))


def _left(task: Task) -> int:
    """Questions kept for the proof."""
    return len(task) - int(len(task) * SEARCHED)
