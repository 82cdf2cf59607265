"""The loop: tasks in, a trained adapter and a run folder out. Read it from `train` downwards."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gcdlite import advantages, checkpoint, envs
from gcdlite.config import Config
from gcdlite.envs import closing
from gcdlite.envs.base import Pool
from gcdlite.evaluate import evaluate
from gcdlite.gcd import judge as judging
from gcdlite.gcd.labels import label
from gcdlite.policy import Policy
from gcdlite.records import Group, Sample, Task
from gcdlite.rollout import collect
from gcdlite.runlog import Listener, RunLog
from gcdlite.update import make_optimizer, update


def train(config: Config, folder: Path, listeners: Sequence[Listener] = (), resume: bool = False) -> dict[str, Any]:
    """Train in `folder` and return the summary that is also written to `folder/summary.json`.

    A new run starts from the seed; a resumed one goes on exactly where its last checkpoint stood: same tasks, same
    samples, same parameters as if it had never stopped. After Ctrl-C or a crash, at most the running iteration is lost.
    """
    saved = checkpoint.latest(folder) if resume else None
    with closing(envs.make(config)) as pool:
        train_tasks = pool.tasks("train")
        policy = Policy(config, adapter=saved / "adapter" if saved else None)
        optimizer, schedule = make_optimizer(policy, config)
        state = checkpoint.restore(saved, optimizer, schedule) if saved else checkpoint.State.seeded(config.seed)
        log = RunLog.resume(folder, state.iteration, listeners) if resume else RunLog.create(folder, config, listeners)
        started = time.perf_counter()

        if state.iteration == 0:
            checkpoint.save(folder, policy, optimizer, schedule, state)
        evaluate_when_due(policy, pool, config, log, state.iteration)

        for iteration in range(state.iteration, config.steps):
            clock = Clock(log, iteration + 1)

            with clock("rollout"):
                groups, metrics = collect(policy, pool, tasks_of(iteration, train_tasks, config), config, state.rng)
            samples = policy_samples(groups, config)
            metrics["groups/zero_variance"] = advantages.zero_variance(groups)

            if config.gcd.enabled:
                with clock("judge"):
                    judgment_samples, stats = judge_turns(policy, groups, state, config, iteration, metrics["rollout/success"])
                samples += judgment_samples
                metrics |= stats

            with clock("update"):
                metrics |= update(policy, samples, optimizer, schedule, config, state.dice)

            state.iteration = iteration + 1
            state.seconds += clock.total
            metrics |= clock.seconds | {"time/iteration": clock.total, "lr": schedule.get_last_lr()[0]}
            log.episodes(iteration + 1, "train", shown(groups))
            log.emit(iteration + 1, "train", metrics)
            checkpoint.save(folder, policy, optimizer, schedule, state)
            evaluate_when_due(policy, pool, config, log, iteration + 1)

        policy.save_adapter(folder / "adapter")
        return summarise(config, log, state.seconds, time.perf_counter() - started, pool.note)


def tasks_of(iteration: int, tasks: Sequence[Task], config: Config) -> list[Task]:
    """The games of an iteration: all tasks in a seeded order, then all in another one, cut into equal pieces.

    A function of the iteration alone, so that a resumed run needs no memory of what was played.
    """
    count = config.rollout.groups
    chosen = []
    for place in range(iteration * count, (iteration + 1) * count):
        lap, index = divmod(place, len(tasks))
        order = list(range(len(tasks)))
        random.Random(f"{config.seed}/{lap}").shuffle(order)
        chosen.append(tasks[order[index]])
    return chosen


def policy_samples(groups: Sequence[Group], config: Config) -> list[Sample]:
    """One sample a turn, with the configured algorithm's advantages."""
    reward = config.reward
    malformed, inadmissible = reward.malformed * reward.success, reward.inadmissible * reward.success
    advantage = advantages.ALGORITHMS[config.algo.name]
    values = [advantage(g, malformed, inadmissible, config.algo.norm_over) for g in groups]
    return advantages.policy_samples(groups, values)


def judge_turns(
    policy: Policy, groups: Sequence[Group], state: checkpoint.State, config: Config, iteration: int, success_rate: float
) -> tuple[list[Sample], dict[str, float]]:
    """Label this iteration's turns, select as many good as bad ones, let the policy judge them: (samples, metrics)."""
    cfg = config.gcd
    fresh = label(advantages.all_episodes(groups), cfg.labeller, cfg.uninformative, iteration)
    stats: dict[str, float] = {"gcd/labels_good": sum(t.label for t in fresh), "gcd/labels_bad": sum(not t.label for t in fresh)}
    targets = judging.select(fresh, state.pool, cfg.turns, state.dice)
    stats["gcd/selected"] = len(targets)
    recent = [t for t in state.pool if t.iteration > iteration - cfg.pool]
    state.pool = keep(recent, fresh, cfg.turns, cfg.pool, state.dice)
    judgments = judging.judge(
        policy, targets, group_size=cfg.group_size, success_rate=success_rate, style=config.model.prompt,
        max_new_tokens=cfg.max_new_tokens, temperature=config.rollout.temperature, rng=state.rng,
    )  # fmt: skip
    stats |= {f"gcd/{key}": value for key, value in judging.accuracy(judgments).items()}
    return judging.judgment_samples(judgments, cfg.group_size), stats


def keep(recent: list, fresh: list, turns: int, iterations: int, dice: random.Random) -> list:
    """The turn pool: at most what one selection could use of each class from each of the last iterations."""
    if not iterations:
        return []
    chosen = list(recent)
    for value in (1, 0):
        mine = [t for t in fresh if t.label == value]
        chosen += dice.sample(mine, min(len(mine), turns // 2))
    return chosen


def shown(groups: Sequence[Group]) -> list:
    """Two episodes worth looking at: one that was won and one that was lost, where there are both."""
    episodes = advantages.all_episodes(groups)
    won = [e for e in episodes if e.won]
    lost = [e for e in episodes if not e.won]
    return won[:1] + lost[:1]


def evaluate_when_due(policy: Policy, pool: Pool, config: Config, log: RunLog, iteration: int) -> None:
    """Evaluate all levels and log one event: before training, after it, and every `eval.every` iterations.

    What the log already holds is not done again; what an interruption cut off is.
    """
    cfg = config.eval
    due = iteration == config.steps or (cfg.before if iteration == 0 else bool(cfg.every) and iteration % cfg.every == 0)
    if not due or any(e["phase"] == "eval" and e["iteration"] == iteration for e in log.events()):
        return
    clock = Clock(log, iteration)
    metrics: dict[str, float] = {}
    for level in cfg.levels:
        with clock(f"eval {level}"):
            found, episodes = evaluate(policy, pool, level, config)
        metrics |= found
        log.episodes(iteration, f"eval {level}", [e for e in episodes if not e.won][:1])
    log.emit(iteration, "eval", metrics | {"time/eval": clock.total})


class Clock:
    """Seconds a phase, and a word to the listeners when one begins."""

    def __init__(self, log: RunLog, iteration: int):
        self.log, self.iteration = log, iteration
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self.log.tell({"begins": phase, "iteration": self.iteration})
        start = time.perf_counter()
        yield
        self.seconds[f"time/{phase}"] = time.perf_counter() - start

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def summarise(config: Config, log: RunLog, training_seconds: float, wall_seconds: float, note: str = "") -> dict[str, Any]:
    """`summary.json`: success before and after on every level with 95 % intervals, and what the run was."""
    events = log.events()
    evals = [e for e in events if e["phase"] == "eval"]
    steps = [e for e in events if e["phase"] == "train"]
    levels: dict[str, Any] = {}
    for level in config.eval.levels:
        for when, event in (("before", evals[0] if evals and evals[0]["iteration"] == 0 else None), ("after", evals[-1] if evals else None)):
            if event:
                name = f"eval/{level}"
                keys = {"success": name, "low": f"{name}/low", "high": f"{name}/high", "n": f"{name}/n", "judge": f"{name}/judge_balanced_accuracy"}
                levels.setdefault(level, {})[when] = {k: event.get(v) for k, v in keys.items()}
    summary = {
        "environment": config.env.name, "environment_note": note, "protocol": config.env.protocol, "model": config.model.name,
        "algorithm": config.algo.name, "gcd": config.gcd.enabled, "labeller": config.gcd.labeller if config.gcd.enabled else None,
        "seed": config.seed, "steps": config.steps, "eval_temperature": config.eval.temperature,
        "inadmissible_cost": config.reward.inadmissible, "reward": config.reward.kind, "levels": levels,
        "training_success_first": steps[0]["rollout/success"] if steps else None,
        "training_success_last": steps[-1]["rollout/success"] if steps else None,
        "training_seconds": round(training_seconds, 1), "wall_seconds": round(wall_seconds, 1),
    }  # fmt: skip
    (log.folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return summary
