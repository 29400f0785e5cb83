"""dyna_q.py, and what dyna_q_plus.py shares with it, against the book, brute force and sums made by hand."""

import ast
import copy
import dataclasses
import inspect
import io
import json
import math
import pickle
import random
import sys
from collections import Counter
from collections.abc import Callable
from types import ModuleType
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from conftest import Corridor, corridor, only_run, run_script, scalars
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import dyna_q
import dyna_q_plus
from dyna_q import Agent, Args, Maze, Model, random_argmax


@pytest.fixture(params=[dyna_q, dyna_q_plus], ids=lambda module: module.__name__)
def module(request: pytest.FixtureRequest) -> ModuleType:
    """Both tabular scripts in turn."""
    return request.param


def agent_of(module: ModuleType, **fields: Any) -> Any:
    """An agent of four states and three actions."""
    return module.Agent(Discrete(4), Discrete(3), module.Args(**fields))


def see(agent: Any, *transitions: tuple) -> None:
    """The agent observes each (s, a, r, s') or (s, a, r, s', terminated)."""
    for s, a, r, s2, *terminated in transitions:
        agent.observe(s, a, r, s2, any(terminated), False)


def live(agent: Any, env: gym.Env, done: Callable[[list, list], bool], seed: int = 0) -> tuple[list, list]:
    """Lengths of the episodes that ended, and all rewards, of an agent that learns until done(lengths, rewards)."""
    lengths, rewards, begun = [], [], 0
    obs, _ = env.reset(seed=seed)
    while not done(lengths, rewards):
        action = agent.act(obs)
        next_obs, reward, terminated, truncated, _ = env.step(action)
        agent.observe(obs, action, reward, next_obs, terminated, truncated)
        agent.update()
        obs = next_obs
        rewards.append(reward)
        if terminated or truncated:
            lengths.append(len(rewards) - begun)
            begun = len(rewards)
            obs, _ = env.reset()
    return lengths, rewards


def walk(policy: Callable, env: gym.Env, limit: int = 200) -> tuple[int, float]:
    """Steps and return of an episode."""
    obs, _ = env.reset(seed=0)
    for step in range(1, limit + 1):
        obs, reward, terminated, truncated, _ = env.step(policy(obs))
        if terminated or truncated:
            return step, reward
    return limit, 0.0


class Draws:
    """Gives random numbers that are known beforehand, in place of the agent's generator."""

    def __init__(self, random: tuple = (), randrange: tuple = (), pairs: tuple = ()):
        self.numbers, self.integers, self.pairs = iter(random), iter(randrange), pairs

    def random(self) -> float:
        return next(self.numbers)

    def randrange(self, stop: int) -> int:
        return next(self.integers)

    def choice(self, options: list) -> Any:
        return options[0]

    def choices(self, population: list, k: int) -> list:
        assert k == len(self.pairs)
        return [population[pair] for pair in self.pairs]


class Row(list):
    """A row of Q that counts how often each value is written."""

    def __init__(self, values: list, name: Any, written: Counter):
        super().__init__(values)
        self.name, self.written = name, written

    def __setitem__(self, action: int, value: float) -> None:
        self.written[self.name, action] += 1


def plausible(count: int, n: int, p: float) -> bool:
    """Whether `count` of n draws with probability p is within five standard deviations."""
    return abs(count - n * p) < 5 * math.sqrt(n * p * (1 - p))


# --- arguments --------------------------------------------------------------------------------------------------------
def test_defaults_are_those_of_the_book():
    args = Args()
    assert (args.alpha, args.gamma, args.epsilon, args.n_planning) == (0.1, 0.95, 0.1, 50)
    assert (args.initial_q, args.model, args.env_id, args.total_timesteps) == (0.0, "counts", "DynaMaze-v0", 10_000)
    assert (args.seed, args.eval_every, args.eval_episodes, args.checkpoint_every) == (1, 1_000, 5, 10_000)


BAD = [(name, value) for name in ("alpha", "gamma", "epsilon") for value in (-0.01, 1.01, math.nan)]
BAD += [(name, 0) for name in ("total_timesteps", "eval_every", "eval_episodes", "checkpoint_every")]
BAD += [("seed", -1), ("n_planning", -1)]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_numbers_out_of_range_are_refused(module, name, value):
    with pytest.raises(module.Failure, match=name.replace("_", "-")):
        module.Args(**{name: value})


def test_values_start_with_a_number():
    with pytest.raises(dyna_q.Failure, match="initial-q"):
        Args(initial_q=math.nan)


def test_numbers_at_the_ends_of_their_range_are_taken(module):
    for share in (0, 1):
        module.Args(alpha=share, gamma=share, epsilon=share, n_planning=0, seed=0)
    module.Args(total_timesteps=1, eval_every=1, eval_episodes=1, checkpoint_every=1)


@pytest.mark.parametrize(
    ("env_id", "wanted"),
    [
        ("DynaMaze-v0", {"model": "counts", "gamma": 0.95, "eval_episodes": 5}),
        ("BlockingMaze-v0", {"model": "last", "gamma": 0.95, "eval_episodes": 5}),
        ("ShortcutMaze-v0", {"model": "last", "gamma": 0.95, "eval_episodes": 5}),
        ("FrozenLake-v1", {"model": "counts", "gamma": 0.99, "eval_episodes": 100}),
    ],
)
def test_settings_by_environment_reach_the_run(env_id, wanted, tmp_path, monkeypatch):
    words = ["--total-timesteps", 5, "--n-planning", 0, "--epsilon", 1, "--run-dir", tmp_path]
    monkeypatch.setattr(dyna_q.Run, "evaluate", lambda run: None)
    run_script(dyna_q, monkeypatch, "--env-id", env_id, *words)
    args = json.loads((only_run(tmp_path) / "args.json").read_text())["args"]
    assert {name: args[name] for name in wanted} == wanted
    assert dyna_q.PRESETS["FrozenLake-v1"]["total_timesteps"] == 20_000


# --- acting -----------------------------------------------------------------------------------------------------------
def test_ties_are_broken_at_random_and_only_ties(module):
    rng = module.random.Random(0)
    draws = Counter(module.random_argmax([0.0, 1.0, 1.0, -1.0, 1.0], rng) for _ in range(3_000))
    assert set(draws) == {1, 2, 4}
    assert all(plausible(count, 3_000, 1 / 3) for count in draws.values())
    assert {random_argmax([-math.inf] * 2, rng) for _ in range(30)} == {0, 1}


def test_epsilon_greedy_explores_with_probability_epsilon(module):
    agent = module.Agent(Discrete(2), Discrete(3, start=5), module.Args(epsilon=0.3))
    agent.q[0,] = [0.0, 1.0, 0.0]
    actions = Counter(agent.act(0) for _ in range(6_000))
    assert set(actions) == {5, 6, 7}
    for action, probability in {5: 0.1, 6: 0.8, 7: 0.1}.items():
        assert plausible(actions[action], 6_000, probability), action


@pytest.mark.parametrize(("epsilon", "wanted"), [(0.0, {1}), (1.0, {0, 1, 2})])
def test_epsilon_0_never_explores_and_1_always(module, epsilon, wanted):
    agent = agent_of(module, epsilon=epsilon)
    agent.q[0,] = [0.0, 1.0, 0.0]
    assert {int(agent.act(0)) for _ in range(100)} == wanted


@pytest.mark.parametrize("start", [0, 5, -2])
def test_actions_are_numpy_integers_of_the_space(module, start):
    space = Discrete(3, start=start)
    agent = module.Agent(Discrete(2), space, module.Args(epsilon=0.5))
    actions = [agent.act(0) for _ in range(50)] + [agent.greedy_policy(seed)(0) for seed in range(30)]
    assert {int(action) for action in actions} == {start, start + 1, start + 2}
    assert all(isinstance(action, np.integer) and space.contains(action) for action in actions)


def test_an_action_is_learned_as_itself_where_actions_do_not_start_at_0(module):
    agent = module.Agent(Discrete(2), Discrete(3, start=5), module.Args(alpha=0.5))
    agent.observe(0, np.int64(6), 2.0, 1, True, False)
    assert agent.q[0,] == [0.0, 1.0, 0.0]
    assert agent.greedy_policy(0)(0) == 6


def test_a_policy_leaves_the_agent_as_it_is_and_breaks_ties_by_its_seed(module):
    agent = agent_of(module, epsilon=0.0)
    see(agent, (0, 1, 1.0, 3, True))
    before = copy.deepcopy(agent.state_dict())
    first, again, other = agent.greedy_policy(1), agent.greedy_policy(1), agent.greedy_policy(2)
    actions = [[int(policy(2)) for _ in range(40)] for policy in (first, again, other)]  # 2 was never seen
    assert actions[0] == actions[1] != actions[2]
    assert set(actions[0]) == {0, 1, 2}
    assert {int(first(0, {"some": "information"})) for _ in range(20)} == {1}
    assert agent.state_dict() == before


def test_agents_of_one_seed_act_alike_and_of_two_differently(module):
    one, same, other = (agent_of(module, seed=seed) for seed in (1, 1, 2))
    actions = [[int(agent.act(0)) for _ in range(40)] for agent in (one, same, other)]
    assert actions[0] == actions[1] != actions[2]


# --- updates ----------------------------------------------------------------------------------------------------------
def test_a_whole_step_by_hand():
    """alpha = gamma = 1/2, so that all numbers are exact."""
    args = Args(alpha=0.5, gamma=0.5, epsilon=0.25, n_planning=3)
    agent = Agent(Discrete(3), Discrete(2, start=5), args)
    agent.q[0,], agent.q[1,] = [0.0, 4.0], [2.0, 6.0]
    agent.rng = Draws(random=(0.25, 0.24), randrange=(0,), pairs=(0, 1, 0))
    assert agent.act(0) == 6  # 0.25 is not below epsilon: the best one
    agent.observe(0, 6, 3.0, 1, False, False)
    assert agent.q == {(0,): [0.0, 5.0], (1,): [2.0, 6.0]}  # 4 + 1/2 (3 + 1/2 6 - 4)
    assert agent.td_error == 0.01 * 2
    assert agent.act(1) == 5  # a random one
    agent.observe(1, 5, 1.0, 2, True, False)
    assert agent.q == {(0,): [0.0, 5.0], (1,): [1.5, 6.0]}  # 2 + 1/2 (1 - 2)
    assert agent.td_error == pytest.approx(0.02 + 0.01 * (1 - 0.02), rel=1e-12)
    agent.observe(0, 6, -1.0, 0, False, True)
    assert agent.q == {(0,): [0.0, 3.25], (1,): [1.5, 6.0]}  # 5 + 1/2 (-1 + 1/2 5 - 5): truncated, so the value counts
    agent.update()
    # (0, 6) led once to 1 with reward 3, once to 0 with -1: target 1 + 1/4 6 + 1/4 Q(0, 6). (1, 5): target 1.
    first = 3.25 + 0.5 * (1 + 1.5 + 0.25 * 3.25 - 3.25)
    second = first + 0.5 * (1 + 1.5 + 0.25 * first - first)
    assert agent.q == {(0,): [0.0, second], (1,): [1.25, 6.0]}
    assert (first, second) == (3.28125, 3.30078125)


def test_last_plans_with_the_latest_outcome_and_its_reward_alone():
    agent = agent_of(dyna_q, model="last", alpha=1.0, gamma=0.5, n_planning=1)
    see(agent, (1, 0, 8.0, 3, True), (0, 0, 5.0, 3, True), (0, 0, 3.0, 1, False), (0, 0, 2.0, 1, False))
    agent.q[0,][0] = 0.0
    agent.rng = Draws(pairs=(1,))
    agent.update()
    assert agent.q[0,][0] == 2.0 + 0.5 * 8.0
    assert agent.model.outcomes[(0,), 0] == {((1,), False): (1, 2.0)}


def test_counts_plan_with_the_expectation_of_equation_8_1():
    agent = agent_of(dyna_q, alpha=0.1, gamma=0.9, n_planning=1)
    agent.q[1,], agent.q[2,] = [1.0, 7.0, 2.0], [-3.0, -1.0, -2.0]
    see(agent, *[(0, 2, 1.0, 1)] * 3, *[(0, 2, 4.0, 2)] * 2, *[(0, 2, -2.0, 3, True)] * 5)
    agent.q[0,][2] = 10.0
    agent.rng = Draws(pairs=(0,))
    agent.update()
    expected = 0.3 * (1 + 0.9 * 7) + 0.2 * (4 + 0.9 * -1) + 0.5 * (-2 + 0)
    assert agent.q[0,] == pytest.approx([0.0, 0.0, 10 + 0.1 * (expected - 10)])


def test_one_state_may_end_an_episode_or_not():
    """The same s' with and without an end are two outcomes."""
    agent = agent_of(dyna_q, alpha=1.0, gamma=0.5, n_planning=1)
    agent.q[1,] = [8.0, 0.0, 0.0]
    see(agent, (0, 0, 0.0, 1, False), (0, 0, 0.0, 1, True))
    agent.update()
    assert agent.q[0,][0] == 0.5 * 0.5 * 8.0


TRANSITIONS = st.lists(
    st.tuples(
        st.integers(0, 3), st.integers(0, 2), st.sampled_from([-1.0, 0.0, 0.5, 2.0]), st.integers(0, 3), st.booleans()
    ),
    min_size=1,
    max_size=30,
)


@given(TRANSITIONS, st.floats(0.01, 1.0), st.floats(0.0, 1.0))
@settings(max_examples=25, deadline=None)
def test_without_planning_it_is_q_learning(experience, alpha, gamma):
    for module in (dyna_q, dyna_q_plus):
        agent, table = agent_of(module, alpha=alpha, gamma=gamma, n_planning=0), np.zeros((4, 3))
        for s, a, r, s2, terminated in experience:
            see(agent, (s, a, r, s2, terminated))
            agent.update()
            best = 0.0 if terminated else table[s2].max()
            table[s, a] = (1 - alpha) * table[s, a] + alpha * (r + gamma * best)
        for (state,), row in agent.q.items():
            np.testing.assert_allclose(row, table[state], atol=1e-12)


@given(TRANSITIONS, st.sampled_from(["counts", "last"]), st.floats(-2, 2))
@settings(max_examples=25, deadline=None)
def test_planning_converges_to_value_iteration_on_what_was_seen(experience, kind, initial_q):
    agent = agent_of(dyna_q, gamma=0.8, alpha=0.5, model=kind, initial_q=initial_q, n_planning=4_000)
    see(agent, *experience)
    table = {state: list(row) for (state,), row in agent.q.items()}  # pairs that were not tried keep their value
    agent.update()
    seen = {}
    for s, a, *outcome in experience:
        seen.setdefault((s, a), []).append(outcome)
    for _ in range(120):
        for (s, a), outcomes in seen.items():
            used = outcomes if kind == "counts" else outcomes[-1:]
            table[s][a] = np.mean([r + 0.8 * (0 if end else max(table[s2])) for r, s2, end in used])
    for state in table:
        np.testing.assert_allclose(agent.q[state,], table[state], atol=1e-6)


def test_planning_on_the_true_model_of_frozen_lake_is_value_iteration():
    env = gym.make("FrozenLake-v1")
    agent, outcomes = (
        Agent(env.observation_space, env.action_space, Args(alpha=0.5, n_planning=60_000)),
        env.unwrapped.P,
    )
    holes = {s2 for s in outcomes for a in range(4) for _, s2, _, end in outcomes[s][a] if end}
    for state in set(outcomes) - holes:
        for action in range(4):
            see(agent, *[(state, action, r, s2, end) for _, s2, r, end in outcomes[state][action]])  # each has p = 1/3
    agent.update()
    value = np.zeros(16)
    for _ in range(500):
        table = np.array(
            [[sum(p * (r + 0.95 * value[s2] * (not end)) for p, s2, r, end in outcomes[s][a]) for a in range(4)]
             for s in range(16)]
        )  # fmt: skip
        value = table.max(1)
    for state in set(outcomes) - holes:
        np.testing.assert_allclose(agent.q[state,], table[state], atol=1e-5)
    assert holes.isdisjoint(state for (state,) in agent.q)


def test_initial_q_is_where_every_pair_starts_and_terminal_states_are_worth_nothing():
    agent = agent_of(dyna_q, initial_q=10.0, alpha=1.0, gamma=0.5, n_planning=20)
    see(agent, (0, 1, 1.0, 3, True), (1, 0, 1.0, 2, False))
    for _ in range(2):
        assert agent.q == {(0,): [10.0, 1.0, 10.0], (1,): [6.0, 10.0, 10.0], (2,): [10.0] * 3}
        agent.update()
    agent.q[2,][0] = 3.0
    assert agent.q[3,] == [10.0] * 3  # rows are lists of their own


def test_drawn_pairs_are_uniform_over_those_tried():
    agent, tried, written = agent_of(dyna_q, n_planning=18_000), {0: [0, 1, 2], 1: [1], 2: [0, 2]}, Counter()
    for state, actions in tried.items():
        agent.q[state,] = Row([0.0] * 3, state, written)
        for action in actions:
            agent.model.update((state,), action, 0.0, (state,), False)
    agent.update()
    assert set(written) == {(state, action) for state in tried for action in tried[state]}
    assert sum(written.values()) == 18_000
    assert all(plausible(count, 18_000, 1 / 6) for count in written.values())


def test_the_model_counts_outcomes_and_sums_their_rewards():
    model = Model({(0,): [0.0, 1.0], (1,): [2.0, 3.0]}, Args(gamma=0.5))
    for reward, next_state, terminated in [
        (1.0, (1,), False),
        (2.0, (1,), False),
        (6.0, (0,), False),
        (3.0, (2,), True),
    ]:
        model.update((0,), 1, reward, next_state, terminated)
    model.update((1,), 0, 7.0, (0,), False)
    assert model.outcomes[(0,), 1] == {((1,), False): (2, 3.0), ((0,), False): (1, 6.0), ((2,), True): (1, 3.0)}
    zero, one = model.q[0,], model.q[1,]
    assert model.pairs == [(zero, 1, 3.0, [(0.25, one), (0.125, zero)]), (one, 0, 7.0, [(0.5, zero)])]
    assert model.pairs[0][0] is zero
    assert model.pairs[0][3][0][1] is one  # rows of Q, no copies


def test_without_planning_no_model_is_kept():
    agent = agent_of(dyna_q, n_planning=0)
    see(agent, (0, 1, 1.0, 2))
    assert (agent.model.outcomes, agent.model.pairs) == ({}, [])


def test_metrics_tell_the_error_and_how_many_pairs_are_known(module):
    agent = agent_of(module, alpha=0.5)
    see(agent, (0, 1, -2.0, 2), (0, 1, 1.0, 3, True), (0, 0, 0.0, 2), (2, 1, 0.0, 2))
    error = 0.01 * 2.0
    error += 0.01 * (2.0 - error)  # 1 - (-1)
    error *= 0.99**2
    assert agent.metrics() == {"losses/td_error": pytest.approx(error), "model/state_action_pairs": 3}


# --- the agent's state ------------------------------------------------------------------------------------------------
def written_and_read(agent: Any) -> Any:
    """The agent that a checkpoint holds."""
    other = type(agent)(Discrete(5), Discrete(2), agent.args)
    other.load_state_dict(ast.literal_eval(repr(agent.state_dict())))
    return other


@pytest.mark.parametrize("kind", ["counts", "last"])
@pytest.mark.parametrize("twin", [written_and_read, copy.deepcopy, lambda agent: pickle.loads(pickle.dumps(agent))])
def test_a_twin_goes_on_exactly_as_the_original(module, twin, kind):
    agent = module.Agent(Discrete(5), Discrete(2), module.Args(model=kind, n_planning=7, epsilon=0.5))
    see(agent, (2, 1, 1.0, 3))  # so that there is an error and a reward
    live(agent, Corridor(), lambda lengths, rewards: len(rewards) == 60)
    other = twin(agent)
    before = repr(agent.state_dict())
    assert (other.metrics(), other.q, other.model.pairs) == (agent.metrics(), agent.q, agent.model.pairs)
    for one in (agent, other):
        live(one, Corridor(), lambda lengths, rewards: len(rewards) == 60)
    assert repr(other.state_dict()) == repr(agent.state_dict()) != before
    assert (other.metrics(), other.model.pairs) == (agent.metrics(), agent.model.pairs)
    assert all(any(pair[0] is row for row in other.q.values()) for pair in other.model.pairs)


def test_a_loaded_agent_shares_nothing_with_the_state(module):
    agent, other = agent_of(module), agent_of(module)
    see(agent, (0, 1, 1.0, 2))
    other.load_state_dict(agent.state_dict())
    before = repr(agent.state_dict())
    see(other, (0, 1, 5.0, 3), (1, 1, 5.0, 0))
    other.update()
    assert repr(agent.state_dict()) == before


def test_tables_hold_plain_numbers(module):
    agent = module.Agent(Discrete(3), Discrete(2, start=1), module.Args())
    agent.observe(np.int64(0), np.int64(1), 1.0, np.int64(2), np.bool_(False), np.bool_(False))
    agent.observe(np.int32(2), np.int64(2), 1, 0, np.bool_(True), np.bool_(False))
    agent.update()
    assert {type(value) for row in agent.q.values() for value in row} == {float}
    assert ast.literal_eval(repr(agent.state_dict())) == agent.state_dict()


# --- states -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("space", "obs", "key"),
    [
        (Discrete(5), 3, (3,)),
        (Discrete(5), np.int64(3), (3,)),
        (Discrete(5), np.array(3), (3,)),
        (Discrete(5, start=-2), -2, (-2,)),
        (MultiDiscrete([3, 4]), np.array([2, 1]), (2, 1)),
        (MultiDiscrete([[3, 4], [5, 6]]), np.array([[2, 1], [4, 0]]), (2, 1, 4, 0)),
        (MultiBinary(3), np.array([1, 0, 1], np.int8), (1, 0, 1)),
        (Tuple((Discrete(32), Discrete(11), Discrete(2))), (14, 10, np.int64(0)), ((14,), (10,), (0,))),
        (Tuple((Discrete(3), Tuple((MultiBinary(2), Discrete(2))))), (2, ([0, 1], 1)), ((2,), ((0, 1), (1,)))),
        (Box(-1, 1, (2, 2), np.int8), np.array([[0, 1], [-1, 0]], np.int8), (0, 1, -1, 0)),
        (Box(0, 1, (2,), np.float32), np.array([0.5, 0.1], np.float32), (0.5, float(np.float32(0.1)))),
        (Box(0, 1, (2,), np.float32), np.array([0.5, 0.1], np.float64), (0.5, float(np.float32(0.1)))),
        (Box(-1, 1, (1,), np.float64), np.array([-0.0]), (0.0,)),
    ],
)
def test_the_key_of_a_state(module, space, obs, key):
    agent = module.Agent(space, Discrete(2), module.Args())
    assert (agent.key(obs), hash(agent.key(obs))) == (key, hash(key))
    assert ast.literal_eval(repr(agent.key(obs))) == key
    agent.observe(obs, 1, 1.0, obs, True, False)
    assert agent.q[key][1] > 0


@pytest.mark.parametrize(
    ("observations", "actions"),
    [
        (Discrete(3), Box(-1, 1, (1,))),
        (Discrete(3), MultiDiscrete([2, 2])),
        (Dict({"a": Discrete(3)}), Discrete(2)),
        (Box(-np.inf, np.inf, (2,)), Discrete(2)),
        (Box(0, 255, (8, 9), np.uint8), Discrete(2)),
    ],
)
def test_spaces_without_a_table_are_refused(module, observations, actions):
    with pytest.raises(module.Failure, match="no table of"):
        module.Agent(observations, actions, module.Args())
    module.Agent(Box(0, 255, (8, 8), np.uint8), Discrete(2), module.Args())  # 64 numbers are not too many


# --- the mazes --------------------------------------------------------------------------------------------------------
def test_both_scripts_have_the_same_mazes():
    assert dyna_q.LAYOUTS == dyna_q_plus.LAYOUTS
    for name in ("Maze", "draw_policy", "state_of", "check_spaces"):
        assert inspect.getsource(getattr(dyna_q, name)) == inspect.getsource(getattr(dyna_q_plus, name))


def moves(layout: str) -> tuple[dict[tuple[int, int], int], int, int]:
    """(cell, action) -> next cell, and start and goal; written from the book's text, not from `Maze`."""
    free = {(place // 9, place % 9): place for place, mark in enumerate(layout) if mark != "#"}
    ways = [(-1, 0), (0, 1), (1, 0), (0, -1)]  # up, right, down, left
    after = {
        (place, a): free.get((row + down, column + right), place)
        for (row, column), place in free.items()
        for a, (down, right) in enumerate(ways)
    }
    return after, layout.index("S"), layout.index("G")


def expected_steps(layout: str, epsilon: float) -> float:
    """Expected steps from S to G: of a uniform walk (epsilon 1), else of the best epsilon-greedy policy."""
    after, start, goal = moves(layout)
    cells = sorted({cell for cell, _ in after} - {goal})
    table, steps = np.array([[after[cell, a] for a in range(4)] for cell in cells]), np.zeros(54)
    if epsilon == 1:
        chance = np.array([[np.mean(row == cell) for cell in cells] for row in table])
        return np.linalg.solve(np.eye(len(cells)) - chance, np.ones(len(cells)))[cells.index(start)]
    for _ in range(300):
        steps[cells] = 1 + (1 - epsilon) * steps[table].min(1) + epsilon * steps[table].mean(1)
    return steps[start]


@pytest.mark.parametrize(
    ("name", "random_walk", "epsilon_optimal", "shortest"),
    [
        ("DYNA", 868.73, 15.81, 14),
        ("RIGHT", 441.88, 11.07, 10),
        ("LEFT", 683.92, 17.54, 16),
        ("BOTH", 344.3, 11.07, 10),
    ],
)
def test_mazes_are_those_of_the_book(name, random_walk, epsilon_optimal, shortest):
    layout = getattr(dyna_q, name)
    assert expected_steps(layout, 1.0) == pytest.approx(random_walk, abs=0.006)
    assert expected_steps(layout, 0.1) == pytest.approx(epsilon_optimal, abs=0.006)
    assert expected_steps(layout, 0.0) == pytest.approx(shortest)
    after, start, goal = moves(layout)
    maze = Maze((layout, layout))
    for (cell, action), wanted in after.items():
        assert maze.reset(seed=0) == (start, {})
        maze.position = cell
        assert maze.step(action) == (wanted, float(wanted == goal), wanted == goal, False, {})


@pytest.mark.parametrize(
    ("env_id", "change_at", "before", "after"),
    [
        ("BlockingMaze-v0", 1_000, "########.", ".########"),
        ("ShortcutMaze-v0", 3_000, ".########", ".#######."),
        ("DynaMaze-v0", 1_000, "..#......", "..#......"),
    ],
)
def test_walls_move_at_a_real_step_counted_over_episodes(env_id, change_at, before, after):
    maze = gym.make(env_id).unwrapped
    for step in range(change_at + 3):
        if step % 100 == 0:
            maze.reset(seed=step)
        assert maze.layout[27:36] == (before if step < change_at else after), step
        maze.step(3)


def test_a_maze_passes_the_checks_of_gymnasium():
    from gymnasium.utils.env_checker import check_env

    check_env(gym.make("DynaMaze-v0", render_mode="rgb_array").unwrapped, skip_render_check=True)


def test_a_maze_is_drawn_as_it_is():
    env = gym.make("DynaMaze-v0", render_mode="rgb_array")
    env.reset(seed=0)
    env.step(0)  # up, so that the start is seen
    pixels = env.render()
    assert (pixels.shape, pixels.dtype) == ((192, 288, 3), np.uint8)
    colours = [tuple(map(int, pixels[32 * row + 16, 32 * column + 16])) for row in range(6) for column in range(9)]
    marks = dyna_q.DYNA[:9] + "A" + dyna_q.DYNA[10:]
    assert len(set(zip(marks, colours, strict=True))) == len(set(colours)) == 5


POLICY = {(0,): [0.0, 1.0, 0.0, 0.0], (1,): [0.0, 0.0, 0.5, 0.0], (53,): [0.2, 0, 0, 0.1], (52,): [0, 0, 0, -1.0]}


@pytest.mark.parametrize(("encoding", "arrows"), [("utf-8", "→↓↑"), ("ascii", ">v^")])
def test_the_policy_is_printed_with_an_arrow_for_each_known_state(encoding, arrows, tmp_path, monkeypatch):
    maze = gym.make("DynaMaze-v0").unwrapped
    maze.reset(seed=0)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))
    dyna_q.draw_policy(maze, POLICY | {(20,): [0.3] * 4, (51,): [0.0, 0.0, 0.0, 0.4]}, tmp_path / "policy.png")
    sys.stdout.flush()
    *lines, last = sys.stdout.buffer.getvalue().decode(encoding).splitlines()
    marks = "".join(lines).replace(" ", "")
    assert (marks[0], marks[1], marks[53]) == tuple(arrows)
    assert marks[51] == {"utf-8": "←", "ascii": "<"}[encoding]
    assert marks[2:51] == dyna_q.DYNA[2:51]  # 20 is known as nothing: all its actions are equal
    assert [len(line) for line in lines] == [17] * 6
    assert last == f"drawn, the bluer the higher a state's value: {tmp_path / 'policy.png'}"


def test_the_policy_is_drawn_the_bluer_the_higher_the_value(tmp_path):
    maze = gym.make("DynaMaze-v0").unwrapped
    maze.reset(seed=0)
    dyna_q.draw_policy(maze, POLICY, tmp_path / "policy.png")
    image = Image.open(tmp_path / "policy.png")
    assert image.size == (360, 240)

    def red(state: int) -> int:
        return image.getpixel((40 * (state % 9) + 2, 40 * (state // 9) + 2))[0]

    assert red(0) == 85 < red(1) == 160 < red(53) == 205
    assert image.getpixel((2 * 40 + 2, 2)) == (90, 90, 90)  # nothing known
    dark = np.array(image)[:40, :40].sum(2) < 120  # the arrow of state 0 points right: high at its left, flat at right
    heights = dark.sum(0)[dark.any(0)]
    assert heights[1] > 10 > heights[-2] > 0


def test_walls_stay_walls_and_values_below_zero_are_not_blue(tmp_path, capsys):
    maze = gym.make("DynaMaze-v0").unwrapped
    maze.reset(seed=0)
    dyna_q.draw_policy(maze, {(7,): [1.0, 0.0, 0.0, 0.0], (0,): [-2.0, -9.0, -9.0, -math.inf]}, tmp_path / "policy.png")
    marks = capsys.readouterr().out.replace(" ", "").replace("\n", "")
    assert (marks[0], marks[7]) == ("↑", "#")  # 7 was free before the walls moved
    assert Image.open(tmp_path / "policy.png").getpixel((2, 2)) == (235, 240, 250)


def test_a_policy_of_nothing_is_drawn(tmp_path, capsys):
    maze = gym.make("DynaMaze-v0").unwrapped
    maze.reset(seed=0)
    dyna_q.draw_policy(maze, {}, tmp_path / "policy.png")
    assert capsys.readouterr().out.replace(" ", "").replace("\n", "").startswith(dyna_q.DYNA)


# --- runs -------------------------------------------------------------------------------------------------------------
def test_training_is_the_box_on_top(module, tmp_path, monkeypatch):
    """Each step acts in the current state, learns from what came of it, then plans; each end is logged."""
    seen, seeds = [], []
    for name in ("act", "observe", "update"):
        method = getattr(module.Agent, name)

        def watched(agent: Any, *args: Any, name: str = name, method: Callable = method) -> Any:
            result = method(agent, *args)
            seen.append((name, *args, *([] if result is None else [result])))
            return result

        monkeypatch.setattr(module.Agent, name, watched)
    reset = Corridor.reset
    monkeypatch.setattr(Corridor, "reset", lambda env, *, seed, options: seeds.append(seed) or reset(env, seed=seed))

    def make(**drawing: str) -> gym.Env:
        return gym.wrappers.TransformReward(corridor(module, limit=9)(**drawing), lambda reward: reward - 0.25)

    args = module.Args(total_timesteps=200, eval_every=200, eval_episodes=1, epsilon=0.8, run_dir=str(tmp_path))
    result = module.train(args, make)
    assert [call[0] for call in seen] == ["act", "observe", "update"] * 200
    obs, lengths, returns, length = 0, [], [], 0
    for (_, acted_in, action), (_, *transition), _ in zip(*[iter(seen)] * 3, strict=True):
        length, after = length + 1, max(0, obs + (1 if action else -1))
        assert acted_in == obs
        assert transition == [obs, action, float(after == 4) - 0.25, after, after == 4, length == 9]
        obs = after
        if after == 4 or length == 9:
            lengths, returns = [*lengths, length], [*returns, float(after == 4) - 0.25 * length]
            obs, length = 0, 0
    logged = scalars(only_run(tmp_path))
    assert [value for tag, _, value in logged if tag == "charts/episodic_length"] == lengths
    assert [value for tag, _, value in logged if tag == "charts/episodic_return"] == returns
    assert [step for tag, step, _ in logged if tag == "charts/episodic_return"] == np.cumsum(lengths).tolist()
    assert {value + 0.25 * length for value, length in zip(returns, lengths, strict=True)} == {0.0, 1.0}
    assert result["env_steps"] == 200
    assert seeds[: len(lengths)] == [module.seed_of(1, 1, number) for number in range(len(lengths))]


def test_the_agent_of_a_run_knows_no_end_where_time_is_up(tmp_path):
    args = Args(env_id="ShortCorridor-v0", total_timesteps=200, eval_every=200, initial_q=1.0, epsilon=1.0)
    dyna_q.train(dataclasses.replace(args, run_dir=str(tmp_path)))  # three steps at a time never reach state 4
    agent = dyna_q.load(only_run(tmp_path))
    assert {terminated for outcomes in agent.model.outcomes.values() for _, terminated in outcomes} == {False}
    assert agent.q[2,][1] > 0.6  # on the value of the state in which time is up, which starts at 1


def followed(printed: str, layout: str) -> int:
    """Steps from S to G along the printed arrows."""
    after, place, goal = moves(layout)
    for step in range(100):
        if place == goal:
            return step
        place = after[place, "↑→↓←".index(printed[place])]
    raise AssertionError("walks in circles")


def test_the_printed_policy_of_a_run_is_the_shortest_path(tmp_path, capsys):
    result = dyna_q.train(Args(seed=2, total_timesteps=4_000, eval_every=4_000, run_dir=str(tmp_path)))
    printed = "".join(capsys.readouterr().out.splitlines()[-7:-1]).replace(" ", "")
    assert followed(printed, dyna_q.DYNA) in (14, 16)
    assert result["eval_return_mean"] == 1.0
    assert Image.open(only_run(tmp_path) / "policy.png").size == (360, 240)


def test_other_worlds_are_not_drawn(module, tmp_path):
    args = module.Args(total_timesteps=40, eval_every=40, eval_episodes=1, run_dir=str(tmp_path))
    module.train(args, corridor(module))
    assert not (only_run(tmp_path) / "policy.png").exists()


@pytest.mark.parametrize("env_id", ["Taxi-v4", "Blackjack-v1", "CliffWalking-v1"])
def test_worlds_of_gymnasium_run_through(module, env_id, tmp_path):
    args = module.Args(env_id, total_timesteps=200, eval_every=200, eval_episodes=1, run_dir=str(tmp_path))
    result = module.train(args)
    assert (result["env_steps"], math.isfinite(result["eval_return_mean"])) == (200, True)


# --- the figures of the book ------------------------------------------------------------------------------------------
def episodes_of(seed: int, number: int, **fields: Any) -> list[int]:
    """Lengths of the first episodes in DynaMaze."""
    agent = Agent(Maze.observation_space, Maze.action_space, Args(seed=seed, **fields))
    return live(agent, Maze((dyna_q.DYNA,) * 2), lambda lengths, _: len(lengths) == number)[0]


FIGURE_8_2 = {  # n -> episode -> mean steps and their standard error over 1000 runs of an independent implementation
    0: {1: (868.7, 0.0), 10: (133.2, 3.5), 20: (49.1, 1.3), 30: (18.7, 0.3)},
    5: {1: (868.7, 0.0), 2: (151.7, 2.1), 3: (61.2, 1.0), 5: (22.6, 0.3), 10: (17.1, 0.1), 20: (16.8, 0.1)},
    50: {1: (868.7, 0.0), 2: (39.3, 0.3), 3: (17.6, 0.1), 5: (17.1, 0.1), 10: (17.0, 0.1), 20: (17.1, 0.1)},
}


@pytest.mark.parametrize(
    ("n", "model", "seeds"),
    [
        (5, "last", 40),
        (50, "counts", 20),
        pytest.param(0, "counts", 200, marks=pytest.mark.slow),
        pytest.param(5, "counts", 100, marks=pytest.mark.slow),
        pytest.param(50, "last", 100, marks=pytest.mark.slow),
    ],
)
def test_figure_8_2(n, model, seeds):
    number = max(FIGURE_8_2[n])
    runs = np.array([episodes_of(seed, number, n_planning=n, model=model) for seed in range(seeds)])
    for episode, (mean, error) in FIGURE_8_2[n].items():
        steps = runs[:, episode - 1]
        assert abs(steps.mean() - mean) < 4 * math.hypot(error, steps.std() / math.sqrt(seeds)), episode


def test_deterministic_frozen_lake_is_solved_from_zero_values():
    env = gym.make("FrozenLake-v1", is_slippery=False)  # argmax without random ties would walk left for ever
    agent = Agent(env.observation_space, env.action_space, Args(n_planning=10))
    live(agent, env, lambda _, rewards: len(rewards) == 2_000)
    assert walk(agent.greedy_policy(0), env) == (6, 1.0)


# --- what the docstring says ------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_the_bare_command_finds_a_path_of_14_or_16_steps(tmp_path):
    for seed in range(1, 11):
        dyna_q.train(Args(seed=seed, run_dir=str(tmp_path / str(seed))))
        lengths = [x for tag, _, x in scalars(only_run(tmp_path / str(seed))) if tag == "eval/episodic_length"]
        assert lengths[-1] in (14, 16), seed


def test_the_agent_draws_from_a_generator_of_its_own_purpose(module):
    assert agent_of(module, seed=5).rng.random() == random.Random(module.seed_of(5, 0)).random()


def test_rewards_that_are_numpy_numbers_are_kept_as_plain_ones(module):
    agent = agent_of(module)
    agent.observe(0, np.int64(1), np.float32(0.5), 2, np.bool_(False), False)
    assert ast.literal_eval(repr(agent.state_dict())) == agent.state_dict()
    kept = [number for outcomes in agent.model.outcomes.values() for sums in outcomes.values() for number in sums]
    assert {type(number) for number in [*kept, *agent.q[0,]]} == {int, float}


def frozen_lake(**fields: Any) -> float:
    """Exact return of the greedy policy inside the time limit after 20,000 steps, a mean over ten seeds."""
    env, returns = gym.make("FrozenLake-v1"), []
    for seed in range(10):
        agent = Agent(env.observation_space, env.action_space, Args(seed=seed, gamma=0.99, **fields))
        live(agent, env, lambda _, rewards: len(rewards) == 20_000, seed)
        policy, value = agent.greedy_policy(0), np.zeros(16)
        chosen = [env.unwrapped.P[state][int(policy(state))] for state in range(16)]
        for _ in range(100):
            value = np.array([sum(p * (r + value[s2] * (not end)) for p, s2, r, end in row) for row in chosen])
        returns.append(value[0])
    return float(np.mean(returns))


@pytest.mark.slow
def test_on_slippery_frozen_lake_counts_help_and_the_last_outcome_harms():
    counts, q_learning, last = frozen_lake(), frozen_lake(n_planning=0), frozen_lake(model="last")
    print(f"counts {counts:.3f}, Q-learning {q_learning:.3f}, last outcome {last:.3f}, optimum 0.740")
    assert counts >= 0.70
    assert last < q_learning < counts
