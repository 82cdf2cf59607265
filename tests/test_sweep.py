"""Sweeps: what is run, what is skipped, and the arithmetic of the table."""

import json

import pytest
import yaml

from gcdlite import sweep
from gcdlite.config import CONFIG_DIR
from gcdlite.records import UserError


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump({"title": "t", "seeds": [0, 1, 2], "arms": {"a": {}, "b": {"gcd.enabled": True}}}))
    return sweep.read(path)


def finish(root, name, before, after):
    (root / name).mkdir(parents=True)
    levels = {"L0": {"before": {"success": before, "n": 10, "judge": 0.5}, "after": {"success": after, "n": 10, "judge": 0.75}}}
    (root / name / "summary.json").write_text(json.dumps({"levels": levels, "labeller": None, "training_seconds": 60.0}))


def test_the_table_pairs_seeds(recipe, tmp_path):
    for name, before, after in [("a-s0", 0.4, 0.5), ("a-s1", 0.4, 0.6), ("a-s2", 0.4, 0.7), ("b-s0", 0.4, 0.6), ("b-s2", 0.4, 0.8)]:
        finish(tmp_path, name, before, after)
    a, b = sweep.table(recipe, tmp_path)
    assert a["after"] == pytest.approx({"mean": 0.6, "half": 4.303 * 0.1 / 3**0.5, "n": 3})
    assert a["change"]["mean"] == pytest.approx(0.2) and a["against_first"] is None
    # Seeds 0 and 2 only, each against its own partner: +0.1 both times, whatever the seeds' spread.
    assert b["against_first"]["mean"] == pytest.approx(0.1) and b["against_first"]["half"] == pytest.approx(0, abs=1e-9)
    assert b["seeds"] == [0, 2]


def test_one_seed_has_no_interval_and_what_was_not_run_says_so(recipe, tmp_path):
    finish(tmp_path, "a-s1", 0.4, 0.5)
    text = sweep.markdown(recipe, sweep.table(recipe, tmp_path))
    assert "50.0 (one seed)" in text and "| b | | L0 | not run |" in text


def test_finished_runs_are_skipped_and_begun_ones_resumed(recipe, tmp_path, monkeypatch):
    finish(tmp_path, "a-s0", 0.4, 0.5)
    (tmp_path / "b-s0" / "checkpoints" / "iteration-00002").mkdir(parents=True)
    commands = []

    class Done:
        returncode = 0

    def run(command):
        commands.append(command[2:])
        return Done

    monkeypatch.setattr(sweep.subprocess, "run", run)
    assert sweep.sweep(recipe, tmp_path, lambda line: None) == []
    assert commands[0] == ["--resume", str(tmp_path / "b-s0")]
    assert len(commands) == 5
    assert commands[2] == ["--config", "nano", "--seed", "1", "--out", str(tmp_path / "b-s1"), "gcd.enabled=true"]


def test_a_failed_run_is_named_and_the_others_go_on(recipe, tmp_path, monkeypatch):
    codes = iter([0, 2, 0, 0, 0, 0])

    class Done:
        def __init__(self):
            self.returncode = next(codes)

    monkeypatch.setattr(sweep.subprocess, "run", lambda command: Done())
    assert sweep.sweep(recipe, tmp_path, lambda line: None) == ["b-s0"]
    assert next(codes, None) is None


def test_faults_are_told_before_anything_runs(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("title: t\narms: {a: {gcd.turnz: 3}}\n")
    with pytest.raises(UserError, match="arm a: .*gcd.turns"):
        sweep.read(path)
    path.write_text("title: t\narm: {a: {}}\n")
    with pytest.raises(UserError, match="arms"):
        sweep.read(path)
    with pytest.raises(UserError, match="nano-main"):
        sweep.find("nano-mian")


@pytest.mark.parametrize("path", sorted((CONFIG_DIR / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_recipes_are_sound(path):
    assert len(sweep.read(path).arms) > 1
