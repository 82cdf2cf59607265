"""Cold start: expert episodes and judgments in, a model that knows the format and something of the task out.

`adapter` trains a LoRA adapter on any model (SPEC: 200 expert episodes, 100 judgments, 5 epochs); `coldstart.variant` says
what stands beside the expert's turns (new paper, Table 6; old paper, Table 3 and Fig. 7). `from_scratch` is
where nano's shipped weights come from: base training on the language of all six task types (random play, no expert),
then the cold start on the in-domain types only, so that L2 stays a fair test.
"""

from __future__ import annotations

import json
import random
import re
import sys
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from gcdlite import envs, prompts, sft
from gcdlite.backbone import plain
from gcdlite.config import Config
from gcdlite.envs import closing
from gcdlite.envs.alfworld import generated_root, split_intro
from gcdlite.envs.alfworld.engine import Game
from gcdlite.envs.alfworld.experts import Expert, Goal, Prior, parse_goal, type_of
from gcdlite.envs.alfworld.games import IN_DOMAIN, OUT_OF_DOMAIN, find_games
from gcdlite.envs.scienceworld.experts import Lesson, Lessons, thought
from gcdlite.gcd.labels import verdict
from gcdlite.gcd.suggest import MISTAKES
from gcdlite.nano import build_model, build_tokenizer
from gcdlite.policy import Policy, load_tokenizer, resolve
from gcdlite.records import Suggestion, Task, UserError

MADE = "made.json"  # how weights were made, in their folder
LOOKS = 8  # questions to one prompt of nano's exercises
# nano's exercises in reading, from small to as large as a real prompt: (share of them, earlier turns shown, other places)
EXERCISES = ((0.4, None, (3, 3)), (0.15, 0, (2, 4)), (0.15, 1, (3, 8)), (0.3, 2, (4, 14)))
SHORT_LIST = 6  # commands listed in nano's first lessons
WARMUP = 20  # optimizer steps, of an adapter's cold start


@dataclass
class Example:
    """One supervised pair of texts; `kind` says what it teaches."""

    prompt: str
    response: str
    kind: str  # "random", "expert", "judgment", "future" or "value"
    label: int | None = None  # of kind "value": 1 good, 0 bad; what the value head is to say of the response, which is not learned


@dataclass
class Style:
    """What the examples look like: prompts must be the run's own."""

    prompt: str = "brief"
    history: int = 2
    max_turns: int = 30
    commands: int | None = None  # how many admissible commands to list; None: all, as the agent will see them
    tags: bool = False  # rlvmr: thoughts name their kind
    variant: str = "judge"  # what stands beside the expert's turns

    def listed(self, admissible: Sequence[str], needed: Sequence[str], rng: random.Random) -> list[str]:
        """The list to show: for a first lesson it is cut, but never by a command that is needed."""
        if self.commands is None or len(admissible) <= self.commands:
            return list(admissible)
        return sorted({*needed, *rng.sample(list(admissible), self.commands)})


def make_prior(tasks: Sequence[Task], count: int, rng: random.Random) -> Prior:
    """Where things lie, counted in some training games."""
    return Prior(Game(t.path).contents() for t in rng.sample(list(tasks), min(count, len(tasks))))


def explain(action: str, thing: str) -> str:
    """A thought that goes with an action which was not chosen for a reason."""
    words = action.split()
    if words[:2] == ["go", "to"]:
        return f"need {thing}. look in {' '.join(words[2:])}."
    if words[0] == "take" and " from " in action:
        item, place = action[5:].split(" from ", 1)
        return f"need {type_of(item)}. {item} is on {place}. take it."
    if words[0] == "open":
        return f"need {thing}. {action[5:]} is closed, open it."
    if words[0] in ("move", "put", "heat", "clean", "cool", "use"):
        return f"have {' '.join(words[1:3])}. do it here."
    return "look closer."


def deviation(admissible: Sequence[str], last: str | None, rng: random.Random, thing: str | None = None) -> str:
    """Something an expert would not do: any admissible command, the last one again, or one that does not work here.

    With `thing`, what the task seeks, it is often what a small model gets wrong by itself: taking the thing where it is
    not, or going where it stands. Lessons have to show what comes after that, or one such turn repeats for ever (LOG.md).
    """
    draw = rng.random()
    if last and draw < 0.15:
        return last
    if thing and draw > 0.7:
        here = [c[8:] for c in admissible if c.startswith("examine ")] or [c[6:] for c in admissible if c.startswith("go to ")]
        place = rng.choice(here) if here else "shelf 1"
        return f"go to {place}" if draw > 0.9 else f"take {thing} {rng.randint(1, 3)} from {place}"
    if draw < 0.35:
        verb, *rest = rng.choice(admissible).split(" ", 1)
        other = rng.choice(admissible).split(" ", 1)
        return f"{verb} {(other[1:] or rest or [''])[0]}".strip()
    return rng.choice([c for c in admissible if c != "help"])


def expert_examples(
    tasks: Iterable[Task], prior: Prior, style: Style, rng: random.Random, *, deviate: float = 0.0, judge: float = 0.0, hints: float = 0.0
) -> Iterable[Example]:
    """Play games and write down what the expert would do at every turn, also where play has left its way.

    `deviate` is the chance that a turn plays something else than what the expert says (the label stays the expert's),
    `judge` the chance that a turn also becomes an example of the style's variant, as a rule a judgment, labelled by the
    oracle, `hints` the chance that an episode's prompts show some of our golden rules, so that a block of suggestions is
    nothing new in training.
    """
    for task in tasks:
        game = Game(task.path, plan=judge > 0)
        seen = game.reset()
        description, text = split_intro(seen.text)
        expert = Expert(description, prior, style.history)
        wild = rng.random() * 2 * deviate  # some episodes go nearly straight, others are a mess
        rules = rng.sample(list(MISTAKES.values()), rng.randint(1, 5)) if hints and rng.random() < hints else []
        last, failed, tried = None, False, set()
        for taken in range(style.max_turns):
            history = expert.pairs[-style.history :] if style.history else []
            thought, command = expert.act(text, seen.admissible)
            tag = reasoning_tag(command, last, failed, tried) if style.tags else "think"
            if tag == "planning" and not taken:
                thought = f"{outline(expert.goal)} {thought}"
            listed = style.listed(seen.admissible, [command], rng)
            ask = partial(prompts.turn_prompt, style.prompt, description, taken, history, text, listed, tags=style.tags)
            bare = ask()
            prompt = ask(suggestions=Suggestion(rules=rules).text) if rules else bare
            yield Example(prompt, prompts.answer(thought, command, tag), "expert")
            if judge and rng.random() < judge:
                judged = judgment_example(game, seen, bare, thought, command, expert.goal.obj, last, style, rng, tag)
                if judged:
                    yield judged
            action = deviation(seen.admissible, last, rng, expert.goal.obj) if rng.random() < wild else command
            expert.remember(text, action)
            failed = action not in seen.admissible
            tried.add(action)
            seen = game.step(action)
            text, last = seen.text, action
            if seen.done:
                break


def reasoning_tag(command: str, last: str | None, failed: bool, tried: set[str]) -> str:
    """The kind of an expert's thought, for rlvmr: `reflection` after a command that failed, `planning` at the start and
    when something was achieved, `explore` where it goes or looks for the first time, `monitor` on the rest of the way.
    """
    if failed:
        return "reflection"
    if last is None or last.split()[0] in ("take", "clean", "heat", "cool"):
        return "planning"
    return "explore" if command.split()[0] in ("go", "open", "examine", "look") and command not in tried else "monitor"


def outline(goal: Goal) -> str:
    """The steps of a task in one sentence: what the first thought of an expert with tags begins with."""
    if goal.kind == "light":
        return f"plan: find {goal.obj}, take it, use {goal.recep}."
    between = "" if goal.kind in ("place", "two") else f" {goal.kind} it,"
    return f"plan: find {goal.obj}, take it,{between} put it in {goal.recep}{', twice' if goal.kind == 'two' else ''}."


def judgment_example(game, seen, prompt, thought, command, thing, last, style: Style, rng: random.Random, tag: str) -> Example | None:
    """A turn to judge, with the oracle's verdict and the expert's reasons; None when the oracle has no opinion.

    Of the same turns, the variant `value` takes the bare label, and `future` what is observed after them.
    """
    action, why = command, thought
    if rng.random() < 0.6:
        action = deviation(seen.admissible, last, rng)
        why = thought if rng.random() < 0.3 else explain(action, thing)
    after = game.copy().step(action)
    if style.variant == "future":
        return Example(prompts.future_prompt(style.prompt, prompt, action), after.text, "future")
    value = verdict(seen.plan, after.plan, after.revealed)
    if value is None:
        return None
    if style.variant == "value":
        return Example(prompt, prompts.answer(why, action, tag), "value", value)
    rate = rng.choice((10, 20, 30, 40, 50, 60, 70, 80, 90)) / 100
    question = prompts.judge_prompt(style.prompt, prompt, prompts.answer(why, action, tag), rate)
    return Example(question, _judged(thought, command, action, value), "judgment")


def _judged(thought: str, command: str, action: str, value: int) -> str:
    """The judgment that the cold start teaches: what the expert thinks, the verdict, its command, a rule."""
    better = command if command != action else ""
    return prompts.judgment(thought, value, better, _ADVICE.get(command.split()[0], "look closer."))


_ADVICE = {
    "go": "go where the thing may be, not where you were.",
    "open": "open what is closed.",
    "take": "take what the task needs.",
    "move": "put it down when it is ready.",
    "put": "put it down when it is ready.",
    "clean": "clean it before you put it down.",
    "heat": "heat it before you put it down.",
    "cool": "cool it before you put it down.",
    "use": "use the lamp with the thing in hand.",
}


def random_examples(tasks: Iterable[Task], style: Style, rng: random.Random) -> Iterable[Example]:
    """Random play: the language of the game and the habit of copying commands, without any skill at the tasks.

    Most turns carry an order in place of the task (`take mug from shelf`), which one listed command obeys. Many only name
    a thing (`take mug`, or a task's sentence about a mug): it may be in sight, and else another place is visited. Which it
    is can only be read off the prompt, all the more as names are swapped at random, so that no habit helps; where the
    wording of the order gave it away, nothing was learned (LOG.md). Where something can be taken, most prompts ask for
    several things, like the exercises. What is played is at times not what was ordered, so that answers like "Nothing
    happens." come up, too.
    """
    for task in tasks:
        game = Game(task.path)
        seen = game.reset()
        description, text = split_intro(seen.text)
        elsewhere = {type_of(o) for things in game.contents().values() for o in things}
        pairs: list[tuple[str, str]] = []
        for taken in range(rng.randint(4, style.max_turns)):
            history = pairs[-style.history :] if style.history else []
            absent = elsewhere - set(_NAME.findall(text))
            told, thought, action = _lesson(description, seen.admissible, absent, rng)
            answers = [(thought, action)]
            if any(c.startswith("take ") for c in seen.admissible) and rng.random() < 0.7:
                told, answers = "read.", _looks(seen.admissible, absent, rng)
            listed = style.listed(seen.admissible, [a for _, a in answers], rng)
            prompt = prompts.turn_prompt(style.prompt, told, taken, history, text, listed)
            yield swap_names(Example(prompt, "".join(prompts.answer(*a) for a in answers), "random"), rng)
            played = deviation(seen.admissible, pairs[-1][1] if pairs else None, rng) if rng.random() < 0.2 else action
            pairs.append((text, played))
            seen = game.step(played)
            text = seen.text
            if seen.done:
                break


def exercises(kinds: Sequence[str], style: Style, count: int, rng: random.Random) -> list[list[Example]]:
    """Made-up places, and for each several things that might be needed: what lies there is taken, for the others another
    place is visited. In phases of growing size; an eighth of each is as small as those before.

    In play one prompt asks for one thing, and a small model finds habits (of names, of places) sooner than it finds out
    that it could look. With eight questions to a short prompt, nothing else helps; the longer prompts come once it looks.
    """
    phases = []
    for size, (share, *_) in enumerate(EXERCISES):
        sizes = [rng.randint(0, size) if rng.random() < 0.125 else size for _ in range(round(share * count))]
        phases.append([_exercise(kinds, style, *EXERCISES[k][1:], rng) for k in sizes])
    return phases


def _exercise(kinds: Sequence[str], style: Style, window: int | None, others: tuple[int, int], rng: random.Random) -> Example:
    """One of them; without a `window`, nothing but the place and the commands is shown."""
    furniture = rng.sample(kinds, rng.randint(3, 7))
    portable = sorted(set(kinds) - set(furniture))
    places = sorted({f"{rng.choice(furniture)} {rng.randint(1, 6)}" for _ in range(1 + rng.randint(*others))})

    def things(least: int, most: int) -> list[str]:
        return [f"{kind} {rng.randint(1, 3)}" for kind in rng.sample(portable, rng.randint(least, most))]

    def arrive(place: str, items: Sequence[str]) -> str:
        listed = [f"a {item}" for item in items] or ["nothing"]
        return f"You arrive at {place}. On the {place}, you see {', and '.join([', '.join(listed[:-1]), listed[-1]] if len(listed) > 1 else listed)}."

    way = [rng.choice(places) for _ in range((window or 0) + 1)]
    before = [things(0, 3) for _ in way[1:]]
    history = [(arrive(place, items), f"go to {then}") for place, items, then in zip(way, before, way[1:])]
    here, place = things(2, 7), way[-1]
    admissible = sorted([f"examine {place}", "inventory", "look"] + [f"go to {p}" for p in places if p != place] + [f"take {t} from {place}" for t in here])
    gone = {type_of(t) for items in before for t in items}
    answers = _looks(admissible, set(portable), rng, gone)
    prompt = prompts.turn_prompt(style.prompt, "read.", rng.randrange(style.max_turns), history, arrive(place, here), admissible)
    if window is None:
        prompt = prompt[prompt.index(prompts.SLOTS[style.prompt]["now"]) :]
    return Example(prompt, "".join(prompts.answer(*a) for a in answers), "random")


def _lesson(description: str, admissible: Sequence[str], elsewhere: set[str], rng: random.Random) -> tuple[str, str, str]:
    """(what stands in the task's place, thought, command) of one turn of random play; `elsewhere` are kinds of things not in sight."""
    useful = [c for c in admissible if c not in ("help", "look", "inventory")]
    acts = [c for c in useful if not c.startswith(("go to", "examine"))]
    ways = [c for c in useful if c.startswith("go to")]
    draw = rng.random()
    if draw < 0.08:
        action = rng.choice(useful)
        return description, f"try {action}.", action
    takes = [c for c in acts if c.startswith("take ")]
    absent = sorted(elsewhere - {_taken(c) for c in takes})
    if draw < (0.9 if takes else 0.3):
        if takes and rng.random() < 0.5:
            thing = _taken(rng.choice(takes))
            action = next(c for c in takes if _taken(c) == thing)
            return _wanted(thing, description, rng), explain(action, thing), action
        if ways and absent:
            thing, action = rng.choice(absent), rng.choice(ways)
            return _wanted(thing, description, rng), f"need {thing}. look in {action[6:]}.", action
    action = rng.choice(acts if acts and rng.random() < 0.6 else useful)
    told = _kinds_only(action)
    action = next(c for c in admissible if _kinds_only(c) == told)
    return told, f"told to {told} do {action}.", action


def _looks(admissible: Sequence[str], elsewhere: set[str], rng: random.Random, gone: Collection[str] = ()) -> list[tuple[str, str]]:
    """(thought, command) for each of several things that might be needed at a place where something can be taken; half of
    them are there. Some come again: an answer can be copied from the one before, and that is what is learned first (LOG.md).

    `elsewhere` are kinds that may be asked for although they are not there; those in `gone`, seen before, more often."""
    takes = [c for c in admissible if c.startswith("take ")]
    ways = [c for c in admissible if c.startswith("go to ")]
    here = {_taken(c): c for c in reversed(takes)}  # the first of its kind
    absent = sorted(elsewhere - set(here))
    missed = sorted(set(gone) - set(here))
    absent = rng.sample(absent, min(len(absent), LOOKS // 2))
    found = []
    for _ in range(LOOKS):
        if ways and absent and rng.random() < 0.5:
            thing, action = rng.choice(missed if missed and rng.random() < 0.3 else absent), rng.choice(ways)
            found.append((f"need {thing}. look in {action[6:]}.", action))
        else:
            thing = rng.choice(sorted(here))
            found.append((explain(here[thing], thing), here[thing]))
    return found


def _wanted(thing: str, description: str, rng: random.Random) -> str:
    """What asks for a thing: an order, or the task's own sentence about it; held-out task types lend no sentence."""
    goal = parse_goal(description)
    if goal.kind in ("cool", "two") or rng.random() < 0.5:
        return f"take {thing}."
    return re.sub(rf"\b{goal.obj}\b", thing, description, count=1)


def _taken(command: str) -> str:
    """`take mug 2 from shelf 1` -> `mug`"""
    return type_of(command[5:].split(" from ")[0])


def _kinds_only(command: str) -> str:
    """`take mug 2 from shelf 1` -> `take mug from shelf.`"""
    return re.sub(r" \d+", "", command) + "."


_WORD = re.compile(r"\w+|[^\w\s]")
_NAME = re.compile(r"(?<![A-Za-z])[a-z]+(?= \d)")
_NEEDED = re.compile(r"<think>need ([a-z]+)\.")


def swap_names(example: Example, rng: random.Random, keep: Collection[str] = ()) -> Example:
    """The example with the kinds of things in it (`mug`, `shelf`), but for those to keep, exchanged among themselves,
    everywhere alike. What is needed takes part also where it is not in sight: if only things in sight had odd names, the
    name alone would tell (LOG.md)."""
    kinds = sorted({*_NAME.findall(example.prompt), *_NEEDED.findall(example.response)} - set(keep))
    other = dict(zip(kinds, rng.sample(kinds, len(kinds))))
    words = re.compile(r"(?<![A-Za-z])(?:" + "|".join(kinds) + r")(?![A-Za-z])")

    def swapped(text: str) -> str:
        return words.sub(lambda m: other[m[0]], text) if kinds else text

    return Example(swapped(example.prompt), swapped(example.response), example.kind)


# --- the two cold starts


def main(config: Config, folder: Path) -> None:
    """`python run.py coldstart`: leaves folder/adapter, or folder/model when the weights are made from scratch."""
    if config.coldstart.from_scratch:
        from_scratch(config, folder)
    else:
        adapter(config, folder)


def adapter(config: Config, folder: Path) -> None:
    """Train a fresh LoRA adapter on expert play and the variant's examples; `model.adapter=folder/adapter` starts RL from it."""
    cfg, dice, started = config.coldstart, random.Random(config.seed), time.perf_counter()
    if cfg.variant == "value":
        config = config.model_copy(update={"gcd": config.gcd.model_copy(update={"head": "value"})})
    policy = Policy(config)
    examples = science_lessons(config, dice, policy.count) if config.env.name == "scienceworld" else _alfworld_lessons(config, dice)
    rows = [encode(policy.tokenizer, e) for e in examples]
    beside = sum(e.kind != "expert" for e in examples)
    print(
        f"cold start ({cfg.variant}): {cfg.trajectories} expert episodes, {len(rows) - beside} turns, and {beside} examples beside them; "
        f"{sum(len(r) for r, _ in rows)} tokens, {cfg.epochs} epochs",
        flush=True,
    )
    shuffle = random.Random(config.seed)
    batches = [batch for _ in range(cfg.epochs) for batch in _batches(rows, cfg.batch_tokens, shuffle)]
    if cfg.variant == "value":
        labels = [e.label for e in examples]
        sft.tune_with_head(policy, rows, labels, batches, lr=cfg.lr, warmup=WARMUP, weight=config.gcd.weight, report=_report)
    else:
        sft.tune(policy, rows, batches, lr=cfg.lr, warmup=WARMUP, folder=folder, seed=config.seed, report=_report)
    folder.mkdir(parents=True, exist_ok=True)
    policy.save_adapter(folder / "adapter")
    (folder / "adapter" / MADE).write_text(json.dumps(_made(config, started), indent=1) + "\n")
    chosen = ("--algo rlvmr " if config.algo.tagged else "") + ("--gcd gcd.head=value " if cfg.variant == "value" else "")
    print(f"adapter: {folder / 'adapter'}; train from it with: python run.py {chosen}model.adapter={folder / 'adapter'}")


def from_scratch(config: Config, folder: Path) -> None:
    """Build nano: base training on random play (folder/base; `coldstart.start` goes on from one), then a cold start on
    a few expert episodes and judgments (folder/model)."""
    cfg, dice, started = config.coldstart, random.Random(config.seed), time.perf_counter()
    material = _science_material(config, dice) if config.env.name == "scienceworld" else _alfworld_material(config, dice)
    if cfg.start:
        tokenizer = load_tokenizer(resolve(cfg.start))
        model = AutoModelForCausalLM.from_pretrained(resolve(cfg.start), dtype=torch.float32)
    else:
        tokenizer = build_tokenizer((e.prompt + e.response for e in material.texts), cfg.vocabulary)
        model = build_model(tokenizer, config.seed, hidden=cfg.hidden, layers=cfg.layers)
        _train(config, model, tokenizer, material.phases, 1.0)
        model.save_pretrained(folder / "base")
        tokenizer.save_pretrained(folder / "base")
    lessons = material.lessons(lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"]))
    _train(config, model, tokenizer, [lessons] * cfg.epochs, cfg.cold_rate)
    target = folder / "model"
    model.half().save_pretrained(target)
    tokenizer.save_pretrained(target)
    made = _made(config, started) | {"parameters": sum(p.numel() for p in model.parameters())}
    (target / MADE).write_text(json.dumps(made, indent=1) + "\n")
    print(f"model: {target}")


@dataclass
class Material:
    """What a nano is made from."""

    phases: list[list[Example]]  # of base training; empty when a base is there already
    texts: list[Example]  # for the tokenizer
    lessons: Callable[[Callable[[str], int]], list[Example]]  # the cold start's, by a function that counts tokens


def _alfworld_material(config: Config, dice: random.Random) -> Material:
    """Random play in generated games of all six task types, then expert play in those that are trained on."""
    cfg, style = config.coldstart, _style(config)
    root = generated_root(cfg.games, cfg.games_seed)
    tasks = find_games(root, "train", IN_DOMAIN)
    prior = make_prior(tasks, 500, dice)
    # Half of the lessons lose the names of what is sought: who is to find it must read it, not know it by heart.
    keep = {*prior.places, "desklamp", "floorlamp"}
    lessons = _expert_lessons(config, tasks, prior, dice)
    lessons = [swap_names(e, dice, keep) if e.kind == "expert" and dice.random() < 0.5 else e for e in lessons]
    if cfg.start:
        return Material([], [], lambda count: lessons)
    every = find_games(root, "train", [*IN_DOMAIN, *OUT_OF_DOMAIN])
    short = list(islice(random_examples(laps(every, dice), _style(config, SHORT_LIST), dice), cfg.short_turns))
    full = list(islice(random_examples(laps(every, dice), style, dice), cfg.base_turns))
    texts = [e for part in (short, full, lessons) for e in part[:4000]]
    kinds = sorted({kind for t in dice.sample(every, min(300, len(every))) for kind in _NAME.findall(str(Game(t.path).contents()))})
    phases = [*exercises(kinds, style, cfg.exercises, dice), short, full]
    return Material(phases, texts, lambda count: lessons)


def _science_material(config: Config, dice: random.Random) -> Material:
    """Random play in training variations of all thirty task types, then gold paths of those that are trained on."""
    cfg, phases = config.coldstart, []
    if not cfg.start:
        phases = [science_random_examples(config, dice, cfg.base_turns, lambda text: len(_WORD.findall(text)))]
    return Material(phases, [e for part in phases for e in part[:8000]], lambda count: science_lessons(config, dice, count))


def _made(config: Config, started: float) -> dict[str, Any]:
    """How an adapter or model was made; lies beside it."""
    return {
        "command": " ".join(["python", *sys.argv]),
        "seed": config.seed,
        "tags": config.algo.tagged,
        "minutes": round((time.perf_counter() - started) / 60, 1),
        "coldstart": config.coldstart.model_dump(),
    }


def require_tag_data(config: Config) -> None:
    """Raises UserError when rlvmr would start from weights whose cold start had no tags: it could only reward noise."""
    if not config.algo.tagged:
        return
    for folder in filter(None, (config.model.adapter, resolve(config.model.name))):
        made = Path(folder) / MADE
        if made.is_file() and json.loads(made.read_text()).get("tags"):
            return
    make, then = f"--model {config.model.name} --out DIR", "model.adapter=DIR/adapter"
    if config.coldstart.from_scratch:  # nano has never read the tags: only training its embeddings, too, can teach it to write them
        make, then = f"--config nano coldstart.start={config.model.name} --out DIR", "--config nano --model DIR/model"
    raise UserError(f"rlvmr needs weights that know its tags: python run.py coldstart --algo rlvmr {make}, then --algo rlvmr {then}")


def _alfworld_lessons(config: Config, dice: random.Random) -> list[Example]:
    with closing(envs.make(config)) as pool:
        tasks = pool.tasks("train")
    return _expert_lessons(config, tasks, make_prior(tasks, 500, dice), dice)


def science_lessons(config: Config, dice: random.Random, count: Callable[[str], int]) -> list[Example]:
    """`trajectories` gold paths of ScienceWorld's training fold that win within the turns, and judgments (or what the
    variant has in their place) on such play with random commands in between, labelled by the oracle, half of them good.
    `count` counts tokens, for the budget of a room's text.

    Raises UserError when too few paths win, EngineError when the simulator fails.
    """
    cfg, style = config.coldstart, _style(config)

    def prompt(lesson: Lesson, before: Sequence[Lesson]) -> str:
        return _science_prompt(config, lesson, before, count)

    def beside(t: Lesson, asked: str, value: int) -> Example:
        if style.variant == "future":  # what the simulator said; after that, the prompt of the next turn repeats the whole room
            return Example(prompts.future_prompt(style.prompt, asked, t.action), t.after.brief, "future")
        response = prompts.answer(t.thought, t.action)
        if style.variant == "value":
            return Example(asked, response, "value", value)
        rate = dice.choice((10, 20, 30, 40, 50, 60, 70, 80, 90)) / 100
        question = prompts.judge_prompt(style.prompt, asked, response, rate)
        return Example(question, _judged(t.thought, t.better, t.action, value), "judgment")

    wanted = 0 if cfg.variant == "vanilla" else cfg.judgments
    examples: list[Example] = []
    judged: dict[int, list[Example]] = {0: [], 1: []}
    with Lessons(config.env) as lessons:
        for number, turns in enumerate(lessons.episodes(cfg.trajectories, dice, stray=cfg.deviate, harmless=True)):
            examples += [Example(prompt(t, turns[:i]), prompts.answer(thought(t.better), t.better), "expert") for i, t in enumerate(turns)]
            print(f"gold path {number + 1} of {cfg.trajectories}: {turns[0].description} ({len(turns)} actions)", flush=True)
        for turns in lessons.episodes(4 * cfg.trajectories if wanted else 0, dice, stray=max(cfg.deviate, 0.5)):
            for i, t in enumerate(turns):
                value = verdict(t.before.plan, t.after.plan, t.after.revealed)
                if value is not None and len(judged[value]) < (wanted + value) // 2:
                    judged[value].append(beside(t, prompt(t, turns[:i]), value))
            if sum(map(len, judged.values())) == wanted:
                break
    print(f"{len(judged[1])} good and {len(judged[0])} bad turns to judge, of {wanted} wanted", flush=True)
    return examples + judged[0] + judged[1]


def science_random_examples(config: Config, dice: random.Random, turns: int, count: Callable[[str], int]) -> list[Example]:
    """Random play in ScienceWorld: its language, and the habit of copying names and forms of commands.

    Three of four turns carry a command in place of the task, which is to be obeyed; in the others the task's own words
    stand there, and any command follows.
    """
    examples: list[Example] = []
    with Lessons(config.env) as lessons:
        for turn, before in lessons.wander(turns, dice):
            action = turn.action
            told, why = (f"{action}.", f"told to {action}.") if dice.random() < 0.75 else (turn.description, f"try {action}.")
            examples.append(Example(_science_prompt(config, turn, before, count, told), prompts.answer(why, action), "random"))
            if len(examples) % 2000 == 0:
                print(f"random play: {len(examples)} of {turns} turns", flush=True)
    return examples


def _science_prompt(config: Config, turn: Lesson, before: Sequence[Lesson], count: Callable[[str], int], task: str | None = None) -> str:
    """The run's own prompt for a turn of ScienceWorld after those before it; `task` stands in the task's place."""
    style = _style(config)
    history = [(t.before.brief, t.action) for t in before[max(0, len(before) - style.history) :]]
    text, things = prompts.fit_room(turn.before.text, turn.before.objects or [], config.env.room_tokens, count)
    return prompts.turn_prompt(
        style.prompt, task or turn.description, len(before), history, text, turn.before.admissible, objects=things
    )


def _expert_lessons(config: Config, tasks: Sequence[Task], prior: Prior, dice: random.Random) -> list[Example]:
    """The cold start's examples: `trajectories` expert episodes, and the variant's examples from other games."""
    cfg, style = config.coldstart, _style(config)
    chosen = [dice.choice(tasks) for _ in range(cfg.trajectories)]
    examples = list(expert_examples(chosen, prior, style, dice, deviate=cfg.deviate, hints=cfg.hints))
    judged = (e for e in expert_examples(laps(tasks, dice), prior, style, dice, deviate=0.3, judge=0.3) if e.kind != "expert")
    return examples + list(islice(judged, 0 if cfg.variant == "vanilla" else cfg.judgments))


def _train(config: Config, model: nn.Module, tokenizer, phases: Sequence[Sequence[Example]], rate: float) -> None:
    rows = [[encode(tokenizer, e) for e in phase] for phase in phases if phase]
    print(f"nano: {sum(len(phase) for phase in rows):,} examples, {sum(len(r) for phase in rows for r, _ in phase):,} tokens", flush=True)
    fit(
        model, rows, lr=config.coldstart.scratch_lr * rate, batch_tokens=config.coldstart.batch_tokens, prompt_weight=0.2, warmup=50,
        pad=tokenizer.pad_token_id, seed=config.seed, muon=config.coldstart.muon_lr * rate, report=_report,
    )  # fmt: skip


def _style(config: Config, commands: int | None = None) -> Style:
    """How the run's own prompts look."""
    window = config.env.history_length
    history = config.env.max_turns if window == "full" else window
    return Style(config.model.prompt, history, config.env.max_turns, commands, config.algo.tagged, config.coldstart.variant)


def laps(tasks: Sequence[Task], dice: random.Random) -> Iterable[Task]:
    """The tasks over and over, in a new order each time."""
    while True:
        yield from dice.sample(list(tasks), len(tasks))


def _report(step: int, total: int, loss: float, rate: float) -> None:
    print(f"step {step + 1}/{total}  loss {loss:.3f}  {rate:,.0f} tokens/s", flush=True)


# --- training


def encode(tokenizer, example: Example) -> tuple[list[int], int]:
    """(token ids, where the response begins), through the tokenizer's chat template."""
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": example.prompt}], tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return ids + tokenizer(example.response, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id], len(ids)


def fit(
    model: nn.Module,
    phases: Sequence[Sequence[tuple[list[int], int]]],
    *,
    lr: float,
    batch_tokens: int,
    prompt_weight: float,
    warmup: int,
    pad: int,
    seed: int,
    floor: float = 0.05,
    muon: float | None = None,
    report: Callable[[int, int, float, float], None] | None = None,
) -> None:
    """Supervised training on (ids, start of the response) rows; warm-up, then cosine to `floor` of the learning rates.

    AdamW at `lr`; with `muon`, the matrices inside the layers are trained by Muon (Jordan et al. 2024) at that rate,
    which brings a small model to copying in a fraction of the tokens (LOG.md).

    Phases follow one another under one schedule; inside a phase the order is random, in batches of like lengths.
    The loss is the mean over response tokens plus `prompt_weight` times the mean over prompt tokens.
    """
    dice = random.Random(seed)
    device = next(model.parameters()).device
    batches = [[rows[k] for k in batch] for rows in phases for batch in _batches(rows, batch_tokens, dice)]
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizers = _optimizers(model, lr, muon)
    causal = plain(model)
    total = len(batches)

    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: sft.rate(step, total, warmup, floor)) for o in optimizers]
    model.train()
    start, tokens = time.perf_counter(), 0
    for step, batch in enumerate(batches):
        longest = max(len(row) for row, _ in batch)
        ids = torch.full((len(batch), longest), pad)
        response = torch.zeros(len(batch), longest - 1, dtype=torch.bool)
        inside = torch.zeros(len(batch), longest - 1, dtype=torch.bool)
        for r, (row, begin) in enumerate(batch):
            ids[r, : len(row)] = torch.tensor(row)
            inside[r, : len(row) - 1] = True
            response[r, begin - 1 : len(row) - 1] = True
        ids, inside, response = ids.to(device), inside.to(device), response.to(device)
        # Right padding under a causal mask: no real token sees a pad, so no attention mask is needed.
        hidden = causal.base_model(input_ids=ids[:, :-1]).last_hidden_state  # (B, T - 1, h)
        wanted = inside if prompt_weight else response
        logits = causal.get_output_embeddings()(hidden[wanted]).float()  # (n, V)
        losses = nn.functional.cross_entropy(logits, ids[:, 1:][wanted], reduction="none")
        is_response = response[wanted]
        loss = losses[is_response].mean()
        trained = loss + prompt_weight * losses[~is_response].mean() if prompt_weight else loss
        model.zero_grad(set_to_none=True)
        trained.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer, schedule in zip(optimizers, schedules):
            optimizer.step()
            schedule.step()
        tokens += int(inside.sum())
        if report and (step % 50 == 0 or step == total - 1):
            report(step, total, loss.item(), tokens / (time.perf_counter() - start))
    model.eval()


def _optimizers(model: nn.Module, lr: float, muon: float | None) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or for all but the matrices inside the layers, which Muon takes."""
    inner, rest = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (inner if muon and p.ndim == 2 and ".layers." in name else rest).append(p)
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(rest, lr=lr, weight_decay=0.01, betas=(0.9, 0.98))]
    if inner:
        optimizers.append(torch.optim.Muon(inner, lr=muon, weight_decay=0.01, momentum=0.95))
    return optimizers


def _batches(rows: Sequence[tuple[list[int], int]], batch_tokens: int, dice: random.Random) -> list[list[int]]:
    """Indices of all rows, cut into batches of at most `batch_tokens` tokens, padding included."""
    order = list(range(len(rows)))
    dice.shuffle(order)
    batches: list[list[int]] = []
    for start in range(0, len(order), 2048):  # sorting inside large random blocks keeps padding low and batches random
        batch: list[int] = []
        for k in sorted(order[start : start + 2048], key=lambda k: len(rows[k][0])):
            if batch and len(rows[k][0]) * (len(batch) + 1) > batch_tokens:
                batches.append(batch)
                batch = []
            batch.append(k)
        batches.append(batch)
    dice.shuffle(batches)
    return batches
