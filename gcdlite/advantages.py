"""Groups of episodes in, samples with an advantage for every response token out: one pure function an algorithm."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev

from gcdlite.records import Episode, Group, Sample, Turn

EPSILON = 1e-6  # in the denominator of every normalisation
NO_SPREAD = 1e-8  # below this spread there is nothing to learn from a group: advantage 0


def turn_cost(turn: Turn, malformed: float, inadmissible: float) -> float:
    """What a turn pays at once: c if it was malformed, the inadmissible cost if it was well formed but not admitted."""
    if turn.malformed:
        return malformed
    return 0.0 if turn.is_admissible else inadmissible


def normalise(scores: Sequence[float]) -> list[float]:
    """(x - mean) / (sample std + 1e-6), n - 1 in the std; zeros when there is no spread or only one score.

    >>> [round(a, 4) for a in normalise([1.0, 0.0])]
    [0.7071, -0.7071]
    """
    if len(scores) < 2 or max(scores) - min(scores) < NO_SPREAD:
        return [0.0] * len(scores)
    mean, spread = fmean(scores), stdev(scores) + EPSILON
    return [(s - mean) / spread for s in scores]


def grpo(group: Group, malformed: float, inadmissible: float, norm_over: str = "episodes") -> list[list[float]]:
    """Group-relative advantages (Shao et al. 2024, Sec. 4.1.2), one a turn: [episode][turn].

    `episodes`: every episode counts once in mean and std, then each turn pays its own cost, not normalised.
    `turns` (verl-agent's way): scores R_i - cost of the turn, mean and std over all turns of the group, so that a
    long failure weighs more than a short win.
    """
    costs = [[turn_cost(t, malformed, inadmissible) for t in e.turns] for e in group.episodes]
    if norm_over == "turns":
        flat = normalise([e.reward - c for e, row in zip(group.episodes, costs) for c in row])
        rest = iter(flat)
        return [[next(rest) for _ in row] for row in costs]
    scores = normalise([e.reward for e in group.episodes])
    return [[score - c for c in row] for score, row in zip(scores, costs)]


ALGORITHMS = {"grpo": grpo}


def zero_variance(groups: Sequence[Group]) -> int:
    """How many groups have episodes that all earned the same reward: they teach nothing about the task."""
    return sum(max(rewards) - min(rewards) < NO_SPREAD for g in groups if (rewards := [e.reward for e in g.episodes]))


def policy_samples(groups: Sequence[Group], advantages: Sequence[list[list[float]]]) -> list[Sample]:
    """One sample a turn; every response token gets its turn's advantage. Turns of one episode share their `unit`."""
    samples, unit = [], 0
    for group, rows in zip(groups, advantages, strict=True):
        for episode, row in zip(group.episodes, rows, strict=True):
            samples += [_sample(turn, value, unit) for turn, value in zip(episode.turns, row, strict=True)]
            unit += 1
    return samples


def _sample(turn: Turn, advantage: float, unit: int) -> Sample:
    return Sample(turn.prompt_ids, turn.response_ids, [advantage] * len(turn.response_ids), turn.logprobs, "policy", unit)


def all_episodes(groups: Sequence[Group]) -> list[Episode]:
    return [e for g in groups for e in g.episodes]
