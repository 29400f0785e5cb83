"""How fast dreamer.py is: one update of everything and one action, with r2dreamer and TorchRL's DreamerV3 beside it.

An update draws 16 sequences of 64 steps from the replay, imagines 15 steps from each state, updates world model, actor,
critic and slow critic, and puts the latent states into the replay. The networks are those of the preset `1m`, for 24
numbers and 6 continuous actions, in single precision (ours with `--bf16`, too) and not compiled. Everything runs in
this process on one thread; the contestants take turns for several rounds, and medians of processor time are compared.
The part of it that matrix products take is the limit: no way of writing the same update can do without them. Steps and
weights are random ones.

On a GPU (`--device cuda`) each is what it is there, a CUDA graph with us and compiled with r2dreamer. Time on the clock
is measured, of dreamer.py with `--compile`, too.
"""

import contextlib
import importlib
import importlib.util
import io
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import dreamer

OBS_SIZE, ACTION_SIZE, ROWS, EPISODE = 24, 6, 2_000, 500
BATCH, LENGTH, HORIZON, SIZE = 16, 64, 15, dreamer.SIZES["1m"]
LATENTS, BINS = SIZE.stoch * SIZE.classes, 255
OBSERVATION_SPACE = gym.spaces.Box(-np.inf, np.inf, (OBS_SIZE,), np.float32)
ACTION_SPACE = gym.spaces.Box(-1.0, 1.0, (ACTION_SIZE,), np.float32)
Work = Callable[[], Any]


class Contestant(NamedTuple):
    """Does one update, and chooses one action for the observation of one environment."""

    parameters: int
    update: Work
    act: Work


def random_steps() -> dict[str, np.ndarray]:
    """Columns of steps, one episode after the other."""
    rng, at = np.random.default_rng(0), np.arange(ROWS) % EPISODE
    sizes = {"vector": (ROWS, OBS_SIZE), "action": (ROWS, ACTION_SIZE), "reward": (ROWS,)}
    steps = {name: rng.uniform(-1, 1, size).astype(np.float32) for name, size in sizes.items()}
    return steps | {"is_first": at == 0, "is_last": at == EPISODE - 1, "is_terminal": at == EPISODE - 1}


def our_contestant(device: str, **options: bool) -> Contestant:
    """dreamer.py."""
    sizes = {"size": "1m", "batch_size": BATCH, "batch_length": LENGTH, "imagination_starts": LENGTH}
    args = dreamer.Args(**sizes, **options, horizon=HORIZON, num_envs=1, replay_size=ROWS, device=device)
    agent, steps = dreamer.Agent(OBSERVATION_SPACE, ACTION_SPACE, args), random_steps()
    for name, column in steps.items():
        agent.replay.columns[name][0] = column
    agent.replay.added[0] = ROWS
    return Contestant(count(agent.nets.parameters()), agent.update_once, lambda: agent.act(steps["vector"][0]))


def r2dreamer_contestant(path: Path, device: str) -> Contestant:
    """r2dreamer with the losses of DreamerV3, from the checkout at `path`."""
    if not (path / "rssm.py").is_file():
        raise FileNotFoundError(f"there is no rssm.py in {path}")
    from omegaconf import OmegaConf
    from tensordict import TensorDict

    # One of its modules is a `dreamer`, too, so they are found only while they are imported here.
    sys.path.insert(0, str(path))
    del sys.modules["dreamer"]
    try:
        theirs, buffer = importlib.import_module("dreamer"), importlib.import_module("buffer")
    finally:
        sys.path.remove(str(path))
        for name, module in list(sys.modules.items()):
            if str(getattr(module, "__file__", None)).startswith(f"{path}{os.sep}"):
                del sys.modules[name]
        sys.modules["dreamer"] = dreamer
    theirs.autocast = lambda **_: contextlib.nullcontext()  # it would be half precision
    theirs.GradScaler = lambda: torch.amp.GradScaler(enabled=False)

    widths = {"deter": SIZE.deter, "hidden": SIZE.hidden, "discrete": SIZE.classes, "units": SIZE.units}
    model = OmegaConf.load(path / "configs" / "model" / "_base_.yaml")
    model.update(widths | {"depth": SIZE.depth, "act": "SiLU", "norm": True, "rep_loss": "dreamer"})
    model.compile = device == "cuda"
    env = OmegaConf.load(path / "configs" / "env" / "dmc_proprio.yaml")
    replay = {"batch_size": BATCH, "batch_length": LENGTH, "max_size": ROWS, "device": device, "storage_device": device}
    config = OmegaConf.create({"model": model, "env": env, "buffer": replay, "device": device})
    with contextlib.redirect_stdout(io.StringIO()):
        agent = theirs.Dreamer(config.model, gym.spaces.Dict({"vector": OBSERVATION_SPACE}), ACTION_SPACE).to(device)
    replay, state = buffer.Buffer(config.buffer), agent.get_initial_state(1)
    rows = {name: torch.from_numpy(column).reshape(1, ROWS, -1) for name, column in random_steps().items()}
    rows = {name: column.to(device) for name, column in rows.items()}
    rows |= {name: state[name][:, None].expand(-1, ROWS, *state[name].shape[1:]) for name in ("stoch", "deter")}
    replay._buffer.extend(
        TensorDict(rows | {"episode": torch.zeros(1, ROWS, dtype=torch.int32, device=device)}, (1, ROWS))
    )
    seen = {"vector": rows["vector"][:, 0], "is_first": torch.zeros(1, 1, dtype=torch.bool, device=device)}

    def act() -> np.ndarray:
        return agent.act(TensorDict(seen, (1,)), state)[0].cpu().numpy()

    return Contestant(count(agent._named_params.values()), lambda: agent.update(replay), act)


def torchrl_contestant() -> Contestant:
    """TorchRL's parts of DreamerV3: networks, losses, optimizer and replay, with a loop over time, its default."""
    from tensordict import TensorDict
    from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential
    from tensordict.nn import TensorDictModule as Part
    from tensordict.nn import TensorDictSequential as Chain
    from torchrl import data, modules, objectives
    from torchrl.envs.model_based import DreamerEnv
    from torchrl.trainers import algorithms

    def head(out: int, layers: int, scale: float = 1.0) -> torch.nn.Module:
        return modules.DreamerV3MLP(LATENTS + SIZE.deter, out, layers, SIZE.units, scale)

    def gaussian(found: Tensor) -> tuple[Tensor, Tensor]:
        policy = dreamer.make_policy(found, False)
        return policy.mean, policy.std

    sizes = {"num_categoricals": SIZE.stoch, "num_classes": SIZE.classes, "rnn_hidden_dim": SIZE.deter, "unimix": 0.01}
    sizes |= {"hidden_dim": SIZE.hidden}
    core = {"recurrent_model": "block_gru", "num_blocks": SIZE.blocks}
    prior = modules.RSSMPriorV3(action_shape=(ACTION_SIZE,), action_dim=ACTION_SIZE, **core, **sizes)
    posterior = modules.RSSMPosteriorV3(obs_embed_dim=SIZE.units, use_rms_norm=True, **sizes)
    encoder, bins = modules.DreamerV3MLP(OBS_SIZE, None, 3, SIZE.units), modules.SymExpTwoHot(BINS)
    reward, going = head(BINS, 1, 0.0), head(1, 1)
    now, after, tokens = ["state", "belief"], [("next", "state"), ("next", "belief")], ("next", "encoded_latents")
    heads = {"decoded": head(OBS_SIZE, 3), "reward_logits": reward, "continue_pred": going}
    world = Chain(
        Part(encoder, [("next", "observation")], [tokens]),
        modules.RSSMRolloutV3(
            Part(prior, [*now, "action"], [("next", "prior_logits"), *after]),
            Part(posterior, [("next", "belief"), tokens], [("next", "posterior_logits"), ("next", "state")]),
        ),
        *(Part(part, after, [("next", name)]) for name, part in heads.items()),
    )
    rewards = Chain(Part(reward, now, ["logits"]), Part(bins, ["logits"], ["reward"]))
    env = DreamerEnv(modules.WorldModelWrapper(Part(prior, [*now, "action"], ["_", *now]), rewards), (), ())
    env.observation_spec = data.Composite(state=data.Unbounded(LATENTS), belief=data.Unbounded(SIZE.deter))
    env.state_spec, env.reward_spec = env.observation_spec.clone(), data.Unbounded(1)
    env.action_spec = data.Unbounded(ACTION_SIZE)
    draw = {"distribution_class": modules.IndependentNormal, "default_interaction_type": "random"}
    actor = ProbabilisticTensorDictSequential(
        Part(head(2 * ACTION_SIZE, 3, 0.01), now, ["found"]),
        Part(gaussian, ["found"], ["loc", "scale"]),
        ProbabilisticTensorDictModule(["loc", "scale"], ["action"], **draw),
    )
    logits = "state_value_logits"
    critic = Chain(Part(head(BINS, 3, 0.0), now, [logits]), Part(bins, [logits], ["state_value"]))
    goes_on = Chain(Part(going, now, ["going"]), Part(torch.nn.Sigmoid(), ["going"], ["continuation"]))

    terms = {"kl_mode": "separate", "lambda_continue": 1.0, "continue_target_scale": 1 - 1 / 333, "unimix": 0.01}
    model_loss = objectives.DreamerV3ModelLoss(world, reco_symlog=False, detach_output=False, **terms)
    model_loss.set_keys(pixels="observation", reco_pixels="decoded")
    terms = {"continuation_model": goes_on, "imagination_horizon": HORIZON, "use_reinforce": True}
    actor_loss = objectives.DreamerV3ActorLoss(actor, critic, env, **terms)
    actor_loss.make_value_estimator(gamma=1.0, lmbda=0.95)  # the discount is in the continuation
    value_loss = objectives.DreamerV3ValueLoss(critic, "two_hot", actor_loss=actor_loss, slow_critic_regularization=1.0)
    loss = objectives.DreamerV3Loss(model_loss, actor_loss, value_loss)
    optimizer, slow = algorithms.DreamerV3Optimizer(loss.parameters()), objectives.SoftUpdate(value_loss, tau=0.02)
    stepper = algorithms.DreamerV3OptimizationStepper(loss, optimizer, slow)

    replay = data.TensorDictReplayBuffer(
        storage=data.LazyTensorStorage(ROWS),
        sampler=data.SliceSampler(slice_len=LENGTH + 1, traj_key="stream", init_key=None),
        writer=data.TensorDictRoundRobinWriter(track_generations=True),
        batch_size=BATCH * (LENGTH + 1),
    )
    steps = {name: torch.from_numpy(column).reshape(ROWS, -1) for name, column in random_steps().items()}
    then = {"observation": "vector", "reward": "reward", "done": "is_last", "terminated": "is_terminal"}
    rows = {"next": {name: steps[other] for name, other in then.items()}, "stream": torch.zeros(ROWS).long()}
    latents = {"state": torch.zeros(ROWS, LATENTS), "belief": torch.zeros(ROWS, SIZE.deter)}
    rows |= latents | {"action": steps["action"], "is_init": steps["is_first"]}
    replay.extend(TensorDict(rows, (ROWS,)))

    def update() -> None:
        found = replay.sample().reshape(BATCH, LENGTH + 1)
        batch, where = found[:, :-1], found[:, 1:].select("index", "index_generation").reshape(-1)
        stepper.step(None, batch)
        handle = {"index": where["index"], "generation": where["index_generation"]}
        replay.update_if_present(**handle, patch=batch["replay_context"].reshape(-1))

    estimator = modules.RSSMStateEstimatorV3(prior, posterior)
    policy = Chain(Part(encoder, ["observation"], ["encoded_latents"]), estimator, actor)
    seen = {"observation": steps["vector"][:1], "is_init": torch.zeros(1, 1, dtype=torch.bool)}
    seen |= {"state": latents["state"][:1], "belief": latents["belief"][:1], "previous_action": steps["action"][:1]}

    @torch.no_grad()
    def act() -> np.ndarray:
        return policy(TensorDict(seen, (1,)))["action"].numpy()

    return Contestant(count(loss.parameters()), update, act)


def count(parameters: Any) -> int:
    return sum(parameter.numel() for parameter in parameters)


class MatrixProducts(TorchDispatchMode):
    """Adds up the processor time in matrix products, and their floating-point operations, while it is entered."""

    seconds, operations = 0.0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, start = kwargs or {}, time.process_time()
        found = func(*args, **kwargs)
        if func.overloadpacket in flop_registry:
            self.seconds += time.process_time() - start
            self.operations += flop_registry[func.overloadpacket](*args, **kwargs, out_val=found)
        return found


def clock(device: str) -> float:
    """Seconds of the processor, or, when a GPU has done all that it was asked to do, on the clock."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def seconds(work: Work, least: float, device: str) -> float:
    """Time for doing it once, from at least so many seconds."""
    done, start = 0, clock(device)
    while (elapsed := clock(device) - start) < least:
        for _ in range(1 if device == "cpu" else 10):  # on a GPU, the clock makes the work wait
            work()
            done += 1
    return elapsed / done


def measure(peer: Path | None, rounds: int, device: str = "cpu") -> str:
    """Markdown table of the medians; the ratios say how many times as long as with dreamer.py an update takes. A
    checkout of r2dreamer is `peer`, or else where the environment variable R2DREAMER says."""
    torch.set_num_threads(1)
    os.environ.setdefault("RL_LOGGING_LEVEL", "WARNING")  # TorchRL would log among the lines of the table
    contestants = {"dreamer.py": our_contestant(device), "dreamer.py --bf16": our_contestant(device, bf16=True)}
    if device == "cuda":
        contestants["dreamer.py --compile"] = our_contestant(device, compile=True)
        contestants["dreamer.py --compile --bf16"] = our_contestant(device, compile=True, bf16=True)
    if place := peer or os.environ.get("R2DREAMER"):
        contestants["r2dreamer"] = r2dreamer_contestant(Path(place).resolve(), device)
    if device == "cpu" and importlib.util.find_spec("torchrl"):
        contestants["TorchRL"] = torchrl_contestant()
    found, unit = {name: [] for name in contestants}, {"cpu": (1, "s"), "cuda": (1e3, "ms")}[device]
    for index in range(-1, rounds):  # one more, to warm up
        for name, contestant in contestants.items():
            with MatrixProducts() if device == "cpu" else contextlib.nullcontext() as products:
                contestant.update()
            times = unit[0] * seconds(contestant.update, 3.0, device), 1e3 * seconds(contestant.act, 0.5, device)
            matrices = (products.seconds, products.operations / 1e9) if products else (math.nan, math.nan)
            found[name] += [(*times, *matrices)] * (index >= 0)
    lines = [
        f"| medians of {rounds} rounds | an update, {unit[1]} | ratio | of it matrix products, s (GFLOP) "
        "| an action, ms | parameters |",
        "|---|---|---|---|---|---|",
    ]
    for name, rows in found.items():
        update, action, products, operations = (median(column) for column in zip(*rows, strict=True))
        ratio = median(row[0] / ours[0] for row, ours in zip(rows, found["dreamer.py"], strict=True))
        limit = f"{products:.2f} ({operations:.1f})" if device == "cpu" else "not measured"
        cells = f"{update:.2f} | {ratio:.2f}x | {limit} | {action:.2f}"
        lines.append(f"| {name} | {cells} | {contestants[name].parameters:,} |")
    return "\n".join(lines)
