"""The counters of dynamic sampling. Each thing is counted where it happens, once."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class SamplingStats:
    """Counts of one training step, or summed over a run.

    prompts_drawn = groups_generated = groups_accepted + groups_uniform + groups_short
    groups_carried_in + groups_accepted = groups_used + groups_carried_out + groups_stale + groups_discarded
    groups_generated x n = samples_scored + samples_timeout + samples_error + samples_abort
    """

    prompts_drawn: int = 0
    prompts_redrawn: int = 0  # of those drawn: once more, because their first group was short
    generation_batches: int = 0
    groups_generated: int = 0  # every response scored or given up
    groups_accepted: int = 0
    groups_uniform: int = 0  # dropped: the metric is the same for all responses
    groups_short: int = 0  # dropped: too few responses with a score
    groups_all_right: int = 0  # by acc, among those generated and not short, dropped or not
    groups_all_wrong: int = 0  # likewise
    groups_uniform_other: int = 0  # of those uniform: neither all right nor all wrong
    groups_used: int = 0
    groups_carried_in: int = 0  # accepted in an earlier step and not used there
    groups_carried_out: int = 0
    groups_stale: int = 0  # carried, then dropped: made by too old a policy
    groups_discarded: int = 0  # surplus that was not to be carried
    samples_scored: int = 0
    samples_unparsable: int = 0  # of those scored: no answer could be read
    samples_timeout: int = 0  # left out, as are the next two
    samples_error: int = 0
    samples_abort: int = 0  # the engine gave the response up at every try
    aborts_retried: int = 0  # requests submitted again because the engine gave them up
    acc_sum: float = 0.0  # over the samples scored, where the reward function returns acc
    score_sum: float = 0.0  # over the samples scored

    def __add__(self, other: SamplingStats) -> SamplingStats:
        return SamplingStats(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(SamplingStats)))
