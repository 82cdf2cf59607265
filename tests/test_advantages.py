"""Advantages against hand-worked numbers and a slow version of the formula."""

import math

import pytest

from gcdlite.advantages import grpo, normalise, policy_samples, zero_variance
from gcdlite.records import Episode, Group, Task, Turn

TASK = Task("t", "pick_and_place_simple", "t")


def turn(tokens=3, malformed=False, admissible=True):
    return Turn("seen", [], [1, 2], list(range(tokens)), [-0.5] * tokens, "text", "look", malformed, admissible)


def episode(reward, *turns):
    return Episode(TASK, "do it", list(turns), won=reward > 0, reward=reward)


def test_grpo_by_hand():
    # rewards 1 0 0 0: mean .25, sample std sqrt(.75^2 + 3 * .25^2) / sqrt(3) = 0.5
    group = Group(TASK, [episode(1.0, turn(), turn())] + [episode(0.0, turn()) for _ in range(3)])
    values = grpo(group, 0.01, 0.0)
    assert values[0] == pytest.approx([1.5, 1.5], abs=1e-5)
    assert [v[0] for v in values[1:]] == pytest.approx([-0.5] * 3, abs=1e-5)


def test_costs_come_after_normalisation_and_not_twice():
    group = Group(TASK, [episode(1.0, turn(malformed=True, admissible=False), turn()), episode(0.0, turn(admissible=False))])
    values = grpo(group, 0.01, 0.25)
    a = 0.5 / (math.sqrt(0.5) + 1e-6)
    assert values[0] == pytest.approx([a - 0.01, a])
    assert values[1] == pytest.approx([-a - 0.25])


def test_no_spread_leaves_only_the_costs():
    group = Group(TASK, [episode(1.0, turn(), turn(malformed=True)), episode(1.0, turn())])
    assert grpo(group, 0.01, 0.0) == [[0.0, -0.01], [0.0]]
    assert normalise([0.3]) == [0.0]
    assert normalise([0.5, 0.5 + 1e-9]) == [0.0, 0.0]


def test_over_turns_counts_every_turn():
    group = Group(TASK, [episode(1.0, turn()), episode(0.0, turn(), turn(malformed=True), turn())])
    scores = [1.0, 0.0, -0.01, 0.0]
    mean = sum(scores) / 4
    std = math.sqrt(sum((s - mean) ** 2 for s in scores) / 3)
    flat = [v for row in grpo(group, 0.01, 0.0, "turns") for v in row]
    assert flat == pytest.approx([(s - mean) / (std + 1e-6) for s in scores])


def test_samples_carry_their_own_turn():
    group = Group(TASK, [episode(1.0, turn(2), turn(4)), episode(0.0, turn(3))])
    other = Group(TASK, [episode(0.0, turn(1))])
    samples = policy_samples([group, other], [[[0.7, 0.6], [-0.7]], [[0.1]]])
    assert [s.advantages for s in samples] == [[0.7] * 2, [0.6] * 4, [-0.7] * 3, [0.1]]
    assert [s.unit for s in samples] == [0, 0, 1, 2]  # an episode is a unit, across groups too
    assert all(len(s.advantages) == len(s.logprobs) == len(s.response_ids) for s in samples)


def test_zero_variance_counts_groups():
    flat, mixed = Group(TASK, [episode(0.0), episode(0.0)]), Group(TASK, [episode(1.0), episode(0.0)])
    assert zero_variance([flat, mixed, flat]) == 2
