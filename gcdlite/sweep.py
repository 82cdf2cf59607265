"""Several arms over several seeds: a recipe in, finished runs and one table with intervals and paired differences out.

Each run is a process of its own (`python run.py … --out ROOT/ARM-sSEED`), so a crash costs one run. Running a sweep again
skips what is finished and resumes what was begun. Seeds go outermost: whatever is finished can be compared in pairs.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gcdlite.config import CONFIG_DIR, find_config, load, nearest
from gcdlite.records import UserError

RUN = CONFIG_DIR.parent / "run.py"

# Student's t, 97.5 %, by degrees of freedom (fewer seeds than this table is long, or nearly normal).
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


class Recipe(BaseModel):
    """What a sweep runs. The first arm is the one that the others are compared with."""

    model_config = ConfigDict(extra="forbid")

    title: str = Field(description="what the table shows, and which table of the papers it is")
    config: str = Field("nano", description="a config's name or file")
    settings: dict[str, Any] = Field({}, description="section.field: value, for every arm")
    seeds: list[int] = Field([0, 1, 2], min_length=1, description="paired over the arms")
    arms: dict[str, dict[str, Any]] = Field(min_length=1, description="name -> section.field: value")

    def overrides(self, arm: str) -> list[str]:
        """The arm's settings as `section.field=value`."""
        return [f"{key}={json.dumps(value)}" for key, value in (self.settings | self.arms[arm]).items()]


@dataclass
class Run:
    arm: str
    seed: int
    folder: Path

    @property
    def state(self) -> str:
        """`finished`, `begun` or `not run`."""
        if (self.folder / "summary.json").is_file():
            return "finished"
        return "begun" if any((self.folder / "checkpoints").glob("*")) else "not run"

    def summary(self) -> dict[str, Any] | None:
        return json.loads((self.folder / "summary.json").read_text()) if self.state == "finished" else None


def read(path: Path) -> Recipe:
    """A recipe, every arm's settings checked. Raises UserError with all faults."""
    try:
        recipe = Recipe.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"cannot read the recipe {path}: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, e['loc'])) or 'recipe'}: {e['msg']}" for e in error.errors()]
        raise UserError(f"the recipe {path}: " + "; ".join(faults)) from None
    for arm in recipe.arms:
        if "/" in arm or not arm.strip():
            raise UserError(f"the recipe {path}: {arm!r} is no name for a folder")
        try:
            load(find_config(recipe.config), recipe.overrides(arm))
        except UserError as error:
            raise UserError(f"the recipe {path}, arm {arm}: {error}") from None
    return recipe


def find(name: str) -> Path:
    """The recipe's file, for a path or a name in configs/recipes. Raises UserError when there is none."""
    folder = CONFIG_DIR / "recipes"
    for path in (Path(name), folder / f"{name}.yaml"):
        if path.is_file():
            return path
    known = sorted(p.stem for p in folder.glob("*.yaml"))
    raise UserError(f"no recipe {name!r}{nearest(name, known)}; shipped ones: {', '.join(known)}")


def plan(recipe: Recipe, root: Path) -> list[Run]:
    """All runs, in the order in which they are done."""
    return [Run(arm, seed, root / f"{arm}-s{seed}") for seed in recipe.seeds for arm in recipe.arms]


def sweep(recipe: Recipe, root: Path, tell: Callable[[str], None] = print) -> list[str]:
    """Do what is not finished; returns the runs that failed, which do not stop the others."""
    failed = []
    for run in plan(recipe, root):
        name, state = run.folder.name, run.state
        if state == "finished":
            tell(f"{name}: finished before")
            continue
        if state == "begun":
            command = ["--resume", str(run.folder)]
        else:
            command = ["--config", recipe.config, "--seed", str(run.seed), "--out", str(run.folder), *recipe.overrides(run.arm)]
        tell(f"{name}: {'resumed' if state == 'begun' else 'started'}")
        code = subprocess.run([sys.executable, str(RUN), *command]).returncode
        if code == 130:
            raise KeyboardInterrupt
        if code:
            tell(f"{name}: failed (exit code {code})")
            failed.append(name)
    return failed


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """(mean, half width of the 95 % interval over seeds by Student's t); no width from a single value.

    >>> [round(x, 3) for x in interval([0.1, 0.2, 0.3])]
    [0.2, 0.248]
    """
    if len(values) < 2:
        return mean(values), None
    t = _T[len(values) - 2] if len(values) - 2 < len(_T) else 1.96
    return mean(values), t * stdev(values) / math.sqrt(len(values))


def table(recipe: Recipe, root: Path) -> list[dict[str, Any]]:
    """One row for each arm and level: success before and after, the change, and the paired difference to the first arm.

    Each of these is {"mean", "half", "n"}, in shares, over the seeds that are finished, or None.
    """
    done: dict[str, dict[int, dict]] = {arm: {} for arm in recipe.arms}
    for run in plan(recipe, root):
        if summary := run.summary():
            done[run.arm][run.seed] = summary
    levels = list(dict.fromkeys(level for runs in done.values() for s in runs.values() for level in s["levels"]))
    first = next(iter(recipe.arms))

    def over(values: Sequence[float]) -> dict[str, Any] | None:
        if not values:
            return None
        middle, half = interval(values)
        return {"mean": middle, "half": half, "n": len(values)}

    rows: list[dict[str, Any]] = []
    for arm, runs in done.items():
        for level in levels or [""]:
            after = {seed: s["levels"][level]["after"] for seed, s in runs.items() if "after" in s["levels"].get(level, {})}
            before = {seed: s["levels"][level]["before"] for seed, s in runs.items() if "before" in s["levels"].get(level, {})}
            other = {seed: s["levels"][level]["after"]["success"] for seed, s in done[first].items() if "after" in s["levels"].get(level, {})}
            judged = [a["judge"] for a in after.values() if a.get("judge") is not None]
            rows.append(
                {
                    "arm": arm,
                    "level": level,
                    "games": next((a["n"] for a in after.values()), None),
                    "before": over([b["success"] for b in before.values()]),
                    "after": over([a["success"] for a in after.values()]),
                    "change": over([after[s]["success"] - before[s]["success"] for s in after if s in before]),
                    "against_first": None if arm == first else over([after[s]["success"] - other[s] for s in after if s in other]),
                    "judge": over(judged),
                    "labeller": next((s["labeller"] for s in runs.values()), None),
                    "seeds": sorted(after),
                    "seconds": mean(s["training_seconds"] for s in runs.values()) if runs else None,
                }
            )
    return rows


def markdown(recipe: Recipe, rows: Sequence[dict[str, Any]]) -> str:
    """The table as text; what was not run says so, and a single seed is marked."""

    def cell(value: dict[str, Any] | None, sign: str = "") -> str:
        if value is None:
            return "–"
        text = f"{100 * value['mean']:{sign}.1f}"
        return text + (f" ± {100 * value['half']:.1f}" if value["half"] is not None else " (one seed)")

    first = next(iter(recipe.arms))
    lines = [
        f"**{recipe.title}**",
        "",
        "Success in percent; mean and 95 % interval over seeds (Student's t), differences paired by seed.",
        "",
        f"| arm | labeller | level | before | after | change | against {first} | judge | seeds | games | min a run |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        if row["after"] is None:
            lines.append(f"| {row['arm']} | | {row['level']} | not run | | | | | | | |")
            continue
        lines.append(
            f"| {row['arm']} | {row['labeller'] or '–'} | {row['level']} | {cell(row['before'])} | {cell(row['after'])} | {cell(row['change'], '+')} "
            f"| {cell(row['against_first'], '+')} | {cell(row['judge'])} | {len(row['seeds'])} | {row['games']} | {row['seconds'] / 60:.1f} |"
        )
    return "\n".join(lines) + "\n"
