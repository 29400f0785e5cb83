"""Kills, damaged checkpoints and long runs, a campaign that takes hours: `pytest -m slow tests/test_survival.py`."""

import importlib
import io
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tyro
from conftest import (
    CORRIDOR,
    ROOT,
    SCRIPTS,
    TABULAR,
    learned,
    only_run,
    plain,
    result,
    scalars,
    tiny_args,
    with_tiny,
)

pytestmark = pytest.mark.slow
KILLS, DAMAGES = 17, 170  # of each of the six scripts
WATCHED = ("evaluate", "write_checkpoint")  # a kill is counted, too, where one of these is at work


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
    whole, takes = run_in(tmp_path / "whole"), time.time() - begun
    kills, before_the_first, ended, during = 0, 0, 0, dict.fromkeys(WATCHED, 0)
    process = begin(*args, "--run-dir", tmp_path / "0")
    while kills < KILLS:
        try:
            end(process, rng.uniform(0.2, 0.7) * takes)
            check(script, run_in(tmp_path / str(ended)), whole)
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
    check(script, run_in(tmp_path / str(ended)), whole)
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

    def watch(owner: Any, function: str) -> None:
        original, mark = getattr(owner, function), Path(folder) / function

        def call(*args: Any) -> Any:
            mark.touch()
            returned = original(*args)
            mark.unlink()
            return returned

        setattr(owner, function, call)

    watch(script.Run, "evaluate")
    watch(script, "write_checkpoint")
    script.main()


def check(script: ModuleType, run, whole) -> None:
    """The same weights or tables, curves, evaluations and result as those of a run that was never killed."""
    assert learned(script, run) == learned(script, whole)
    assert scalars(run, "charts/SPS") == scalars(whole, "charts/SPS")
    assert result(run) == result(whole)


class Bomb:
    """What a pickle can do: it runs code where it is opened."""

    def __reduce__(self) -> tuple:
        return sys.modules["builtins"].exec, ("import conftest; conftest.exploded = True",)


@pytest.mark.parametrize("name", SCRIPTS)
def test_survival_of_damaged_checkpoints(name: str, tmp_path, capsys):
    """Cut, flipped, empty, foreign and hostile ones: each is refused with one line, or reads as what was written; no
    code runs, and the checkpoint before it stays as it is."""
    script = __import__(name)
    args = tiny_args(script, total_timesteps=300, checkpoint_every=100, eval_every=300, eval_episodes=1)
    script.train(script.dataclasses.replace(args, run_dir=str(tmp_path)))
    run = only_run(tmp_path)
    path, previous = run / script.CHECKPOINT, run / f"previous.{script.CHECKPOINT}"
    whole, older, wanted = path.read_bytes(), previous.read_bytes(), plain(script.read_checkpoint(path))
    rng, bomb, refused = random.Random(0), io.BytesIO(), 0
    with zipfile.ZipFile(bomb, "w") as archive:  # where torch.save would put it
        archive.writestr("archive/data.pkl", pickle.dumps(Bomb()))
        archive.writestr("archive/version", "3\n")
    hostile = [b"", pickle.dumps(Bomb()), pickle.dumps({"agent": Bomb()}, protocol=2), bomb.getvalue()]
    for number in range(DAMAGES):
        if number < len(hostile):
            damage = hostile[number]
        elif number % 2:
            damage = whole[: rng.randrange(len(whole))]
        else:
            flipped = bytearray(whole)
            for _ in range(rng.choice((1, 1, 10, 1_000))):
                flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
            damage = bytes(flipped)
        path.write_bytes(damage)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [f"{name}.py", "--evaluate", str(run)])
            status = 0
            try:
                script.main()
            except SystemExit as stop:
                status = stop.code
        lines = [line for line in capsys.readouterr().err.splitlines() if "WARN" not in line]
        if status:
            assert (status, len(lines)) == (2, 1), lines
            assert f"cannot restore {path}" in lines[0]
            refused += 1
        else:
            assert plain(script.read_checkpoint(path)) == wanted
        assert previous.read_bytes() == older
        assert not hasattr(sys.modules["conftest"], "exploded")
    assert refused > 0.9 * DAMAGES
    with capsys.disabled():
        print(f"\n{name}: {DAMAGES} damaged checkpoints, {refused} refused, the others read as they were written")


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
