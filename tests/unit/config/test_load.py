from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dapo.config.load import load_config, nearest_name, to_yaml
from megatron_dapo.config.tree import ConfigError, DataConfig, RewardModelConfig, RunConfig, TrainerConfig


@pytest.fixture
def write(tmp_path):
    def _write(text: str) -> str:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return str(path)

    return _write


def test_without_a_file_and_overrides_the_defaults_stand():
    assert load_config(None, []).config == RunConfig()
    assert load_config(None, []).notices == ()


def test_an_override_wins_over_the_file_and_the_last_override_over_the_first(write):
    path = write("data: {train_batch_size: 8, seed: 3}\ntrainer:\n  logger: [console, wandb]\n")
    config = load_config(
        path, ["data.train_batch_size=16", "data.train_batch_size=32", "trainer.logger=[jsonl]"]
    ).config
    assert config.data.train_batch_size == 32
    assert config.data.seed == 3
    assert config.trainer.logger == ("jsonl",)


@pytest.mark.parametrize("prefix", ["", "+", "++"])
def test_the_prefixes_of_hydra_are_taken(prefix):
    assert load_config(None, [f"{prefix}data.seed=7"]).config.data.seed == 7


@pytest.mark.parametrize("text", ["['console','wandb']", "[console,wandb]", '["console", "wandb"]'])
def test_a_list_is_read_with_and_without_quotes(text):
    assert load_config(None, [f"trainer.logger={text}"]).config.trainer.logger == ("console", "wandb")


def test_one_file_is_taken_for_a_list_of_one():
    assert load_config(None, ["data.train_files=a.parquet"]).config.data.train_files == ("a.parquet",)


@pytest.mark.parametrize("text, value", [("1e-6", 1e-6), ("1E-6", 1e-6), (".5e-3", 5e-4), ("1", 1.0), ("0.", 0.0)])
def test_a_number_is_read_in_every_spelling(text, value):
    lr = load_config(None, [f"actor_rollout_ref.actor.optim.lr={text}"]).config.actor_rollout_ref.actor.optim.lr
    assert (lr, type(lr)) == (value, float)


def test_null_takes_an_optional_setting_back(write):
    path = write("data:\n  gen_batch_size: 12\n")
    assert load_config(path, ["data.gen_batch_size=null"]).config.data.gen_batch_size is None


def test_a_value_may_be_that_of_another_setting_defaults_included(write):
    path = write("trainer:\n  default_local_dir: runs/${trainer.experiment_name}-${data.seed}\n")
    config = load_config(path, ["trainer.experiment_name=x", "data.gen_batch_size=${data.train_batch_size}"]).config
    assert config.trainer.default_local_dir == "runs/x-1"
    assert config.data.gen_batch_size == RunConfig().data.train_batch_size


def test_verifiers_are_named_by_data_source(write):
    path = write('reward_model:\n  verifiers: {aime: math_verify, "v1.1": math_dapo}\n')
    config = load_config(path, ["reward_model.verifiers.openai/gsm8k=math_verify"]).config
    assert config.reward_model.verifiers == {
        "aime": "math_verify",
        "v1.1": "math_dapo",
        "openai/gsm8k": "math_verify",
    }


@pytest.mark.parametrize(
    "key, nearest",
    [
        ("data.train_batchsize", "data.train_batch_size"),
        ("trainer.train_batch_size", "data.train_batch_size"),
        ("lr", "actor_rollout_ref.actor.optim.lr"),
        ("actor_rollout_ref.actor.clip_ratio_hi", "actor_rollout_ref.actor.clip_ratio_high"),
        ("actor.ppo_mini_batch_size", "actor_rollout_ref.actor.ppo_mini_batch_size"),
        ("actor_rollout_ref.rollout.gpu_mem_utilization", "actor_rollout_ref.rollout.gpu_memory_utilization"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_name(key, nearest):
    with pytest.raises(ConfigError, match=rf"^unknown key {key}; the nearest is {nearest}$"):
        load_config(None, [f"{key}=1"])


def test_all_unknown_keys_are_named_at_once(write):
    with pytest.raises(ConfigError) as caught:
        load_config(write("data: {sede: 1}\noptim:\n  lr: 1\n"), ["trainer.loggers=x"])
    assert str(caught.value).splitlines() == [
        "unknown key data.sede; the nearest is data.seed",
        "unknown key optim.lr; the nearest is actor_rollout_ref.actor.optim.lr",
        "unknown key trainer.loggers; the nearest is trainer.logger",
    ]


def test_every_setting_is_nearest_to_itself():
    for key in ("data.seed", "trainer.logger", "actor_rollout_ref.rollout.val_kwargs.n", "actor_rollout_ref.rollout.n"):
        assert nearest_name(key) == key


@pytest.mark.parametrize(
    "override, message",
    [
        ("data.seed", "malformed override 'data.seed': wanted key=value"),
        ("=3", "malformed override '=3': wanted key=value"),
        ("data..seed=3", "wanted key=value"),
        ("data. seed=3", "wanted key=value"),
        ("data.train_files=", "no value; wanted data.train_files=VALUE, or data.train_files=null for none"),
        ("trainer.logger=[console", "malformed override 'trainer.logger=\\[console'"),
        ("trainer.logger.x=3", "trainer.logger is {'x': 3} .a mapping.: wanted a list of text"),
        ("data=3", "data is 3: wanted a section, that is data.KEY=VALUE"),
        ("data=null", "data is null: wanted a section"),
        ("data=${trainer}", "data is '..trainer.': wanted a section"),
        ("data.seed=${trainer}", r"data.seed is \{.*\} \(a mapping\): wanted a whole number"),
        (
            "trainer.logger=[console,3]",
            r"trainer.logger\[1\] is 3 \(a whole number\): wanted text; as text it",
        ),
        ("data.seed={a: 1}", "data.seed is {'a': 1} \\(a mapping\\): wanted a whole number"),
        ("data.seed=${data.sede}", "data.seed: .*'data.sede' not found"),
        ("data.seed=${", "malformed override 'data.seed=..': no viable alternative"),
        ("data.seed=???", "data.seed: Missing mandatory value"),
        ("~data.seed=1", "unknown key ~data.seed; the nearest is data.seed"),
        ("data.seed=-1", "data.seed is -1: wanted at least 0"),
        ("actor_rollout_ref.actor.optim.lr=-1", "actor_rollout_ref.actor.optim.lr is -1.0: wanted at least 0"),
    ],
)
def test_a_bad_override_is_refused(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, [override])


@pytest.mark.parametrize(
    "text, message",
    [
        ("- a\n- b\n", "holds a list: wanted a mapping"),
        ("data: [", "not readable as YAML"),
        ("data: {seed: 1}\ndata: {seed: 2}\n", "not readable as YAML.*duplicate key data"),
        ("data.seed: 3\n", "data.seed: a dotted name is for the command line; wanted nested sections"),
        ("data:\n", "data is null: wanted a section"),
        ("1: 2\n", "unknown key 1;"),
        ("\x00", "not readable as YAML"),
    ],
)
def test_a_bad_file_is_refused(write, text, message):
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        load_config(write(text), [])


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=f"no configuration file {tmp_path}/none.yaml"):
        load_config(f"{tmp_path}/none.yaml", [])
    with pytest.raises(ConfigError, match=f"no configuration file {tmp_path}: wanted a YAML file"):
        load_config(str(tmp_path), [])


texts = st.text(st.characters(codec="utf-8", exclude_characters="$\\?"), max_size=20)
names = texts | st.sampled_from(["null", "1e-6", "on", "0123", "1:30", "=", "~", "2024-01-01", "[x]", "a: b"])


@settings(max_examples=25)
@given(
    data=st.builds(
        DataConfig,
        train_files=st.lists(names, max_size=3).map(tuple),
        prompt_key=names,
        gen_batch_size=st.none() | st.integers(1, 1 << 40),
        shuffle=st.booleans(),
    ),
    reward_model=st.builds(
        RewardModelConfig,
        verifiers=st.dictionaries(names, names, max_size=3),
        timeout=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
    ),
    trainer=st.builds(TrainerConfig, project_name=names),
)
def test_what_is_printed_is_read_back_to_the_same_tree(tmp_path_factory, data, reward_model, trainer):
    config = replace(RunConfig(), data=data, reward_model=reward_model, trainer=trainer)
    path = tmp_path_factory.mktemp("printed") / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(str(path), []).config == config


def test_the_name_of_a_runtime_stands_for_its_section(write):
    path = write("runtime: ray\n")
    assert load_config(path, ["runtime.placement_timeout=5"]).config.runtime.name == "ray"
    assert load_config(path, ["runtime.placement_timeout=5"]).config.runtime.placement_timeout == 5
    assert load_config(path, ["runtime=spmd"]).config.runtime.name == "spmd"
    full = write("runtime: {address: 'here:1'}\n")
    runtime = load_config(full, ["runtime=ray"]).config.runtime
    assert (runtime.name, runtime.address) == ("ray", "here:1")
    with pytest.raises(ConfigError, match=r"runtime.name is 'slurm'.*one of spmd, ray"):
        load_config(None, ["runtime=slurm"])


def test_rollout_apart_from_the_policy_is_rays():
    assert not load_config(None, ["runtime=ray", "runtime.colocate=false"]).config.runtime.colocate
    with pytest.raises(ConfigError, match=r"runtime.colocate is false and name is spmd, which has one kind of rank"):
        load_config(None, ["runtime.colocate=false"])
