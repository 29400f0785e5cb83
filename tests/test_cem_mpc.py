"""cem_mpc.py against plain networks one at a time, planners followed step by step, exact control, and the traps."""

import copy
import dataclasses
import math
import pickle
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import only_run, plain, scalars, tiny_args
from torch import Tensor, nn
from torch.testing import assert_close

import cem_mpc
from cem_mpc import Agent, Args, Buffer, Ensemble, ensemble_loss, ensemble_optimizer, fit, imagine

OBS, ACTION = 3, 2
ALL = torch.arange(4)  # members


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small_args(**fields: object) -> Args:
    return tiny_args(cem_mpc, **{"ensemble_size": 4, "num_elites": 2, **fields})


def small_model(args: Args | None = None) -> Ensemble:
    """All of whose numbers differ: biases, means, scales, bounds."""
    model, draws = Ensemble(OBS, ACTION, args or small_args(), generator()), generator(1)
    names = {"obs": OBS, "action": ACTION, "delta": OBS, "reward": 1}
    data = {name: torch.randn(50, size, generator=draws) * 2 + 1 for name, size in names.items()}
    model.set_scale(data | {"terminated": (torch.arange(50.0) < 2)[:, None].float()})
    with torch.no_grad():
        for layer in [*model.dynamics[1::2], *model.outcome[1::2]]:
            layer.normal_(generator=draws)
        model.max_logvar += torch.rand(OBS, generator=draws)
        model.min_logvar += torch.rand(OBS, generator=draws)
    return model


def buffer(**columns: Tensor) -> Buffer:
    """With rows from columns (N,) or (N, width)."""
    columns = {name: column.view(len(column), -1).float() for name, column in columns.items()}
    data = Buffer(torch.device("cpu"), **{name: column.shape[1] for name, column in columns.items()})
    data.load_state_dict({"table": torch.cat([*columns.values()], dim=1)})
    return data


def linear_data(rows: int = 300, noise: float = 0.0) -> Buffer:
    """A system whose change is linear, with a reward, and a termination at the edge; every fifth row is held out."""
    draws = generator()
    obs, action = torch.randn(rows, OBS, generator=draws), torch.rand(rows, ACTION, generator=draws) * 2 - 1
    delta = 0.1 * obs.flip(1) + 0.3 * action.sum(1, keepdim=True) + noise * torch.randn(rows, OBS, generator=draws)
    ends, holdout = (obs + delta)[:, 0] > 1, torch.arange(rows) % 5 == 0
    reward = (obs + delta).sum(1)
    return buffer(obs=obs, action=action, delta=delta, reward=reward, terminated=ends, last=ends, holdout=holdout)


# --- ensemble -------------------------------------------------------------------------------------------------------
def plain_networks(model: Ensemble, member: int) -> list[nn.Sequential]:
    """Dynamics and outcome of one member, of torch's own layers."""
    found = []
    for parameters in (model.dynamics, model.outcome):
        layers = []
        for weight, bias in zip(parameters[::2], parameters[1::2], strict=True):
            linear = nn.Linear(*weight.shape[1:])
            linear.weight.data, linear.bias.data = weight[member].detach().T.clone(), bias[member, 0].detach().clone()
            layers += [linear, nn.SiLU()]
        found.append(nn.Sequential(*layers[:-1]))
    return found


def scaled(model: Ensemble, **values: Tensor) -> Tensor:
    return torch.cat([(x - getattr(model, f"{n}_mean")) / getattr(model, f"{n}_std") for n, x in values.items()], -1)


def plain_gaussian(model: Ensemble, network: nn.Module, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
    mean, logvar = network(scaled(model, obs=obs, action=action)).chunk(2, dim=-1)
    logvar = model.max_logvar - (model.max_logvar - logvar).exp().add(1).log()
    return mean, model.min_logvar + (logvar - model.min_logvar).exp().add(1).log()


def plain_judge(model: Ensemble, network: nn.Module, delta: Tensor, action: Tensor, after: Tensor) -> tuple:
    reward, logit = network(scaled(model, delta=delta, action=action, obs=after)).chunk(2, dim=-1)
    return reward, logit + (model.terminated_mean / (1 - model.terminated_mean)).log()


def test_initial_weights_are_those_of_the_authors():
    layers = cem_mpc.new_layers(50, (20, 40, 10), generator())
    assert [tuple(layer.shape) for layer in layers] == [(50, 20, 40), (50, 1, 40), (50, 40, 10), (50, 1, 10)]
    assert not layers[1].any()
    for weight in layers[::2]:  # a normal distribution cut at two standard deviations has 0.88 of its own
        std = 1 / (2 * math.sqrt(weight.shape[1]))
        assert weight.std().item() == pytest.approx(0.8796 * std, rel=0.02)
        assert 1.95 * std < weight.abs().max() <= 2 * std
    model = Ensemble(OBS, ACTION, small_args(), generator())
    assert (model.max_logvar.tolist(), model.min_logvar.tolist()) == ([0.5] * OBS, [-10.0] * OBS)


def test_scales_are_of_all_that_is_seen_and_what_is_constant_is_predicted_without_error_and_tells_nothing():
    model, draws = small_model(), generator(3)
    names = {"obs": OBS, "action": ACTION, "delta": OBS, "reward": 1, "terminated": 1}
    data = {name: torch.randn(50, size, generator=draws) + 1 for name, size in names.items()}
    data["obs"][:, 1], data["delta"][:, 1] = 7.0, 0.0
    data["action"][:, 0] = 1_000 + 1e-4 * torch.randn(50, generator=draws)  # rounding
    model.set_scale(data)
    seen = np.concatenate([data["obs"], data["obs"] + data["delta"]])  # a flag may be raised in the last one only
    for name, values in (data | {"obs": seen}).items():
        constant = np.array([(name, i) in (("obs", 1), ("delta", 1), ("action", 0)) for i in range(names[name])])
        std = np.where(constant, 0, np.std(np.asarray(values, np.float64), 0))
        np.testing.assert_allclose(getattr(model, f"{name}_mean"), np.mean(np.asarray(values), 0), rtol=1e-5)
        np.testing.assert_allclose(getattr(model, f"{name}_std"), std, rtol=1e-5)
        np.testing.assert_allclose(getattr(model, f"{name}_inverse"), np.where(constant, 0, 1 / (std + constant)), 1e-5)
    obs, action, dynamics = (
        torch.randn(4, 5, OBS, generator=draws),
        torch.zeros(4, 5, ACTION),
        model.select(ALL)[0],
    )
    mean, std = model.predict(obs, action, dynamics)
    assert not mean[..., 1].any()
    assert ((std > 0) == torch.tensor([True, False, True])).all()
    other = model.predict(obs + torch.tensor([0.0, 100.0, 0.0]), action + torch.tensor([5.0, 0.0]), dynamics)
    assert_close(other[0], mean)


def test_given_functions_replace_what_is_learned():
    model, size = small_model(), (4, 2, OBS)
    step = torch.full(size, 1.0), torch.full((4, 2, ACTION), 2.0), torch.full(size, 3.0), model.select(ALL)[1]
    learned_reward, learned_end = model.reward_and_end(*step)
    model.reward_fn = lambda obs, action, after: obs[..., 0] + 10 * action[..., 0] + 100 * after[..., 0]
    assert_close(model.reward_and_end(*step), (torch.full((4, 2), 421.0), learned_end))
    model.termination_fn = lambda obs, action, after: after[..., 0] > 10 * obs[..., 0] - 3 * action[..., 0] - 1
    assert_close(model.reward_and_end(*step), (torch.full((4, 2), 421.0), torch.ones(4, 2)))
    model.reward_fn = None
    assert_close(model.reward_and_end(*step), (learned_reward, torch.ones(4, 2)))


# --- training -------------------------------------------------------------------------------------------------------
def test_a_training_is_its_updates_written_out_member_by_member(monkeypatch):
    args = small_args(weight_decay=(0.1, 0.2, 0.3), max_updates=3, model_lr=0.01)
    model, data, seen = small_model(args).double(), linear_data(150, noise=0.5), []
    data.table = data.table.double()

    def watched(model: Ensemble, batch: dict, drawn: dict) -> tuple[Tensor, Tensor]:
        seen.append((batch, drawn, *ensemble_loss(model, batch, drawn)))
        return seen[-1][2:]

    monkeypatch.setattr(cem_mpc, "ensemble_loss", watched)
    before = copy.deepcopy(model)
    fit(model, ensemble_optimizer(model, args), data, args, generator(1))
    for name, scale in model.named_buffers():
        before.get_buffer(name).copy_(scale)  # of these data
    networks = [plain_networks(before, member) for member in range(4)]
    groups = [([network[2 * i].weight for network, _ in networks], args.weight_decay[i], 0.01) for i in range(3)]
    groups += [([network[2 * i].bias for network, _ in networks], 0.0, 0.01) for i in range(3)]
    groups += [([before.max_logvar, before.min_logvar], 0.0, 0.01)]
    groups += [([p for _, network in networks for p in network.parameters()], 1e-4, 0.03)]
    moments = {p: (torch.zeros_like(p), torch.zeros_like(p)) for group in groups for p in group[0]}
    assert len(seen) == 3
    for count, (batch, drawn, loss, of_outcome) in enumerate(seen, 1):
        wanted, outcomes = 0.01 * (before.max_logvar - before.min_logvar).sum(), []
        for member, (dynamics, outcome) in enumerate(networks):
            row = {name: column[member] for name, column in batch.items()}
            mean, logvar = plain_gaussian(before, dynamics, row["obs"], row["action"])
            log_prob = torch.distributions.Normal(mean, (logvar / 2).exp()).log_prob(scaled(before, delta=row["delta"]))
            wanted = wanted - 2 * log_prob.mean() - math.log(2 * math.pi)
            row = {name: column[member] for name, column in drawn.items()}
            after = row["obs"] + row["delta"]
            reward, logit = plain_judge(before, outcome, row["delta"], row["action"], after)
            log_prob = torch.distributions.Bernoulli(logits=logit).log_prob(row["terminated"])
            error = (reward - scaled(before, reward=row["reward"])) ** 2
            outcomes.append((row["weight"] * (error - log_prob)).mean())
        assert_close(loss, wanted + sum(outcomes))
        assert_close(of_outcome, sum(outcomes).detach() / 4)
        gradients = torch.autograd.grad(wanted + sum(outcomes), list(moments))
        with torch.no_grad():
            for (p, (first, second)), gradient in zip(moments.items(), gradients, strict=True):
                decay, step_size = next(group[1:] for group in groups if any(p is other for other in group[0]))
                gradient = gradient + decay * p
                first += 0.1 * (gradient - first)
                second += 0.001 * (gradient**2 - second)
                p -= step_size * first / (1 - 0.9**count) / ((second / (1 - 0.999**count)).sqrt() + 1e-8)
    for member in range(4):
        for one, two in zip(plain_networks(model, member), networks[member], strict=True):
            assert_close(dict(one.named_parameters()), dict(two.named_parameters()))
    assert_close((model.max_logvar, model.min_logvar), (before.max_logvar, before.min_logvar))


def watched_fit(data: Buffer, monkeypatch: pytest.MonkeyPatch, **fields: object) -> list[tuple[dict, dict]]:
    """The batches of a training in which nothing is learned."""
    args, seen = small_args(model_batch_size=256, **fields), []

    def loss(model: Ensemble, batch: dict, drawn: dict) -> tuple[Tensor, Tensor]:
        seen.append((batch, drawn))
        return sum(p.sum() for p in model.parameters()), torch.tensor(1.0)

    monkeypatch.setattr(cem_mpc, "ensemble_loss", loss)
    model = Ensemble(OBS, ACTION, args, generator())
    fit(model, torch.optim.SGD(model.parameters(), lr=0.0), data, args, generator(1))
    return seen


def test_every_member_has_rows_of_its_own_shuffled_anew_in_each_epoch(monkeypatch):
    data = linear_data(400)
    data.columns()["obs"][:, 0] = data.columns()["delta"][:, 0] = torch.arange(400)
    seen = watched_fit(data, monkeypatch, patience=1, max_updates=10_000)
    epochs = [[torch.cat([b[i]["obs"][..., 0] for b in seen[e : e + 10]], 1) for i in (0, 1)] for e in (0, 10, 20)]
    assert len(seen) == 30  # in the first epoch it got better than nothing, then not for two
    for uniform, drawn in epochs:
        assert torch.equal(uniform.sort(1).values, epochs[0][0].sort(1).values)
        assert all(0.55 < len(row.unique()) / 320 < 0.72 for row in uniform)  # drawn with replacement: 1 - 1 / e
        assert (torch.cat([uniform, drawn]) % 5 > 0).all()  # none is held out
    for i in (0, 1):
        rows = [row.tolist() for epoch in epochs for row in epoch[i]]
        assert len({tuple(row) for row in rows}) == 12
    assert len({tuple(sorted(row.tolist())) for _, drawn in epochs for row in drawn}) == 12
    assert len({tuple(sorted(row.tolist())) for row in epochs[0][0]}) == 4
    for batch in (part for parts in seen for part in parts):
        assert torch.equal(batch["obs"][..., 0], batch["delta"][..., 0])


@pytest.mark.parametrize(("rows", "size", "updates"), [(30, 24, 15), (400, 32, 20), (2_000, 100, 15), (6_000, 256, 15)])
def test_batches_grow_with_the_data_and_an_epoch_has_no_more_updates_than_a_training(rows, size, updates, monkeypatch):
    seen = watched_fit(linear_data(rows), monkeypatch, patience=99, max_updates=15)
    assert [len(part["obs"][0]) for parts in seen for part in parts] == [size] * 2 * updates


def test_unusual_rows_are_drawn_as_much_more_often_as_they_weigh_less(monkeypatch):
    data = linear_data(400)
    columns = data.columns()
    columns["obs"][:, 0], columns["reward"][:] = torch.arange(400), 0.0
    columns["reward"][1:5], columns["reward"][11:14], columns["terminated"][:] = -3.0, 1.0, 0.0
    columns["terminated"][3:9] = 1.0
    columns["reward"][::5] = 99.0  # held out: does not count
    train = columns["holdout"][:, 0] == 0
    z = sum(np.abs(x - x.mean()) / x.std() for x in (columns[n][train, 0].numpy() for n in ("reward", "terminated")))
    density = torch.zeros(400)
    density[train] = torch.from_numpy(1 + z / z.mean())
    seen = watched_fit(data, monkeypatch, patience=40, max_updates=10_000)
    drawn = torch.cat([other["obs"][..., 0].flatten() for _, other in seen]).long()
    weight = torch.cat([other["weight"].flatten() for _, other in seen])
    assert_close(weight * density[drawn], torch.full_like(weight, 2.0))  # half of each kind
    assert weight.mean().item() == pytest.approx(1, abs=0.02)
    for value in density.unique():
        share, wanted = density[drawn].eq(value).float().mean(), density[density == value].sum() / density.sum()
        assert abs(share - wanted) <= 5 * (wanted / len(drawn)) ** 0.5


def test_where_nothing_is_unusual_all_rows_are_drawn_and_weigh_one(monkeypatch):
    data = linear_data(400)
    data.columns()["obs"][:, 0], data.columns()["reward"][:], data.columns()["terminated"][:] = torch.arange(400), 5, 0
    seen = watched_fit(data, monkeypatch, patience=5, max_updates=10_000)
    assert all((other["weight"] == 1).all() for _, other in seen)
    assert len(torch.cat([other["obs"][..., 0].flatten() for _, other in seen]).unique()) == 320


def test_a_training_ends_when_nothing_gets_better_and_keeps_the_best_dynamics_and_the_last_outcome(monkeypatch):
    epochs = [  # hold-out error of each dynamics network, mean loss of the outcome
        ([5.00, 4.0, 3.0, 2.00], 1.00),
        ([4.96, 3.9, 3.0, 2.00], 1.00),  # by 2.5 %; less than 1 % is nothing
        ([4.96, 3.9, 3.0, 1.99], 0.98),  # nothing: the loss of the outcome must fall by 3 %
        ([4.96, 3.9, 3.0, 1.99], 0.96),  # since it last did
        *[([4.96, 3.9, 3.0, 1.99], 0.96)] * 2,
        ([1.00, 9.0, 9.0, 9.00], 0.97),
        *[([5.00, 5.0, 5.0, 5.00], 0.95)] * 3,
    ]
    data, args, calls = linear_data(400), small_args(patience=2, max_updates=1_000, model_batch_size=256), []
    held_out = data.columns(slice(None, None, 5))

    def loss(model: Ensemble, batch: dict, drawn: dict) -> tuple[Tensor, Tensor]:
        calls.append(1)
        epoch, batch_number = divmod(len(calls) - 1, 10)
        for layer in [*model.dynamics, *model.outcome]:
            layer.data.fill_(epoch + 1)
        unequal = 0.5 * (batch_number % 2) - 0.25
        return 7 + 0 * sum(p.sum() for p in model.parameters()), torch.tensor(epochs[epoch][1] + unequal)

    def losses(model: Ensemble, batch: dict) -> tuple[None, Tensor]:
        assert all(torch.equal(batch["obs"][member], held_out["obs"]) for member in range(4))
        assert all(torch.equal(batch["delta"][member], held_out["delta"]) for member in range(4))
        return None, torch.tensor(epochs[len(calls) // 10 - 1][0])

    monkeypatch.setattr(cem_mpc, "ensemble_loss", loss)
    monkeypatch.setattr(cem_mpc, "dynamics_losses", losses)
    model = Ensemble(OBS, ACTION, args, generator())
    logs = fit(model, torch.optim.SGD(model.parameters(), lr=0.0), data, args, generator(1))
    assert logs.pop("losses/outcome_loss") == pytest.approx(0.96)
    assert logs.pop("model/holdout_mse") == pytest.approx((1.0 + 3.9 + 3.0 + 2.0) / 4)
    assert logs == {"losses/model_loss": 7 / 4, "model/updates": 100.0}
    assert all((layer == torch.tensor([7, 2, 1, 1]).view(4, 1, 1)).all() for layer in model.dynamics)
    assert all((layer == 10).all() for layer in model.outcome)
    assert model.elites.tolist() == [0, 3]


def walk(rows: int, size: int, draws: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    """Columns of steps towards the origin with much noise, and next observations."""
    obs, action = torch.randn(rows, size, generator=draws), torch.rand(rows, 1, generator=draws) * 2 - 1
    after = 0.6 * obs + 0.8 * torch.randn(rows, size, generator=draws)
    after[:, :1] += 0.1 * action
    holdout = torch.rand(rows, generator=draws) < 0.1
    return {"obs": obs, "action": action, "delta": after - obs, "holdout": holdout}, after


def judged(model: Ensemble, steps: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Mean reward and probability of an end by the elites, (N,)."""
    step = (steps[name].expand(len(model.elites), -1, -1) for name in ("obs", "action", "delta"))
    with torch.no_grad():
        reward, end = model.reward_and_end(*step, model.select(model.elites)[1])
    return reward.mean(0), end.mean(0)


@pytest.mark.parametrize(("by_chance", "max_updates"), [(True, 200), (False, 400)])
def test_ends_are_expected_as_often_as_they_come_and_the_noise_of_the_world_is_found(by_chance, max_updates):
    draws, args = generator(1), Args(max_updates=max_updates)

    def ends(after: Tensor) -> Tensor:
        return torch.rand(len(after), generator=draws) < 0.029 if by_chance else after[:, 0].abs() > 2.2

    (columns, after), (others, others_after) = (walk(rows, 3, draws) for rows in (3_000, 20_000))
    data, true = buffer(**columns, reward=after[:, 0], terminated=ends(after)), ends(others_after)
    model = Ensemble(3, 1, args, generator())
    fit(model, ensemble_optimizer(model, args), data, args, generator(1))
    reward, end = judged(model, others)
    assert end.mean().item() == pytest.approx(true.float().mean().item(), rel=0.25)
    assert by_chance or end[true].mean() > 0.6
    assert (reward - others_after[:, 0]).std() < 0.1
    step = (others[name].expand(5, -1, -1) for name in ("obs", "action"))
    mean, std = model.predict(*step, model.select(model.elites)[0])
    assert (mean - others["delta"]).std().item() == pytest.approx(0.8, rel=0.05)
    assert std.mean().item() == pytest.approx(0.8, rel=0.1)


@pytest.mark.parametrize("seed", [0, 3])
def test_five_rewards_in_a_thousand_are_learned_though_none_is_held_out(seed):
    columns, after = walk(1_000, 2, generator(seed))
    rewarded = torch.zeros(1_000, dtype=torch.bool).index_fill(0, after[:, 0].topk(5).indices, True)
    columns["holdout"][rewarded] = False
    data, args = buffer(**columns, reward=rewarded, terminated=torch.zeros(1_000)), Args()
    model = Ensemble(2, 1, args, generator(seed))
    optimizer = ensemble_optimizer(model, args)
    for least in (0.5, 0.8):
        fit(model, optimizer, data, args, generator(seed))
        reward, _ = judged(model, data.columns())
        assert reward[rewarded].mean() > least
        assert reward[~rewarded].abs().mean() < 0.05


def test_buffer_grows_and_keeps_what_it_holds():
    data = Buffer(torch.device("cpu"), obs=2, reward=1)
    for row in range(1_100):
        data.add(reward=row, obs=[row, -row])
    other = Buffer(torch.device("cpu"), obs=2, reward=1)
    other.load_state_dict(data.state_dict())
    other.add(obs=[1_100, -1_100], reward=1_100)
    rows = torch.arange(1_101.0)[:, None]
    assert_close(other.columns(), {"obs": torch.cat([rows, -rows], 1), "reward": rows})
    assert data.size == 1_100
    assert other.columns(torch.tensor([[3, 1_000]]))["obs"].tolist() == [[[3, -3], [1_000, -1_000]]]


# --- terminal value -------------------------------------------------------------------------------------------------
def test_lambda_returns_by_their_definition():
    rng, gamma, trace = np.random.default_rng(0), 0.9, 0.8
    reward, next_value = rng.normal(size=(2, 15))
    ends = {6: True, 11: False}  # a termination, a truncation; the data end in the middle of an episode
    columns = {"reward": reward, "terminated": np.arange(15) == 6, "last": np.isin(np.arange(15), list(ends))}
    data = buffer(**{name: torch.from_numpy(column) for name, column in columns.items()})
    returns = cem_mpc.lambda_returns(data.columns(), torch.from_numpy(next_value), gamma)

    def n_step(first: int, last: int) -> float:
        total = sum(gamma ** (step - first) * reward[step] for step in range(first, last + 1))
        return total + (not ends.get(last, False)) * gamma ** (last - first + 1) * next_value[last]

    for row in range(15):
        end = next(end for end in [*ends, 14] if end >= row)  # equation 12.3: the rest of the weight is the last one's
        wanted = sum((1 - trace) * trace ** (last - row) * n_step(row, last) for last in range(row, end))
        assert returns[row].item() == pytest.approx(wanted + trace ** (end - row) * n_step(row, end), rel=1e-4)


def test_value_is_the_mean_of_its_networks_less_two_standard_deviations():
    layers, obs = list(cem_mpc.new_layers(5, (OBS, 8, 1), generator())), torch.randn(4, 3, OBS, generator=generator(1))
    hidden, last = layers[:2], layers[2]
    each = [nn.functional.silu(obs @ hidden[0][i] + hidden[1][i]) @ last[i] for i in range(5)]
    mean, std = torch.stack(each).mean(0), torch.stack(each).std(0, correction=0)
    assert_close(cem_mpc.pessimistic_value(layers, obs), (mean - 2 * std)[..., 0])


def test_value_learns_what_a_state_is_worth_if_the_best_is_done(monkeypatch):
    """1 for each step until a given function says that it ends, at 20, in episodes that begin anywhere; in state 30 an
    episode of one step has a reward of 0 or 1: the expectile of 0.9 is 0.9."""
    seen, value, returns = [], cem_mpc.pessimistic_value, cem_mpc.lambda_returns
    monkeypatch.setattr(cem_mpc, "pessimistic_value", lambda layers, obs: seen.append(layers) or value(layers, obs))
    monkeypatch.setattr(cem_mpc, "lambda_returns", lambda *args: seen.append(returns(*args)) or seen[-1])
    position = torch.cat([*(torch.arange(i, 20.0) for i in range(20)), torch.full((60,), 30.0)])
    reward = torch.where((position == 30) & (torch.arange(270) % 2 == 0), 0.0, 1.0)
    columns = {"obs": position, "action": position * 0, "delta": position * 0 + 1, "reward": reward}
    data = buffer(**columns, terminated=position * 0, last=position >= 19)
    model = Ensemble(1, 1, small_args(), generator())
    model.set_scale(data.columns())
    model.termination_fn = lambda obs, action, after: after[..., 0] + action[..., 0] >= obs[..., 0] * 0 + 20
    layers, loss = cem_mpc.fit_value(model, data, 0.9, generator(1))
    found = value(layers, model.standardise("obs", torch.tensor([*range(20), 30.0])[:, None]))
    assert (found[:20] - (1 - 0.9 ** (20 - torch.arange(20.0))) / 0.1).abs().max() < 0.3
    assert found[20].item() == pytest.approx(0.9, abs=0.15)
    assert 0 < loss < 0.02
    assert [len(layer) for layer in layers] == [5] * 6
    assert not any(layer.requires_grad for layer in layers)
    (*_, weight, bias), wanted = seen[-2:]  # of standardised returns, in the last round
    folded = weight * wanted.std(correction=0), bias * wanted.std(correction=0) + wanted.mean()
    assert_close(tuple(layers[-2:]), folded)


# --- trajectory sampling --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kept", [True, False])
def test_imagined_returns_equal_particles_followed_one_by_one(kept):
    """A particle keeps its member (TS infinity), or each step deals the members of a row out anew (TS1)."""
    model, (count, steps, rows), members, draws = small_model(), (3, 4, 6), [2, 0, 3], generator(3)
    obs, plans = torch.randn(OBS, generator=draws), torch.randn(count, steps, ACTION, generator=draws)
    noise = torch.randn(steps, 3, rows, OBS, generator=draws)
    order = torch.rand(steps, 3, rows, generator=draws).argsort(1)
    with torch.no_grad():
        value_layers = [layer + 0.1 for layer in cem_mpc.new_layers(5, (OBS, 8, 1), draws)]
        networks, layers = [plain_networks(model, member) for member in members], model.select(torch.tensor(members))
        got = imagine(model, layers, obs, plans, noise, None if kept else order, 0.9, value_layers)
        without = imagine(model, layers, obs, plans, noise, None if kept else order, 0.9, [])
        returns, last = torch.zeros(count), torch.zeros(count)
        for row in range(rows):
            particles = [(obs, 1.0, 0.0)] * 3
            for step in range(steps):
                action = plans[row // 2, step]
                if not kept:
                    particles = [particles[i] for i in order[step, :, row]]
                for group, (dynamics, outcome) in enumerate(networks):
                    state, alive, total = particles[group]
                    mean, logvar = plain_gaussian(model, dynamics, state, action)
                    delta = mean + (logvar / 2).exp() * noise[step, group, row]
                    delta = delta * model.delta_std + model.delta_mean
                    reward, logit = plain_judge(model, outcome, delta, action, state + delta)
                    total = total + 0.9**step * alive * (reward * model.reward_std + model.reward_mean)
                    particles[group] = state + delta, alive * (1 - logit.sigmoid()), total
            for state, alive, total in particles:
                returns[row // 2] += total[0] / 6
                at_end = cem_mpc.pessimistic_value(value_layers, (state - model.obs_mean) / model.obs_std)
                last[row // 2] += 0.9**steps * (alive * at_end)[0] / 6
    assert_close(without, returns)
    assert_close(got, returns + last)
    assert (last.abs() > 0.001).all()


# --- planners: each is followed from the same random numbers --------------------------------------------------------
TARGET = torch.tensor([[0.3, -0.6], [0.8, 0.1], [-0.2, 1.0]])  # (H, A), one on the bound


class Score:
    """How near a sequence is to TARGET; keeps what it was asked."""

    def __init__(self, target: Tensor = TARGET):
        self.target, self.seen = target, []

    def __call__(self, plans: Tensor) -> Tensor:
        self.seen.append(plans.detach().clone())
        return -((plans - self.target) ** 2).sum((1, 2))

    def best(self, plans: Tensor, count: int) -> Tensor:
        """The best sequences, the very best first."""
        distance = [((plan - self.target) ** 2).sum().item() for plan in plans]
        return plans[sorted(range(len(plans)), key=distance.__getitem__)[:count]]


def test_random_shooting_returns_the_best_of_all_that_it_draws():
    score, args = Score(), small_args(population=50, iterations=4)
    plans = cem_mpc.random_shooting(score, torch.zeros(1, 3, 2), args, generator())
    (drawn,) = score.seen
    assert drawn.shape == (200, 3, 2)
    assert (-1 <= drawn.min() < -0.99, 0.99 < drawn.max() <= 1, abs(drawn.mean()) < 0.05) == (True,) * 3
    assert torch.equal(plans, score.best(drawn, 1))


def test_cem_moves_mean_and_variance_to_the_best():
    score, args, draws = Score(), small_args(population=30, num_best=6, iterations=4, momentum=0.3), generator(5)
    mean = torch.tensor([[0.9, -0.95], [0.1, 0.0], [0.5, -0.2]])
    plans, variance = cem_mpc.cem(score, mean[None], args, generator(5)), torch.full((3, 2), 0.25)
    assert len(score.seen) == 4
    for drawn in score.seen:
        noise = nn.init.trunc_normal_(torch.empty(30, 3, 2), a=-2, b=2, generator=draws)
        assert_close(drawn, mean + torch.minimum(variance**0.5, (1 - mean.abs()) / 2) * noise)
        best = score.best(drawn, 6)
        variance = 0.3 * variance + 0.7 * ((best - best.mean(0)) ** 2).mean(0)
        mean = 0.3 * mean + 0.7 * best.mean(0)
    assert_close(plans, mean[None])


def test_discrete_cem_moves_probabilities_and_goes_on_searching_from_a_plan_that_was_certain():
    score, draws = Score(torch.eye(4)[[2, 0, 3]]), generator(5)
    args = small_args(population=30, num_best=6, iterations=4, momentum=0.3)
    start = torch.eye(4)[[2, 1, 0]]
    plans, probabilities = cem_mpc.cem_discrete(score, start[None], args, generator(5)), start / 2 + 1 / 8
    assert len(score.seen) == 4
    for drawn in score.seen:
        actions = torch.multinomial(probabilities, 30, replacement=True, generator=draws)
        assert torch.equal(drawn, torch.eye(4)[actions.T])
        order = score(drawn).topk(6).indices  # of equally good ones any; the call is not the planner's
        score.seen.pop()
        probabilities = 0.3 * probabilities + 0.7 * drawn[order].mean(0)
    assert_close(plans, probabilities[None])
    assert plans[0].argmax(1).tolist() == [2, 0, 3]


@pytest.mark.parametrize("first", [True, False])
def test_icem_keeps_its_best_over_iterations_and_steps_and_tries_the_mean_last(first):
    score, draws, iterations = Score(), generator(5), 5
    args = small_args(population=40, num_best=10, iterations=iterations, momentum=0.3, noise_beta=1.0, planner="icem")
    start = torch.rand(1 if first else 5, 3, 2, generator=generator(6)) * 2 - 1  # [mean] or [best, mean, *kept]
    plans = cem_mpc.icem(score, start, args, generator(5))
    mean, kept, std = start[0 if first else 1], start[2:], torch.full((3, 2), 0.5)
    assert len(score.seen) == iterations
    for iteration, drawn in enumerate(score.seen):
        count = [40, 32, 25, 20, 20][iteration]  # 40 / 1.25^i, at least 2 * num_best
        noise = cem_mpc.coloured_noise((count, 3, 2), 1.0, draws)
        last = mean[None] if iteration == iterations - 1 else mean[None][:0]
        assert_close(drawn, torch.cat([(mean + std * noise).clamp(-1, 1), kept, last]))
        best = score.best(drawn, 10)
        kept = best[:3]
        std = 0.3 * std + 0.7 * ((best - best.mean(0)) ** 2).mean(0).sqrt()
        mean = 0.3 * mean + 0.7 * best.mean(0)
    assert_close(plans, torch.cat([best[:1], mean[None], kept]))


@pytest.mark.parametrize("steps", [1, 2, 9, 10])
@pytest.mark.parametrize("beta", [0.0, 2.0])
def test_coloured_noise_has_unit_variance_and_its_spectrum(steps, beta):
    noise = cem_mpc.coloured_noise((20_000, steps, 2), beta, generator())
    assert noise.std(0).sub(1).abs().max() < 0.03
    assert abs((noise[..., 0] * noise[..., 1]).mean()) < 0.03  # the dimensions of an action have noise of their own
    power = torch.fft.rfft(noise, dim=1).abs().square().mean((0, 2))
    frequency = torch.arange(steps // 2 + 1).clamp_min(1)  # the mean has the power of the lowest one
    assert_close(power / power[0], frequency.float() ** -beta, rtol=0.05, atol=0)


def test_gradient_climbs_from_the_last_plan_and_random_ones_and_returns_the_best():
    score, args = Score(), small_args(num_best=3, iterations=5, planner="gradient")
    start = torch.rand(4, 3, 2, generator=generator(6)) * 2 - 1
    start[0, 2, 1] = 0.95  # so that it comes to a bound
    found = cem_mpc.gradient(score, start, args, generator(5))
    plans = torch.cat([start[:1], torch.rand(2, 3, 2, generator=generator(5)) * 2 - 1])
    first = second = torch.zeros_like(plans)
    assert len(score.seen) == 6
    for count, seen in enumerate(score.seen):
        assert_close(seen, plans)
        ascent = 2 * (TARGET - plans)
        first, second = 0.9 * first + 0.1 * ascent, 0.999 * second + 0.001 * ascent**2
        corrected = first / (1 - 0.9 ** (count + 1)), second / (1 - 0.999 ** (count + 1))
        plans = (plans + 0.1 * corrected[0] / (corrected[1].sqrt() + 1e-8)).clamp(-1, 1)
    assert_close(found, score.best(score.seen[-1], 1))


# --- agent ----------------------------------------------------------------------------------------------------------
PENDULUM = gym.spaces.Box(-8, 8, (3,)), gym.spaces.Box(-2, 2, (1,))


def new_agent(*spaces: gym.Space, **fields: object) -> Agent:
    return Agent(*(spaces or PENDULUM), small_args(**fields))


def drive(env: gym.Env, obs: np.ndarray, steps: int, *agents: Agent) -> np.ndarray:
    """So many steps of agents that act alike; returns the next observation."""
    for _ in range(steps):
        action, *others = (agent.act(obs) for agent in agents)
        assert all(np.array_equal(action, other) for other in others)
        next_obs, reward, terminated, truncated, _ = env.step(action)
        for agent in agents:
            agent.observe(obs, action, reward, next_obs, terminated, truncated)
            agent.update()
        obs = env.reset()[0] if terminated or truncated else next_obs
    return obs


def two(obs: Tensor, action: Tensor, after: Tensor) -> Tensor:
    return 2 + 0 * obs[..., 0]


def quadratic(obs: Tensor, action: Tensor, after: Tensor) -> Tensor:
    return -(obs[..., 0] ** 2 + 0.1 * obs[..., 1] ** 2 + 0.05 * action[..., 0] ** 2)


@pytest.mark.parametrize("fields", [{"planner": "cem"}, {"planner": "gradient", "iterations": 150}], ids=str)
def test_first_action_is_that_of_the_linear_quadratic_regulator(fields):
    a, b, q, r, gamma = np.array([[1, 0.3], [0, 1]]), np.array([[0], [0.3]]), np.diag([1, 0.1]), 0.05, 0.9
    x, p = np.array([0.7, -0.1]), np.zeros((2, 2))
    for _ in range(10):  # the Riccati recursion, finite horizon, discounted
        k = gamma * b.T @ p @ a / (r + gamma * b.T @ p @ b)
        p = q + gamma * a.T @ p @ (a - b @ k)
    exact = (-k @ x).item()
    spaces = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Box(-3, 1.5, (1,))
    fields = {"population": 300, "num_best": 30, "iterations": 20, "horizon": 10, "gamma": gamma} | fields
    agent = new_agent(*spaces, **fields, reward_fn="test_cem_mpc:quadratic")
    to_state, to_action = (torch.tensor(m.T, dtype=torch.float32) for m in (a - np.eye(2), b))
    agent.model.predict = lambda obs, act, _: (obs @ to_state + act @ to_action, torch.zeros_like(obs))
    agent.model.termination_fn = lambda obs, *_: torch.zeros(obs.shape[:-1])
    assert -2.5 < exact < -0.5
    assert agent.greedy_policy(0)(x).item() == pytest.approx(exact, abs=0.03)


@pytest.mark.parametrize("sampling", ["tsinf", "ts1"])
def test_what_is_imagined_is_by_the_elites_with_noise_and_actions_in_the_environments_units(sampling, monkeypatch):
    space = gym.spaces.Box(np.float32([-3.0, 0.0]), np.float32([1.0, 5.0]))
    agent, seen = new_agent(PENDULUM[0], space, particles=6, gamma=0.9, sampling=sampling), []
    agent.model.elites.copy_(torch.tensor([3, 1]))
    agent.value_layers = [torch.zeros(1)]
    monkeypatch.setattr(cem_mpc, "imagine", lambda *args: seen.append(args) or torch.arange(200.0))
    agent.planner = lambda score, *_: score(plans).new_zeros(1, 3, 2)
    plans = torch.rand(200, 3, 2, generator=generator()) * 2 - 1
    assert [agent.greedy_policy(seed)(np.arange(3)).tolist() for seed in (0, 1)] == [[-1.0, 2.5]] * 2
    (model, networks, obs, actions, noise, permutations, gamma, value), other = seen
    assert model is agent.model
    assert_close(networks, tuple([layer[[3, 1]] for layer in part] for part in (model.dynamics, model.outcome)))
    assert (obs.tolist(), gamma) == ([0.0, 1.0, 2.0], 0.9)
    assert value is agent.value_layers
    assert_close(actions, plans * torch.tensor([2.0, 2.5]) + torch.tensor([-1.0, 2.5]))
    assert noise.shape == (3, 2, 600, 3)
    assert (abs(noise.mean()) < 0.05, abs(noise.std() - 1) < 0.05) == (True, True)
    assert not torch.equal(noise, other[4])
    assert (permutations is None) == (sampling == "tsinf")
    if sampling == "ts1":
        assert torch.equal(permutations.sort(1).values, torch.arange(2)[:, None].expand(3, 2, 600))
        assert 0.4 < permutations[:, 0].float().mean() < 0.6


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("planner", [*cem_mpc.PLANNERS, "discrete"])
def test_a_return_that_is_no_number_never_wins(planner, bad, monkeypatch):
    fields, space = {"planner": planner}, gym.spaces.Box(-1, 1, (2,))
    if planner == "discrete":
        fields, space = {}, gym.spaces.Discrete(2)
    agent, everywhere = new_agent(PENDULUM[0], space, population=60, num_best=30, iterations=8, **fields), False

    def returns(model: Ensemble, networks: Any, obs: Tensor, plans: Tensor, *rest: Any) -> Tensor:
        wrong = (plans[:, 0, -1] > 0.2) | everywhere  # of Discrete actions the second
        return torch.where(wrong, bad, -10 - ((plans - 1) ** 2).sum((1, 2)))

    monkeypatch.setattr(cem_mpc, "imagine", returns)
    action = agent.greedy_policy(0)(np.zeros(3))
    assert action == 0 if planner == "discrete" else action[-1] <= 0.25
    everywhere = True
    assert agent.action_space.contains(agent.greedy_policy(0)(np.zeros(3)))


@pytest.mark.parametrize("space", [gym.spaces.Box(-2, 2, (2,)), gym.spaces.Discrete(2)], ids=str)
def test_the_plan_is_shifted_within_an_episode_and_forgotten_at_its_end(space):
    agent, given = new_agent(PENDULUM[0], space, learning_starts=1), []
    found = torch.arange(24.0).view(4, 3, 2) / 24
    agent.planner = lambda score, start, *rest: given.append(start) or found
    neutral = torch.full((1, 3, 2), 0.5 if space == gym.spaces.Discrete(2) else 0.0)
    obs, action = np.zeros(3), space.sample()
    agent.observe(obs, action, 0.0, obs, False)
    agent.act(obs)
    agent.observe(obs, action, 0.0, obs, False, False)
    agent.act(obs)
    for end in ((True, False), (False, True)):
        agent.observe(obs, action, 0.0, obs, *end)
        agent.act(obs)
    policy = agent.greedy_policy(0)  # it has a plan of its own
    policy(obs)
    policy(obs)
    shifted = torch.cat([found[:, 1:], neutral[:, :1].expand(4, 1, 2)], 1)
    for start, wanted in zip(given, [neutral, shifted, neutral, neutral, neutral, shifted], strict=True):
        assert torch.equal(start, wanted)
    assert torch.equal(agent.start, shifted)


CARTPOLE = {"env_id": "CartPole-v1", "terminal_value": True, "sampling": "ts1"}


def new_value(model: Ensemble, data: Buffer, gamma: float, draws: torch.Generator) -> tuple[list[Tensor], float]:
    """In place of `fit_value`, which takes seconds."""
    return [layer.detach() for layer in cem_mpc.new_layers(5, (len(model.obs_mean), 8, 1), draws)], 0.5


@pytest.mark.parametrize("fields", [{"planner": "icem", "compile": True, "reward_fn": "test_cem_mpc:two"}, CARTPOLE])
def test_a_copy_goes_on_like_the_original_and_policies_touch_nothing(fields, monkeypatch):
    monkeypatch.setattr(cem_mpc, "compiled", lambda function: function)  # to compile takes long
    monkeypatch.setattr(cem_mpc, "fit_value", new_value)
    args = small_args(**fields)
    env = gym.make(args.env_id)
    agent, restored = (Agent(env.observation_space, env.action_space, args) for _ in range(2))
    obs = drive(env, env.reset(seed=0)[0], 60, agent)
    state = copy.deepcopy(agent.state_dict())  # torch's optimizers share what they load
    state["generator"]["cuda"] = torch.zeros(16, dtype=torch.uint8)  # of another kind of device
    restored.load_state_dict(state)
    restored.logs = dict(agent.logs)  # which a checkpoint does not hold: they have been written
    agents = [agent, copy.deepcopy(agent), pickle.loads(pickle.dumps(agent)), restored]
    obs = drive(env, obs, 60, *agents)
    assert agent.trained_at > 60
    state, logs = plain(agent.state_dict()), agent.metrics()
    policies = [one.greedy_policy(5) for one in agents]
    first, *others = ([policy(obs) for _ in range(3)] for policy in policies)
    assert all(np.array_equal(first, other) for other in others)
    assert all(plain(one.state_dict()) == state for one in agents)
    assert all(one.metrics() == logs for one in agents[1:])
    assert agent.metrics() == {}


def test_it_trains_when_it_is_time_and_says_so(monkeypatch):
    agent, said, calls = new_agent(terminal_value=True, gamma=0.9), [], []
    monkeypatch.setattr(cem_mpc, "fit", lambda *args: calls.append(("fit", *args)) or {"loss": 1.0})
    monkeypatch.setattr(cem_mpc, "fit_value", lambda *args: calls.append(("value", *args)) or (["new"], 2.0))
    for row in range(120):
        agent.observe(np.full(3, float(row)), np.zeros(1), 0.0, np.ones(3), False)
        agent.update(lambda text, row=row: said.append((row + 1, text)))
    assert said == [(size, text) for size in (30, 70, 110) for text in ("training the model", "")]
    fitted = ("fit", agent.model, agent.optimizer, agent.data, agent.args, agent.generator)
    assert calls == [fitted, ("value", agent.model, agent.data, 0.9, agent.generator)] * 3
    assert (agent.value_layers, agent.metrics()) == (["new"], {"loss": 1.0, "losses/value_loss": 2.0})


def test_what_is_stored_is_a_copy_with_differences_taken_before_they_are_rounded():
    agent = new_agent()
    obs, action, next_obs = np.array([1e6, 1.0, 1.0]), np.ones(1), np.array([1e6 + 1e-3, 3.0, 0.0])
    agent.observe(obs, action, 7.0, next_obs, False, True)
    agent.observe(obs, action, -7.0, next_obs, True)
    for array in (obs, action, next_obs):
        array[:] = 9.0
    data = {name: column.tolist() for name, column in agent.data.columns().items()}
    assert data.pop("delta") == [pytest.approx([1e-3, 2.0, -1.0], rel=1e-6)] * 2
    assert data.pop("holdout")[0] == [0.0]
    assert data.pop("reward") == [[7.0], [-7.0]]
    assert data == {"obs": [[1e6, 1, 1]] * 2, "action": [[1]] * 2, "terminated": [[0], [1]], "last": [[1], [1]]}


def test_of_much_data_ever_fewer_rows_are_held_out_and_never_the_first():
    shares = []
    for size in (1, 200_000):
        agent = new_agent(holdout_ratio=0.2)
        agent.data.load_state_dict({"table": torch.zeros(size, sum(agent.data.widths.values()))})
        for _ in range(1_000):
            agent.observe(np.zeros(3), np.zeros(1), 0.0, np.zeros(3), False)
        shares.append(agent.data.columns(slice(size, None))["holdout"].mean().item())
    assert shares == [pytest.approx(0.2, abs=0.05), pytest.approx(5_000 / 200_000, abs=0.02)]
    for seed in range(20):
        agent = new_agent(seed=seed, holdout_ratio=0.9, learning_starts=1)
        agent.observe(np.zeros(3), np.zeros(1), 0.0, np.ones(3), False)
        agent.update()
        assert agent.trained_at == 1


def test_discrete_actions_are_those_of_the_space():
    space = gym.spaces.Discrete(3, start=5)
    agent, actions = new_agent(PENDULUM[0], space, learning_starts=20), []
    for _ in range(30):
        actions.append(agent.act(np.zeros(3, np.float32)))
        agent.observe(np.zeros(3), actions[-1], 0.0, np.ones(3), False)
        agent.update()
    assert {type(action) for action in actions} == {type(space.sample())}
    assert set(actions[:20]) == {5, 6, 7}
    assert torch.equal(agent.data.columns()["action"], torch.eye(3)[[action - 5 for action in actions]])


def test_actions_have_the_range_type_and_shape_of_the_environments():
    space = gym.spaces.Box(-1, np.array([[1.0, 3.3]]), (1, 2), np.float64)
    agent = new_agent(PENDULUM[0], space)
    actions = np.array([agent.act(np.zeros(3)) for _ in range(500)])
    assert all(space.contains(action) for action in actions)
    np.testing.assert_allclose(actions.min(0), [[-1, -1]], atol=0.05)
    np.testing.assert_allclose(actions.max(0), [[1, 3.3]], atol=0.05)
    assert (new_agent(PENDULUM[0], space, seed=2).act(np.zeros(3)) != actions[0]).all()
    for end in (-1.0, 1.0):  # in single precision 3.3 is above 3.3
        assert space.contains(agent.to_env(torch.full((2,), end)))


def test_spaces_and_arguments_that_it_does_not_handle_are_refused():
    box = gym.spaces.Box
    for space, complaint in ((box(0, 5, (2,), np.int64), "floating-point"), (box(0, np.inf, (2,)), "bounded")):
        with pytest.raises(cem_mpc.Failure, match=complaint):
            new_agent(PENDULUM[0], space)
    with pytest.raises(cem_mpc.Failure, match="up to 1,000 numbers"):
        new_agent(box(0, 1, (1_001,)), PENDULUM[1])
    with pytest.raises(cem_mpc.Failure, match="--momentum must be from 0 to"):
        new_agent(momentum=1.0)


# --- runs -----------------------------------------------------------------------------------------------------------
def saved(run: Path) -> dict:
    """What a checkpoint says of the agent."""
    return torch.load(run / cem_mpc.CHECKPOINT, weights_only=True)["agent"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A run of 80 steps, in episodes of 30, to start from."""
    limit = {"env_kwargs": {"max_episode_steps": 30}}
    cem_mpc.train(small_args(run_dir=str(tmp_path / "source"), total_timesteps=80, eval_episodes=1, **limit))
    return only_run(tmp_path / "source")


def test_every_step_is_stored_from_where_it_led_and_a_truncation_is_no_end(source):
    data = cem_mpc.load(source).data.columns()
    goes_on = torch.arange(79) % 30 < 29
    assert torch.equal(data["last"][:79, 0] == 0, goes_on)
    assert not data["terminated"].any()
    after = (data["obs"] + data["delta"])[:79]
    assert torch.equal((after - data["obs"][1:]).abs().amax(1) < 1e-5, goes_on)


def test_init_from_takes_model_and_data_of_another_run_and_learns_the_value_anew(source, tmp_path, monkeypatch):
    agent, state = new_agent(terminal_value=True, gamma=0.9), saved(source)
    monkeypatch.setattr(cem_mpc, "fit_value", lambda *args: (args, 0.5))
    cem_mpc.init_from(agent, str(source))
    assert plain(agent.model.state_dict()) == plain(state["model"])
    state["data"]["table"][-1, -2] = 1  # "last": its episode does not go on here
    assert plain(agent.data.state_dict()) == plain(state["data"])
    assert agent.value_layers == (agent.model, agent.data, 0.9, agent.generator)
    assert agent.trained_at == 70
    cem_mpc.train(small_args(run_dir=str(tmp_path / "a"), total_timesteps=5, eval_episodes=1))
    with pytest.raises(cem_mpc.Failure, match="it has not trained its model yet"):
        cem_mpc.init_from(agent, str(only_run(tmp_path / "a")))


def test_a_run_from_another_evaluates_what_it_starts_from_and_goes_on_in_episodes_of_its_own(source, tmp_path):
    args = {"init_from": str(source), "reward_fn": "test_cem_mpc:two", "eval_episodes": 1}
    outcome = cem_mpc.train(small_args(run_dir=str(tmp_path / "b"), total_timesteps=0, **args))
    assert (outcome["env_steps"], outcome["eval_episodes"]) == (0, 1)
    run = only_run(tmp_path / "b")
    moved = source.rename(tmp_path / "moved")  # once there is a checkpoint, it is not needed
    for steps in (0, 30):
        cem_mpc.train(dataclasses.replace(cem_mpc.saved_args(run), resume=str(run), total_timesteps=steps))
    assert [step for tag, step, _ in scalars(run) if tag == "eval/episodic_return"] == [0, 30]
    table = saved(run)["data"]["table"]
    assert torch.equal(table[:79], saved(moved)["data"]["table"][:79])
    assert (table[80] - table[0])[:3].abs().max() > 0.01  # with the source's seeds its episodes would come again
    (run / cem_mpc.CHECKPOINT).unlink()
    moved.rename(source)
    cem_mpc.train(dataclasses.replace(cem_mpc.saved_args(run), resume=str(run)))
    assert torch.equal(saved(run)["data"]["table"], table)


RUNS = [{"env_id": "Acrobot-v1"}, {"env_id": "MountainCarContinuous-v0", "planner": "icem"}, {"planner": "gradient"}]


@pytest.mark.parametrize("fields", [*RUNS, {"planner": "random_shooting"}], ids=str)
def test_every_planner_and_kind_of_action_runs_through(fields, tmp_path):
    args = small_args(run_dir=str(tmp_path), total_timesteps=60, eval_episodes=1, **fields)
    short = dataclasses.replace(args, env_kwargs={"max_episode_steps": 30})
    assert math.isfinite(cem_mpc.train(short)["eval_return_mean"])


@pytest.mark.slow
def test_compiled_it_plans_the_same():
    torch._dynamo.reset()
    fields = {"population": 20, "horizon": 4}
    agents = [new_agent(*PENDULUM, **fields, compile=compile_it) for compile_it in (False, True)]
    obs, plans = torch.ones(OBS), torch.rand(20, 4, 1, generator=generator())
    with torch.inference_mode():
        networks = agents[0].model.select(agents[0].model.elites)
        wanted, found = (agent.score(networks, obs, generator(), plans) for agent in agents)
    assert_close(found, wanted)


# --- learning -------------------------------------------------------------------------------------------------------
WANTED = {"Pendulum-v1": -200, "CartPole-v1": 475, "Acrobot-v1": -100, "Reacher-v5": -9.4, "InvertedPendulum-v5": 1000}


@pytest.mark.slow
@pytest.mark.parametrize(("env_id", "wanted"), WANTED.items())
def test_it_learns_with_the_settings_of_the_command_line(env_id, wanted, tmp_path: Path):
    if env_id.endswith("-v5"):
        pytest.importorskip("mujoco")
    settings = cem_mpc.PRESETS.get(env_id, {}) | {"eval_every": 10_000, "seed": 2}
    assert cem_mpc.train(Args(env_id=env_id, run_dir=str(tmp_path), **settings))["eval_return_mean"] >= wanted
