"""The one-pass loss against plain autograd through full logits in float64; ranks of a group are threads."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_dapo.algo.loss import PolicyLossConfig
from megatron_dapo.config.tree import KLPenalty
from megatron_dapo.mcore.batch import HeadTerms
from megatron_dapo.mcore.fused import blocked
from megatron_dapo.mcore.fused_loss import SUMS, HeadResult, MainGrad, Objective, Vocabulary, dapo_loss, token_logp
from tests.unit.mcore.thread_ranks import on_ranks

LOW, HIGH, DUAL = 0.2, 0.28, 10.0
PROPERTIES = settings(max_examples=40)


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
    tis_cap: float | None = None
    ratio: str = "token"
    own_old_policy: bool = False
    tp_size: int = 1
    chunk: int = 1000  # tokens whose logits are held at once
    dtype: torch.dtype = torch.float64
    sequences: int = 5
    hidden: Tensor = field(init=False)
    weight: Tensor = field(init=False)
    targets: Tensor = field(init=False)
    terms: HeadTerms = field(init=False)

    def __post_init__(self) -> None:
        draw = torch.Generator().manual_seed(7)

        def normal(*dims: int) -> Tensor:
            return torch.randn(dims, generator=draw, dtype=torch.float64).to(self.dtype)

        make = object.__setattr__
        make(self, "hidden", normal(self.n, self.h))
        make(self, "weight", normal(self.v, self.h))
        make(self, "targets", torch.randint(self.v, (self.n,), generator=draw))
        make(self, "terms", self._terms(draw))

    def _terms(self, draw: torch.Generator) -> HeadTerms:
        def normal(count: int) -> Tensor:
            return torch.randn(count, generator=draw).to(torch.promote_types(self.dtype, torch.float32))

        logp = self.softmax(self.hidden.double(), self.weight.double())[0].to(normal(0).dtype)
        token, shifts = torch.arange(self.n), torch.tensor([0.0, 0.1, -0.1, 0.6, -0.6, 2.8, 25.0, -25.0])
        sequence = torch.randint(self.sequences, (self.n,), generator=draw)
        if self.ratio == "sequence":  # a shift of its own for each, and little about it
            shift, advantage = shifts[:6][sequence % 6] + 0.05 * normal(self.n), normal(self.sequences)[sequence]
        else:
            shift, advantage = shifts[token % len(shifts)], normal(self.n)
        return HeadTerms(
            weight=normal(self.n).abs() * (token % 5 != 3),
            advantage=advantage,
            old_logp=None if self.own_old_policy else logp - shift,
            ref_logp=logp + 0.4 * normal(self.n) if self.kl_coef else None,
            rollout_logp=logp - shift + 0.5 * normal(self.n) if self.tis_cap else None,
            sequence=sequence,
            num_sequences=self.sequences,
        )

    def softmax(self, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Log-prob of the target and entropy, [n] each."""
        log_softmax = (hidden @ weight.T / self.temperature).log_softmax(-1)
        return log_softmax.gather(1, self.targets[:, None])[:, 0], -(log_softmax.exp() * log_softmax).sum(-1)

    @property
    def objective(self) -> Objective:
        clip = PolicyLossConfig(LOW, HIGH, DUAL)
        terms: Any = (self.entropy_coeff, self.kl_coef, self.kl_kind, self.tis_cap, self.ratio)
        return Objective(clip, self.temperature, *terms)


@dataclass(frozen=True)
class Found:
    loss: Tensor
    sums: dict[str, float]
    logp: Tensor
    entropy: Tensor
    d_hidden: Tensor
    d_weight: Tensor


def plain(case: Case) -> Found:
    """The loss written out in float64, and autograd."""
    hidden, weight = (x.double().clone().requires_grad_() for x in (case.hidden, case.weight))
    w, advantage = case.terms.weight.double(), case.terms.advantage.double()
    logp, entropy = case.softmax(hidden, weight)
    old = logp.detach() if case.terms.old_logp is None else case.terms.old_logp.double()
    log_ratio = logp - old
    if case.ratio == "sequence":
        means = [
            (log_ratio * here).sum() / here.sum().clamp(min=1)
            for here in ((case.terms.sequence == s) & (w != 0) for s in range(case.sequences))
        ]
        log_ratio = torch.stack(means)[case.terms.sequence]
    ratio = log_ratio.clamp(-20, 20).exp()
    free, bounded = -advantage * ratio, -advantage * ratio.clamp(1 - LOW, 1 + HIGH)
    policy = torch.maximum(free, bounded)
    dual = (advantage < 0) & (policy > -advantage * DUAL)
    policy = torch.where(dual, -advantage * DUAL, policy)
    tis, capped = torch.zeros_like(w), torch.zeros_like(w)
    if case.terms.rollout_logp is not None and case.tis_cap is not None:
        tis = (old - case.terms.rollout_logp.double()).exp()
        capped, tis = tis > case.tis_cap, tis.clamp(max=case.tis_cap)
        policy = policy * tis
    kl = torch.zeros_like(logp)
    if case.terms.ref_logp is not None:
        gap = case.terms.ref_logp.double() - logp
        kl = {"low_var_kl": gap.exp() - gap - 1, "kl": -gap, "mse": gap**2 / 2, "abs": gap.abs()}[case.kl_kind]
    loss = (w * (policy + case.kl_coef * kl - case.entropy_coeff * entropy)).sum()
    loss.backward()
    per_token = {
        "tokens": torch.ones_like(w),
        "entropy": entropy,
        "approx_kl": old - logp,
        "clipped_high": (advantage > 0) & (ratio > 1 + HIGH),
        "clipped_low": (advantage < 0) & (ratio < 1 - LOW),
        "dual_clipped": dual,
        "clamped": log_ratio.abs() > 20,
        "ratio": ratio,
        "tis_weight": tis,
        "tis_capped": capped,
    }
    sums = {name: ((w != 0) * values.double()).sum().item() for name, values in per_token.items()}
    sums |= {"loss": loss.item(), "policy_loss": (w * policy).sum().item(), "kl_loss": (w * kl).sum().item()}
    assert hidden.grad is not None
    assert weight.grad is not None
    return Found(loss.detach(), sums, logp.detach(), entropy.detach(), hidden.grad, weight.grad)


def one_pass(case: Case) -> Found:
    rows = -(-case.v // case.tp_size)
    padding = torch.full((rows * case.tp_size - case.v, case.h), 50.0, dtype=case.dtype)
    padded = torch.cat([case.weight, padding])

    def rank(group: dist.ProcessGroup) -> tuple[HeadResult, Tensor, Tensor]:
        hidden = case.hidden.clone().requires_grad_()
        weight = padded[group.rank() * rows : (group.rank() + 1) * rows].clone().requires_grad_()
        vocabulary = Vocabulary(case.v, group, logits_bytes=8 * rows * case.chunk)
        result = dapo_loss(hidden, weight, case.targets, case.terms, case.objective, vocabulary)
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


def check(case: Case, tolerance: float = 1e-9) -> None:
    """Tensors within `tolerance` of the largest entry, sums likewise."""
    found, wanted = one_pass(case), plain(case)
    for what in ("loss", "logp", "entropy", "d_hidden", "d_weight"):
        a, b = getattr(found, what).double(), getattr(wanted, what)
        scale = max(1.0, b.abs().max().item() if b.numel() else 0.0)
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * scale, msg=lambda text, what=what: f"{what}: {text}")
    assert found.sums == pytest.approx(wanted.sums, rel=tolerance, abs=100 * tolerance)


CASES = {
    "plain": Case(),
    "temperature": Case(temperature=0.6),
    "entropy bonus": Case(entropy_coeff=0.3),
    "KL to the reference": Case(kl_coef=0.5),
    "all terms": Case(temperature=1.7, entropy_coeff=0.3, kl_coef=0.5, kl_kind="mse"),
    "truncated importance sampling": Case(tis_cap=1.2, kl_coef=0.5, entropy_coeff=0.3),
    "its own old policy": Case(own_old_policy=True),
    "its own old policy, corrected": Case(own_old_policy=True, tis_cap=1.2),
    "sequence ratios": Case(ratio="sequence"),
    "sequence ratios, all terms, several chunks": Case(
        ratio="sequence", tis_cap=1.2, kl_coef=0.5, entropy_coeff=0.3, temperature=0.7, chunk=7
    ),
    "sequence ratios, its own old policy": Case(ratio="sequence", own_old_policy=True, tis_cap=1.2),
    "sequence ratios over two ranks": Case(ratio="sequence", tp_size=2),
    "chunks that end with the tokens": Case(chunk=10),
    "a last chunk of one token": Case(n=5, chunk=2, entropy_coeff=0.3),
    "a token at a time": Case(chunk=0),
    "one token": Case(n=1),
    "no token": Case(n=0),
    "two ranks": Case(tp_size=2, entropy_coeff=0.3),
    "four ranks, all terms, several chunks": Case(
        tp_size=4, temperature=0.8, entropy_coeff=0.3, kl_coef=0.5, kl_kind="kl", chunk=7
    ),
    "a rank with nothing but padding": Case(v=5, tp_size=4, entropy_coeff=0.3),
}


@pytest.fixture(params=[2 * 2**20, 8 * 3 * 40], ids=["one block", "blocks of a few rows"])
def block_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked, "BLOCK_BYTES", request.param)


@pytest.mark.usefixtures("block_bytes")
@pytest.mark.parametrize("name", CASES)
def test_loss_sums_and_gradients_are_those_of_autograd_through_full_logits(name: str):
    check(CASES[name])


@pytest.mark.parametrize("name", ["all terms", "four ranks, all terms, several chunks", "sequence ratios"])
def test_float32_keeps_its_precision(name: str):
    check(replace(CASES[name], dtype=torch.float32), tolerance=2e-5)


@pytest.mark.usefixtures("block_bytes")
@pytest.mark.parametrize("name", ["all terms", "two ranks", "sequence ratios"])
def test_bfloat16_rounds_nothing_but_the_gradients_that_it_returns(name: str):
    case = replace(CASES[name], dtype=torch.bfloat16)
    found, wanted = one_pass(case), plain(case)
    assert found.d_hidden.dtype == found.d_weight.dtype == torch.bfloat16
    torch.testing.assert_close(found.logp.double(), wanted.logp, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.loss.double(), wanted.loss, rtol=1e-5, atol=1e-5)
    for a, b in ((found.d_hidden, wanted.d_hidden), (found.d_weight, wanted.d_weight)):
        ranks = case.tp_size  # each rank's share of d_hidden is rounded
        torch.testing.assert_close(a.double(), b, rtol=0, atol=ranks * 2**-8 * b.abs().max().item())


def test_the_cases_reach_every_branch():
    sums = plain(CASES["plain"]).sums
    counts = ("clipped_high", "clipped_low", "dual_clipped", "clamped")
    assert all(0 < sums[name] < sums["tokens"] for name in counts)
    assert sums["tokens"] < CASES["plain"].n
    sums = plain(CASES["truncated importance sampling"]).sums
    assert 0 < sums["tis_capped"] < sums["tokens"]
    sums = plain(CASES["sequence ratios"]).sums
    assert 0 < sums["clipped_high"] + sums["clipped_low"] < sums["tokens"]


sizes = st.fixed_dictionaries(
    {"n": st.integers(0, 33), "h": st.integers(1, 9), "v": st.integers(2, 37), "chunk": st.integers(0, 40)}
)
kinds = st.fixed_dictionaries(
    {
        "tp_size": st.sampled_from([1, 2, 3]),
        "temperature": st.sampled_from([1.0, 0.7]),
        "entropy_coeff": st.sampled_from([0.0, 0.2]),
        "tis_cap": st.sampled_from([None, 1.1]),
        "ratio": st.sampled_from(["token", "sequence"]),
        "own_old_policy": st.booleans(),
        "sequences": st.integers(1, 6),
    }
)


@given(sizes, kinds)
@PROPERTIES
def test_any_sizes_give_autograd_through_full_logits(size: dict[str, int], kind: dict[str, Any]):
    check(Case(**size, **kind))


def test_confident_and_far_off_logits_stay_finite_and_exact():
    case = Case(v=7, tp_size=2, entropy_coeff=0.3)
    case.weight.mul_(200.0)
    found = one_pass(case)
    with torch.no_grad():
        logp, entropy = case.softmax(case.hidden, case.weight)
    torch.testing.assert_close(found.logp, logp)
    torch.testing.assert_close(found.entropy, entropy)
    assert found.d_hidden.isfinite().all()
    assert found.d_weight.isfinite().all()


@pytest.mark.parametrize("entropy_coeff", [0.0, 0.3])
def test_float32_keeps_the_small_gradient_of_targets_that_are_nearly_certain(entropy_coeff: float):
    """Every target's 1 - p is about 1e-3: what cancels, cancels to the rounding of p, not of the sums' terms."""
    case = Case(n=64, h=16, v=16, entropy_coeff=entropy_coeff, own_old_policy=True, dtype=torch.float32)
    case.weight.copy_(torch.eye(16))
    case.hidden.copy_(10.0 * torch.nn.functional.one_hot(case.targets, 16) + 0.1 * case.hidden)
    found, wanted = one_pass(case), plain(case)
    assert (wanted.logp.expm1() > -5e-3).all()
    for a, b in ((found.d_hidden, wanted.d_hidden), (found.d_weight, wanted.d_weight)):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=2e-4 * b.abs().max().item())


def test_a_token_of_weight_0_gives_no_gradient():
    case = CASES["all terms"]
    silent = case.terms.weight == 0
    assert silent.any()
    d_hidden = one_pass(case).d_hidden
    assert not d_hidden[silent].any()
    assert d_hidden[~silent].any(1).sum() > len(d_hidden) / 3


def test_the_gradient_is_scaled_by_what_comes_from_above():
    def gradients(scale: float) -> tuple[Tensor, ...]:
        hidden, weight, result = with_gradient(CASES["plain"], None)
        return torch.autograd.grad(result.loss * scale, (hidden, weight))

    for tripled, single in zip(gradients(3.0), gradients(1.0), strict=True):
        torch.testing.assert_close(tripled, 3 * single)


def test_into_main_grad_goes_what_autograd_would_get_and_it_is_added():
    case = CASES["all terms"]
    buffer = torch.ones_like(case.weight)
    hidden, weight, result = with_gradient(case, MainGrad(buffer, shared=False))
    result.loss.backward()
    wanted = plain(case)
    torch.testing.assert_close(buffer, 1 + wanted.d_weight)
    torch.testing.assert_close(hidden.grad, wanted.d_hidden)
    assert weight.grad is not None  # Megatron's hook wants one; it holds nothing
    assert weight.grad.is_sparse
    assert weight.grad._nnz() == 0


def test_the_bfloat16_weights_main_grad_is_summed_in_float32():
    case = replace(CASES["plain"], dtype=torch.bfloat16, chunk=3)
    buffer = torch.zeros_like(case.weight, dtype=torch.float32)
    with_gradient(case, MainGrad(buffer, shared=False))
    torch.testing.assert_close(buffer.double(), plain(case).d_weight, rtol=0, atol=2e-5)


def test_a_weight_that_is_the_embeddings_too_gets_the_embeddings_gradient_alone_from_autograd():
    case = CASES["plain"]
    buffer = torch.zeros_like(case.weight)
    weight = case.weight.clone().requires_grad_()
    embedded = torch.nn.functional.embedding(case.targets, weight)
    (vocabulary,) = on_ranks(1, lambda group: Vocabulary(case.v, group, 10**6))
    main_grad = MainGrad(buffer, shared=True)
    result = dapo_loss(embedded, weight, case.targets, case.terms, case.objective, vocabulary, main_grad=main_grad)
    result.loss.backward()
    other = case.weight.clone().requires_grad_()
    dapo_loss(
        torch.nn.functional.embedding(case.targets, other),
        other,
        case.targets,
        case.terms,
        case.objective,
        vocabulary,
    ).loss.backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad + buffer, other.grad)
    assert buffer.any()


def test_a_scaled_loss_is_refused_once_the_weights_gradient_is_in_main_grad():
    case = CASES["plain"]
    _, _, result = with_gradient(case, MainGrad(torch.zeros_like(case.weight), shared=False))
    with pytest.raises(RuntimeError, match="in main_grad already"):
        (result.loss * 2).backward()


def test_without_gradients_main_grad_is_left_alone():
    case = CASES["plain"]
    buffer = torch.zeros_like(case.weight)
    with torch.no_grad():
        _, _, result = with_gradient(case, MainGrad(buffer, shared=False))
    assert not buffer.any()
    torch.testing.assert_close(result.loss, plain(case).loss)


def test_a_cap_without_the_engines_log_probs_is_refused():
    case = CASES["truncated importance sampling"]
    object.__setattr__(case := replace(case), "terms", replace(case.terms, rollout_logp=None))
    with pytest.raises(ValueError, match=r"tis_cap is 1\.2 and the batch has no rollout_logp"):
        with_gradient(case, None)


@pytest.mark.parametrize("name", ["sequence ratios", "sequence ratios, its own old policy"])
def test_sequences_cut_over_context_parallel_ranks_have_one_ratio(name: str):
    case, wanted = CASES[name], plain(CASES[name])
    (alone,) = on_ranks(1, lambda group: Vocabulary(case.v, group, 10**6))

    def rank(context: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
        mine = torch.arange(case.n) % 3 == 0 if context.rank() == 0 else torch.arange(case.n) % 3 != 0
        hidden, weight = case.hidden[mine].requires_grad_(), case.weight.clone().requires_grad_()
        terms = HeadTerms(*(x[mine] if isinstance(x, Tensor) else x for x in vars(case.terms).values()))
        result = dapo_loss(hidden, weight, case.targets[mine], terms, case.objective, alone, context)
        result.loss.backward()
        d_hidden = torch.zeros_like(case.hidden)
        assert hidden.grad is not None
        assert weight.grad is not None
        d_hidden[mine] = hidden.grad
        return result.sums, d_hidden, weight.grad

    sums, d_hidden, d_weight = (sum(parts) for parts in zip(*on_ranks(2, rank), strict=True))
    assert dict(zip(SUMS, sums.tolist(), strict=True)) == pytest.approx(wanted.sums, rel=1e-9, abs=1e-9)
    torch.testing.assert_close(d_hidden, wanted.d_hidden)
    torch.testing.assert_close(d_weight, wanted.d_weight)


def with_gradient(case: Case, main_grad: MainGrad | None) -> tuple[Tensor, Tensor, HeadResult]:
    """Leaf hidden states and weight of one rank, and the result on them."""
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    (vocabulary,) = on_ranks(1, lambda group: Vocabulary(case.v, group, 8 * case.v * case.chunk))
    terms = (case.targets, case.terms, case.objective, vocabulary)
    return hidden, weight, dapo_loss(hidden, weight, *terms, main_grad=main_grad)
