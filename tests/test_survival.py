"""Kills, damaged checkpoints and long runs, a campaign that takes hours: `pytest -m slow tests/test_survival.py`."""

import importlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tyro
from conftest import CORRIDOR, ROOT, TABULAR, checkpoint, complaint, only_run, outcome, tiny_args, with_tiny
from test_shared import damages

pytestmark = pytest.mark.slow
KILLS, DAMAGES = 17, 170  # of each script
WATCHED = ("evaluate", "save")  # a kill is counted, too, where one of these is at work


def test_survival_of_kills(script: ModuleType, tmp_path, capsys):
    """Killed again and again, at any moment from before the first checkpoint on: while it acts, trains, evaluates, and
    writes a checkpoint, of which there are many."""
    rng = random.Random(f"kills {script.__name__}")
    long, often, episodes = (100_000, 200, 50) if script.__name__ in TABULAR else (1_000, 20, 1)
    args = ["--total-timesteps", long, "--checkpoint-every", often, "--eval-every", 2 * often]
    args += ["--eval-episodes", episodes]

    def begin(*words: object) -> subprocess.Popen:
        code = f"import test_survival; test_survival.watched('{script.__name__}', '{tmp_path}')"
        words = [sys.executable, "-c", code, *with_tiny(script.__name__, words)]
        return subprocess.Popen(
            [str(word) for word in words],
            cwd=Path(__file__).parent,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def end(process: subprocess.Popen, timeout: float | None = None) -> None:
        _, stderr = process.communicate(timeout=timeout)
        assert process.returncode == 0, stderr

    begun = time.time()
    end(begin(*args, "--run-dir", tmp_path / "whole"))
    whole, takes = outcome(script, run_in(tmp_path / "whole")), time.time() - begun
    kills, before_the_first, ended, during = 0, 0, 0, dict.fromkeys(WATCHED, 0)
    process = begin(*args, "--run-dir", tmp_path / "0")
    while kills < KILLS:
        try:
            end(process, rng.uniform(0.2, 0.7) * takes)
            assert outcome(script, run_in(tmp_path / str(ended))) == whole
            ended += 1  # it was at its end already: once more, from a new beginning
            process = begin(*args, "--run-dir", tmp_path / str(ended))
            continue
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            for function in WATCHED:
                mark = tmp_path / function
                during[function] += mark.exists()
                mark.unlink(missing_ok=True)
        run = run_in(tmp_path / str(ended))
        before_the_first += run is None or not (run / script.CHECKPOINT).exists()
        process = begin("--resume", run) if run else begin(*args, "--run-dir", tmp_path / str(ended))
    end(process)
    assert outcome(script, run_in(tmp_path / str(ended))) == whole
    with capsys.disabled():
        where = ", ".join(f"{count} in {function}" for function, count in during.items())
        print(f"\n{script.__name__}: {kills} kills ({before_the_first} before the first checkpoint, {where})", end="")
        print(f" of {ended + 1} runs, each of which ended as if nothing had happened")


def run_in(folder: Path) -> Path | None:
    """The run folder in `folder`, if one was begun there: its arguments are the first thing that it holds."""
    return next((path.parent for path in folder.glob("*/args.json")), None)


def watched(name: str, folder: str) -> None:
    """Runs a script in such a way that a file in `folder` says in which function it is."""
    script = importlib.import_module(name)

    def watch(function: str) -> None:
        original, mark = getattr(script.Run, function), Path(folder) / function

        def call(*args: Any) -> Any:
            mark.touch()
            returned = original(*args)
            mark.unlink()
            return returned

        setattr(script.Run, function, call)

    for function in WATCHED:
        watch(function)
    script.main()


def test_survival_of_damaged_checkpoints(script: ModuleType, tmp_path, monkeypatch, capsys):
    """Cut, flipped, empty, foreign and hostile ones: each is refused with one line, or loads; no code runs."""
    env_id = CORRIDOR.get(script.__name__, "Corridor-v0")
    args = {"env_id": env_id, "total_timesteps": 300, "checkpoint_every": 100, "eval_every": 300, "eval_episodes": 1}
    script.train(tiny_args(script, run_dir=str(tmp_path), **args))
    run = only_run(tmp_path)
    path = run / script.CHECKPOINT
    whole, wanted, rng, refused, equal = path.read_bytes(), checkpoint(script, run), random.Random(0), 0, 0
    found = damages(whole, rng) + [whole[: rng.randrange(len(whole))] for _ in range(DAMAGES // 2)]
    while len(found) < DAMAGES:
        found += damages(whole, rng)[12:]
    for damage in found:
        path.write_bytes(damage)
        try:
            script.load(run)
            equal += checkpoint(script, run) == wanted
        except Exception:
            refused += 1
            complaint(script, monkeypatch, capsys, "--evaluate", run)
        assert path.read_bytes() == damage
        assert not hasattr(sys.modules["conftest"], "exploded")
    assert refused > 0.5 * len(found)  # a flipped bit of a weight goes unnoticed
    with capsys.disabled():
        loaded = len(found) - refused
        print(f"\n{script.__name__}: {len(found)} damaged checkpoints, {refused} refused, {loaded} loaded,", end="")
        print(f" {equal} of them as they were written")


LONG = {  # what keeps a million steps to minutes
    "cem_mpc": "--train-every 1000 --ensemble-size 1 --num-elites 1 --particles 1 --planner random_shooting"
    " --population 2 --num-best 1 --horizon 1",
    "mbpo": "--train-every 1000 --updates-per-step 0",
    "muzero": "--num-envs 1 --num-simulations 1 --updates-per-step 0.002 --reanalyze-ratio 0.1 --priority-exponent 0.6",
    "dreamer": "--num-envs 1 --train-ratio 0.01",
}


def endure(name: str) -> None:
    """Steps of an agent, a million: prints steps a second and megabytes after 20,000 and at the end."""
    script = importlib.import_module(name)
    words = [*with_tiny(name, ()), *LONG.get(name, "").split(), "--env-id", CORRIDOR.get(name, "Corridor-v0")]
    args = tyro.cli(script.Args, args=[*words, "--total-timesteps", "1000000"])
    env = script.make_env(args)
    agent, episode, window = script.Agent(env.observation_space, env.action_space, args), script.Episode(env, 1), 10_000
    begun, seen = 0.0, []
    episode.reset()
    for step in range(args.total_timesteps):
        if step in (window, args.total_timesteps - window):
            begun = time.process_time()
        obs = episode.obs
        action = agent.act(obs)
        next_obs, reward, terminated, truncated = episode.step(action)
        agent.observe(obs, action, reward, next_obs, terminated, truncated)
        agent.update()
        if terminated or truncated or len(episode.actions) == 100:
            episode.reset()
        if step + 1 in (2 * window, args.total_timesteps):
            size = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
            seen.append((window / (time.process_time() - begun), size))
    print(json.dumps(seen))


def test_a_million_steps_leave_time_and_memory_as_they_were(script, capsys):
    name = script.__name__
    done = subprocess.run(
        [sys.executable, "-c", f"import test_survival; test_survival.endure('{name}')"],
        cwd=Path(__file__).parent,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (early, small), (late, large) = json.loads(done.stdout.splitlines()[-1])
    with capsys.disabled():
        print(
            f"\n{name}: {early:.0f} steps a second at 20,000 steps, {late:.0f} at the end; {small:.0f}, {large:.0f} MB"
        )
    assert late > early / 1.5
    assert large < small + 100
