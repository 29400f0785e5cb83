"""muzero.py against mctx's golden values, slow scalar references, brute force and finite differences."""

import copy
import dataclasses
import functools
import io
import math
import os
import pickle
import sys
from pathlib import Path
from typing import ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import only_run, run_script, scalars, tiny_args
from hypothesis import given
from hypothesis import strategies as st

import muzero
from benchmark import tic_tac_toe
from muzero import Replay, Tree, gumbel_search, muzero_search, scale, two_hot, unrolled_loss, unscale

GOLDEN = os.environ.get("MCTX_GOLDEN") or Path(__file__).parent / "golden" / "mctx_golden.npz"


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small_args(**fields: object) -> muzero.Args:
    return tiny_args(muzero, **fields)


class Model:
    """h' = tanh(h W[a] + b[a]), with linear rewards, logits and values; random unless given."""

    def __init__(self, actions: int, discount: float, seed: int = 0, **arrays: np.ndarray):
        rng, size = np.random.default_rng(seed), 6
        self.discount = discount
        self.w, self.b = (
            arrays.get("W", rng.normal(size=(actions, size, size))),
            arrays.get("b", rng.normal(size=(actions, size))),
        )
        self.wr, self.wv = arrays.get("wr", rng.normal(size=size)), arrays.get("wv", rng.normal(size=size))
        self.wp = arrays.get("wp", rng.normal(size=(size, actions)))

    def __call__(self, h: np.ndarray, action: np.ndarray) -> tuple[np.ndarray, ...]:
        h = np.tanh(np.einsum("bi,bij->bj", h, self.w[action]) + self.b[action])
        reward = h @ self.wr if self.discount > 0 else np.zeros(len(h))
        return h, reward, h @ self.wp, h @ self.wv

    def roots(self, count: int) -> tuple[np.ndarray, ...]:
        h = np.random.default_rng(9).normal(size=(count, 6))
        return h, h @ self.wp, h @ self.wv


# --- search ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["a2", "a4", "a9_two_player"])
def test_search_takes_the_steps_of_mctx(name):
    with np.load(GOLDEN) as file:
        golden = {key.split("/")[1]: file[key] for key in file.files if key.startswith(f"{name}/")}
    discount, count, legal = float(golden["discount"]), int(golden["sims"]), golden["mask"]
    model = Model(legal.shape[1], discount, **{key: golden[key] for key in ("W", "b", "wr", "wv", "wp")})

    def tree() -> Tree:
        return Tree(golden["h0"], golden["root_logits"], golden["root_value"], legal, discount, count)

    searched = tree()
    policy, _ = muzero_search(model, searched)
    np.testing.assert_array_equal(searched.edge_visits[searched.roots], golden["muzero_visit_counts"])
    np.testing.assert_allclose(searched.value[searched.roots], golden["muzero_root_value"], atol=1e-4)
    np.testing.assert_allclose(policy, golden["muzero_visit_counts"] / count)
    visited = golden["muzero_visit_counts"] > 0
    np.testing.assert_allclose(searched.q[searched.roots][visited], golden["muzero_qvalues"][visited], atol=1e-4)

    searched = tree()
    policy, action = gumbel_search(model, searched, np.zeros(legal.shape), 16)
    np.testing.assert_array_equal(searched.edge_visits[searched.roots], golden["gumbel_visit_counts"])
    np.testing.assert_array_equal(action, golden["gumbel_action"])
    np.testing.assert_allclose(policy, golden["gumbel_action_weights"], atol=1e-5)
    np.testing.assert_allclose(searched.value[searched.roots], golden["gumbel_root_value"], atol=1e-4)


class Node:
    """A node of the slow reference."""

    def __init__(self, h: np.ndarray, logits: np.ndarray, value: float):
        self.h, self.raw, self.value, self.visits = h, value, value, 1
        exp = np.exp(logits - logits.max())
        self.prior, self.children = exp / exp.sum(), {}

    def q(self, action: int, discount: float) -> float:
        reward, child = self.children[action]
        return reward + discount * child.value

    def count(self, action: int) -> int:
        return self.children[action][1].visits if action in self.children else 0

    def best(self, discount: float, legal: np.ndarray) -> int:
        seen = [self.value] + [self.q(action, discount) for action in self.children]
        low, high, scores = min(seen), max(seen), []
        for action, prior in enumerate(self.prior):
            q = self.q(action, discount) if action in self.children else low
            bonus = prior * math.sqrt(self.visits) / (1 + self.count(action))
            bonus *= 1.25 + math.log((self.visits + 19_652 + 1) / 19_652)
            scores.append((q - low) / max(high - low, 1e-8) + bonus if legal[action] else -math.inf)
        return int(np.argmax(scores))


def slow_search(model: Model, node: Node, legal: np.ndarray, simulations: int) -> None:
    for _ in range(simulations):
        path, current, allowed = [], node, legal
        while True:
            action = current.best(model.discount, allowed)
            path.append((current, action))
            allowed = np.ones_like(legal)
            if action not in current.children:
                break
            current = current.children[action][1]
        h, reward, logits, value = (part[0] for part in model(current.h[None], np.array([action])))
        current.children[action] = (reward, Node(h, logits, value))
        for current, action in reversed(path):
            value = current.children[action][0] + model.discount * value
            current.value = (current.value * current.visits + value) / (current.visits + 1)
            current.visits += 1


@pytest.mark.parametrize(("actions", "discount"), [(2, 0.99), (5, 0.9), (4, -1.0)])
def test_search_is_that_of_a_slow_reference(actions, discount):
    model, count = Model(actions, discount), 40
    h, logits, value = model.roots(12)
    legal = np.random.default_rng(1).random((12, actions)) < 0.7
    legal[:, 0] = True
    tree = Tree(h, logits, value, legal, discount, count)
    muzero_search(model, tree)
    for row, root in enumerate(tree.roots):
        node = Node(h[row], np.where(legal[row], logits[row], -np.inf), value[row])
        slow_search(model, node, legal[row], count)
        # Counts below the first level include the visit that comes with being expanded.
        assert [node.count(action) for action in range(actions)] == tree.edge_visits[root].tolist()
        assert tree.value[root] == pytest.approx(node.value, abs=1e-4)
        assert tree.edge_visits[root][~legal[row]].sum() == 0


@pytest.mark.parametrize("search", ["puct", "gumbel"])
def test_many_searches_at_once_are_the_same_as_one_by_one(search):
    model, count = Model(3, 0.95), 20
    h, logits, value = model.roots(7)
    legal = np.ones((7, 3), bool)

    def run(rows: slice) -> tuple[np.ndarray, ...]:
        tree = Tree(h[rows], logits[rows], value[rows], legal[rows], 0.95, count)
        noise = np.zeros((len(tree.roots), 3))
        policy, action = muzero_search(model, tree) if search == "puct" else gumbel_search(model, tree, noise, 4)
        return policy, action, tree.value[tree.roots]

    together = run(slice(None))
    for row in range(7):
        for one, many in zip(run(slice(row, row + 1)), together, strict=True):
            np.testing.assert_allclose(one[0], many[row], rtol=1e-5)


@pytest.mark.parametrize("search", ["puct", "gumbel"])
def test_value_of_a_search_is_that_of_the_policy_it_found(search):
    args = small_args(search=search, num_simulations=12)
    agent = muzero.Agent(gym.spaces.Box(-1, 1, (4,), np.float32), gym.spaces.Discrete(3), args)
    rows = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    legal = np.array([[True] * 3] * 4 + [[True, False, True]])
    policy, _, value, tree = agent.plan(rows, legal, None)
    for row, root in enumerate(tree.roots):
        assert (tree.edge_visits[root] > 0).tolist() == legal[row].tolist()  # so nothing had to be completed
        q = [
            tree.reward[root, a] + args.gamma * tree.value[tree.child[root, a]] if legal[row, a] else math.nan
            for a in range(3)
        ]
        assert value[row] == pytest.approx(sum(policy[row, a] * q[a] for a in range(3) if legal[row, a]), abs=1e-5)


def test_q_of_close_actions_is_rescaled_by_the_least_range_and_of_others_by_their_own():
    root = np.zeros(1, np.int64)
    for q, least, wanted in (((1.0, 1.5), 0.0, 1.0), ((1.0, 1.5), 2.0, 0.25), ((1.0, 6.0), 2.0, 1.0)):
        tree = Tree(np.zeros((1, 1)), np.zeros((1, 2)), np.array([1.2]), np.ones((1, 2), bool), 1.0, 4, least)
        tree.q[0], tree.edge_visits[0], tree.visits[0] = q, (2, 1), 4
        added = muzero.sigma(tree, root)[0]
        assert added[1] - added[0] == pytest.approx((50 + 2) * 0.1 * wanted)
        scores = muzero.puct(tree, root, np.zeros(9, np.float32))[0]  # without the part for exploration
        assert scores[1] - scores[0] == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("considered", "simulations", "wanted"),
    [
        (1, 4, [0, 1, 2, 3]),
        (2, 4, [0, 0, 1, 1]),
        (4, 8, [0, 0, 0, 0, 1, 1, 2, 2]),
        (4, 4, [0, 0, 0, 0]),
        (3, 7, [0, 0, 0, 1, 1, 2, 2]),
    ],
)
def test_schedule_of_sequential_halving(considered, simulations, wanted):
    assert muzero.halving_schedule(considered, simulations) == wanted


def test_gumbel_policy_improves_on_the_prior_for_every_small_number_of_simulations():
    rng = np.random.default_rng(0)
    reward = rng.normal(size=(200, 6))

    def bandit(h: np.ndarray, action: np.ndarray) -> tuple[np.ndarray, ...]:
        row = h[:, 0].astype(int)
        return h, reward[row, action], np.zeros((len(h), 6)), np.zeros(len(h))

    logits, legal = rng.normal(size=(200, 6)), np.ones((200, 6), bool)
    prior = muzero.softmax(logits)
    for simulations in (2, 4, 16):
        value = (prior * reward).sum(1)
        tree = Tree(np.arange(200.0)[:, None], logits, value, legal, 0.0, simulations)
        gumbel = rng.gumbel(size=(200, 6))
        policy, action = gumbel_search(bandit, tree, gumbel, 6)
        assert ((policy * reward).sum(1) >= (prior * reward).sum(1) - 1e-6).all()
        assert reward[np.arange(200), action].mean() > value.mean() + 0.3


# --- scaling and targets --------------------------------------------------------------------------------------------
@given(st.floats(-1e4, 1e4))
def test_h_and_its_inverse(x):
    x = torch.tensor(x, dtype=torch.float64)
    assert unscale(scale(x)).item() == pytest.approx(x.item(), rel=1e-6, abs=1e-6)
    assert scale(x.numpy()) == pytest.approx(scale(x).item())


@given(st.floats(-700, 700))
def test_two_hot_is_a_distribution_with_the_right_mean(x):
    weights = two_hot(torch.tensor([x], dtype=torch.float64), 25)[0]
    assert weights.sum().item() == pytest.approx(1)
    assert (weights >= 0).all()
    assert (weights > 0).sum() <= 2
    mean = (weights * torch.arange(-25, 26)).sum()
    assert mean.item() == pytest.approx(min(max(scale(torch.tensor(x, dtype=torch.float64)).item(), -25), 25), abs=1e-5)


def make_replay(capacity: int, follow: float = 0.0, **fields: object) -> Replay:
    return Replay(
        (1,), np.float32, 2, small_args(replay_size=capacity, follow=follow, consistency_weight=0.0, **fields)
    )


def returns_of(rewards: list[float], values: list[float], terminated: bool, n: int, gamma: float) -> list[float]:
    """The n-step returns of one episode in a replay, where it does not begin at the first row."""
    length, columns = len(rewards), episode_rows(len(rewards), 0.0, terminated)
    columns |= {"reward": np.array([*rewards, 0.0]), "value": np.array(values)}
    replay = make_replay(length + 4, td_steps=n, gamma=gamma)
    replay.add(episode_rows(3, 7.0, True))
    replay.add(columns)
    rows = (4 + np.arange(length + 1)) % (length + 4)
    return replay.n_step_returns(rows).tolist()


def test_returns_by_hand():
    rewards, values = [1.0, 2.0, 4.0], [10.0, 20.0, 30.0, 40.0]
    wanted = [1 + 0.5 * 2 + 0.25 * 30, 2 + 0.5 * 4 + 0.25 * 40, 4 + 0.5 * 40, 40]
    assert returns_of(rewards, values, False, 2, 0.5) == wanted
    assert returns_of(rewards, [*values[:3], 0.0], True, 9, 0.5) == [1 + 1 + 1, 2 + 2, 4, 0]
    assert returns_of(rewards, values, False, 2, 0.0) == [1, 2, 4, 40]
    # Two players: what follows is good for the other one.
    assert returns_of([0.0, 0.0, 1.0], [0.0] * 4, True, 9, -1.0) == [1, -1, 1, 0]
    assert returns_of([0.0, 0.0], [0.0, 0.0, 0.5], False, 2, -1.0) == [0.5, -0.5, 0.5]


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=12), st.integers(1, 14), st.sampled_from([1.0, 0.9, -1.0]))
def test_returns_are_those_of_brute_force(rewards, n, gamma):
    values = [math.sin(index) for index in range(len(rewards) + 1)]
    for t, found in enumerate(returns_of(rewards, values, False, n, gamma)):
        end, total, factor = min(t + n, len(rewards)), 0.0, 1.0
        for reward in rewards[t:end]:
            total, factor = total + factor * reward, factor * gamma
        assert found == pytest.approx(total + factor * values[end], abs=1e-5)


@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 1)), min_size=1, max_size=12),
    st.integers(1, 14),
    st.sampled_from([0.0, 0.2, 0.5, 1.0]),
    st.booleans(),
)
def test_returns_end_before_an_action_that_would_not_be_taken_any_more(steps, n, follow, terminated):
    length, columns = len(steps), episode_rows(len(steps), 0.0, terminated)
    values = np.array([*np.cos(np.arange(length)), 0.0 if terminated else 3.0])
    policy = np.array([[p, 1 - p] for p, _ in steps] + [[0.5, 0.5]], np.float32)
    action = np.array([*(action for _, action in steps), 0])
    columns |= {"reward": np.arange(length + 1.0), "value": values, "policy": policy, "action": action}
    replay = make_replay(length + 4, follow, td_steps=n, gamma=0.9)
    replay.add(episode_rows(3, 7.0, True))
    replay.add(columns)
    found = replay.n_step_returns((4 + np.arange(length + 1)) % (length + 4))
    for t in range(length + 1):
        total, factor, end = 0.0, 1.0, t
        while end < min(t + n, length) and policy[end][action[end]] >= np.float32(follow) * max(policy[end]):
            total, factor, end = total + factor * end, factor * 0.9, end + 1
        assert found[t] == pytest.approx(total + factor * values[end], abs=1e-5)


# --- network --------------------------------------------------------------------------------------------------------
def plain_layers(parameters: torch.nn.ParameterDict, *names: str) -> torch.nn.Sequential:
    """Layers of torch's own, with ReLU between them."""
    layers = []
    for name in names:
        weight, bias = parameters[f"{name}_weight"], parameters[f"{name}_bias"]
        linear = torch.nn.Linear(*weight.shape).double()
        linear.weight.data, linear.bias.data = weight.T.detach().double(), bias.detach().double()
        layers += [linear, torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1])


def plain_bounded(x: torch.Tensor) -> torch.Tensor:
    low, high = x.min(-1, keepdim=True).values, x.max(-1, keepdim=True).values
    return (x - low) / (high - low)


def test_network_is_that_of_plain_layers_for_tensors_and_arrays():
    parameters = muzero.make_network((3,), 2, small_args(), generator())
    view = {name: parameter.detach().numpy() for name, parameter in parameters.items()}
    obs, action = torch.randn(5, 3, generator=generator(1)), torch.tensor([0, 1, 1, 0, 1])
    latent = plain_bounded(plain_layers(parameters, "represent", "latent")(obs.double()))
    joined = torch.cat([latent, torch.nn.functional.one_hot(action, 2)], dim=-1)
    following = plain_bounded(latent + plain_layers(parameters, "step", "next_latent")(joined))
    for weights, kind in ((parameters, lambda x: x), (view, lambda x: x.numpy())):
        first = muzero.represent(weights, kind(obs))
        second = muzero.dynamics(weights, first, kind(action), False)
        for got, wanted in ((first, latent), (second, following)):
            np.testing.assert_allclose(np.asarray(torch.as_tensor(got).detach()), wanted.detach(), atol=1e-5)
        for name, logits in zip(("reward", "value", "policy"), muzero.predict(weights, second), strict=True):
            wanted = plain_layers(parameters, f"{name}_hidden", name)(following)
            np.testing.assert_allclose(np.asarray(torch.as_tensor(logits).detach()), wanted.detach(), atol=1e-5)


def test_expectation_is_the_mean_of_the_bins_unscaled():
    logits = torch.randn(4, 11, generator=generator())
    wanted = unscale((logits.softmax(-1) * torch.arange(-5, 6)).sum(-1))
    torch.testing.assert_close(muzero.expectation(logits), wanted)
    np.testing.assert_allclose(muzero.expectation(logits.numpy()), wanted, rtol=1e-4, atol=1e-5)


def test_in_games_lost_drawn_and_won_are_the_categories():
    ends = torch.tensor([-1.0, 0.0, 1.0])
    torch.testing.assert_close(two_hot(ends, 1, scaled=False), torch.eye(3))
    torch.testing.assert_close(muzero.expectation(torch.eye(3).clamp(1e-12).log(), scaled=False), ends)
    args = small_args(gamma=-1.0, support=1, consistency_weight=0.0)
    network = muzero.make_network((3,), 2, args, generator())
    value = torch.tensor([[-1.0, 1.0], [0.0, 0.0]])
    batch = {
        "obs": torch.randn(2, 3, generator=generator(1)),
        "action": torch.zeros(2, 1, dtype=torch.int64),
        "reward": torch.zeros(2, 1),
        "value": value,
        "policy": torch.full((2, 2, 2), 0.5),
        "known": torch.ones(2, 2),
        "acting": torch.zeros(2, 2),
        "weight": torch.ones(2),
    }
    _, logits, _ = muzero.predict(network, muzero.represent(network, batch["obs"]))
    wanted = torch.nn.functional.cross_entropy(logits, value[:, 0].long() + 1)
    batch["known"] = torch.tensor([[1.0, 0.0], [1.0, 0.0]])  # so that the first position alone counts
    assert unrolled_loss(network, batch, args)[2]["value_loss"].item() == pytest.approx(wanted.item(), rel=1e-5)


def test_losses_are_told_as_the_mean_of_where_they_count():
    args = small_args(consistency_weight=0.0)
    network = muzero.make_network((3,), 2, args, generator())
    batch = {
        "obs": torch.randn(2, 3, generator=generator(1)),
        "action": torch.zeros(2, 1, dtype=torch.int64),
        "reward": torch.rand(2, 1, generator=generator(2)),
        "value": torch.rand(2, 2, generator=generator(3)),
        "policy": torch.full((2, 2, 2), 0.5),
        "known": torch.tensor([[1.0, 1.0], [1.0, 0.0]]),
        "acting": torch.tensor([[1.0, 0.0], [0.0, 0.0]]),
        "weight": torch.ones(2),
    }

    def loss(name: str, **columns: torch.Tensor) -> float:
        return unrolled_loss(network, batch | columns, args)[2][name].item()

    alone = [torch.zeros(2, 2) for _ in range(3)]
    for mask, place in zip(alone, ((0, 0), (0, 1), (1, 0)), strict=True):
        mask[place] = 1.0
    assert loss("value_loss") == pytest.approx(sum(loss("value_loss", known=mask) for mask in alone) / 3)
    first = {name: column[:1] for name, column in batch.items()}
    assert loss("policy_loss") == pytest.approx(unrolled_loss(network, first, args)[2]["policy_loss"].item())
    assert loss("policy_loss", acting=torch.zeros(2, 2)) == 0


def test_where_the_view_turns_the_dynamics_give_the_whole_state_and_not_its_change():
    network = muzero.make_network((3,), 2, small_args(), generator())
    latent, action = torch.rand(5, network["latent_bias"].shape[0], generator=generator(1)), torch.zeros(5).long()
    network["next_latent_weight"].data.zero_()  # all that is left is the bias, the same for every state
    following = muzero.dynamics(network, latent, action, turns=True)
    torch.testing.assert_close(following, muzero.bounded(network["next_latent_bias"].expand(5, -1)))
    assert (muzero.dynamics(network, latent, action, turns=False) - following).abs().max() > 0.1


def test_gradient_is_halved_where_a_latent_state_enters_the_dynamics_and_nowhere_else():
    args = small_args(value_weight=0.25, consistency_weight=0.0)
    network = muzero.make_network((3,), 2, args, generator()).double()
    obs, action = torch.randn(4, 3, generator=generator(1)).double(), torch.tensor([[0, 1]] * 4)
    batch = {
        "obs": obs,
        "action": action,
        "reward": torch.rand(4, 2, generator=generator(2)).double(),
        "value": torch.rand(4, 3, generator=generator(3)).double(),
        "policy": torch.full((4, 3, 2), 0.5).double(),
        "known": torch.ones(4, 3).double(),
        "acting": torch.ones(4, 3).double(),
        "weight": torch.ones(4).double(),
    }
    loss, _, _ = unrolled_loss(network, batch, args)
    (gradient,) = torch.autograd.grad(loss, [network["latent_bias"]])

    def losses() -> torch.Tensor:
        """The weighted losses of steps 0, 1 and 2, written out."""
        latent, parts = muzero.represent(network, obs), []
        for index in range(3):
            if index:
                latent = muzero.dynamics(network, latent, action[:, index - 1], False)
            reward, value, policy = (logits.log_softmax(-1) for logits in muzero.predict(network, latent))
            part = -0.25 * (two_hot(batch["value"][:, index], 5) * value).sum(-1) - (0.5 * policy).sum(-1)
            if index:
                part = part - (two_hot(batch["reward"][:, index - 1], 5) * reward).sum(-1)
            parts.append(part.mean() * (0.5 if index else 1.0))  # 1 / K of two steps
        return torch.stack(parts)

    assert loss.item() == pytest.approx(losses().sum().item())
    bias = network["latent_bias"].data
    for entry in range(3):
        difference = []
        for change in (1e-6, -1e-6):
            bias[entry] += change
            difference.append(losses())
            bias[entry] -= change
        by_step = (difference[0] - difference[1]) / 2e-6
        wanted = (by_step @ torch.tensor([1.0, 0.5, 0.25]).double()).item()
        assert gradient[entry].item() == pytest.approx(wanted, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("two_players", [False, True])
def test_a_whole_update_is_what_is_written_out_here(two_players):
    """From the rows of the replay to gradients, weights and priorities."""
    settings = {"unroll_steps": 2, "batch_size": 7, "priority_exponent": 1.0, "weight_decay": 0.1, "value_weight": 0.25}
    settings |= {"learning_rate": 0.01, "decay_steps": 100, "max_grad_norm": 0.05, "support": 3, "num_envs": 1}
    args = small_args(gamma=-1.0 if two_players else 0.9, learning_starts=10**6, **settings)
    agent, rng = muzero.Agent(gym.spaces.Box(-9, 9, (3,)), gym.spaces.Discrete(2), args), np.random.default_rng(0)
    for t in range(30):
        obs, following = rng.normal(3.0, 2.0, (2, 3))
        agent.act(obs)
        agent.observe(obs, rng.integers(2), float(rng.integers(2)), following, t % 8 == 7, t % 10 == 9)
    agent.measure()
    _, batch = agent.replay.sample(rng := copy.deepcopy(agent.rng))
    columns, before = agent.replay.columns, {name: p.detach().double() for name, p in agent.parameters.items()}
    p = {name: weights.clone().requires_grad_() for name, weights in before.items()}
    used = columns["obs"][: agent.replay.used].astype(float)
    batch = {name: torch.from_numpy(column) for name, column in batch.items()}
    args.learning_starts, args.reanalyze_ratio, args.updates_per_step, agent.steps = 1, 0.0, 1.0, 50
    agent.updates = 48
    agent.update()  # a single one
    assert agent.rng.bit_generator.state == rng.bit_generator.state

    def layers(name: str, output: str, x: torch.Tensor) -> torch.Tensor:
        hidden = (x @ p[f"{name}_weight"] + p[f"{name}_bias"]).relu()
        return hidden @ p[f"{output}_weight"] + p[f"{output}_bias"]

    def represent(obs: torch.Tensor) -> torch.Tensor:
        x = (obs.double() - torch.from_numpy(used.mean(0))) / torch.from_numpy(used.std(0))
        return plain_bounded(layers("represent", "latent", x))

    def cross_entropy(logits: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        y = x.double() if two_players else scale(x.double())
        target = (1 - (y[:, None] - torch.arange(-3, 4)).abs()).clamp(min=0)
        return -(target * logits.log_softmax(-1)).sum(-1)

    latent, total = represent(batch["obs"]), 0.0
    for step in range(3):
        weight, known, acting = 1.0 if step == 0 else 0.5, batch["known"][:, step], batch["acting"][:, step]
        if step:
            joined = torch.cat([latent, torch.nn.functional.one_hot(batch["action"][:, step - 1], 2)], dim=1)
            joined = 0.5 * joined + 0.5 * joined.detach()
            change = layers("step", "next_latent", joined)
            latent = plain_bounded(change if two_players else joined[:, :-2] + change)
            was_known, was_acting = batch["known"][:, step - 1], batch["acting"][:, step - 1]
            reward = cross_entropy(layers("reward_hidden", "reward", latent), batch["reward"][:, step - 1])
            real = layers("project", "projection", represent(batch["next_obs"][:, step - 1])).detach()
            imagined = layers("predictor_hidden", "predictor", layers("project", "projection", latent))
            distance = -torch.nn.functional.cosine_similarity(imagined, real)
            total = total + weight * (reward * was_known + 2 * distance * was_acting)
        value_logits = layers("value_hidden", "value", latent)
        value = cross_entropy(value_logits, batch["value"][:, step])
        policy = -(batch["policy"][:, step] * layers("policy_hidden", "policy", latent).log_softmax(-1)).sum(-1)
        total = total + weight * (0.25 * value * known + policy * acting)
        if step == 0:
            mean = value_logits.detach().softmax(-1) @ torch.arange(-3.0, 4.0).double()
            first = mean if two_players else unscale(mean)
    gradients = dict(zip(p, torch.autograd.grad((batch["weight"] * total).mean(), list(p.values())), strict=True))
    norm = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients.values()))
    assert norm > args.max_grad_norm  # so that it is shortened
    for name, parameter in agent.parameters.items():
        wanted = gradients[name] * args.max_grad_norm / norm + 0.1 * before[name]
        found = agent.optimizer.state[parameter]["exp_avg"] / (1 - 0.9)  # of Adam's first step
        torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-3)
        moved = before[name] - 0.01 * 0.1**0.5 * wanted / (wanted.abs() + 1e-8)
        sure = wanted.abs() > 1e-4  # where the sign is no matter of rounding
        torch.testing.assert_close(parameter.detach().double()[sure], moved[sure], atol=1e-5, rtol=1e-4)
    changed = columns["priority"] != 0
    wanted = ((first - batch["value"][:, 0]).abs() + 1e-3).numpy()
    found = columns["priority"][changed]
    assert all(np.isclose(found, priority, rtol=1e-3, atol=1e-4).any() for priority in wanted)


# --- replay ---------------------------------------------------------------------------------------------------------
def episode_rows(length: int, start: float, terminated: bool) -> dict[str, np.ndarray]:
    steps = np.arange(length + 1)
    return {
        "obs": (start + steps)[:, None],
        "action": steps % 2,
        "reward": start + steps,
        "policy": np.stack([steps * 0.0, steps * 0.0 + 1], axis=1),
        "value": np.where(terminated & (steps == length), 0.0, start + steps),
        "legal": np.ones((length + 1, 2), bool),
        "left": length - steps,
        "terminated": np.full(length + 1, terminated),
        "priority": np.where(steps < length, 1.0, 0.0),
    }


@pytest.mark.parametrize("terminated", [True, False])
def test_beyond_the_end_nothing_is_known_after_a_truncation_and_all_is_zero_after_a_termination(terminated):
    replay = make_replay(50, batch_size=300, unroll_steps=3, td_steps=5, gamma=0.9)
    replay.add(episode_rows(4, 10.0, terminated))
    _, batch = replay.sample(np.random.default_rng(0))
    for row in range(300):
        first = int(batch["obs"][row, 0]) - 10
        assert 0 <= first < 4
        for step in range(4):
            alive = first + step < 4
            assert batch["acting"][row, step] == alive
            assert batch["known"][row, step] == (alive or terminated)
            if step < 3:
                assert batch["reward"][row, step] == (10 + first + step if alive else 0)
                if alive:
                    assert batch["action"][row, step] == (first + step) % 2
    assert set(batch["action"][batch["acting"][:, :-1] == 0]) == {0, 1}


def test_rows_are_drawn_by_priority_and_weighted_against_it():
    replay = make_replay(20, batch_size=20_000, unroll_steps=1)
    replay.add(episode_rows(4, 0.0, True))
    replay.columns["priority"][:4] = [1.0, 2.0, 3.0, 4.0]
    rows, batch = replay.sample(np.random.default_rng(0))
    np.testing.assert_allclose(np.bincount(rows, minlength=4) / 20_000, [0.1, 0.2, 0.3, 0.4], atol=0.015)
    for row in range(4):
        np.testing.assert_allclose(batch["weight"][rows == row], 1 / (row + 1), rtol=1e-6)


def test_the_first_parts_of_long_episodes_are_stored_in_time_for_the_first_update():
    agent = muzero.Agent(
        gym.spaces.Discrete(5), gym.spaces.Discrete(2), small_args(num_envs=4, learning_starts=100, unroll_steps=5)
    )
    for step in range(300):
        for env in range(4):  # no episode ends
            agent.found = [(np.full(2, 0.5), 0.0, np.ones(2, bool))] * 4
            agent.observe(step % 5, 0, 0.0, (step + 1) % 5, False, env=env)
        if step == 24:  # 100 steps have been made, 25 in each environment
            assert agent.replay.added >= 100
    lengths = {int(left) for left in agent.replay.columns["left"][: agent.replay.added]}
    assert max(lengths) == 200  # later parts are longer


def test_where_some_actions_are_not_allowed_no_game_is_cut_for_the_first_update():
    """The last state of a part would keep the value that the network had in the beginning."""
    args = small_args(num_envs=4, learning_starts=100, unroll_steps=5)
    agent = muzero.Agent(gym.spaces.Discrete(5), gym.spaces.Discrete(2), args)
    agent.act_many([0] * 4, [{"action_mask": np.array([0, 1])}] * 4)
    agent.found = [(np.array([0.0, 1.0]), 0.0, np.array([False, True]))] * 4
    for step in range(60):
        agent.observe(0, 1, 0.0, 0, step == 59, env=0)
    assert agent.replay.columns["left"][:61].tolist() == list(range(60, -1, -1))


@pytest.mark.parametrize(("terminated", "following"), [(True, 0.0), (False, 3.0)])
def test_value_error_is_told_for_every_part_of_an_episode(terminated, following):
    args = small_args(gamma=0.5, learning_starts=10**6)
    agent = muzero.Agent(gym.spaces.Discrete(5), gym.spaces.Discrete(2), args)
    agent.heads = lambda latent: (np.zeros(1), np.zeros((1, 2)), np.array([3.0]))
    agent.found = [(np.array([0.5, 0.5]), 1.0, np.ones(2, bool))]
    agent.observe(0, 1, 1.0, 0, False)
    agent.observe(0, 1, 1.0, 0, terminated, not terminated)
    last = 1 + 0.5 * following
    assert agent.logs["planner/value_error"] == pytest.approx((abs(last - 1) + abs(1 + 0.5 * last - 1)) / 2)


def test_replay_keeps_what_follows_a_row_when_it_overwrites():
    replay = make_replay(13, batch_size=200, unroll_steps=4)
    for number in range(9):
        replay.add(episode_rows(5, 100.0 * number, True))
        _, batch = replay.sample(np.random.default_rng(number))
        for row in range(200):
            rewards = batch["reward"][row][batch["acting"][row, :-1] == 1]
            assert (rewards == batch["obs"][row, 0] + np.arange(len(rewards))).all()
    other = make_replay(13)
    other.load_state_dict(replay.state_dict())
    assert other.added == replay.added
    for name, column in replay.columns.items():
        np.testing.assert_array_equal(column, other.columns[name])


# --- images, consistency, reanalyze -----------------------------------------------------------------------------------
def test_convolutional_network_is_that_of_plain_layers():
    args = small_args(channels=3, consistency_weight=1.0)
    parameters = muzero.make_network((30, 26, 2), 4, args, generator())
    assert {"halve_0_weight", "halve_1_weight"} <= set(parameters)
    assert "halve_2_weight" not in parameters  # 30 x 26, 15 x 13, 8 x 7
    obs, action = torch.rand(2, 30, 26, 2, generator=generator(1)), torch.tensor([3, 0])

    def conv(name: str, x: torch.Tensor, stride: int = 1) -> torch.Tensor:
        layer = torch.nn.Conv2d(x.shape[1], 3, 3, stride, 1)
        layer.weight.data, layer.bias.data = parameters[f"{name}_weight"].data, parameters[f"{name}_bias"].data
        return layer(x)

    def block(name: str, x: torch.Tensor) -> torch.Tensor:
        return (x + conv(f"{name}_2", conv(f"{name}_1", x).relu())).relu()

    x = conv("halve_1", conv("halve_0", obs.permute(0, 3, 1, 2), 2).relu(), 2).relu()
    latent = plain_bounded(block("latent", conv("represent", x).relu()).flatten(1)).view(2, 3, 8, 7)
    torch.testing.assert_close(muzero.represent(parameters, obs), latent)
    hidden = (conv("step", latent) + parameters["step_action"][action]).relu()
    following = plain_bounded(block("next_latent", hidden).flatten(1)).view(2, 3, 8, 7)
    torch.testing.assert_close(muzero.dynamics(parameters, latent, action, False), following)
    assert [tuple(logits.shape) for logits in muzero.predict(parameters, following)] == [(2, 11), (2, 11), (2, 4)]
    assert not torch.allclose(*muzero.dynamics(parameters, latent[:1].expand(2, -1, -1, -1), action, False))


class Bright(gym.Env):
    """Pictures of 14 x 15 bytes: 1 for action 0 where the left half is bright, for action 1 where the right half is."""

    metadata: ClassVar = {"render_modes": []}

    def __init__(self, render_mode: str | None = None):
        self.observation_space = gym.spaces.Box(0, 255, (14, 15, 3), np.uint8)
        self.action_space = gym.spaces.Discrete(2)

    def picture(self) -> np.ndarray:
        self.side, picture = int(self.np_random.integers(2)), np.zeros((14, 15, 3), np.uint8)
        picture[:, 8 * self.side : 8 * self.side + 7] = 200
        return picture

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        super().reset(seed=seed)
        return self.picture(), {}

    def step(self, action: int) -> tuple:
        reward = float(action == self.side)
        return self.picture(), reward, False, False, {}


gym.register("Bright-v0", entry_point=Bright, max_episode_steps=10)


def test_pictures_are_learned_from(tmp_path):
    args = small_args(env_id="Bright-v0", run_dir=str(tmp_path), total_timesteps=800, gamma=0.0, channels=4, num_envs=8)
    args = dataclasses.replace(args, updates_per_step=0.5, learning_rate=3e-3, reanalyze_ratio=4.0)
    outcome = muzero.train(args)
    assert outcome["eval_return_mean"] == 10
    state = torch.load(only_run(tmp_path) / "checkpoint.pt", weights_only=True)["agent"]
    assert state["replay"]["obs"].dtype == torch.uint8


def test_consistency_pulls_the_imagined_state_to_the_observation_that_came_but_not_the_other_way():
    args = small_args(value_weight=0.0, consistency_weight=1.0)
    parameters = muzero.make_network((3,), 2, args, generator())
    batch = {name: torch.zeros(4, 3) for name in ("value", "known", "acting")}
    batch |= {"obs": torch.randn(4, 3, generator=generator(1)), "action": torch.tensor([[0, 1]] * 4)}
    batch |= {"policy": torch.full((4, 3, 2), 0.5), "reward": torch.zeros(4, 2), "weight": torch.ones(4)}
    batch |= {"next_obs": torch.randn(4, 2, 3, generator=generator(2)), "acting": torch.tensor([[1.0, 1, 0]] * 4)}
    loss, _, logs = unrolled_loss(parameters, batch | {"acting": torch.zeros(4, 3)}, args)
    assert loss.item() == 0  # beyond the end nothing came
    loss, _, logs = unrolled_loss(parameters, batch, args)
    without, _, _ = unrolled_loss(parameters, batch, dataclasses.replace(args, consistency_weight=0.0))
    assert (loss - without).item() == pytest.approx(logs["consistency_loss"].item(), rel=1e-5)
    assert abs(logs["consistency_loss"].item()) <= 1
    imagined, real = (torch.rand(5, 8, generator=generator(seed), requires_grad=True) for seed in (3, 4))
    first, second = torch.autograd.grad(
        muzero.inconsistency(parameters, imagined, real).sum(), [imagined, real], allow_unused=True
    )
    assert first.abs().sum() > 0
    assert second is None
    # The same by torch's own layers.
    project = plain_layers(parameters, "project", "projection")
    predictor = plain_layers(parameters, "predictor_hidden", "predictor")(project(imagined.double()))
    wanted = -torch.nn.functional.cosine_similarity(predictor, project(real.double()))
    torch.testing.assert_close(muzero.inconsistency(parameters, imagined, real).double(), wanted, atol=1e-5, rtol=1e-4)


def test_vectors_are_standardised_by_the_replay_and_nothing_else_is():
    agent = muzero.Agent(gym.spaces.Box(-1e4, 1e4, (2,)), gym.spaces.Discrete(2), small_args(learning_starts=10**6))
    rows = np.random.default_rng(0).normal((5.0, -300.0), (0.1, 100.0), (41, 2)).astype(np.float32)
    for t in range(40):
        agent.act(rows[t])
        agent.observe(rows[t], 0, 1.0, rows[t + 1], t == 39)
    found = agent.unit(rows)
    np.testing.assert_allclose(found, (rows - rows.mean(0)) / rows.std(0), rtol=1e-3)
    assert agent.unit(np.array([[9.0, -300.0]], np.float32))[0, 0] == 10  # far out is cut
    board = gym.spaces.Box(0, 1, (3, 3, 2))
    for space, obs, network in (
        (gym.spaces.Discrete(3), 1, "mlp"),
        (board, np.ones((3, 3, 2)), "mlp"),
        (board, np.ones((3, 3, 2)), "conv"),
    ):
        agent = muzero.Agent(space, gym.spaces.Discrete(2), small_args(network=network, learning_starts=10**6))
        for t in range(5):
            agent.act(obs)
            agent.observe(obs, 0, 1.0, obs, t == 4)
        np.testing.assert_array_equal(agent.unit(agent.row(obs)), agent.row(obs))


def test_reanalyze_puts_in_what_a_search_finds_now_and_leaves_ends_alone():
    env = gym.make("CartPole-v1", max_episode_steps=7)
    agent = muzero.Agent(env.observation_space, env.action_space, small_args(learning_starts=10**6))
    obs, info = env.reset(seed=0)
    for _ in range(60):
        action = agent.act(obs, info)
        next_obs, reward, terminated, truncated, info = env.step(action)
        agent.observe(obs, action, reward, next_obs, terminated, truncated)
        obs = next_obs
        if terminated or truncated:
            obs, info = env.reset()
    columns, used = agent.replay.columns, agent.replay.added
    before = {name: column[:used].copy() for name, column in columns.items()}
    columns["terminated"][:8] = True  # the first episode
    columns["value"][7] = 0.0
    with torch.no_grad():
        agent.parameters["value_bias"] += torch.randn(agent.parameters["value_bias"].shape, generator=generator(1))
    agent.reanalyze(400)
    rows = np.delete(np.arange(used), 7)
    policy, _, value, _ = agent.plan(columns["obs"][rows], columns["legal"][rows], None)
    np.testing.assert_allclose(columns["value"][rows], value, rtol=1e-4)
    np.testing.assert_allclose(columns["policy"][rows], policy, atol=1e-4)
    taken = columns["policy"][rows, columns["action"][rows]]
    np.testing.assert_array_equal(columns["followed"][rows], taken >= 0.5 * columns["policy"][rows].max(1))
    assert 0 < columns["followed"][rows].mean() < 1
    assert columns["value"][7] == 0
    assert (np.abs(columns["value"][rows] - before["value"][rows]) > 1e-3).mean() > 0.9
    for name in ("obs", "action", "reward", "left", "priority", "legal"):
        np.testing.assert_array_equal(columns[name][:used], before[name])


def test_value_error_is_against_the_rewards_that_came():
    args = small_args(gamma=0.5, follow=1.0, learning_starts=10**6)
    agent = muzero.Agent(gym.spaces.Box(-1, 1, (2,)), gym.spaces.Discrete(2), args)
    values = []
    for t, reward in enumerate((1.0, 2.0, 4.0)):
        agent.act(np.zeros(2))
        _, value, legal = agent.found[0]
        values.append(value)
        agent.found[0] = (np.array([1.0, 0.0]), value, legal)  # today's policy takes none of these actions
        agent.observe(np.zeros(2), 1, reward, np.zeros(2), t == 2)
    wanted = np.abs(np.array([1 + 0.5 * (2 + 0.5 * 4), 2 + 0.5 * 4, 4]) - values).mean()
    assert agent.logs["planner/value_error"] == pytest.approx(wanted)


@pytest.mark.parametrize("won", [True, False])
def test_of_two_players_all_positions_and_all_that_would_follow_tell_who_won(won: bool):
    """The reward of the last move is told by values: 1 where the winner is to move, -1 where the other one is."""
    settings = {"gamma": -1.0, "follow": 0.0, "learning_starts": 10**6, "unroll_steps": 4, "td_steps": 9}
    settings["batch_size"] = 200
    agent = muzero.Agent(gym.spaces.Box(-1, 1, (2,)), gym.spaces.Discrete(2), small_args(**settings))
    legal, length = np.ones(2, bool), 5
    agent.found = [(np.array([0.5, 0.5]), 0.3, legal)]
    for t in range(length):
        agent.observe(np.zeros(2), 1, float(won and t == length - 1), np.zeros(2), t == length - 1)
    assert agent.logs["planner/value_error"] == pytest.approx(np.mean([abs(won * (-1) ** t - 0.3) for t in range(5)]))
    rows, batch = agent.replay.sample(np.random.default_rng(0))
    assert set(rows) == set(range(length))
    for row, value, reward, known in zip(rows, batch["value"], batch["reward"], batch["known"], strict=True):
        assert value.tolist() == [won * (-1.0) ** (length - 1 - row - ahead) for ahead in range(5)]
        assert not reward.any()
        assert known.all()


def test_the_range_of_values_does_not_shrink_where_most_are_alike():
    """Else the noise of a good agent's values would be stretched to the whole of [0, 1]."""
    agent = muzero.Agent(gym.spaces.Box(-1, 1, (2,)), gym.spaces.Discrete(2), small_args(learning_starts=10**6))
    agent.replay.added = 100  # of which the values follow
    agent.replay.columns["value"][:100] = [3.0, *[75.0] * 99]
    agent.measure()
    assert agent.value_range == 75
    agent.replay.columns["value"][:100] = 75.0  # where no episode ends
    agent.measure()
    assert agent.value_range == 75
    agent.replay.columns["value"][:100] = [-9.0, *[-8.0] * 99]
    agent.measure()
    assert agent.value_range == 9


def test_an_agent_knows_whether_some_actions_are_not_allowed():
    agent = muzero.Agent(gym.spaces.Box(-1, 1, (2,)), gym.spaces.Discrete(2), small_args())
    agent.act(np.zeros(2), {})
    assert not agent.masked
    agent.act(np.zeros(2), {"action_mask": np.array([0, 1], np.int8)})
    assert agent.masked


def test_a_mask_in_an_evaluation_does_not_touch_the_agent():
    agent = muzero.Agent(gym.spaces.Box(-1, 1, (2,)), gym.spaces.Discrete(2), small_args())
    agent.greedy_policy(1)(np.zeros(2), {"action_mask": np.array([0, 1], np.int8)})
    assert not agent.masked


def test_no_part_of_an_episode_is_longer_than_value_targets_allow_for():
    agent = muzero.Agent(gym.spaces.Box(-1, 1, (2,)), gym.spaces.Discrete(2), small_args(learning_starts=1_000))
    agent.found = [(np.array([0.5, 0.5]), 0.0, np.array([True, True]))]
    for _ in range(1_000):
        agent.observe(np.zeros(2), 1, 0.0, np.zeros(2), False)
    assert agent.replay.columns["left"].max() == muzero.LONGEST_PART


def test_a_finished_run_whose_last_steps_were_side_by_side_can_be_resumed(tmp_path):
    args = small_args(num_envs=8, total_timesteps=20, learning_starts=10**6, run_dir=str(tmp_path))
    assert muzero.train(args)["env_steps"] == 24
    (folder,) = tmp_path.iterdir()
    assert muzero.train(dataclasses.replace(args, resume=str(folder)))["env_steps"] == 24


@pytest.mark.parametrize("mask", [np.zeros(2, np.int8), np.ones(3, np.int8)])
def test_a_mask_allows_an_action_and_is_as_long_as_there_are_actions(mask):
    agent = muzero.Agent(gym.spaces.Box(-1, 1, (2,)), gym.spaces.Discrete(2), small_args())
    with pytest.raises(muzero.Failure, match="action_mask"):
        agent.act(np.zeros(2), {"action_mask": mask})


@pytest.mark.parametrize(("shape", "wanted"), [((), True), ((4,), True), ((1, 4), True), ((3, 3, 2), False)])
def test_numbers_are_standardised_whatever_their_shape_but_not_boards(shape, wanted):
    agent = muzero.Agent(gym.spaces.Box(-9, 9, shape), gym.spaces.Discrete(2), small_args())
    assert agent.standardises is wanted


def test_an_observation_is_kept_where_the_environment_writes_the_next_one_over_it():
    agent, obs = muzero.Agent(gym.spaces.Box(-9, 9, (2,)), gym.spaces.Discrete(2), small_args()), np.ones(2, np.float32)
    row = agent.row(obs)
    obs[:] = 7
    np.testing.assert_array_equal(row, [1, 1])


def test_the_first_priority_is_that_of_all_steps_where_follow_cuts_off_all_of_them():
    args = small_args(priority_exponent=1.0, follow=0.5, td_steps=5)
    agent = muzero.Agent(gym.spaces.Box(-1, 1, (2,)), gym.spaces.Discrete(2), args)
    policy, legal = np.array([1.0, 0.0]), np.ones(2, bool)  # action 1 is what today's policy would not do
    part = [(np.zeros(2, np.float32), 1, 1.0, policy, 0.0, legal) for _ in range(3)]
    agent.store(part, np.zeros(2, np.float32), True)
    rows = np.arange(3)
    np.testing.assert_array_equal(agent.replay.n_step_returns(rows), 0)  # the search's own values
    np.testing.assert_allclose(agent.replay.columns["priority"][rows], [1 + 0.99 + 0.99**2 + 1e-3, 1.991, 1.001])


@pytest.mark.parametrize(("steps", "wanted"), [(1_000, 1e-4), (2_000, 1e-5), (50_000, 1e-5)])
def test_step_size_falls_to_a_hundredth_and_no_further(steps, wanted):
    args = small_args(learning_rate=1e-3, decay_steps=1_000, learning_starts=10**6, updates_per_step=1)
    agent = muzero.Agent(gym.spaces.Box(-1, 1, (2,)), gym.spaces.Discrete(2), args)
    for t in range(10):
        agent.act(np.zeros(2))
        agent.observe(np.zeros(2), 0, 1.0, np.zeros(2), t == 9)
    args.learning_starts, agent.steps, agent.updates, agent.searched_again = 1, steps, steps - 2, 10**9
    agent.update()
    assert agent.optimizer.param_groups[0]["lr"] == pytest.approx(wanted)


def test_states_after_an_end_are_not_searched():
    replay = make_replay(20)
    replay.add(episode_rows(3, 0.0, False))
    replay.add(episode_rows(3, 0.0, True))
    assert set(replay.unfinished(500, np.random.default_rng(0))) == {0, 1, 2, 3, 4, 5, 6}


@pytest.mark.parametrize("masked", [False, True])
def test_the_state_after_a_truncation_is_valued_anew(masked: bool, monkeypatch):
    """By a search, or by the network where it is not known which actions are allowed."""
    agent = muzero.Agent(gym.spaces.Box(-1, 1, (2,)), gym.spaces.Discrete(2), small_args())
    info = {"action_mask": np.array([1, 1])} if masked else {}
    for t in range(3):
        agent.act(np.full(2, t / 4), info)
        agent.observe(np.full(2, t / 4), 0, 1.0, np.full(2, 3 / 4), False, t == 2)
    columns, searched = agent.replay.columns, []
    columns["value"][:4] = 100
    plan = agent.plan
    monkeypatch.setattr(agent, "plan", lambda rows, *rest: searched.extend(rows[:, 0]) or plan(rows, *rest))
    agent.reanalyze(100)
    assert (3 / 4 in searched) != masked
    assert np.abs(columns["value"][:4]).max() < 50
    if masked:
        np.testing.assert_allclose(columns["value"][3], agent.predict(columns["obs"][3:4])[2], rtol=1e-6)


@pytest.mark.parametrize("num_envs", [1, 8, 64, 256])
def test_however_many_environments_there_are_the_replay_is_fed(num_envs: int):
    args = small_args(learning_starts=500, num_envs=num_envs, replay_size=100_000)
    agent = muzero.Agent(gym.spaces.Box(-1, 1, (2,)), gym.spaces.Discrete(2), args)
    agent.found, waited, before = num_envs * [(np.array([0.5, 0.5]), 0.0, np.array([True, True]))], 0, 0
    for step in range(0, 10_000, num_envs):
        for env in range(num_envs):
            agent.observe(np.zeros(2), 1, 0.0, np.zeros(2), False, env=env)
        if agent.replay.added > before:
            before = agent.replay.added
            waited = step
        assert step - waited <= max(muzero.LONGEST_WAIT, num_envs * args.unroll_steps)
    assert agent.replay.added > 10_000 - 2 * muzero.LONGEST_WAIT


@pytest.mark.parametrize(("actions", "some"), [(4, False), (5, True)])
def test_an_old_position_is_searched_with_noise_where_not_all_actions_are_tried(actions: int, some: bool, monkeypatch):
    args = small_args(max_considered=4, num_simulations=8)
    agent = muzero.Agent(gym.spaces.Box(-1, 1, (2,)), gym.spaces.Discrete(actions), args)
    agent.act(np.zeros(2))
    agent.observe(np.zeros(2), 0, 1.0, np.zeros(2), False, True)
    seen, plan = [], agent.plan
    monkeypatch.setattr(agent, "plan", lambda rows, legal, rng: seen.append(rng) or plan(rows, legal, rng))
    agent.reanalyze(4)
    assert seen == [agent.rng if some else None]


# --- copies, spaces, values -------------------------------------------------------------------------------------------
def live(agent: muzero.Agent, env_id: str, steps: int) -> list[int]:
    """The actions of an agent in a loop of one's own."""
    env, actions = gym.make(env_id), []
    obs, info = env.reset(seed=3)
    for _ in range(steps):
        actions.append(agent.act(obs, info))
        next_obs, reward, terminated, truncated, info = env.step(actions[-1])
        agent.observe(obs, actions[-1], reward, next_obs, terminated, truncated)
        agent.update()
        obs = next_obs
        if terminated or truncated:
            obs, info = env.reset()
    return actions


def restored(agent: muzero.Agent) -> muzero.Agent:
    """The same by its state, through a file."""
    torch.save(agent.state_dict(), file := io.BytesIO())
    file.seek(0)
    other = muzero.Agent(agent.space, gym.spaces.Discrete(agent.num_actions), agent.args)
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


@pytest.mark.parametrize("env_id", ["CartPole-v1", "TicTacToe-v0", "Bright-v0"])
@pytest.mark.parametrize("remade", [copy.deepcopy, lambda agent: pickle.loads(pickle.dumps(agent)), restored])
def test_a_copy_goes_on_as_the_original_and_its_search_sees_its_own_weights(env_id, remade):
    env, fields = gym.make(env_id), {"gamma": -1.0, "search": "puct"} if env_id == "TicTacToe-v0" else {}
    args = small_args(channels=4, updates_per_step=0.5, reanalyze_ratio=4.0, **fields)
    agent = muzero.Agent(env.observation_space, env.action_space, args)
    live(agent, env_id, 80)
    other = remade(agent)
    before = other.updates
    assert live(other, env_id, 60) == live(agent, env_id, 60)
    assert other.updates > before
    for name, parameter in other.parameters.items():
        np.testing.assert_array_equal(np.asarray(other.view[name]), parameter.detach().numpy())
        assert torch.equal(parameter, agent.parameters[name])
    for name, column in other.replay.columns.items():
        np.testing.assert_array_equal(column, agent.replay.columns[name])


@pytest.mark.parametrize(
    ("space", "shape", "dtype", "standardises"),
    [
        (gym.spaces.Box(0, 255, (20, 30, 3), np.uint8), (20, 30, 3), np.uint8, False),
        (gym.spaces.Box(0, 255, (20, 30), np.uint8), (20, 30, 1), np.uint8, False),
        (gym.spaces.Box(0, 255, (6,), np.uint8), (6,), np.float32, True),
        (gym.spaces.Box(0, 1, (3, 3, 2), np.uint8), (3, 3, 2), np.float32, False),
        (gym.spaces.Box(0, 1, (4, 4), np.uint8), (16,), np.float32, True),
        (gym.spaces.Discrete(5), (5,), np.float32, False),
    ],
)
def test_bytes_are_a_picture_only_where_their_space_is_that_of_one(space, shape, dtype, standardises):
    agent = muzero.Agent(space, gym.spaces.Discrete(2), small_args(channels=4))
    assert (agent.obs_shape, agent.replay.columns["obs"].dtype, agent.standardises) == (shape, dtype, standardises)
    row = agent.row(space.sample())
    unit = agent.unit(row)
    if dtype == np.uint8:
        np.testing.assert_allclose(unit, row.astype(np.float32) / 255)
    else:
        np.testing.assert_array_equal(unit, row.clip(-10, 10) if standardises else row)  # nothing is measured so far
    assert agent.act(space.sample()) in (0, 1)


def test_a_board_of_bytes_is_learned_from(tmp_path):
    class Tell(gym.Env):
        """Which of the two fields has a stone?"""

        observation_space, action_space = gym.spaces.Box(0, 1, (1, 2, 1), np.uint8), gym.spaces.Discrete(2)

        def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
            super().reset(seed=seed)
            self.side = int(self.np_random.integers(2))
            return np.eye(2, dtype=np.uint8)[self.side].reshape(1, 2, 1), {}

        def step(self, action: int) -> tuple:
            reward = float(action == self.side)
            return self.reset()[0], reward, False, False, {}

    args = small_args(run_dir=str(tmp_path), total_timesteps=800, gamma=0.0, num_envs=8, network="mlp")
    args = dataclasses.replace(args, updates_per_step=0.5, learning_rate=3e-3, reanalyze_ratio=4.0)
    assert muzero.train(args, lambda render_mode=None: gym.wrappers.TimeLimit(Tell(), 10))["eval_return_mean"] == 10


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 8, 9), (5, 40, 40)])
def test_pictures_with_their_channels_first_are_refused(shape):
    with pytest.raises(muzero.Failure, match=r"must be \(height, width\) or \(height, width, channels\)"):
        muzero.Agent(gym.spaces.Box(0, 255, shape, np.uint8), gym.spaces.Discrete(2), small_args())


def test_actions_are_of_the_kind_that_spaces_draw():
    space = gym.spaces.Discrete(3, start=5)
    agent = muzero.Agent(gym.spaces.Box(-1, 1, (2,)), space, small_args())
    for action in (agent.act(np.zeros(2)), agent.greedy_policy(1)(np.zeros(2))):
        assert type(action) is type(space.sample())
        assert space.contains(action)


def test_what_is_logged_is_new():
    env = gym.make("CartPole-v1")
    agent = muzero.Agent(env.observation_space, env.action_space, small_args(updates_per_step=0.5))
    live(agent, "CartPole-v1", 80)
    names = {"value_loss", "policy_loss", "reward_loss", "consistency_loss"}
    values = agent.metrics()
    assert names == {tag.removeprefix("losses/") for tag in values if tag.startswith("losses/")}
    assert all(isinstance(value, float) for value in values.values())
    assert agent.metrics() == {}


@pytest.mark.parametrize(
    "fields",
    [
        *({name: math.nan} for name in ("gamma", "learning_rate", "follow", "temperature", "reanalyze_ratio")),
        *(
            {name: 0}
            for name in ("total_timesteps", "num_envs", "num_simulations", "support", "temperature", "threads")
        ),
        *[{"gamma": -0.5}, {"gamma": 1.1}, {"seed": -1}, {"td_steps": 201}, {"replay_size": 1}, {"latent_size": 1}],
        *[{"follow": 1.1}, {"repeat": -0.1}, {"min_range": 2.0}, {"updates_per_step": math.inf}],
    ],
)
def test_numbers_out_of_range_are_refused(fields):
    with pytest.raises(muzero.Failure, match="--" + next(iter(fields)).replace("_", "-")):
        muzero.Args(**fields)


def test_the_presets_are_valid():
    for env_id, fields in muzero.PRESETS.items():
        assert muzero.Args(env_id=env_id, **fields).num_envs in (8, 32)


# --- board games ------------------------------------------------------------------------------------------------------
def board(**options: object) -> gym.Env:
    return gym.make("TicTacToe-v0", **options)


def test_moves_of_tic_tac_toe():
    env = board(render_mode="ansi")
    obs, info = env.reset(seed=0)
    assert obs.shape == (3, 3, 2)
    assert info["action_mask"].tolist() == [1] * 9
    for action, own, other in ((4, [], [4]), (0, [4], [0]), (3, [0], [3, 4]), (1, [3, 4], [0, 1])):
        obs, reward, terminated, _, info = env.step(action)
        assert (reward, terminated) == (0, False)
        assert obs[..., 0].reshape(-1).nonzero()[0].tolist() == own
        assert obs[..., 1].reshape(-1).nonzero()[0].tolist() == other
        assert not info["action_mask"][action]
    assert env.render() == "O O .\nX X .\n. . ."
    with pytest.raises(ValueError, match="not allowed"):
        env.step(4)
    _, reward, terminated, _, _ = env.step(5)
    assert (reward, terminated) == (1, True)


def test_every_game_of_tic_tac_toe_has_its_known_end():
    """255,168 games: 131,184 won by the first, 77,904 by the second player, 46,080 drawn; counted by positions."""
    env = board().unwrapped

    @functools.cache
    def count(own: int, other: int, turn: int) -> tuple[int, int, int]:
        if turn == 9:
            return 0, 0, 1
        total = np.zeros(3, int)
        for _, after, won in env.moves(own, other):
            total += (turn % 2 == 0, turn % 2 == 1, 0) if won else count(other, after, turn + 1)
        return tuple(total.tolist())

    assert count(0, 0, 0) == (131_184, 77_904, 46_080)


def test_connect_four_falls_and_wins_in_all_directions():
    env = gym.make("KInARow-v0", render_mode="ansi")
    for moves, wins in (
        ([0, 0, 1, 1, 2, 2, 3], True),  # a row
        ([0, 1, 0, 1, 0, 1, 0], True),  # a column
        ([0, 1, 1, 2, 2, 3, 2, 3, 3, 5, 3], True),  # a diagonal
        ([3, 2, 2, 1, 1, 0, 1, 0, 0, 5, 0], True),  # the other one
        ([0, 1, 2, 3, 4, 5], False),
    ):
        env.reset()
        for move in moves:
            _, reward, terminated, _, _ = env.step(move)
        assert (reward, terminated) == (float(wins), wins)
    env.reset()
    for _ in range(6):
        _, _, _, _, info = env.step(0)
    assert info["action_mask"].tolist() == [0, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("seed", range(3))
def test_opponent_plays_perfectly_where_it_looks_to_the_end_and_badly_where_it_does_not(seed):
    results = {}
    for opponent in ("random", "benchmark.tic_tac_toe:perfect"):
        env, returns = board(opponent=opponent), []
        env.action_space.seed(seed)
        for game in range(40):
            (_, info), done = env.reset(seed=100 * seed + game), False
            while not done:
                _, reward, done, _, info = env.step(env.action_space.sample(info["action_mask"]))
            returns.append(reward)
        results[opponent] = returns
    random, perfect = results.values()
    assert max(perfect) <= 0
    assert np.mean(perfect) < -0.6
    assert abs(np.mean(random)) < 0.4
    assert {0.0, 1.0, -1.0} == set(random)


class TrueGame:
    """The rules of tic-tac-toe as a model: a latent state is (own, other, over)."""

    env = board().unwrapped

    def __call__(self, latent: np.ndarray, action: np.ndarray) -> tuple[np.ndarray, ...]:
        following, rewards, logits = [], [], np.full((len(latent), 9), -50.0)
        for row, ((own, other, over), move) in enumerate(zip(latent.astype(int), action, strict=True)):
            options = {a: (after, won) for a, after, won in self.env.moves(own, other)}
            if over or move not in options:
                following.append((own, other, 1))
                rewards.append(0.0 if over else -1.0)  # who does what is not allowed has lost
            else:
                after, won = options[move]
                following.append((other, after, won or len(options) == 1))
                rewards.append(float(won))
                logits[row, [a for a, _, _ in self.env.moves(other, after)]] = 0.0
        return np.array(following, float), np.array(rewards), logits, np.zeros(len(latent))


def test_search_with_the_true_rules_reaches_the_minimax_value():
    env, rng = board().unwrapped, np.random.default_rng(0)
    positions = []
    while len(positions) < 12:  # positions of the middle of a game
        own, other = 0, 0
        for _ in range(4):
            options = [after for _, after, won in env.moves(own, other) if not won]
            own, other = other, options[rng.integers(len(options))]
        positions.append((own, other, 0))
    legal = np.array([[bool(~(own | other) >> field & 1) for field in range(9)] for own, other, _ in positions])
    simulations = 5_000
    latent, zeros = np.array(positions, float), np.zeros(len(positions))
    tree = Tree(latent, np.zeros((len(positions), 9)), zeros, legal, -1.0, simulations)
    _, action = muzero_search(TrueGame(), tree)
    for (own, other, _), chosen in zip(positions, action, strict=True):
        foresee = functools.partial(tic_tac_toe.foresee, env, other, plies=9)
        values = {a: 1.0 if won else -foresee(after) for a, after, won in env.moves(own, other)}
        assert np.sign(values[chosen]) == np.sign(max(values.values()))


def test_a_large_board_can_be_drawn():
    env = muzero.KInARow(9, 9, 5, render_mode="ansi")
    env.reset(seed=0)
    for field in (80, 0, 79):
        env.step(field)
    assert env.render().split("\n")[-1].split() == 7 * ["."] + 2 * ["X"]
    assert env.render().split("\n")[0].split() == ["O"] + 8 * ["."]


def test_what_is_foreseen_is_the_end_of_the_best_play_and_soon_is_better_than_late():
    game = muzero.KInARow()

    def field(*numbers: int) -> int:
        return sum(1 << number for number in numbers)

    assert tic_tac_toe.foresee(game, 0, 0, 9) == 0
    assert tic_tac_toe.foresee(game, field(0, 1), field(4, 5), 9) == 1
    assert tic_tac_toe.foresee(game, field(0, 4), field(1, 2), 1) == 1
    assert tic_tac_toe.foresee(game, field(4), field(0, 1), 1) == 0  # nothing yet within one move
    assert tic_tac_toe.foresee(game, field(0, 8), field(4, 2), 2) == 0
    assert tic_tac_toe.foresee(game, field(0, 8), field(4, 2), 3) == pytest.approx(0.99**2)  # 6 blocks and forks
    assert tic_tac_toe.foresee(game, field(4, 2), field(0, 6, 8), 9) == pytest.approx(-0.99)


@pytest.mark.parametrize("opponent", ["nobody", "benchmark.tic_tac_toe:nobody", "no_module:reply"])
def test_an_opponent_that_there_is_not_is_told_in_one_line(tmp_path, monkeypatch, capsys, opponent):
    args = ["--env-id", "TicTacToe-v0", "--eval-env-kwargs", "opponent", opponent, "--run-dir", tmp_path]
    with pytest.raises(SystemExit, match="2"):
        run_script(muzero, monkeypatch, *args)
    (line,) = capsys.readouterr().err.splitlines()
    assert opponent.split(":")[-1] in line or opponent.split(":")[0] in line
    assert not any(tmp_path.iterdir())


def trained(folder: Path, **fields: object) -> str:
    """The folder of a short run of tic-tac-toe."""
    fields = {"env_id": "TicTacToe-v0", "gamma": -1.0, "total_timesteps": 60, "eval_episodes": 2} | fields
    muzero.train(small_args(**fields, run_dir=str(folder)))
    return str(only_run(folder))


def test_play_in_the_terminal(tmp_path, monkeypatch, capsys):
    run, moves = trained(tmp_path), [*range(9)] * 3
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{field}\n" for field in moves) + "x\n\n"))
    capsys.readouterr()
    tic_tac_toe.play(run)
    printed = capsys.readouterr().out
    assert "Your move: " in printed
    assert "Allowed are" in printed
    assert "My move: " in printed
    assert "search of 3 simulations" in printed
    assert "You have won.\n" in printed or "You have lost.\n" in printed or "A draw" in printed
    assert "You have won" in printed.splitlines()[-1]


@pytest.mark.parametrize(
    "fields", [{"env_id": "Corridor-v0", "gamma": 0.9}, {"gamma": 0.9, "env_kwargs": {"opponent": "random"}}]
)
def test_only_agents_of_self_play_can_be_played_against(tmp_path, fields):
    with pytest.raises(muzero.Failure, match="not a run of a board game in self-play"):
        tic_tac_toe.play(trained(tmp_path, **fields))


@pytest.mark.parametrize("fields", [{"gamma": 0.9}, {"gamma": -1.0, "env_kwargs": {"opponent": "random"}}])
def test_self_play_and_gamma_belong_together(tmp_path, fields):
    with pytest.raises(muzero.Failure, match="--gamma must be -1 in self-play"):
        muzero.train(small_args(env_id="TicTacToe-v0", run_dir=str(tmp_path), **fields))
    assert not any(tmp_path.iterdir())


def test_a_board_game_is_evaluated_against_random_moves_or_whom_one_names(tmp_path):
    args = small_args(env_id="TicTacToe-v0", gamma=-1.0, total_timesteps=20, eval_episodes=12, run_dir=str(tmp_path))
    outcome = muzero.train(args)
    assert -1 <= outcome["eval_return_mean"] < 1
    agent = muzero.load(only_run(tmp_path))
    make = functools.partial(muzero.make_env, args)
    run = muzero.Run(dataclasses.replace(args, evaluate=str(only_run(tmp_path))), agent, [], make)
    assert [env.unwrapped.opponent for env in run.eval_envs] == [muzero.random_move] * 12
    assert np.mean([episode.episodic_return for episode in run.play()[0]]) == outcome["eval_return_mean"]
    named = dataclasses.replace(run.args, eval_env_kwargs={"opponent": "benchmark.tic_tac_toe:perfect"})
    returns = [episode.episodic_return for episode in muzero.Run(named, agent, [], make).play()[0]]
    assert max(returns) <= 0
    assert np.mean(returns) < outcome["eval_return_mean"]


def test_actions_that_are_not_allowed_get_neither_noise_nor_visits_nor_policy():
    for search in ("puct", "gumbel"):
        agent = muzero.Agent(board().observation_space, board().action_space, small_args(search=search, gamma=-1.0))
        env = board()
        (obs, info), done = env.reset(seed=0), False
        while not done:
            action = agent.act(obs, info)
            policy, _, legal = agent.found[0]
            assert (policy[~legal] == 0).all()
            assert legal.tolist() == info["action_mask"].astype(bool).tolist()
            next_obs, reward, done, _, info = env.step(action)  # raises for what is not allowed
            agent.observe(obs, action, reward, next_obs, done)
            obs = next_obs


def test_a_low_temperature_takes_the_most_visited_action():
    env = gym.make("CartPole-v1")
    args = small_args(search="puct", temperature=1e-3, num_simulations=9)
    agent = muzero.Agent(env.observation_space, env.action_space, args)
    obs, _ = env.reset(seed=0)
    for _ in range(20):
        policy, action, _, _ = agent.plan(agent.row(obs)[None], np.ones((1, 2), bool), agent.rng)
        assert action[0] == policy[0].argmax()


def test_episodes_of_an_evaluation_are_the_same_side_by_side_as_one_after_the_other(tmp_path):
    """Also those that end early, and those that are cut off at the time limit."""
    env_kwargs = {"max_episode_steps": 12}
    args = small_args(env_kwargs=env_kwargs, eval_episodes=7, num_simulations=9, evaluate=str(tmp_path))
    alone = muzero.make_env(args)
    agent = muzero.Agent(alone.observation_space, alone.action_space, args)
    run = muzero.Run(args, agent, [], functools.partial(muzero.make_env, args))
    for _ in range(2):  # always the same
        episodes, frames = run.play()
        policy = agent.greedy_policy(0)
        for index, episode in enumerate(episodes):
            (obs, info), done = alone.reset(seed=muzero.seed_of(args.seed, 2, index, 0)), False
            actions = []
            while not done:
                actions.append(policy(obs, info))
                obs, _, terminated, truncated, info = alone.step(actions[-1])
                done = terminated or truncated
            assert episode.actions == actions
            np.testing.assert_array_equal(episode.obs, obs)
        assert frames == []
        assert len({len(episode.actions) for episode in episodes}) > 1


def test_environments_of_evaluations_have_more_options(tmp_path):
    limits = {"env_kwargs": {"max_episode_steps": 9}, "eval_env_kwargs": {"max_episode_steps": 3}}
    muzero.train(
        small_args(env_id="Corridor-v0", **limits, total_timesteps=60, capture_video=True, run_dir=str(tmp_path))
    )
    logged = scalars(only_run(tmp_path))
    assert [value for tag, _, value in logged if tag == "eval/episodic_length"] == [3]
    assert 3 < max(value for tag, _, value in logged if tag == "charts/episodic_length") <= 9
    (video,) = only_run(tmp_path).glob("*.gif")
    with muzero.Image.open(video) as film:
        assert film.n_frames <= 3  # pictures that are the same follow each other as one


def test_environments_that_a_caller_makes_are_also_those_of_evaluations(tmp_path):
    made = []

    def make(render_mode: str | None = None) -> gym.Env:
        made.append(Bright(render_mode))
        return gym.wrappers.TimeLimit(made[-1], 6)

    args = small_args(total_timesteps=20, run_dir=str(tmp_path), channels=4, eval_episodes=3)
    outcome = muzero.train(args, make)
    assert len(made) >= args.num_envs + 3
    folder = str(only_run(tmp_path))
    again = muzero.train(dataclasses.replace(args, resume=folder, total_timesteps=40), make)
    assert (outcome["env_steps"], again["env_steps"]) == (20, 40)
    spaces = made[0].observation_space, made[0].action_space
    assert muzero.load(folder, *spaces).steps == 40


def test_self_play_repeats_an_action_as_often_as_told_where_that_is_allowed_and_evaluation_does_not():
    space, nothing = gym.spaces.Box(-1, 1, (2,)), np.zeros(2)
    agent = muzero.Agent(space, gym.spaces.Discrete(50), small_args(repeat=0.7, learning_starts=10**6))
    tree = Tree(np.zeros((1, 1)), np.zeros((1, 50)), np.zeros(1), np.ones((1, 50), bool), 1.0, 1)
    agent.plan = lambda rows, legal, rng: (np.full((1, 50), 0.02), np.array([next(found) % 50]), np.zeros(1), tree)
    found, last, repeated = iter(range(10**6)), None, []
    for t in range(1_000):
        action = agent.act(nothing)
        if last is not None:
            repeated.append(action == last)
        agent.observe(nothing, action, 0.0, nothing, t % 10 == 9)
        last = None if t % 10 == 9 else action  # an episode does not go on with what the one before did
    assert np.mean(repeated) == pytest.approx(0.7, abs=0.05)
    agent.act(nothing)
    agent.observe(nothing, 7, 0.0, nothing, False)
    mask, found = np.arange(50) != 7, iter(range(8, 50))
    assert all(agent.act(nothing, {"action_mask": mask}) != 7 for _ in range(20))
    assert all(agent.act_greedily([nothing], [{}]) != [7] for _ in range(20))


# --- learning -------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_it_learns_with_the_settings_of_the_command_line(tmp_path):
    assert muzero.train(muzero.Args(run_dir=str(tmp_path)))["eval_return_mean"] >= 475


@pytest.mark.slow
def test_it_learns_tic_tac_toe(tmp_path):
    """The settings of the command line; all games that an opponent can choose."""
    muzero.train(muzero.Args(env_id="TicTacToe-v0", **muzero.PRESETS["TicTacToe-v0"], run_dir=str(tmp_path)))
    game, policies = tic_tac_toe.policies_of(only_run(tmp_path))
    for first in (True, False):
        (won, drawn, lost), (wins, _, _) = tic_tac_toe.count_games(game, policies["search"], first)
        assert lost <= 0.01 * (won + drawn + lost)
        assert wins >= (0.95 if first else 0.8)


@pytest.mark.slow
def test_it_lands_on_the_moon(tmp_path):
    pytest.importorskip("Box2D")
    fields = muzero.PRESETS["LunarLander-v3"] | {"env_id": "LunarLander-v3", "run_dir": str(tmp_path)}
    assert muzero.train(muzero.Args(**fields, eval_episodes=20))["eval_return_mean"] >= 150


@pytest.mark.parametrize("count", [3, 12])  # with 3 one action is tried once
def test_the_tree_that_is_printed_has_all_simulations(count):
    args = tiny_args(muzero, num_simulations=count)
    agent = muzero.Agent(gym.spaces.Box(-1, 1, (3,), np.float32), gym.spaces.Discrete(2), args)
    first, *lines = tic_tac_toe.tree_text(agent, np.zeros(agent.obs_shape, np.float32), None, levels=2).splitlines()
    assert first.startswith(f"search of {count} simulations: value ")
    visits = [(len(line) - len(line.lstrip()), int(line.split()[1])) for line in lines]
    assert sum(number for indent, number in visits if indent == 4) == count
    behind = [number for indent, number in visits if indent == 8]
    assert sum(behind) == count - sum(indent == 4 for indent, _ in visits)  # the first visit of a child ends there
