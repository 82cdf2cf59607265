"""The planner against what autograd, bitsandbytes and the real models hold; and what happens when memory runs out."""

import json
import random
import weakref

import pytest
import torch
from test_update import make_samples, wake
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen2Config

from gcdlite import packing, plan
from gcdlite import update as updating
from gcdlite.config import CONFIG_DIR, check, find_config, load
from gcdlite.nano import build_model
from gcdlite.policy import Policy
from gcdlite.records import Sample, UserError
from gcdlite.update import make_optimizer, make_packs, update

MODELS = {
    "grouped heads": (Qwen2Config, dict(hidden_size=64, intermediate_size=176, num_hidden_layers=3, num_attention_heads=4,
                                        num_key_value_heads=2, tie_word_embeddings=True)),
    "a head of its own": (LlamaConfig, dict(hidden_size=96, intermediate_size=128, num_hidden_layers=2, num_attention_heads=6,
                                            num_key_value_heads=6, tie_word_embeddings=False)),
    "deep, wide MLP": (Qwen2Config, dict(hidden_size=48, intermediate_size=320, num_hidden_layers=4, num_attention_heads=3,
                                         num_key_value_heads=1, tie_word_embeddings=True)),
}  # fmt: skip
FP32, BF16 = {"dtype": "float32"}, {"dtype": "bfloat16"}
WAYS = {
    "fp32": {"model": FP32},
    "fp32, folded": {"model": FP32, "lora": {"r": 32}},
    "fp32, two adapters": {"model": FP32, "lora": {"targets": ["q_proj", "v_proj"]}},
    "fp32, dropout": {"model": FP32, "lora": {"dropout": 0.1}},
    "fp32, heads copied": {"model": FP32},
    "bf16": {"model": BF16},
    "bf16, nf4": {"model": BF16 | {"quantization": "nf4"}},
    "bf16, checkpointing": {"model": BF16 | {"checkpointing": True}},
}
CASES = [*((name, way) for name in MODELS for way in ("fp32", "bf16")), *(("grouped heads", way) for way in WAYS if way not in ("fp32", "bf16"))]


@pytest.fixture(scope="module")
def folders(small_model, tmp_path_factory):
    """A model of each shape, with random weights."""
    tokenizer = AutoTokenizer.from_pretrained(small_model)
    made = {}
    for name, (kind, sizes) in MODELS.items():
        made[name] = tmp_path_factory.mktemp("model")
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(kind(vocab_size=len(tokenizer), eos_token_id=1, **sizes)).save_pretrained(made[name])
        tokenizer.save_pretrained(made[name])
    return made


def settings(folder, **more):
    data = {"model": {"name": str(folder), "prompt": "brief"}, "lora": {"r": 4}}
    return check({k: data.get(k, {}) | more.get(k, {}) for k in {*data, *more}})


class Kept:
    """Stands for a tensor in autograd's graph, and vanishes with its node."""

    def __init__(self, tensor):
        self.tensor = tensor.detach()


def really_saved(model, pack) -> int:
    """Bytes that autograd holds for the backward pass of a pack; what several nodes share counts once, parameters do not."""
    alive = weakref.WeakSet()

    def keep(tensor):
        kept = Kept(tensor)
        alive.add(kept)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept.tensor):
        scores = packing.logprobs(model, pack)
    storages = {kept.tensor.untyped_storage().data_ptr(): kept.tensor.untyped_storage().nbytes() for kept in alive}
    for own in [*model.parameters(), *model.buffers()]:
        storages.pop(own.untyped_storage().data_ptr(), None)
    assert scores.logprobs.requires_grad
    return sum(storages.values())


@pytest.mark.parametrize(("name", "way"), CASES)
def test_activations_are_what_autograd_saves(folders, name, way, monkeypatch):
    config = settings(folders[name], **WAYS[way])
    policy = Policy(config)
    policy.model.train()
    dice = random.Random(0)

    def draw(n):
        return [dice.randrange(5, 600) for _ in range(n)]

    start = draw(30)
    samples = [Sample([*start, *draw(dice.randint(20, 30))], draw(12), [1.0] * 12, [0.0] * 12) for _ in range(6)]
    (pack,) = make_packs(policy, samples, config)
    stem, (rows, columns) = pack.stem.numel(), pack.ids.shape
    assert rows > 1 and (stem >= 30) == (not config.model.checkpointing)
    shape = plan.Shape.of(policy.model.config)
    cuda = way == "fp32, heads copied"
    computed = plan.saved(shape, config, columns, rows, stem, cuda)
    if cuda:  # what CUDA adds by its kernel, and not by our model's code, is not here
        monkeypatch.setenv("TRANSFORMERS_SDPA_FORCE_GQA", "0")
        computed -= shape.layers * 4 * (stem * stem + rows * columns * (stem + columns))
    if config.model.checkpointing:  # checkpointed layers hold what they are given as arguments
        computed -= plan.given(shape, config, columns, rows, stem, cuda)
    computed += 4 * len(pack.targets) * shape.vocab
    real = really_saved(policy.model, pack)
    print(f"{name}; {way}: computed {computed}, saved {real}: {computed / real - 1:+.1%}")
    assert computed == pytest.approx(real, rel=0.1)
