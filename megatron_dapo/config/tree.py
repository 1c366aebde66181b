"""The configuration tree, under the names of the public DAPO recipe.

Immutable, and each section checks itself when it is made; checks across sections are in `check.py`.
Batch sizes count prompts, as in the recipe; lengths count tokens; times are seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_dapo.config.bounds import ConfigError, above, at_least, at_most

LossAggMode = Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"]
LossScale = Literal["global", "group", "reference"]
KLPenalty = Literal["kl", "abs", "mse", "low_var_kl"]
OldLogProb = Literal["recompute", "rollout", "first_minibatch_free"]
OffloadPart = Literal["weights", "gradients", "optimizer"]
OnExhausted = Literal["carry", "error", "stop"]
Surplus = Literal["carry", "discard"]


@dataclass(frozen=True)
class DataConfig:
    train_files: tuple[str, ...] = ()  # parquet or JSONL, in the recipe's schema
    val_files: tuple[str, ...] = ()
    prompt_key: str = "prompt"
    truncation: Literal["left", "right", "middle", "error"] = "left"  # of prompts longer than max_prompt_length
    filter_overlong_prompts: bool = False  # leave them out instead
    max_prompt_length: int = 1024
    max_response_length: int = 1024
    train_batch_size: int = 64  # prompts accepted a step
    gen_batch_size: int | None = None  # prompts drawn at most in one generation batch; train_batch_size if absent
    shuffle: bool = True
    seed: int = 1

    def __post_init__(self) -> None:
        at_least(self, 1, "max_prompt_length", "max_response_length", "train_batch_size", "gen_batch_size")
        at_least(self, 0, "seed")


@dataclass(frozen=True)
class KLControlConfig:
    type: Literal["fixed"] = "fixed"
    kl_coef: float = 0.0

    def __post_init__(self) -> None:
        at_least(self, 0, "kl_coef")


@dataclass(frozen=True)
class FilterGroupsConfig:
    enable: bool = False
    metric: str = "acc"  # acc, score, seq_reward, seq_final_reward or a key that the reward function returns
    max_num_gen_batches: int = 0  # generation batches a step; 0 or less: no limit
    on_exhausted: OnExhausted = "carry"
    surplus: Surplus = "carry"
    max_staleness: int = 1  # policy versions that a carried group may be behind
    min_valid: int | None = None  # usable responses that a group needs; all n if absent

    def __post_init__(self) -> None:
        at_least(self, 0, "max_staleness")
        at_least(self, 1, "min_valid")
        if not self.metric:
            raise ConfigError("metric is empty: wanted acc, score, seq_reward, seq_final_reward or a reward's own key")


@dataclass(frozen=True)
class AlgorithmConfig:
    adv_estimator: Literal["grpo"] = "grpo"
    use_kl_in_reward: bool = False
    kl_penalty: KLPenalty = "kl"  # the estimator of the KL in the reward
    kl_ctrl: KLControlConfig = field(default_factory=KLControlConfig)
    filter_groups: FilterGroupsConfig = field(default_factory=FilterGroupsConfig)

    @property
    def kl_in_reward(self) -> bool:
        return self.use_kl_in_reward and self.kl_ctrl.kl_coef != 0

    def __post_init__(self) -> None:
        filtering = self.filter_groups
        if filtering.enable and filtering.metric == "seq_final_reward" and not self.use_kl_in_reward:
            raise ConfigError(
                "filter_groups.metric is seq_final_reward, the reward after KL, but use_kl_in_reward is false: "
                "use metric seq_reward, or set use_kl_in_reward=true"
            )


@dataclass(frozen=True)
class ModelConfig:
    path: str = ""  # a Hugging Face checkpoint: config, safetensors, tokenizer
    use_remove_padding: bool = True  # sequences packed into one row; false: a row a sequence, padded


@dataclass(frozen=True)
class OptimConfig:
    lr: float = 1e-6
    lr_warmup_steps: int = 0  # training steps (one rollout each), not optimizer updates
    lr_warmup_from_zero: bool = False  # the recipe: the first step trains at learning rate 0
    lr_decay_style: Literal["constant", "linear", "cosine"] = "constant"
    min_lr: float = 0.0
    weight_decay: float = 0.01
    weight_decay_all: bool = True  # norms and biases too, as the recipe; false: Megatron's default, which exempts them
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        at_least(self, 0, "lr", "lr_warmup_steps", "min_lr", "weight_decay")
        above(self, 0, "eps")
        if self.min_lr > self.lr:
            raise ConfigError(f"min_lr is {self.min_lr}: wanted at most lr, {self.lr}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas are {list(self.betas)}: wanted two numbers from 0 to below 1")


@dataclass(frozen=True)
class MegatronConfig:
    """Megatron's own settings under Megatron's own names."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    context_parallel_size: int = 1
    sequence_parallel: bool = False
    use_distributed_optimizer: bool = True
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    recompute_granularity: Literal["full", "selective"] | None = None
    recompute_method: Literal["uniform", "block"] | None = None
    recompute_num_layers: int | None = None
    params_dtype: Literal["float32", "bfloat16"] = "float32"
    optimizer_cpu_offload: bool = False

    @property
    def model_parallel_size(self) -> int:
        """GPUs that hold one copy of the model and of one micro-batch: tensor x pipeline x context."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    def __post_init__(self) -> None:
        at_least(self, 1, "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
        at_least(self, 1, "recompute_num_layers")
        at_least(self, 2, "virtual_pipeline_model_parallel_size")
        if self.virtual_pipeline_model_parallel_size is not None and self.pipeline_model_parallel_size == 1:
            raise ConfigError(
                f"virtual_pipeline_model_parallel_size is {self.virtual_pipeline_model_parallel_size} with "
                "pipeline_model_parallel_size 1: set a pipeline of at least 2, or leave it out"
            )
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise ConfigError(
                "sequence_parallel is true with tensor_model_parallel_size 1: it splits along the tensor-parallel "
                "group; set tensor_model_parallel_size to at least 2, or sequence_parallel=false"
            )
        if self.overlap_param_gather and not (self.use_distributed_optimizer and self.overlap_grad_reduce):
            raise ConfigError(
                "overlap_param_gather is true: it needs use_distributed_optimizer=true and overlap_grad_reduce=true"
            )
        self._check_recompute()

    def _check_recompute(self) -> None:
        full = self.recompute_granularity == "full"
        parts = {"recompute_method": self.recompute_method, "recompute_num_layers": self.recompute_num_layers}
        for name, value in parts.items():
            if full and value is None:
                raise ConfigError(
                    f"{name} is absent: recompute_granularity full needs recompute_method and recompute_num_layers "
                    "(uniform and 1 recompute each layer by itself)"
                )
            if not full and value is not None:
                raise ConfigError(
                    f"{name} is {value} with recompute_granularity {self.recompute_granularity}: "
                    "it belongs to recompute_granularity full; leave it out"
                )


@dataclass(frozen=True)
class SequenceRatioConfig:
    """GSPO (arXiv 2507.18071): one ratio a sequence, the geometric mean of its tokens', with its own clip."""

    enable: bool = False
    clip_ratio_low: float = 3e-4
    clip_ratio_high: float = 4e-4

    def __post_init__(self) -> None:
        above(self, 0, "clip_ratio_low", "clip_ratio_high")


@dataclass(frozen=True)
class RolloutCorrectionConfig:
    """For log-probs of engine and trainer that differ. Detached weights from old / rollout probability."""

    tis_cap: float | None = None  # truncated importance sampling: a token's policy loss times min(ratio, tis_cap)
    mis_low: float | None = None  # masked: a sequence whose ratio (the geometric mean over its tokens) is below it
    mis_high: float | None = None  # or above this one

    @property
    def masks(self) -> bool:
        return self.mis_low is not None or self.mis_high is not None

    def __post_init__(self) -> None:
        if self.tis_cap is not None:
            above(self, 0, "tis_cap")
        for name, bad in (("mis_low", (self.mis_low or 0) >= 1), ("mis_high", (self.mis_high or 2) <= 1)):
            if bad or (getattr(self, name) or 0) < 0:
                side = "from 0 to below 1" if name == "mis_low" else "above 1"
                raise ConfigError(f"{name} is {getattr(self, name)}: wanted {side}, so that a ratio of 1 is kept")


@dataclass(frozen=True)
class ActorConfig:
    ppo_mini_batch_size: int = 64  # prompts an optimizer update
    ppo_epochs: int = 1
    use_dynamic_bsz: bool = True
    ppo_max_token_len_per_gpu: int = 16384  # tokens a micro-batch holds on one GPU (times context_parallel_size in all)
    ppo_micro_batch_size_per_gpu: int | None = None  # sequences a micro-batch holds where use_dynamic_bsz is false
    clip_ratio_low: float = 0.2
    clip_ratio_high: float = 0.28
    clip_ratio_c: float = 10.0
    loss_agg_mode: LossAggMode = "token-mean"
    loss_scale: LossScale = "global"
    old_log_prob: OldLogProb = "recompute"  # whose log-probs the ratio is taken against; see docs/algorithm.md
    rollout_correction: RolloutCorrectionConfig = field(default_factory=RolloutCorrectionConfig)
    gspo: SequenceRatioConfig = field(default_factory=SequenceRatioConfig)
    entropy_coeff: float = 0.0
    use_kl_loss: bool = False
    kl_loss_coef: float = 0.0
    kl_loss_type: KLPenalty = "low_var_kl"
    grad_clip: float = 1.0
    offload: tuple[OffloadPart, ...] = ()  # what goes to host memory while engines on the same GPUs write
    optim: OptimConfig = field(default_factory=OptimConfig)
    megatron: MegatronConfig = field(default_factory=MegatronConfig)

    @property
    def kl_in_loss(self) -> bool:
        return self.use_kl_loss and self.kl_loss_coef != 0

    def __post_init__(self) -> None:
        at_least(self, 1, "ppo_mini_batch_size", "ppo_epochs", "ppo_max_token_len_per_gpu")
        at_least(self, 1, "ppo_micro_batch_size_per_gpu")
        above(self, 0, "clip_ratio_low", "clip_ratio_high")
        above(self, 1, "clip_ratio_c")
        at_least(self, 0, "kl_loss_coef", "grad_clip")
        if not self.use_dynamic_bsz and self.ppo_micro_batch_size_per_gpu is None:
            raise ConfigError(
                "ppo_micro_batch_size_per_gpu is absent and use_dynamic_bsz is false: "
                "give the sequences of a micro-batch, or set use_dynamic_bsz=true"
            )
        self._check_old_log_prob()

    def _check_old_log_prob(self) -> None:
        correction = self.rollout_correction
        if self.old_log_prob == "rollout" and (correction.masks or correction.tis_cap is not None):
            raise ConfigError(
                "old_log_prob is rollout, whose ratio is taken against the engine's log-probs already, and "
                "rollout_correction is set: leave that out, or use old_log_prob=recompute"
            )
        if self.old_log_prob == "first_minibatch_free" and correction.masks:
            raise ConfigError(
                "old_log_prob is first_minibatch_free and rollout_correction masks sequences: what a token weighs "
                "depends on which sequences are masked, and the first mini-batch's log-probs are not known before its "
                "pass; use old_log_prob=recompute, or tis_cap alone"
            )
        if self.old_log_prob == "first_minibatch_free" and self.ppo_epochs > 1:
            raise ConfigError(
                f"old_log_prob is first_minibatch_free with ppo_epochs {self.ppo_epochs}: in the second epoch the "
                "first mini-batch is no longer its own old policy; use old_log_prob=recompute, or ppo_epochs=1"
            )


@dataclass(frozen=True)
class ValKwargsConfig:
    n: int = 1  # responses a prompt
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    do_sample: bool = False  # false: greedy

    def __post_init__(self) -> None:
        at_least(self, 1, "n")
        at_least(self, 0, "temperature")
        above(self, 0, "top_p")
        at_most(self, 1, "top_p")
        if self.top_k < 1 and self.top_k != -1:
            raise ConfigError(f"top_k is {self.top_k}: wanted at least 1, or -1 for off")


@dataclass(frozen=True)
class WeightSyncConfig:
    """How the policy's weights reach the engines (docs/weight_sync.md)."""

    transport: Literal["auto", "in_process", "shared_memory", "broadcast", "cuda_ipc"] = "auto"
    bucket_bytes: int = 512 * 2**20  # of a bucket that weights travel in; a larger tensor has one to itself
    verify_every: int = 10  # pushes after the first, which is always verified; 0: the first alone
    probe_tolerance: float | None = None  # of a log-prob; if absent 1e-3 for float32 weights, 0.25 for bfloat16

    def __post_init__(self) -> None:
        at_least(self, 1, "bucket_bytes")
        at_least(self, 0, "verify_every", "probe_tolerance")


@dataclass(frozen=True)
class RolloutConfig:
    name: Literal["torch", "sglang", "vllm"] = "torch"  # the embedded engine, or a server (docs/engines.md)
    n: int = 8  # responses a prompt
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    max_num_seqs: int = 256  # sequences that an engine decodes at once
    nnodes: int | None = None  # of the rollout's own actors, where runtime.colocate is false; 1 if absent
    n_gpus_per_node: int | None = None  # likewise; as many as one engine takes if absent
    # What follows up to `deterministic` is not for the embedded engine, which has no such thing.
    tensor_model_parallel_size: int = 1  # GPUs of one engine
    gpu_memory_utilization: float = 0.5  # of a GPU's memory, for weights and cache together; not on a CPU
    enforce_eager: bool = False  # no CUDA graphs
    free_cache_engine: bool = True  # on the policy's GPUs: weights and cache give way while the policy works
    enable_chunked_prefill: bool = True
    max_num_batched_tokens: int = 8192  # tokens of a prefill's chunk
    deterministic: bool = False  # a response depends on its seed, not on its company: slower kernels, CUDA only
    log_prob_use_dynamic_bsz: bool = True
    log_prob_max_token_len_per_gpu: int | None = None  # ppo_max_token_len_per_gpu if absent
    val_kwargs: ValKwargsConfig = field(default_factory=ValKwargsConfig)
    weight_sync: WeightSyncConfig = field(default_factory=WeightSyncConfig)

    def __post_init__(self) -> None:
        at_least(self, 1, "n", "max_num_seqs", "log_prob_max_token_len_per_gpu")
        at_least(self, 1, "tensor_model_parallel_size", "max_num_batched_tokens", "nnodes", "n_gpus_per_node")
        if self.n_gpus_per_node is not None and self.n_gpus_per_node % self.tensor_model_parallel_size:
            raise ConfigError(
                f"n_gpus_per_node is {self.n_gpus_per_node} and an engine takes tensor_model_parallel_size "
                f"{self.tensor_model_parallel_size} GPUs of one node; give a multiple of that"
            )
        above(self, 0, "temperature", "gpu_memory_utilization")
        at_most(self, 1, "gpu_memory_utilization")
        for name, off in (("top_p", 1.0), ("top_k", -1)):
            if getattr(self, name) != off:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}: training samples from the whole distribution, which the "
                    f"importance ratio is taken against; wanted {off} ({name} for evaluation is in val_kwargs)"
                )


@dataclass(frozen=True)
class RefConfig:
    log_prob_use_dynamic_bsz: bool = True
    log_prob_max_token_len_per_gpu: int | None = None  # ppo_max_token_len_per_gpu if absent
    n_gpus_per_node: int | None = None  # actors of its own under Ray; absent: on the policy's, swapped with host memory
    nnodes: int = 1  # where those actors are

    @property
    def own_ranks(self) -> int:
        """0 where the reference lives on the policy's ranks."""
        return self.nnodes * (self.n_gpus_per_node or 0)

    def __post_init__(self) -> None:
        at_least(self, 1, "log_prob_max_token_len_per_gpu", "n_gpus_per_node", "nnodes")
        if self.nnodes > 1 and self.n_gpus_per_node is None:
            raise ConfigError(
                f"nnodes is {self.nnodes} and n_gpus_per_node is absent: for actors of its own give the GPUs of a node "
                "too, or leave nnodes out: the reference then lives on the policy's"
            )


@dataclass(frozen=True)
class ActorRolloutRefConfig:
    model: ModelConfig = field(default_factory=ModelConfig)
    actor: ActorConfig = field(default_factory=ActorConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    ref: RefConfig = field(default_factory=RefConfig)


@dataclass(frozen=True)
class OverlongBufferConfig:
    enable: bool = False
    len: int = 0
    penalty_factor: float = 1.0

    def __post_init__(self) -> None:
        at_least(self, 0, "len", "penalty_factor")
        if self.enable and self.len == 0:
            raise ConfigError("len is 0 with enable true: wanted the buffer's tokens, at least 1, or enable=false")


@dataclass(frozen=True)
class RewardModelConfig:
    reward_manager: Literal["dapo"] = "dapo"
    overlong_buffer: OverlongBufferConfig = field(default_factory=OverlongBufferConfig)
    overlong_filtering: bool = False  # a truncated response's tokens get weight 0
    default_verifier: str = "math_dapo"
    verifiers: dict[str, str] = field(default_factory=dict)  # data_source -> name of a verifier
    strict_box_verify: bool = False
    fallback_boxed: bool = False
    num_workers: int = 2  # processes that score
    timeout: float = 10.0  # seconds a response may take before its worker is killed
    max_retries: int = 1  # after a timeout or an error
    max_failure_rate: float = 0.1  # of a step's samples; above it the run stops

    def __post_init__(self) -> None:
        at_least(self, 1, "num_workers")
        above(self, 0, "timeout")
        at_least(self, 0, "max_retries", "max_failure_rate")
        at_most(self, 1, "max_failure_rate")


@dataclass(frozen=True)
class CustomRewardFunctionConfig:
    path: str | None = None
    name: str = "compute_score"


@dataclass(frozen=True)
class TrainerConfig:
    project_name: str = "megatron_dapo"
    experiment_name: str = "run"
    logger: tuple[str, ...] = ("console",)
    nnodes: int | None = None  # as the launcher started, if absent; 1 under Ray
    n_gpus_per_node: int | None = None  # likewise
    val_before_train: bool = True
    test_freq: int = -1  # training steps between evaluations; 0 or less: never
    save_freq: int = -1
    total_epochs: int = 1
    total_training_steps: int | None = None
    default_local_dir: str = "runs/default"
    resume_mode: str = "auto"  # auto (the newest whole checkpoint), disable or the path of a checkpoint
    async_save: bool = True  # training goes on while a checkpoint is written; false: it waits
    save_total_limit: int | None = None  # checkpoints kept, the newest; null: all
    fallback_local_dir: str | None = None  # a folder on another disk, this run's own, for when the first is full
    max_bad_updates: int = 3  # updates in a row with a NaN or infinite loss or gradient before the run stops
    log_samples: int = 64  # samples written to samples.jsonl a step
    stall_seconds: float | None = 45.0  # that a rank may stand still while others wait; then the run ends; null: never

    def __post_init__(self) -> None:
        above(self, 0, "stall_seconds")
        at_least(self, 1, "nnodes", "n_gpus_per_node", "total_epochs", "total_training_steps", "max_bad_updates")
        at_least(self, 1, "save_total_limit")
        at_least(self, 0, "log_samples")


@dataclass(frozen=True)
class RuntimeConfig:
    """Who starts the ranks. `runtime=ray` is short for `runtime.name=ray`."""

    name: Literal["spmd", "ray"] = "spmd"  # this process or those that torchrun started; or a Ray actor each
    address: str | None = None  # of a Ray cluster; RAY_ADDRESS if absent; without both, one on this machine is started
    colocate: bool = True  # policy and rollout in the same actors, or each in its own
    placement_timeout: float = 60.0  # seconds to wait for room on the cluster

    def __post_init__(self) -> None:
        above(self, 0, "placement_timeout")
        if not self.colocate and self.name != "ray":
            raise ConfigError(
                f"colocate is false and name is {self.name}, which has one kind of rank; use runtime=ray, or colocate"
            )


@dataclass(frozen=True)
class RunConfig:
    data: DataConfig = field(default_factory=DataConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    actor_rollout_ref: ActorRolloutRefConfig = field(default_factory=ActorRolloutRefConfig)
    reward_model: RewardModelConfig = field(default_factory=RewardModelConfig)
    custom_reward_function: CustomRewardFunctionConfig = field(default_factory=CustomRewardFunctionConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    @property
    def needs_reference(self) -> bool:
        """A KL term is part of the loss or of the rewards."""
        return self.algorithm.kl_in_reward or self.actor_rollout_ref.actor.kl_in_loss

    @property
    def shares_reference(self) -> bool:
        """The reference lives on the policy's ranks."""
        return self.needs_reference and not self.actor_rollout_ref.ref.own_ranks
