"""A search as an Optuna study, which several machines share through its storage and which goes on where it was stopped."""

from __future__ import annotations

import itertools
import json
import os
import platform
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from tools.errors import UserError
from tools.merge_scorer import MergeScorer, case_dice, mean_dice
from tools.search_space import Coefficient, Range, SearchSpace, Value, readable

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.distributions import BaseDistribution
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

ENOUGH_CASES = 5  # with fewer, no test can say early that a trial is worse
SETTINGS = "settings"


@dataclass(frozen=True)
class Row:
    """A finished trial.

    Attributes:
        number: of the trial.
        state: "complete", "pruned" after some of the cases, or "failed".
        values: by coefficient.
        dice: mean over the cases by label, of a complete trial.
        cases: how many were scored.
        seconds: that it took.
    """

    number: int
    state: str
    values: dict[str, Value]
    dice: dict[str, float]
    cases: int
    seconds: float

    @property
    def mean(self) -> float:
        """Mean Dice over labels; NaN when the trial is not complete."""
        return float(np.nanmean([*self.dice.values()])) if self.dice else float("nan")


def open_study(
    storage: str, name: str, settings: Mapping[str, Any], seed: int, shared: bool = False, pruned: bool = False
) -> Study:
    """Begin a study, or go on with it.

    Args:
        storage: URL of a database as SQLAlchemy reads it, or path of a file that all machines see.
        name: of the study.
        settings: what a trial depends on; those of a study that is there must be the same.
        seed: of the sampler.
        shared: other machines may search too: each then samples otherwise.
        pruned: stop a trial when it is worse than the best one on the cases so far (Wilcoxon's test).

    Raises:
        UserError: the storage cannot be reached, or the study was begun with other settings.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        store = _storage(storage)
        study = optuna.create_study(storage=store, study_name=name, direction="maximize", load_if_exists=True)
        begun = study.user_attrs.get(SETTINGS)
        number = len(study.get_trials(deepcopy=False))
    except Exception as error:  # each database driver has its own
        raise UserError(f"the storage {shown(storage)} cannot be used: {_first_line(error)}") from None
    settings = json.loads(json.dumps(settings))
    if begun is None and number:
        raise UserError(f"the study {name!r} in {shown(storage)} is not one of search; choose another --study")
    if begun is None:
        study.set_user_attr(SETTINGS, settings)
    elif begun != settings:
        differs = [f"{k} was {begun.get(k)}, is {new}" for k, new in settings.items() if begun.get(k) != new]
        raise UserError(
            f"the study {name!r} in {shown(storage)} was begun with other settings ({'; '.join(differs)[:1500]}); "
            "choose another --study or --output"
        )
    source = [seed, number, *([os.getpid(), *platform.node().encode()] if shared else [])]
    study.sampler = optuna.samplers.TPESampler(seed=int(np.random.SeedSequence(source).generate_state(1)[0]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study.pruner = optuna.pruners.WilcoxonPruner() if pruned else optuna.pruners.NopPruner()
    return study


def _storage(storage: str) -> BaseStorage:
    from optuna.storages import JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend

    return RDBStorage(storage) if "://" in storage else JournalStorage(JournalFileBackend(storage))


def shown(storage: str) -> str:
    """A storage's URL without its password."""
    if "://" not in storage:
        return storage
    scheme, rest = storage.split("://", 1)
    return f"{scheme}://{rest.rpartition('@')[2]}"


def _first_line(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError | json.JSONDecodeError):
        return "it is a file, but not a journal of studies"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]


class Search:
    """Runs the trials of a study.

    Args:
        study: from ``open_study``.
        space: what is chosen.
        scorer: merges and scores.
        cases: image and label paths by case.
        grid: try every point of the space's grid.
    """

    def __init__(
        self, study: Study, space: SearchSpace, scorer: MergeScorer, cases: Mapping[str, Mapping[str, Any]], grid: bool
    ) -> None:
        self.study = study
        self.space = space
        self.scorer = scorer
        self.cases = cases
        self.grid = grid
        self.distributions = {c.name: _distribution(c) for c in space.coefficients}

    def run(self, trials: int, timeout: float = 0) -> None:
        """Try what is tried first, then what the sampler asks for, until there is enough.

        Args:
            trials: how many the study shall have, those of earlier runs and other machines too; 0 for the whole grid.
            timeout: seconds after which no trial begins; 0 for none.

        Raises:
            UserError: what is tried first cannot be merged.
        """
        began = time.monotonic()
        points = self._points(trials) if self.grid else []
        total = len(points) if self.grid else max(trials, len(self.space.starts))
        with tqdm(total=total, desc="trials", disable=None, smoothing=0) as bar:
            while (point := self._next(points, total)) is not None:
                if timeout and time.monotonic() - began > timeout:
                    left = _without(self.space.starts, self._done())
                    if not left:
                        break
                    point = left[0]  # without it there is nothing to compare with, whoever began it
                self._show(bar)
                self._try(point)
            self._show(bar)

    def rows(self) -> Iterator[Row]:
        """The finished trials, by number."""
        for trial in self.study.get_trials(deepcopy=False):
            if not self._is_done(trial):
                continue
            scored = trial.user_attrs.get("cases", 0)
            state = "failed" if "error" in trial.user_attrs else "complete" if scored == len(self.cases) else "pruned"
            dice = trial.user_attrs["dice"] if state == "complete" else {}
            seconds = (trial.datetime_complete - trial.datetime_start).total_seconds()
            yield Row(trial.number, state, self._values(trial), dice, scored, seconds)

    def row(self, values: Mapping[str, Value]) -> Row:
        """The complete trial with these values."""
        return next(row for row in self.rows() if row.state == "complete" and row.values == values)

    def best(self) -> Row:
        """The complete trial with the largest mean Dice; of several the first one, so the start when nothing is better."""
        return max((row for row in self.rows() if row.state == "complete"), key=lambda row: row.mean)

    def _points(self, trials: int) -> list[dict[str, Value]]:
        """What is tried first, then the grid; only so many points, 0 for all."""
        first = self.space.starts
        points = itertools.chain(first, (point for point in self.space.grid() if point not in first))
        return list(itertools.islice(points, trials or None))

    def _next(self, points: list[dict[str, Value]], total: int) -> dict[str, Value] | None:
        """What to try now: {} for what the sampler chooses, None for nothing more."""
        trials, done = self.study.get_trials(deepcopy=False), self._done()
        begun = [self._values(trial) for trial in trials if not trial.state.is_finished() and trial.params]
        wanted = [*self.space.starts, *points[len(self.space.starts) : total]]
        missing = _without(wanted, done)
        for point in _without(missing, begun):
            return point
        if not self.grid and len(done) < total:
            return {}
        return missing[0] if missing else None  # left by a run that was killed, or still with another machine

    def _done(self) -> list[dict[str, Value]]:
        return [self._values(trial) for trial in self.study.get_trials(deepcopy=False) if self._is_done(trial)]

    def _try(self, point: Mapping[str, Value]) -> None:
        from optuna.trial import TrialState

        if point:
            self.study.enqueue_trial(dict(point))
        trial = self.study.ask(self.distributions)
        try:
            self.study.tell(trial, self._score(trial))
        except UserError as error:
            if self._values(trial) in self.space.starts:
                self.study.tell(trial, state=TrialState.FAIL)
                raise
            trial.set_user_attr("error", str(error))
            self.study.tell(trial, state=TrialState.FAIL)
        except BaseException:
            self.study.tell(trial, state=TrialState.FAIL)
            raise

    def _score(self, trial: Trial) -> float:
        """Mean Dice of a trial; when it is pruned, an estimate from the cases that were scored."""
        values = self._values(trial)
        scores = {}
        for step, (name, found) in enumerate(self.scorer.scores(self.space.recipe(values), self.cases)):
            scores[name] = dice = case_dice(found)
            if np.isfinite([*dice.values()]).any():
                trial.report(float(np.nanmean([*dice.values()])), step)
            if len(scores) < len(self.cases) and values not in self.space.starts and trial.should_prune():
                break
        means = mean_dice(scores)
        trial.set_user_attr("cases", len(scores))
        if len(scores) < len(self.cases):
            return self._estimate(trial)
        trial.set_user_attr("dice", means)
        return float(np.nanmean([*means.values()]))

    def _estimate(self, trial: Trial) -> float:
        """The best trial's Dice, less what this one lost on the same cases."""
        own = self.study.get_trials(deepcopy=False)[trial.number].intermediate_values
        best = self.study.best_trial
        lost = [best.intermediate_values[step] - dice for step, dice in own.items() if step in best.intermediate_values]
        return best.value - max(0.0, float(np.mean(lost)))

    def _values(self, trial: Trial | FrozenTrial) -> dict[str, Value]:
        return {c.name: readable(trial.params[c.name]) for c in self.space.coefficients if c.name in trial.params}

    @staticmethod
    def _is_done(trial: FrozenTrial) -> bool:
        """Whether it ended by itself; one that was interrupted did not."""
        from optuna.trial import TrialState

        return trial.state == TrialState.COMPLETE or "error" in trial.user_attrs

    def _show(self, bar: tqdm) -> None:
        rows = [*self.rows()]
        bar.n = len(rows)
        means = [row.mean for row in rows if row.state == "complete"]
        bar.set_postfix_str(f"best Dice {max(means):.4f}" if means else "")


def _without(points: list[dict[str, Value]], others: list[dict[str, Value]]) -> list[dict[str, Value]]:
    seen = {tuple(sorted(other.items())) for other in others}
    return [point for point in points if tuple(sorted(point.items())) not in seen]


def _distribution(coefficient: Coefficient) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    choice = coefficient.choice
    if not isinstance(choice, Range):
        return CategoricalDistribution(tuple(dict.fromkeys([*choice, *coefficient.starts])))
    return (IntDistribution if coefficient.whole else FloatDistribution)(choice.low, choice.high)
