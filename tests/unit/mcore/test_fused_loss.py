"""The one-pass loss against plain autograd through full logits in float64; ranks of a split vocabulary are threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from megatron_dapo.algo.loss import PolicyLossConfig
from megatron_dapo.config.tree import KLPenalty
from megatron_dapo.mcore.batch import HeadTerms
from megatron_dapo.mcore.fused_loss import SUMS, HeadResult, Objective, Vocabulary, dapo_loss, token_logp

LOW, HIGH, DUAL = 0.2, 0.28, 10.0
T = TypeVar("T")


@dataclass(frozen=True)
class Case:
    """n tokens of hidden size h over a vocabulary of v. Offsets reach every branch of the loss."""

    n: int = 40
    h: int = 6
    v: int = 13
    temperature: float = 1.0
    entropy_coeff: float = 0.0
    kl_coef: float = 0.0
    kl_kind: KLPenalty = "low_var_kl"
    tp_size: int = 1
    chunk: int = 1000  # tokens whose logits are held at once
    hidden: Tensor = field(init=False)
    weight: Tensor = field(init=False)
    targets: Tensor = field(init=False)
    terms: HeadTerms = field(init=False)

    def __post_init__(self) -> None:
        draw = torch.Generator().manual_seed(7)

        def normal(*dims: int) -> Tensor:
            return torch.randn(dims, generator=draw)

        make = object.__setattr__
        make(self, "hidden", normal(self.n, self.h))
        make(self, "weight", normal(self.v, self.h))
        make(self, "targets", torch.randint(self.v, (self.n,), generator=draw))
        logp = self.softmax(self.hidden, self.weight)[0]
        shifts = torch.tensor([0.0, 0.1, -0.1, 0.6, -0.6, 2.8, 25.0, -25.0])
        make(
            self,
            "terms",
            HeadTerms(
                weight=normal(self.n).abs() * (torch.arange(self.n) % 5 != 3),
                advantage=normal(self.n),
                old_logp=logp - shifts[torch.arange(self.n) % len(shifts)],
                ref_logp=logp + 0.4 * normal(self.n) if self.kl_coef else None,
                rollout_logp=None,
                sequence=torch.zeros(self.n, dtype=torch.int64),
                num_sequences=1,
            ),
        )

    def softmax(self, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Log-prob of the target and entropy, [n] each."""
        log_softmax = (hidden @ weight.T / self.temperature).log_softmax(-1)
        return log_softmax.gather(1, self.targets[:, None])[:, 0], -(log_softmax.exp() * log_softmax).sum(-1)


@dataclass(frozen=True)
class Found:
    loss: Tensor
    sums: dict[str, float]
    logp: Tensor
    entropy: Tensor
    d_hidden: Tensor
    d_weight: Tensor


def plain(case: Case) -> Found:
    """The loss written out, and autograd."""
    hidden, weight = (x.double().requires_grad_() for x in (case.hidden, case.weight))
    w, advantage, old = (x.double() for x in (case.terms.weight, case.terms.advantage, case.terms.old_logp))
    logp, entropy = case.softmax(hidden, weight)
    ratio = (logp - old).clamp(-20, 20).exp()
    free, bounded = -advantage * ratio, -advantage * ratio.clamp(1 - LOW, 1 + HIGH)
    policy = torch.maximum(free, bounded)
    dual = (advantage < 0) & (policy > -advantage * DUAL)
    policy = torch.where(dual, -advantage * DUAL, policy)
    kl = torch.zeros_like(logp)
    if case.terms.ref_logp is not None:
        gap = case.terms.ref_logp.double() - logp
        kl = {"low_var_kl": gap.exp() - gap - 1, "kl": -gap, "mse": gap**2 / 2, "abs": gap.abs()}[case.kl_kind]
    loss = (w * (policy + case.kl_coef * kl - case.entropy_coeff * entropy)).sum()
    loss.backward()
    counts = w != 0
    per_token = {
        "tokens": torch.ones_like(w),
        "entropy": entropy,
        "approx_kl": old - logp,
        "clipped_high": (advantage > 0) & (ratio > 1 + HIGH),
        "clipped_low": (advantage < 0) & (ratio < 1 - LOW),
        "dual_clipped": dual,
        "clamped": (logp - old).abs() > 20,
        "ratio": ratio,
        "tis_weight": torch.zeros_like(w),
        "tis_capped": torch.zeros_like(w),
    }
    sums = {name: (counts * values.double()).sum().item() for name, values in per_token.items()}
    sums |= {"loss": loss.item(), "policy_loss": (w * policy).sum().item(), "kl_loss": (w * kl).sum().item()}
    assert hidden.grad is not None
    assert weight.grad is not None
    return Found(loss.detach(), sums, logp.detach(), entropy.detach(), hidden.grad, weight.grad)


def one_pass(case: Case) -> Found:
    rows = -(-case.v // case.tp_size)
    padded = torch.cat([case.weight, torch.full((rows * case.tp_size - case.v, case.h), 50.0)])

    def rank(group: dist.ProcessGroup) -> tuple[HeadResult, Tensor, Tensor]:
        hidden = case.hidden.clone().requires_grad_()
        weight = padded[group.rank() * rows : (group.rank() + 1) * rows].clone().requires_grad_()
        objective = Objective(
            PolicyLossConfig(LOW, HIGH, DUAL), case.temperature, case.entropy_coeff, case.kl_coef, case.kl_kind
        )
        vocabulary = Vocabulary(case.v, group, logits_bytes=4 * rows * case.chunk)
        result = dapo_loss(hidden, weight, case.targets, case.terms, objective, vocabulary)
        result.loss.backward()
        logp, entropy = token_logp(case.hidden, weight, case.targets, case.temperature, vocabulary)
        assert torch.equal(logp, result.logp)
        assert torch.equal(entropy, result.entropy)
        assert hidden.grad is not None
        assert weight.grad is not None
        return result, hidden.grad, weight.grad

    found = on_ranks(case.tp_size, rank)
    results = [result for result, _, _ in found]
    for result in results[1:]:
        assert torch.equal(result.sums, results[0].sums)
    d_weight = torch.cat([grad for _, _, grad in found])
    assert not d_weight[case.v :].any()
    return Found(
        loss=results[0].loss.detach(),
        sums=dict(zip(SUMS, results[0].sums.tolist(), strict=True)),
        logp=results[0].logp,
        entropy=results[0].entropy,
        d_hidden=torch.stack([grad for _, grad, _ in found]).sum(0),
        d_weight=d_weight[: case.v],
    )


def on_ranks(size: int, function: Callable[[dist.ProcessGroup], T]) -> list[T]:
    """`function` on each rank of a real group whose ranks are threads of this process."""
    store = HashStore()

    def run(rank: int) -> T:
        group = dist.ProcessGroup(store, rank, size)
        gloo = dist.ProcessGroupGloo(store, rank, size, timedelta(seconds=60))
        group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, gloo)
        return function(group)

    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(run, range(size)))


CASES = {
    "plain": Case(),
    "temperature": Case(temperature=0.6),
    "entropy bonus": Case(entropy_coeff=0.3),
    "KL to the reference": Case(kl_coef=0.5),
    "all terms": Case(temperature=1.7, entropy_coeff=0.3, kl_coef=0.5, kl_kind="mse"),
    "chunks that end with the tokens": Case(chunk=10),
    "a last chunk of one token": Case(chunk=13, entropy_coeff=0.3),
    "a token at a time": Case(chunk=0),
    "one token": Case(n=1),
    "no token": Case(n=0),
    "two ranks": Case(tp_size=2, entropy_coeff=0.3),
    "four ranks, all terms, several chunks": Case(
        tp_size=4, temperature=0.8, entropy_coeff=0.3, kl_coef=0.5, kl_kind="kl", chunk=7
    ),
    "a rank with nothing but padding": Case(v=5, tp_size=4, entropy_coeff=0.3),
}


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_are_those_of_full_logits(name: str):
    found, wanted = one_pass(CASES[name]), plain(CASES[name])
    for what in ("loss", "logp", "entropy", "d_hidden", "d_weight"):
        torch.testing.assert_close(getattr(found, what).double(), getattr(wanted, what), rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_every_sum_counts_the_tokens_that_weigh_something(name: str):
    found, wanted = one_pass(CASES[name]).sums, plain(CASES[name]).sums
    assert found == pytest.approx(wanted, rel=2e-5, abs=1e-4)


def test_the_cases_reach_every_branch():
    sums = plain(CASES["plain"]).sums
    counts = ("clipped_high", "clipped_low", "dual_clipped", "clamped")
    assert all(0 < sums[name] < sums["tokens"] for name in counts)
    assert sums["tokens"] < CASES["plain"].n


def test_a_token_of_weight_0_gives_no_gradient():
    case = CASES["all terms"]
    silent = case.terms.weight == 0
    assert silent.any()
    d_hidden = one_pass(case).d_hidden
    assert not d_hidden[silent].any()
    assert d_hidden[~silent].any(1).sum() > len(d_hidden) / 3


def test_the_gradient_is_scaled_by_what_comes_from_above():
    case = CASES["plain"]

    def gradients(scale: float) -> tuple[Tensor, ...]:
        hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
        objective = Objective(PolicyLossConfig(LOW, HIGH, DUAL), 1.0)
        (loss,) = on_ranks(
            1,
            lambda group: (
                dapo_loss(hidden, weight, case.targets, case.terms, objective, Vocabulary(case.v, group, 10**6)).loss
            ),
        )
        return torch.autograd.grad(loss * scale, (hidden, weight))

    for tripled, single in zip(gradients(3.0), gradients(1.0), strict=True):
        torch.testing.assert_close(tripled, 3 * single)
