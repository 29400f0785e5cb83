"""dyna_q_plus.py against the book's figures, brute force and sums made by hand; test_dyna_q.py has what both share."""

import copy
import math
from collections import Counter
from types import ModuleType
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from conftest import only_run, run_script, scalars
from gymnasium.spaces import Discrete
from hypothesis import given, settings
from test_dyna_q import TRANSITIONS, Draws, Row, agent_of, followed, live, plausible, see

import dyna_q
import dyna_q_plus
from dyna_q_plus import Agent, Args, Maze

BLOCKING = {"layouts": (dyna_q.RIGHT, dyna_q.LEFT), "change_at": 1_000}
SHORTCUT = {"layouts": (dyna_q.LEFT, dyna_q.BOTH), "change_at": 3_000}


def agent_plus(**fields: Any) -> Agent:
    """An agent of four states and three actions."""
    return agent_of(dyna_q_plus, **fields)


# --- arguments --------------------------------------------------------------------------------------------------------
def test_defaults():
    args = Args()
    assert (args.alpha, args.gamma, args.epsilon, args.n_planning, args.kappa) == (0.5, 0.95, 0.1, 50, 1e-3)
    assert (args.model, args.env_id, args.total_timesteps) == ("last", "BlockingMaze-v0", 6_000)
    assert (args.seed, args.eval_every, args.eval_episodes, args.checkpoint_every) == (1, 1_000, 5, 10_000)


@pytest.mark.parametrize("kappa", [-1e-9, math.nan])
def test_a_bonus_that_is_negative_or_no_number_is_refused(kappa):
    with pytest.raises(dyna_q_plus.Failure, match="--kappa"):
        Args(kappa=kappa)
    Args(kappa=0.0)


def test_frozen_lake_has_settings_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(dyna_q_plus, "train", lambda args: seen.append(args))
    seen = []
    run_script(dyna_q_plus, monkeypatch, "--env-id", "FrozenLake-v1", "--run-dir", tmp_path)
    run_script(dyna_q_plus, monkeypatch, "--env-id", "ShortcutMaze-v0", "--run-dir", tmp_path)
    names = ("total_timesteps", "eval_episodes", "gamma", "model")
    assert [getattr(seen[0], name) for name in names] == [20_000, 100, 0.99, "counts"]
    assert [getattr(seen[1], name) for name in names] == [6_000, 5, 0.95, "last"]


# --- the bonus --------------------------------------------------------------------------------------------------------
def test_a_whole_step_by_hand():
    """alpha = gamma = 1/2 and squares as times, so that all numbers are exact."""
    args = Args(alpha=0.5, gamma=0.5, kappa=2.0, epsilon=0.25, n_planning=4)
    agent = Agent(Discrete(3), Discrete(2, start=5), args)
    agent.q[0,], agent.q[1,] = [0.0, 4.0], [2.0, 6.0]
    agent.rng = Draws(random=(0.25, 0.24), randrange=(0,), pairs=(0, 1, 2, 3))
    agent.model.clock = 4
    assert agent.act(0) == 6  # 0.25 is not below epsilon: the best one
    agent.observe(0, 6, 3.0, 1, False, True)  # at time 5
    assert agent.q == {(0,): [0.0, 5.0], (1,): [2.0, 6.0]}  # 4 + 1/2 (3 + 1/2 6 - 4): no bonus
    agent.model.clock = 8
    assert agent.act(1) == 5  # a random one
    agent.observe(1, 5, 1.0, 2, True, False)  # at time 9
    assert agent.q == {(0,): [0.0, 5.0], (1,): [1.5, 6.0]}
    agent.update()
    assert agent.q[0,][0] == 0.5 * (2 * 3 + 0.5 * 5)  # untried since 0: back to state 0 with reward 0
    assert agent.q[0,][1] == 5.0 + 0.5 * (3 + 2 * 2 + 0.5 * 6 - 5.0)  # untried for 4
    assert agent.q[1,][0] == 1.5 + 0.5 * (1 + 0 - 1.5)  # just tried, and the end
    assert agent.q[1,][1] == 6.0 + 0.5 * (2 * 3 + 0.5 * 6 - 6.0)  # untried: back to state 1
    assert list(agent.q) == [(0,), (1,)]


def test_untried_actions_of_a_state_that_was_left_lead_back_to_it_with_reward_0():
    agent = agent_plus(gamma=0.9)
    see(agent, (2, 1, 5.0, 3))
    row, after = agent.q[2,], agent.q[3,]
    assert agent.model.pairs == [
        [row, 0, 0.0, [(0.9, row)], 0],
        [row, 1, 5.0, [(0.9, after)], 1],
        [row, 2, 0.0, [(0.9, row)], 0],
    ]
    assert agent.model.pairs[0][3][0][1] is agent.model.pairs[2][0] is row  # rows of Q, no copies
    see(agent, (2, 0, 1.0, 2, True), (3, 2, 0.0, 3))
    assert agent.model.pairs[0] == [row, 0, 1.0, [], 2]
    assert agent.model.pairs[3:] == [
        [after, 0, 0.0, [(0.9, after)], 0],
        [after, 1, 0.0, [(0.9, after)], 0],
        [after, 2, 0.0, [(0.9, after)], 3],
    ]


def test_tau_counts_real_steps_since_the_pair_was_tried_through_episodes():
    agent, last = agent_plus(n_planning=1), {}
    rng = np.random.default_rng(0)
    for step in range(1, 101):
        state, action = (int(number) for number in rng.integers(0, 3, 2))
        see(agent, (state, action, 0.0, 3, step % 7 == 0))
        agent.update()  # planning is no step
        last[state, action] = step
    assert agent.model.clock == 100
    for state in range(3):
        times = [pair[4] for pair in agent.model.pairs if pair[0] is agent.q[state,]]
        assert times == [last.get((state, action), 0) for action in range(3)]


def test_drawn_pairs_are_uniform_over_all_actions_of_states_that_were_left():
    agent, written = agent_plus(n_planning=18_000), Counter()
    for state in (0, 2):
        agent.q[state,] = Row([0.0] * 3, state, written)
    see(agent, (0, 0, 0.0, 2), (2, 1, 0.0, 3), (0, 1, 0.0, 2))  # 3 was never left
    written.clear()
    agent.update()
    assert set(written) == {(state, action) for state in (0, 2) for action in range(3)}
    assert sum(written.values()) == 18_000
    assert all(plausible(count, 18_000, 1 / 6) for count in written.values())


def test_counts_plan_with_the_expectation():
    agent = agent_plus(model="counts", alpha=0.5, gamma=0.9, kappa=0.1, n_planning=1)
    agent.q[1,], agent.q[2,] = [1.0, 7.0, 2.0], [-3.0, -1.0, -2.0]
    see(agent, *[(0, 2, 1.0, 1)] * 3, *[(0, 2, 4.0, 2)] * 2, *[(0, 2, -2.0, 3, True)] * 5, (1, 0, 0.0, 3, True))
    agent.q[0,][2] = 10.0
    agent.rng = Draws(pairs=(2,))
    agent.update()
    expected = 0.3 * (1 + 0.9 * 7) + 0.2 * (4 + 0.9 * -1) + 0.5 * (-2 + 0) + 0.1 * math.sqrt(1)
    assert agent.q[0,] == pytest.approx([0.0, 0.0, 10 + 0.5 * (expected - 10)])


def test_without_bonus_planning_converges_to_the_values_of_the_model_with_its_untried_actions():
    agent = agent_plus(kappa=0.0, gamma=0.5, n_planning=2_000)
    see(agent, (0, 0, 2.0, 1), (1, 1, 4.0, 3, True), (2, 0, -1.0, 3, True))
    agent.update()
    assert agent.q[0,] == pytest.approx([2 + 0.5 * 4, 0.5 * 4, 0.5 * 4])  # an untried action costs a step
    assert agent.q[1,] == pytest.approx([0.5 * 4, 4, 0.5 * 4])
    assert agent.q[2,] == pytest.approx([-1, 0, 0], abs=1e-6)


# --- evaluation -------------------------------------------------------------------------------------------------------
@given(TRANSITIONS)
@settings(max_examples=25, deadline=None)
def test_values_solve_the_learned_model_without_the_bonus(experience):
    for kind in ("counts", "last"):
        agent = agent_plus(gamma=0.8, model=kind, kappa=50.0)
        see(agent, *experience)
        agent.update()
        seen, table = {}, {state: [-math.inf] * 3 for (state,) in agent.q}
        for s, a, *outcome in experience:
            seen.setdefault((s, a), []).append(outcome)
            table[s][a] = 0.0
        for _ in range(120):
            best = {state: max(row) if max(row) > -math.inf else 0.0 for state, row in table.items()}  # 0: never left
            for (s, a), outcomes in seen.items():
                used = outcomes if kind == "counts" else outcomes[-1:]
                table[s][a] = np.mean([r + 0.8 * (0 if end else best[s2]) for r, s2, end in used])
        values = agent.values()
        assert set(values) == {(state,) for state in table}
        for state, row in table.items():
            np.testing.assert_allclose(values[state,], row, rtol=1e-4, atol=1e-8)


def test_evaluation_does_not_follow_the_bonus_and_learning_does():
    agent = agent_plus(gamma=0.5, kappa=100.0, epsilon=0.0)
    see(agent, (0, 0, 1.0, 1), (1, 1, 3.0, 2, True), (0, 1, 2.0, 0, True))
    for _ in range(5):
        agent.update()
    assert max(agent.q[0,]) > 50
    values = agent.values()
    assert values[0,] == pytest.approx([1 + 0.5 * 3, 2, -math.inf])
    assert values[1,] == pytest.approx([-math.inf, 3, -math.inf])
    assert {int(agent.greedy_policy(seed)(0)) for seed in range(20)} == {0}
    assert agent.act(0) == 2


def test_an_untried_action_is_not_taken_for_the_best_where_rewards_are_negative():
    agent = agent_plus(gamma=0.9)
    see(agent, (0, 1, -1.0, 1), (1, 2, -1.0, 3, True))
    assert {(int(policy(0)), int(policy(1))) for policy in map(agent.greedy_policy, range(20))} == {(1, 2)}
    assert agent.values()[0,] == pytest.approx([-math.inf, -1.9, -math.inf])


def test_values_are_found_along_a_long_way_on_which_they_are_tiny():
    agent = Agent(Discrete(60), Discrete(2), Args(gamma=0.3))
    see(agent, *[(state, 1, float(state == 58), state + 1, state == 58) for state in range(59)])
    values = agent.values()
    assert [values[state,][1] for state in range(59)] == pytest.approx([0.3 ** (58 - s) for s in range(59)], rel=1e-6)


def test_values_of_a_cycle_with_gamma_near_1_are_found():
    agent = Agent(Discrete(2), Discrete(2), Args(gamma=0.98))
    see(agent, (0, 0, 1.0, 1), (1, 1, 0.0, 0))
    assert agent.values()[0,][0] == pytest.approx(1 / (1 - 0.98**2), rel=1e-4)


def test_values_of_a_world_that_never_ends_are_given_with_gamma_1():
    agent = Agent(Discrete(2), Discrete(2), Args(gamma=1.0))
    see(agent, (0, 0, 1.0, 0))
    assert 900 < agent.values()[0,][0] < 1_100  # infinite in truth: the search for it ends


# --- the agent's state ------------------------------------------------------------------------------------------------
def test_the_state_holds_when_each_pair_was_tried_and_the_clock():
    agent, other = agent_plus(), agent_plus()
    see(agent, (2, 1, 1.0, 0), (0, 2, 1.0, 2), (2, 1, 1.0, 0), (2, 0, 0.0, 3, True))
    other.load_state_dict(copy.deepcopy(agent.state_dict()))
    assert [pair[4] for pair in other.model.pairs] == [4, 3, 0, 0, 0, 2]
    assert other.model.pairs == agent.model.pairs
    assert other.values() == agent.values()
    see(other, (3, 0, 0.0, 3))
    assert other.model.clock == 5


# --- runs -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", [1, 2])
def test_a_run_prints_the_way_of_the_learned_model(seed, tmp_path, capsys):
    args = Args(seed=seed, total_timesteps=3_000, eval_every=3_000, run_dir=str(tmp_path))
    result = dyna_q_plus.train(args, lambda **drawing: Maze(**BLOCKING, **drawing))
    printed = "".join(capsys.readouterr().out.splitlines()[-7:-1]).replace(" ", "")
    assert followed(printed, dyna_q.LEFT) == 16
    assert result["eval_return_mean"] == 1.0
    (run,) = tmp_path.iterdir()
    assert [x for tag, _, x in scalars(run) if tag == "eval/episodic_length"] == [16.0]
    assert (run / "policy.png").exists()


def test_a_run_draws_the_values_of_the_model_and_not_those_with_the_bonus(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(dyna_q_plus, "draw_policy", lambda maze, q, path: drawn.append((q, path.name)))
    args = Args(total_timesteps=300, eval_every=300, eval_episodes=1, kappa=1.0, run_dir=str(tmp_path))
    dyna_q_plus.train(args, lambda **drawing: Maze(**BLOCKING, **drawing))
    (run,) = tmp_path.iterdir()
    agent = dyna_q_plus.load(run, Maze.observation_space, Maze.action_space)
    assert drawn == [(agent.values(), "policy.png")]
    assert agent.values() != agent.q


def cumulative_reward(module: ModuleType, maze: dict, steps: int, seed: int, **fields: Any) -> list[float]:
    """Reward so far after every 1000 steps."""
    agent = module.Agent(Maze.observation_space, Maze.action_space, module.Args(seed=seed, **fields))
    _, rewards = live(agent, Maze(**maze), lambda _, rewards: len(rewards) == steps)
    return np.cumsum(rewards)[999::1_000].tolist()


def mean_and_error(module: ModuleType, maze: dict, steps: int, seeds: int, **fields: Any) -> tuple:
    curves = np.array([cumulative_reward(module, maze, steps, seed, **fields) for seed in range(seeds)])
    return curves.mean(0), curves.std(0) / math.sqrt(seeds)


FIGURE_8_4 = {"maze": BLOCKING, "steps": 3_000, "alpha": 1.0, "n_planning": 10, "model": "last"}
FIGURE_8_5 = {"maze": SHORTCUT, "steps": 6_000, "alpha": 1.0, "n_planning": 50, "model": "last"}


def test_figure_8_4_blocking_maze():
    mean, error = mean_and_error(dyna_q_plus, seeds=20, kappa=1e-4, **FIGURE_8_4)
    for value, sem, wanted in zip(mean, error, (60.9, 82.4, 134.9), strict=True):  # 1000 runs elsewhere
        assert abs(value - wanted) < 4 * sem + 0.5


@pytest.mark.slow
def test_figure_8_4_without_bonus():
    plain, error = mean_and_error(dyna_q, seeds=40, **FIGURE_8_4)
    for value, sem, wanted in zip(plain, error, (43.9, 54.6, 74.6), strict=True):
        assert abs(value - wanted) < 4 * sem + 1.0


@pytest.mark.slow
def test_figure_8_5_shortcut_maze():
    mean, error = mean_and_error(dyna_q_plus, seeds=30, kappa=1e-3, **FIGURE_8_5)
    for value, sem, wanted in zip(mean, error, (37.3, 86.0, 136.2, 203.5, 283.5, 364.3), strict=True):
        assert abs(value - wanted) < 4 * sem + 1.0
    plain, _ = mean_and_error(dyna_q, seeds=30, **FIGURE_8_5)
    print(f"slope 5000 to 6000: Dyna-Q+ {mean[5] - mean[4]:.1f}, Dyna-Q {plain[5] - plain[4]:.1f}")
    assert 76 < mean[5] - mean[4] < 86  # on the shortcut
    assert 52 < plain[5] - plain[4] < 60  # still on the long way


@pytest.mark.slow
def test_without_the_footnote_the_bonus_is_of_no_use(monkeypatch):
    with_footnote, _ = mean_and_error(dyna_q_plus, seeds=10, kappa=1e-4, **FIGURE_8_4)
    update = Agent.update

    def only_tried(agent: Agent) -> None:
        pairs = agent.model.pairs
        agent.model.pairs = [pair for pair in pairs if pair[4] > 0]
        update(agent)
        agent.model.pairs = pairs

    monkeypatch.setattr(Agent, "update", only_tried)
    without, _ = mean_and_error(dyna_q_plus, seeds=10, kappa=1e-4, **FIGURE_8_4)
    assert without[2] < 0.6 * with_footnote[2]


# --- what the docstring says ------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize(("env_id", "steps"), [("BlockingMaze-v0", 16), ("ShortcutMaze-v0", 10)])
def test_the_command_finds_the_shortest_path_after_the_change(env_id, steps, tmp_path):
    assert gym.make(env_id).unwrapped.change_at == {16: 1_000, 10: 3_000}[steps]
    for seed in range(1, 11):
        dyna_q_plus.train(Args(env_id, seed=seed, run_dir=str(tmp_path / str(seed))))
        lengths = [x for tag, _, x in scalars(only_run(tmp_path / str(seed))) if tag == "eval/episodic_length"]
        assert lengths[-1] == steps, seed
