"""Draws the figure of a suite from its CSV file, and prints the numbers behind it as a Markdown table.

The SVG is made to be read on a light and on a dark page: nothing behind the axes, grey text, and colours that stand out
from white and from black and that colour-blind eyes can tell apart (Okabe and Ito, 2008). Of several baselines each has
a grey and a kind of line of its own, which stands before its label. The same CSV gives the same bytes.
"""

import csv
import itertools
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from .suites import RESULTS, Incomplete, Suite

GREY = "#808080"
BASELINES = ((GREY, "-"), ("#999999", (0, (4, 1.5))), ("#666666", (0, (1, 1))))
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
LABEL_GAP = 0.06  # between two labels, as a fraction of the height of the axes
STYLE = {
    "svg.hashsalt": "benchmark",
    "font.size": 10,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "text.color": GREY,
    "axes.edgecolor": GREY,
    "axes.labelcolor": GREY,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titlepad": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GREY,
    "grid.alpha": 0.2,
    "xtick.color": GREY,
    "ytick.color": GREY,
}


def read_runs(suite: Suite) -> dict[str, dict[str, list[np.ndarray]]]:
    """env -> algorithm -> the runs: arrays (rows, 3) of environment steps, return, length."""
    path = RESULTS / f"{suite.name}.csv"
    rows: dict[tuple[str, str, str], list[tuple[float, float, float]]] = defaultdict(list)
    if not path.exists():
        raise Incomplete(f"there is no {path}: python -m benchmark all {suite.name}")
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            values = float(row["env_steps"]), float(row["return"]), float(row["length"])
            rows[row["env"], row["algorithm"], row["seed"]].append(values)
    runs: dict[str, dict[str, list[np.ndarray]]] = defaultdict(lambda: defaultdict(list))
    for (env, algorithm, _), values in rows.items():
        runs[env][algorithm].append(np.array(values))
    for entry in suite.entries:
        if (found := len(runs[entry.env_id][entry.label])) != entry.seeds:
            message = f"{path} has {found} runs of {entry.label}, not {entry.seeds}"
            raise Incomplete(f"{message}: python -m benchmark all {suite.name}")
    return runs


def read_times(suite: Suite) -> dict[tuple[str, str], list[np.ndarray]]:
    """(env, algorithm) -> for each run the minutes that had passed at each evaluation; empty where none were kept."""
    path, seconds = RESULTS / f"{suite.name}_times.csv", defaultdict(list)
    if path.exists():
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                seconds[row["env"], row["algorithm"], row["seed"]].append(float(row["wall_seconds"]))
    times = defaultdict(list)
    for (env, algorithm, _), values in seconds.items():
        times[env, algorithm].append(np.array(values) / 60)
    return times


def curves_of(suite: Suite, runs: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The x that all runs share, (points,), and the y of each run, (runs, points).

    A cumulative return counts episodes when they end: exact where all reward comes in the last step, as in the mazes.
    """
    if suite.curve == "length":
        points = min(len(run) for run in runs)
        return np.arange(1, points + 1), np.stack([run[:points, 2] for run in runs])
    if suite.curve == "return":
        return runs[0][:, 0], np.stack([run[:, 1] for run in runs])
    x = np.linspace(*suite.xlim, 301)
    sums = [np.concatenate([[0.0], np.cumsum(run[:, 1])]) for run in runs]
    ended = [np.searchsorted(run[:, 0], x, side="right") for run in runs]
    return x, np.stack([total[index] for total, index in zip(sums, ended, strict=True)])


def interquartile_mean(scores: np.ndarray, axis: int = 0) -> np.ndarray:
    """Mean of what is left after the lowest and the highest quarter are cut off (Agarwal et al., 2021)."""
    runs = scores.shape[axis]
    middle = np.arange(runs // 4, runs - runs // 4)
    return np.sort(scores, axis).take(middle, axis).mean(axis)


def bootstrap_interval(scores: np.ndarray, resamples: int = 2_000) -> tuple[np.ndarray, np.ndarray]:
    """95 % interval of the interquartile mean over the runs, (runs, points) -> two times (points,).

    Percentile bootstrap over whole runs. Stratified: each algorithm in each environment is resampled by itself.
    """
    drawn = np.random.default_rng(0).integers(len(scores), size=(resamples, len(scores)))
    low, high = np.percentile(interquartile_mean(scores[drawn], axis=1), [2.5, 97.5], axis=0)
    return low, high


def summarize(suite: Suite, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centre, lower and upper end of what is drawn, (runs, points) -> three times (points,)."""
    if suite.statistic == "iqm":
        return interquartile_mean(scores), *bootstrap_interval(scores)
    centre, error = scores.mean(0), scores.std(0, ddof=1) / np.sqrt(len(scores))
    return centre, centre - error, centre + error


def spread(heights: list[float]) -> list[float]:
    """Moves heights between 0 and 1 so far apart that labels there do not overlap.

    Their order is kept; of two heights that look the same, the first comes out above.
    """
    order = sorted(range(len(heights)), key=lambda index: (round(heights[index], 2), -index))
    moved = np.array(heights)[order]
    for _ in range(1_000):
        for below in range(len(moved) - 1):
            overlap = LABEL_GAP - (moved[below + 1] - moved[below])
            if overlap > 0:
                moved[below : below + 2] += -overlap / 2, overlap / 2
        moved = moved.clip(0.0, 1.0)
    return moved[np.argsort(order)].tolist()


def over_minutes(runs: list[np.ndarray], times: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """As `curves_of`, over the minutes that all runs took: a return holds until the next evaluation is done. A point,
    where the last run is first evaluated, if the first one has ended by then."""
    begin, end = max(time[0] for time in times), min(time[-1] for time in times)
    x = np.linspace(begin, end, 101) if begin < end else np.array([begin])
    last = [np.searchsorted(time, x, side="right") - 1 for time in times]
    return x, np.stack([run[index, 1] for run, index in zip(runs, last, strict=True)])


def draw_panel(
    axes: Any, suite: Suite, env: str, algorithms: dict[str, list[np.ndarray]], times: dict | None = None
) -> None:
    """The curves of one environment, each with its label at its end; with `times`, over minutes."""
    from matplotlib.ticker import MaxNLocator

    axes.set(ylim=suite.ylim, ylabel=suite.ylabel)
    if times is None:
        axes.set(xlim=suite.xlim, xlabel=suite.xlabel)
    else:
        axes.set(xlim=(0, longest(times)), xlabel="minutes")
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    low, high = suite.ylim
    ours = dict.fromkeys(entry.label for entry in suite.entries if not entry.baseline)
    styles = {label: (colour, "-") for label, colour in zip(ours, COLOURS[: len(ours)], strict=True)}
    greys = dict.fromkeys(entry.label for entry in suite.entries if entry.baseline)
    styles |= dict(zip(greys, BASELINES[: len(greys)], strict=True))  # more lines than styles: an error
    labels = []
    for entry in (entry for entry in suite.entries if entry.env_id == env):
        runs = algorithms[entry.label]
        x, scores = curves_of(suite, runs) if times is None else over_minutes(runs, times[env, entry.label])
        centre, lower, upper = summarize(suite, scores)
        colour, dashes = styles[entry.label]
        axes.plot(x, centre, color=colour, linewidth=1.8, linestyle=dashes, marker="o" if len(x) == 1 else None)
        axes.fill_between(x, lower, upper, color=colour, alpha=0.25, linewidth=0 if len(x) > 1 else 3)
        labels.append((entry.label, colour, (centre[-1] - low) / (high - low), dashes))
    for label, points in suite.published if times is None else ():
        x, y = zip(*points, strict=True)
        axes.plot(x, y, color=GREY, linewidth=1.4, linestyle="--", marker="o", markersize=3)
        labels.append((label, GREY, (y[-1] - low) / (high - low), "--"))
    if suite.horizontal:
        height, text = suite.horizontal
        axes.axhline(height, color=GREY, linewidth=0.8)
        labels.append((text, GREY, (height - low) / (high - low), "-"))
    several = len(greys) > 1
    for (text, colour, _, dashes), height in zip(labels, spread([label[2] for label in labels]), strict=True):
        if several:
            sample = {"linestyle": dashes, "linewidth": 1.8, "transform": axes.transAxes, "clip_on": False}
            axes.plot((1.015, 1.06), (height, height), color=colour, **sample)
        axes.text(1.07 if several else 1.015, height, text, color=colour, va="center", transform=axes.transAxes)
    if suite.vertical and times is None:
        x, text = suite.vertical
        axes.axvline(x, color=GREY, linewidth=0.8, linestyle="--")
        offset = {"xytext": (5, -3), "textcoords": "offset points"}
        axes.annotate(text, (x, high), va="top", fontsize=9, linespacing=1.3, **offset)


def draw(suite: Suite, times: dict | None = None) -> Any:
    """The figure of a suite: a panel for each environment; with `times`, over minutes."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    runs = read_runs(suite)
    with rc_context(STYLE):
        figure = Figure(figsize=(7 * len(runs), 4), layout="constrained")
        panels = figure.subplots(1, len(runs), squeeze=False)[0]
        for axes, (env, algorithms) in zip(panels, runs.items(), strict=True):
            draw_panel(axes, suite, env, algorithms, times)
            axes.set_title(suite.title if len(runs) == 1 else env)
        if len(runs) > 1:
            figure.suptitle(suite.title)
    return figure


def table(suite: Suite) -> str:
    """Markdown table of the drawn numbers at the x of `suite.table_at`."""
    lines = [
        f"| {suite.xlabel} | " + " | ".join(f"{x:,}" for x in suite.table_at) + " |",
        "|---" * (len(suite.table_at) + 1) + "|",
    ]
    found = read_runs(suite)
    for env, algorithms in found.items():
        for label, runs in algorithms.items():
            x, scores = curves_of(suite, runs)
            found_at = {at: x.searchsorted(at) for at in suite.table_at if at <= x[-1]}
            found_at = {at: column for at, column in found_at.items() if x[column] < 1.05 * at + 1}  # PPO: 5 % later
            columns = list(found_at.values())
            numbers = zip(*(values[columns] for values in summarize(suite, scores)), strict=True)
            if suite.statistic == "mean":
                cells = [f"{centre:.1f} ± {upper - centre:.1f}" for centre, _, upper in numbers]
            else:
                digits = 3 if suite.ylim[1] - suite.ylim[0] < 10 else 1
                cells = [
                    f"{centre:.{digits}f} [{lower:.{digits}f}, {upper:.{digits}f}]" for centre, lower, upper in numbers
                ]
            cells = dict(zip(found_at, cells, strict=True))
            row = " | ".join(cells.get(at, "") for at in suite.table_at)
            lines.append(f"| {label if len(found) == 1 else f'{env}, {label}'} | {row} |")
    for row in suite.quoted:
        lines.append("| " + " | ".join(row + ("",) * (1 + len(suite.table_at) - len(row))) + " |")
    return "\n".join(lines)


def first_reached(suite: Suite) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """(env, algorithm) -> environment steps and minutes of each run at its first evaluation of `suite.threshold` or
    more; infinite where there is none."""
    times, found = read_times(suite), {}
    for env, algorithms in read_runs(suite).items():
        for label, runs in algorithms.items():
            reached = [(run[:, 0], np.flatnonzero(run[:, 1] >= suite.threshold)[:1]) for run in runs]
            found[env, label] = [
                (steps[first].item(), minutes[first].item()) if len(first) else (np.inf, np.inf)
                for (steps, first), minutes in zip(reached, times[env, label], strict=True)
            ]
    return found


def threshold_table(suite: Suite) -> str:
    """Markdown table: after how many steps and minutes an evaluation first reached `suite.threshold`."""
    unit, per_minute = ("minutes", 1) if longest(read_times(suite)) >= 1 else ("seconds", 60)
    lines = [
        f"| first evaluation of {suite.threshold:g} or more | seeds | environment steps | {unit} |",
        "|---|---|---|---|",
    ]
    for (_, label), runs in first_reached(suite).items():
        reached = [(steps, minutes * per_minute) for steps, minutes in runs if steps < np.inf]
        steps, passed = (listed([run[column] for run in reached], column) for column in (0, 1))
        lines.append(f"| {label} | {len(reached)} of {len(runs)} | {steps} | {passed} |")
    return "\n".join(lines)


def factors_table(suites: list[Suite]) -> str:
    """Markdown table: how many times fewer steps, and how many times the minutes, an algorithm takes to a suite's
    threshold, compared with each baseline of the suite; medians over the seeds. Where the median run of a baseline does
    not get there, what it took in all is compared, so that the factor is a bound."""
    lines = [
        "| to a return of | algorithm | compared with | steps, times fewer | minutes, times as many |",
        "|---" * 5 + "|",
    ]
    for suite in suites:
        reached, runs, times = first_reached(suite), read_runs(suite), read_times(suite)
        for entry, other in itertools.product(suite.entries, suite.entries):
            ours, theirs = (np.median(reached[each.env_id, each.label], axis=0) for each in (entry, other))
            if entry.baseline or not other.baseline or entry.env_id != other.env_id or np.isinf(ours).any():
                continue
            key, bound = (other.env_id, other.label), ("", "")
            if np.isinf(theirs).any():
                last = [(run[-1, 0], time[-1]) for run, time in zip(runs[key[0]][key[1]], times[key], strict=True)]
                theirs, bound = np.median(last, axis=0), ("more than ", "less than ")
            steps, minutes = theirs[0] / ours[0], ours[1] / theirs[1]
            cells = f"{entry.env_id} {suite.threshold:g}", entry.label, other.label
            lines.append(f"| {' | '.join(cells)} | {bound[0]}{steps:.1f} | {bound[1]}{minutes:.1f} |")
    return "\n".join(lines)


def longest(times: dict) -> float:
    """The minutes of the longest run."""
    return max((time[-1] for found in times.values() for time in found), default=0.0)


def listed(values: list[float], digits: int) -> str:
    """All of a few values; of more than five the median and the range."""
    if len(values) > 5:
        low, middle, high = np.quantile(values, (0, 0.5, 1))
        return f"median {middle:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"
    return ", ".join(f"{value:,.{digits}f}" for value in values) or "-"


def plot_suite(suite: Suite) -> None:
    """Writes the SVG of a suite, a second one over minutes where a run takes any, and prints its tables."""
    from matplotlib import rc_context

    figures = {f"{suite.name}.svg": draw(suite)}
    times = read_times(suite)
    if longest(times) >= 1:
        figures[f"{suite.name}_minutes.svg"] = draw(suite, times)
    with rc_context(STYLE):
        for name, figure in figures.items():
            figure.savefig(RESULTS / name, metadata={"Date": None})
    print(tables(suite))


def tables(suite: Suite) -> str:
    """All tables of a suite."""
    return table(suite) + (f"\n\n{threshold_table(suite)}" if suite.threshold is not None else "")


def page_of(suite: Suite) -> Path:
    """The page that shows a suite."""
    return (RESULTS.parent / suite.name).parent / "README.md"


def report(suites: list[Suite]) -> None:
    """Puts the tables of suites into their pages, between `<!-- NAME -->` and `<!-- end -->`, and what they have in
    common, `<!-- factors -->`, beside those of the claims."""
    suites = [suite for suite in suites if (RESULTS / f"{suite.name}.csv").exists()]
    written = [(page_of(suite), suite.name, tables(suite)) for suite in suites]
    compared = [suite for suite in suites if suite.threshold is not None and "/" not in suite.name]
    written.append((RESULTS.parent / "claims" / "README.md", "factors", factors_table(compared)))
    tables_of = Counter()
    for page, name, text in written:
        begin, end = f"<!-- {name} -->\n", "<!-- end -->"
        if page.exists() and begin in page.read_text():
            before, rest = page.read_text().split(begin, 1)
            page.write_text(before + begin + "\n" + text + "\n\n" + end + rest.split(end, 1)[1])
            tables_of[page] += 1
    for page, count in tables_of.items():
        print(f"{count} tables written into {page}")
