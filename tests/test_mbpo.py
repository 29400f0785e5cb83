"""mbpo.py against numerical integration, hand-made transitions and brute force, and the traps."""

import copy
import inspect
import math
import pickle
import re
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import only_run, plain, scalars, tiny_args
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import cem_mpc
import mbpo
from mbpo import Actor, Agent, Args, Critic, Planner, Pool, actor_loss, critic_loss, rollout_length

OBS, ACTION = 3, 2


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small_args(**fields: object) -> Args:
    return tiny_args(mbpo, **fields)


def box(size: int) -> gym.spaces.Box:
    return gym.spaces.Box(-1.0, 1.0, (size,), np.float32)


def small_agent(steps: int = 0, **fields: object) -> Agent:
    """An agent that has seen so many random transitions, a tenth of them terminations."""
    agent, rng = Agent(box(OBS), box(ACTION), small_args(**fields)), np.random.default_rng(0)
    for step in range(steps):
        obs, action = rng.normal(size=OBS), rng.uniform(-1, 1, ACTION)
        agent.observe(obs, action, obs[0], obs + 0.1 * action.sum(), step % 10 == 9)
    return agent


def planner(agent: Agent, chunk: int, seed: int = 0) -> Planner:
    """The agent's planner with random numbers of its own, and so many rows at once."""
    made = Planner(agent.model, agent.actor, agent.args, generator(seed))
    made.chunk = chunk
    return made


def fill_pool(agent: Agent, count: int = 50) -> None:
    agent.pool.resize(count)
    rows = {name: torch.full((count, column.shape[1]), 7.0) for name, column in agent.pool.columns.items()}
    agent.pool.add(rows)


def batch_of(rows: int) -> dict[str, Tensor]:
    sizes = {"obs": OBS, "action": ACTION, "reward": 1, "next_obs": OBS}
    batch = {
        name: torch.randn(rows, size, generator=generator(index)) for index, (name, size) in enumerate(sizes.items())
    }
    return batch | {"goes_on": torch.ones(rows, 1), "weight": torch.ones(rows, 1)}


def test_the_ensemble_and_its_data_are_word_for_word_those_of_cem_mpc_and_tested_there():
    ours, theirs = (
        re.search(r"(?ms)^Layers = .*^class Buffer:.*?(?=^class |^def )", inspect.getsource(script))
        for script in (mbpo, cem_mpc)
    )
    assert ours[0] == theirs[0]


# --- actor ----------------------------------------------------------------------------------------------------------
def test_density_of_actions_integrates_to_one():
    actor = Actor(OBS, 1, small_args(), generator())
    obs = torch.randn(1, OBS, generator=generator(1))
    mean, log_std = actor(obs)
    u = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    noise = ((u - mean.item()) / log_std.exp().item()).float()[:, None]
    action, log_prob = actor.sample(obs.expand(len(u), -1), noise)
    inner = action[:, 0].abs() < 0.99999  # where neighbours can still be told apart in single precision
    area = torch.trapezoid(log_prob[inner, 0].exp(), action[inner, 0]).item()
    assert area == pytest.approx(1.0, abs=2e-3)


def test_log_density_is_exact_far_out_where_tanh_is_one():
    actor = Actor(OBS, ACTION, small_args(), generator())
    obs, noise = torch.randn(50, OBS, generator=generator(1)), 15 * torch.randn(50, ACTION, generator=generator(2))
    mean, log_std = (part.double() for part in actor(obs))
    action, log_prob = actor.sample(obs, noise)
    assert (action.abs() == 1).any()
    normal = torch.distributions.Normal(mean, log_std.exp())
    u = mean + log_std.exp() * noise.double()
    wanted = normal.log_prob(u) + 2 * torch.log(torch.cosh(u.clamp(-300, 300)))  # 1 - tanh^2 = 1 / cosh^2
    torch.testing.assert_close(log_prob.double(), wanted.sum(-1, keepdim=True), rtol=1e-5, atol=1e-3)


def test_actions_are_drawn_in_the_range_of_the_environment_and_the_greedy_one_is_the_mean():
    space = gym.spaces.Box(np.array([-3.0, 0.0]), np.array([1.0, 10.0]), dtype=np.float64)
    agent, obs = Agent(box(OBS), space, small_args(learning_starts=200)), np.ones(OBS)
    actions = []
    for _ in range(400):  # half of them uniform, half by the policy
        actions.append(agent.act(obs))
        assert space.contains(actions[-1])
        agent.observe(obs, actions[-1], 0.0, obs, False)
    assert np.array(actions[:200]).min(0) == pytest.approx([-3, 0], abs=0.2)
    assert np.array(actions[:200]).max(0) == pytest.approx([1, 10], abs=0.2)
    assert np.std(actions[200:], axis=0).min() > 0.1
    units = agent.data.columns()["action"]
    assert units.abs().max() <= 1.0
    np.testing.assert_allclose(agent.to_env(units[7]), actions[7], rtol=1e-6, atol=1e-6)
    policy = agent.greedy_policy(0)
    mean = agent.actor(agent.tensor(obs))[0][0].tanh().detach().numpy()
    np.testing.assert_allclose(policy(obs), np.array([-1.0, 5.0]) + np.array([2.0, 5.0]) * mean, rtol=1e-5)
    assert (policy(obs) == agent.greedy_policy(1)(obs)).all()


# --- losses ---------------------------------------------------------------------------------------------------------
class Constant(torch.nn.Module):
    """A critic that says the same of everything."""

    def __init__(self, value: float):
        super().__init__()
        self.value = torch.nn.Parameter(torch.tensor(value))

    def forward(self, obs: Tensor, action: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return self.value.expand(len(obs), 1)


def test_critic_loss_on_transitions_by_hand():
    actor, batch, noise = Actor(OBS, ACTION, small_args(), generator()), batch_of(3), torch.randn(3, ACTION)
    batch["goes_on"][1] = 0.0
    batch["weight"][2] = 0.5
    critics, targets = [Constant(1.0), Constant(2.0)], [Constant(10.0), Constant(8.0)]
    alpha, gamma, total = torch.tensor(0.2), 0.9, 0.0
    _, log_prob = actor.sample(batch["next_obs"], noise)
    for row in range(3):
        wanted = batch["reward"][row].item()
        if row != 1:
            wanted += gamma * (8.0 - 0.2 * log_prob[row].item())
        total += (0.5 if row == 2 else 1.0) * 0.5 * ((1.0 - wanted) ** 2 + (2.0 - wanted) ** 2) / 3
    loss = critic_loss(actor, critics, targets, batch, noise, alpha, gamma, None)
    assert loss.item() == pytest.approx(total, rel=1e-5)


def test_actor_loss_is_that_of_the_smaller_critic():
    actor, batch, noise = Actor(OBS, ACTION, small_args(), generator()), batch_of(5), torch.randn(5, ACTION)
    loss, entropy = actor_loss(actor, [Constant(3.0), Constant(2.0)], batch["obs"], noise, torch.tensor(0.5), None)
    _, log_prob = actor.sample(batch["obs"], noise)
    assert loss.item() == pytest.approx(0.5 * log_prob.mean().item() - 2.0, rel=1e-5)
    assert entropy.item() == pytest.approx(-log_prob.mean().item(), rel=1e-5)
    assert not entropy.requires_grad


def test_gradients_go_where_they_should_and_nowhere_else(monkeypatch):
    agent, batch = small_agent(batch_size=8), batch_of(8)
    noise, alpha = torch.randn(8, ACTION), torch.tensor(0.2)
    loss = critic_loss(agent.actor, agent.critics, agent.targets, batch, noise, alpha, 0.99, None)
    loss.backward()
    assert all(parameter.grad is None for parameter in [*agent.actor.parameters(), *agent.targets.parameters()])
    assert all((layer.weight.grad != 0).any() for critic in agent.critics for layer in critic.layers)
    wanted: list[Tensor] = []

    def watched(*args: object) -> Tensor:
        loss = critic_loss(*args)
        wanted.extend(torch.autograd.grad(loss, list(agent.critics.parameters()), retain_graph=True, allow_unused=True))
        return loss

    monkeypatch.setattr(mbpo, "critic_loss", watched)
    agent.update_policy(batch)  # the actor's loss, which comes second, adds nothing to the gradient of the critics
    for gradient, parameter in zip(wanted, agent.critics.parameters(), strict=True):
        assert gradient is None if parameter.grad is None else torch.equal(gradient, parameter.grad)
    assert all((layer.weight.grad != 0).any() for layer in agent.actor.layers)


@pytest.mark.parametrize(("target", "grows"), [(100.0, True), (-100.0, False)])
def test_temperature_grows_where_the_entropy_is_below_its_target(target, grows):
    agent = small_agent(target_entropy=target, batch_size=8)
    agent.update_policy(batch_of(8))
    assert (agent.log_alpha.item() > 0) == grows


def test_targets_follow_by_polyak_averaging():
    agent = small_agent(tau=0.1, batch_size=8)
    old = [parameter.clone() for parameter in agent.targets.parameters()]
    agent.update_policy(batch_of(8))
    for before, target, parameter in zip(old, agent.targets.parameters(), agent.critics.parameters(), strict=True):
        torch.testing.assert_close(target.data, 0.9 * before + 0.1 * parameter.data)


def test_target_entropy_is_minus_half_the_dimensions():
    assert small_agent().target_entropy == -1.0
    assert small_agent(target_entropy=-0.05).target_entropy == -0.05


def test_dropout_and_layer_norm_of_the_critic():
    args = small_args(critic_dropout=0.5, critic_layer_norm=True)
    critic, obs, action = Critic(OBS, ACTION, args, generator()), torch.randn(4, OBS), torch.randn(4, ACTION)
    one, two = (critic(obs, action, generator(seed)) for seed in (1, 2))
    assert not torch.equal(one, two)
    assert torch.equal(one, critic(obs, action, generator(1)))
    x = torch.cat([obs, action], dim=-1)
    for layer, norm in zip(critic.layers, critic.norms, strict=True):
        x = layer(x)
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()
        x = x.relu()
    torch.testing.assert_close(critic(obs, action), critic.last(x))  # nothing is dropped


def network(module: torch.nn.Module, x: Tensor, weights: dict[str, Tensor], prefix: str = "") -> Tensor:
    """The network of an actor or critic, without norms, by its weights."""
    for index in range(len(module.layers)):
        x = (x @ weights[f"{prefix}layers.{index}.weight"].T + weights[f"{prefix}layers.{index}.bias"]).clamp_min(0)
    return x @ weights[f"{prefix}last.weight"].T + weights[f"{prefix}last.bias"]


def test_a_whole_update_by_hand():
    agent = small_agent(batch_size=16, tau=0.1, gamma=0.9, policy_lr=1e-3)
    batch = batch_of(16)
    batch["goes_on"][::3], batch["weight"][::2] = 0.0, 0.25
    with torch.no_grad():
        agent.log_alpha.fill_(math.log(0.3))
        for parameter in agent.targets.parameters():
            parameter.add_(0.05)
    draws = generator()
    draws.set_state(agent.generator.get_state())
    next_noise, noise = torch.randn(2, 16, ACTION, generator=draws).double()
    modules = {"actor": agent.actor, "critics": agent.critics, "targets": agent.targets}
    weights = {
        name: {key: value.detach().double().clone().requires_grad_() for key, value in module.named_parameters()}
        for name, module in modules.items()
    }
    obs, action, reward, next_obs, goes_on, weight = (column.double() for column in batch.values())

    def value(name: str, index: int, obs: Tensor, action: Tensor, weights: dict) -> Tensor:
        return network(agent.critics[index], torch.cat([obs, action], -1), weights[name], f"{index}.")

    def sample(obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = network(agent.actor, obs, weights["actor"]).chunk(2, -1)
        normal, squash = torch.distributions.Normal(mean, log_std.exp()), torch.distributions.transforms.TanhTransform()
        u = mean + log_std.exp() * noise
        density = normal.log_prob(u) - squash.log_abs_det_jacobian(u, u.tanh())
        return u.tanh(), density.sum(-1, keepdim=True)

    next_action, log_prob = sample(next_obs, next_noise)
    smaller = torch.minimum(*(value("targets", index, next_obs, next_action, weights) for index in range(2)))
    target = (reward + 0.9 * goes_on * (smaller - 0.3 * log_prob)).detach()
    errors = [value("critics", index, obs, action, weights) - target for index in range(2)]
    losses = {"losses/critic_loss": sum((weight * error**2).mean() / 2 for error in errors)}
    losses["losses/critic_loss"].backward()

    before = {name: [p.detach().clone() for p in module.parameters()] for name, module in modules.items()}
    agent.update_policy(batch)
    with torch.no_grad():  # the actor's loss is that of the critics after their update
        later = {"critics": {key: value.double() for key, value in agent.critics.named_parameters()}}
    policy_action, log_prob = sample(obs, noise)
    smaller = torch.minimum(*(value("critics", index, obs, policy_action, later) for index in range(2)))
    losses |= {"losses/actor_loss": (0.3 * log_prob - smaller).mean(), "losses/entropy": -log_prob.mean()}
    losses["losses/actor_loss"].backward()
    losses["losses/alpha"] = 0.3

    assert agent.metrics() == pytest.approx(
        {tag: float(torch.as_tensor(loss).detach()) for tag, loss in losses.items()}, rel=1e-4
    )
    for name in ("critics", "actor"):
        for (key, parameter), old in zip(modules[name].named_parameters(), before[name], strict=True):
            torch.testing.assert_close(parameter.grad.double(), weights[name][key].grad, rtol=1e-3, atol=1e-6)
            step = parameter.grad / (parameter.grad.abs() + 1e-8)  # the first one of Adam
            torch.testing.assert_close(parameter.data, old - 1e-3 * step, rtol=1e-5, atol=1e-6)
    sign = 1 if losses["losses/entropy"].item() > agent.target_entropy else -1
    assert agent.log_alpha.item() == pytest.approx(math.log(0.3) - sign * 1e-3, abs=1e-6)
    for new, old, parameter in zip(
        agent.targets.parameters(), before["targets"], agent.critics.parameters(), strict=True
    ):
        torch.testing.assert_close(new.data, 0.9 * old + 0.1 * parameter.data)


# --- rollouts -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("step", "length"),
    [(0, 1), (20_000, 1), (85_000, 8), (149_999, 14), (150_000, 15), (900_000, 15)],
)
def test_schedule_of_hopper(step, length):
    assert rollout_length(step, (20_000, 150_000, 1, 15)) == length


def test_each_row_is_predicted_by_an_elite_of_its_own():
    agent = small_agent(ensemble_size=5, num_elites=4)
    model, rows = agent.model, 8_000
    with torch.no_grad():
        model.elites.copy_(torch.tensor([4, 2, 1, 0]))
        for layer in [*model.dynamics, *model.outcome]:
            layer.zero_()
        model.dynamics[-1][:, 0, :OBS] = torch.arange(5.0)[:, None]  # member m moves by m
        model.dynamics[-1][:, 0, OBS:] = -100.0
        model.min_logvar.fill_(-100.0)
        model.outcome[-1][:, 0, 0] = 10 * torch.arange(5.0)
        model.outcome[-1][:, 0, 1] = torch.tensor([0.0, 0.0, 100.0, 0.0, 0.0])  # and member 2 ends
    obs = torch.arange(float(rows))[:, None].expand(rows, OBS).contiguous() * 10
    action = torch.zeros(rows, ACTION)
    with torch.no_grad():
        next_obs, reward, terminated = planner(agent, 500).step(obs, action)
    member = (next_obs - obs)[:, 0]  # rows are not mixed, or this would be no small number
    assert torch.equal((next_obs - obs), member[:, None].expand(rows, OBS))
    assert set(member.tolist()) == {0.0, 1.0, 2.0, 4.0}
    torch.testing.assert_close(reward[:, 0], 10 * member)
    counts = member.long().bincount(minlength=5)[[0, 1, 2, 4]]
    assert (counts - rows / 4).abs().max() < 5 * math.sqrt(rows * 0.25 * 0.75)
    assert (member[1:] == member[:-1]).float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert torch.equal(terminated[:, 0], member == 2)
    with torch.no_grad():
        again, _, _ = planner(agent, 500, seed=1).step(obs, action)
    assert ((again - obs)[:, 0] == member).float().mean().item() == pytest.approx(0.25, abs=0.03)  # drawn anew


def given_reward(obs: Tensor, action: Tensor, next_obs: Tensor) -> Tensor:
    return 3 * obs[..., 0] + action[..., 1]


def given_end(obs: Tensor, action: Tensor, next_obs: Tensor) -> Tensor:
    return next_obs[..., 0] > 0.5


def test_rollouts_go_on_from_where_they_are_without_those_that_ended():
    agent = small_agent(100)
    agent.model.reward_fn, agent.model.termination_fn = given_reward, given_end
    obs = agent.data.columns()["obs"][:60]
    parts = list(planner(agent, 7).imagine(obs, 4))
    assert torch.equal(parts[0]["obs"], obs)
    ended = 0
    for part, following in zip(parts, [*parts[1:], None], strict=True):
        torch.testing.assert_close(part["reward"], given_reward(part["obs"], part["action"], None)[:, None])
        assert torch.equal(part["goes_on"], (part["next_obs"][:, :1] <= 0.5).float())
        ended += int((part["goes_on"] == 0).sum())
        if following is not None:
            assert torch.equal(following["obs"], part["next_obs"][part["goes_on"][:, 0] == 1])
    assert 0 < ended < 60


def test_a_rollout_ends_where_the_ensemble_disagrees_and_counts_less_where_it_does_a_little():
    agent = small_agent(100)
    with torch.no_grad():
        for layer in agent.model.dynamics:
            layer.zero_()
        # Members disagree by the first dimension of the observation.
        agent.model.dynamics[0][:, 0, 0], agent.model.dynamics[2][:, 0, 0] = 1.0, 1.0
        agent.model.dynamics[4][:, 0, :OBS] = torch.arange(3.0)[:, None]
    agent.args.max_disagreement, agent.args.weigh_disagreement = 0.2, True
    obs = torch.zeros(40, OBS)
    obs[:, 0] = torch.linspace(-3, 3, 40)
    plan = planner(agent, 7)
    spread = plan.disagreement(obs, torch.zeros(40, ACTION))
    hidden = torch.nn.functional.silu(torch.nn.functional.silu(obs[:, :1]))
    torch.testing.assert_close(spread, hidden.abs() / 2)  # two elites, one of which predicts 0
    (rows,) = plan.imagine(obs, 1)
    known = spread[:, 0] < 0.2
    assert 0 < known.sum() < 40
    assert torch.equal(rows["obs"], obs[known])
    torch.testing.assert_close(rows["weight"], 1 / (1 + spread[known]))
    agent.model.delta_std[0] = 0  # what never changes is predicted without error
    fewer = plan.disagreement(obs, torch.zeros(40, ACTION))
    torch.testing.assert_close(fewer, spread * (OBS - 1) / OBS)


def test_steps_are_drawn_from_what_the_model_predicts_and_end_with_its_probability():
    agent, obs, action = small_agent(), torch.zeros(20_000, OBS), torch.zeros(20_000, ACTION)
    with torch.no_grad():
        for layer in [*agent.model.dynamics, *agent.model.outcome]:
            layer.zero_()
        agent.model.delta_std.fill_(2.0)
        agent.model.terminated_mean.fill_(0.3)
        next_obs, _, ended = planner(agent, 500).step(obs, action)
    std = 2.0 * math.exp(0.5 * (0.5 - math.log1p(math.exp(0.5))))  # the log variance 0 below its soft bound of 0.5
    assert next_obs.std(0).tolist() == pytest.approx(OBS * [std], rel=0.03)
    assert len(next_obs.unique(dim=0)) > 19_900  # each row has noise of its own
    assert ended.float().mean().item() == pytest.approx(0.3, abs=0.015)


def test_imagined_episodes_end_by_chance_as_often_as_real_ones():
    agent, rng = Agent(box(OBS), box(1), small_args(max_updates=300, rollouts=20_000)), np.random.default_rng(0)
    obs = rng.normal(size=OBS)
    for _ in range(2_000):
        action, ends = rng.uniform(-1, 1, 1), rng.random() < 0.029
        next_obs = 0.9 * obs + 0.3 * rng.normal(size=OBS) + [0.1 * action[0], 0, 0]
        agent.observe(obs, action, next_obs[0], next_obs, ends)
        obs = rng.normal(size=OBS) if ends else next_obs
    agent.train_model()
    real, imagined = agent.data.columns(), agent.pool.columns
    share = real["terminated"].mean().item()
    assert agent.metrics()["planner/imagined_terminations"] == pytest.approx(share, rel=0.25)
    assert (imagined["reward"] - imagined["next_obs"][:, :1]).std() < 0.2
    assert agent.pool.size == 20_000
    assert len(imagined["obs"].unique(dim=0)) > 1_950  # they begin wherever the agent has been


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), max_size=12))
def test_pool_holds_the_latest(operations):
    pool, wanted, counter, capacity = Pool(1, 1, torch.device("cpu")), [], 0, 0
    for size, count in operations:
        if count == 0 or capacity == 0:
            capacity = size
            pool.resize(capacity)
        count = min(count, capacity)
        rows = torch.arange(float(counter), counter + count)[:, None]
        pool.add(dict.fromkeys(pool.columns, rows))
        counter += count
        wanted = [*wanted, *rows[:, 0].tolist()][-capacity:]
        for column in pool.columns.values():
            assert sorted(column[: pool.size, 0].tolist()) == wanted
    other = Pool(1, 1, torch.device("cpu"))
    other.load_state_dict(pool.state_dict())
    for name, column in pool.columns.items():
        assert torch.equal(column, other.columns[name])
    assert (pool.size, pool.position) == (other.size, other.position)


# --- agent ----------------------------------------------------------------------------------------------------------
def test_capacity_of_the_pool_is_length_times_rollouts_times_trainings():
    agent = small_agent(60, rollouts=20, keep_trainings=3, rollout_schedule=(31, 70, 1, 5), learning_starts=30)
    agent.train_model()
    assert len(agent.pool.columns["obs"]) == 1 * 20 * 3
    first = agent.pool.columns["obs"][: agent.pool.size].clone()
    for _ in range(40):
        agent.observe(np.ones(OBS), np.zeros(ACTION), 0.0, np.ones(OBS), False)
    agent.train_model()
    assert len(agent.pool.columns["obs"]) == 5 * 20 * 3
    assert torch.equal(agent.pool.columns["obs"][: len(first)], first)  # what was there stays when it grows
    assert agent.pool.size > len(first)


def test_what_is_logged_of_the_rollouts():
    agent = small_agent(60, rollouts=20, rollout_schedule=(0, 1, 2, 2), learning_starts=30)
    agent.model.termination_fn = lambda obs, action, next_obs: obs[..., 0] > 0
    agent.train_model()
    rows = {name: column[: agent.pool.size] for name, column in agent.pool.columns.items()}
    logged = agent.metrics()
    assert logged["planner/pool_size"] == agent.pool.size
    assert 20 < agent.pool.size < 40  # some ended after one step of two
    assert logged["planner/rollout_length"] == agent.pool.size / 20
    assert logged["planner/imagined_terminations"] == pytest.approx((rows["obs"][:, 0] > 0).float().mean().item())


def test_rollouts_that_all_end_at_once_are_no_failure():
    agent = small_agent(60, max_disagreement=1e-9)
    agent.update()
    assert agent.pool.size == 0
    assert all(math.isfinite(value) for value in agent.metrics().values())


def test_nothing_is_learned_before_the_model_and_its_rollouts():
    agent, calls = small_agent(29, learning_starts=30, updates_per_step=2), []
    agent.update_policy = lambda batch: calls.append((agent.trained_at, agent.pool.size))
    agent.update()
    assert calls == []
    agent.observe(np.ones(OBS), np.zeros(ACTION), 0.0, np.ones(OBS), False)
    agent.update()
    assert len(calls) == 2
    assert all(trained_at == 30 and size > 0 for trained_at, size in calls)


@pytest.mark.parametrize(("ratio", "real"), [(0.05, 12), (0.0, 0), (0.5, 128), (1.0, 256)])
def test_share_of_real_transitions_in_a_batch(ratio, real):
    agent = small_agent(40, real_ratio=ratio, batch_size=256)
    fill_pool(agent)
    batches = agent.batches(3)
    assert all(len(column) == 3 for column in batches.values())
    imagined = (batches["obs"] == 7).all(-1)
    assert imagined.sum(1).tolist() == [256 - real] * 3
    data = agent.data.columns()
    rows = {tuple(row) for row in data["obs"].tolist()}
    for obs, next_obs, goes_on, reward, weight in zip(
        *(batches[name][~imagined] for name in ("obs", "next_obs", "goes_on", "reward", "weight")), strict=True
    ):
        assert tuple(obs.tolist()) in rows
        index = (data["obs"] == obs).all(1).nonzero().item()
        torch.testing.assert_close(next_obs, obs + data["delta"][index])
        assert goes_on.item() == 1 - data["terminated"][index].item()
        assert reward.item() == pytest.approx(obs[0].item())
        assert weight.item() == 1


def test_share_of_real_transitions_falls_from_one():
    agent = small_agent(10, real_ratio=0.2, real_ratio_steps=100, learning_starts=10, batch_size=1000)
    fill_pool(agent)
    counts = []
    for _ in range(120):
        counts.append((agent.batches(1)["obs"] != 7).any(-1).sum().item())
        agent.observe(np.ones(OBS), np.zeros(ACTION), 0.0, np.ones(OBS), False)
    assert counts[0] == 1000
    assert counts[50] == pytest.approx(600, abs=1)
    assert counts[100:] == [200] * 20


def test_without_a_model_none_is_trained_and_nothing_imagined(monkeypatch):
    def never(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr(mbpo, "fit", never)
    monkeypatch.setattr(Planner, "imagine", never)
    agent = small_agent(40, real_ratio=1.0)
    before = copy.deepcopy(agent.actor.state_dict())
    agent.update()
    assert any(not torch.equal(value, before[name]) for name, value in agent.actor.state_dict().items())
    assert agent.pool.size == 0


def test_differences_are_taken_before_they_are_rounded():
    agent = small_agent()
    agent.observe(np.array([1e6, 0, 0]), np.zeros(2), 0.0, np.array([1e6 + 1e-3, 0, 0]), False)
    assert agent.data.columns()["delta"][0, 0].item() == pytest.approx(1e-3, rel=1e-6)


def test_of_much_data_ever_fewer_rows_are_held_out_and_never_the_first():
    shares = []
    for size in (1, 200_000):
        agent = small_agent(holdout_ratio=0.2)
        agent.data.load_state_dict({"table": torch.zeros(size, sum(agent.data.widths.values()))})
        for _ in range(1_000):
            agent.observe(np.zeros(OBS), np.zeros(ACTION), 0.0, np.zeros(OBS), False)
        shares.append(agent.data.columns(slice(size, None))["holdout"].mean().item())
    assert shares == [pytest.approx(0.2, abs=0.05), pytest.approx(5_000 / 200_000, abs=0.02)]
    assert not any(small_agent(1, seed=seed, holdout_ratio=0.9).data.columns()["holdout"].any() for seed in range(9))


def test_given_functions_get_actions_in_units(tmp_path, monkeypatch):
    (tmp_path / "mytask.py").write_text(
        "def reward(obs, action, next_obs):\n    return action[..., 0] + 10 * (next_obs - obs)[..., 0]\n"
        "def end(obs, action, next_obs):\n    return action[..., 0] > 1.9\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    space = gym.spaces.Box(-2.0, 2.0, (1,), np.float32)
    agent = Agent(box(OBS), space, small_args(reward_fn="mytask:reward", termination_fn="mytask:end"))
    next_obs, reward, terminated = agent.planner.step(torch.zeros(2, OBS), torch.tensor([[0.99], [-1.0]]))
    torch.testing.assert_close(reward[:, 0], torch.tensor([1.98, -2.0]) + 10 * next_obs[:, 0])
    assert terminated[:, 0].tolist() == [True, False]
    for action in (0.5, 1.95):  # real steps have what the functions say, as imagined ones do
        agent.observe(np.zeros(OBS), np.array([action], np.float32), 7.0, np.full(OBS, 0.1), False)
    assert agent.data.columns()["reward"][:, 0].tolist() == pytest.approx([1.5, 2.95])
    assert agent.data.columns()["terminated"][:, 0].tolist() == [False, True]


def test_a_reward_for_the_whole_batch_is_an_error_and_is_not_spread_over_its_rows():
    agent = small_agent()
    for wrong in (lambda *step: step[0].sum(), lambda *step: step[0].sum()[None]):
        agent.model.reward_fn = wrong
        with pytest.raises(RuntimeError, match="invalid for input of size 1"):
            agent.planner.step(torch.zeros(5, OBS), torch.zeros(5, ACTION))


@pytest.mark.parametrize(
    "fields",
    [
        {"env_id": "MountainCarContinuous-v0"},
        {"real_ratio": 1.0, "critic_layer_norm": True, "critic_dropout": 0.01},
        {"max_disagreement": 0.5, "weigh_disagreement": True, "rollout_schedule": (0, 50, 1, 4)},
        {"real_ratio": 0.5, "real_ratio_steps": 50},
    ],
    ids=str,
)
def test_variants_run_through(fields, tmp_path):
    args = small_args(run_dir=str(tmp_path), total_timesteps=80, eval_episodes=1, **fields)
    args.env_kwargs = {"max_episode_steps": 30}
    assert math.isfinite(mbpo.train(args)["eval_return_mean"])


def test_the_model_and_the_policy_are_logged_when_they_were_trained(tmp_path):
    mbpo.train(small_args(run_dir=str(tmp_path), total_timesteps=130, eval_episodes=1))
    steps = {"losses/alpha": [*range(30, 131)]}
    steps |= {tag: [30, 70, 110] for tag in ("model/holdout_mse", "losses/outcome_loss", "planner/pool_size")}
    found = scalars(only_run(tmp_path))
    assert {tag: [step for name, step, _ in found if name == tag] for tag in steps} == steps


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda agent: pickle.loads(pickle.dumps(agent))], ids=["copy", "pickle"]
)
def test_a_copy_with_dropout_and_a_given_reward_goes_on_like_the_original(copied, tmp_path, monkeypatch):
    (tmp_path / "mytask.py").write_text("def reward(obs, action, next_obs):\n    return action[..., 0]\n")
    monkeypatch.syspath_prepend(tmp_path)
    agent = small_agent(45, critic_dropout=0.2, reward_fn="mytask:reward")
    agent.update()
    ends = []
    for one in (copied(agent), agent):
        obs, actions = np.zeros(OBS), []
        for step in range(60):
            actions.append(one.act(obs))
            next_obs = 0.5 * obs + actions[-1].sum()
            one.observe(obs, actions[-1], next_obs[0], next_obs, step % 9 == 8)
            one.update()
            obs = next_obs
        ends.append((actions, plain(one.state_dict()), one.greedy_policy(0)(obs).tolist(), one.metrics()))
    assert np.array_equal(ends[0][0], ends[1][0])
    assert ends[0][1:] == ends[1][1:]


def test_state_of_one_agent_is_not_shared_with_another():
    agent, other = small_agent(60), small_agent()
    agent.update()
    state = agent.state_dict()
    other.load_state_dict(state)
    before = copy.deepcopy(state["pool"]["columns"])
    other.pool.add({name: torch.full((9, column.shape[1]), 7.0) for name, column in other.pool.columns.items()})
    for name, column in before.items():
        assert torch.equal(column, state["pool"]["columns"][name])
        assert torch.equal(column, agent.pool.columns[name])


def test_the_progress_bar_names_what_goes_on(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(mbpo.tqdm, "set_description_str", lambda bar, text: said.append(text))
    for ratio, wanted in ((0.5, ["random steps", "", *["training the model", ""] * 2]), (1.0, ["random steps", ""])):
        said.clear()
        mbpo.train(small_args(run_dir=str(tmp_path), total_timesteps=100, eval_episodes=1, real_ratio=ratio))
        assert said[:-2] == wanted  # and then the evaluation


def test_checkpoints_of_the_presets_are_at_most_so_many_updates_apart():
    for preset in ({}, *mbpo.PRESETS.values()):
        args = Args(**preset)
        assert args.checkpoint_every * args.updates_per_step <= 16_000  # 0.0075 s each: two minutes


@pytest.mark.parametrize(
    "fields",
    [
        {"tau": math.nan},
        {"gamma": 1.1},
        {"total_timesteps": 0},
        {"seed": -1},
        {"policy_lr": 0.0},
        {"target_entropy": math.nan},
        {"target_entropy": math.inf},
        {"max_disagreement": 0.0},
        {"num_elites": 8},
        {"holdout_ratio": 1.0},
        {"critic_dropout": 1.0},
        {"hidden": (200, 200)},
        {"hidden": (200, 0, 200, 200)},
        {"policy_hidden": ()},
        {"weight_decay": (0.0, 0.0, 0.0, math.nan, 0.0)},
        {"rollout_schedule": (10, 5, 1, 1)},
        {"rollout_schedule": (0, 1, 2, 1)},
    ],
    ids=str,
)
def test_what_would_fail_late_or_silently_is_refused_by_name(fields):
    name = "weight_decay" if fields == {"hidden": (200, 200)} else next(iter(fields))
    with pytest.raises(mbpo.Failure, match=f"--{name.replace('_', '-')}"):
        Args(**fields)


@pytest.mark.parametrize(
    ("low", "high"), [(-math.inf, 1), (-3.4e38, 3.4e38), (1e9, 1e9 + 1), (-1e300, 1e300), (1, 1 + 1e-9), (1, 1)]
)
def test_action_bounds_that_single_precision_does_not_hold_are_refused(low, high):
    with pytest.raises(mbpo.Failure, match="bounded Box"):
        mbpo.check_spaces(box(2), gym.spaces.Box(low, high, (1,), np.float64))


# --- learning -------------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize(("env_id", "wanted"), [("Pendulum-v1", -200), ("InvertedPendulum-v5", 950)])
def test_it_learns_with_the_settings_of_the_command_line(env_id, wanted, tmp_path: Path):
    if env_id.endswith("-v5"):
        pytest.importorskip("mujoco")
    args = Args(env_id=env_id, run_dir=str(tmp_path), **mbpo.PRESETS.get(env_id, {}))
    assert mbpo.train(args)["eval_return_mean"] >= wanted


@pytest.mark.slow
def test_compiled_it_learns_the_same_from_trainings_of_several_sizes(tmp_path):
    """With all of torch.compile: the ensemble's batches grow with the data, and once broke the compiled loss."""
    torch._dynamo.reset()
    found = []
    for compiled in (False, True):
        args = small_args(compile=compiled, total_timesteps=130, eval_episodes=1, run_dir=str(tmp_path / str(compiled)))
        found.append(mbpo.train(args)["eval_return_mean"])
    assert found[1] == pytest.approx(found[0], rel=1e-3)
