"""Makes the runs of a suite: each is a command that a user could type, several of them side by side.

What was already made, for this suite or another one, is kept: a finished run is not repeated, an interrupted one goes
on from its last checkpoint. Both only if it was made with the arguments that the suite declares now. The script itself
may have changed since: whoever changes a script deletes `benchmark/runs`.
"""

import fcntl
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import tyro
from tqdm import tqdm

from .suites import ROOT, RUNS, Entry, Suite

NOT_COMPARED = {"seed", "run_dir", "resume", "evaluate"} | {"device", "threads", "compile"}  # the last: only speed


@dataclass
class Job:
    """A run to be made, or one to go on with, whose folder is `run`."""

    suite: Suite
    entry: Entry
    seed: int
    run: Path | None = None
    process: subprocess.Popen | None = None

    @property
    def command(self) -> list[str]:
        """What to run, without the interpreter."""
        if self.run:
            return [self.entry.script, "--resume", str(self.run.relative_to(ROOT))]
        return [self.entry.script, *arguments_of(self.suite, self.entry), "--seed", str(self.seed)]

    @property
    def log(self) -> Path:
        """The file for what it prints."""
        return folder_of(self.suite, self.entry) / f"seed_{self.seed}.log"

    def continued(self) -> "Job":
        """The same, from what is in the run folder by now."""
        return Job(self.suite, self.entry, self.seed, find_runs(self.suite, self.entry).get(self.seed))

    def __str__(self) -> str:
        return shlex.join(["python", *self.command])

    def start(self) -> bool:
        """Starts the command, one thread to it; False if another process is still at this run.

        The command inherits the lock with the file, so that the lock outlives a killed `python -m benchmark run`.
        """
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "a") as log:
            try:
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            log.truncate(0)
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            command = [sys.executable, *self.command]
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
        return True


def declared_arguments(suite: Suite, entry: Entry) -> str:
    """What the suite says of the command line."""
    fixed = f"--env-id {entry.env_id} --total-timesteps {entry.total_timesteps}"
    return " ".join(filter(None, (fixed, suite.arguments, entry.arguments)))


def folder_of(suite: Suite, entry: Entry) -> Path:
    """Where the run folders of an entry lie. Its name is that of the command, so that suites share runs."""
    return (
        RUNS / Path(entry.script).stem / re.sub(r"[^\w+=.-]+", "_", declared_arguments(suite, entry).replace("--", ""))
    )


def arguments_of(suite: Suite, entry: Entry) -> list[str]:
    """The command line of an entry, without the script and the seed."""
    run_dir = ["--run-dir", str(folder_of(suite, entry).relative_to(ROOT))]
    return [*shlex.split(declared_arguments(suite, entry)), *run_dir]


def find_runs(suite: Suite, entry: Entry) -> dict[int, Path]:
    """Run folders made with the arguments that the suite declares, by seed; says which others are there."""
    module = importlib.import_module(entry.script.removesuffix(".py").replace("/", "."))
    default = module.Args(**{"env_id": entry.env_id} | module.PRESETS.get(entry.env_id, {}))
    args = tyro.cli(module.Args, default=replace(default, env_kwargs={}), args=arguments_of(suite, entry))
    args.env_kwargs = default.env_kwargs | args.env_kwargs
    declared = json.loads(json.dumps(vars(args)))  # as it would come back from the file: lists, not tuples
    found: dict[int, Path] = {}
    for path in sorted(folder_of(suite, entry).glob("*/args.json")):
        saved = json.loads(path.read_text())
        if "versions" not in saved:
            print(f"left aside, made by a script with run folders of another form: {path.parent.relative_to(ROOT)}")
        elif saved["script"] != Path(entry.script).stem or comparable(saved["args"]) != comparable(declared):
            print(f"left aside, made with other settings than the script has now: {path.parent.relative_to(ROOT)}")
        elif (seed := saved["args"]["seed"]) not in found or not is_finished(found[seed]):
            found[seed] = path.parent
    return found


def comparable(args: dict) -> dict:
    """What decides whether two runs are runs of the same entry."""
    return {name: value for name, value in args.items() if name not in NOT_COMPARED}


def is_finished(run: Path) -> bool:
    """Whether a run got to its end: result.json is that of its last checkpoint."""
    try:
        saved, result = (json.loads((run / name).read_text()) for name in ("args.json", "result.json"))
    except FileNotFoundError:
        return False
    return result.get("env_steps", 0) >= saved["args"]["total_timesteps"]


def jobs_of(suite: Suite) -> list[Job]:
    """What is left to do of a suite."""
    jobs: list[Job] = []
    for entry in suite.entries:
        found = find_runs(suite, entry)
        jobs += [
            Job(suite, entry, seed, found.get(seed))
            for seed in range(1, entry.seeds + 1)
            if seed not in found or not is_finished(found[seed])
        ]
    return jobs


def run_suite(suite: Suite, workers: int) -> int:
    """Makes the missing runs, `workers` at a time; returns how many failed.

    Ctrl-C and SIGTERM are passed on; the next call continues from the last checkpoints.
    """
    waiting = jobs_of(suite)
    total = sum(entry.seeds for entry in suite.entries)
    running: list[Job] = []
    failed = 0
    with tqdm(total=total, initial=total - len(waiting), desc=suite.name, unit="run") as bar:
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    job = waiting.pop(0)
                    if job.start():
                        running.append(job)
                    else:
                        failed += 1
                        bar.write(f"failed: {job}\n  another process is at this run", sys.stderr)
                time.sleep(0.02)
                for job in [job for job in running if job.process.poll() is not None]:
                    running.remove(job)
                    bar.update()
                    if job.process.returncode:
                        failed += 1
                        last_lines = "\n  ".join(job.log.read_text().splitlines()[-5:])
                        bar.write(f"failed (status {job.process.returncode}): {job}\n  {last_lines}", sys.stderr)
        finally:
            for job in running:
                job.process.terminate()
            for job in running:
                job.process.wait()
    return failed
