"""The pool: our engine and TextWorld's behind one interface, and what happens when a worker dies."""

import os
import signal

import pytest

from gcdlite import envs
from gcdlite.config import check
from gcdlite.envs.alfworld import split_intro
from gcdlite.records import UserError


def test_intro_is_split_and_nothing_is_lost():
    text = "-= Welcome to TextWorld, ALFRED! =-\n\nYou are in a room. You see a bed 1.\n\nYour task is to: put a mug in desk."
    assert split_intro(text) == ("put a mug in desk.", "You are in a room. You see a bed 1.")
    with pytest.raises(UserError, match="no task sentence"):
        split_intro("hello")


def test_copies_of_one_game_do_not_disturb_each_other(games_root):
    pool = envs.make(check({"env": {"data": str(games_root)}}))
    task = pool.tasks("train")[0]
    first, second, other = pool.reset([task, task, pool.tasks("train")[1]])
    assert first.text == second.text and first.description == second.description and first.text != other.text
    go = next(c for c in first.admissible if c.startswith("go to"))
    moved, idle, none = pool.step([go, "look", None])
    assert moved.text.startswith("You arrive at") and "middle of a room" in idle.text and none is None
    again = pool.reset([task])[0]
    assert (again.text, again.admissible, again.plan) == (first.text, first.admissible, first.plan)


def test_the_genuine_engine_answers_the_same_and_a_dead_worker_loses_its_episode_only(games_root):
    pytest.importorskip("textworld", reason="the genuine engine needs textworld")
    settings = {"env": {"data": str(games_root), "engine": "genuine"}}
    genuine, own = envs.make(check(settings)), envs.make(check({"env": {"data": str(games_root)}}))
    try:
        # bathrooms load fastest
        task = min(own.tasks("train"), key=lambda t: os.path.getsize(t.path))
        a, b = genuine.reset([task, task]), own.reset([task, task])
        assert [(o.text, o.description, o.admissible, o.plan) for o in a] == [(o.text, o.description, o.admissible, o.plan) for o in b]
        go = next(c for c in b[0].admissible if c.startswith("go to"))
        a, b = genuine.step([go, "dance"]), own.step([go, "dance"])
        assert [(o.text, o.admissible, o.won, o.plan, o.revealed) for o in a] == [(o.text, o.admissible, o.won, o.plan, o.revealed) for o in b]
        os.kill(genuine._workers[0]._worker.pid, signal.SIGKILL)
        dead, alive = genuine.step(["look", "look"])
        assert dead.error and dead.done and not dead.won and alive.error is None and alive.text
    finally:
        genuine.close()
