"""dyna_q_plus.py against the book's figures, brute force, and the traps."""

import json
import math

import gymnasium as gym
import numpy as np
import pytest
from conftest import only_run, scalars

import dyna_q
import dyna_q_plus
from dyna_q_plus import Agent, Args, Episode, make_env


def cumulative_reward(module: object, steps: int, seed: int, **fields: object) -> list[float]:
    """Reward so far after every 1000 steps."""
    args = module.Args(seed=seed, **fields)
    env = module.make_env(args)
    agent = module.Agent(env.observation_space, env.action_space, args)
    episode, total, curve = module.Episode(env, seed, 1), 0.0, []
    for step in range(1, steps + 1):
        obs = episode.obs
        action = agent.act(obs)
        next_obs, reward, terminated, truncated = episode.step(action)
        agent.observe(obs, action, reward, next_obs, terminated)
        agent.update()
        total += reward
        if terminated or truncated:
            episode.reset()
        if step % 1_000 == 0:
            curve.append(total)
    return curve


def mean_and_error(module: object, steps: int, seeds: int, **fields: object) -> tuple[np.ndarray, np.ndarray]:
    curves = np.array([cumulative_reward(module, steps, seed, **fields) for seed in range(seeds)])
    return curves.mean(0), curves.std(0) / math.sqrt(seeds)


FIGURE_8_4 = {"env_id": "BlockingMaze-v0", "alpha": 1.0, "n_planning": 10, "model": "last"}
FIGURE_8_5 = {"env_id": "ShortcutMaze-v0", "alpha": 1.0, "n_planning": 50, "model": "last"}


def test_figure_8_4_blocking_maze():
    mean, error = mean_and_error(dyna_q_plus, 3_000, 40, kappa=1e-4, **FIGURE_8_4)
    for value, sem, wanted in zip(mean, error, (60.9, 82.4, 134.9), strict=True):  # 1000 runs elsewhere
        assert abs(value - wanted) < 4 * sem + 0.5
    plain, error = mean_and_error(dyna_q, 3_000, 40, **FIGURE_8_4)
    for value, sem, wanted in zip(plain, error, (43.9, 54.6, 74.6), strict=True):
        assert abs(value - wanted) < 4 * sem + 1.0
    assert mean[2] - plain[2] > 30


@pytest.mark.slow
def test_figure_8_5_shortcut_maze():
    mean, error = mean_and_error(dyna_q_plus, 6_000, 30, kappa=1e-3, **FIGURE_8_5)
    for value, sem, wanted in zip(mean, error, (37.3, 86.0, 136.2, 203.5, 283.5, 364.3), strict=True):
        assert abs(value - wanted) < 4 * sem + 1.0
    plain, _ = mean_and_error(dyna_q, 6_000, 30, **FIGURE_8_5)
    print(f"slope 5000 to 6000: Dyna-Q+ {mean[5] - mean[4]:.1f}, Dyna-Q {plain[5] - plain[4]:.1f}")
    assert 76 < mean[5] - mean[4] < 86  # on the shortcut
    assert 52 < plain[5] - plain[4] < 60  # still on the long way, as for the whole of the last half
    action, _ = mean_and_error(dyna_q_plus, 6_000, 30, bonus_on="action", **FIGURE_8_5)
    assert 52 < action[5] - action[4] < 60  # Exercise 8.4: hardly ever plans the journey to the new opening


def test_one_default_setting_shows_both_effects():
    blocking, _ = mean_and_error(dyna_q_plus, 3_000, 5)
    shortcut, _ = mean_and_error(dyna_q_plus, 6_000, 5, env_id="ShortcutMaze-v0")
    assert blocking[2] > 135  # Dyna-Q: about 75
    assert shortcut[5] - shortcut[4] > 75  # Dyna-Q: 55


def test_without_the_footnote_the_bonus_is_of_no_use(monkeypatch):
    def only_tried(planner: dyna_q_plus.Planner, n: int) -> None:
        tried = [cell for cell, last in enumerate(planner.model.last_tried) if last]
        planner.draws = planner.rng.choice(tried, n).tolist()
        planner.drawn_from = len(planner.model.cells)
        plan(planner, n)

    plan = dyna_q_plus.Planner.plan
    with_footnote, _ = mean_and_error(dyna_q_plus, 3_000, 10, kappa=1e-4, **FIGURE_8_4)
    monkeypatch.setattr(dyna_q_plus.Planner, "plan", only_tried)
    without, _ = mean_and_error(dyna_q_plus, 3_000, 10, kappa=1e-4, **FIGURE_8_4)
    assert without[2] < 0.6 * with_footnote[2]


def small_agent(**fields: object) -> Agent:
    return Agent(gym.spaces.Discrete(4), gym.spaces.Discrete(3), Args(**fields))


def test_untried_actions_of_a_visited_state_lead_back_to_it_with_reward_zero():
    agent = small_agent(gamma=0.9)
    agent.observe(2, 1, 5.0, 3, False)
    row = agent.q[2]
    assert agent.model.cells == [
        (row, 0, 0.0, [(0.9, row)]),
        (row, 1, 5.0, [(0.9, agent.q[3])]),
        (row, 2, 0.0, [(0.9, row)]),
    ]
    assert 3 not in agent.model.first_cell  # observed as an outcome, but nothing was done in it


def test_planned_update_is_the_books_formula():
    alpha, gamma, kappa = 0.5, 0.9, 0.3
    agent = small_agent(alpha=alpha, gamma=gamma, kappa=kappa, n_planning=1)
    for transition in [(0, 0, 1.0, 1, False), (1, 2, 0.0, 0, False), (0, 1, 2.0, 3, True), (1, 2, 0.0, 0, False)]:
        agent.observe(*transition)
    tried = {(0, 0): (1, 1.0, 1), (1, 2): (4, 0.0, 0), (0, 1): (3, 2.0, None)}  # when last, reward, next state
    for _ in range(200):
        before = {state: list(row) for state, row in agent.q.items()}
        agent.update()
        changed = [(s, a) for s in (0, 1) for a in range(3) if agent.q[s][a] != before[s][a]]
        assert len(changed) <= 1
        for s, a in changed:
            last, reward, after = tried.get((s, a), (0, 0.0, s))
            best = 0.0 if after is None else max(before[after])
            target = reward + kappa * math.sqrt(4 - last) + gamma * best
            assert agent.q[s][a] == pytest.approx(before[s][a] + alpha * (target - before[s][a]))


def test_the_bonus_is_no_part_of_the_direct_update():
    agent = small_agent(alpha=1.0, kappa=10.0)
    for _ in range(5):
        agent.observe(0, 0, 1.0, 1, True)
        assert agent.q[0][0] == 1.0


def test_tau_runs_through_episodes_and_the_bonus_never_turns_nan():
    args = Args(env_id="BlockingMaze-v0", n_planning=5)
    env = make_env(args)
    agent, episode, last = Agent(env.observation_space, env.action_space, args), Episode(env, 1, 1), {}
    for step in range(1, 4_001):
        obs = episode.obs
        action = agent.act(obs)
        next_obs, reward, terminated, _ = episode.step(action)
        agent.observe(obs, action, reward, next_obs, terminated)
        agent.update()
        last[obs, action] = step
        if terminated:
            episode.reset()
    assert episode.index > 20
    for state in agent.model.first_cell:
        wanted = [0.5 * math.sqrt(4_000 - last.get((state, action), 0)) for action in range(4)]
        assert agent.model.bonus(state, 0.5) == pytest.approx(wanted)
    assert all(math.isfinite(value) for row in agent.q.values() for value in row)


def test_bonus_on_action_chooses_by_it_and_plans_without_it():
    agent = small_agent(bonus_on="action", kappa=1.0, epsilon=0.0)
    agent.observe(0, 0, 0.0, 1, False)
    agent.observe(0, 1, 0.0, 1, False)  # tau is now 1, 0 and 2
    assert agent.model.bonus(0, 1.0) == pytest.approx([1.0, 0.0, math.sqrt(2)])
    assert {agent.act(0) for _ in range(20)} == {2}
    agent.q[0] = [0.5, 0.0, 0.0]
    assert {agent.act(0) for _ in range(20)} == {0}
    agent.q.clear()
    agent = small_agent(bonus_on="action", kappa=1.0, n_planning=50)
    agent.observe(0, 0, 0.0, 1, False)
    agent.update()
    assert agent.q[0] == [0.0, 0.0, 0.0]


def test_evaluation_uses_values_without_the_bonus():
    agent = small_agent(gamma=0.5, kappa=100.0)
    for transition in [(0, 0, 1.0, 1, False), (1, 1, 3.0, 2, True), (0, 1, 2.0, 0, True)]:
        agent.observe(*transition)
        agent.update()
    assert max(agent.q[0]) > 50
    values = agent.values()
    np.testing.assert_allclose(values[0], [1 + 0.5 * 3, 2, -np.inf], atol=1e-5)
    np.testing.assert_allclose(values[1], [-np.inf, 3, -np.inf], atol=1e-5)
    assert agent.greedy_policy(0)(0) == 0


@pytest.mark.parametrize("env_id", ["BlockingMaze-v0", "ShortcutMaze-v0"])
def test_evaluation_takes_place_in_the_world_as_it_is_now(env_id, tmp_path, capsys):
    outcome = dyna_q_plus.train(Args(env_id=env_id, run_dir=str(tmp_path), eval_every=6_000))
    steps = {"BlockingMaze-v0": 16, "ShortcutMaze-v0": 10}[env_id]  # shortest paths after the change
    assert outcome["eval_return_mean"] == 1.0
    assert f"{steps}.0 steps long" in capsys.readouterr().out


def test_state_survives_a_checkpoint():
    agents = [small_agent(seed=3), small_agent(seed=3)]
    rng = np.random.default_rng(0)

    def live(agent: Agent, experience: np.ndarray) -> None:
        for s, a, r, s2 in experience:
            agent.observe(int(s), int(a), float(r), int(s2), bool(r == 2))
            agent.update()

    first, second = rng.integers(0, 3, (40, 4)), rng.integers(0, 3, (40, 4))
    live(agents[0], first)
    agents[1].load_state_dict(json.loads(json.dumps(agents[0].state_dict())))
    for agent in agents:
        live(agent, second)
    assert agents[0].state_dict() == agents[1].state_dict()


def test_an_untried_action_is_not_taken_for_the_best_where_rewards_are_negative():
    agent = small_agent(gamma=0.9)
    agent.observe(0, 1, -1.0, 1, False)
    agent.observe(1, 2, -1.0, 3, True)
    assert (agent.greedy_policy(0)(0), agent.greedy_policy(0)(1)) == (1, 2)
    assert agent.values()[0] == pytest.approx([-math.inf, -1.9, -math.inf])


@pytest.mark.parametrize("seed", [1, 6])  # 337 and 406 steps, when value iteration stopped at changes of 1e-6
def test_values_are_found_where_all_of_them_are_small(seed, tmp_path):
    dyna_q_plus.train(Args(gamma=0.3, seed=seed, eval_every=6_000, run_dir=str(tmp_path)))
    assert [value for tag, _, value in scalars(only_run(tmp_path)) if tag == "eval/episodic_length"] == [16.0]


def test_a_state_that_was_never_left_has_the_initial_value():
    agent = small_agent(gamma=0.5, initial_q=-50.0)
    agent.observe(0, 0, -3.0, 1, True)
    agent.observe(0, 1, -1.0, 2, False, True)
    assert agent.values()[0][:2] == [-3.0, -1.0 + 0.5 * -50.0]
