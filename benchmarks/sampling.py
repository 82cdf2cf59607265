"""`gcdlite.sampling` against Hugging Face `generate`: same model, prompts, limits and rows at a time.

Two workloads: prompts of mixed lengths behind a shared head (a turn of many episodes), and groups of equal prompts
(judgments). The model is random; stop tokens are chosen so that lengths vary as in training. Both sides sample at
temperature 1, each with its own random numbers, so time is divided by the tokens written. Ratios are of CPU seconds,
which other work on the machine hardly changes; `ratio_wall` is of the clock's.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # waiting threads must not spin on shared cores; before torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from gcdlite.sampling import sample

V = 1024


def nano() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(
        Qwen2Config(
            hidden_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, intermediate_size=384,
            vocab_size=V, tie_word_embeddings=True, attn_implementation="sdpa",
        )
    ).eval()  # fmt: skip


def generate(model, prompts: list[list[int]], limit: int, stop: list[int], rows: int) -> int:
    """Tokens written by `generate`, with prompts sorted by length: the best use of it."""
    written = 0
    prompts = sorted(prompts, key=len)
    for start in range(0, len(prompts), rows):
        part = prompts[start : start + rows]
        width = max(map(len, part))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in part])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in part])
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=limit, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            eos_token_id=stop, pad_token_id=0,
        )[:, width:]  # fmt: skip
        stopped = torch.isin(out, torch.tensor(stop))
        written += torch.where(stopped.any(1), stopped.int().argmax(1) + 1, out.shape[1]).sum().item()
    return written


def ours(model, prompts: list[list[int]], limit: int, stop: list[int], rows: int, seed: int) -> int:
    rng = torch.Generator().manual_seed(seed)
    completions = sample(
        model, prompts, max_new_tokens=limit, temperature=1.0, stop_ids=stop, rng=rng, max_rows=rows
    )
    return sum(len(c.ids) for c in completions)


def compare(model, prompts: list[list[int]], limit: int, stop: list[int], rows: int, repeats: int) -> dict:
    """Medians of CPU milliseconds per hundred new tokens, both sides in turns, and of the pairs' ratios."""
    cpu: dict[str, list[float]] = {"generate": [], "ours": []}
    wall: dict[str, list[float]] = {"generate": [], "ours": []}
    for repeat in range(-1, repeats):  # the first pair warms up
        for name in cpu:
            start = time.process_time(), time.perf_counter()
            if name == "generate":
                written = generate(model, prompts, limit, stop, rows)
            else:
                written = ours(model, prompts, limit, stop, rows, repeat + 1)
            if repeat >= 0:
                cpu[name].append((time.process_time() - start[0]) / written)
                wall[name].append((time.perf_counter() - start[1]) / written)
    return {
        "ratio": round(statistics.median(g / o for g, o in zip(cpu["generate"], cpu["ours"])), 2),
        "ratio_wall": round(statistics.median(g / o for g, o in zip(wall["generate"], wall["ours"])), 2),
        "generate_cpu_ms_per_100_tokens": round(1e5 * statistics.median(cpu["generate"]), 1),
        "ours_cpu_ms_per_100_tokens": round(1e5 * statistics.median(cpu["ours"]), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", type=int, default=64, help="sequences at a time, for both sides")
    args = parser.parse_args()

    rng = random.Random(0)

    def tokens(n: int) -> list[int]:
        return [rng.randrange(V) for _ in range(n)]

    model, head = nano(), tokens(60)
    mixed = [head + tokens(rng.randint(50, 130)) for _ in range(128)]
    groups = [head + tokens(rng.randint(150, 230)) for _ in range(16)]
    results = {
        # of 1,024 tokens 60 stop, which makes 13 new tokens on average, at most 30
        "mixed": compare(model, mixed, 30, list(range(60)), args.rows, args.repeats),
        # eight copies of each; 16 stop: 40 new tokens on average, at most 80
        "groups": compare(model, [p for p in groups for _ in range(8)], 80, list(range(16)), args.rows, args.repeats),
    }
    for name, result in results.items():
        print(name, result)
    setting = {"threads": torch.get_num_threads(), "rows": args.rows, "repeats": args.repeats}
    print(json.dumps({"ratio": results["mixed"]["ratio"], "ratio_groups": results["groups"]["ratio"], **results, **setting}))


if __name__ == "__main__":
    main()
