"""`gcdlite.packing` against the usual layouts: forward and backward over the same samples, log-probs of all responses.

Judgments (eight responses to one prompt) against one row a sample and against padded batches, policy turns (prompts
that share a head) against padded batches. The others compute logits at response tokens only, too, and padded rows are
sorted by length. Ratios are of CPU seconds, which other work on the machine hardly changes; `ratio_wall` is of the
clock's. Also: which share of the machine's rate in matrix products the packed update reaches.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # waiting threads must not spin on shared cores; before torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from gcdlite.packing import Pack, logprobs, pack
from gcdlite.records import Sample

V = 1024


def nano() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(
        Qwen2Config(
            hidden_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, intermediate_size=384,
            vocab_size=V, tie_word_embeddings=True, attn_implementation="sdpa",
        )
    )  # fmt: skip


def row_wise(model, samples: list[Sample]) -> None:
    padded(model, samples, 1)


def padded(model, samples: list[Sample], rows: int) -> None:
    """Batches of similar length: prompts padded on the left, responses on the right."""
    samples = sorted(samples, key=lambda s: len(s.prompt_ids) + len(s.response_ids))
    for start in range(0, len(samples), rows):
        part = samples[start : start + rows]
        prompt = max(len(s.prompt_ids) for s in part)
        response = max(len(s.response_ids) for s in part)
        ids, mask = [], []
        for s in part:
            left, right = prompt - len(s.prompt_ids), response - len(s.response_ids)
            ids.append([0] * left + s.prompt_ids + s.response_ids + [0] * right)
            mask.append([0] * left + [1] * (len(s.prompt_ids) + len(s.response_ids)) + [0] * right)
        ids, mask = torch.tensor(ids), torch.tensor(mask)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        # Without padding, no mask: the library then takes its faster causal kernel.
        logits = model(
            ids, attention_mask=None if mask.all() else mask, position_ids=positions, logits_to_keep=response + 1
        ).logits[:, :-1]
        values = logits.gather(-1, ids[:, prompt:, None])[..., 0] - logits.logsumexp(-1)
        (values * mask[:, prompt:]).sum().backward()


def packed(model, samples: list[Sample], budget: int) -> None:
    for one in pack(samples, budget, width=model.config.hidden_size):
        logprobs(model, one).logprobs.sum().backward()


def compare(sides: dict[str, Callable[[], None]], repeats: int) -> dict:
    """Median CPU seconds of each side, taken in turns, and medians of the others' ratios to `packed`, pair by pair."""
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    wall: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(-1, repeats):  # the first round warms up
        for name, side in sides.items():
            start = time.process_time(), time.perf_counter()
            side()
            if repeat >= 0:
                cpu[name].append(time.process_time() - start[0])
                wall[name].append(time.perf_counter() - start[1])
    result = {}
    for name in sides:
        if name != "packed":
            result[f"ratio_{name}"] = round(statistics.median(o / p for o, p in zip(cpu[name], cpu["packed"])), 2)
            result[f"ratio_wall_{name}"] = round(statistics.median(o / p for o, p in zip(wall[name], wall["packed"])), 2)
    return result | {f"{name}_cpu_s": round(statistics.median(values), 3) for name, values in cpu.items()}


def flops(model, packs: list[Pack]) -> float:
    """Multiplications and additions of forward and backward: weights at computed tokens, lm_head at response tokens,
    attention to every column that is compared (masked ones, too: they are computed)."""
    config = model.config
    inner = sum(p.numel() for n, p in model.named_parameters() if "layers" in n and p.dim() == 2)
    total = 0.0
    for one in packs:
        (rows, columns), stem = one.ids.shape, len(one.stem)
        pairs = stem * stem + rows * columns * (stem + columns)
        total += 2 * inner * one.tokens + 2 * config.hidden_size * config.vocab_size * len(one.targets)
        total += 4 * config.num_hidden_layers * config.hidden_size * pairs
    return 3 * total


def matrix_rate() -> float:
    """The machine's best measured rate in large products, operations a CPU second."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    a @ b
    times = []
    for _ in range(10):
        start = time.process_time()
        a @ b
        times.append(time.process_time() - start)
    return 2 * 2048**3 / min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--budget", type=int, default=8192, help="computed tokens in a pack")
    parser.add_argument("--rows", type=int, default=32, help="rows in a padded batch")
    args = parser.parse_args()

    rng = random.Random(0)

    def tokens(n: int) -> list[int]:
        return [rng.randrange(V) for _ in range(n)]

    def make(prompt: list[int], n: int) -> Sample:
        return Sample(prompt, [1, *tokens(n - 1)], [0.0] * n, [0.0] * n)

    model, head = nano(), tokens(60)
    judgments = [make(prompt, rng.randint(25, 55)) for prompt in [head + tokens(190) for _ in range(8)] for _ in range(8)]
    turns = []
    for _ in range(2):  # groups of 8 episodes of 16 turns, whose first prompt is the same
        task = head + tokens(12)
        first = tokens(60)
        for _ in range(8):
            prompts = [task + (tokens(rng.randint(50, 110)) if turn else first) for turn in range(16)]
            turns += [make(prompt, rng.randint(10, 24)) for prompt in prompts]

    def sides(samples: list[Sample]) -> dict[str, Callable[[], None]]:
        return {
            "packed": lambda: packed(model, samples, args.budget),
            "padded": lambda: padded(model, samples, args.rows),
        }

    judged = compare({**sides(judgments), "row_wise": lambda: row_wise(model, judgments)}, args.repeats)
    print("judgments", judged)
    acted = compare(sides(turns), args.repeats)
    print("turns", acted)
    share = {}
    for name, samples, result in ("judgments", judgments, judged), ("turns", turns, acted):
        share[name] = round(flops(model, pack(samples, args.budget)) / result["packed_cpu_s"] / matrix_rate(), 3)
    setting = {"threads": torch.get_num_threads(), "budget": args.budget, "rows": args.rows, "repeats": args.repeats}
    result = {"ratio": judged["ratio_row_wise"], "judgments": judged, "turns": acted, "share_of_matrix_rate": share}
    print(json.dumps({**result, **setting}))


if __name__ == "__main__":
    main()
