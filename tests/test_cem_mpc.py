"""cem_mpc.py against networks written out member by member, finite differences, exact control, and the traps."""

import copy
import dataclasses
import functools
import math
import pickle
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import learned, only_run, plain, scalars, tiny_args
from torch import Tensor, nn

import cem_mpc
from cem_mpc import Agent, Args, Buffer, Ensemble, ensemble_loss, fit, imagine

OBS, ACTION = 3, 2


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small_args(**fields: object) -> Args:
    return tiny_args(cem_mpc, **{"ensemble_size": 4, "num_elites": 2, **fields})


def small_model(args: Args | None = None) -> Ensemble:
    model = Ensemble(OBS, ACTION, args or small_args(), generator())
    data = torch.randn(50, 2 * OBS + ACTION + 1, generator=generator(1)) * 2 + 1
    obs, action, delta, reward = data.split([OBS, ACTION, OBS, 1], dim=1)
    terminated = (torch.arange(50.0) < 2)[:, None].float()
    model.set_scale({"obs": obs, "action": action, "delta": delta, "reward": reward, "terminated": terminated})
    with torch.no_grad():
        for layer in [*model.dynamics, *model.reward, *model.termination]:
            if layer.shape[1] == 1:
                layer.normal_(generator=generator(2))
    return model


def batch_of(rows: int, members: int = 4) -> dict[str, Tensor]:
    sizes = {"obs": OBS, "action": ACTION, "delta": OBS, "reward": 1}
    batch = {name: torch.randn(members, rows, size, generator=generator(size)) for name, size in sizes.items()}
    return batch | {"terminated": (torch.rand(members, rows, 1, generator=generator(9)) < 0.5).float()}


# --- ensemble -------------------------------------------------------------------------------------------------------
def plain_networks(model: Ensemble, member: int) -> list[nn.Sequential]:
    """The three networks of one member, of torch's own layers."""
    networks = []
    for parameters in (model.dynamics, model.reward, model.termination):
        layers = []
        for weight, bias in zip(parameters[::2], parameters[1::2], strict=True):
            linear = nn.Linear(weight.shape[1], weight.shape[2])
            linear.weight.data, linear.bias.data = weight[member].T.clone(), bias[member, 0].clone()
            layers += [linear, nn.SiLU()]
        networks.append(nn.Sequential(*layers[:-1]))
    return networks


def plain_prediction(model: Ensemble, member: int, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
    x = torch.cat([(obs - model.obs_mean) / model.obs_std, (action - model.action_mean) / model.action_std], dim=-1)
    mean, logvar = plain_networks(model, member)[0](x).chunk(2, dim=-1)
    logvar = model.max_logvar - nn.functional.softplus(model.max_logvar - logvar)
    return mean, model.min_logvar + nn.functional.softplus(logvar - model.min_logvar)


def plain_reward(model: Ensemble, member: int, delta: Tensor, action: Tensor, next_obs: Tensor) -> Tensor:
    inputs = {"delta": delta, "action": action, "obs": next_obs}
    x = [(x - getattr(model, f"{name}_mean")) / getattr(model, f"{name}_std") for name, x in inputs.items()]
    return plain_networks(model, member)[1](torch.cat(x, dim=-1))


def plain_logit(model: Ensemble, member: int, next_obs: Tensor) -> Tensor:
    return plain_networks(model, member)[2]((next_obs - model.obs_mean) / model.obs_std)


def test_ensemble_is_its_members_one_by_one():
    model, batch = small_model(), batch_of(7)
    members = torch.tensor([3, 1])
    obs, action, delta = (batch[name][:2] for name in ("obs", "action", "delta"))
    dynamics, reward, termination = model.select(members)
    mean, std = model.predict(obs, action, dynamics)
    rewards, logits = model.predict_reward(delta, action, obs, reward), model.termination_logit(obs, termination)
    for row, member in enumerate(members.tolist()):
        plain_mean, plain_logvar = plain_prediction(model, member, obs[row], action[row])
        torch.testing.assert_close(mean[row], plain_mean * model.delta_std + model.delta_mean)
        torch.testing.assert_close(std[row], plain_logvar.exp().sqrt() * model.delta_std)
        torch.testing.assert_close(rewards[row], plain_reward(model, member, delta[row], action[row], obs[row]))
        torch.testing.assert_close(logits[row], plain_logit(model, member, obs[row]))


def test_loss_is_the_sum_over_members_written_out():
    model, batch, decay = small_model(), batch_of(7), (0.1, 0.2, 0.3)
    wanted = 0.01 * (model.max_logvar - model.min_logvar).sum()
    for member in range(4):
        row = {name: column[member] for name, column in batch.items()}
        mean, logvar = plain_prediction(model, member, row["obs"], row["action"])
        y, next_obs = (row["delta"] - model.delta_mean) / model.delta_std, row["obs"] + row["delta"]
        wanted += 2 * -torch.distributions.Normal(mean, logvar.exp().sqrt()).log_prob(y).mean() - math.log(2 * math.pi)
        reward = plain_reward(model, member, row["delta"], row["action"], next_obs)
        wanted += ((reward - (row["reward"] - model.reward_mean) / model.reward_std) ** 2).mean()
        log_prob = torch.distributions.Bernoulli(logits=plain_logit(model, member, next_obs)).log_prob(
            row["terminated"]
        )
        wanted -= (torch.where(row["terminated"] > 0, 48 / 2, 1.0) * log_prob).mean()
        weights, factors = [*model.dynamics[::2], *model.termination[::2]], (*decay, 0.01, 0.01, 0.01)
        wanted += sum(f / 2 * (weight[member] ** 2).sum() for f, weight in zip(factors, weights, strict=True))
    torch.testing.assert_close(ensemble_loss(model, batch, decay), wanted)


def test_what_is_constant_is_predicted_without_error_and_tells_nothing():
    model = small_model()
    names = {"obs": OBS, "action": ACTION, "delta": OBS, "reward": 1, "terminated": 1}
    data = {name: torch.randn(50, size, generator=generator(3)) for name, size in names.items()}
    data["obs"][:, 1], data["delta"][:, 1], data["terminated"][:] = 7.0, 0.25, 0.0
    model.set_scale(data)
    assert model.terminal_weight == 1_000  # nothing has terminated yet: no row is weighed by it
    batch = batch_of(4)
    mean, std = model.predict(batch["obs"], batch["action"], model.select()[0])
    assert (mean[..., 1] == 0.25).all()
    assert (std[..., 1] == 0).all()
    assert (std[..., 0] > 0).all()
    other = batch["obs"] + torch.tensor([0.0, 100.0, 0.0])
    torch.testing.assert_close(model.predict(other, batch["action"], model.select()[0])[0], mean)


def test_gradient_of_the_loss_by_finite_differences():
    model = small_model().double()
    batch = {name: column.double() for name, column in batch_of(5).items()}
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(ensemble_loss(model, batch, (0.1, 0.2, 0.3)), parameters)
    rng = np.random.default_rng(0)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        for index in rng.integers(parameter.numel(), size=3):
            value, losses = parameter.data.view(-1)[index].clone(), []
            for step in (1e-5, -1e-5):
                parameter.data.view(-1)[index] = value + step
                losses.append(ensemble_loss(model, batch, (0.1, 0.2, 0.3)).item())
            parameter.data.view(-1)[index] = value
            numerical = (losses[0] - losses[1]) / 2e-5
            assert numerical == pytest.approx(gradient.view(-1)[index].item(), rel=1e-5, abs=1e-7)


def test_log_variance_stays_between_its_bounds():
    model = small_model()
    assert model.max_logvar.tolist() == [0.5] * OBS
    assert model.min_logvar.tolist() == [-10.0] * OBS
    with torch.no_grad():
        for scale in (1e3, -1e3):
            model.dynamics[-1][..., OBS:] = scale
            _, logvar = model.gaussian(batch_of(5)["obs"], batch_of(5)["action"], model.select()[0])
            assert logvar.min() >= -10.0 - 1e-4
            assert logvar.max() <= 0.5 + 1e-4


# --- training -------------------------------------------------------------------------------------------------------
def linear_data(rows: int = 300, noise: float = 0.0) -> Buffer:
    """A system whose change is linear, with a reward, and a termination at the edge."""
    data, rng = Buffer(OBS, ACTION, torch.device("cpu")), np.random.default_rng(0)
    for row in range(rows):
        obs, action = rng.normal(size=OBS), rng.uniform(-1, 1, ACTION)
        delta = 0.1 * obs[::-1] + 0.3 * action.sum() + noise * rng.normal(size=OBS)
        fields = {
            "terminated": (obs + delta)[0] > 1,
            "episode": row // 50,
            "holdout": row % 5 == 0,
        }
        data.add(obs=obs, action=action, reward=(obs + delta).sum(), delta=delta, **fields)
    return data


def trained(data: Buffer, **fields: object) -> tuple[Ensemble, dict[str, float]]:
    args = small_args(**{"hidden": (32, 32), "max_updates": 600, "model_batch_size": 32, **fields})
    model = Ensemble(OBS, ACTION, args, generator())
    optimizer = torch.optim.Adam(model.parameters(), lr=args.model_lr)
    return model, fit(model, optimizer, data, args, generator(1))


def test_it_learns_a_linear_system_its_reward_and_where_it_ends():
    model, logs = trained(linear_data(600))
    data = linear_data(650)
    obs, action, delta = (column[600:650].expand(2, -1, -1) for column in (data.obs, data.action, data.delta))
    dynamics, reward, termination = model.select(model.elites)
    mean, _ = model.predict(obs, action, dynamics)
    assert ((mean - delta) ** 2).mean() < 0.02 * delta.var()
    rewards = model.predict_reward(delta, action, obs + delta, reward)[..., 0]
    assert torch.corrcoef(torch.stack([rewards[0], data.reward[600:650]]))[0, 1] > 0.98
    ended = model.termination_logit(obs + delta, termination)[..., 0] > 0
    assert (ended == data.terminated[600:650]).float().mean() > 0.9
    assert logs["model/holdout_mse"] < 0.05


def test_noise_of_the_world_is_found_and_covered():
    model, _ = trained(linear_data(1_000, noise=0.2))
    data = linear_data(1_200, noise=0.2)
    logs = cem_mpc.diagnose(model, data, 1_000)
    assert 0.8 < logs["model/coverage_90"] < 0.97
    constant = linear_data(1_000, noise=0.2)  # what never changes is foreseen exactly, which says nothing
    constant.delta[:, 1] = 0.0
    assert 0.8 < cem_mpc.diagnose(trained(constant)[0], constant, 800)["model/coverage_90"] < 0.97
    _, std = model.predict(data.obs[None, :200], data.action[None, :200], model.select(torch.tensor([0]))[0])
    assert std.mean().item() == pytest.approx(0.2, rel=0.25)
    assert {"model/error_1_steps", "model/error_20_steps", "model/error_dim_2", "model/error_reward"} < set(logs)


def test_holdout_rows_never_enter_training():
    data, other = linear_data(), linear_data()
    for column in (other.obs, other.delta, other.reward):
        column[other.holdout] = 100.0
    models = [trained(rows, max_updates=1)[0] for rows in (data, other)]
    for one, two in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, two)
    for name in ("obs_mean", "delta_std", "reward_mean"):
        assert torch.equal(getattr(models[0], name), getattr(models[1], name))


def holdout_errors(model: Ensemble, data: Buffer) -> tuple[Tensor, Tensor]:
    """Squared errors (E,) of delta obs and of reward, by plain networks."""
    rows = data.holdout.nonzero()[:, 0]
    obs, action, delta, reward = (column[rows] for column in (data.obs, data.action, data.delta, data.reward[:, None]))
    errors = []
    for member in range(4):
        mean, _ = plain_prediction(model, member, obs, action)
        delta_error = mean - (delta - model.delta_mean) / model.delta_std
        predicted = plain_reward(model, member, delta, action, obs + delta)
        reward_error = predicted - (reward - model.reward_mean) / model.reward_std
        errors.append(torch.stack([(delta_error**2).mean(), (reward_error**2).mean()]).detach())
    return torch.stack(errors).unbind(1)


def test_each_network_is_left_with_its_best_weights_and_the_best_are_the_elites(monkeypatch):
    data, losses, seen = linear_data(noise=0.5), cem_mpc.ensemble_losses, []

    def watched(model: Ensemble, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
        result = losses(model, batch)
        if batch["obs"].shape[1] == data.holdout.sum():
            seen.append(torch.stack(result[1:3]).detach())
        return result

    monkeypatch.setattr(cem_mpc, "ensemble_losses", watched)
    model, logs = trained(data, model_lr=0.03, patience=8)  # so coarse that later epochs are often worse
    delta_error, reward_error = holdout_errors(model, data)
    lowest = torch.stack(seen[:-1]).min(0).values  # (2, E); the last one is of the restored weights
    for error, best, name in ((delta_error, lowest[0], "mse"), (reward_error, lowest[1], "reward_mse")):
        assert (error <= best * 1.011 + 1e-6).all()  # what was better by less than 1 % was not kept
        assert error.mean().item() == pytest.approx(logs[f"model/holdout_{name}"], rel=1e-4)
    assert (torch.stack(seen[-2:-1])[0, 0] > 1.02 * delta_error).any()
    assert set(model.elites.tolist()) == set(delta_error.argsort()[:2].tolist())


def test_training_stops_when_nothing_gets_better():
    data = linear_data(40)
    data.delta[:] = torch.randn(data.delta.shape, generator=generator())
    _, logs = trained(data, patience=2, max_updates=100_000)
    assert logs["model/updates"] < 400


@pytest.mark.parametrize(
    "loss",
    [
        lambda model, batch, _: cem_mpc.ensemble_losses(model, batch)[2].sum(),  # the reward gets better,
        lambda model, batch, _: 1e-3 * cem_mpc.ensemble_losses(model, batch)[0].sum(),  # the dynamics by less than 1 %
    ],
)
def test_patience_is_with_the_dynamics_and_ends_at_small_steps(loss, monkeypatch):
    data, args = linear_data(400), small_args(hidden=(32, 32), max_updates=10_000, patience=3)
    model = Ensemble(OBS, ACTION, args, generator())
    monkeypatch.setattr(cem_mpc, "ensemble_loss", loss)
    logs = fit(model, torch.optim.SGD(model.parameters(), lr=1e-3), data, args, generator(1))
    assert logs["model/updates"] == (1 + 4) * 10  # 320 rows are 10 batches; the first epoch is better than none


@pytest.mark.parametrize(("rows", "size"), [(30, 24), (500, 32), (2_000, 100), (6_000, 256)])
def test_batches_grow_with_the_data(rows, size, monkeypatch):
    data, args, seen = linear_data(rows), small_args(hidden=(8, 8), max_updates=1, model_batch_size=256), []

    def loss(model: Ensemble, batch: dict[str, Tensor], decay: tuple[float, ...]) -> Tensor:
        seen.append(batch["obs"].shape[1])
        return ensemble_loss(model, batch, decay)

    model = Ensemble(OBS, ACTION, args, generator())
    monkeypatch.setattr(cem_mpc, "ensemble_loss", loss)
    fit(model, torch.optim.Adam(model.parameters()), data, args, generator(1))
    assert seen == [size]  # an epoch has no more updates than a training


def test_bootstrap_gives_every_member_rows_of_its_own():
    model, _ = trained(linear_data(), max_updates=1)
    untrained = Ensemble(OBS, ACTION, small_args(hidden=(32, 32)), generator())
    steps = [
        (after - before).flatten(1) for before, after in zip(untrained.dynamics[::2], model.dynamics[::2], strict=True)
    ]
    for step in steps:
        assert all(not torch.equal(step[i], step[j]) for i in range(4) for j in range(i))


# --- trajectory sampling --------------------------------------------------------------------------------------------
def test_imagined_returns_equal_particles_followed_one_by_one():
    model, (count, steps, particles, groups) = small_model(), (3, 4, 4, 2)
    obs, plans = torch.randn(OBS, generator=generator(3)), torch.randn(count, steps, ACTION, generator=generator(4))
    noise = torch.randn(steps, groups, count * particles // groups, OBS, generator=generator(5))
    layers = model.select(torch.tensor([2, 0]))
    value = nn.Linear(OBS, 1)
    got = imagine(model, layers, obs, plans, noise, None, 0.9, None, None, lambda state: value(state)[..., 0])
    for sequence in range(count):
        returns = []
        for group, member in enumerate((2, 0)):
            for particle in range(particles // groups):
                state, alive, total = obs, 1.0, 0.0
                one = model.select(torch.tensor([member]))
                for step in range(steps):
                    action = plans[sequence, step]
                    mean, std = model.predict(state[None, None], action[None, None], one[0])
                    delta = mean[0, 0] + std[0, 0] * noise[step, group, sequence * (particles // groups) + particle]
                    state = state + delta
                    reward = plain_reward(model, member, delta, action, state)[0]
                    total += 0.9**step * alive * (reward * model.reward_std[0] + model.reward_mean[0])
                    alive = alive * (1 - torch.sigmoid(plain_logit(model, member, state)[0]))
                returns.append(total + 0.9**steps * alive * value(state)[0])
        torch.testing.assert_close(got[sequence], torch.stack(returns).mean())


class Walkers:
    """Stands in for the ensemble: member g moves the state by g + 1, whatever the action."""

    def predict(self, obs: Tensor, action: Tensor, layers: Tensor) -> tuple[Tensor, Tensor]:
        return (layers[:, None, None] + 1.0).expand_as(obs), torch.zeros_like(obs)


def test_ts_infinity_keeps_a_particle_with_its_member_and_ts1_does_not():
    ends: list[Tensor] = []

    def value(state: Tensor) -> Tensor:
        ends.append(state[..., 0])
        return state[..., 0]

    groups, steps, rows = 5, 6, 40
    noise, plans = torch.zeros(steps, groups, rows, 1), torch.zeros(rows, steps, 1)
    walk = (Walkers(), (torch.arange(5.0),), torch.zeros(1), plans, noise)
    end = lambda *_: torch.zeros(groups, rows, dtype=torch.bool)  # noqa: E731
    reward = lambda obs, action, after: torch.zeros(groups, rows)  # noqa: E731
    imagine(*walk, None, 1.0, reward, end, value)
    assert torch.equal(ends[0], 6.0 * torch.arange(1.0, 6.0)[:, None].expand(5, rows))
    order = torch.rand(steps, groups, rows, generator=generator()).argsort(1)
    returns = imagine(*walk, order, 1.0, reward, end, value)
    assert torch.equal(returns, torch.full((rows,), 18.0))  # each step deals every member to one particle of a sequence
    assert len(ends[1].unique()) > 15


def test_given_reward_and_termination_are_used_and_a_dead_particle_earns_nothing():
    plans = torch.zeros(1, 4, 1)
    walk = (Walkers(), (torch.zeros(1),), torch.zeros(1), plans, torch.zeros(4, 1, 1, 1))

    def reward(obs: Tensor, action: Tensor, after: Tensor) -> Tensor:
        return after[..., 0]

    def end(obs: Tensor, action: Tensor, after: Tensor) -> Tensor:
        return after[..., 0] >= 2

    assert imagine(*walk, None, 1.0, reward, end, lambda state: 100.0).item() == 1 + 2
    assert imagine(*walk, None, 0.5, reward, lambda *_: torch.tensor(False), None).item() == 1 + 1 + 0.75 + 0.5


# --- planners -------------------------------------------------------------------------------------------------------
TARGET = torch.tensor([[0.3, -0.6], [0.8, 0.1], [-0.2, 1.0]])  # (H, A), one on the bound


def towards_target(plans: Tensor) -> Tensor:
    return -((plans - TARGET) ** 2).sum((1, 2))


@pytest.mark.parametrize(
    ("planner", "tolerance", "fields"),
    [
        ("random_shooting", 0.7, {"population": 2_000}),
        ("cem", 0.1, {}),  # at a bound its variance goes to zero before it is there
        ("icem", 0.1, {"noise_beta": 0.5}),
        ("mppi", 0.2, {"iterations": 20, "momentum": 0.0}),
        ("gradient", 0.02, {"iterations": 60}),
    ],
)
def test_planners_find_the_optimum_of_a_known_function(planner, tolerance, fields):
    args = small_args(**{"population": 200, "num_best": 20, "iterations": 10, "planner": planner, **fields})
    for seed in range(3):
        plans = cem_mpc.BOX_PLANNERS[planner](towards_target, torch.zeros(1, 3, 2), args, generator(seed))
        assert (plans[0] - TARGET).abs().max() < tolerance
        assert plans.abs().max() <= 1.0


@pytest.mark.parametrize("planner", ["random_shooting", "cem"])
def test_discrete_planners_find_the_best_sequence(planner):
    args = small_args(population=200, num_best=20, iterations=6)
    best = torch.tensor([2, 0, 1])
    for seed in range(3):
        score = lambda plans: (plans.argmax(-1) == best).float().sum(1)  # noqa: E731
        plans = cem_mpc.DISCRETE_PLANNERS[planner](score, torch.full((1, 3, 3), 1 / 3), args, generator(seed))
        assert plans[0].argmax(-1).tolist() == best.tolist()
        torch.testing.assert_close(plans[0].sum(-1), torch.ones(3))


def test_discrete_cem_goes_on_searching_from_a_plan_that_was_certain():
    certain = torch.tensor([[[1.0, 0.0]] * 3])
    score = lambda plans: plans[..., 1].sum(1)  # noqa: E731
    plans = cem_mpc.cem_discrete(score, certain, small_args(population=50, num_best=5, iterations=5), generator())
    assert plans[0].argmax(-1).tolist() == [1, 1, 1]


@pytest.mark.parametrize("planner", ["cem", "gradient"])
def test_first_action_is_that_of_the_linear_quadratic_regulator(planner):
    a, b = np.array([[1.0, 0.1], [0.0, 1.0]]), np.array([[0.0], [0.1]])
    q, r, horizon, x0 = np.diag([1.0, 0.1]), np.array([[0.05]]), 12, np.array([0.2, -0.1])
    p = q.copy()
    for _ in range(horizon):  # the Riccati recursion, finite horizon
        k = np.linalg.solve(r + b.T @ p @ b, b.T @ p @ a)
        p = q + a.T @ p @ (a - b @ k)
    exact = float((-k @ x0)[0])

    def score(plans: Tensor) -> Tensor:
        x, cost = torch.tensor(x0, dtype=torch.float32).expand(len(plans), 2), torch.zeros(len(plans))
        for step in range(horizon):
            u = plans[:, step]
            cost = cost + (x @ torch.tensor(q).float() * x).sum(1) + r[0, 0] * u[:, 0] ** 2
            x = x @ torch.tensor(a).float().T + u @ torch.tensor(b).float().T
        return -(cost + (x @ torch.tensor(q).float() * x).sum(1))

    assert abs(exact) < 0.95
    fields = {"population": 800, "num_best": 80, "iterations": 20} if planner == "cem" else {"iterations": 300}
    plans = cem_mpc.BOX_PLANNERS[planner](score, torch.zeros(1, horizon, 1), small_args(**fields), generator())
    assert plans[0, 0, 0].item() == pytest.approx(exact, abs=0.02)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("planner", list(cem_mpc.BOX_PLANNERS))
def test_a_return_that_is_no_number_never_wins(planner, bad):
    def score(plans: Tensor) -> Tensor:
        return torch.where(plans[:, 0, 0] > 0.2, bad, -10 - ((plans - 1) ** 2).sum((1, 2)))

    args = small_args(population=60, num_best=30, iterations=8)
    plans = cem_mpc.BOX_PLANNERS[planner](score, torch.zeros(1, 3, 2), args, generator())
    assert plans.isfinite().all()
    assert plans[0, 0, 0] <= 0.25
    plans = cem_mpc.BOX_PLANNERS[planner](
        lambda plans: plans.sum((1, 2)) * bad, torch.zeros(1, 3, 2), args, generator()
    )
    assert plans.isfinite().all()


def test_where_few_returns_are_numbers_only_these_count():
    returns = torch.tensor([-math.inf, 1.0, math.nan, 3.0, math.inf])
    best, finite = cem_mpc.best_sequences(torch.arange(5.0).view(5, 1, 1), returns, 4)
    assert best.flatten()[:2].tolist() == [3, 1]
    assert finite.tolist() == [True, True, False, False]


def test_cem_returns_the_mean_of_the_best_and_momentum_weighs_the_old():
    seen: list[Tensor] = []

    def score(plans: Tensor) -> Tensor:
        seen.append(plans.clone())
        return towards_target(plans)

    start = torch.full((1, 3, 2), 0.5)
    plans = cem_mpc.cem(score, start, small_args(num_best=3, iterations=1, momentum=0.0), generator())
    mean = seen[0][towards_target(seen[0]).topk(3).indices].mean(0)
    torch.testing.assert_close(plans[0], mean)
    assert not (seen[0] == plans[0]).all(-1).any()
    plans = cem_mpc.cem(score, start, small_args(num_best=3, iterations=1, momentum=0.9), generator())
    torch.testing.assert_close(plans[0], 0.9 * start[0] + 0.1 * mean)
    assert all((sample.abs() <= 1).all() for sample in seen)  # the variance is bounded by the distance to the bounds
    assert seen[0].std() < 0.3


@pytest.mark.parametrize("steps", [1, 2, 9, 10])
@pytest.mark.parametrize("beta", [0.0, 2.0])
def test_coloured_noise_has_unit_variance_and_its_colour(steps, beta):
    noise = cem_mpc.coloured_noise((20_000, steps, 1), beta, generator())[..., 0]
    assert noise.std(0).sub(1).abs().max() < 0.03
    if steps > 2:
        correlation = (noise[:, 1:] * noise[:, :-1]).mean()
        assert (correlation > 0.5) if beta else (abs(correlation) < 0.02)


# --- agent ----------------------------------------------------------------------------------------------------------
def driven(steps: int = 60, **fields: object) -> tuple[Agent, np.ndarray]:
    """An agent after so many steps in its environment, and the next observation."""
    args = small_args(**fields)
    env = gym.make(args.env_id)
    agent, (obs, _) = Agent(env.observation_space, env.action_space, args), env.reset(seed=0)
    for _ in range(steps):
        action = agent.act(obs)
        next_obs, reward, terminated, truncated, _ = env.step(action)
        agent.observe(obs, action, reward, next_obs, terminated, truncated)
        agent.update()
        obs = env.reset(seed=1)[0] if terminated or truncated else next_obs
    return agent, obs


def test_the_plan_is_shifted_within_an_episode_and_forgotten_at_its_end():
    agent, obs = driven()
    given: list[Tensor] = []
    planner = agent.planner
    agent.planner = lambda score, start, *rest: given.append(start) or planner(score, start, *rest)
    agent.starts = {}
    agent.act(obs)
    assert torch.equal(given[0], torch.zeros(1, 3, 1))
    first = agent.starts[0]
    agent.observe(obs, [0.0], 0.0, obs, False, False)
    agent.act(obs)
    assert torch.equal(given[1], first)
    assert torch.equal(first[0, -1], torch.zeros(1))
    for end in ((True, False), (False, True)):
        agent.observe(obs, [0.0], 0.0, obs, *end)
        assert agent.starts == {}
        agent.act(obs)
        assert torch.equal(given[-1], torch.zeros(1, 3, 1))


def test_a_policy_has_a_plan_of_its_own():
    agent, obs = driven()
    before = agent.generator.get_state().clone(), agent.starts[0].clone()
    policy, again = agent.greedy_policy(5), agent.greedy_policy(5)
    assert [policy(obs) for _ in range(3)] == [again(obs) for _ in range(3)]
    assert torch.equal(agent.generator.get_state(), before[0])
    assert torch.equal(agent.starts[0], before[1])


@pytest.mark.parametrize(
    "fields",
    [
        {"planner": "icem"},
        {"sampling": "ts1", "compile": True, "reward_fn": "test_cem_mpc:no_swing"},
        {"env_id": "CartPole-v1", "terminal_value": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda agent: pickle.loads(pickle.dumps(agent))])
def test_a_copy_goes_on_like_the_original(fields, copied, monkeypatch):
    monkeypatch.setattr(cem_mpc, "compiled", lambda function: function)  # to compile takes long
    monkeypatch.setattr(cem_mpc.Value, "rounds", 2)
    agent, obs = driven(60, **fields)
    other = copied(agent)
    assert other.metrics() == agent.metrics()
    env = gym.make(agent.args.env_id)
    env.reset(seed=5)
    for _ in range(60):
        action = agent.act(obs)
        assert np.array_equal(action, other.act(obs))
        next_obs, reward, terminated, truncated, _ = env.step(action)
        for one in (agent, other):
            one.observe(obs, action, reward, next_obs, terminated, truncated)
            one.update()
        obs = env.reset()[0] if terminated or truncated else next_obs
    assert agent.trained_at == other.trained_at > 60
    assert plain(agent.state_dict()) == plain(other.state_dict())
    assert other.metrics() == agent.metrics()


def no_swing(obs: Tensor, action: Tensor, next_obs: Tensor) -> Tensor:
    return -(next_obs[..., 2] ** 2)


def in_turn(agent: Agent, steps: int, ends: tuple[tuple[int, int], ...] = ()) -> None:
    """Four environments, each of which moves by 1 a step, from 100 times its number."""
    for step in range(steps):
        for env in range(4):
            obs = np.full(3, 100.0 * env + step)
            agent.observe(obs, np.zeros(1), float(step % 3), obs + 1, False, (env, step) in ends, env)


def test_several_environments_in_turn_are_told_apart():
    agent, _ = driven(0)
    in_turn(agent, 12, ends=((2, 3),))
    episode = agent.data.column("episode")[:, 0].view(12, 4)
    assert len(episode.unique()) == 5
    assert [len(column.unique()) for column in episode.T] == [1, 1, 2, 1]
    assert (episode[:4, 2] != episode[4, 2]).all()
    agent.model.predict = lambda obs, action, layers: (torch.ones_like(obs), torch.zeros_like(obs))
    logs = cem_mpc.diagnose(agent.model, agent.data, 8)
    errors = {name: value for name, value in logs.items() if name.endswith("_steps")}
    assert errors == {f"model/error_{steps}_steps": 0.0 for steps in (1, 5, 10)}  # none is longer than 12


def test_each_environment_has_a_plan_of_its_own():
    agent, obs = driven()
    for env in (1, 2):
        agent.act(obs, env)
    plans = dict(agent.starts)
    agent.observe(obs, [0.0], 0.0, obs, True, env=1)
    assert set(agent.starts) == {0, 2}
    agent.act(obs, 2)
    assert torch.equal(agent.starts[0], plans[0])
    assert not torch.equal(agent.starts[2], plans[2])


def test_lambda_returns_of_several_environments_are_those_of_each():
    agent, _ = driven(0)
    in_turn(agent, 12, ends=((2, 3),))
    value = cem_mpc.Value(OBS, generator())
    with torch.no_grad():
        together = value.lambda_returns(agent.data, 0.9).view(12, 4)
        for env in range(4):
            alone = Buffer(OBS, 1, torch.device("cpu"))
            for row in range(env, 48, 4):
                names = ("obs", "action", "reward", "delta", "terminated", "episode", "holdout")
                alone.add(**{name: getattr(agent.data, name)[row] for name in names})
            torch.testing.assert_close(together[:, env], value.lambda_returns(alone, 0.9))


def test_discrete_actions_are_those_of_the_space():
    space = gym.spaces.Discrete(3, start=5)
    agent = Agent(gym.spaces.Box(-1, 1, (2,)), space, small_args(learning_starts=20))
    actions = []
    for _ in range(30):
        actions.append(agent.act(np.zeros(2, np.float32)))
        agent.observe(np.zeros(2), actions[-1], 0.0, np.ones(2), False)
        agent.update()
    assert {type(action) for action in actions} == {type(space.sample())}
    assert set(actions[:20]) == {5, 6, 7}
    assert agent.data.action[:30].argmax(1).tolist() == [action - 5 for action in actions]


def test_what_is_stored_is_a_copy():
    agent, _ = driven(0)
    obs, action, next_obs = np.ones(3), np.ones(1), np.full(3, 3.0)
    agent.observe(obs, action, 1.0, next_obs, False)
    for array in (obs, action, next_obs):
        array[:] = 9.0
    assert (agent.data.obs[0].tolist(), agent.data.delta[0].tolist()) == ([1.0] * 3, [2.0] * 3)
    assert agent.data.action[0].tolist() == [1.0]


def test_what_goes_on_is_said():
    agent, _ = driven(0)
    said: list[str] = []
    for row in range(80):
        agent.observe(np.full(3, float(row)), np.zeros(1), 0.0, np.ones(3), False)
        agent.update(said.append)
    assert said == ["training the model", ""] * 2


@pytest.mark.parametrize(
    "fields",
    [
        {"num_elites": 5},
        {"num_best": 9},
        {"particles": 3},
        {"weight_decay": (0.0, 0.0)},
        {"weight_decay": (0.0, 0.0, math.nan)},
        {"hidden": (16, 0)},
        {"planner": "gradient", "env_id": "CartPole-v1"},
    ],
    ids=str,
)
def test_arguments_that_do_not_fit_each_other_are_refused(fields):
    with pytest.raises(cem_mpc.Failure, match="--" + next(iter(fields)).replace("_", "-")):
        driven(0, **fields)


def test_differences_are_taken_before_they_are_rounded():
    agent, _ = driven(0)
    agent.observe(np.array([1e6, 0, 0]), np.zeros(1), 0.0, np.array([1e6 + 1e-3, 0, 0]), False)
    assert agent.data.delta[0, 0].item() == pytest.approx(1e-3, rel=1e-6)


def test_actions_cover_the_range_of_the_environment():
    agent, obs = driven(0)
    actions = np.array([agent.act(obs) for _ in range(500)])
    assert actions.min() < -1.95
    assert actions.max() > 1.95
    assert np.abs(actions).max() <= 2.0
    low, high = torch.tensor([-1.0]), torch.tensor([1.0])
    assert (agent.to_env(low).item(), agent.to_env(high).item()) == (-2.0, 2.0)


def test_holdout_is_capped():
    agent, _ = driven(120, holdout_ratio=0.5, max_holdout=10)
    assert agent.data.holdout.sum() == 10


def test_a_full_holdout_set_goes_on_to_be_a_sample_of_all_rows():
    data, draws, quarters = Buffer(1, 1, torch.device("cpu")), generator(0), []
    for size in range(8_000):
        holdout = data.draw_holdout(0.2, 200, draws)
        data.add(obs=[0], action=[0], reward=0, delta=[0], terminated=False, episode=0, holdout=holdout)
        if size == 799:
            assert 120 < data.holdout[:800].sum() < 200  # not full yet: a fifth
    assert data.holdout.sum() == 200
    quarters = data.holdout[:8_000].view(4, -1).sum(1)
    assert quarters.min() > 30
    assert quarters.max() < 70


def test_buffer_grows_and_keeps_what_it_holds():
    data = linear_data(3_000)
    assert data.size == 3_000
    state = data.state_dict()
    assert all(len(column) == 3_000 for column in state.values())
    other = Buffer(OBS, ACTION, torch.device("cpu"))
    other.load_state_dict(state)
    for name, column in state.items():
        assert torch.equal(getattr(other, name)[:3_000], column)


def test_a_checkpoint_of_another_kind_of_device_is_read():
    agent, obs = driven()
    state = agent.state_dict()
    state["generator"] = {"cuda": torch.zeros(16, dtype=torch.uint8)}
    other, _ = driven(0)
    other.load_state_dict(state)
    assert np.isfinite(other.act(obs)).all()


def test_actions_have_the_type_of_the_environments():
    space = gym.spaces.Box(-1, np.array([[1.0, 3.0]]), (1, 2), np.float64)
    agent = Agent(gym.spaces.Box(-1, 1, (2,)), space, small_args(learning_starts=1))
    for _ in range(3):
        action = agent.act(np.zeros(2, np.float32))
        assert space.contains(action)
        agent.observe(np.zeros(2), action, 0.0, np.ones(2), False)
        agent.update()
    with pytest.raises(cem_mpc.Failure, match="floating-point"):
        Agent(gym.spaces.Box(-1, 1, (2,)), gym.spaces.Box(0, 5, (2,), np.int64), small_args())


def test_the_first_row_is_always_one_to_train_on():
    for seed in range(20):
        agent, _ = driven(0, seed=seed, holdout_ratio=0.9, learning_starts=1)
        agent.observe(np.zeros(3), np.zeros(1), 0.0, np.ones(3), False)
        agent.update()
        assert agent.trained_at == 1


def test_given_functions_relabel_what_is_stored():
    agent, _ = driven(0)
    agent.reward_fn = lambda obs, action, next_obs: next_obs[..., 0] + action[..., 0]
    agent.termination_fn = lambda obs, action, next_obs: next_obs[..., 1] > 2
    agent.observe(np.zeros(3), np.ones(1), 99.0, np.array([5.0, 3.0, 0.0]), False)
    agent.observe(np.zeros(3), np.ones(1), 99.0, np.array([6.0, 1.0, 0.0]), True)
    assert agent.data.column("reward").tolist() == [[6.0], [7.0]]
    assert agent.data.column("terminated").tolist() == [[True], [False]]


# --- terminal value -------------------------------------------------------------------------------------------------
def test_lambda_returns_by_their_definition():
    value, data, rng = (
        cem_mpc.Value(OBS, generator()),
        Buffer(OBS, ACTION, torch.device("cpu")),
        np.random.default_rng(0),
    )
    ends = {6: True, 11: False}  # a termination, a truncation; the data end in the middle of an episode
    for row in range(15):
        fields = {"terminated": ends.get(row, False), "episode": sum(row > end for end in ends), "holdout": False}
        data.add(obs=rng.normal(size=OBS), action=[0, 0], reward=rng.normal(), delta=rng.normal(size=OBS), **fields)
    gamma, trace = 0.9, value.trace
    next_value = value(data.obs[:15] + data.delta[:15]).tolist()

    def n_step(first: int, last: int) -> float:
        total = sum(gamma ** (step - first) * data.reward[step].item() for step in range(first, last + 1))
        return total + (not ends.get(last, False)) * gamma ** (last - first + 1) * next_value[last]

    with torch.no_grad():
        returns = value.lambda_returns(data, gamma)
    for row in range(15):
        end = next(end for end in [*ends, 14] if end >= row)  # equation 12.3: the rest of the weight is the last one's
        wanted = sum((1 - trace) * trace ** (last - row) * n_step(row, last) for last in range(row, end))
        wanted += trace ** (end - row) * n_step(row, end)
        assert returns[row].item() == pytest.approx(wanted, rel=1e-4, abs=1e-5)


def test_value_learns_what_a_state_is_worth():
    value, data = cem_mpc.Value(1, generator()), Buffer(1, 1, torch.device("cpu"))
    for row in range(600):  # 1 for each step until 20 have passed
        position = row % 20
        fields = {"terminated": position == 19, "episode": row // 20, "holdout": False}
        data.add(obs=[position], action=[0], reward=1.0, delta=[1], **fields)
    logs = value.fit(data, None, 0.9, generator(1))
    wanted = (1 - 0.9 ** (20 - torch.arange(20.0))) / 0.1
    assert (value(torch.arange(20.0)[:, None]) - wanted).abs().max() < 0.5
    assert logs["losses/value_loss"] < 0.01


def test_value_is_that_of_the_best_actions_though_the_data_show_the_worst():
    """States 0 to 5, reward 1 for each step that leads to 5, where it stays; what was done always led to the end."""
    value, data = cem_mpc.Value(1, generator()), Buffer(1, 1, torch.device("cpu"))
    for row in range(600):
        fields = {"terminated": True, "episode": row, "holdout": False}
        data.add(obs=[row % 6], action=[0], reward=float(row == 0), delta=[1], **fields)
    obs = data.column("obs")
    right = (obs + 1).clamp(max=5)
    after, rewards = torch.stack([right, obs]), torch.stack([(right == 5).float()[:, 0], torch.zeros(600)])
    options = cem_mpc.Lookahead(obs, after, rewards, torch.full((2, 600), 0.5))
    value.fit(data, options, 0.5, generator(1))
    wanted = 2 * 0.5 ** torch.tensor([4.0, 3, 2, 1, 0, 0])  # 1 + 0.5 + 0.25 + ... where it is reached next
    wanted[0] = 1.0  # its data once had a reward of 1, which is more than it is worth
    assert (value(torch.arange(1.0, 6.0)[:, None]) - wanted[1:]).abs().max() < 0.1
    assert (value(obs) < 2.1).all()


def test_value_is_never_above_what_the_best_reward_forever_would_give():
    data = linear_data(60)
    value, obs, most = cem_mpc.Value(OBS, generator()), data.column("obs"), data.column("reward").max().item()
    huge = cem_mpc.Lookahead(obs, obs[None], torch.full((1, len(obs)), 1e6), torch.full((1, len(obs)), 0.9))
    value.fit(data, huge, 0.9, generator(1))
    assert value(obs).mean().item() == pytest.approx(max(most, most / 0.1), rel=0.05)


def test_value_is_the_mean_of_its_networks_less_two_standard_deviations():
    value = cem_mpc.Value(OBS, generator())
    value.most.fill_(0.1)
    obs = torch.randn(4, 3, OBS, generator=generator(1))
    each = []
    for member in range(value.networks):
        x = obs
        for index in range(0, len(value.layers), 2):
            x = x @ value.layers[index][member] + value.layers[index + 1][member]
            x = torch.nn.functional.silu(x) if index < len(value.layers) - 2 else x
        each.append(x.squeeze(-1))
    mean, std = torch.stack(each).mean(0), torch.stack(each).std(0, correction=0)
    assert (mean > 0.1).any()  # the mean is cut off, but not the disagreement
    torch.testing.assert_close(value(obs), mean.clamp(max=0.1) - 2 * std, atol=1e-5, rtol=1e-4)


def test_value_does_not_promise_much_where_nothing_was_seen():
    value = cem_mpc.Value(2, generator())
    data = Buffer(2, 1, torch.device("cpu"))
    for row in range(600):  # in the middle of a square all is well for ten steps, whatever is done
        where = (torch.rand(2, generator=generator(row)) - 0.5).tolist()
        data.add(
            obs=where, action=[0], reward=1.0, delta=[0, 0], terminated=row % 10 == 9, episode=row // 10, holdout=False
        )
    value.fit(data, None, 0.9, generator(1))
    far = torch.tensor([[5.0, 5], [-5, 5], [5, -5], [-5, -5]])

    def discount(obs: torch.Tensor) -> float:  # what the value is below the mean of its networks, for not being sure
        mean = value.standardised(obs.expand(value.networks, -1, -1)).mean(0) * value.return_std + value.return_mean
        return (mean.clamp(max=value.most) - value(obs)).mean().item()

    assert discount(far) > 3 * discount(far / 20) > 0


def test_the_lookahead_is_what_the_elites_foresee_in_turn():
    env = gym.make("CartPole-v1")
    agent = Agent(env.observation_space, env.action_space, small_args(terminal_value=True, gamma=0.9))
    env.action_space.seed(0)
    obs, _ = env.reset(seed=0)
    for _ in range(40):
        action = env.action_space.sample()
        next_obs, reward, terminated, truncated, _ = env.step(action)
        agent.observe(obs, action, reward, next_obs, terminated, truncated)
        obs = env.reset()[0] if terminated or truncated else next_obs
    agent.update()
    before = agent.generator.get_state()
    states, after, rewards, discounts = agent.lookahead(steps=3, count=60)
    assert torch.equal(states[:40], agent.data.column("obs"))  # the real ones, and what the model leads to from them
    assert 80 < len(states) <= 100
    distance = (states[40:, None] - states[None, :40]).norm(dim=-1).amin(1)
    assert 0 < distance.max() < 1
    assert after.shape == (16, len(states), 4)
    assert rewards.shape == discounts.shape == (16, len(states))
    agent.generator.set_state(before)
    torch.randint(40, (60,), generator=agent.generator)
    for _ in range(3):
        agent.random_indices(60)
    sequences = [agent.random_indices(3).tolist() for _ in range(16)]
    for option, row in ((0, 3), (1, 17), (5, 39), (15, 50)):
        layers = agent.model.select(agent.model.elites[option % len(agent.model.elites)][None])
        state, total, alive = states[row].view(1, 1, -1), 0.0, 1.0
        for step, index in enumerate(sequences[option]):
            action = torch.eye(2)[index].view(1, 1, -1)
            delta, _ = agent.model.predict(state, action, layers[0])
            reward = agent.model.predict_reward(delta, action, state + delta, layers[1])
            total += 0.9**step * alive * (reward * agent.model.reward_std + agent.model.reward_mean).item()
            alive *= 1 - agent.model.termination_logit(state + delta, layers[2]).sigmoid().item()
            state = state + delta
        torch.testing.assert_close(after[option, row], state.view(-1), rtol=1e-4, atol=1e-5)
        assert rewards[option, row].item() == pytest.approx(total, rel=1e-4)
        assert discounts[option, row].item() == pytest.approx(0.9**3 * alive, rel=1e-4)


def test_no_state_behind_a_termination_is_learned_from():
    env = gym.make("CartPole-v1")
    agent = Agent(env.observation_space, env.action_space, small_args(terminal_value=True))
    for _ in range(10):
        agent.observe(np.zeros(4), 0, 1.0, np.full(4, 0.1), False)
    for ends, states in ((False, 10 + 60), (True, 10)):
        agent.termination_fn = lambda obs, action, next_obs, ends=ends: torch.full(next_obs.shape[:-1], ends)
        assert len(agent.lookahead(steps=3, count=60).states) == states


def test_value_is_learned_from_scratch_each_time():
    data = linear_data(60)
    one, two = (cem_mpc.Value(OBS, generator(seed)) for seed in (0, 5))
    two.fit(data, None, 0.9, generator(3))
    for value in (one, two):
        value.rounds = 1
        value.return_mean.zero_()
        value.return_std.fill_(1)
        value.obs_mean.zero_()
        value.obs_std.fill_(1)
        value.fit(data, None, 0.9, generator(1))
    assert all(torch.equal(*pair) for pair in zip(one.layers, two.layers, strict=True))


def saved(run: Path) -> dict:
    """What a checkpoint says of the agent."""
    return torch.load(run / cem_mpc.CHECKPOINT, weights_only=True)["agent"]


def test_init_from_plans_with_another_runs_model_and_data(tmp_path, monkeypatch):
    cem_mpc.train(small_args(run_dir=str(tmp_path / "a"), total_timesteps=80, eval_episodes=1))
    first = only_run(tmp_path / "a")
    (tmp_path / "task.py").write_text("def stand_still(obs, action, next_obs):\n    return -next_obs[..., 2] ** 2\n")
    monkeypatch.syspath_prepend(tmp_path)
    task = {"init_from": str(first), "reward_fn": "task:stand_still", "total_timesteps": 0, "eval_episodes": 1}
    outcome = cem_mpc.train(small_args(run_dir=str(tmp_path / "b"), **task))
    assert outcome["env_steps"] == 0
    assert math.isfinite(outcome["eval_return_mean"])
    state, agent = saved(first), driven(0, **task)[0]
    cem_mpc.init_from(agent, str(first))
    assert all(torch.equal(value, state["model"][name]) for name, value in agent.model.state_dict().items())
    assert agent.data.size == 80
    first.rename(tmp_path / "moved")  # from now on it is not needed
    agent = cem_mpc.load(only_run(tmp_path / "b"))
    evaluated = dataclasses.replace(agent.args, evaluate=str(only_run(tmp_path / "b")))
    run = cem_mpc.Run(evaluated, agent, [], functools.partial(cem_mpc.make_env, evaluated))
    run.evaluate()
    assert run.result["eval_return_mean"] == outcome["eval_return_mean"]
    task["init_from"] = str(tmp_path / "moved")
    cem_mpc.train(small_args(run_dir=str(tmp_path / "c"), **task | {"reward_fn": None, "total_timesteps": 60}))
    data = saved(only_run(tmp_path / "c"))["data"]
    assert len(data["obs"]) == 140
    assert data["episode"][[79, 80, 139]].tolist() == [0, 80, 80]  # the new one begins with an episode of its own
    # What the function said is in the data of the second run; without it the rewards would be mixed.
    task["init_from"] = str(only_run(tmp_path / "b"))
    with pytest.raises(cem_mpc.Failure, match="was made with --reward-fn"):
        cem_mpc.train(small_args(run_dir=str(tmp_path / "d"), **task | {"reward_fn": None}))


def test_init_from_learns_the_value_to_the_end(tmp_path, monkeypatch):
    """A new value needs several fits: with a reward of 1 for ever, 1 / (1 - gamma)."""
    cem_mpc.train(small_args(run_dir=str(tmp_path / "a"), total_timesteps=80, eval_episodes=1))
    (tmp_path / "one.py").write_text("def one(obs, action, next_obs):\n    return 0 * obs[..., 0] + 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    task = {"init_from": str(only_run(tmp_path / "a")), "reward_fn": "one:one", "terminal_value": True, "gamma": 0.99}
    agent, _ = driven(0, **task)
    cem_mpc.init_from(agent, task["init_from"])
    assert agent.value(agent.data.column("obs")).mean() > 90


@pytest.mark.parametrize("name", ["reward_fn", "termination_fn"])
@pytest.mark.parametrize("function", [lambda o, a, n: o, lambda o, a, n: o.sum(1, True), lambda o, a, n: 1.0])
def test_functions_that_give_no_number_for_each_row_are_refused(name, function):
    agent = Agent(gym.spaces.Box(-1, 1, (3,)), gym.spaces.Box(-1, 1, (1,)), small_args())
    setattr(agent, name, function)
    with pytest.raises(cem_mpc.Failure, match="one number for each row"):
        agent.observe(np.zeros(3), np.zeros(1), 0.0, np.zeros(3), False)


def test_gradient_without_a_gradient_returns_one_of_its_sequences():
    plans = cem_mpc.gradient(
        lambda plans: torch.arange(len(plans)).float(), torch.zeros(1, 3, 2), small_args(), generator()
    )
    assert plans.shape == (1, 3, 2)


def test_init_from_a_run_that_has_not_learned_is_refused(tmp_path):
    cem_mpc.train(small_args(run_dir=str(tmp_path / "a"), total_timesteps=5, eval_episodes=1))
    source = str(only_run(tmp_path / "a"))
    with pytest.raises(cem_mpc.Failure, match="it has not trained its model yet"):
        cem_mpc.train(small_args(run_dir=str(tmp_path / "b"), init_from=source))


def test_init_from_killed_before_its_first_checkpoint_starts_there_again(tmp_path):
    cem_mpc.train(small_args(run_dir=str(tmp_path / "a"), total_timesteps=80, eval_episodes=1))
    source = only_run(tmp_path / "a")
    cem_mpc.train(small_args(run_dir=str(tmp_path / "b"), init_from=str(source), total_timesteps=30, eval_episodes=1))
    run = only_run(tmp_path / "b")
    whole = learned(cem_mpc, run)
    (run / cem_mpc.CHECKPOINT).unlink()
    cem_mpc.train(dataclasses.replace(cem_mpc.saved_args(str(run)), resume=str(run)))
    assert learned(cem_mpc, run) == whole
    source.rename(tmp_path / "moved")  # once there is a checkpoint, the other run is not needed
    cem_mpc.train(dataclasses.replace(cem_mpc.saved_args(str(run)), resume=str(run), total_timesteps=40))
    assert len(saved(run)["data"]["obs"]) == 120


def test_without_a_step_it_evaluates_what_it_starts_from_and_saves_it(tmp_path):
    cem_mpc.train(small_args(run_dir=str(tmp_path / "a"), total_timesteps=80, eval_episodes=1))
    task = {"init_from": str(only_run(tmp_path / "a")), "total_timesteps": 0, "eval_episodes": 2}
    outcome = cem_mpc.train(small_args(run_dir=str(tmp_path / "b"), **task))
    run = only_run(tmp_path / "b")
    assert (outcome["env_steps"], outcome["eval_episodes"]) == (0, 2)
    assert ("eval/episodic_return", 0) in [point[:2] for point in scalars(run)]
    cem_mpc.train(dataclasses.replace(cem_mpc.saved_args(str(run)), resume=str(run)))
    assert [tag for tag, *_ in scalars(run)].count("eval/episodic_return") == 1  # it has been done already


def test_what_is_learned_is_logged_once(tmp_path, monkeypatch):
    monkeypatch.setattr(cem_mpc.Value, "rounds", 2)
    cem_mpc.train(small_args(run_dir=str(tmp_path), total_timesteps=150, eval_episodes=1, terminal_value=True))
    points = scalars(only_run(tmp_path))
    for tag in ("losses/model_loss", "losses/value_loss", "model/holdout_mse"):
        assert [step for name, step, _ in points if name == tag] == [30, 70, 110, 150]
    assert [step for name, step, _ in points if name == "model/error_5_steps"] == [70, 110, 150]


@pytest.mark.parametrize(
    "fields",
    [
        {"env_id": "CartPole-v1"},
        {"env_id": "CartPole-v1", "planner": "random_shooting", "terminal_value": False},
        {"env_id": "MountainCarContinuous-v0", "planner": "icem"},
        {"env_id": "Acrobot-v1", "sampling": "ts1"},
        {"planner": "mppi"},
        {"planner": "gradient"},
        {"planner": "random_shooting"},
    ],
    ids=str,
)
def test_every_planner_and_kind_of_action_runs_through(fields, tmp_path):
    args = small_args(run_dir=str(tmp_path), total_timesteps=60, eval_episodes=1, **fields)
    short = dataclasses.replace(args, env_kwargs={"max_episode_steps": 30})
    assert math.isfinite(cem_mpc.train(short)["eval_return_mean"])


@pytest.mark.slow
def test_compiled_it_plans_the_same():
    torch._dynamo.reset()
    plain, compiled = (
        Agent(gym.spaces.Box(-1, 1, (OBS,)), gym.spaces.Box(-1, 1, (ACTION,)), args)
        for args in (small_args(population=20, horizon=4), small_args(population=20, horizon=4, compile=True))
    )
    obs, plans = torch.ones(OBS), torch.rand(20, 4, ACTION, generator=generator())
    with torch.inference_mode():
        networks = plain.model.select(plain.model.elites)
        wanted, found = (agent.score(networks, obs, plans, generator()) for agent in (plain, compiled))
    torch.testing.assert_close(found, wanted)


# --- learning -------------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize(
    ("env_id", "wanted"),
    [
        ("Pendulum-v1", -200),
        ("CartPole-v1", 475),
        ("Acrobot-v1", -100),
        ("Reacher-v5", -9.4),
        ("InvertedPendulum-v5", 1000),
    ],
)
def test_it_learns_with_the_settings_of_the_command_line(env_id, wanted, tmp_path: Path):
    if env_id.endswith("-v5"):
        pytest.importorskip("mujoco")
    settings = cem_mpc.PRESETS.get(env_id, {}) | {"eval_every": 10_000, "seed": 2}
    assert cem_mpc.train(Args(env_id=env_id, run_dir=str(tmp_path), **settings))["eval_return_mean"] >= wanted
