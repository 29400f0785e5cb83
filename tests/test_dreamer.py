"""dreamer.py against golden values of the authors' code, brute force, and step-by-step acting."""

import copy
import io
import itertools
import json
import math
import os
import pickle
from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, only_run, tiny_args
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from torch.nn import functional as F

import dreamer
from dreamer import Latent, Percentiles, Shapes

# A JSON file; the arrays are in an .npz file beside it.
GOLDEN = os.environ.get("DREAMER_GOLDEN", ROOT / "tests" / "golden" / "dreamer_golden.json")
CPU = torch.device("cpu")
BINS = dreamer.make_bins()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small_args(**fields: object) -> dreamer.Args:
    return tiny_args(dreamer, **fields)


def small_agent(
    observation: gym.Space | None = None, action: gym.Space | None = None, **fields: object
) -> dreamer.Agent:
    observation = gym.spaces.Box(-1, 1, (3,), np.float32) if observation is None else observation
    return dreamer.Agent(observation, action or gym.spaces.Discrete(2), small_args(**fields))


@pytest.fixture(scope="module")
def golden() -> dict:
    with open(GOLDEN) as file:
        values = json.load(file)
    with np.load(Path(GOLDEN).with_suffix(".npz")) as arrays:
        return values | {"arrays": {name: torch.tensor(arrays[name]) for name in arrays.files}}


def tensor(values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


# --- golden values --------------------------------------------------------------------------------------------------
def test_golden_formulas(golden):
    torch.testing.assert_close(dreamer.symlog(tensor(golden["symlog"]["x"])), tensor(golden["symlog"]["symlog"]))
    wanted = tensor(golden["symlog"]["symexp_of_symlog"])
    torch.testing.assert_close(dreamer.symexp(tensor(golden["symlog"]["symlog"])), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(BINS, golden["arrays"]["bins"], rtol=1e-5, atol=0)
    twohot, targets = golden["twohot"], tensor(golden["twohot"]["targets"])
    random = tensor(np.random.default_rng(0).normal(size=255).astype(np.float32))
    for logits, name in ((torch.zeros(255), "loss_zero_logits"), (random, "loss_random_logits")):
        losses = dreamer.two_hot_loss(logits.log_softmax(-1).expand(len(targets), -1), targets, BINS)
        torch.testing.assert_close(losses, tensor(twohot[name]), rtol=0, atol=1e-5)
    assert dreamer.two_hot_mean(random, BINS).item() == pytest.approx(twohot["pred_random"], rel=1e-5)
    mixed = golden["unimix"]
    first, second = dreamer.unimix(tensor(mixed["l1"])), dreamer.unimix(tensor(mixed["l2"]))
    torch.testing.assert_close(first, tensor(mixed["logits1"]), rtol=0, atol=1e-5)
    assert dreamer.kl(first[None], second[None]).item() == pytest.approx(mixed["kl"], abs=1e-5)
    assert dreamer.Policy(first).entropy().item() == pytest.approx(mixed["ent"], abs=1e-5)
    normal = golden["bounded_normal"]
    policy = dreamer.make_policy(tensor([normal["raw_mean"], normal["raw_std"]]), False)
    got = [policy.mean, policy.std, policy.log_density(tensor([0.0])), policy.entropy()]
    for value, name in zip(got, ("mean", "std", "logp_at_0", "ent"), strict=True):
        assert value.item() == pytest.approx(normal[name], abs=1e-5)


def test_golden_returns_and_losses(golden):
    given_ = golden["lambda_return"]
    last, term, rew, val = (tensor(given_[name]) for name in ("last", "term", "rew", "val"))
    returns = dreamer.lambda_return(last, term, rew, val, given_["disc"], given_["lam"])
    torch.testing.assert_close(returns, tensor(given_["ret"]), rtol=0, atol=1e-5)
    percentiles = Percentiles(CPU)
    for values, (offset, scale) in zip(golden["retnorm"]["inputs"], golden["retnorm"]["offset_scale"], strict=True):
        assert percentiles.update(tensor(values)).item() == pytest.approx(scale, rel=1e-5)
        assert percentiles.low.item() == pytest.approx(offset, rel=1e-5)
    arrays = golden["arrays"]
    # These are of a policy without the 1 % of uniform, which the authors' configuration adds.
    policy = dreamer.Policy(arrays["policy_logits"].log_softmax(-1))
    action = F.one_hot(arrays["act"].long(), 3).float()
    log_density, entropy = policy.log_density(action)[:, :-1], policy.entropy()[:, :-1]
    given_ = arrays["rew"], arrays["con"], log_density, entropy, arrays["vl"], arrays["sl"]
    losses = small_agent().imagination_loss(*given_)
    for got, name in zip(losses, ("policy", "value", "ret"), strict=True):
        # Returns are some 100,000 here: what is a difference of such numbers is known to 1e-5 of them.
        torch.testing.assert_close(got, arrays[name], rtol=1e-5, atol=1e-5 * arrays[name].abs().max().item())


def test_golden_optimizer(golden):
    weight, bias = (torch.nn.Parameter(tensor(values)) for values in ([[1, 2], [3, 4]], [0, 0]))
    optimizer = dreamer.LaProp([weight, bias], lr=0.01, warmup=0)
    for index, wanted in enumerate(golden["agc_laprop"]["params_after"]):
        weight.grad, bias.grad = tensor([[10, -5], [2, 1]]) * (index + 1), tensor([0.5, -0.25])
        optimizer.step()
        torch.testing.assert_close(weight.data, tensor(wanted["w"]), rtol=0, atol=1e-5)
        torch.testing.assert_close(bias.data, tensor(wanted["b"]), rtol=0, atol=1e-5)


def test_a_discrete_policy_never_rules_an_action_out():
    found = dreamer.make_policy(tensor([[30, 0, -30]]), True).log_prob.exp()
    torch.testing.assert_close(found, tensor([[0.99 + 0.01 / 3, 0.01 / 3, 0.01 / 3]]))


def test_numbers_of_parameters():
    nets = dreamer.Networks(Shapes(24, None, 6, False), dreamer.SIZES["1m"], generator())
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in nets.named_children()}
    assert counts == {
        "encoder": 10_112,
        "rssm": 364_416,
        "decoder": 51_096,
        "reward": 57_663,
        "con": 41_153,
        "actor": 50_316,
        "critic": 66_111,
    }
    assert sum(counts.values()) == 640_867
    wide = dreamer.SIZES["1m"]._replace(hidden=256, classes=32, units=256)
    nets = dreamer.Networks(Shapes(24, None, 6, False), wide, generator())
    assert sum(p.numel() for p in nets.parameters()) == 4_488_483


# --- formulas -------------------------------------------------------------------------------------------------------
def test_bins_and_the_mean_of_equal_logits():
    assert len(BINS) == 255
    assert BINS[127] == 0
    assert torch.equal(BINS, -BINS.flip(0))
    assert BINS[128].item() == pytest.approx(math.expm1(20 / 127))
    for scale in (0.0, 1.0, -3.0):
        assert dreamer.two_hot_mean(torch.full((255,), scale), BINS).item() == 0


@given(st.floats(-1e9, 1e9))
def test_two_hot_spreads_a_target_over_the_bins_beside_it(x):
    target = torch.tensor([x], dtype=torch.float32)
    # The loss is linear in the weights: they are read off with numbers that single out one bin.
    single = torch.eye(255) * 50 - 50
    probability = 50 - dreamer.two_hot_loss(single, target.expand(255), BINS)
    weights = (probability / 50).double()
    assert weights.sum().item() == pytest.approx(1, abs=1e-4)
    assert (weights > 1e-4).sum() <= 2
    inside = target.clamp(BINS[0], BINS[-1]).item()
    near = (BINS - inside).abs().argmin()
    assert weights[max(near - 1, 0) : near + 2].sum().item() == pytest.approx(1, abs=1e-4)


def test_lambda_return_by_brute_force_over_ends_of_episodes():
    rng = np.random.default_rng(0)
    rew, boot = rng.normal(size=(2, 3, 8))
    last, term = rng.random((2, 3, 8)) < 0.25
    term &= last
    disc, lam = 0.9, 0.8

    def expand(row: int, t: int) -> float:
        """From step t on, written as what it is: a mixture of going on and of stopping with the value."""
        if t == 7:
            return boot[row, 7]
        if term[row, t + 1]:
            return rew[row, t + 1]
        if last[row, t + 1]:
            return rew[row, t + 1] + disc * boot[row, t + 1]
        return rew[row, t + 1] + disc * ((1 - lam) * boot[row, t + 1] + lam * expand(row, t + 1))

    got = dreamer.lambda_return(*map(tensor, (last, term, rew, boot)), disc, lam)
    for row, t in itertools.product(range(3), range(7)):
        assert got[row, t].item() == pytest.approx(expand(row, t), abs=1e-5)


def test_weights_of_imagined_steps_include_the_first_states_own():
    con, zeros = tensor([[0.5, 0.8, 1.0, 0.3]]), torch.zeros(1, 4)
    uniform, entropy = torch.zeros(1, 4, 255), torch.ones(1, 3)
    policy, value, _ = small_agent().imagination_loss(zeros, con, torch.zeros(1, 3), entropy, uniform, uniform)
    wanted = tensor([[0.5, 0.4, 0.4]])
    torch.testing.assert_close(policy, -3e-4 * wanted)
    torch.testing.assert_close(value, 2 * math.log(255) * wanted)


def test_range_of_returns_is_updated_before_it_is_used_and_never_below_one():
    percentiles, values = Percentiles(CPU), torch.linspace(0, 1e6, 101)
    assert percentiles.update(values).item() == pytest.approx(0.01 * 0.9e6, rel=1e-4)
    assert Percentiles(CPU).update(values / 1e6).item() == 1


def test_gradient_goes_straight_through_samples():
    agent = small_agent()
    rssm, weights = agent.nets.rssm, torch.randn(2, 32, 4, generator=generator(2))
    parts = rssm.initial(2), torch.zeros(2, 2), torch.zeros(2, dtype=torch.bool)
    latent, posterior = rssm.observe_step(*parts, torch.randn(2, 64), rssm.noise(2, generator=generator(1)))
    bias = rssm.posterior[-1].bias
    (got,) = torch.autograd.grad((weights * latent.stoch).sum(), bias, retain_graph=True)
    (wanted,) = torch.autograd.grad((weights * posterior.exp()).sum(), bias)
    torch.testing.assert_close(got, wanted)
    assert set(latent.stoch.detach().round(decimals=5).flatten().tolist()) == {0.0, 1.0}


def test_samples_follow_their_probabilities():
    log_prob = tensor([0.1, 0.6, 0.3]).log().expand(20_000, -1)
    share = dreamer.sample_onehot(log_prob, dreamer.gumbel(log_prob.shape, generator())).mean(0)
    torch.testing.assert_close(share, tensor([0.1, 0.6, 0.3]), atol=0.015, rtol=0)


def test_blocks_do_not_see_each_other():
    layer = dreamer.BlockLinear(6, 9, 3, generator())
    x = torch.randn(3, 5, 2, generator=generator(1))
    for block in range(3):
        torch.testing.assert_close(layer(x)[block], x[block] @ layer.weight[block] + layer.bias[block])
    many = torch.cat([dreamer.BlockLinear(512, 512, 8, generator(seed)).weight.flatten() for seed in range(4)])
    assert many.std().item() == pytest.approx(1 / math.sqrt(512), rel=0.05)  # by the width of all blocks


# --- world model ----------------------------------------------------------------------------------------------------
def steps_of(agent: dreamer.Agent, length: int, ends: tuple[int, ...], terminated: bool = True) -> list[dict]:
    """Lets the agent act on random observations, with episodes that end at these steps; returns what it did."""
    rng, done = np.random.default_rng(5), []
    obs = rng.normal(size=3).astype(np.float32)
    for step in range(length):
        action = agent.act(obs)
        done.append({"obs": obs, "action": action, "latent": Latent(*(part.clone() for part in agent.latent))})
        following = rng.normal(size=3).astype(np.float32)
        end = step in ends
        agent.observe(obs, action, float(step), following, end and terminated, end and not terminated)
        obs = rng.normal(size=3).astype(np.float32) if end else following
    return done


def test_stream_has_rewards_with_the_observation_that_they_came_with():
    agent = small_agent(num_envs=1)
    done = steps_of(agent, 6, (2,))
    columns = agent.replay.columns
    assert agent.replay.added.tolist() == [7]
    assert columns["reward"][0, :7].tolist() == [0, 0, 1, 2, 0, 3, 4]
    assert columns["is_first"][0, :7].tolist() == [True, False, False, False, True, False, False]
    assert columns["is_last"][0, :7].tolist() == [False] * 3 + [True] + [False] * 3
    assert columns["is_terminal"][0, :7].tolist() == [False] * 3 + [True] + [False] * 3
    rows = [0, 1, 2, 4, 5, 6]
    for row, step in zip(rows, done, strict=True):
        vector = np.sign(step["obs"]) * np.log1p(np.abs(step["obs"]))
        np.testing.assert_allclose(columns["vector"][0, row], vector, rtol=1e-6)
        assert columns["action"][0, row].argmax() == step["action"]
        np.testing.assert_array_equal(agent.replay.columns["deter"][0, row], step["latent"].deter[0].numpy())
    assert not columns["action"][0, 3].any()  # at the end nothing is chosen


def test_truncation_is_last_but_not_terminal():
    agent = small_agent(num_envs=1)
    steps_of(agent, 4, (1,), terminated=False)
    assert agent.replay.columns["is_last"][0, :5].tolist() == [False, False, True, False, False]
    assert not agent.replay.columns["is_terminal"].any()


def test_observing_sequences_is_what_acting_did_step_by_step(monkeypatch):
    """With samples that are the most likely class, so that both draw the same."""
    monkeypatch.setattr(
        dreamer, "sample_onehot", lambda log_prob, _: F.one_hot(log_prob.argmax(-1), log_prob.shape[-1]).float()
    )
    agent = small_agent(num_envs=1)
    done = steps_of(agent, 12, (3, 8))
    where = np.array([[0]]), np.arange(14)[None]
    batch = agent.tensors({name: column[where] for name, column in agent.replay.columns.items()})
    previous = torch.cat([torch.full((1, 1, 2), 7.0), batch["action"][:, :-1]], 1)  # before the first: ignored
    junk = Latent(torch.ones(1, 512), torch.ones(1, 32, 4))  # so is what was before
    settings = previous, batch["is_first"], agent.nets.encoder(batch), agent.generator
    latent, _ = agent.nets.rssm.observe(junk, *settings)
    rows = [row for row in range(14) if not batch["is_last"][0, row]]
    for row, step in zip(rows, done, strict=True):
        torch.testing.assert_close(latent.deter[0, row], step["latent"].deter[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(latent.stoch[0, row], step["latent"].stoch[0], atol=1e-5, rtol=1e-4)


def some_batch(agent: dreamer.Agent, rows: int = 2, length: int = 5) -> tuple[dict[str, torch.Tensor], Latent]:
    random = generator(3)
    batch = {"vector": torch.randn(rows, length, 3, generator=random)}
    batch |= {"prev_action": F.one_hot(torch.randint(2, (rows, length), generator=random), 2).float()}
    batch |= {"reward": torch.randn(rows, length, generator=random)}
    batch |= {name: torch.zeros(rows, length, dtype=torch.bool) for name in ("is_first", "is_last", "is_terminal")}
    return batch, agent.nets.rssm.initial(rows)


def test_no_updates_are_owed_for_steps_before_there_was_a_sequence(monkeypatch):
    args = small_args(num_envs=8, batch_length=12, learning_starts=1, train_ratio=96.0)
    agent = dreamer.Agent(BOX(-1, 1, (3,)), BOX(-1, 1, (1,)), args)
    made = []
    monkeypatch.setattr(agent, "update_once", lambda: made.append(agent.steps) or setattr(agent, "updates", len(made)))
    ratio, obs = args.train_ratio / (args.batch_size * args.batch_length), np.zeros(3, np.float32)
    for _ in range(30):
        actions = agent.act_many(8 * [obs])
        for env in range(8):
            agent.observe(obs, actions[env], 0.0, obs, False, False, env=env)
        before = len(made)
        agent.update()
        assert len(made) - before <= np.ceil(8 * ratio)
    assert len(made) == np.ceil((agent.steps - 8 * 13) * ratio)


def test_imagination_starts_from_the_last_states_of_each_sequence(monkeypatch):
    agent, imagined, replayed = small_agent(horizon=3, imagination_starts=2), [], []
    for network in (agent.nets.reward, agent.nets.critic):  # whose last layer is zero at first
        torch.nn.init.normal_(network[-1].weight, generator=generator(7))
    step, returns, loss = agent.nets.rssm.imagine_step, dreamer.lambda_return, dreamer.critic_loss

    def recorded_step(latent: Latent, *rest: object) -> Latent:
        imagined.append(latent.deter)
        return step(latent, *rest)

    monkeypatch.setattr(agent.nets.rssm, "imagine_step", recorded_step)
    monkeypatch.setattr(dreamer, "lambda_return", lambda *parts: replayed.append(parts) or returns(*parts))
    monkeypatch.setattr(dreamer, "critic_loss", lambda *parts: replayed.append(parts) or loss(*parts))
    batch, start = some_batch(agent)
    _, latent, _ = agent.loss(batch, start)
    assert [len(deter) for deter in imagined] == 3 * [4]
    torch.testing.assert_close(imagined[0], latent.deter[:, -2:].flatten(0, 1))
    (_, _, (_, _, reward, boot, gamma), (critic, *_)) = replayed  # the critic learns from all states
    assert gamma == agent.args.gamma
    torch.testing.assert_close(reward, batch["reward"])
    torch.testing.assert_close(critic, agent.nets.critic(latent.feature()))
    values = dreamer.two_hot_mean(critic, agent.nets.bins)
    torch.testing.assert_close(boot[:, :-2], values[:, :-2])
    assert (boot[:, -2:] != values[:, -2:]).all()  # where something was imagined, it is the imagined return
    assert not boot.requires_grad


def gradients(agent: dreamer.Agent, name: str) -> set[str]:
    """The networks that one loss has a gradient with respect to."""
    for network in (agent.nets.reward, agent.nets.critic, agent.slow_critic):  # whose last layer is zero at first
        torch.nn.init.normal_(network[-1].weight, generator=generator(7))
    losses, _, _ = agent.loss(*some_batch(agent))
    agent.nets.zero_grad()
    losses[name].backward()
    return {
        part_name
        for part_name, part in agent.nets.named_children()
        if any(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())
    }


@pytest.mark.parametrize(
    ("loss", "trained"),
    [
        ("policy", {"actor"}),
        ("value", {"critic"}),
        ("repval", {"critic", "rssm", "encoder"}),
        ("reward", {"reward", "rssm", "encoder"}),
        ("con", {"con", "rssm", "encoder"}),
        ("vector", {"decoder", "rssm", "encoder"}),
        ("dyn", {"rssm"}),
        ("rep", {"rssm", "encoder"}),
    ],
)
def test_each_loss_trains_what_it_should_and_nothing_else(loss, trained):
    agent = small_agent()
    found = gradients(agent, loss)
    assert trained - {"encoder"} <= found  # free nats may leave the KL without a gradient for the encoder
    assert found <= trained | ({"encoder"} if loss == "dyn" else set())
    assert all(p.grad is None for p in agent.slow_critic.parameters())


def test_priors_and_posteriors_are_pulled_to_each_other_only_above_the_free_nats():
    agent = small_agent()
    batch, start = some_batch(agent)
    losses, _, _ = agent.loss(batch, start)
    assert losses["dyn"] >= 1
    assert losses["rep"] >= 1
    for network in (agent.nets.rssm.prior, agent.nets.rssm.posterior):
        torch.nn.init.zeros_(network[-1].weight)  # then both are uniform
    losses, _, _ = agent.loss(batch, start)
    assert losses["dyn"] == 1
    (gradient,) = torch.autograd.grad(losses["dyn"], [agent.nets.rssm.prior[-1].bias])
    assert not gradient.any()


def test_slow_critic_follows_after_each_update():
    agent = small_agent(num_envs=1)
    steps_of(agent, 20, (7,))
    agent.update_once()
    before = [parameter.clone() for parameter in agent.slow_critic.parameters()]
    agent.optimizer.warmup, agent.optimizer.lr = 0, 0.1
    agent.update_once()
    for old, slow, new in zip(before, agent.slow_critic.parameters(), agent.nets.critic.parameters(), strict=True):
        torch.testing.assert_close(slow, old + 0.02 * (new - old))
    assert (agent.nets.critic[-1].bias - before[-1]).abs().max() > 0.01


def test_first_update_has_step_size_zero_and_the_warmup_is_linear():
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer, moves = dreamer.LaProp([parameter], lr=0.1, agc=1e9, warmup=4), []
    for _ in range(6):
        before = parameter.item()
        parameter.grad = torch.ones(1)
        optimizer.step()
        moves.append(before - parameter.item())
    np.testing.assert_allclose(moves, [0, 0.025, 0.05, 0.075, 0.1, 0.1], atol=1e-6)


def test_bounded_actions_are_scaled_and_cut():
    low, high = np.array([[-1.0, 0.0], [3.0, 10.0]], np.float32)
    space = gym.spaces.Box(low, high)
    agent = small_agent(action=space)
    np.testing.assert_allclose(dreamer.to_env(torch.tensor([0.0, 1.0]), space), [1.0, 10.0])
    np.testing.assert_allclose(dreamer.to_env(torch.tensor([-7.0, -1.0]), space), [-1.0, 0.0])
    for share in ([0.5, -0.25], [-1.0, 1.0]):
        np.testing.assert_allclose(
            dreamer.to_model(dreamer.to_env(torch.tensor(share), space), space), share, atol=1e-6
        )
    state, big = agent.nets.rssm.initial(1), torch.tensor([[4.0, -0.5]])
    torch.testing.assert_close(agent.nets.rssm.core(state, big), agent.nets.rssm.core(state, torch.tensor([[1, -0.5]])))


# --- observations ---------------------------------------------------------------------------------------------------
class Pictures(gym.Env):
    """A dictionary of a picture, a vector and a choice; 1 for the action that the picture's brighter half shows."""

    metadata: ClassVar = {"render_modes": []}

    def __init__(self, render_mode: str | None = None):
        self.observation_space = gym.spaces.Dict(
            {
                "camera": gym.spaces.Box(0, 255, (20, 24, 3), np.uint8),
                "vector": gym.spaces.Box(-np.inf, np.inf, (2,), np.float64),
                "choice": gym.spaces.Discrete(3, start=1),
            }
        )
        self.action_space = gym.spaces.Discrete(2)

    def observation(self) -> dict:
        self.side, camera = int(self.np_random.integers(2)), np.zeros((20, 24, 3), np.uint8)
        camera[:, 12 * self.side : 12 * self.side + 12] = 200
        return {"camera": camera, "vector": np.array([1e4, -0.5]), "choice": np.int64(2)}

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        super().reset(seed=seed)
        return self.observation(), {}

    def step(self, action: int) -> tuple:
        reward = float(action == self.side)
        return self.observation(), reward, False, False, {}


gym.register("Pictures-v0", entry_point=Pictures, max_episode_steps=8)


def test_observation_is_a_vector_and_a_picture_of_the_size_that_was_asked_for():
    observer = dreamer.Observer(Pictures().observation_space, 16)
    env = Pictures()
    obs, _ = env.reset(seed=0)
    found = observer(obs)
    assert observer.image == (16, 16, 3)
    assert found["image"].dtype == np.uint8
    assert set(np.unique(found["image"])) == {0, 200}
    np.testing.assert_allclose(found["vector"], [0, 1, 0, math.log(1e4 + 1), -math.log(1.5)], rtol=1e-6)
    assert dreamer.Observer(env.observation_space, 0).image == (20, 24, 3)


def test_pictures_of_two_sizes_need_one_to_be_resized_to():
    pictures = {name: gym.spaces.Box(0, 255, (side, side, 3), np.uint8) for name, side in (("near", 8), ("far", 16))}
    assert dreamer.Observer(gym.spaces.Dict(pictures), 16).image == (16, 16, 6)
    with pytest.raises(dreamer.Failure, match="need an --image-size"):
        dreamer.Observer(gym.spaces.Dict(pictures), 0)


@pytest.mark.parametrize("side", [8, 16, 32, 64])
def test_decoder_gives_back_pictures_of_the_encoders_size(side):
    shapes = Shapes(0, (side, side, 3), 2, True)
    nets = dreamer.Networks(shapes, dreamer.SIZES["1m"], generator())
    picture = torch.randint(256, (2, 4, side, side, 3), generator=generator(1)).byte()
    tokens = nets.encoder({"image": picture})
    assert tokens.shape == (2, 4, nets.encoder.width)
    latent = Latent(torch.randn(2, 4, 512), torch.zeros(2, 4, 32, 4))
    found = nets.decoder(latent)["image"]
    assert found.shape == picture.shape
    assert 0 <= found.min() <= found.max() <= 1


def test_a_run_on_pictures(tmp_path):
    settings = {"total_timesteps": 60, "image_size": 16, "batch_length": 8, "eval_episodes": 1, "train_ratio": 8.0}
    outcome = dreamer.train(small_args(env_id="Pictures-v0", run_dir=str(tmp_path), **settings))
    assert 0 <= outcome["eval_return_mean"] <= 8
    agent = dreamer.load(only_run(tmp_path))
    assert agent.replay.columns["image"].dtype == np.uint8
    assert agent.replay.columns["image"].any()
    assert dreamer.open_loop(agent).size == (5 * 8 * 16, 5 * 2 * 16 + 32)
    (file,) = only_run(tmp_path).glob("events.*")
    events = [event for event in EventFileLoader(str(file)).Load() if event.summary.value[0].tag == "model/open_loop"]
    steps = [event.step for event in events]
    assert steps[0] > 30  # none before the first update
    assert len(steps) == len(set(steps)) > 5
    assert events[0].summary.value[0].tensor.string_val[2].startswith(b"\x89PNG")


# --- replay ---------------------------------------------------------------------------------------------------------
def filled(streams: int = 2, capacity: int = 20, length: int = 4, steps: int = 15) -> dreamer.Replay:
    shapes, size = Shapes(1, None, 2, True), dreamer.SIZES["1m"]._replace(deter=8, stoch=2)
    replay = dreamer.Replay(shapes, size, streams, capacity, length)
    for step, stream in itertools.product(range(steps), range(streams)):
        number = float(100 * stream + step)
        flags = {"is_first": step % 7 == 0, "is_last": step % 7 == 6, "is_terminal": False}
        row = {"action": [0, 1], "reward": number, "vector": [number]} | flags
        replay.add(stream, deter=np.full(8, number), stoch=np.full(2, step % 4), **row)
    return replay


def test_sequences_are_runs_of_the_stream_over_ends_of_episodes():
    replay = filled(steps=50)
    replay.fresh = []
    rng, seen = np.random.default_rng(0), []
    for _ in range(200):
        (stream, _), rows = replay.sample(8, rng)
        assert (np.diff(rows["reward"], axis=1) == 1).all()
        assert (rows["reward"] // 100 == stream).all()
        seen += rows["reward"][:, 0].tolist()
    values, counts = np.unique(seen, return_counts=True)
    assert values.tolist() == [*range(30, 47), *range(130, 147)]  # the latest 20 steps hold 17 beginnings
    assert counts.min() > 20


def test_new_sequences_are_served_once_before_any_other():
    replay = filled(steps=15)
    assert replay.fresh == [(0, 0), (1, 0), (0, 4), (1, 4), (0, 8), (1, 8)]
    _, rows = replay.sample(4, np.random.default_rng(0))
    assert rows["reward"][:, 0].tolist() == [0, 100, 4, 104]
    assert replay.fresh == [(0, 8), (1, 8)]
    replay.sample(8, np.random.default_rng(0))
    assert replay.fresh == []
    replay = filled(steps=1_000)  # without an update: those that are no longer there are forgotten
    assert len(replay.fresh) == 2 * 20 // 4 + 1
    assert replay.fresh[-2:] == [(0, 996), (1, 996)]


def test_update_refreshes_what_it_trained_on_and_starts_from_what_was_stored():
    agent = small_agent(num_envs=1, batch_size=1, batch_length=4)
    steps_of(agent, 5, ())
    stored = agent.replay.columns["deter"][0].copy()
    agent.replay.columns["deter"][0, 1:] = 7.0
    agent.update_once()
    assert (agent.replay.columns["deter"][0] != 7).all(1).nonzero()[0].tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(agent.replay.columns["deter"][0, 0], stored[0])
    # The networks of then are those of now: what follows the state that was stored is what followed it then.
    np.testing.assert_allclose(agent.replay.columns["deter"][0, 1], stored[1], rtol=1e-5)


def test_numbers_are_standardised_and_choices_are_not():
    numbers = gym.spaces.Box(-np.inf, np.inf, (4,), np.float64)
    agent = small_agent(gym.spaces.Dict({"choice": gym.spaces.Discrete(3), "numbers": numbers}), replay_size=100)
    rng, kept = np.random.default_rng(0), []
    for step in range(80):  # two environments, of each of which the replay keeps the last 50 steps
        drawn = rng.normal((7, 1e-3, 5, 0), (100, 1e-3, 0, 1e-17), (2, 4))
        rows = [{"choice": rng.integers(3), "numbers": numbers} for numbers in drawn]
        for env, (obs, action) in enumerate(zip(rows, agent.act_many(rows), strict=True)):
            agent.observe(obs, action, 0.0, obs, False, False, env=env)
        kept += [rows] * (step >= 30)
    agent.observer.measure(agent.replay.latest("vector"))
    found = agent.tensors({"vector": agent.replay.latest("vector")})["vector"].view(2, 50, 7)
    values = np.array([[row["numbers"] for row in rows] for rows in kept]).swapaxes(0, 1)
    values = np.sign(values) * np.log1p(np.abs(values))
    wanted = (values[..., :2] - values[..., :2].mean((0, 1))) / values[..., :2].std((0, 1))
    np.testing.assert_allclose(found[..., 3:5], wanted, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found[..., 5:], 0, atol=1e-6)  # always the same, but for rounding: nothing to divide by
    chosen = np.array([[row["choice"] for row in rows] for rows in kept]).T
    np.testing.assert_array_equal(found[..., :3], np.eye(3)[chosen])
    far = agent.observer({"choice": 1, "numbers": np.array([100.0, -1.0, 5.0, 0.0])})["vector"][None]
    assert agent.tensors({"vector": far})["vector"][0, 4] == -10


@pytest.mark.parametrize("standardise", [True, False])
def test_the_scale_of_numbers_is_measured_while_it_learns(standardise):
    agent = small_agent(standardise=standardise)
    for steps, measured in ((100, 100), (1, 100), (20, 121)):
        steps_of(agent, steps, ())
        agent.update()
        assert agent.scaled_at == standardise * measured
    assert bool((agent.observer.std == 1).all()) != standardise
    assert agent.replay.latest("vector").shape == (121, 3)  # of the one environment that was played


def test_actions_do_not_exceed_their_bounds_by_a_rounding_error():
    rng = np.random.default_rng(0)
    for _ in range(50):
        low, high = rng.uniform(-1, 0, 4).astype(np.float32), rng.uniform(0, 3, 4).astype(np.float32)
        space = gym.spaces.Box(low, high)
        assert all(space.contains(dreamer.to_env(torch.full((4,), share), space)) for share in (-1.0, 1.0, 2.0))


def test_open_loop_shows_what_the_model_predicts_and_changes_nothing():
    agent = small_agent(num_envs=1, batch_length=16)
    steps_of(agent, 40, (11, 30))
    assert agent.metrics() == {}
    agent.update_once()
    before = pickle.dumps(plain(agent.state_dict()) | {"losses": None})
    picture = dreamer.open_loop(agent)
    assert picture.size == (640, 3 * 48 + 32)
    assert before == pickle.dumps(plain(agent.state_dict()) | {"losses": None})
    pixels = {pixel for _, pixel in picture.getcolors(10**6)}
    assert {(0, 0, 0), (255, 0, 0), (0, 0, 255)} <= pixels  # what was observed, what is predicted, how far it saw
    assert [picture.getpixel((x, 100)) == (0, 0, 255) for x in (300, 320, 340)] == [False, True, False]


def test_metrics_are_what_is_new():
    agent = small_agent(num_envs=1)
    steps_of(agent, 20, ())
    agent.update_once()
    found = agent.metrics()
    losses = ("dyn", "rep", "reward", "con", "vector", "policy", "value", "repval")
    assert {f"losses/{name}_loss" for name in losses} <= found.keys()
    assert "model/open_loop" in found
    assert agent.metrics() == {}
    agent.update_once()
    assert agent.metrics().keys() == found.keys()


@pytest.mark.parametrize("side", [72, 56, 104])
def test_sizes_that_cannot_be_halved_are_refused(side):
    space = gym.spaces.Box(0, 255, (side, 64, 3), np.uint8)
    with pytest.raises(dreamer.Failure, match="cannot be halved"):
        dreamer.Observer(space, 0)


def test_discount_is_not_rounded_in_half_precision():
    agent = small_agent(num_envs=1, bf16=True)
    with torch.no_grad():
        agent.nets.con[-1].weight.zero_()
        agent.nets.con[-1].bias.fill_(math.log(332))  # 1 - 1 / 333
    batch, start = some_batch(agent)
    with torch.autocast("cpu", torch.bfloat16):
        found = agent.nets.con(agent.nets.rssm.initial(1).feature()).float().sigmoid().item()
        losses, _, _ = agent.loss(batch, start)
    assert found == pytest.approx(1 - 1 / 333, abs=1e-4)
    assert losses["con"].item() == pytest.approx(-(332 * math.log(332 / 333) + math.log(1 / 333)) / 333, rel=1e-2)


def test_values_are_not_rounded_in_half_precision():
    log_prob = torch.zeros(1, len(BINS), requires_grad=True)
    dreamer.two_hot_loss(log_prob, torch.tensor([100.3]), BINS).backward()
    distribution = (-log_prob.grad).clamp_min(1e-30).log()  # the gradient is minus the two-hot distribution
    with torch.autocast("cpu", torch.bfloat16):
        assert dreamer.two_hot_mean(distribution, BINS).item() == pytest.approx(100.3, abs=1e-2)


def test_prior_learns_from_dyn_and_posterior_from_rep_and_not_the_other_way_round():
    agent = small_agent()
    for network in (agent.nets.rssm.prior, agent.nets.rssm.posterior):
        network[-1].weight.data *= 30  # so that the KL is above the free nats
    batch, start = some_batch(agent, 1, 2)
    batch["is_first"][:] = True  # no state comes from another one's sample
    losses, _, _ = agent.loss(batch, start)
    assert losses["dyn"] > 1
    for name, trained, other in (("dyn", "prior", "posterior"), ("rep", "posterior", "prior")):
        agent.nets.zero_grad()
        losses[name].backward(retain_graph=True)
        assert getattr(agent.nets.rssm, trained)[-1].bias.grad.abs().sum() > 0
        assert not any(p.grad is not None and p.grad.any() for p in getattr(agent.nets.rssm, other).parameters())


def test_what_is_trained_on_has_the_action_before_each_observation():
    agent = small_agent(num_envs=1, batch_size=1, batch_length=6)
    steps_of(agent, 9, (4,))
    _, rows = agent.replay.sample(1, np.random.default_rng(0))
    batch, start = agent.aligned(rows)
    np.testing.assert_array_equal(batch["prev_action"][0], rows["action"][0, :6])
    for name in ("vector", "reward", "is_first", "is_last", "is_terminal"):
        np.testing.assert_array_equal(batch[name][0], rows[name][0, 1:])
    np.testing.assert_array_equal(start.deter[0], rows["deter"][0, 0])
    np.testing.assert_array_equal(start.stoch[0].argmax(-1), rows["stoch"][0, 0])


@pytest.mark.slow
def test_it_learns_with_the_settings_of_the_command_line(tmp_path):
    assert dreamer.train(dreamer.Args(run_dir=str(tmp_path)))["eval_return_mean"] >= 475


def test_recorded_calls_the_function_itself_where_there_is_no_gpu():
    calls, recorded = [], dreamer.Recorded(generator())
    inputs = {"a": torch.ones(2), "b": torch.ones(2)}
    for _ in range(5):
        found = recorded(lambda given: calls.append(given) or {"sum": given["a"] + given["b"]}, inputs)
        assert found["sum"].tolist() == [2, 2]
    assert calls == 5 * [inputs]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_graph_does_what_its_operations_do_one_by_one():
    found = []
    for graph in (False, True):
        agent = small_agent(num_envs=1, device="cuda")
        steps_of(agent, 40, (9, 20))
        if not graph:
            agent.recorded = lambda function, inputs: function(inputs)
        for _ in range(8):
            agent.update_once()
        losses = {name: value.item() for name, value in agent.losses.items()}
        found.append((losses, agent.generator.get_state(), [agent.act(np.ones(3)) for _ in range(6)]))
    (one, first, acts), (other, second, others) = found
    assert one == pytest.approx(other, rel=1e-3, abs=1e-4)
    assert torch.equal(first, second)
    assert acts == others


BOX = gym.spaces.Box


@pytest.mark.parametrize(
    ("observation", "action", "message"),
    [
        (BOX(0, 255, (3, 16, 16), np.uint8), None, "height, width, channels"),
        (BOX(0, 255, (12, 84, 84), np.uint8), None, "height, width, channels"),
        (BOX(0, 255, (84, 84, 4, 3), np.uint8), None, "height, width, channels"),
        (gym.spaces.Dict({}), None, "hold nothing"),
        (BOX(-1, 1, (0,)), None, "hold nothing"),
        (BOX(-1, 1, (3,)), BOX(0, 2, (1,), np.int64), "floating-point"),
        (BOX(-1, 1, (3,)), BOX(-np.inf, np.inf, (1,)), "bounded"),
    ],
)
def test_spaces_that_are_refused(observation, action, message):
    with pytest.raises(dreamer.Failure, match=message):
        small_agent(observation, action)


def test_bytes_that_are_no_colours_are_numbers():
    board = small_agent(BOX(0, 1, (4, 4, 2), np.uint8))
    assert (board.shapes.vector, board.shapes.image) == (32, None)
    high = np.full((4, 4), 255)
    high[0, 0] = 1  # not all can be colours
    mixed = small_agent(gym.spaces.Box(np.zeros((4, 4), np.uint8), high.astype(np.uint8)))
    assert (mixed.shapes.vector, mixed.shapes.image) == (16, None)
    picture = small_agent(BOX(0, 255, (16, 16), np.uint8), image_size=0)
    assert (picture.shapes.vector, picture.shapes.image) == (0, (16, 16, 1))


@pytest.mark.slow
def test_it_swings_the_pendulum_up(tmp_path):
    fields = {"env_id": "Pendulum-v1", "total_timesteps": 5_000, "run_dir": str(tmp_path)}
    assert dreamer.train(dreamer.Args(**fields))["eval_return_mean"] >= -300


@pytest.mark.slow
def test_it_remembers_what_it_has_seen_before(tmp_path):
    """An agent without a memory is right half of the time."""
    fields = {"env_id": "benchmark.tasks:Recall-v0", "env_kwargs": {"delay": 3}, "run_dir": str(tmp_path)}
    fields |= {"warmup": 1_000, "entropy_scale": 3e-3, "eval_episodes": 50}
    assert dreamer.train(dreamer.Args(**fields, total_timesteps=6_000))["eval_return_mean"] >= 0.9


# --- actions, copies, checkpoints -------------------------------------------------------------------------------------
@pytest.mark.parametrize("action", [gym.spaces.Discrete(3, start=4), BOX(np.array([-1, 2]), np.array([3, 9]))])
def test_the_action_that_was_made_is_stored_and_followed(action):
    agent, twin = (small_agent(action=action, num_envs=1) for _ in range(2))
    obs = np.ones(3, np.float32)
    drawn = agent.act(obs)
    if isinstance(action, gym.spaces.Discrete):
        assert isinstance(drawn, np.int64)
        other, wanted = np.int64(4 + (drawn - 4 + 1) % 3), np.eye(3)[(drawn - 4 + 1) % 3]
    else:
        other, wanted = np.array([1, 9], np.float32), [0, 1]
    exact = agent.action[0].clone()
    agent.observe(obs, drawn, 0.0, obs, False, False)
    np.testing.assert_array_equal(agent.replay.columns["action"][0, 0], exact)  # as it was drawn, not rounded
    twin.act(obs)
    twin.observe(obs, other, 0.0, obs, False, False)
    np.testing.assert_allclose(twin.replay.columns["action"][0, 0], wanted, atol=1e-6)
    np.testing.assert_allclose(twin.action[0], wanted, atol=1e-6)
    agent.act(obs), twin.act(obs)
    assert not torch.equal(agent.latent.deter, twin.latent.deter)  # the state follows what was done


def test_what_is_stored_is_a_copy():
    agent, space = small_agent(num_envs=1, action=BOX(-1, 1, (1,))), BOX(-1, 1, (3,))
    obs, following = space.sample(), space.sample()
    action = agent.act(obs)
    agent.observe(obs, action, 0.0, following, True, False)
    stored = {name: column[0, :2].copy() for name, column in agent.replay.columns.items()}
    for array in (obs, action, following):
        array[:] = 0.123
    agent.act(obs)
    assert all((stored[name] == column[0, :2]).all() for name, column in agent.replay.columns.items())


def test_an_episode_begins_anew_until_its_first_step_is_made():
    agent = small_agent(num_envs=2)
    agent.act_many(2 * [np.ones(3)])
    agent.observe(np.ones(3), agent.act_many(2 * [np.ones(3)])[1], 0.0, np.ones(3), False, np.bool_(False), env=1)
    assert agent.first == [True, False]
    agent.observe(np.ones(3), 0, 1.0, np.ones(3), np.bool_(False), np.bool_(True), env=1)
    assert agent.first == [True, True]
    assert [type(first) for first in agent.first] == [bool, bool]  # a checkpoint holds no NumPy numbers


def plain(value: Any) -> Any:
    """Nested state with tensors as their bytes, so that == compares all of it."""
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return (tuple(value.shape), value.detach().numpy().tobytes()) if isinstance(value, torch.Tensor) else value


def saved_and_loaded(agent: dreamer.Agent) -> dreamer.Agent:
    torch.save(agent.state_dict(), file := io.BytesIO())
    file.seek(0)
    other = dreamer.Agent(agent.observer.space, agent.action_space, agent.args)
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


def played(agent: dreamer.Agent, env: gym.Env, steps: int, seed: int) -> list:
    """A loop of a user's own; returns the actions."""
    obs, actions = env.reset(seed=seed)[0], []
    for _ in range(steps):
        actions.append(np.asarray(action := agent.act(obs)).tolist())
        following, reward, terminated, truncated, _ = env.step(action)
        agent.observe(obs, action, reward, following, terminated, truncated)
        agent.update()
        obs = env.reset()[0] if terminated or truncated else following
    return actions


@pytest.mark.parametrize("env_id", ["Pictures-v0", "Pendulum-v1"])
def test_copies_go_on_as_the_agent_does(env_id):
    env = gym.make(env_id)
    args = small_args(num_envs=1, image_size=16, train_ratio=2.0, learning_starts=20, warmup=3)
    agent = dreamer.Agent(env.observation_space, env.action_space, args)
    played(agent, env, 40, seed=1)
    copies = [copy.deepcopy(agent), pickle.loads(pickle.dumps(agent)), saved_and_loaded(agent)]
    assert all(plain(other.state_dict()) == plain(agent.state_dict()) for other in copies)
    actions, updates = played(agent, env, 60, seed=2), agent.updates
    wanted, values = plain(agent.state_dict()), agent.metrics()
    assert updates > 15
    for other in copies:
        assert played(other, gym.make(env_id), 60, seed=2) == actions
        assert plain(other.state_dict()) == wanted
        assert other.metrics() == values  # two pictures are equal if all their pixels are


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("gamma", 1.5),
        ("gamma", math.nan),
        ("train_ratio", math.nan),
        ("entropy_scale", -1.0),
        ("batch_length", 1),
        ("horizon", 0),
        ("num_envs", 0),
        ("threads", 0),
        ("image_size", -1),
        ("replay_size", 8),
    ],
)
def test_settings_that_are_refused(name, value):
    with pytest.raises(dreamer.Failure, match=f"--{name.replace('_', '-')}"):
        small_args(**{name: value})
