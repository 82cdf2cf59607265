"""The update against a slow version written from the formula: plain rows, plain log-softmax, plain autograd."""

import copy
import random

import pytest
import torch

from gcdlite.policy import Policy
from gcdlite.records import Sample
from gcdlite.update import make_optimizer, minibatches, update


def make_samples(policy, dice):
    """Samples of both streams with made-up tokens, advantages and old log-probs near the policy's own."""
    samples = []
    vocabulary = policy.model.config.vocab_size
    for i in range(9):
        prompt = [1, 2, 3] + [dice.randrange(vocabulary) for _ in range(dice.randint(1, 6))]
        response = [dice.randrange(vocabulary) for _ in range(dice.randint(1, 5))]
        stream = "judgment" if i % 3 == 2 else "policy"
        advantages = [dice.choice([-1.5, 0.0, 0.7])] * len(response)
        sample = Sample(prompt, response, advantages, [], stream, i // 2)
        sample.logprobs = [v + dice.uniform(-0.4, 0.4) for v in row_logprobs(policy.model, sample).tolist()]
        samples.append(sample)
    return samples


def row_logprobs(model, sample):
    ids = torch.tensor([sample.prompt_ids + sample.response_ids])
    logits = model(input_ids=ids).logits[0].log_softmax(-1)
    n = len(sample.prompt_ids)
    return torch.stack([logits[n + k - 1, token] for k, token in enumerate(sample.response_ids)])


def wake(policy):
    """LoRA starts with B = 0, where policy and reference agree and A gets no gradient: move away from there."""
    torch.manual_seed(5)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.05 * torch.randn_like(p))
    policy.changed()


def slow_gradient(policy, samples, cfg, weight):
    """Gradient of L = L_policy + weight * L_judgment, straight from SPEC: token means, clip, dual clip, k3."""
    model = policy.model
    with policy.reference():
        references = [row_logprobs(model, s) for s in samples]
    total = 0.0
    for stream, scale in (("policy", 1.0), ("judgment", weight)):
        mine = [i for i, s in enumerate(samples) if s.stream == stream]
        tokens = sum(len(samples[i].response_ids) for i in mine)
        for i in mine:
            s = samples[i]
            new = row_logprobs(model, s)
            for k in range(len(s.response_ids)):
                a, ratio = s.advantages[k], (new[k] - s.logprobs[k]).exp()
                loss = -min(a * ratio, a * ratio.clamp(1 - cfg.clip, 1 + cfg.clip))
                if a < 0:
                    loss = min(loss, torch.tensor(-a * cfg.dual_clip))
                d = references[i][k] - new[k]
                total = total + scale * (loss + cfg.kl * (d.exp() - d - 1)) / tokens
    return torch.autograd.grad(total, policy.parameters()), float(total.detach())


@pytest.mark.parametrize(("budget", "kl"), [(16, 0.1), (4096, 0.1), (4096, 0.0)])
def test_one_step_equals_the_slow_formula(small_config, budget, kl):
    config = small_config
    config.update.minibatches, config.update.grad_clip, config.update.kl, config.update.warmup = 1, 1e9, kl, 0
    config.update.token_budget, config.gcd.weight = budget, 0.6
    policy = Policy(config)
    wake(policy)
    samples = make_samples(policy, random.Random(1))
    wanted, loss = slow_gradient(policy, samples, config.update, 0.6)
    seen = []
    optimizer, schedule = make_optimizer(policy, config)
    optimizer.step = lambda: seen.extend(p.grad.clone() for p in policy.parameters())
    stats = update(policy, samples, optimizer, schedule, config, random.Random(0))
    for got, want in zip(seen, wanted, strict=True):
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-6)
    assert max(g.abs().max() for g in seen) > 1e-3  # the comparison is about something
    assert stats["loss/policy"] + 0.6 * stats["loss/judgment"] == pytest.approx(loss, abs=1e-5)


def test_separate_takes_a_step_for_each_stream(small_config):
    small_config.update.minibatches, small_config.gcd.update = 1, "separate"
    policy = Policy(small_config)
    wake(policy)
    samples = make_samples(policy, random.Random(1))
    optimizer, schedule = make_optimizer(policy, small_config)
    steps = []
    optimizer.step = lambda: steps.append(1)
    update(policy, samples, optimizer, schedule, small_config, random.Random(0))
    assert len(steps) == 2


def test_a_good_token_gets_likelier_and_a_bad_one_less(small_config):
    small_config.update.kl, small_config.update.warmup, small_config.update.minibatches = 0.0, 0, 1
    policy = Policy(small_config)
    good, bad = Sample([1, 2, 3], [20], [1.0], [], unit=0), Sample([1, 2, 3], [30], [-1.0], [], unit=1)
    for s in (good, bad):
        s.logprobs = row_logprobs(policy.model, s).tolist()
    optimizer, schedule = make_optimizer(policy, small_config)
    update(policy, [good, bad], optimizer, schedule, small_config, random.Random(0))
    assert row_logprobs(policy.model, good).item() > good.logprobs[0]
    assert row_logprobs(policy.model, bad).item() < bad.logprobs[0]


def test_zero_advantage_and_no_kl_change_nothing(small_config):
    small_config.update.kl = 0.0
    policy = Policy(small_config)
    wake(policy)
    before = [p.detach().clone() for p in policy.parameters()]
    samples = make_samples(policy, random.Random(1))
    for s in samples:
        s.advantages = [0.0] * len(s.response_ids)
    optimizer, schedule = make_optimizer(policy, small_config)
    update(policy, samples, optimizer, schedule, small_config, random.Random(0))
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters()))


def test_clip_share_is_of_the_tokens_that_were_evaluated(small_config):
    """Without KL a sample of zero advantage is left out, and is no token that stayed inside the clip."""
    small_config.update.minibatches, small_config.update.warmup = 1, 0
    policy = Policy(small_config)
    samples = make_samples(policy, random.Random(1))
    samples[0].advantages = [0.0] * len(samples[0].response_ids)
    far = [s for s in samples if any(s.advantages)]
    for s in samples:
        s.logprobs = [v - float(s in far) for v in row_logprobs(policy.model, s).tolist()]
    tokens = [sum(len(s.response_ids) for s in some) for some in (far, samples)]
    for kl, wanted in ((0.0, 1.0), (0.1, tokens[0] / tokens[1])):
        small_config.update.kl, small_config.update.lr = kl, 1e-9
        optimizer, schedule = make_optimizer(policy, small_config)
        stats = update(policy, samples, optimizer, schedule, small_config, random.Random(0))
        assert stats["clip_share"] == pytest.approx(wanted) and tokens[0] < tokens[1]


def test_kl_is_reported_also_where_it_is_not_trained(small_config):
    small_config.update.kl, small_config.update.minibatches, small_config.update.warmup = 0.0, 1, 0
    policy = Policy(small_config)
    optimizer, schedule = make_optimizer(policy, small_config)
    samples = make_samples(policy, random.Random(1))
    stats = update(policy, samples, optimizer, schedule, small_config, random.Random(0))
    mine = [s for s in samples if s.stream == "policy"]
    with policy.reference():
        reference = torch.cat([row_logprobs(policy.model, s) for s in mine])
    with torch.no_grad():
        d = reference - torch.cat([row_logprobs(policy.model, s) for s in mine])
    assert stats["kl"] == pytest.approx((d.exp() - d - 1).mean().item(), rel=1e-3) and stats["kl"] > 0


def test_kl_alone_pulls_back_to_the_reference(small_config):
    small_config.update.kl, small_config.update.minibatches, small_config.update.lr = 1.0, 1, 1e-3
    policy = Policy(small_config)
    wake(policy)
    samples = make_samples(policy, random.Random(1))
    for s in samples:
        s.advantages = [0.0] * len(s.response_ids)
    optimizer, schedule = make_optimizer(policy, small_config)
    first = update(policy, samples, optimizer, schedule, small_config, random.Random(0))["kl"]
    for _ in range(10):
        last = update(policy, samples, optimizer, schedule, small_config, random.Random(0))["kl"]
    assert 0 <= last < first


def test_minibatches_keep_units_whole_and_share_out_both_streams():
    samples = [Sample([1], [1], [0.0], [0.0], "policy", u) for u in (0, 0, 1, 1, 2, 3, 3, 3)]
    samples += [Sample([1], [1], [0.0], [0.0], "judgment", u) for u in (0, 0, 1, 1)]
    batches = minibatches(samples, 2, random.Random(0))
    assert sorted(i for b in batches for i in b) == list(range(len(samples)))
    for stream in ("policy", "judgment"):
        homes = {}
        for place, batch in enumerate(batches):
            units = {samples[i].unit for i in batch if samples[i].stream == stream}
            assert units
            for unit in units:
                assert homes.setdefault(unit, place) == place
    assert batches != minibatches(samples, 2, random.Random(1))


def test_a_frozen_start_adapter_is_the_reference(small_config, tmp_path):
    start = Policy(small_config)
    wake(start)
    start.save_adapter(tmp_path)
    config = copy.deepcopy(small_config)
    config.model.adapter = str(tmp_path)
    policy = Policy(config)
    sample = Sample([1, 2, 3], [4, 5], [0.0] * 2, [0.0] * 2)
    with torch.no_grad():
        wanted = row_logprobs(start.model, sample)
        assert torch.allclose(row_logprobs(policy.model, sample), wanted, atol=1e-6)
        wake(policy)
        assert not torch.allclose(row_logprobs(policy.model, sample), wanted, atol=1e-3)
    with policy.reference():
        assert torch.allclose(row_logprobs(policy.model, sample), wanted, atol=1e-6)
    assert all(p.requires_grad for p in policy.parameters()) and len(policy.parameters()) == len(start.parameters())
