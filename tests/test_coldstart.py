"""Cold start: what the examples teach, what training on them changes, and what the two commands leave behind."""

import json
import random
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from gcdlite import coldstart, prompts
from gcdlite.coldstart import Example, Style, encode, fit, random_examples, swap_names
from gcdlite.envs.alfworld.games import level_tasks
from gcdlite.policy import load_tokenizer
from gcdlite.prompts import parse_response


@pytest.fixture(scope="module")
def lessons(games_root):
    return list(random_examples(level_tasks(games_root, "train", "single")[:15], Style(), random.Random(0)))


def shown(prompt: str) -> tuple[str, list[str]]:
    """(what stands in the task's place, the listed commands)."""
    return re.search(r"^Task: (.*)$", prompt, re.M)[1], prompt.rsplit("\nCan:\n", 1)[1].split("\n")


def answers(response: str) -> list[tuple[str, str]]:
    """(thought, command) of each of a lesson's answers."""
    found = re.findall(r"<think>(.*?)</think><action>(.*?)</action>", response)
    assert "".join(prompts.answer(*a) for a in found) == response
    return found


def test_every_order_can_be_read_off_the_prompt(lessons):
    kinds = {"obeyed": 0, "here": 0, "absent": 0, "free": 0, "several": 0}
    for lesson in lessons:
        told, listed = shown(lesson.prompt)
        given = answers(lesson.response)
        kinds["several"] += len(given) > 1
        assert len(given) == 1 or told == "read."
        for thought, action in given:
            assert action in listed
            if match := re.match(r"need (\w+)\.", thought):
                thing = match[1]
                assert told == "read." or re.search(rf"\b{thing}\b", told), (thing, told)
            if thought.startswith("told to"):
                kinds["obeyed"] += 1
                assert re.sub(r" \d+", "", action) + "." == told
            elif " look in " in thought:
                kinds["absent"] += 1
                assert not any(c.startswith(f"take {thing} ") for c in listed)
                assert f" {thing} " not in re.search(r"^Now: (.*)$", lesson.prompt, re.M)[1]
                assert thought.startswith(f"need {thing}. ") and action.startswith("go to ")
            elif thought.startswith("need"):
                kinds["here"] += 1
                assert thought.startswith(f"need {thing}. {thing} ") and action.startswith(f"take {thing} ")
            else:
                kinds["free"] += 1
    assert min(kinds.values()) > len(lessons) / 40, kinds


FURNITURE = {"shelf", "drawer", "cabinet", "desk", "bed", "countertop", "sidetable", "dresser", "sofa", "garbagecan", "safe", "diningtable", "coffeetable", "armchair"}


def test_no_name_tells_whether_the_thing_is_there(lessons):
    """Where only names of things in sight were exchanged, furniture's names gave the answer away."""
    odd = {True: [], False: []}
    for lesson in lessons:
        for thought, _ in answers(lesson.response) if "\ntake " in lesson.prompt else ():
            if match := re.match(r"need (\w+)\.", thought):
                odd[" look in " in thought].append(match[1] in FURNITURE)
    shares = [sum(found) / len(found) for found in odd.values()]
    assert min(map(len, odd.values())) > 50 and 0.1 < min(shares) and max(shares) < min(shares) + 0.2, shares


def test_what_is_needed_is_renamed_even_where_it_is_not_in_sight():
    lesson = Example("Task: take mug.\nNow: On the shelf 1, you see a cd 2.", "<think>need mug. look in bed 1.</think>", "random")
    told = {re.search(r"take (\w+)", swap_names(lesson, random.Random(i)).prompt)[1] for i in range(30)}
    assert told == {"mug", "shelf", "cd"}
    kept = {re.search(r"take (\w+)", swap_names(lesson, random.Random(i), keep=("shelf",)).prompt)[1] for i in range(30)}
    assert kept == {"mug", "cd"}


def test_exercises_can_only_be_answered_by_reading():
    kinds = [f"{a}{b}" for a in "abcde" for b in "uvwxyz"]
    phases = coldstart.exercises(kinds, Style(), 200, random.Random(0))
    assert [len(p) for p in phases] == [80, 30, 30, 60]
    lengths = [sum(len(e.prompt) for e in p) / len(p) for p in phases]
    assert lengths == sorted(lengths) and all(e.prompt.startswith("Now: ") for e in phases[0])
    here, absent, seen_before = [], [], 0
    for exercise in (e for p in phases for e in p):
        now, listed = exercise.prompt[exercise.prompt.index("Now: ") :].split("\nCan:\n")
        given = answers(exercise.response)
        needs = [re.match(r"need (\w+)\.", thought)[1] for thought, _ in given]
        taken = [n for n, (_, action) in zip(needs, given) if action.startswith("take ")]
        here, absent = here + taken, absent + [n for n in needs if n not in taken]
        assert len(given) == coldstart.LOOKS
        for thing, (_, action) in zip(needs, given):
            assert action in listed.split("\n") and (f" {thing} " in now) == (thing in taken)
            seen_before += thing not in taken and f" {thing} " in exercise.prompt
    assert {n[0] for n in here} == {n[0] for n in absent} and 0.45 < len(here) / len(here + absent) < 0.55 and seen_before > 30


def test_swapped_names_stay_one_room(lessons):
    """Exchanging names must not lose the answer: what is said in the response stands in the prompt."""
    for lesson in lessons[:100]:
        swapped = swap_names(lesson, random.Random(1))
        assert len(swapped.prompt.split()) == len(lesson.prompt.split())
        assert all(action in shown(swapped.prompt)[1] for _, action in answers(swapped.response))
    assert any(swap_names(e, random.Random(1)) != e for e in lessons[:10])


def test_without_prompt_weight_only_responses_are_learned(small_model):
    """Same responses after two prompts: training on them must not teach the prompts."""
    tokenizer = load_tokenizer(small_model)
    rows = [encode(tokenizer, Example(p, "<think>look</think><action>look</action>", "expert")) for p in ("go to shelf 1", "open drawer 2")]

    def losses(model) -> tuple[float, float]:
        """(mean over prompt tokens, mean over response tokens)"""
        parts = {False: [], True: []}
        for ids, begin in rows:
            ids = torch.tensor([ids])
            each = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
            for place, value in enumerate(each.tolist(), 1):
                parts[place >= begin].append(value)
        return tuple(sum(p) / len(p) for p in (parts[False], parts[True]))

    after = {}
    for weight in (0.0, 1.0):
        model = AutoModelForCausalLM.from_pretrained(small_model)
        before = losses(model)
        fit(model, [rows] * 30, lr=1e-2, batch_tokens=200, prompt_weight=weight, warmup=2, pad=tokenizer.pad_token_id, seed=0)
        after[weight] = losses(model)
    assert after[0.0][1] < 0.5 * before[1] and after[1.0][1] < 0.5 * before[1]
    assert after[1.0][0] < 0.5 * before[0] < after[0.0][0]


def test_muon_takes_the_matrices_inside_the_layers(small_model):
    model = AutoModelForCausalLM.from_pretrained(small_model)
    adamw, muon = coldstart._optimizers(model, 1e-3, 0.02)
    names = {id(p): name for name, p in model.named_parameters()}
    taken = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    assert taken and all(".layers." in name and name.endswith(("proj.weight",)) for name in taken)
    assert {names[id(p)] for group in adamw.param_groups for p in group["params"]} == set(names.values()) - taken
    assert len(coldstart._optimizers(model, 1e-3, None)) == 1


def test_nano_is_made_from_nothing(small_config, games_root, tmp_path, monkeypatch):
    monkeypatch.setattr(coldstart, "generated_root", lambda n, seed: games_root)
    cfg = small_config.coldstart
    cfg.from_scratch, cfg.exercises, cfg.short_turns, cfg.base_turns, cfg.trajectories, cfg.judgments, cfg.epochs = True, 20, 30, 60, 3, 5, 1
    coldstart.main(small_config, tmp_path / "a")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "model")
    made = json.loads((tmp_path / "a" / "model" / "made.json").read_text())
    assert made["parameters"] == sum(p.numel() for p in model.parameters()) and made["seed"] == small_config.seed
    assert model.dtype == torch.float16 or next(model.parameters()).dtype == torch.float16

    # The cold start alone, from the same base, ends at the same weights: it is the same second half.
    cfg.start = str(tmp_path / "a" / "base")
    coldstart.main(small_config, tmp_path / "b")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "b" / "model")
    for (name, p), q in zip(model.named_parameters(), again.parameters()):
        assert torch.equal(p, q), name


def test_an_adapter_learns_to_speak_in_the_right_form(small_config, small_model, tmp_path):
    cfg = small_config.coldstart
    cfg.trajectories, cfg.judgments, cfg.epochs, cfg.lr, cfg.batch_tokens = 3, 4, 6, 1e-2, 600
    coldstart.main(small_config, tmp_path)
    base = AutoModelForCausalLM.from_pretrained(small_model)
    tokenizer = load_tokenizer(small_model)
    tasks = level_tasks(Path(small_config.env.data), "L0", "single")[:3]
    prior = coldstart.make_prior(tasks, 3, random.Random(0))
    rows = [encode(tokenizer, e) for e in coldstart.expert_examples(tasks, prior, Style(max_turns=4), random.Random(1))]

    def loss(model) -> float:
        total = []
        for ids, begin in rows:
            ids = torch.tensor([ids])
            total += torch.nn.functional.cross_entropy(model(ids).logits[0, begin - 1 : -1], ids[0, begin:], reduction="none").tolist()
        return sum(total) / len(total)

    with torch.no_grad():
        before = loss(base)
        after = loss(PeftModel.from_pretrained(base, tmp_path / "adapter"))
    assert after < before - 0.1  # a rank of 4 in a random model cannot go far


def test_kinds_only():
    assert coldstart._kinds_only("move mug 12 to shelf 1") == "move mug to shelf."


def test_base_lessons_teach_no_task(games_root):
    """A task's sentence may ask for a thing, and the thing is searched anywhere or taken: nothing says what the task needs
    next. Sentences of the held-out task types ask for nothing."""
    seen = {True: 0, False: 0}
    for level in ("L0", "L2"):
        for task in level_tasks(games_root, level, "single")[:4]:
            for lesson in random_examples([task] * 6, Style(), random.Random(2)):
                told, _ = shown(lesson.prompt)
                if told.startswith(("take ", "go ", "examine ", "open ", "close ", "move ", "use ")) or "told to" in lesson.response:
                    continue
                asked = lesson.response.startswith("<think>need ")
                if told == "read.":
                    assert asked
                    continue
                seen[asked] += 1
                if asked:
                    assert level == "L0" and parse_response(lesson.response)[0].startswith(("go to ", "take "))
                else:
                    assert lesson.response.startswith("<think>try ")
    assert min(seen.values()) > 10, seen
