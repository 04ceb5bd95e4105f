"""From command line to TrainConfig: layers of defaults, the reference's usage, and one line per mistake."""

import json

import pytest

from sltrain_dist.config import ModelConfig
from sltrain_dist.train.flags import FLAGS, parser, token_count
from sltrain_dist.train.optimization import warnings
from sltrain_dist.train.settings import resolve
from sltrain_dist.utils.errors import UserError

PUBLISHED = (
    "--model_config configs/llama_60m.json --lr 0.003 --peft_model sltrain --optimizer adamw --rank 128 "
    "--sp_ratio 0.03 --batch_size 256 --total_batch_size 512 --num_training_steps 11000 --warmup_steps 1100 "
    "--weight_decay 0 --dtype bfloat16 --eval_every 1000 --lora_alpha 32"
)
REFERENCE_FLAGS = set(
    "model_config lr peft_model optimizer rank sp_ratio lora_alpha batch_size total_batch_size "
    "num_training_steps max_train_tokens warmup_steps weight_decay dtype eval_every save_every save_dir "
    "continue_from max_length grad_clipping activation_checkpointing scheduler min_lr_ratio seed workers "
    "name train_scaling single_gpu gradient_accumulation use_hf_model tags beta1 lora_dropout".split()
)


def config(line="", world_size=1):
    return resolve(line.split(), world_size)


def write_ds(tmp_path, **content):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(content))
    return path


def test_every_flag_of_the_reference_exists():
    assert set(FLAGS) >= REFERENCE_FLAGS
    switches = "--activation_checkpointing --train_scaling --single_gpu --use_hf_model"
    got = config(f"{PUBLISHED} {switches} --tags a,b --max_train_tokens 1B")
    assert got.activation_checkpointing == "block"
    assert got.method.train_scaling
    assert got.use_hf_model
    assert got.tags == ("a", "b")
    assert got.optimizer.total_steps == 10**9 // (512 * 256)


def test_published_command():
    got = config(PUBLISHED)
    assert got.data.corpus == "c4"
    assert got.data.tokenizer == "t5-base"
    assert got.data.pack == "padded"
    assert got.data.sequence_length == 256
    assert (got.method.method, got.method.support, got.method.rank) == ("sltrain", "uniform", 128)
    assert (got.engine.dtype, got.engine.master_weights) == ("bfloat16", False)
    assert (got.engine.batch_size, got.engine.gradient_accumulation) == (256, 2)
    assert (got.optimizer.name, got.optimizer.lr, got.optimizer.min_lr_ratio) == (
        "adamw",
        3e-3,
        0.1,
    )
    assert got.save_every == 10_000


def test_reference_defaults():
    got = config("--model_config llama_9m --batch_size 4")
    assert (got.method.method, got.optimizer.name, got.optimizer.lr) == ("full", "adam", 1e-4)
    assert (got.optimizer.total_steps, got.optimizer.warmup_steps) == (10_000, 1000)
    assert got.total_batch_size == 4
    with_text = config("--model_config llama_9m --batch_size 4 --corpus stdlib")
    assert (with_text.data.corpus, with_text.data.tokenizer, with_text.data.pack) == (
        "stdlib",
        None,
        "packed",
    )


def test_our_defaults():
    got = config()
    assert got.model.name == "llama_demo"
    assert (got.data.corpus, got.data.pack, got.method.support) == ("stdlib", "packed", "fan_in")
    assert got.engine.engine == "fsdp"


@pytest.mark.parametrize(
    ("size", "rank"), [("60m", 128), ("130m", 256), ("350m", 256), ("1b", 512), ("7b", 1024)]
)
def test_recipes(size, rank):
    got = config(f"--model llama_{size}")
    assert (got.method.rank, got.total_batch_size, got.optimizer.lr) == (rank, 512, 3e-3)


@pytest.mark.parametrize("name", ModelConfig.presets())
def test_every_preset_resolves(name):
    assert config(f"--model {name} --corpus stdlib").model.name == name


def test_flag_beats_ds_json_beats_recipe(tmp_path):
    path = write_ds(
        tmp_path, train_batch_size=32, gradient_clipping=0.5, zero_optimization={"stage": 1}
    )
    got = config(f"--ds_config {path}")
    assert (got.engine.engine, got.engine.stage) == ("zero", 1)
    assert (got.total_batch_size, got.optimizer.grad_clipping) == (32, 0.5)
    with pytest.raises(UserError, match="gradient_clipping"):
        config(f"--ds_config {path} --grad_clipping 2")
    with pytest.raises(UserError, match="train_batch_size"):
        config(f"--ds_config {path} --total_batch_size 64")


def test_ds_precision(tmp_path):
    path = write_ds(tmp_path, bf16={"enabled": True}, zero_optimization={"stage": 2})
    assert config(f"--ds_config {path}").engine.dtype == "bfloat16"
    with pytest.raises(UserError, match="bf16"):
        config(f"--ds_config {path} --dtype float32")


@pytest.mark.parametrize("stage", ["zero1", "zero2", "zero3", "zero3_offload"])
def test_the_references_flags_under_deepspeed_get_master_weights(stage):
    line = f"{PUBLISHED} --ds_config ds_configs/{stage}.json"
    assert config(line).engine.master_weights
    if stage in ("zero1", "zero3_offload"):
        with pytest.raises(UserError, match="use --master_weights fp32"):
            config(f"{line} --master_weights none")
    else:
        assert not config(f"{line} --master_weights none").engine.master_weights


def test_master_weights_of_the_ds_json(tmp_path):
    bf16 = {"enabled": True, "bf16_master_weights_and_grads": True}
    path = write_ds(tmp_path, bf16=bf16, zero_optimization={"stage": 2})
    assert not config(f"--ds_config {path}").engine.master_weights
    with pytest.raises(UserError, match="--master_weights fp32 makes it False"):
        config(f"--ds_config {path} --master_weights fp32")


@pytest.mark.parametrize(
    ("line", "world_size", "expected"),
    [
        ("--total_batch_size 64 --batch_size 4", 2, (4, 64, 8)),
        ("--total_batch_size 64 --gradient_accumulation 4", 2, (8, 64, 4)),
        ("--batch_size 4 --gradient_accumulation 3", 2, (4, 24, 3)),
        ("--total_batch_size 34", 2, (1, 34, 17)),
        ("--model llama_60m --batch_size 8", 2, (8, 512, 32)),
        ("--model llama_60m --batch_size 8 --per_layer", 2, (8, 16, 1)),
        ("--model llama_60m --batch_size 8 --per_layer --total_batch_size 64", 2, (8, 64, 4)),
        ("--total_batch_size 6 --batch_size 3 --gradient_accumulation 2", 1, (3, 6, 2)),
    ],
)
def test_batches(line, world_size, expected):
    got = config(line, world_size)
    engine = got.engine
    assert (engine.batch_size, got.total_batch_size, engine.gradient_accumulation) == expected


MISTAKES = [
    ("--model nothing", "--model nothing: no such file or preset"),
    ("--model_config /no/such.json", "--model_config /no/such.json: no such file"),
    ("--model llama_9m --model_config llama_20m", "--model_config llama_20m: contradicts --model"),
    ("--method full --peft_model sltrain", "--peft_model sltrain: contradicts --method full"),
    ("--model_config llama_9m", "--batch_size is required"),
    ("--ds_config /no/ds.json", "--ds_config /no/ds.json: no such file"),
    ("--engine zero", "--engine zero: needs a DeepSpeed JSON"),
    ("--engine fsdp --ds_config ds_configs/zero2.json", "--engine fsdp: contradicts --ds_config"),
    ("--rank 0", "--rank 0: must be positive"),
    ("--sp_ratio 0", "--sp_ratio 0.0: the density must lie in"),
    ("--sp_ratio 1", "--sp_ratio 1.0: the density must lie in"),
    ("--sp_ratio x", "--sp_ratio: invalid float value"),
    ("--lr -1", "--lr -1.0: must be positive"),
    (
        "--total_batch_size 10 --batch_size 4",
        "--total_batch_size 10: not divisible by --batch_size 4",
    ),
    ("--batch_size 4 --total_batch_size 8 --gradient_accumulation 3", "--gradient_accumulation 3"),
    ("--embedding_state_bits 8", "--embedding_state_bits 8: --optimizer adamw keeps 32 bits"),
    ("--per_layer --per_layer_clip lagged --grad_clipping 0", "--per_layer_clip lagged: of what?"),
    ("--proj_rank 4", "--proj_rank 4: --optimizer adamw projects nothing; leave it out"),
    ("--optimizer galore_adamw --proj_rank 0", "--proj_rank 0: must be positive"),
    ("--dtype float16", "--dtype float16"),
    ("--optimizer nope", "--optimizer nope: unknown"),
    ("--max_length 4096", "--max_length 4096: the model has 1024 positions"),
    ("--scheduler cosine_restarts --cycle_length 45", "--cycle_length 45"),
    ("--warmup_steps 500", "--warmup_steps 500"),
    ("--max_train_tokens 10", "--max_train_tokens 10: less than one update"),
    ("--betas 0.9", "--betas 0.9: two numbers"),
    ("--min_lr_ratio 2", "--min_lr_ratio 2.0"),
    ("--lora_dropout 1", "--lora_dropout 1.0: must be below 1"),
    *[
        (f"--{name} {value}", f"--{name} {value}: must be a finite number")
        for name in ("lr", "sp_ratio", "lora_alpha", "eps", "timeout", "grad_clipping", "beta1")
        for value in ("nan", "inf")
    ],
    ("--max_train_tokens inf", "--max_train_tokens: invalid token_count value: 'inf'"),
    ("--eval_tokens nan", "--eval_tokens: invalid token_count value: 'nan'"),
    ("--seed -1", "--seed -1: must lie in [0, 2147483648)"),
    (f"--seed {2**63}", f"--seed {2**63}: must lie in [0, 2147483648)"),
    ("--max_length 1", "--max_length 1: a sample needs at least 2 tokens"),
    (
        "--activation_checkpointing selective --compile",
        "--activation_checkpointing selective: --compile default computes",
    ),
    (
        "--activation_checkpointing selective --use_hf_model",
        "--activation_checkpointing selective: --use_hf_model knows none and block",
    ),
    (
        "--offload_activations --activation_checkpointing selective",
        "with --activation_checkpointing selective it needs --activation_checkpointing block",
    ),
    (
        "--offload_activations --compile",
        "with --compile default it needs --activation_checkpointing",
    ),
    (
        "--offload_activations --ds_config ds_configs/zero3.json",
        "--offload_activations: with ZeRO stage 3",
    ),
    ("--offload_activations --use_hf_model", "--offload_activations: --use_hf_model keeps"),
    (
        "--cpu_offload --ds_config ds_configs/zero2.json",
        '"zero_optimization.offload_optimizer" and "zero_optimization.offload_param"',
    ),
    ("--cpu_offload --optimizer apex_adamw", "--cpu_offload: updates run on the host"),
    ("--nonsense 3", "unrecognized arguments: --nonsense 3"),
    ("--pack loose", "--pack: invalid choice: 'loose'"),
]


@pytest.mark.parametrize(("line", "message"), MISTAKES, ids=[line for line, _ in MISTAKES])
def test_mistakes_get_one_line(line, message):
    with pytest.raises(UserError) as caught:
        config(line)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_mistakes_of_ranks():
    with pytest.raises(UserError, match="--total_batch_size 7: not divisible by 2 ranks"):
        config("--total_batch_size 7", 2)
    with pytest.raises(UserError, match="--single_gpu"):
        config("--single_gpu", 2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a readable JSON file"),
        ("[]", "model_type is 'list'"),
        ('{"model_type": "gpt2"}', "model_type is 'gpt2'"),
        ('{"model_type": "llama", "vocab_size": 0}', "vocab_size is 0"),
    ],
)
def test_model_config_files(tmp_path, content, message):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        config(f"--model {path}")


FIELDS = [
    ("num_key_value_heads", "x", "a positive integer"),
    ("num_key_value_heads", -2, "a positive integer"),
    ("hidden_size", True, "a positive integer"),
    ("head_dim", "8", "a positive integer"),
    ("max_position_embeddings", "a", "a positive integer"),
    ("rms_norm_eps", "a", "a positive number"),
    ("rms_norm_eps", float("nan"), "a positive number"),
    ("rope_theta", [1], "a positive number"),
    ("initializer_range", -1, "a number that is not negative"),
    ("tie_word_embeddings", "false", "true or false"),
    ("attention_bias", 1, "true or false"),
    ("mlp_bias", None, "true or false"),
    ("bos_token_id", "0", "a token id"),
    ("eos_token_id", [1, "2"], "a token id, or a list of them"),
    ("eos_token_id", [], "a token id, or a list of them"),
    ("pad_token_id", 0.5, "a token id"),
    ("rope_scaling", [1], "an object"),
    ("rope_scaling.factor", "2", "a positive number"),
    ("rope_scaling.rope_type", 3, "a string"),
    ("rope_parameters.rope_theta", "a", "a positive number"),
    ("rope_parameters.short_factor", [1, "2"], "a list of positive numbers"),
]


@pytest.mark.parametrize(("key", "value", "words"), FIELDS)
def test_every_field_of_a_model_config_is_checked(tmp_path, key, value, words):
    sizes = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads"
    raw = {"model_type": "llama", **dict.fromkeys(sizes.split(), 8)}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(raw))
    ModelConfig.load(str(path))
    block, _, inner = key.partition(".")
    path.write_text(json.dumps(raw | {block: {inner: value} if inner else value}))
    with pytest.raises(UserError) as caught:
        ModelConfig.load(str(path))
    assert f"{path}: {key} is {value!r}; it must be {words}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_malformed_ds_json(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text('{"train_batch_size": ')
    with pytest.raises(UserError, match="not a readable JSON file"):
        config(f"--ds_config {path}")


def test_prepare_data_resolves_as_pretrain_does():
    from launcher.prepare_data import parse

    lines = ["", "--model llama_60m --tokenizer_vocab 999 --eval_tokens 1M --pack padded"]
    for line in lines:
        ours, theirs = parse(line.split()), config(line)
        assert (ours.data, ours.model) == (theirs.data, theirs.model)
    assert parse("--tokenizer_vocab 99999".split()).data.vocab_size == 8192
    with pytest.raises(UserError, match="--max_length 1: a sample"):
        parse("--max_length 1".split())


def test_token_counts():
    assert [token_count(t) for t in ("100M", "1.5B", "20k", "7")] == [10**8, 15 * 10**8, 20_000, 7]


def test_help_names_every_flag_with_its_default():
    text = parser().format_help()
    for group in ("model and method", "data", "optimization", "run", "engine"):
        assert f"\n{group}:" in text
    for name, flag in FLAGS.items():
        if name != "local_rank":
            assert f"--{name}" in text
            assert flag.help
    assert "[0.0]" in text


def test_linear_path():
    assert config().linear_path == "auto"
    assert config("--linear_path factorized").linear_path == "factorized"
    for method in ("full", "low_rank"):
        assert config(f"--method {method} --linear_path auto").linear_path == "auto"
        with pytest.raises(UserError, match=f"--linear_path composed: --method {method}") as error:
            config(f"--method {method} --linear_path composed")
        assert "\n" not in str(error.value)


def test_slope():
    got = config("--method slope").method
    assert (got.method, got.pattern, got.mask_change_freq) == ("slope", "2:4", 100)
    got = config("--method slope --slope_pattern 1:2,1-2=2:8 --mask_change_freq 0").method
    assert (got.pattern, got.mask_change_freq) == ("1:2,1-2=2:8", 0)
    assert (
        config("--method slope --rank 7 --sp_ratio 0.5").method.method == "slope"
    )  # as full: not looked at


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--slope_pattern 1:4", "--slope_pattern 1:4: --method sltrain prunes nothing"),
        ("--method full --mask_change_freq 5", "--mask_change_freq 5: --method full prunes nothing"),
        ("--method slope --mask_change_freq -1", "--mask_change_freq -1: must not be negative"),
        ("--method slope --slope_pattern 4:2", "--slope_pattern 4:2: give N:M"),
        ("--method slope --slope_pattern 2:4,90=1:4", "1:4 is for layers up to 90"),
        ("--method slope --slope_pattern 1:256", "q_proj .* 1:256 needs inputs in whole groups of 256"),
        ("--method slope --linear_path composed", "--method slope has no choice of path"),
        ("--method slope --keep_hidden yes", "--keep_hidden yes: only factorized"),
    ],
)  # fmt: skip
def test_slope_refusals(line, message):
    with pytest.raises(UserError, match=message) as error:
        config(f"--model llama_100m {line}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("line", ["--method full", "--method low_rank", "--linear_path composed"])
def test_keep_hidden_needs_factorized_linears(line):
    assert config("--keep_hidden no").keep_hidden == "no"
    assert config(f"{line} --keep_hidden auto").keep_hidden == "auto"
    with pytest.raises(UserError, match=r"--keep_hidden yes: only factorized linears"):
        config(f"{line} --keep_hidden yes")


def test_axes():
    got = config("--tensor_parallel 2 --sequence_parallel --replicate 2 --model llama_60m", 8)
    assert (got.engine.tensor_parallel, got.engine.sequence_parallel) == (2, True)
    assert got.engine.replicate == 2
    # 512 sequences over the 4 data-parallel ranks, not over all 8.
    assert got.engine.batch_size * got.engine.gradient_accumulation * 4 == 512
    assert config("--replicate 2 --shard 4", 8).engine.replicate == 2


@pytest.mark.parametrize(
    ("line", "ranks", "message"),
    [
        ("--tensor_parallel 3", 8, "--tensor_parallel 3: does not divide the 8 ranks"),
        ("--tensor_parallel 0", 8, "--tensor_parallel 0: must be positive"),
        ("--replicate 3", 8, "--replicate 3: does not divide the 8 data-parallel ranks"),
        ("--replicate 2 --shard 2", 8, "--shard 2: x --replicate 2 is 4, but there are 8"),
        ("--sequence_parallel", 8, "--sequence_parallel: cuts positions .* add --tensor_parallel"),
        (
            "--tensor_parallel 2 --sequence_parallel --max_length 65",
            2,
            "--max_length 65: --sequence_parallel cuts it over 2 ranks; take a multiple of 2",
        ),
        (
            "--tensor_parallel 2 --sequence_parallel --use_hf_model",
            2,
            "--sequence_parallel: transformers' decoder",
        ),
        (
            "--tensor_parallel 8",
            8,
            "does not divide num_attention_heads = 4; sizes that do: 1, 2, 4",
        ),
        ("--tensor_parallel 2 --support uniform", 2, "--support uniform .* cannot be cut"),
        ("--tensor_parallel 2 --rank 9", 2, "--tensor_parallel 2: does not divide --rank = 9"),
        ("--tensor_parallel 4", 4, "down_proj: dimension 1 of its values = 2; sizes that do: 1, 2"),
        (
            "--replicate 2 --ds_config ds_configs/zero2.json",
            2,
            "--replicate 2: is for --engine fsdp",
        ),
    ],
)
def test_axes_that_do_not_fit(line, ranks, message):
    with pytest.raises(UserError, match=message):
        config(line, ranks)


def test_heads_of_keys_that_do_not_divide(tmp_path):
    grouped = {
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 1,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
    }
    (tmp_path / "config.json").write_text(json.dumps(grouped))
    with pytest.raises(UserError, match="does not divide num_key_value_heads = 2"):
        config(f"--model {tmp_path} --method full --tensor_parallel 4", 4)


def test_optimizers_of_whole_matrices_are_refused_before_anything_starts(tmp_path):
    path = write_ds(tmp_path, zero_optimization={"stage": 1})
    for line, world_size in (("", 2), ("--tensor_parallel 2", 2), (f"--ds_config {path}", 1)):
        with pytest.raises(UserError, match="--optimizer muon: needs whole matrices, but"):
            config(f"--optimizer muon --batch_size 4 {line}", world_size)
    config("--optimizer muon --batch_size 4 --replicate 2", 2)


def test_projections_of_factors_are_warned_of():
    pytest.importorskip("galore_torch")
    line = "--optimizer galore_adamw --rank 16 --method"
    assert config(f"{line} sltrain").optimizer.proj_rank == 16
    assert "--method full" in warnings(config(f"{line} sltrain"))[0]
    assert not warnings(config(f"{line} full"))


def test_adam_per_layer_keeps_float32_moments():
    line = "--batch_size 4 --dtype bfloat16 --optimizer"
    assert config(f"{line} adamw_per_layer").optimizer.rounding == "stochastic"
    assert config(f"{line} adamw8bit_per_layer").optimizer.rounding == "nearest"
    assert config(f"{line} adamw").engine.master_weights
    asked = config(f"{line} adamw_per_layer --master_weights none")
    assert asked.optimizer.rounding == "nearest"
    assert "stochastic (float32 moments)" in warnings(asked)[0]


def test_slope_over_tensor_parallel_ranks():
    """Groups are never cut, nor bytes of the second mask: 1368 inputs of llama_71m's MLP are 85.5 of them."""
    assert (
        config("--method slope --model llama_60m --tensor_parallel 2", 2).method.method == "slope"
    )
    line = "--method slope --model llama_71m --tensor_parallel 2"
    with pytest.raises(UserError, match=r"layer model.layers.0.mlp.down_proj: its 1368 inputs are no multiple of 2 x 16; sizes that do: 1$"):  # fmt: skip
        config(line, 2)
    line = "--method slope --model llama_60m --slope_pattern 1:32 --tensor_parallel 2"
    with pytest.raises(UserError, match=r"gate_proj: its 1376 outputs are no multiple of 2 x 32; "):
        config(line, 2)
