"""muzero.py against mctx's golden values, slow scalar references, brute force and finite differences."""

import math
import os

import numpy as np
import pytest
import torch
from conftest import tiny_args
from hypothesis import given
from hypothesis import strategies as st

import muzero
from muzero import (
    Replay,
    Tree,
    gumbel_search,
    muzero_search,
    scale,
    two_hot,
    unrolled_loss,
    unscale,
)

GOLDEN = os.environ.get("MCTX_GOLDEN")


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
@pytest.mark.skipif(not GOLDEN, reason="MCTX_GOLDEN does not name the file")
@pytest.mark.parametrize("name", ["a2", "a4", "a9_two_player"])
def test_search_takes_the_steps_of_mctx(name):
    with np.load(GOLDEN) as file:
        golden = {key.split("/")[1]: file[key] for key in file.files if key.startswith(f"{name}/")}
    discount, count, legal = float(golden["discount"]), int(golden["sims"]), golden["mask"]
    model = Model(legal.shape[1], discount, **{key: golden[key] for key in ("W", "b", "wr", "wv", "wp")})

    def tree() -> Tree:
        return Tree(golden["h0"], golden["root_logits"], golden["root_value"], legal, count)

    searched = tree()
    policy, _ = muzero_search(model, searched, legal, discount, count)
    np.testing.assert_array_equal(searched.edge_visits[searched.roots], golden["muzero_visit_counts"])
    np.testing.assert_allclose(searched.value[searched.roots], golden["muzero_root_value"], atol=1e-4)
    np.testing.assert_allclose(policy, golden["muzero_visit_counts"] / count)
    visited = golden["muzero_visit_counts"] > 0
    np.testing.assert_allclose(searched.q[searched.roots][visited], golden["muzero_qvalues"][visited], atol=1e-4)

    searched = tree()
    policy, action = gumbel_search(model, searched, legal, discount, count, np.zeros(legal.shape), 16)
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
    tree = Tree(h, logits, value, legal, count)
    muzero_search(model, tree, legal, discount, count)
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
        tree = Tree(h[rows], logits[rows], value[rows], legal[rows], count)
        common = model, tree, legal[rows], 0.95, count
        policy, action = (
            muzero_search(*common) if search == "puct" else gumbel_search(*common, np.zeros((len(tree.roots), 3)), 4)
        )
        return policy, action, tree.value[tree.roots]

    together = run(slice(None))
    for row in range(7):
        for one, many in zip(run(slice(row, row + 1)), together, strict=True):
            np.testing.assert_allclose(one[0], many[row], rtol=1e-5)


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
        tree = Tree(np.arange(200.0)[:, None], logits, value, legal, simulations)
        gumbel = rng.gumbel(size=(200, 6))
        policy, action = gumbel_search(bandit, tree, legal, 0.0, simulations, gumbel, 6)
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


def returns_of(rewards: list[float], values: list[float], terminated: bool, n: int, gamma: float) -> list[float]:
    """The n-step returns of one episode in a replay, where it does not begin at the first row."""
    length, columns = len(rewards), episode_rows(len(rewards), 0.0, terminated)
    columns |= {"reward": np.array([*rewards, 0.0]), "value": np.array(values)}
    replay = Replay((1,), np.float32, 2, length + 4)
    replay.add(episode_rows(3, 7.0, True))
    replay.add(columns)
    rows = (4 + np.arange(length + 1)) % (length + 4)
    return replay.n_step_returns(rows, n, gamma).tolist()


def test_returns_by_hand():
    rewards, values = [1.0, 2.0, 4.0], [10.0, 20.0, 30.0, 40.0]
    wanted = [1 + 0.5 * 2 + 0.25 * 30, 2 + 0.5 * 4 + 0.25 * 40, 4 + 0.5 * 40, 40]
    assert returns_of(rewards, values, False, 2, 0.5) == wanted
    assert returns_of(rewards, [*values[:3], 0.0], True, 9, 0.5) == [1 + 1 + 1, 2 + 2, 4, 0]
    assert returns_of(rewards, values, False, 2, 0.0) == [1, 2, 4, 40]
    # Two players: what follows is good for the other one.
    assert returns_of([0.0, 0.0, 1.0], [0.0] * 4, True, 9, -1.0) == [1, -1, 1, 0]
    assert returns_of([0.0, 0.0], [0.0, 0.0, 0.5], False, 2, -1.0) == [0.5, -0.5, 0.5]


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=12), st.integers(1, 14), st.sampled_from([1.0, 0.9, -1.0, -0.5]))
def test_returns_are_those_of_brute_force(rewards, n, gamma):
    values = [math.sin(index) for index in range(len(rewards) + 1)]
    for t, found in enumerate(returns_of(rewards, values, False, n, gamma)):
        end, total, factor = min(t + n, len(rewards)), 0.0, 1.0
        for reward in rewards[t:end]:
            total, factor = total + factor * reward, factor * gamma
        assert found == pytest.approx(total + factor * values[end], abs=1e-5)


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
    _, parameters = muzero.make_network((3,), 2, small_args(), generator())
    view = {name: parameter.detach().numpy() for name, parameter in parameters.items()}
    obs, action = torch.randn(5, 3, generator=generator(1)), torch.tensor([0, 1, 1, 0, 1])
    latent = plain_bounded(plain_layers(parameters, "represent", "latent")(obs.double()))
    joined = torch.cat([latent, torch.nn.functional.one_hot(action, 2)], dim=-1)
    following = plain_bounded(plain_layers(parameters, "step", "next_latent")(joined))
    for weights, kind in ((parameters, lambda x: x), (view, lambda x: x.numpy())):
        first = muzero.represent(weights, kind(obs))
        second = muzero.step(weights, first, kind(action))
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


def test_gradient_is_halved_where_a_latent_state_enters_the_dynamics_and_nowhere_else():
    net, network = muzero.make_network((3,), 2, small_args(), generator())
    network = network.double()
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
    loss, _, _ = unrolled_loss(net, network, batch, 0.25)
    (gradient,) = torch.autograd.grad(loss, [network["latent_bias"]])

    def losses() -> torch.Tensor:
        """The weighted losses of steps 0, 1 and 2, written out."""
        latent, parts = muzero.represent(network, obs), []
        for index in range(3):
            if index:
                latent = muzero.step(network, latent, action[:, index - 1])
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
    replay = Replay((1,), np.float32, 2, 50)
    replay.add(episode_rows(4, 10.0, terminated))
    _, batch = replay.sample(300, 3, 5, 0.9, np.random.default_rng(0))
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
    replay = Replay((1,), np.float32, 2, 20)
    replay.add(episode_rows(4, 0.0, True))
    replay.columns["priority"][:4] = [1.0, 2.0, 3.0, 4.0]
    rows, batch = replay.sample(20_000, 1, 5, 0.9, np.random.default_rng(0))
    np.testing.assert_allclose(np.bincount(rows, minlength=4) / 20_000, [0.1, 0.2, 0.3, 0.4], atol=0.015)
    for row in range(4):
        np.testing.assert_allclose(batch["weight"][rows == row], 1 / (row + 1), rtol=1e-6)


def test_replay_keeps_what_follows_a_row_when_it_overwrites():
    replay = Replay((1,), np.float32, 2, 13)
    for number in range(9):
        replay.add(episode_rows(5, 100.0 * number, True))
        _, batch = replay.sample(200, 4, 5, 0.9, np.random.default_rng(number))
        for row in range(200):
            rewards = batch["reward"][row][batch["acting"][row, :-1] == 1]
            assert (rewards == batch["obs"][row, 0] + np.arange(len(rewards))).all()
    other = Replay((1,), np.float32, 2, 13)
    other.load_state_dict(replay.state_dict())
    assert other.added == replay.added
    for name, column in replay.columns.items():
        np.testing.assert_array_equal(column, other.columns[name])
