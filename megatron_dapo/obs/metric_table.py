"""Every metric that is logged: name, unit, meaning. The documentation is made from this table.

A `{...}` in a name stands for any text, `{k}` for a number.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Metric(NamedTuple):
    unit: str
    meaning: str


METRICS: dict[str, Metric] = {
    "reward/mean": Metric("reward", "verifier's score + overlong penalty, less KL where it is in the reward: the mean"),
    "reward/score": Metric("score", "verifier's score alone, the mean"),
    "reward/accuracy": Metric("share", "responses of the accepted groups that are right"),
    "reward/overlong_penalty": Metric("reward", "overlong penalty, the mean; 0 or less"),
    "reward/unparsable_share": Metric("share", "responses in which the verifier found no answer"),
    "response/length_mean": Metric("tokens", "response length, the mean; prompts apart"),
    "response/length_max": Metric("tokens", "longest response"),
    "response/length_min": Metric("tokens", "shortest response"),
    "response/truncated_share": Metric("share", "responses cut off at data.max_response_length"),
    "response/repetition": Metric("share", "n-grams of a response that occurred in it before, the mean over responses"),
    "sampling/accuracy": Metric("share", "right responses of all scored, before groups are dropped"),
    "sampling/score": Metric("score", "verifier's score of all scored, before groups are dropped: the mean"),
    "sampling/kept_share": Metric("share", "groups accepted, of those generated"),
    "sampling/prompts_drawn": Metric("prompts", "taken from the dataset, those drawn again too"),
    "sampling/prompts_redrawn": Metric("prompts", "drawn once more, because their first group was short"),
    "sampling/generation_batches": Metric("batches", "rounds of generation"),
    "sampling/groups_generated": Metric("groups", "with every response scored or given up"),
    "sampling/groups_accepted": Metric("groups", "that teach something, and are kept"),
    "sampling/groups_uniform": Metric("groups", "dropped: the filter's metric is the same for all responses"),
    "sampling/groups_short": Metric("groups", "dropped: too few responses with a score"),
    "sampling/groups_all_right": Metric("groups", "in which every response is right, kept or not"),
    "sampling/groups_all_wrong": Metric("groups", "in which every response is wrong, kept or not"),
    "sampling/groups_uniform_other": Metric("groups", "uniform, but neither all right nor all wrong"),
    "sampling/groups_used": Metric("groups", "trained on in this step"),
    "sampling/groups_carried_in": Metric("groups", "accepted in an earlier step and not used there"),
    "sampling/groups_carried_out": Metric("groups", "accepted and left for the next step"),
    "sampling/groups_stale": Metric("groups", "carried, then dropped: made by too old a policy"),
    "sampling/groups_discarded": Metric("groups", "surplus that was not to be carried"),
    "sampling/samples_scored": Metric("responses", "that a verifier could judge"),
    "sampling/samples_unparsable": Metric("responses", "of those scored: no answer could be read"),
    "sampling/samples_timeout": Metric("responses", "left out: scoring took too long"),
    "sampling/samples_error": Metric("responses", "left out: scoring failed"),
    "sampling/samples_abort": Metric("responses", "left out: the engine gave them up at every try"),
    "sampling/aborts_retried": Metric("requests", "submitted again, because the engine gave them up"),
    "actor/loss": Metric("loss", "what is minimised, summed over a mini-batch; the mean over the step's updates"),
    "actor/policy_loss": Metric("loss", "its clipped policy term alone"),
    "actor/kl_loss": Metric("nats/token", "its KL term, before its coefficient"),
    "actor/entropy": Metric("nats/token", "entropy of the policy on the trained tokens"),
    "actor/approx_kl": Metric("nats/token", "KL of the old policy to the new one, estimated on the trained tokens"),
    "actor/ratio": Metric("ratio", "new over old probability of a token, the mean"),
    "actor/clipped_high": Metric("share", "tokens whose ratio was clipped at 1 + clip_ratio_high"),
    "actor/clipped_low": Metric("share", "tokens whose ratio was clipped at 1 - clip_ratio_low"),
    "actor/dual_clipped": Metric("share", "tokens whose loss was limited by clip_ratio_c"),
    "actor/clamped": Metric("share", "tokens whose log-ratio was clamped before the exponential"),
    "actor/tis_weight": Metric(
        "ratio", "truncated importance weight (trainer over engine) of a token, the mean; 0: off"
    ),
    "actor/tis_capped": Metric("share", "tokens whose importance weight was above its cap"),
    "actor/grad_norm": Metric("norm", "gradient norm before clipping, the mean over the step's updates"),
    "actor/lr": Metric("rate", "learning rate of the step's last update"),
    "actor/updates": Metric("updates", "optimizer updates of the step, skipped ones apart"),
    "actor/skipped_updates": Metric("updates", "updates skipped for a NaN or infinite loss or gradient"),
    "left_out/truncated_sequences": Metric("responses", "not trained on: truncated, under overlong_filtering"),
    "left_out/masked_sequences": Metric("responses", "not trained on: engine and trainer differ more than mis_* allow"),
    "left_out/nonfinite_tokens": Metric("tokens", "not trained on: a log-prob is NaN or infinite"),
    "mismatch/logp_diff_mean": Metric("nats", "|trainer's - engine's log-prob| of a sampled token, the mean"),
    "mismatch/logp_diff_max": Metric("nats", "the same, the largest"),
    "mismatch/kl_k1": Metric("nats/token", "KL of the engine's to the trainer's policy, the plain estimate"),
    "mismatch/kl_k3": Metric("nats/token", "the same, the estimate that is never negative"),
    "mismatch/ess_tokens": Metric("share", "effective sample size of the tokens' importance weights; 1 where equal"),
    "mismatch/ess_sequences": Metric("share", "effective sample size of the sequences' importance weights"),
    "throughput/tokens_per_second": Metric("tokens/s", "prompt and response tokens trained on, over the whole step"),
    "throughput/generated_per_second": Metric("tokens/s", "response tokens written, those dropped too, over rollout"),
    "memory/resident": Metric("GiB", "memory of the trainer's process"),
    "memory/resident_peak": Metric("GiB", "the most it has had since its start"),
    "memory/gpu_allocated_peak": Metric("GiB", "the most that tensors took on the GPU in the step"),
    "memory/gpu_reserved_peak": Metric("GiB", "the most that PyTorch took from the GPU in the step"),
    "seconds/step": Metric("s", "wall time of the step"),
    "seconds/step_cpu": Metric("s", "CPU time of the trainer's process in the step"),
    "seconds/save": Metric("s", "training stood still for the checkpoint that was begun after the step before"),
    "seconds/publish": Metric("s", "training stood still to look after a checkpoint that is being written"),
    "seconds/sync": Metric("s", "the new weights' way into the engines"),
    "seconds/turns": Metric("s", "policy and engines gave each other room on the devices: sleep, wake, offloading"),
    "seconds/{phase}": Metric("s", "wall time of a phase; one inside another is written outer/inner"),
    "val/{source}/avg@{k}": Metric("share", "right responses, k a problem"),
    "val/{source}/pass@{k}": Metric("share", "problems with a right response among k"),
    "val/{source}/cons@{k}": Metric("share", "problems whose most frequent answer of k is right"),
    "val/{source}/{figure}@{k}_low": Metric("share", "lower end of the figure's 95 % confidence interval"),
    "val/{source}/{figure}@{k}_high": Metric("share", "upper end of it"),
    "val/{source}/problems": Metric("problems", "distinct problems evaluated"),
    "val/{source}/responses": Metric("responses", "written, n a row of the dataset"),
    "val/{source}/failed": Metric("responses", "without a score (reward failed, engine gave up): counted as wrong"),
    "val/{source}/unparsable_share": Metric("share", "responses in which the verifier found no answer"),
    "val/{source}/length_mean": Metric("tokens", "response length, the mean"),
    "val/{source}/truncated_share": Metric("share", "responses cut off at the length limit"),
}


def find_metric(name: str) -> Metric | None:
    """What `name` means, or None where it is not in the table. Exact names come before patterns."""
    if name in METRICS:
        return METRICS[name]
    return next((metric for pattern, metric in METRICS.items() if _expression(pattern).fullmatch(name)), None)


def _expression(pattern: str) -> re.Pattern[str]:
    parts = re.split(r"(\{\w+\})", pattern)
    wild = {"{k}": r"\d+"}
    return re.compile("".join(wild.get(part, ".+") if part.startswith("{") else re.escape(part) for part in parts))
