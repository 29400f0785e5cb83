"""td_mpc2.py against the authors' numbers, whole updates and plans, and the traps that others have stepped into."""

import dataclasses
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import tiny_args
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

import td_mpc2
from td_mpc2 import Agent, Args, Buffer, NormedLinear, Size, from_bins, mish, simnorm, symexp, symlog, two_hot

GOLDEN = os.environ.get("TDMPC2_GOLDEN") or Path(__file__).parent / "golden" / "td_mpc2_golden.npz"
GOLDEN_SIZE = Size(12, 20, 16, 1, 5, batch=4, lr=3e-4, samples=32, elites=8, proposals=6, iterations=2)
QS = 5


def box(size: int, high: float = 1.0) -> gym.spaces.Box:
    return gym.spaces.Box(-high, high, (size,), np.float32)


def new_agent(obs_size: int = 3, action_size: int = 1, **fields: object) -> Agent:
    return Agent(box(obs_size), box(action_size), tiny_args(td_mpc2, **fields))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- golden values ----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    """Arrays that the authors' code computed, by name."""
    with np.load(GOLDEN) as file:
        return {name: torch.as_tensor(file[name]) for name in file.files}


def parameters_of(model: td_mpc2.WorldModel) -> Iterator[tuple[str, int | None, nn.Parameter]]:
    """Each parameter with the authors' name of it, and its number among the Qs."""
    parts = [("_encoder.state", None, model.encoder), ("_dynamics", None, model.dynamics)]
    parts += [("_reward", None, model.reward), ("_pi", None, model.policy)]
    for name, qs in (("_Qs.params", model.qs), ("_target_Qs_params", model.target_qs)):
        parts += [(name, index, q) for index, q in enumerate(qs)]
    parts += [("_termination", None, model.termination)] if model.termination else []
    for name, index, layers in parts:
        for number, layer in enumerate(layers):
            for own, parameter in layer.named_parameters():
                yield f"{name}.{number}.{own.replace('norm.', 'ln.')}", index, parameter


@pytest.fixture
def their_agent(golden, monkeypatch) -> Any:
    """Makes an agent with the weights of the golden values, and without dropout, whose masks they do not hold."""
    monkeypatch.setitem(td_mpc2.SIZES, "nano", GOLDEN_SIZE)

    def make(episodic: bool = False) -> Agent:
        agent = Agent(box(5), box(2), Args(episodic=episodic), episode_length=500)
        for name, index, parameter in parameters_of(agent.model):
            values = golden[f"w_ep/{name}" if name.startswith("_term") else f"w/{name}"]
            parameter.data.copy_(values if index is None else values[index])
        for layer in agent.model.modules():
            if isinstance(layer, NormedLinear):
                layer.dropout = 0
        return agent

    return make


def feed(agent: Agent, normals: list[Tensor], pairs: list[Tensor]) -> None:
    """Random numbers, and pairs of Qs, that the agent is to draw, in this order."""
    normals, pairs = list(normals), list(pairs)

    def normal(*shape: int) -> Tensor:
        assert normals[0].shape == shape
        return normals.pop(0)

    agent.normal, agent.pair = normal, lambda: pairs.pop(0)


def near(found: Tensor, wanted: Tensor) -> None:
    assert_close(found, wanted.view_as(found), rtol=1e-5, atol=1e-5)


def test_functions_are_those_of_the_authors(golden):
    near(symlog(golden["fn/x"]), golden["fn/symlog"])
    near(two_hot(golden["fn/x"]), golden["fn/two_hot"])
    near(symexp(golden["fn/symexp_in"]), golden["fn/symexp"])
    near(from_bins(golden["fn/logits"]), golden["fn/two_hot_inv"])
    near(simnorm(golden["fn/simnorm_in"]), golden["fn/simnorm"])
    near(mish(golden["fn/mish_in"]), golden["fn/mish"])
    lengths = golden["fn/ep_len"].tolist()
    gammas = [Agent(box(3), box(1), Args(), int(length)).gamma for length in lengths]
    assert gammas == pytest.approx(golden["f64/discount"].tolist(), abs=1e-12)


def test_networks_are_those_of_the_authors(golden, their_agent):
    agent = their_agent()
    model, z = agent.model, agent.model.encoder(golden["batch/obs"])
    near(z, golden["out/encode"])
    x = torch.cat([z[:-1], golden["batch/action"]], dim=-1)
    near(model.dynamics(x), golden["out/next"])
    near(model.reward(x), golden["out/reward_logits"])
    near(from_bins(model.reward(x)), golden["out/reward"])
    near(torch.stack([q(x) for q in model.qs]), golden["out/q_logits"])
    near(torch.stack([from_bins(q(x)) for q in model.qs]), golden["out/q"])
    near(torch.stack([q(x) for q in model.target_qs]), golden["out/target_q_logits"])
    action, mean, log_std = model.pi(z, golden["out/pi_eps"])
    near(action, golden["out/pi_action"])
    near(mean, golden["out/pi_mean"])
    near(log_std, golden["out/pi_log_std"])


def test_two_whole_updates_are_those_of_the_authors(golden, their_agent):
    agent = their_agent()
    batch = {name: golden[f"batch/{name}"] for name in ("obs", "action", "reward")}
    batch["terminated"] = torch.zeros_like(batch["reward"])
    for name in ("update1", "update2"):
        drawn = {part: golden[f"{name}/{part}"] for part in ("td_eps", "pi_eps", "td_qidx", "pi_qidx")}
        feed(agent, [drawn["td_eps"], drawn["pi_eps"]], [drawn["td_qidx"], drawn["pi_qidx"]])
        found = agent.update_networks(batch)
        for loss in ("consistency", "reward", "value"):
            near(found[loss], golden[f"{name}/{loss}_loss"])
        near(found["policy"], golden[f"{name}/pi_loss"])
        near(found["q_range"], golden[f"{name}/pi_scale"])
        near(found["scaled_entropy"], golden[f"{name}/pi_scaled_entropy"])
        if name == "update1":  # a step against the gradient, which is not cut off here
            norm = torch.stack([p.grad.norm() for g in agent.model_optimizer.param_groups for p in g["params"]]).norm()
            near(norm, golden["update1/grad_norm"])
    for name, index, parameter in parameters_of(agent.model):
        wanted = golden[f"after2/{name}"]
        assert_close(parameter.data, wanted if index is None else wanted[index], rtol=0, atol=1e-6)


def test_an_episodic_update_is_that_of_the_authors(golden, their_agent):
    agent = their_agent(episodic=True)
    batch = {name: golden[f"batch/{name}"] for name in ("obs", "action", "reward")}
    batch["terminated"] = golden["ep/terminated"]
    noise, pair = torch.zeros(4, 4, 2), torch.tensor([0, 1])
    feed(agent, [golden["ep/update_td_eps"], noise], [golden["ep/update_td_qidx"], pair])
    found = agent.update_networks(batch)
    for loss in ("consistency", "reward", "value", "termination"):
        near(found[loss], golden[f"ep/update_{loss}_loss"])
    groups = agent.model_optimizer.param_groups
    near(torch.stack([p.grad.norm() for g in groups for p in g["params"]]).norm(), golden["ep/update_grad_norm"])


@pytest.mark.parametrize(("episodic", "prefix"), [(False, "value"), (True, "ep/value")])
def test_values_of_plans_are_those_of_the_authors(episodic, prefix, golden, their_agent):
    agent = their_agent(episodic)
    drawn = (f"{prefix}/", f"{prefix}_")[episodic]
    feed(agent, [golden[f"{drawn}pi_eps"]], [golden[f"{drawn}qidx"]])
    z = agent.model.encoder(golden["value/obs"]).expand(32, -1)
    near(agent.value_of(z, golden["value/actions"]), golden["ep/value" if episodic else "value/value"])


@pytest.mark.parametrize(("name", "explore"), [("plan_train", True), ("plan_eval", False)])
def test_plans_are_those_of_the_authors(name, explore, golden, their_agent):
    agent, (first, second) = their_agent(), golden[f"{name}/final_eps"]
    noise = [*golden[f"{name}/traj_eps"], golden[f"{name}/noise"][0], first, golden[f"{name}/noise"][1], second]
    feed(agent, noise + ([golden[f"{name}/action_noise"]] if explore else []), [*golden[f"{name}/qidx"]])
    scores = []
    agent.draw = lambda score: scores.append(score) or golden[f"{name}/pick"].view(())
    mean = torch.zeros(3, 2) if golden[f"{name}/t0"] else golden[f"{name}/prev_mean"]
    action, mean = agent.choose(golden["value/obs"].numpy(), mean, explore)
    near(torch.as_tensor(action), golden[f"{name}/action"])
    near(mean, golden[f"{name}/mean"][-1])
    near(scores[0], golden[f"{name}/score"][-1])


# --- networks ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rows", [50, 5_000])
def test_mish_has_the_values_and_slopes_of_pytorchs_where_it_is_our_own_too(rows):
    x = torch.randn(rows, 16, generator=generator()) * 6
    x[0, :8] = torch.tensor([30.0, 21.0, 19.0, -30.0, -100.0, 0.0, 88.0, 1e4])
    weight = torch.randn(x.shape, generator=generator(1))
    found, wanted = x.clone().requires_grad_(), x.clone().requires_grad_()
    (mish(found) * weight).sum().backward()
    (F.mish(wanted) * weight).sum().backward()
    assert_close(mish(x), F.mish(x), rtol=1e-5, atol=1e-6)
    assert_close(found.grad, wanted.grad, rtol=1e-4, atol=1e-5)


SIZES = {"1": 1_214_651, "5": 4_960_618, "19": 18_062_442, "48": 47_208_298}


@pytest.mark.parametrize(("name", "count"), SIZES.items())
def test_models_have_as_many_parameters_as_the_authors(name, count, monkeypatch):
    monkeypatch.setattr(nn.init, "trunc_normal_", lambda weight, **_: weight)  # which takes long
    model = td_mpc2.WorldModel(24, 6, td_mpc2.SIZES[name], False, generator())
    without_targets = [p for name, p in model.named_parameters() if not name.startswith("target")]
    assert sum(p.numel() for p in without_targets) == count
    size = td_mpc2.SIZES[name]
    theirs = (size.batch, size.lr, size.updates, size.samples, size.elites, size.proposals, size.iterations)
    assert theirs == (256, 3e-4, 1, 512, 64, 24, 6)


def test_initial_weights_are_those_of_the_authors():
    model = new_agent(model_size="1").model
    for name, parameter in model.named_parameters():
        last_of_values = name.startswith(("reward.2", "qs.0.2", "qs.1.2", "target_qs.0.2", "target_qs.1.2"))
        if name.endswith("norm.weight"):
            assert (parameter == 1).all()
        elif name.endswith("bias") or last_of_values:
            assert (parameter == 0).all()
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.2)
    assert not torch.equal(model.qs[0][0].weight, model.qs[1][0].weight)
    x = torch.randn(9, 129, generator=generator())
    assert from_bins(model.reward(x)).abs().max() < 1e-6
    assert from_bins(model.qs[1](x)).abs().max() < 1e-6


def test_dropout_zeroes_one_in_a_hundred_before_the_norm_and_only_in_training():
    layer = NormedLinear(8, 5_000, mish, generator(), dropout=0.01)
    seen, x = [], torch.ones(4, 8)
    layer.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    layer.train()
    layer(x), layer(x), layer.eval()(x)
    plain = F.linear(x, layer.weight, layer.bias)
    assert_close(seen[2], plain)
    for dropped in seen[:2]:
        assert (dropped == 0).sum() == pytest.approx(200, abs=50)
        assert_close(dropped[dropped != 0], (plain / 0.99)[dropped != 0])
    assert not torch.equal(seen[0], seen[1])
    assert [layer.dropout for layer in new_agent().model.qs[0][:-1]] == [0.01, 0.0]


def test_qs_drop_in_the_losses_alone():
    agent, seen = new_agent(), []
    for kind in ("qs", "target_qs"):
        for q in getattr(agent.model, kind):
            q[0].register_forward_hook(lambda layer, *_, kind=kind: seen.append((kind, layer.training)))
    agent.update_networks(random_batch(agent))
    assert seen == [("target_qs", False)] * 2 + [("qs", True)] * 2 + [("qs", True)] * 2  # target, values, policy
    seen.clear()
    agent.plan({"obs": torch.zeros(3), "mean": agent.plan_mean})
    assert set(seen) == {("qs", False)}


# --- the update -------------------------------------------------------------------------------------------------------
def random_batch(agent: Agent, seed: int = 0) -> dict[str, Tensor]:
    draws, steps = generator(seed), (agent.args.horizon, agent.size.batch)
    obs = torch.randn(steps[0] + 1, steps[1], 3, generator=draws)
    action = torch.rand(*steps, agent.action_size, generator=draws) * 2 - 1
    reward = torch.randn(*steps, 1, generator=draws)
    return {"obs": obs, "action": action, "reward": reward, "terminated": (reward > 1).float()}


def test_step_sizes_are_those_of_the_authors():
    agent = new_agent(model_size="5")
    assert [group["lr"] for group in agent.model_optimizer.param_groups] == pytest.approx([9e-5, 3e-4])
    assert {group["eps"] for group in agent.model_optimizer.param_groups} == {1e-8}
    for policy in (agent.policy_optimizer, new_agent(model_size="nano").policy_optimizer):
        assert [(group["lr"], group["eps"]) for group in policy.param_groups] == [(3e-4, 1e-5)]
    (encoder, rest), policy = agent.model_optimizer.param_groups, agent.policy_optimizer.param_groups[0]
    learned = [id(p) for group in (encoder, rest, policy) for p in group["params"]]
    targets = {id(p) for p in agent.model.target_qs.parameters()}
    assert sorted(learned) == sorted({id(p) for p in agent.model.parameters()} - targets)
    assert {id(p) for p in encoder["params"]} == {id(p) for p in agent.model.encoder.parameters()}


def test_the_target_does_not_look_beyond_a_termination_and_takes_the_smaller_of_two_values(monkeypatch):
    """With targets of known values: what the Qs are drawn to is two-hot of r + gamma * (1 - terminated) * min."""
    agent = new_agent(gamma=0.9)
    wanted, batch = [], random_batch(agent)
    monkeypatch.setattr(td_mpc2, "two_hot", lambda x: wanted.append(x) or two_hot(x))
    values = iter([torch.tensor([3.0, 2.0])[:, None, None, None].expand(2, 2, 64, 1), None])
    values_of = agent.two_values
    monkeypatch.setattr(
        agent, "two_values", lambda qs, z, a: v if (v := next(values)) is not None else values_of(qs, z, a)
    )
    agent.update_networks(batch)
    assert_close(wanted[0], batch["reward"])
    assert_close(wanted[1], batch["reward"] + 0.9 * (1 - batch["terminated"]) * 2.0)


def test_what_the_policy_is_drawn_to_moves_neither_qs_nor_encoder():
    """Where the model's step size is zero, only the policy and the targets move."""
    agent = new_agent()
    for group in agent.model_optimizer.param_groups:
        group["lr"] = 0.0
    agent.model.target_qs.load_state_dict(new_agent(seed=2).model.qs.state_dict())
    before = {name: p.detach().clone() for name, p in agent.model.named_parameters()}
    agent.update_networks(random_batch(agent))
    moved = {name.split(".")[0] for name, p in agent.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"policy", "target_qs"}
    for (name, new), q in zip(agent.model.target_qs.named_parameters(), agent.model.qs.parameters(), strict=True):
        assert_close(new, 0.99 * before[f"target_qs.{name}"] + 0.01 * q)
    assert all(q.requires_grad for q in agent.model.qs.parameters())
    assert not any(q.requires_grad for q in agent.model.target_qs.parameters())


def test_gradients_are_cut_off_at_a_norm_of_20_for_each_optimizer():
    weights = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))]
    optimizer = torch.optim.SGD([{"params": weights[:1]}, {"params": weights[1:], "lr": 0.5}], lr=1.0)
    td_mpc2.gradient_step(optimizer, 30 * weights[0].sum() + 40 * weights[1].sum())  # norm sqrt(2 * 900 + 1600)
    norm = math.sqrt(3400)
    assert_close(weights[0].data, torch.full((2,), -30 * 20 / norm), rtol=1e-5, atol=0)
    assert_close(weights[1].data, torch.full((1,), -0.5 * 40 * 20 / norm), rtol=1e-5, atol=0)
    td_mpc2.gradient_step(optimizer, weights[0].sum())  # and nothing of the last gradient is left
    assert_close(weights[0].data, torch.full((2,), -30 * 20 / norm - 1), rtol=1e-5, atol=0)


def test_two_different_qs_are_drawn_once_for_a_batch_and_each_as_often(monkeypatch):
    monkeypatch.setitem(td_mpc2.SIZES, "nano", dataclasses.replace(td_mpc2.SIZES["nano"], num_q=QS))
    agent, counts = new_agent(), torch.zeros(QS, QS)
    for _ in range(600):
        first, second = agent.pair().tolist()
        counts[first, second] += 1
    assert (counts.diagonal() == 0).all()
    assert counts.sum(1).min() > 80
    assert counts.sum(0).min() > 80
    called, z = [], torch.randn(7, 64, generator=generator())
    for index, q in enumerate(agent.model.qs):
        q.register_forward_hook(lambda *_, index=index: called.append(index))
        nn.init.normal_(q[-1].weight, std=0.1, generator=generator(index))
    monkeypatch.setattr(agent, "pair", lambda: torch.tensor([3, 1]))
    values = agent.two_values(agent.model.qs, z, torch.zeros(7, 1))
    assert called == [3, 1]
    x = torch.cat([z, torch.zeros(7, 1)], dim=1)
    wanted = torch.stack([from_bins(agent.model.qs[index](x)) for index in (3, 1)])
    assert_close(values, wanted)
    agent.device = torch.device("meta")  # as on a GPU, where all are evaluated, for no number leaves it
    assert_close(agent.two_values(agent.model.qs, z, torch.zeros(7, 1)), wanted)


# --- planning ---------------------------------------------------------------------------------------------------------
def test_a_plan_goes_on_from_the_one_before_within_an_episode_only(monkeypatch):
    agent, means = new_agent(learning_starts=2), []
    plan = agent.plan
    monkeypatch.setattr(agent, "plan", lambda inputs: means.append(inputs["mean"]) or plan(inputs))
    ends = {4: (True, False), 7: (False, True)}
    for step in range(10):
        action = agent.act(np.zeros(3))
        agent.observe(np.zeros(3), action, 0.0, np.zeros(3), *ends.get(step, (False, False)))
    assert len(means) == 8
    zero = [bool((mean == 0).all()) for mean in means]
    assert zero == [True, False, False, True, False, False, True, False]


def test_the_mean_of_the_last_plan_is_shifted_by_one_step(their_agent, monkeypatch):
    agent, samples = their_agent(), []
    monkeypatch.setattr(agent, "value_of", lambda z, actions: samples.append(actions) or torch.zeros(32))
    monkeypatch.setattr(agent, "normal", lambda *shape: torch.zeros(shape))
    mean = torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])
    agent.plan({"obs": torch.zeros(5), "mean": mean})
    assert_close(samples[0][:, 6], torch.tensor([[0.3, 0.4], [0.5, 0.6], [0.0, 0.0]]))


@pytest.mark.parametrize(("action_size", "iterations"), [(19, 2), (20, 4)])
def test_many_actions_are_searched_longer(action_size, iterations, monkeypatch):
    agent, called = new_agent(action_size=action_size), []
    monkeypatch.setattr(agent, "value_of", lambda z, actions: called.append(1) or torch.zeros(64))
    agent.plan({"obs": torch.zeros(3), "mean": agent.plan_mean})
    assert len(called) == iterations


@pytest.mark.parametrize(("at", "wanted"), [(0, 1.0), (1, 1.5), (2, 1.75), (None, 1.75 + 0.125 * 100)])
@pytest.mark.parametrize("logit", [0.1, 5.0])
def test_nothing_counts_after_a_termination_but_the_reward_of_its_step_does(at, wanted, logit, monkeypatch):
    agent, steps = new_agent(gamma=0.5, horizon=3), iter(range(3))

    def termination(z: Tensor) -> Tensor:
        return torch.full((len(z), 1), logit if next(steps) == at else -0.1)

    monkeypatch.setattr(agent.model.termination, "forward", termination)
    monkeypatch.setattr(td_mpc2, "from_bins", lambda logits: torch.ones(2, 1))
    monkeypatch.setattr(agent, "two_values", lambda *_: torch.full((2, 2, 1), 100.0))
    assert_close(agent.value_of(torch.zeros(2, 64), torch.zeros(3, 2, 1)), torch.full((2,), wanted))


@pytest.mark.parametrize("bounds", [(0.05, 0.3), (0.4, 2.0)])
def test_the_deviation_of_a_plan_stays_between_its_bounds(bounds, monkeypatch):
    """The elites are proposals of 1 and -1, which differ by more than the upper bound; or of 1 alone, by nothing."""
    agent = new_agent(min_std=bounds[0], max_std=bounds[1])
    other = -1.0 if bounds[0] < 0.1 else 1.0
    drawn = torch.cat([torch.ones(6, 1), torch.full((6, 1), other)])
    monkeypatch.setattr(agent.model, "pi", lambda z, noise: (drawn, drawn, drawn))
    monkeypatch.setattr(agent, "value_of", lambda z, actions: 1e3 * actions[0, :, 0].abs().eq(1) - torch.arange(64.0))
    std = agent.plan({"obs": torch.zeros(3), "mean": agent.plan_mean})["std"]
    assert std.item() == pytest.approx(bounds[1] if other < 0 else bounds[0])


def test_an_evaluation_has_a_plan_of_its_own_which_goes_on_from_step_to_step(monkeypatch):
    agent, means = new_agent(horizon=1), []
    agent.plan_mean += 5

    def plan(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        means.append(inputs["mean"][0].item())
        return {"action": torch.zeros(1), "std": torch.zeros(1), "mean": inputs["mean"] + 1}

    monkeypatch.setattr(agent, "plan", plan)
    policy = agent.greedy_policy(0)
    for _ in range(3):
        policy(np.zeros(3))
    assert means == [0, 1, 2]
    assert (agent.plan_mean == 5).all()


def test_a_value_that_is_not_a_number_is_the_worst(monkeypatch):
    agent = new_agent()
    monkeypatch.setattr(td_mpc2, "from_bins", lambda logits: torch.tensor([[-9.0], [math.nan]]))
    value = agent.value_of(torch.zeros(2, 64), torch.zeros(2, 2, 1))
    assert value[1] < value[0] < 0


def test_elites_are_drawn_by_their_score():
    agent, score = new_agent(), torch.tensor([0.6, 0.3, 0.1])
    torch.manual_seed(0)
    before = torch.get_rng_state()
    counts = torch.bincount(torch.cat([agent.draw(score) for _ in range(2_000)]), minlength=3) / 2_000
    assert torch.equal(torch.get_rng_state(), before)  # random numbers are the agent's own
    assert_close(counts, score, rtol=0, atol=0.05)


def test_without_the_planner_the_policy_acts():
    agent = new_agent(plan=False, learning_starts=1)
    agent.steps, obs = 1, np.ones(3)
    with torch.no_grad():
        nn.init.normal_(agent.model.policy[-1].weight, std=0.2, generator=generator())
        mean = agent.model.policy(agent.model.encoder(torch.ones(3))).chunk(2, dim=-1)[0].tanh()
    assert torch.tensor(agent.greedy_policy(0)(obs)) == pytest.approx(mean.item(), abs=1e-6)
    drawn = {agent.act(obs).item() for _ in range(5)}
    assert len(drawn) == 5
    assert np.mean([*drawn]) == pytest.approx(mean.item(), abs=0.3)


def test_exploration_adds_the_deviation_of_the_last_iteration(monkeypatch):
    agent = new_agent()
    found = {"action": torch.tensor([0.2]), "std": torch.tensor([0.5]), "mean": agent.plan_mean}
    monkeypatch.setattr(agent, "plan", lambda inputs: found)
    monkeypatch.setattr(agent, "normal", lambda *shape: torch.ones(shape))
    assert agent.choose(np.zeros(3), agent.plan_mean, explore=True)[0] == pytest.approx(0.7)
    assert agent.choose(np.zeros(3), agent.plan_mean, explore=False)[0] == pytest.approx(0.2)
    found["std"] = torch.tensor([2.0])
    assert agent.choose(np.zeros(3), agent.plan_mean, explore=True)[0] == 1


def test_nothing_of_an_update_or_a_plan_is_waited_for():
    """As one CUDA graph they must not read a number: on tensors without numbers that would fail."""
    agent = new_agent()
    agent.update_networks(random_batch(agent))  # which makes the state of the optimizers
    mode = torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)
    agent.device = torch.device("meta")  # other than a CPU, on which the pair is read
    batch, obs, mean = random_batch(agent), torch.zeros(3), agent.plan_mean
    agent.normal = lambda *shape: torch.zeros(shape)
    with mode:
        fake = {name: mode.from_tensor(part) for name, part in batch.items()}
        agent.device = torch.device("cpu")
        agent.pair = lambda: mode.from_tensor(torch.tensor([0, 1]))
        values_of = agent.two_values

        def two_values(*parts: Any) -> Tensor:
            agent.device = torch.device("meta")
            found = values_of(*parts)
            agent.device = torch.device("cpu")
            return found

        agent.two_values = two_values
        agent.update_networks(fake)
        agent.plan({"obs": mode.from_tensor(obs), "mean": mode.from_tensor(mean)})


# --- data -------------------------------------------------------------------------------------------------------------
def filled_buffer(lengths: list[int], horizon: int = 3) -> Buffer:
    """Episodes whose observations count up, 100 for each episode; the action and the reward of a step are the number of
    the observation that it leads to; even episodes end with a terminal."""
    data = Buffer(1, 1, horizon, torch.device("cpu"))
    for episode, length in enumerate(lengths):
        for step in range(length + 1):
            number = torch.tensor([100.0 * episode + step])
            terminated = step == length and episode % 2 == 0
            data.add(number, number if step else torch.zeros(1), number.item() if step else 0.0, terminated, step == 0)
    return data


def test_slices_are_successive_steps_of_one_episode_and_all_are_drawn_equally():
    lengths = [5, 2, 3, 9]  # the second is shorter than a slice
    data, draws = filled_buffer(lengths), generator()
    batch = data.sample(12_000, draws)
    assert {name: part.shape for name, part in batch.items()} == {
        "obs": (4, 12_000, 1),
        **dict.fromkeys(("action", "reward", "terminated"), (3, 12_000, 1)),
    }
    obs = batch["obs"].squeeze(-1)
    assert (obs.diff(dim=0) == 1).all()
    for name in ("action", "reward"):
        assert torch.equal(batch[name].squeeze(-1), obs[1:])
    ends = {0: 5, 2: 3}  # the terminal observations
    terminal = torch.stack([obs[1:] == 100 * episode + step for episode, step in ends.items()]).any(0)
    assert torch.equal(batch["terminated"].squeeze(-1).bool(), terminal)
    assert not batch["terminated"][:-1].any()
    starts, counts = obs[0].unique(return_counts=True)
    assert starts.tolist() == [0, 1, 2, 200, 300, 301, 302, 303, 304, 305, 306]
    assert counts.min() > 0.85 * 12_000 / 11


def test_the_running_episode_is_drawn_from_too_and_the_table_grows():
    data = filled_buffer([700, 600, 2_000])
    batch = data.sample(5_000, generator())
    assert (batch["obs"].squeeze(-1).diff(dim=0) == 1).all()
    assert batch["obs"].max() > 2_100
    copy_of = Buffer(1, 1, 3, torch.device("cpu"))
    copy_of.load_state_dict(data.state_dict())
    for other in (data, copy_of):
        for number in range(2_201, 3_400):
            other.add(torch.tensor([float(number)]), torch.ones(1), 1.0, False, first=False)
    again, wanted = copy_of.sample(500, generator(1)), data.sample(500, generator(1))
    assert all(torch.equal(again[name], wanted[name]) for name in wanted)
    assert len(data.state_dict()["table"]) == 3_303 + 1_199


def test_a_restored_buffer_has_room_for_longer_episodes():
    data = filled_buffer([2] * 300)  # too short for a slice: there are rows, but none that a slice can end with
    restored = Buffer(1, 1, 3, torch.device("cpu"))
    restored.load_state_dict(data.state_dict())
    for number in range(3_000):
        restored.add(torch.tensor([float(number)]), torch.ones(1), 1.0, False, first=number == 0)
    assert (restored.num_ends, restored.size) == (2_997, 3_900)
    assert (restored.sample(100, generator())["obs"].squeeze(-1).diff(dim=0) == 1).all()


# --- agent ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("gamma", "wanted"), [(None, 0.975), (0.7, 0.7), (0.0, 0.0)])
def test_the_discount_is_given_or_follows_from_the_length_of_an_episode(gamma, wanted, tmp_path):
    agent = Agent(box(3), box(1), Args(gamma=gamma), 200)
    agent.q_range.fill_(7.0)
    agent.plan_mean += 3
    restored = Agent(box(3), box(1), Args(gamma=gamma))  # which does not know the length
    restored.load_state_dict(agent.state_dict())
    assert agent.gamma == restored.gamma == wanted
    assert restored.q_range == 7
    assert (restored.plan_mean == 3).all()


def test_a_run_tells_the_agent_how_long_an_episode_of_its_environment_is(tmp_path):
    args = tiny_args(td_mpc2, run_dir=str(tmp_path), total_timesteps=5, eval_episodes=1)
    td_mpc2.train(dataclasses.replace(args, env_kwargs={"max_episode_steps": 150}))
    (folder,) = tmp_path.iterdir()
    assert td_mpc2.load(folder).gamma == pytest.approx(1 - 5 / 150)


def test_any_bounds_of_actions_and_several_kinds_of_observations():
    space = gym.spaces.Box(np.array([[-3.0, 0.0]], np.float32), np.array([[1.0, 10.0]], np.float32))
    parts = {"b": box(2), "a": gym.spaces.Box(0, 9, (1, 1), np.float64)}
    agent = Agent(gym.spaces.Dict(parts), space, tiny_args(td_mpc2))
    assert agent.to_env(torch.tensor([-1.0, 1.0])).tolist() == [[-3.0, 10.0]]
    assert agent.to_env(torch.tensor([0.0, -0.5])).tolist() == [[-1.0, 2.5]]
    obs = {"b": np.array([2.0, 3.0], np.float32), "a": np.array([[1.0]])}
    agent.observe(obs, np.array([[0.0, 10.0]], np.float32), 1.5, obs, True)
    rows = agent.data.table[:2]
    assert_close(rows[0], torch.tensor([1.0, 2, 3, 0, 0, 0, 0]))
    assert_close(rows[1], torch.tensor([1.0, 2, 3, 0.5, 1, 1.5, 1]))
    drawn = np.stack([agent.act(obs) for _ in range(300)])
    assert drawn.shape == (300, 1, 2)
    assert drawn.dtype == np.float32
    assert drawn.min(0).tolist()[0] == pytest.approx([-3, 0], abs=0.2)
    assert drawn.max(0).tolist()[0] == pytest.approx([1, 10], abs=0.2)


def test_an_episode_begins_with_an_observation_that_no_action_led_to():
    agent = new_agent()
    for step, (terminated, truncated) in enumerate([(False, False), (True, False), (False, True), (False, False)]):
        agent.observe(np.full(3, step), np.zeros(1), 1.0, np.full(3, step + 0.5), terminated, truncated)
    assert agent.data.table[: agent.data.size, 0].tolist() == [0, 0.5, 1.5, 2, 2.5, 3, 3.5]
    assert agent.data.table[: agent.data.size, -2].tolist() == [0, 1, 1, 0, 1, 0, 1]
    assert agent.data.table[: agent.data.size, -1].tolist() == [0, 0, 1, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("ratio", "wanted"),
    [
        (1.0, [0, 0, 0, 4, 5, 6]),
        (None, [0, 0, 0, 8, 10, 12]),
        (0.0, [0] * 6),
        (0.5, [0, 0, 0, 2, 2, 3]),
        (2.0, [0] * 3 + [8, 10, 12]),
    ],
)
def test_random_steps_are_learned_from_at_once_and_every_step_after_them(ratio, wanted, monkeypatch):
    agent, made, said = new_agent(updates_per_step=ratio, learning_starts=4), [], []
    monkeypatch.setattr(agent, "update_networks", lambda batch: made.append(1) or {})
    counts = []
    for _ in wanted:
        agent.observe(np.zeros(3), np.zeros(1), 0.0, np.zeros(3), False)
        agent.update(said.append)
        counts.append(len(made))
    assert counts == wanted
    assert said[:2] == ["learning from the random steps", ""]


def test_graphs_are_recorded_on_a_gpu_alone():
    recorded = td_mpc2.Recorded(generator(), wanted=True)
    assert recorded(lambda inputs: {"y": inputs["x"] + 1}, {"x": torch.ones(1)}) == {"y": torch.tensor([2.0])}
    assert recorded.calls == {}


# --- learning ---------------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize(("env_id", "wanted"), [("Pendulum-v1", -250), ("InvertedPendulum-v5", 950)])
def test_it_learns_with_the_settings_of_the_command_line(env_id, wanted, tmp_path: Path):
    if env_id.endswith("-v5"):
        pytest.importorskip("mujoco")
    settings = td_mpc2.PRESETS.get(env_id, {}) | {"eval_every": 10_000, "eval_episodes": 10}
    assert td_mpc2.train(Args(env_id=env_id, run_dir=str(tmp_path), **settings))["eval_return_mean"] >= wanted
