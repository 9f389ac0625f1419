"""What the study has found: a file that several runs add to, its table, and its picture.

``python -m tests.benchmarks.study_results docs/study.json`` prints the table again; ``--document`` puts it into one.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import fire
import numpy as np

from tools.bundle import read_json
from tools.compare import KNOWN
from tools.errors import UserError
from tools.markdown import table
from tools.output import complete_output
from tools.summary_table import SPECIALISTS

FLATNESS = "starting point: "  # rows of another kind begin with this
TASK = "task: "  # and those of one task: its specialist's Dice, what new heads alone keep of it, what the average keeps
GOOD = 0.3  # Dice of a specialist that shares are worth speaking of


@dataclass(frozen=True)
class Size:
    """What all runs of a study have in common."""

    width: int
    patch_size: int
    batch_size: int
    pretrain_steps: int
    finetune_steps: int
    scales: str
    unseen: bool
    spacing: float = 0


class Results:
    """What the study has found, in a file: runs that are in it are not run again, wherever their folders are.

    Args:
        path: of the file; made with the first result.
        size: of the runs.

    Raises:
        UserError: the results in the file are of runs of another size.
    """

    def __init__(self, path: Path, size: Size) -> None:
        self.path = path
        self.size = asdict(size)
        self.tasks: dict[str, Mapping[str, list]] = {}
        self.runs: dict[str, dict[str, dict[str, dict[str, list[float]]]]] = {}
        self._read()

    @classmethod
    def read(cls, path: Path) -> Results:
        """Those that a file has, of whatever size."""
        return cls(path, Size(**read_json(path)["size"]))

    def _read(self) -> None:
        if self.path.is_file():
            found = read_json(self.path)
            if found.get("size") != self.size:
                raise UserError(
                    f"{self.path} has results of another size, {found.get('size')}; choose another --output"
                )
            self.tasks, self.runs = found.get("tasks", {}), found["runs"]

    def begin(self, tasks: Mapping[str, Mapping[str, list]]) -> None:
        """Write down what is going to be run, so that an interrupted study goes on only as it was begun.

        Args:
            tasks: of each dataset, with their labels.

        Raises:
            UserError: the file has results of other tasks.
        """
        self._read()
        for dataset, wanted in tasks.items():
            if (begun := self.tasks.setdefault(dataset, wanted)) != wanted:
                raise UserError(
                    f"{self.path} has results of other tasks of {dataset}, {begun}; choose another --output"
                )
        self._write()

    def of(self, dataset: str, start: str) -> dict[int, dict[str, list[float]]]:
        """By seed, for each row of the table its mean Dice and normalized accuracy, or one figure of another kind."""
        return {int(seed): rows for seed, rows in self.runs.get(dataset, {}).get(start, {}).items()}

    def add(self, dataset: str, start: str, seed: int, rows: Mapping[str, Sequence[float]]) -> None:
        """Take in a run, and write the file anew with what others have added to it."""
        self._read()
        self.runs.setdefault(dataset, {}).setdefault(start, {})[str(seed)] = {k: list(v) for k, v in rows.items()}
        self._write()

    def _write(self) -> None:
        with complete_output(self.path, overwrite=True) as path:
            path.write_text(json.dumps({"size": self.size, "tasks": self.tasks, "runs": self.runs}, indent=1))

    def table(self, order: Collection[str] = ()) -> str:
        """For each dataset, mean Dice by merge method and starting point, and how flat the starting points are.

        Args:
            order: of the starting points; others come last.
        """
        lines = [
            "Mean Dice over tasks on test patients, mean ± standard deviation over seeds; in brackets the normalized accuracy",
            "(mean over tasks of merged ÷ specialist).",
            "",
        ]
        for dataset in self.runs:
            lines += [f"**{dataset}**", "", self.table_of(dataset, order), ""]
        return "\n".join(lines)

    def table_of(self, dataset: str, order: Collection[str] = ()) -> str:
        """The table of one dataset."""
        seeds = self.by_start(dataset, order)
        titles = sorted(_titles(seeds, without=TASK), key=lambda title: title.startswith(FLATNESS))
        rows = [
            [title, *(_cell([rows[title] for rows in runs if title in rows]) for runs in seeds.values())]
            for title in titles
        ]
        return table(["", *(f"{start} (seeds: {len(runs)})" for start, runs in seeds.items())], rows)

    def by_start(self, dataset: str, order: Collection[str]) -> dict[str, list[dict[str, list[float]]]]:
        """The runs of each starting point."""
        starts = self.runs[dataset]
        names = [name for name in order if name in starts] + [name for name in starts if name not in order]
        return {name: [starts[name][seed] for seed in sorted(starts[name], key=int)] for name in names}


def draw(studies: Sequence[Results], path: str | Path, order: Collection[str] = ()) -> None:
    """A PNG of the same: what merges keep of the specialists, for each dataset a panel of methods and starting points.

    Args:
        studies: whose panels stand side by side.
        path: to write.
        order: of the starting points; others come last.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [
        (
            (dataset.partition("_")[2] or dataset) + "\norgans unseen" * study.size["unseen"],
            study.by_start(dataset, order),
        )
        for study in studies
        for dataset in study.runs
    ]
    titles = list(
        dict.fromkeys(title for _, seeds in panels for title in _titles(seeds, (SPECIALISTS, FLATNESS, TASK)))
    )
    columns = [len(seeds) for _, seeds in panels]
    figure = Figure(
        figsize=(2.6 + 0.95 * sum(columns) + 0.3 * len(panels), 1.3 + 0.29 * len(titles)), layout="constrained"
    )
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True, width_ratios=columns)[0]
    for axis, (name, seeds) in zip(axes, panels, strict=True):
        kept = np.array([[_mean(runs, title, 1) for runs in seeds.values()] for title in titles])
        image = axis.imshow(kept, vmin=0, vmax=1, aspect="auto", cmap="viridis")
        for row, column in np.argwhere(~np.isnan(kept)):
            value = kept[row, column]
            colour = "black" if value > 0.6 else "white"
            axis.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=8)
        dice = [_mean(runs, SPECIALISTS, 0) for runs in seeds.values()]
        labels = [f"{start}\n({value:.2f})" for start, value in zip(seeds, dice, strict=True)]
        axis.set_xticks(range(len(seeds)), labels, fontsize=8)
        axis.set_yticks(range(len(titles)), titles, fontsize=8)
        axis.tick_params(length=0)
        axis.set_title(name, fontsize=9)
    figure.colorbar(image, ax=axes, label="share of the specialists' Dice that is kept", pad=0.01)
    figure.supxlabel("starting point (mean Dice of its specialists)", fontsize=9)
    figure.savefig(path, dpi=130)


def draw_tasks(studies: Sequence[Results], path: str | Path, order: Collection[str] = ()) -> str:
    """A PNG of every task of every run: what new heads on the untouched starting point keep, and what the average keeps.

    Args:
        studies: whose tasks are drawn, those of which the specialist learned something.
        path: to write.
        order: of the starting points; others come last.

    Returns:
        How many tasks these are, and how well the one foretells the other.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shares: dict[str, list[list[float]]] = {}
    for seeds in (study.by_start(dataset, order) for study in studies for dataset in study.runs):
        for start, runs in seeds.items():
            tasks = [values for rows in runs for title, values in rows.items() if title.startswith(TASK)]
            shares.setdefault(start, []).extend(shown for dice, *shown in tasks if dice >= GOOD)
    figure = Figure(figsize=(6.4, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.axline((0, 0), slope=1, color="grey", linewidth=0.8)
    drawn = {start: points for start, points in shares.items() if points}
    for number, (start, points) in enumerate(drawn.items()):  # ten colours, then they come again with another mark
        look = {"s": 28, "alpha": 0.7, "marker": "osD"[number // 10 % 3]}
        axis.scatter(*np.reshape(points, (-1, 2)).T, **look, label=f"{start} ({len(points)})")
    axis.set_xlabel("share of the specialist's Dice that new heads on the starting point reach (λ = 0)")
    axis.set_ylabel("share that the average of the task vectors keeps")
    if drawn:
        figure.legend(loc="outside right upper", title="starting point (tasks)", fontsize=8, title_fontsize=8)
    figure.savefig(path, dpi=130)
    heads, average = np.reshape([point for points in shares.values() for point in points], (-1, 2)).T
    told = [f"{len(heads)} tasks"]
    if len(heads) > 2 and np.ptp(heads) and np.ptp(average):
        told.append(f"correlation {np.corrcoef(heads, average)[0, 1]:.2f}")
    told += [
        f"new heads keep {name}: {inside.sum()} tasks, of which the average keeps {np.median(average[inside]):.2f} "
        f"({average[inside].min():.2f} to {average[inside].max():.2f})"
        for name, inside in (("0.8 or more", heads >= 0.8), (f"less than {KNOWN}", heads < KNOWN))
        if inside.any()
    ]
    return "; ".join(told)


def _titles(seeds: Mapping[str, Sequence[Mapping[str, Sequence[float]]]], without: str | tuple[str, ...]) -> list[str]:
    """Rows of all runs, but for those that begin so."""
    titles = dict.fromkeys(title for runs in seeds.values() for rows in runs for title in rows)
    return [title for title in titles if not title.startswith(without)]


def _mean(runs: Sequence[Mapping[str, Sequence[float]]], title: str, figure: int) -> float:
    """Over seeds, of one figure of a row; NaN where no seed has it."""
    values = [value for rows in runs for value in rows.get(title, ())[figure : figure + 1]]
    return float(np.mean(values)) if values else float("nan")


def _cell(values: Sequence[tuple[float, ...]]) -> str:
    if not values:
        return ""
    dice, shares = np.array([value for value, *_ in values]), [share for _, *share in values if share]
    spread = f" ± {dice.std(ddof=1):.3f}" if len(values) > 1 else ""
    return f"{dice.mean():.3f}{spread}" + (f" ({np.mean(shares):.2f})" if shares else "")


def filled(document: str, studies: Mapping[str, Results], told: str = "", order: Collection[str] = ()) -> str:
    """A Markdown document with what it has of studies written anew.

    A table stands after a mark, ``<!-- study.json Dataset1_Name -->``, what ``draw_tasks`` told after ``<!-- tasks -->``, each
    between empty lines.

    Args:
        document: the text.
        studies: by the names of their files.
        told: by ``draw_tasks``; if empty, that part stays.
        order: of the starting points; others come last.

    Raises:
        UserError: a part has no mark.
    """
    parts = {f"{file} {name}": one.table_of(name, order) for file, one in studies.items() for name in one.runs}
    for name, part in (parts | ({"tasks": told} if told else {})).items():
        before, mark, after = document.partition(f"<!-- {name} -->\n\n")
        if not mark:
            raise UserError(f"the document has no line <!-- {name} --> with an empty one after it")
        document = before + mark + part + "\n\n" + after.partition("\n\n")[2]
    return document


def show(*results: str, picture: str = "", tasks: str = "", document: str = "") -> None:
    """Print the tables of files of results, and draw them.

    Args:
        results: results.json of studies.
        picture: PNG to write.
        tasks: PNG of each task's shares to write.
        document: Markdown file in which to write the tables anew, and with ``tasks`` what these say, each after its mark.
    """
    from tests.benchmarks.study import STARTS

    if not results:
        raise UserError("which results.json?")
    found = [Results.read(Path(path)) for path in results]
    print("\n".join(one.table(STARTS) for one in found))
    if picture:
        draw(found, picture, STARTS)
    told = draw_tasks(found, tasks, STARTS) if tasks else ""
    print(told)
    if document:
        named = {Path(path).name: one for path, one in zip(results, found, strict=True)}
        if len(named) < len(found):
            raise UserError("the files of results must have different names, by which the document marks their tables")
        text = filled(Path(document).read_text(), named, told, STARTS)
        with complete_output(document, overwrite=True) as path:
            path.write_text(text)


if __name__ == "__main__":
    try:
        fire.Fire(show)
    except (UserError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
