"""The benchmark: declared runs are made, continued, collected and drawn, and its statistics are right."""

import dataclasses
import importlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, start, tiny_args
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

import cem_mpc
import muzero
import td_mpc2
from benchmark import (
    bonus_in_acting,
    collect,
    foresight,
    model_error,
    plot,
    run,
    speed_td_mpc2,
    suites,
    tasks,
    tic_tac_toe,
)

SMALL = suites.Suite(
    name="small",
    title="Two agents in a maze",
    entries=(
        suites.Entry("Q-learning", "dyna_q.py", "DynaMaze-v0", 6_000, 2, "--n-planning 0", baseline=True),
        suites.Entry("Dyna-Q+", "dyna_q_plus.py", "DynaMaze-v0", 6_000, 2, "--n-planning 5"),
    ),
    arguments="--eval-every 2000 --checkpoint-every 500",
    collect="evaluations",
    curve="return",
    statistic="iqm",
    xlabel="environment steps",
    ylabel="return",
    xlim=(0, 6_000),
    ylim=(0, 1),
    table_at=(2_000, 6_000),
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root of its own for runs and results, with the scripts in it."""
    for script in ROOT.glob("*.py"):
        (tmp_path / script.name).symlink_to(script)
    for module, names in ((run, ("ROOT", "RUNS")), (collect, ("RESULTS",)), (plot, ("RESULTS",))):
        for name in names:
            monkeypatch.setattr(module, name, tmp_path / {"ROOT": "", "RUNS": "runs", "RESULTS": "results"}[name])
    return tmp_path


def test_runs_are_made_once_collected_and_drawn(folder, capsys):
    assert run.run_suite(SMALL, 2) == 0
    assert run.jobs_of(SMALL) == []
    collect.collect_suite(SMALL)
    lines = (folder / "results" / "small.csv").read_text().splitlines()
    assert lines[0] == "algorithm,env,seed,env_steps,return,length"
    assert [line.split(",")[:4] for line in lines[1:4]] == [
        ["Q-learning", "DynaMaze-v0", "1", str(step)] for step in (2_000, 4_000, 6_000)
    ]
    for line in lines[1:]:
        assert 0.0 <= float(line.split(",")[4]) <= 1.0
    plot.plot_suite(SMALL)
    first = (folder / "results" / "small.svg").read_bytes()
    plot.plot_suite(SMALL)
    assert (folder / "results" / "small.svg").read_bytes() == first
    # Another suite with the same commands has its runs already; with other arguments it needs runs of its own. A run
    # that was made before a default of its script changed is left aside.
    assert run.jobs_of(dataclasses.replace(SMALL, name="other", entries=SMALL.entries[:1])) == []
    changed = dataclasses.replace(SMALL, arguments=SMALL.arguments + " --epsilon 0.2")
    assert len(run.jobs_of(changed)) == 4
    with pytest.raises(suites.Incomplete, match="4 runs of small are not finished"):
        collect.collect_suite(changed)
    old = next((folder / "runs").rglob("args.json"))
    old.write_text(old.read_text().replace('"epsilon": ', '"epsilon": 1'))
    capsys.readouterr()
    assert len(run.jobs_of(SMALL)) == 1
    assert capsys.readouterr().out.count("left aside, made with other settings than the script has now") == 1
    old.write_text(old.read_text().replace('"versions"', '"made_with"'))
    with pytest.raises(suites.Incomplete, match="1 runs of small are not finished"):
        collect.collect_suite(SMALL)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"left aside, made by a script with run folders of another form: {old.parent.relative_to(folder)}"]


def test_a_run_is_finished_when_its_result_is_that_of_its_last_step(tmp_path: Path):
    assert not run.is_finished(tmp_path)
    (tmp_path / "args.json").write_text('{"args": {"total_timesteps": 1000}}')
    for result, finished in (({}, False), ({"env_steps": 999}, False), ({"env_steps": 1_004}, True)):
        (tmp_path / "result.json").write_text(json.dumps(result))
        assert run.is_finished(tmp_path) == finished


def test_an_interrupted_benchmark_ends_with_the_same_bytes(folder):
    assert run.run_suite(SMALL, 2) == 0
    collect.collect_suite(SMALL)
    whole = (folder / "results" / "small.csv").read_bytes()
    (folder / "runs").rename(folder / "other")
    job, *_ = run.jobs_of(SMALL)
    process = subprocess.Popen([sys.executable, *job.command], cwd=folder, stdout=subprocess.PIPE)
    while not list((folder / "runs").rglob("checkpoint*")):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    jobs = run.jobs_of(SMALL)
    assert sum("--resume" in job.command for job in jobs) == 1
    assert len(jobs) == 4
    assert run.run_suite(SMALL, 2) == 0
    collect.collect_suite(SMALL)
    assert (folder / "results" / "small.csv").read_bytes() == whole


def test_a_failed_run_is_shown_and_the_others_go_on(folder, capsys):
    broken = dataclasses.replace(SMALL.entries[0], label="broken", env_id="Nope-v0", seeds=1)
    assert run.run_suite(dataclasses.replace(SMALL, entries=(broken, SMALL.entries[1])), 2) == 1
    assert "doesn't exist" in capsys.readouterr().err
    assert len(list((folder / "runs").rglob("result.json"))) == 2


def benchmark(*words: str, without: str = "") -> tuple[int, str, str]:
    """Status, stdout and stderr of `python -m benchmark`, on a machine that lacks a package."""
    code = f"import runpy, sys; sys.modules[{without!r}] = None; runpy.run_module('benchmark', run_name='__main__')"
    start = ["-c", code] if without else ["-m", "benchmark"]
    process = subprocess.run([sys.executable, *start, *words], cwd=ROOT, capture_output=True, text=True)
    return process.returncode, process.stdout, process.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("run nope", "figure_8_2"),
        ("speed muzero --device cuda", "muzero is measured on a CPU only"),
        ("games nope", "nope/args.json"),
        ("play nope", "nope/args.json"),
    ],
)
def test_what_a_user_can_fix_is_one_line_and_status_2(words: str, said: str):
    status, _, err = benchmark(*words.split())
    assert (status, err.count("\n")) == (2, 1)
    assert said in err


def test_only_drawing_needs_matplotlib():
    for words in ("--help", "run --help", "speed --help", "play --help"):
        assert benchmark(*words.split(), without="matplotlib")[0] == 0
    for words in ("plot taxi", "all taxi"):  # before the runs are made, not after
        status, _, err = benchmark(*words.split(), without="matplotlib")
        assert (status, err.count("\n")) == (2, 1)
        assert "pip install -r benchmark/requirements.txt" in err


def test_the_bonus_in_acting_chooses_and_is_not_planned_with():
    spaces = gym.spaces.Discrete(4), gym.spaces.Discrete(3)
    agent = bonus_in_acting.Agent(*spaces, bonus_in_acting.Args(kappa=1.0, epsilon=0.0, n_planning=50))
    agent.observe(0, 0, 0.0, 1, False, False)
    agent.observe(0, 1, 0.0, 1, False, False)  # tau is now 1, 0 and 2
    agent.update()
    assert agent.q[0,] == [0.0, 0.0, 0.0]
    assert {int(agent.act(0)) for _ in range(20)} == {2}
    agent.q[0,][:] = [0.5, 0.0, 0.0]  # and 1 more for tau = 1, 1.41 for 2
    assert {int(agent.act(0)) for _ in range(20)} == {0}
    assert {int(agent.act(3)) for _ in range(50)} == {0, 1, 2}  # of which nothing is known


def test_without_a_bonus_it_does_not_matter_where_it_counts(folder):
    scripts = ("dyna_q_plus.py", "benchmark/bonus_in_acting.py")
    (folder / "benchmark").mkdir()
    (folder / "benchmark" / "bonus_in_acting.py").symlink_to(ROOT / "benchmark" / "bonus_in_acting.py")
    entries = [suites.Entry("", script, "DynaMaze-v0", 6_000, 1, "--n-planning 5") for script in scripts]
    rows = []
    for entry, kappa in itertools.product(entries, (0, 1)):
        suite = dataclasses.replace(SMALL, entries=(entry,), arguments=f"--eval-every 1000 --kappa {kappa}")
        assert run.run_suite(suite, 1) == 0
        collect.collect_suite(dataclasses.replace(suite, collect="episodes"))
        rows.append((folder / "results" / "small.csv").read_text())
    assert rows[0] == rows[2]
    assert len(set(rows)) == 3


def test_every_declared_command_is_understood_by_its_script(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(run, "RUNS", tmp_path / "runs")
    for suite in suites.DECLARED:
        for entry in suite.entries:
            assert run.find_runs(suite, entry) == {}


@pytest.mark.parametrize("suite", suites.SUITES.values(), ids=lambda suite: suite.name)
def test_committed_results_are_those_of_the_declared_suites(suite):
    if not (suites.RESULTS / f"{suite.name}.csv").exists():
        pytest.skip("not run yet")
    for env, algorithms in plot.read_runs(suite).items():
        for label, runs in algorithms.items():
            assert all(np.isfinite(rows).all() for rows in runs), (env, label)
    assert (suites.RESULTS / f"{suite.name}.svg").exists()
    text = plot.page_of(suite).read_text()
    assert f"<!-- {suite.name} -->\n\n{plot.tables(suite)}\n\n<!-- end -->" in text  # as `report` writes them


@pytest.mark.parametrize(
    ("script", "suite", "label"),
    [
        ("cem_mpc", "pendulum", "PETS"),
        ("cem_mpc", "inverted_pendulum", "PETS"),
        ("cem_mpc", "reacher", "PETS"),
        ("cem_mpc", "acrobot", "PETS"),
        ("mbpo", "pendulum", "MBPO"),
        ("mbpo", "inverted_pendulum", "without model, 1 update a step"),
        ("mbpo", "double_pendulum", "MBPO"),
        ("mbpo", "double_pendulum", "without model, 1 update a step"),
        ("mbpo", "reacher", "MBPO"),
        ("mbpo", "reacher", "without model, 1 update a step"),
        ("td_mpc2", "pendulum", "TD-MPC2"),
        ("mbpo", "half_cheetah", "MBPO"),
        ("mbpo", "half_cheetah", "without model, 40 updates a step"),
        ("muzero", "acrobot", "MuZero"),
        ("dreamer", "dreamer_pendulum", "Dreamer (GPU)"),
        ("dreamer", "acrobot", "Dreamer"),
    ],
)
def test_what_a_script_says_to_expect_is_what_was_measured(script: str, suite: str, label: str):
    (runs,) = (runs[label] for runs in plot.read_runs(suites.SUITES[suite]).values())
    final = [run[-1, 1] for run in runs]
    doc, decimals = importlib.import_module(script).__doc__, 1 if suite == "reacher" else 0
    numbers = [f"{value:.{decimals}f}" for value in sorted(final, key=abs)]
    if f"{numbers[0]} to {numbers[-1]} " not in doc:  # or else of every seed
        said = re.findall(r"-?\d[\d.]*(?:, -?\d[\d.]*)+", doc)
        (listed,) = (text for text in said if sorted(text.split(", ")) == sorted(numbers))
        if f"{listed} (mean" in doc:
            assert f"{listed} (mean: {np.mean(final):.{decimals}f}" in doc
    if suite == "pendulum":
        mean, best, worst = (f"{value:.0f}" for value in (np.mean(final), max(final), min(final)))
        said = f"return {mean} (mean of {len(final)} seeds, {best} to {worst})"
        assert said in (ROOT / "README.md").read_text()


def test_the_speed_of_td_mpc2_is_that_of_its_update_and_its_plan():
    assert [work() for work in speed_td_mpc2.our_work("nano")] == [1, 1]


def test_what_td_mpc2_foresaw_is_drawn_beside_what_came(tmp_path):
    args = tiny_args(td_mpc2, total_timesteps=60, run_dir=str(tmp_path))
    td_mpc2.train(args)
    (run_path,) = tmp_path.iterdir()
    agent, env = td_mpc2.load(run_path), td_mpc2.make_env(args)
    torch.nn.init.normal_(agent.model.reward[-1].weight)  # so that the action matters
    found = foresight.foreseen(agent, env)
    length, horizon = len(found["reward"]), args.horizon
    assert [len(found[name]) for name in ("expected", "return", "value")] == [length - horizon + 1, length, length]
    policy, (obs, info), observations, actions = agent.greedy_policy(seed=0), env.reset(seed=0), [], []
    for _ in range(20):
        observations.append(agent.flat(obs))
        action = policy(obs, info)
        actions.append(agent.from_env(action))
        obs, *_, info = env.step(action)
    for begin in range(20 - horizon):
        with torch.no_grad():
            z = agent.model.encoder(observations[begin])
            for step in range(begin, begin + horizon):
                x = torch.cat([z, actions[step]])
                expected, z = td_mpc2.from_bins(agent.model.reward(x)).item(), agent.model.dynamics(x)
        np.testing.assert_allclose(found["expected"][begin], expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found["return"][-2], found["reward"][-2] + agent.gamma * found["return"][-1], rtol=1e-5)
    foresight.draw(run_path, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_interquartile_mean():
    assert plot.interquartile_mean(np.arange(1.0, 9.0)) == 4.5
    assert plot.interquartile_mean(np.array([0.0, 1.0, 2.0, 1e9])) == 1.5
    scores = np.full((20, 3), 0.7)
    low, high = plot.bootstrap_interval(scores)
    np.testing.assert_allclose((low, high), 0.7)


def test_bootstrap_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(200):
        low, high = plot.bootstrap_interval(rng.normal(size=(40, 1)), resamples=300)
        inside += int(low[0] < 0 < high[0])
    assert 170 <= inside <= 200


def test_published_curves_are_drawn_dashed_with_their_label():
    suite = suites.SUITES["dreamer_reacher"]
    ((label, points),) = suite.published
    (axes,) = plot.draw(suite).axes
    (line,) = (line for line in axes.lines if line.get_linestyle() == "--")
    np.testing.assert_array_equal(line.get_xydata(), points)
    assert label in {text.get_text() for text in axes.texts}


def test_a_table_is_empty_where_nothing_was_evaluated_yet(monkeypatch):
    suite = dataclasses.replace(SMALL, curve="return", statistic="iqm", table_at=(1_000, 2_000, 3_000))
    runs = {"CartPole-v1": {"late": [np.array([[2_008.0, 1.0, 9.0]])]}}
    monkeypatch.setattr(plot, "read_runs", lambda _: runs)
    assert [cell.strip() != "" for cell in plot.table(suite).splitlines()[2].split("|")[2:5]] == [False, True, False]


def test_runs_that_were_evaluated_once_are_a_point():
    runs, times = [np.array([[2_000.0, value, 9.0]]) for value in (1.0, 3.0)], [np.array([2.0]), np.array([5.0])]
    x, scores = plot.over_minutes(runs, times)
    assert x.tolist() == [5.0]
    assert scores.tolist() == [[1.0], [3.0]]


def test_cumulative_return_jumps_where_an_episode_ends():
    suite = dataclasses.replace(SMALL, curve="cumulative return", xlim=(0, 300))
    x, (total,) = plot.curves_of(suite, [np.array([[50.0, 1.0, 50.0], [200.0, 2.0, 150.0]])])
    assert [total[x == step][0] for step in (0, 49, 50, 199, 200, 300)] == [0, 0, 1, 1, 3, 3]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
@settings(deadline=None)
def test_labels_do_not_overlap_and_keep_their_order(heights):
    moved = plot.spread(heights)
    for one, two in zip(sorted(moved)[:-1], sorted(moved)[1:], strict=True):
        assert two - one > plot.LABEL_GAP - 0.01
    assert min(moved) > -0.01
    assert max(moved) < 1.01
    for i, j in ((i, j) for i in range(len(heights)) for j in range(len(heights)) if heights[i] > heights[j] + 0.01):
        assert moved[i] > moved[j]


def test_logged_numbers_come_back_as_they_were():
    assert [collect.number(float(np.float32(value))) for value in (0.43, 844.0, -13.25)] == ["0.43", "844", "-13.25"]


@pytest.mark.parametrize("first", [True, False])
def test_all_games_of_tic_tac_toe_are_counted(first: bool):
    game = muzero.KInARow()

    def perfect(positions: list[tuple[int, int]]) -> list[int]:
        def value(own: int, other: int, won: bool) -> float:
            return 1.0 if won else -tic_tac_toe.foresee(game, other, own, 9)

        return [
            max(game.moves(own, other), key=lambda move, other=other: value(move[1], other, move[2]))[0]
            for own, other in positions
        ]

    def play(own: int, other: int, mine: bool) -> np.ndarray:
        """Won, drawn and lost games from a position on, one after the other."""
        if not (moves := list(game.moves(own, other))):
            return np.array([0, 1, 0])
        total = np.zeros(3, np.int64)
        for action, after, won in moves:
            if not mine or action == perfect([(own, other)])[0]:
                total += [won and mine, 0, won and not mine] if won else play(other, after, not mine)
        return total

    counts, probabilities = tic_tac_toe.count_games(game, perfect, first)
    assert counts.tolist() == play(0, 0, first).tolist()
    assert counts[2] == 0  # perfect play does not lose
    assert probabilities.sum() == pytest.approx(1)
    assert probabilities[0] > 0.9 if first else probabilities[0] > 0.7


def test_games_of_a_run(tmp_path: Path):
    arguments = [
        *["--env-id", "TicTacToe-v0", "--total-timesteps", "60", "--learning-starts", "20", "--num-simulations", "4"]
    ]
    arguments += ["--hidden-size", "8", "--run-dir", str(tmp_path)]
    subprocess.run([sys.executable, ROOT / "muzero.py", *arguments], check=True, capture_output=True)
    words = [sys.executable, "-m", "benchmark", "play", *map(str, tmp_path.iterdir())]
    played = subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True, input="\n")
    assert "You are X" in played.stdout
    assert "You have won 0, lost 0, drawn 0." in played.stdout
    lines = tic_tac_toe.measure(list(tmp_path.iterdir())).splitlines()
    assert len(lines) == 2 + 4
    assert all(len(line.split("|")) == 9 for line in lines)
    with pytest.raises(FileNotFoundError, match=r"args\.json"):
        tic_tac_toe.measure([tmp_path])
    muzero.train(tiny_args(muzero, total_timesteps=10, eval_episodes=1, run_dir=str(tmp_path / "other")))
    with pytest.raises(FileNotFoundError, match="is not a run of TicTacToe-v0"):
        tic_tac_toe.measure(list((tmp_path / "other").iterdir()))


def test_a_baseline_is_run_collected_and_begun_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("stable_baselines3")
    monkeypatch.setattr(run, "RUNS", ROOT / "benchmark" / "runs" / tmp_path.name)
    monkeypatch.setattr(collect, "RESULTS", tmp_path)
    entry = suites.Entry("PPO", "benchmark/baselines.py", "CartPole-v1", 400, 1, "--algorithm ppo", baseline=True)
    suite = dataclasses.replace(SMALL, entries=(entry,), arguments="--eval-every 200 --eval-episodes 2")
    try:
        assert run.run_suite(suite, 1) == 0
        collect.collect_suite(suite)
        before = (tmp_path / "small.csv").read_bytes()
        assert before.count(b"PPO,CartPole-v1,1,") == 2
        (folder,) = run.find_runs(suite, entry).values()
        (folder / "result.json").unlink()
        assert run.run_suite(suite, 1) == 0
        collect.collect_suite(suite)
        assert (tmp_path / "small.csv").read_bytes() == before
    finally:
        shutil.rmtree(run.RUNS, ignore_errors=True)


def test_report_of_a_suite_with_a_threshold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(plot, "RESULTS", tmp_path)
    rows, times = [], []
    for label, returns in (("Q-learning", [[0, 5], [7, 8]]), ("Dyna-Q+", [[1, 2, 9], [3, 4, 5]])):
        for seed, run_returns in enumerate(returns, 1):
            for index, value in enumerate(run_returns, 1):
                rows.append([label, "DynaMaze-v0", seed, 1_000 * index, value, 10])
                times.append([label, "DynaMaze-v0", seed, 1_000 * index, 60 * index * seed])
    collect.write_csv(tmp_path / "small.csv", collect.COLUMNS, rows)
    collect.write_csv(tmp_path / "small_times.csv", collect.TIME_COLUMNS, times)
    suite = dataclasses.replace(
        SMALL, threshold=5, table_at=(1_000, 2_000, 3_000), quoted=(("others", "1"),), ylim=(0, 100)
    )
    assert plot.table(suite).splitlines()[2:] == [
        "| Q-learning | 3.5 [0.0, 7.0] | 6.5 [5.0, 8.0] |  |",
        "| Dyna-Q+ | 2.0 [1.0, 3.0] | 3.0 [2.0, 4.0] | 7.0 [5.0, 9.0] |",
        "| others | 1 |  |  |",
    ]
    assert plot.threshold_table(suite).splitlines()[2:] == [
        "| Q-learning | 2 of 2 | 2,000, 1,000 | 2.0, 2.0 |",
        "| Dyna-Q+ | 2 of 2 | 3,000, 3,000 | 3.0, 6.0 |",
    ]
    assert plot.threshold_table(dataclasses.replace(suite, threshold=50)).splitlines()[-1] == (
        "| Dyna-Q+ | 0 of 2 | - | - |"
    )
    assert plot.factors_table([suite]).splitlines()[2:] == ["| DynaMaze-v0 5 | Dyna-Q+ | Q-learning | 0.5 | 2.2 |"]
    assert plot.factors_table([dataclasses.replace(suite, threshold=9)]).splitlines()[2:] == []
    others = tuple(dataclasses.replace(entry, baseline=not entry.baseline) for entry in suite.entries)
    others = dataclasses.replace(suite, threshold=8, entries=others)  # one of two runs each gets there
    assert plot.factors_table([others]).splitlines()[2:] == []
    soon, never = [np.array([[1e3, 9, 0]])] * 2, [np.array([[1e3, 0, 0], [2e3, 0, 0], [3e3, 0, 0]])] * 2
    with monkeypatch.context() as patch:
        patch.setattr(plot, "read_runs", lambda _: {"DynaMaze-v0": {"Q-learning": soon, "Dyna-Q+": never}})
        assert plot.factors_table([others]).splitlines()[2:] == [
            "| DynaMaze-v0 8 | Q-learning | Dyna-Q+ | more than 3.0 | less than 0.3 |"
        ]
    assert plot.listed([3.0, 1.0], 0) == "3, 1"
    assert plot.listed([6_000.0, 2_000, 1_000, 3_000, 4_000, 5_000], 0) == "median 3,500 (1,000 to 6,000)"
    x, scores = plot.over_minutes(
        [np.array([[1e3, 1, 0], [2e3, 2, 0]]), np.array([[1e3, 3, 0], [2e3, 4, 0]])],
        [np.array([1.0, 2.0]), np.array([2.0, 4.0])],
    )
    assert (x.min(), x.max()) == (2.0, 2.0)
    assert scores[:, 0].tolist() == [2.0, 3.0]
    plot.plot_suite(suite)
    assert {path.name for path in tmp_path.glob("*.svg")} == {"small.svg", "small_minutes.svg"}
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- small -->\n<!-- end -->\nbetween\n<!-- other -->\n<!-- end -->\nafter\n")
    missing = dataclasses.replace(suite, name="claims/not_run_yet")  # it has no results, and its page need not exist
    monkeypatch.setattr(plot, "page_of", lambda found: tmp_path / ("page.md" if found is suite else "none.md"))
    capsys.readouterr()
    plot.report([suite, missing])
    plot.report([suite])
    assert capsys.readouterr().out == 2 * f"1 tables written into {page}\n"
    rest = "between\n<!-- other -->\n<!-- end -->\nafter\n"
    assert page.read_text() == f"before\n<!-- small -->\n\n{plot.tables(suite)}\n\n<!-- end -->\n{rest}"


def test_runs_with_settings_by_environment_are_found(folder, monkeypatch, capsys):
    monkeypatch.setitem(importlib.import_module("dyna_q").PRESETS, "DynaMaze-v0", {"eval_episodes": 3})
    entry = dataclasses.replace(SMALL.entries[0], seeds=1)
    settings = "--total-timesteps 6000 --eval-every 2000 --checkpoint-every 500 --n-planning 0 --eval-episodes"
    path = run.folder_of(SMALL, entry)
    for seed, episodes in ((1, 3), (2, 7)):
        words = [*settings.split(), str(episodes), "--seed", str(seed), "--run-dir", str(path)]
        assert start("dyna_q", *words).returncode == 0
    assert list(run.find_runs(SMALL, entry)) == [1]
    assert capsys.readouterr().out.count("left aside") == 1


def test_errors_of_a_model(tmp_path: Path):
    args = cem_mpc.Args(total_timesteps=150, learning_starts=100, population=4, num_best=2, iterations=1, horizon=2)
    cem_mpc.train(dataclasses.replace(args, run_dir=str(tmp_path), eval_episodes=1, max_updates=20, hidden=(16, 16)))
    (run_folder,) = tmp_path.iterdir()
    agent, episodes = model_error.fresh_episodes(run_folder, 1)
    assert [(len(obs), len(action)) for obs, action in episodes] == [(201, 200)] * 2
    unit, elites = agent.model.obs_std, agent.model.select(agent.model.elites)[0]
    squares, one_step, spread = [], [], []
    with torch.inference_mode():
        for obs, action in episodes:  # one start and one member after the other
            for start, member in itertools.product(range(199), range(5)):
                state, layers = obs[start].view(1, 1, 3), [layer[member : member + 1] for layer in elites]
                for step in (start, start + 1):
                    state = state + agent.model.predict(state, action[step].view(1, 1, 1), layers)[0]
                squares.append((((state[0, 0] - obs[start + 2]) / unit) ** 2).mean())
            expected = model_error.predictions(agent, obs[:-1], action[:, None])
            one_step.append((((expected.mean(0) - obs[1:]) / agent.model.delta_std) ** 2).mean(1))
            spread.append((expected.std(0, correction=0) / agent.model.delta_std).square().mean(1))
    found = dict(model_error.error_by_steps(run_folder, 1))
    assert list(found) == list(model_error.STEPS_AHEAD)
    assert found[2] == pytest.approx(torch.stack(squares).mean().sqrt().item(), rel=1e-4)
    groups = model_error.error_by_disagreement(run_folder, 1)
    assert [number for number, _ in groups] == list(range(1, 11))
    most = torch.cat(one_step)[torch.cat(spread).topk(40).indices]  # the last tenth of 400 steps
    assert groups[-1][1] == pytest.approx(most.mean().sqrt().item(), rel=1e-4)
    mean_square = np.mean([error**2 for _, error in groups])  # all groups are equally large
    assert mean_square == pytest.approx(torch.cat(one_step).mean().item(), rel=1e-4)


def test_minutes_of_an_interrupted_run_are_without_its_pauses(tmp_path: Path):
    with open(tmp_path / "events.out.tfevents.0", "wb") as file:
        writer = RecordWriter(file)
        for step, time in enumerate((0, 10, 20, 30, 1_030, 1_040, 1_050)):  # stopped for 990 seconds after 30
            summary = Summary(value=[Summary.Value(tag="eval/episodic_return", simple_value=1.0)] if step % 2 else [])
            writer.write(Event(wall_time=5_000 + time, step=step, summary=summary).SerializeToString())
    assert collect.times_of(tmp_path, 60.0) == [["1", "10.0"], ["3", "30.0"], ["5", "50.0"]]
    assert collect.times_of(tmp_path, 1_050.0) == [["1", "10.0"], ["3", "30.0"], ["5", "1040.0"]]


class Slope(gym.Env):
    """The reward of the k-th step is k; it ends after 7."""

    observation_space, action_space = gym.spaces.Box(-100, 100, (1,)), gym.spaces.Box(-1, 1, (1,))

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(1, np.float32), {}

    def step(self, action: np.ndarray) -> tuple:
        self.steps += 1
        return np.full(1, self.steps, np.float32), float(self.steps), self.steps == 7, False, {}


gym.register("Slope-v0", entry_point=Slope, max_episode_steps=5)


def test_optimism_is_what_the_model_expects_too_much(tmp_path: Path, monkeypatch):
    env = gym.make("Slope-v0")
    env.reset(seed=0)
    env.step(np.zeros(1))
    # From the second step on; that the time is up after 5 does not count, that the episode ends after 7 does.
    assert model_error.returns_of(env, [np.zeros(1)] * 9, 0.5) == [2, 3.5, 4.5, 5.125, 5.5, 5.71875]
    args = cem_mpc.Args("Slope-v0", total_timesteps=20, learning_starts=20, population=4, num_best=2, horizon=10)
    args = dataclasses.replace(args, run_dir=str(tmp_path), iterations=1, max_updates=2, hidden=(8, 8))
    cem_mpc.train(dataclasses.replace(args, gamma=0.5, eval_episodes=1))
    (run_folder,) = tmp_path.iterdir()
    monkeypatch.setattr(cem_mpc, "imagine", lambda *args, **_: 100.0 * args[3].shape[1] * torch.ones(len(args[3])))
    found = model_error.optimism_by_steps(run_folder, 2, 4)  # at the first step, and at the fifth, where 7 is near
    real = {1: (1, 5), 2: (2, 8), 5: (3.5625, 9.75), 10: (1 + 2 / 2 + 3 / 4 + 4 / 8 + 5 / 16 + 6 / 32 + 7 / 64, 9.75)}
    assert found == [(steps, pytest.approx(100 * steps - np.mean(real[steps]))) for steps in real]


@pytest.mark.slow
def test_a_node_of_a_cluster_is_lost_and_the_results_are_the_same(folder, monkeypatch, capsys):
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    from benchmark import cluster

    monkeypatch.setattr(cluster, "ROOT", folder)
    for script in ROOT.glob("*.py"):  # what is sent to the nodes are files
        (folder / script.name).unlink()
        shutil.copy(script, folder)
    suite = dataclasses.replace(
        SMALL,
        entries=tuple(dataclasses.replace(entry, total_timesteps=60_000) for entry in SMALL.entries),
        arguments="--eval-every 20000 --checkpoint-every 500",
        xlim=(0, 60_000),
    )
    assert run.run_suite(suite, 2) == 0
    collect.collect_suite(suite)
    whole = (folder / "results" / "small.csv").read_bytes()
    (folder / "runs").rename(folder / "other")
    machines = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    second = machines.add_node(num_cpus=1)

    def lose_a_node() -> None:
        while len(list((folder / "runs").rglob("checkpoint*"))) < 2:
            time.sleep(0.1)
        machines.remove_node(second, allow_graceful=False)

    lost = threading.Thread(target=lose_a_node)
    lost.start()
    try:
        assert cluster.run_on_cluster(suite, machines.address, every=0.2) == 0
    finally:
        lost.join()
        machines.shutdown()
    collect.collect_suite(suite)
    assert (folder / "results" / "small.csv").read_bytes() == whole
    assert "goes on elsewhere" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_that_is_lost_again_and_again_is_given_up(folder, monkeypatch, capsys):
    pytest.importorskip("ray")
    from benchmark import cluster

    monkeypatch.setattr(cluster, "ROOT", folder)
    (folder / "dyna_q.py").unlink()
    (folder / "dyna_q.py").write_text("import os\nos.kill(os.getpid(), 9)\n")  # ends as if its node were lost
    (folder / "dyna_q_plus.py").unlink()
    (folder / "dyna_q_plus.py").write_text("raise SystemExit('no such maze')\n")
    entries = tuple(dataclasses.replace(entry, seeds=1) for entry in SMALL.entries)
    assert cluster.run_on_cluster(dataclasses.replace(SMALL, entries=entries), "local", every=0.05) == 2
    said = capsys.readouterr().err
    assert said.count("goes on elsewhere") == 9
    assert said.count("lost 10 times") == 1
    assert "failed (status 1: no such maze)" in said


def test_no_two_lines_of_a_figure_have_the_same_colour():
    labels = [f"line {number}" for number in range(len(plot.COLOURS) + 1)]
    entries = tuple(dataclasses.replace(SMALL.entries[1], label=label) for label in labels)
    curves = {label: [np.array([[0.0, 0.0], [6_000.0, 1.0]])] for label in labels}
    axes = Figure().subplots()
    plot.draw_panel(axes, dataclasses.replace(SMALL, entries=entries[:-1]), "DynaMaze-v0", curves)
    assert len({line.get_color() for line in axes.lines}) == len(plot.COLOURS)
    greys = [dataclasses.replace(entry, baseline=True) for entry in entries[: len(plot.BASELINES)]]
    axes = Figure().subplots()
    plot.draw_panel(axes, dataclasses.replace(SMALL, entries=(*greys, entries[3])), "DynaMaze-v0", curves)
    curve, sample = axes.lines[:4], axes.lines[4:]  # in the legend, too
    for lines in (curve, sample):
        assert len({line.get_color() for line in lines}) == 4
        assert len({line.get_linestyle() + str(line._dash_pattern) for line in lines}) == len(greys)
    with pytest.raises(ValueError, match="shorter"):
        plot.draw_panel(axes, dataclasses.replace(SMALL, entries=entries), "DynaMaze-v0", curves)


def test_a_ball_is_caught_by_who_follows_it():
    env = gym.make("benchmark.tasks:Catch-v0")
    for seed in range(20):
        obs, _ = env.reset(seed=seed)
        done, steps = False, 0
        while not done:
            places = np.argwhere(obs[::2, ::2, 0] > 0)
            ball, paddle = int(places[0][1]), int(places[-1][1])
            obs, reward, done, _, _ = env.step(1 + np.sign(ball - paddle) * (-1 if seed % 2 else 1))
            steps += 1
        assert steps == 7
        assert env.observation_space.contains(obs)
        far = ball != 4  # where the paddle begins
        assert reward == (-1 if seed % 2 and far else 1)


@pytest.mark.parametrize("delay", [0, 1, 10])
def test_a_sign_is_seen_once_and_asked_for_in_the_end(delay: int):
    env = gym.make("benchmark.tasks:Recall-v0", delay=delay)
    for seed, right in itertools.product(range(6), (True, False)):
        first, _ = env.reset(seed=seed)
        sign = int(first[:2].argmax())
        assert first.tolist() == [sign == 0, sign == 1, 0]
        seen, rewards, done = [], [], False
        while not done:
            obs, reward, done, _, _ = env.step(sign if right else 1 - sign)
            seen.append(obs.tolist())
            rewards.append(reward)
        assert seen == delay * [[0, 0, 0]] + [[0, 0, 1], [0, 0, 0]]
        assert rewards == (delay + 1) * [0] + [float(right)]


def test_repeated_actions_add_their_rewards_up_to_the_end_of_the_episode():
    env = tasks.Repeat(gym.make("CartPole-v1", max_episode_steps=5), 2)
    env.reset(seed=0)
    found = [env.step(step % 2)[1:4] for step in range(3)]
    assert found == [(2.0, False, False), (2.0, False, False), (1.0, False, True)]


class Parts(gym.Env):
    """Observations as those of dm_control: a Dict of vectors and scalars in double precision."""

    observation_space = gym.spaces.Dict(
        {"height": gym.spaces.Box(-9, 9, (), np.float64), "velocity": gym.spaces.Box(-9, 9, (2,), np.float64)}
    )
    action_space = gym.spaces.Box(-1, 1, (1,))

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        super().reset(seed=seed)
        return {"height": np.float64(1 / 3), "velocity": np.array([2.0, 3.0])}, {}

    def step(self, action: np.ndarray) -> tuple:
        return {"height": np.float64(4.0), "velocity": np.array([5.0, 6.0])}, 1.0, False, False, {}


gym.register("dm_control/parts-v0", entry_point=Parts)


def test_an_observation_of_parts_is_one_vector_where_that_is_wanted(monkeypatch):
    monkeypatch.setitem(sys.modules, "shimmy", tasks)  # which need not be installed
    env = gym.make("benchmark.tasks:DMControl-v0", task="parts", repeat=2, flat=True)
    space, (obs, _) = env.observation_space, env.reset(seed=0)
    assert (type(space), space.shape, space.dtype, obs.dtype) == (gym.spaces.Box, (3,), np.float32, np.float32)
    assert obs.tolist() == [np.float32(1 / 3), 2.0, 3.0]
    next_obs, reward, *_ = env.step(np.zeros(1, np.float32))
    assert (next_obs.tolist(), reward) == ([4.0, 5.0, 6.0], 2.0)
    assert isinstance(gym.make("benchmark.tasks:DMControl-v0", task="parts").observation_space, gym.spaces.Dict)


def test_a_run_counts_wherever_it_was_made(folder):
    """Device, threads and compilation change nothing but speed."""
    entry = suites.Entry("MBPO", "mbpo.py", "Pendulum-v1", 40, 1)
    suite = dataclasses.replace(SMALL, arguments="--eval-episodes 1 --learning-starts 50")
    words = [*run.arguments_of(suite, entry), "--device", "cpu", "--threads", "2", "--seed", "1"]
    subprocess.run([sys.executable, "mbpo.py", *words], cwd=folder, check=True, capture_output=True)
    assert list(run.find_runs(suite, entry)) == [1]


def test_every_means_all_suites():
    from benchmark import __main__ as command

    assert command.find_suites("every") == list(suites.DECLARED)
    assert command.find_suites("taxi") == [suites.SUITES["taxi"]]
    with pytest.raises(SystemExit):
        command.find_suites("tax")
