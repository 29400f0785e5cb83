"""dyna_q.py against oracles that do not use it: exact solutions, the book, brute force."""

import itertools
import json
import math

import gymnasium as gym
import numpy as np
import pytest
from conftest import only_run
from hypothesis import given, settings
from hypothesis import strategies as st

import dyna_q
from dyna_q import Agent, Args, Episode, Maze, Model, Planner, draw_grid, make_env, random_argmax, table_key


def maze_transitions(layout: str) -> tuple[dict, int, int]:
    """(row, column), action -> next cell, and start and goal; written from the book's text, not from `Maze`."""
    lines = layout.split()
    cells = {(r, c) for r, line in enumerate(lines) for c, mark in enumerate(line) if mark != "#"}
    moves = [(-1, 0), (0, 1), (1, 0), (0, -1)]  # up, right, down, left
    step = {(cell, a): (cell[0] + d[0], cell[1] + d[1]) for cell in cells for a, d in enumerate(moves)}
    step = {pair: after if after in cells else pair[0] for pair, after in step.items()}
    (start,) = (cell for cell in cells if lines[cell[0]][cell[1]] == "S")
    (goal,) = (cell for cell in cells if lines[cell[0]][cell[1]] == "G")
    return step, start, goal


def expected_steps(layout: str, epsilon: float) -> float:
    """Expected steps from S to G: of a uniform walk (epsilon 1), else of the best epsilon-greedy policy."""
    step, start, goal = maze_transitions(layout)
    steps = dict.fromkeys({cell for cell, _ in step}, 0.0)
    for _ in range(20_000):
        change = 0.0
        for cell in steps:
            if cell != goal:
                after = [steps[step[cell, a]] for a in range(4)]
                new = 1 + (1 - epsilon) * min(after) + epsilon * sum(after) / 4
                change, steps[cell] = max(change, abs(new - steps[cell])), new
        if change < 1e-10:
            return steps[start]
    raise AssertionError("did not converge")


def run_episodes(num_episodes: int, **fields: object) -> list[int]:
    """Lengths of the first episodes of an agent."""
    args = Args(**fields)
    env = make_env(args)
    agent, episode, lengths = Agent(env.observation_space, env.action_space, args), Episode(env, args.seed, 1), []
    while len(lengths) < num_episodes:
        obs = episode.obs
        action = agent.act(obs)
        next_obs, reward, terminated, truncated = episode.step(action)
        agent.observe(obs, action, reward, next_obs, terminated)
        agent.update()
        assert len(episode.actions) < 100_000, "walks in circles"
        if terminated or truncated:
            lengths.append(len(episode.actions))
            episode.reset()
    return lengths


def trained(**fields: object) -> Agent:
    """An agent after args.total_timesteps steps, without a run folder."""
    args = Args(**fields)
    env = make_env(args)
    agent, episode = Agent(env.observation_space, env.action_space, args), Episode(env, args.seed, 1)
    for _ in range(args.total_timesteps):
        obs = episode.obs
        action = agent.act(obs)
        next_obs, reward, terminated, truncated = episode.step(action)
        agent.observe(obs, action, reward, next_obs, terminated)
        agent.update()
        if terminated or truncated:
            episode.reset()
    return agent


# --- the mazes ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("layout", "random_walk", "epsilon_optimal", "shortest"),
    [
        (dyna_q.DYNA_MAZE, 868.73, 15.81, 14),
        (dyna_q.RIGHT_OPENING, 441.88, 11.07, 10),
        (dyna_q.LEFT_OPENING, 683.92, 17.54, 16),
        (dyna_q.BOTH_OPENINGS, 344.30, 11.07, 10),
    ],
)
def test_mazes_are_those_of_the_book(layout, random_walk, epsilon_optimal, shortest):
    assert expected_steps(layout, 1.0) == pytest.approx(random_walk, abs=0.005)
    assert expected_steps(layout, 0.1) == pytest.approx(epsilon_optimal, abs=0.005)
    assert expected_steps(layout, 0.0) == pytest.approx(shortest)
    step, start, goal = maze_transitions(layout)
    maze = Maze((layout,))
    for (cell, action), after in step.items():
        maze.reset(seed=0)
        assert (maze.row, maze.column) == start
        maze.row, maze.column = cell
        obs, reward, terminated, truncated, _ = maze.step(action)
        assert obs == after[0] * 9 + after[1]
        assert (reward, terminated, truncated) == (float(after == goal), after == goal, False)


@pytest.mark.parametrize(
    ("env_id", "change_at", "before", "after"),
    [
        ("BlockingMaze-v0", 1_000, "########.", ".########"),
        ("ShortcutMaze-v0", 3_000, ".########", ".#######."),
    ],
)
def test_walls_move_at_a_real_step_counted_over_episodes(env_id, change_at, before, after):
    env = gym.make(env_id, render_mode="ansi")
    for step in range(change_at + 3):
        if step % 100 == 0:
            env.reset(seed=step)
        env.unwrapped.row = 5
        assert env.render().split()[3] == (before if step < change_at else after), step
        env.step(3)


def test_maze_passes_the_checks_of_gymnasium_and_renders():
    from gymnasium.utils.env_checker import check_env

    env = gym.make("DynaMaze-v0", render_mode="rgb_array")
    check_env(env.unwrapped, skip_render_check=True)
    env.reset(seed=0)
    pixels = env.render()
    assert pixels.shape == (192, 288, 3)
    assert pixels.dtype == np.uint8
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) == 4  # floor, wall, goal, agent on the start


# --- the figures of the book ----------------------------------------------------------------------------------------
def test_first_episode_is_a_uniform_random_walk_and_the_same_for_every_n():
    lengths = np.array([run_episodes(1, n_planning=0, seed=seed)[0] for seed in range(300)])
    assert abs(lengths.mean() - 868.73) < 4 * lengths.std() / math.sqrt(len(lengths))
    for n in (5, 50):
        assert [run_episodes(1, n_planning=n, seed=seed)[0] for seed in range(3)] == list(lengths[:3])


@pytest.mark.parametrize(
    ("n", "figure"),
    [  # episode: mean steps and their standard error over 1000 runs of an independent implementation
        (5, {2: (151.7, 2.1), 3: (61.2, 1.0), 5: (22.6, 0.3), 10: (17.1, 0.1), 20: (16.8, 0.1)}),
        (50, {2: (39.3, 0.3), 3: (17.6, 0.1), 5: (17.1, 0.1), 10: (17.0, 0.1), 20: (17.1, 0.1)}),
    ],
)
@pytest.mark.parametrize("model", ["counts", "last"])
def test_figure_8_2(n, figure, model):
    runs = np.array([run_episodes(20, n_planning=n, seed=seed, model=model) for seed in range(60)])
    for episode, (mean, error) in figure.items():
        steps = runs[:, episode - 1]
        assert abs(steps.mean() - mean) < 4 * math.hypot(error, steps.std() / math.sqrt(len(steps))), episode


@pytest.mark.slow
def test_figure_8_2_without_planning():
    runs = np.array([run_episodes(30, n_planning=0, seed=seed) for seed in range(200)])
    for episode, (mean, error) in {10: (133.2, 3.5), 20: (49.1, 1.3), 30: (18.7, 0.3)}.items():
        steps = runs[:, episode - 1]
        assert abs(steps.mean() - mean) < 4 * math.hypot(error, steps.std() / math.sqrt(len(steps))), episode


def test_bare_command_finds_the_shortest_path():
    agent = trained()
    assert greedy_steps(agent, make_env(Args())) == 14


def greedy_steps(agent: Agent, env: gym.Env) -> int:
    episode, policy, terminated = Episode(env, 0, 2), agent.greedy_policy(0), False
    while not terminated and len(episode.actions) < 200:
        _, _, terminated, _ = episode.step(policy(episode.obs))
    return len(episode.actions)


# --- updates --------------------------------------------------------------------------------------------------------
transitions = st.lists(
    st.tuples(
        st.integers(0, 3), st.integers(0, 2), st.sampled_from([-1.0, 0.0, 0.5, 2.0]), st.integers(0, 3), st.booleans()
    ),
    min_size=1,
    max_size=30,
)


def small_agent(**fields: object) -> Agent:
    return Agent(gym.spaces.Discrete(4), gym.spaces.Discrete(3), Args(**fields))


@given(transitions, st.floats(0.01, 1.0), st.floats(0.0, 1.0), st.floats(-2, 2))
@settings(max_examples=50, deadline=None)
def test_without_planning_it_is_q_learning(experience, alpha, gamma, initial_q):
    agent = small_agent(alpha=alpha, gamma=gamma, initial_q=initial_q, n_planning=0)
    table = np.full((4, 3), initial_q)
    for s, a, r, s2, terminated in experience:
        agent.observe(s, a, r, s2, terminated)
        agent.update()
        best = 0.0 if terminated else table[s2].max()
        table[s, a] = (1 - alpha) * table[s, a] + alpha * (r + gamma * best)
    for state, row in agent.q.items():
        np.testing.assert_allclose(row, table[state], atol=1e-12)


@given(transitions, st.sampled_from(["counts", "last"]), st.floats(-2, 2))
@settings(max_examples=40, deadline=None)
def test_planning_converges_to_value_iteration_on_what_was_seen(experience, kind, initial_q):
    gamma, agent = 0.8, small_agent(gamma=0.8, alpha=0.5, model=kind, initial_q=initial_q, n_planning=4_000)
    for transition in experience:
        agent.observe(*transition)  # (s, a, r, s', terminated)
    direct = {state: list(row) for state, row in agent.q.items()}
    agent.update()
    # The oracle: every observed pair's transitions by hand, iterated to the fixed point; untried pairs stay.
    seen = {}
    for s, a, *outcome in experience:
        seen.setdefault((s, a), []).append(outcome)
    table = {state: list(row) for state, row in direct.items()}
    for _ in range(200):
        for (s, a), outcomes in seen.items():
            used = outcomes if kind == "counts" else outcomes[-1:]
            table[s][a] = np.mean([r + gamma * (0 if end else max(table.get(s2, [initial_q]))) for r, s2, end in used])
    for state in table:
        np.testing.assert_allclose(agent.q[state], table[state], atol=1e-6)


def test_terminal_states_are_worth_nothing_also_where_values_start_high():
    agent = small_agent(initial_q=10.0, alpha=1.0, n_planning=20)
    agent.observe(0, 1, 1.0, 3, True)
    assert agent.q[0][1] == 1.0
    agent.update()
    assert agent.q[0][1] == 1.0  # neither the real nor the planned update adds gamma * 10


def test_truncation_is_not_termination(tmp_path):
    args = Args(env_id="ShortCorridor-v0", total_timesteps=300, run_dir=str(tmp_path), initial_q=1.0, epsilon=1.0)
    dyna_q.train(args)  # 3 steps a time: state 4, the only terminal one, is out of reach
    agent = Agent(gym.spaces.Discrete(5), gym.spaces.Discrete(2), args)
    agent.load_state_dict(dyna_q.read_checkpoint(only_run(tmp_path) / dyna_q.CHECKPOINT)["agent"])
    ends = {terminated for outcomes in agent.model.outcomes.values() for _, terminated in outcomes}
    assert ends == {False}
    assert agent.q[2][1] > 0.6  # bootstraps on the state that it is cut off in, whose value starts at 1


def test_a_planning_step_draws_a_state_and_then_one_of_its_tried_actions():
    class Row(list):
        def __setitem__(self, action: int, value: float) -> None:
            counts[self.state, action] = counts.get((self.state, action), 0) + 1

    agent = small_agent()
    tried = {0: [0, 1, 2], 1: [1], 2: [0, 2]}
    for state in tried:
        agent.q[state] = Row([0.0] * 3)
        agent.q[state].state = state
    for state, actions in tried.items():
        for action in actions:
            agent.model.update(state, action, 0.0, state, False)
    counts, n = {}, 30_000
    agent.planner.plan(n)
    assert set(counts) == {(state, action) for state, actions in tried.items() for action in actions}
    for (state, _), count in counts.items():
        p = 1 / 3 / len(tried[state])
        assert abs(count - n * p) < 5 * math.sqrt(n * p * (1 - p))


def test_drawing_ahead_does_not_hide_new_states():
    model = Model(q := {state: [0.0] for state in range(3)}, 1, Args())
    planner = Planner(model, 1.0, np.random.default_rng(0))
    model.update(0, 0, 0.0, 0, True)
    planner.plan(10)
    model.update(1, 0, 1.0, 1, True)
    q[1][0] = 0.0
    planner.plan(60)
    assert q[1][0] == 1.0


def test_ties_are_broken_at_random_and_only_ties():
    rng = np.random.default_rng(0)
    draws = [random_argmax([0.0, 1.0, 1.0, -1.0, 1.0], rng) for _ in range(3_000)]
    for action in (1, 2, 4):
        assert abs(draws.count(action) - 1_000) < 5 * math.sqrt(3_000 * 2 / 9)
    assert set(draws) == {1, 2, 4}


def test_epsilon_greedy_explores_with_probability_epsilon():
    agent = Agent(gym.spaces.Discrete(2), gym.spaces.Discrete(3, start=5), Args(epsilon=0.3))
    agent.q[0] = [0.0, 1.0, 0.0]
    actions = [agent.act(0) for _ in range(10_000)]
    assert set(actions) == {5, 6, 7}
    assert abs(actions.count(6) / 10_000 - 0.8) < 0.02
    assert agent.greedy_policy(0)(0) == 6


# --- stochastic worlds ----------------------------------------------------------------------------------------------
def greedy_value(agent: Agent, env: gym.Env) -> float:
    """Exact expected return of the greedy policy inside the time limit, from the environment's own transition table."""
    policy, limit = agent.greedy_policy(0), env.spec.max_episode_steps
    actions = [policy(state) for state in range(env.observation_space.n)]
    value = np.zeros(env.observation_space.n)
    for _ in range(limit):
        value = np.array(
            [
                sum(p * (r + (0 if end else value[s2])) for p, s2, r, end in env.unwrapped.P[s][actions[s]])
                for s in range(len(value))
            ]
        )
    return value[0]


def frozen_lake(seeds: range, **fields: object) -> float:
    env = gym.make("FrozenLake-v1")
    common = {"env_id": "FrozenLake-v1", "gamma": 0.99, "total_timesteps": 20_000, "n_planning": 10}
    return float(np.mean([greedy_value(trained(seed=seed, **common | fields), env) for seed in seeds]))


def test_slippery_frozen_lake_with_counts():
    assert frozen_lake(range(4)) >= 0.70


@pytest.mark.slow
def test_slippery_frozen_lake_over_twenty_seeds():
    counts, q_learning, last = (
        frozen_lake(range(20), **fields) for fields in ({"n_planning": 50}, {"n_planning": 0}, {"model": "last"})
    )
    print(f"counts {counts:.3f}, Q-learning {q_learning:.3f}, last outcome {last:.3f}, optimum 0.740")
    assert counts >= 0.70
    assert last < q_learning < counts  # the last-outcome model is worse than none


def test_deterministic_frozen_lake_is_solved_from_zero_values():
    env = gym.make("FrozenLake-v1", is_slippery=False)
    for seed in range(5):  # np.argmax would walk left for ever
        agent = trained(env_id="FrozenLake-v1", env_kwargs=("is_slippery=False",), total_timesteps=3_000, seed=seed)
        assert greedy_value(agent, env) == 1.0


# --- observations ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "space",
    [
        gym.spaces.Discrete(5, start=-2),
        gym.spaces.MultiDiscrete([3, 4]),
        gym.spaces.MultiBinary(6),
        gym.spaces.Tuple(
            (gym.spaces.Discrete(3), gym.spaces.Tuple((gym.spaces.MultiBinary(2), gym.spaces.Discrete(2))))
        ),
        gym.spaces.Box(-1, 1, (2, 2), np.int8),
        gym.spaces.Box(0.0, 1.0, (3,), np.float32),
    ],
)
def test_keys_tell_observations_apart_and_survive_a_checkpoint(space):
    key = table_key(space)
    space.seed(0)
    samples = [space.sample() for _ in range(50)]
    for one, two in itertools.combinations(samples, 2):
        same = json.dumps(np.asarray(gym.spaces.flatten(space, one)).tolist())
        other = json.dumps(np.asarray(gym.spaces.flatten(space, two)).tolist())
        assert (key(one) == key(two)) == (same == other)
    import ast

    assert all(ast.literal_eval(repr(key(sample))) == key(sample) for sample in samples)


def test_keys_do_not_depend_on_dtype_or_sign_of_zero():
    key = table_key(gym.spaces.Box(-1.0, 1.0, (2,), np.float32))
    assert key(np.array([0.0, 0.5], np.float32)) == key(np.array([-0.0, 0.5], np.float64)) == key([0, 0.5])
    assert table_key(gym.spaces.Discrete(3))(np.int64(2)) == 2


@pytest.mark.parametrize(
    ("env_id", "kwargs"),
    [
        ("Taxi-v4", ()),
        ("Blackjack-v1", ()),
        ("CliffWalking-v1", ("is_slippery=True",)),
        ("FrozenLake-v1", ("map_name=8x8", "is_slippery=False")),
        ("FrozenLake8x8-v1", ()),
        ("BlockingMaze-v0", ("change_at=50",)),
    ],
)
def test_environments_run_through(env_id, kwargs, tmp_path):
    args = Args(env_id=env_id, env_kwargs=kwargs, total_timesteps=1_500, eval_every=700, run_dir=str(tmp_path))
    outcome = dyna_q.train(args)
    assert outcome["env_steps"] == 1_500
    assert math.isfinite(outcome["eval_return_mean"])


@pytest.mark.parametrize("env_id", ["DynaMaze-v0", "CliffWalking-v1", "FrozenLake-v1"])
def test_arrows_of_the_drawn_policy_are_greedy_and_point_where_they_lead(env_id):
    kwargs = ("is_slippery=False",) if env_id == "FrozenLake-v1" else ()
    agent = trained(env_id=env_id, env_kwargs=kwargs, total_timesteps=6_000)
    env = make_env(Args(env_id=env_id, env_kwargs=kwargs))
    text, image = draw_grid(env, agent)
    rows = [[line[i : i + 8] for i in range(0, len(line), 8)] for line in text.split("\n")]
    assert image.size == (72 * len(rows[0]), 72 * len(rows))
    obs, _ = env.reset(seed=0)
    terminated = False
    for _ in range(30):
        row, column = divmod(int(obs), len(rows[0]))
        arrow = rows[row][column][0]
        action = ("←↓→↑" if env_id == "FrozenLake-v1" else "↑→↓←").index(arrow)
        down, right = {"↑": (-1, 0), "→": (0, 1), "↓": (1, 0), "←": (0, -1)}[arrow]
        assert agent.q[int(obs)][action] == max(agent.q[int(obs)])
        assert float(rows[row][column][1:]) == pytest.approx(max(agent.q[int(obs)]), abs=0.005)
        obs, _, terminated, _, _ = env.step(action)
        assert divmod(int(obs), len(rows[0])) == (row + down, column + right)
        if terminated:
            break
    assert terminated
    assert draw_grid(gym.make("Taxi-v4"), agent) is None


def test_a_policy_learns_no_more():
    agent = small_agent(alpha=1.0)
    agent.observe(0, 1, 1.0, 3, True)
    policy = agent.greedy_policy(0)
    agent.observe(0, 2, 5.0, 3, True)
    assert policy(0) == 1
    assert agent.greedy_policy(0)(0) == 2


def test_update_before_anything_was_observed_does_nothing():
    agent = small_agent()
    agent.update()
    assert dict(agent.q) == {}


def test_a_maze_of_one_layout_may_be_told_to_change():
    env = gym.make("DynaMaze-v0", change_at=3)
    env.reset(seed=0)
    for _ in range(6):
        env.step(1)


def test_counts_and_the_last_outcome_are_one_model_where_all_is_deterministic():
    settings = {"n_planning": 50, "total_timesteps": 3_000}
    for seed in (1, 14):  # with 14 gamma * count / count, which is not always gamma, told them apart in episode 3
        counts, last = (trained(seed=seed, model=model, **settings) for model in ("counts", "last"))
        assert counts.q == last.q


def test_numbers_of_numpy_do_not_get_into_the_tables():
    agent = Agent(gym.spaces.Discrete(3), gym.spaces.Discrete(2, start=1), Args())
    agent.observe(np.int64(0), np.int64(1), np.float32(1.0), np.int64(2), np.bool_(False))
    agent.update()
    assert {type(value) for row in agent.q.values() for value in row} == {float}
    assert json.loads(json.dumps(agent.state_dict())) == json.loads(json.dumps(agent.state_dict()))


def test_a_state_can_be_loaded_into_an_agent_that_has_learned():
    one, other = trained(seed=1, total_timesteps=300), trained(seed=2, total_timesteps=900)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert (other.q, other.model.outcomes, other.model.first_cell) == (one.q, one.model.outcomes, one.model.first_cell)
    assert (other.model.cells, other.model.tried) == (one.model.cells, one.model.tried)


def test_many_planning_updates_are_drawn_for_a_step_at_a_time():
    agent = trained(n_planning=5_000, total_timesteps=30)
    assert len(agent.planner.draws) <= 100_000
    assert len(trained(n_planning=200_000, total_timesteps=2).planner.draws) == 0


@pytest.mark.parametrize(("env_id", "told"), [("MountainCar-v0", True), ("Taxi-v4", False)])
def test_it_tells_where_observations_do_not_come_back(env_id, told, tmp_path, capsys):
    dyna_q.train(Args(env_id, total_timesteps=1_001, eval_episodes=1, run_dir=str(tmp_path)))
    assert ("a table learns from what comes back only" in capsys.readouterr().out) == told
