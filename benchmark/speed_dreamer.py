"""How fast dreamer.py is: one update of everything and one action, with r2dreamer and TorchRL's DreamerV3 beside it.

An update draws a batch of 16 sequences of 64 steps from the replay, updates world model, actor and critic with 15
imagined steps from each state, and puts the new latent states into the replay. The networks are those of the preset
`1m`, for 24 numbers and 6 continuous actions, in single precision and not compiled. Everything runs in this process on
one thread of the processor; the contestants take turns for several rounds, and medians of processor time are compared.
Steps and weights are random. The limit is the time that the matrix products of dreamer.py would take alone.
"""

import contextlib
import importlib
import importlib.util
import io
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import dreamer

OBS_SIZE, ACTION_SIZE, ROWS, EPISODE = 24, 6, 2_000, 500
BATCH, LENGTH, HORIZON, SIZE = 16, 64, 15, dreamer.SIZES["1m"]
OBSERVATION_SPACE = gym.spaces.Box(-np.inf, np.inf, (OBS_SIZE,), np.float32)
ACTION_SPACE = gym.spaces.Box(-1.0, 1.0, (ACTION_SIZE,), np.float32)
LATENTS = SIZE.stoch * SIZE.classes
Work = Callable[[], Any]


class Contestant(NamedTuple):
    """Does one update, and chooses one action for the observation of one environment."""

    parameters: int
    update: Work
    act: Work


def random_steps() -> dict[str, np.ndarray]:
    """Columns of ROWS steps, episode after episode."""
    rng, at = np.random.default_rng(0), np.arange(ROWS)
    normal = {"vector": rng.normal(size=(ROWS, OBS_SIZE)), "reward": rng.normal(size=ROWS)}
    steps = {name: column.astype(np.float32) for name, column in normal.items()}
    steps["action"] = rng.uniform(-1, 1, (ROWS, ACTION_SIZE)).astype(np.float32)
    last = at % EPISODE == EPISODE - 1
    return steps | {"is_first": at % EPISODE == 0, "is_last": last, "is_terminal": last}


def count_parameters(parameters: Any) -> int:
    return sum(parameter.numel() for parameter in parameters)


def our_contestant() -> Contestant:
    """dreamer.py."""
    shape = {"size": "1m", "batch_size": BATCH, "batch_length": LENGTH, "imagination_horizon": HORIZON}
    args = dreamer.Args(**shape, num_envs=1, replay_size=ROWS, device="cpu")
    agent, steps = dreamer.Agent(OBSERVATION_SPACE, ACTION_SPACE, args), random_steps()
    deter, stoch, obs = np.zeros(SIZE.deter), np.zeros(SIZE.stoch), steps["vector"][0]
    for at in range(ROWS):
        agent.replay.add(0, deter, stoch, **{name: column[at] for name, column in steps.items()})
    return Contestant(count_parameters(agent.nets.parameters()), agent.update_once, lambda: agent.act(obs))


def r2dreamer_contestant(path: Path) -> Contestant:
    """r2dreamer with the losses of DreamerV3, from the checkout at `path`."""
    if not (path / "rssm.py").is_file():
        raise FileNotFoundError(f"there is no rssm.py in {path}")
    from omegaconf import OmegaConf
    from tensordict import TensorDict

    # Its modules have names like ours, so they are found only in here.
    sys.path.insert(0, str(path))
    del sys.modules["dreamer"]
    try:
        theirs, buffer = importlib.import_module("dreamer"), importlib.import_module("buffer")
    finally:
        sys.path.remove(str(path))
        for name, module in list(sys.modules.items()):
            if str(getattr(module, "__file__", "")).startswith(str(path)):
                del sys.modules[name]
        sys.modules["dreamer"] = dreamer
    # Half precision is for GPUs.
    theirs.autocast = lambda **_: contextlib.nullcontext()
    theirs.GradScaler = lambda: torch.amp.GradScaler(enabled=False)

    widths = {"deter": SIZE.deter, "hidden": SIZE.hidden, "discrete": SIZE.classes, "depth": 4, "units": SIZE.units}
    model = OmegaConf.load(path / "configs" / "model" / "_base_.yaml")
    model.update(widths | {"act": "SiLU", "norm": True, "compile": False, "rep_loss": "dreamer"})
    env = OmegaConf.load(path / "configs" / "env" / "dmc_proprio.yaml")
    replay = {"batch_size": BATCH, "batch_length": LENGTH, "max_size": ROWS, "device": "cpu", "storage_device": "cpu"}
    config = OmegaConf.create({"model": model, "env": env, "buffer": replay, "device": "cpu", "seed": 0})
    with contextlib.redirect_stdout(io.StringIO()):
        agent = theirs.Dreamer(config.model, gym.spaces.Dict({"vector": OBSERVATION_SPACE}), ACTION_SPACE)
    replay, state = buffer.Buffer(config.buffer), agent.get_initial_state(1)
    columns = {name: torch.from_numpy(column).reshape(ROWS, 1, -1) for name, column in random_steps().items()}
    for at in range(ROWS):
        row = {name: column[at] for name, column in columns.items()} | {"episode": torch.zeros(1, dtype=torch.int32)}
        replay.add_transition(TensorDict(row | {"stoch": state["stoch"], "deter": state["deter"]}, (1,)))
    obs = columns["vector"][0].numpy()

    def act() -> np.ndarray:
        nonlocal state
        seen = {"vector": torch.from_numpy(obs), "is_first": torch.zeros(1, 1, dtype=torch.bool)}
        action, state = agent.act(TensorDict(seen, (1,)), state)
        return action.numpy()

    return Contestant(count_parameters(agent._named_params.values()), lambda: agent.update(replay), act)


def torchrl_contestant() -> Contestant:
    """TorchRL's modules and losses of DreamerV3, put together as its documentation does."""
    from tensordict import TensorDict
    from tensordict.nn import ProbabilisticTensorDictModule as Draw
    from tensordict.nn import ProbabilisticTensorDictSequential as ActorChain
    from tensordict.nn import TensorDictModule as Part
    from tensordict.nn import TensorDictSequential as Chain
    from torchrl import data, modules, objectives
    from torchrl.envs.model_based import DreamerEnv
    from torchrl.trainers import algorithms

    def head(out: int, layers: int, scale: float = 1.0) -> torch.nn.Module:
        return modules.DreamerV3MLP(LATENTS + SIZE.deter, out, layers, SIZE.units, scale)

    def gaussian(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, std = x.chunk(2, -1)
        return mean.tanh(), 0.9 * (std + 2).sigmoid() + 0.1

    latents = {"num_categoricals": SIZE.stoch, "num_classes": SIZE.classes, "rnn_hidden_dim": SIZE.deter}
    latents |= {"hidden_dim": SIZE.hidden, "unimix": 0.01}
    prior = modules.RSSMPriorV3(
        action_shape=(ACTION_SIZE,), action_dim=ACTION_SIZE, recurrent_model="block_gru", **latents
    )
    posterior = modules.RSSMPosteriorV3(obs_embed_dim=SIZE.units, use_rms_norm=True, **latents)
    encoder, decoder = modules.DreamerV3MLP(OBS_SIZE, None, 3, SIZE.units), head(OBS_SIZE, 3)
    reward, going, bins = head(255, 1, 0.0), head(1, 1), modules.SymExpTwoHot(255)
    now, after = ["state", "belief"], [("next", "state"), ("next", "belief")]
    tokens, post = ("next", "encoded_latents"), ("next", "posterior_logits")
    rollout = modules.RSSMRolloutV3(
        Part(prior, [*now, "action"], [("next", "prior_logits"), *after]),
        Part(posterior, [after[1], tokens], [post, after[0]]),
    )
    parts = {decoder: "reconstruction", reward: "reward_logits", going: "continue_pred"}
    world = Chain(
        Part(encoder, [("next", "observation")], [tokens]),
        rollout,
        *(Part(part, after, [("next", name)]) for part, name in parts.items()),
    )
    rewards = Chain(Part(reward, now, ["logits"]), Part(bins, ["logits"], ["reward"]))
    imagined = modules.WorldModelWrapper(Part(prior, [*now, "action"], ["_", *now]), rewards)
    env = DreamerEnv(imagined, (LATENTS,), (SIZE.deter,))
    env.observation_spec = data.Composite(state=data.Unbounded(LATENTS), belief=data.Unbounded(SIZE.deter))
    env.state_spec = env.observation_spec.clone()
    env.action_spec, env.reward_spec = data.Unbounded(ACTION_SIZE), data.Unbounded(1)
    actor = ActorChain(
        Part(head(2 * ACTION_SIZE, 3, 0.01), now, ["found"]),
        Part(gaussian, ["found"], ["loc", "scale"]),
        Draw(["loc", "scale"], ["action"], distribution_class=modules.IndependentNormal),
    )
    value = "state_value_logits"
    critic = Chain(Part(head(255, 3, 0.0), now, [value]), Part(bins, [value], ["state_value"]))
    on = Chain(Part(going, now, ["going"]), Part(torch.nn.Sigmoid(), ["going"], ["continuation"]))

    scales = {"kl_mode": "separate", "lambda_continue": 1.0, "continue_target_scale": 1 - 1 / 333}
    model_loss = objectives.DreamerV3ModelLoss(world, unimix=0.01, reco_symlog=False, detach_output=False, **scales)
    model_loss.set_keys(pixels="observation", reco_pixels="reconstruction")
    settings = {"continuation_model": on, "imagination_horizon": HORIZON, "use_reinforce": True}
    actor_loss = objectives.DreamerV3ActorLoss(actor, critic, env, **settings)
    actor_loss.make_value_estimator(gamma=1.0, lmbda=0.95)
    value_loss = objectives.DreamerV3ValueLoss(critic, "two_hot", actor_loss=actor_loss, slow_critic_regularization=1.0)
    loss = objectives.DreamerV3Loss(model_loss, actor_loss, value_loss)
    parameters = [parameter for parameter in loss.parameters() if parameter.requires_grad]
    slow = objectives.SoftUpdate(value_loss, tau=0.02)
    stepper = algorithms.DreamerV3OptimizationStepper(loss, algorithms.DreamerV3Optimizer(parameters), slow)

    replay = data.TensorDictReplayBuffer(
        storage=data.LazyTensorStorage(ROWS),
        sampler=data.SliceSampler(slice_len=LENGTH + 1, traj_key="stream", init_key=None),
        writer=data.TensorDictRoundRobinWriter(track_generations=True),
        batch_size=BATCH * (LENGTH + 1),
    )
    columns = {name: torch.from_numpy(column).reshape(ROWS, -1) for name, column in random_steps().items()}
    then = {"observation": columns["vector"], "reward": columns["reward"], "done": columns["is_last"]}
    zeros = {"state": torch.zeros(ROWS, LATENTS), "belief": torch.zeros(ROWS, SIZE.deter)}
    rows = zeros | {"action": columns["action"], "is_init": columns["is_first"], "stream": torch.zeros(ROWS).long()}
    replay.extend(TensorDict(rows | {"next": then | {"terminated": columns["is_terminal"]}}, (ROWS,)))

    def update() -> None:
        found = replay.sample().reshape(BATCH, LENGTH + 1)
        where, batch = found.select("index", "index_generation")[:, 1:].reshape(-1), found[:, :-1]
        stepper.step(None, batch)
        patch = batch["replay_context"].reshape(-1)
        replay.update_if_present(index=where["index"], generation=where["index_generation"], patch=patch)

    policy = Chain(
        Part(encoder, ["observation"], ["encoded_latents"]), modules.RSSMStateEstimatorV3(prior, posterior), actor
    )
    state = {name: column[:1] for name, column in zeros.items()} | {"action": columns["action"][:1]}
    obs = columns["vector"][:1].numpy()

    @torch.no_grad()
    def act() -> np.ndarray:
        nonlocal state
        seen = {"observation": torch.from_numpy(obs), "is_init": torch.zeros(1, 1, dtype=torch.bool)}
        before = {"state": state["state"], "belief": state["belief"], "previous_action": state["action"]}
        state = policy(TensorDict(seen | before, (1,)))
        return state["action"].numpy()

    return Contestant(count_parameters(parameters), update, act)


class MatrixProducts(TorchDispatchMode):
    """While it is entered, adds up the floating-point operations of matrix products and the processor time in them."""

    def __init__(self):
        super().__init__()
        self.operations, self.seconds = 0, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        start, count = time.process_time(), flop_registry.get(func.overloadpacket)
        found = func(*args, **(kwargs or {}))
        if count is not None:
            self.seconds += time.process_time() - start
            self.operations += count(*args, **(kwargs or {}), out_val=found)
        return found


def seconds(work: Work, least: float) -> float:
    """Processor time for doing it once, measured for at least that long."""
    count, start = 0, time.process_time()
    while (elapsed := time.process_time() - start) < least:
        work()
        count += 1
    return elapsed / count


def measure(peer: Path | None, rounds: int) -> str:
    """Markdown table of the medians."""
    torch.set_num_threads(1)
    contestants = {"dreamer.py": our_contestant()}
    if peer := peer or (Path(os.environ["R2DREAMER"]) if "R2DREAMER" in os.environ else None):
        contestants["r2dreamer"] = r2dreamer_contestant(peer)
    if importlib.util.find_spec("torchrl"):
        contestants["TorchRL"] = torchrl_contestant()
    for name, contestant in contestants.items():
        for _ in range(3):
            t = time.process_time()
            contestant.update()
            print(name, contestant.parameters, time.process_time() - t)
        t = time.process_time()
        with MatrixProducts() as m:
            contestant.update()
        print(name, time.process_time() - t, m.operations / 1e9, m.seconds, 1e3 * seconds(contestant.act, 0.5))
    return ""
