"""Planned training memory against what torch really keeps, ZeRO's arithmetic, and the table of GPUs and prices."""

from __future__ import annotations

import pytest

from r1ray.errors import InvalidValue
from r1ray.model.plan.activations import Batch, activations_of
from r1ray.model.plan.adapter import adapter_of, projections, soft_prompt_of
from r1ray.model.plan.catalog import find, names
from r1ray.model.plan.hardware import GIB, SHIPPED, load_hardware
from r1ray.model.plan.parts import part_of
from r1ray.model.plan.shape import shape_of
from r1ray.model.plan.training import TrainingWish, cheapest_first, fewest, plan_training, relaxed
from r1ray.settings import Settings

SMALL = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 6, "num_attention_heads": 8, "vocab_size": 101}
LONG = SMALL | {"max_position_embeddings": 2048}
LATENT = {"kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "q_lora_rank": 40, "num_key_value_heads": 8}
EXPERTS = {"n_routed_experts": 8, "num_experts_per_tok": 2, "first_k_dense_replace": 2, "n_group": 1, "topk_group": 1}
CONFIGS = {
    "llama": {"model_type": "llama", "num_key_value_heads": 2},
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 4},
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 4, "head_dim": 16},
    "deepseek_v3": {"model_type": "deepseek_v3", "moe_intermediate_size": 48, "n_shared_experts": 1, **LATENT, **EXPERTS},
}


@pytest.fixture
def hardware(tmp_path):
    return load_hardware(settings=Settings(home=tmp_path))


def bytes_kept(config, *, method, attention, checkpointing, batch):
    """What autograd holds on to after the forward pass of our trainer's loss, weights not counted."""
    import torch
    from peft import get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    from r1ray.model.adapters import lora as lora_config
    from r1ray.model.adapters import prefix_tuning, prompt_tuning
    from r1ray.model.family import Family
    from r1ray.train.attention import set_attention
    from r1ray.train.loss import add_supervised_loss

    torch.manual_seed(0)
    kept = {key: value for key, value in config.items() if key != "model_type"}
    described = AutoConfig.for_model(config["model_type"], **kept)
    model = AutoModelForCausalLM.from_config(described, dtype=torch.bfloat16).train()
    set_attention(model, attention)
    add_supervised_loss(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if method == "lora":
        model.enable_input_require_grads()
        family = Family(name=config["model_type"], lora_targets=tuple(projections(shape_of(config))))
        model = get_peft_model(model, lora_config(family, rank=4), autocast_adapter_dtype=False)
    elif method != "full":
        soft = prefix_tuning(64) if method == "prefix" else prompt_tuning(64, None, None)
        model = get_peft_model(model, soft, autocast_adapter_dtype=False)
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    held = {}

    def hold(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    ids = torch.randint(0, config["vocab_size"], (batch.size, batch.length))
    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        model(input_ids=ids, labels=ids, supervised=True)
    return sum(size for size, _ in held.values())


@pytest.mark.parametrize(
    ("family", "method", "attention", "checkpointing"),
    [
        ("llama", "full", "eager", False),
        ("llama", "lora", "sdpa", False),
        ("llama", "lora", "eager", True),
        ("llama", "prompt", "eager", False),
        ("llama", "prefix", "sdpa", False),
        ("llama", "prefix", "eager", False),
        ("qwen2", "full", "sdpa", False),
        ("qwen2", "prompt", "sdpa", False),
        ("qwen3", "lora", "eager", False),
        ("qwen3", "prefix", "eager", False),
        ("deepseek_v3", "full", "eager", False),
        ("deepseek_v3", "lora", "eager", False),
        ("deepseek_v3", "prompt", "eager", False),
        ("llama", "lora", "blockwise", False),
        ("qwen2", "full", "blockwise", False),
        ("llama", "prompt", "blockwise", False),
        ("deepseek_v3", "lora", "blockwise", False),
    ],
)
@pytest.mark.parametrize("length", [96, 300])
def test_activations_are_what_autograd_keeps(family, method, attention, checkpointing, length):
    config = {"max_position_embeddings": 512, **SMALL, **CONFIGS[family]}
    is_full = method == "full"
    shape, batch = shape_of(config), Batch(size=3, length=length, num_supervised=3 * (length - 1), whole_logits=is_full)
    kept = bytes_kept(config, method=method, attention=attention, checkpointing=checkpointing, batch=batch)
    adapters = {"full": lambda: None, "lora": lambda: adapter_of(shape, rank=4)}
    adapter = adapters.get(method, lambda: soft_prompt_of(shape, method, 64))
    planned = activations_of(shape, batch, adapter=adapter(), attention=attention, checkpointing=checkpointing)
    # only the gradient outlives the forward pass: of the logits, or of the hidden states that a frozen output layer reads
    gradient = planned.logits / 2 if is_full else 2 * shape.hidden * batch.num_supervised
    assert planned.kept + gradient == pytest.approx(kept, rel=0.02)


def plan(hardware, gpus="8xh100", name="r1-distill-qwen-7b", **wish):
    return plan_training(find(name).shape, TrainingWish(**wish), hardware.pool(gpus), hardware.assumptions)


def test_each_zero_stage_splits_one_thing_more(hardware):
    stages = [plan(hardware, method="full", zero_stage=stage).memory for stage in (1, 2, 3)]
    weights = find("r1-distill-qwen-7b").shape.parameters.total
    assert {memory.optimizer for memory in stages} == {12 * weights / 8}
    assert [memory.gradients for memory in stages] == [2 * weights, 2 * weights / 8, 2 * weights / 8]
    assert [memory.weights for memory in stages] == [2 * weights, 2 * weights, 2 * weights / 8]


def test_full_training_on_one_gpu_holds_sixteen_bytes_per_weight_beside_activations(hardware):
    memory = plan(hardware, "1xh100", "r1-distill-qwen-1.5b", method="full").memory
    weights = find("r1-distill-qwen-1.5b").shape.parameters.total
    assert memory.weights + memory.gradients + memory.optimizer == 16 * weights


def test_lora_trains_and_optimises_the_adapter_only(hardware):
    lora = plan(hardware, "1xh100", method="lora", rank=16)
    assert lora.trainable == adapter_of(find("r1-distill-qwen-7b").shape, rank=16).parameters
    assert lora.memory.optimizer == 12 * lora.trainable
    assert lora.memory.weights > 2 * find("r1-distill-qwen-7b").shape.parameters.total


@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_soft_prompt_has_as_many_numbers_as_pefts(method, name):
    import torch
    from peft import get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    from r1ray.model.adapters import prefix_tuning, prompt_tuning

    config = LONG | CONFIGS[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    model = get_peft_model(model, prefix_tuning(64) if method == "prefix" else prompt_tuning(64, None, None))
    expected = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert soft_prompt_of(shape_of(config), method, 64).parameters == expected


def test_a_soft_prompt_lengthens_what_is_computed_and_a_prefix_what_is_attended_to(hardware):
    plans = {method: plan(hardware, method=method, num_virtual_tokens=512, length=512) for method in ("lora", "prompt", "prefix")}
    operations = {method: each.speed.operations_per_token for method, each in plans.items()}
    assert operations["prompt"] == pytest.approx(2 * operations["lora"], rel=0.05)
    assert operations["lora"] < operations["prefix"] < 1.2 * operations["lora"]
    kept = {method: each.memory.activations.kept for method, each in plans.items()}
    assert kept["prompt"] > 1.5 * kept["prefix"]
    assert plans["prefix"].trainable == 512 * 28 * 2 * 4 * 128


def test_a_prefix_is_planned_as_it_can_be_trained(hardware):
    for wish in ({"zero_stage": 3}, {"gradient_checkpointing": True}):
        with pytest.raises(ValueError, match="method=prompt"):
            TrainingWish(method="prefix", **wish)
    with pytest.raises(ValueError, match="tensor, pipeline and sequence to 1"):
        TrainingWish(method="prompt", tensor=2)
    with pytest.raises(InvalidValue, match="caches a latent"):
        plan(hardware, "32xh100", "r1", method="prefix")
    assert all(wish.zero_stage == 2 and not wish.gradient_checkpointing for wish in relaxed(TrainingWish(method="prefix")))


def test_offloading_moves_the_optimizer_to_the_host_and_costs_time(hardware):
    here, away = (plan(hardware, "2xh100", method="full", zero_stage=3, offload=where) for where in ("none", "optimizer"))
    assert away.memory.optimizer == 0
    assert away.memory.host == here.memory.optimizer + here.memory.gradients + here.memory.step
    assert away.speed.tokens_per_s < here.speed.tokens_per_s
    assert away.speed.bound == "offloading"


def test_checkpointing_keeps_less_and_computes_a_forward_pass_more(hardware):
    kept, again = (plan(hardware, gradient_checkpointing=flag) for flag in (False, True))
    assert again.memory.activations.kept < kept.memory.activations.kept / 10
    forward = find("r1-distill-qwen-7b").shape.forward_operations(512)
    assert again.speed.operations_per_token - kept.speed.operations_per_token == pytest.approx(forward)


def test_dense_training_costs_about_six_operations_per_weight_and_token(hardware):
    weights = find("r1-distill-qwen-7b").shape.multiplied_parameters
    assert plan(hardware, method="full", length=128).speed.operations_per_token == pytest.approx(6 * weights, rel=0.02)


def test_the_fewest_gpus_fit_and_half_of_them_do_not(hardware):
    wish = TrainingWish(method="full", zero_stage=3, gradient_checkpointing=True, micro_batch_size=1)
    shape = find("r1-distill-qwen-14b").shape
    least = fewest(shape, wish, "h100", hardware)
    assert least.fits
    assert not plan_training(shape, wish, hardware.pool(f"{least.pool.num // 2}xh100"), hardware.assumptions).fits


def test_every_shipped_model_can_be_trained_on_some_gpus_by_lora_and_zero_3(hardware):
    wish = TrainingWish(zero_stage=3, gradient_checkpointing=True, micro_batch_size=1)
    for name in names():
        plans = cheapest_first(find(name).shape, wish, hardware, 1e8)
        assert plans and all(each.fits for each in plans)
        assert [each.money(1e8) for each in plans] == sorted(each.money(1e8) for each in plans)


def test_remedies_shrink_the_peak_step_by_step(hardware):
    wish = TrainingWish(method="full")
    pool, shape = hardware.pool("2xh100"), find("r1-distill-qwen-14b").shape
    peaks = [plan_training(shape, each, pool, hardware.assumptions).memory.peak for each in (wish, *relaxed(wish))]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[0] > 80 * GIB > peaks[-1]


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        ({"offload": "parameters"}, "zero_stage=3"),
        ({"zero_stage": 0}, "master weights"),
        ({"zero_stage": 0, "dtype": "float32", "offload": "optimizer"}, "ZeRO optimizer"),
    ],
)
def test_an_impossible_wish_says_what_to_set(wish, said):
    with pytest.raises(ValueError, match=said):
        TrainingWish(**wish)


def test_pools_are_read_in_both_forms_and_a_typo_names_the_nearest(hardware):
    assert (hardware.pool("16xh100").num_nodes, hardware.pool("h100:16").num, hardware.pool("H20").num) == (2, 16, 1)
    with pytest.raises(InvalidValue, match="a100-40gb"):
        hardware.pool("8xa100")
    with pytest.raises(InvalidValue, match="8xh100"):
        hardware.pool("eight of them")


def test_a_users_file_overlays_one_price_and_adds_a_gpu(tmp_path):
    (tmp_path / "gpus.yaml").write_text(
        "currency: CNY\ngpus:\n  h100: {price_per_hour: 16}\n  b200: {memory_gib: 180, bf16_tflops: 2250, bandwidth_gbs: 8000, "
        "link_gbs: 900, network_gbs: 50, price_per_hour: 40}\n",
        encoding="utf-8",
    )
    own = load_hardware(settings=Settings(home=tmp_path))
    assert (own.currency, own.gpus["h100"].price_per_hour, own.gpus["h100"].memory_gib) == ("CNY", 16, 80)
    assert own.pool("4xb200").price_per_hour == 160
    (tmp_path / "gpus.yaml").write_text("gpus:\n  h100: {price: 16}\n", encoding="utf-8")
    with pytest.raises(InvalidValue, match=r"gpus\.h100\.price"):
        load_hardware(settings=Settings(home=tmp_path))


def test_every_line_of_the_gpu_file_says_what_it_is():
    lines = [line for line in SHIPPED.read_text(encoding="utf-8").splitlines() if ":" in line and not line.lstrip().startswith("#")]
    assert [line for line in lines if "#" not in line] == []


@pytest.mark.parametrize("family", CONFIGS)
def test_a_tensor_part_has_half_of_what_is_split_and_the_whole_of_the_rest(family):
    shape = shape_of(LONG | CONFIGS[family])
    whole, part = shape.parameters, part_of(shape, tensor=2, pipeline=1).parameters
    assert part.dense_mlp * 2 == whole.dense_mlp and part.experts * 2 == whole.experts
    assert (part.embedding, part.head, part.norms, part.router) == (whole.embedding, whole.head, whole.norms, whole.router)
    assert whole.attention / 2 <= part.attention < whole.attention * (0.51 if shape.latent is None else 0.8)


def test_the_stages_of_a_pipeline_hold_their_layers_and_the_passes_that_wait(hardware):
    shape, pool = shape_of(LONG | CONFIGS["llama"]), hardware.pool("2xh100")
    alone = plan_training(shape, TrainingWish(method="full", zero_stage=1), hardware.pool("1xh100"), hardware.assumptions)
    one, two = (
        plan_training(shape, TrainingWish(method="full", zero_stage=1, pipeline=2, accumulation=num), pool, hardware.assumptions)
        for num in (1, 2)
    )
    assert one.memory.weights < 0.6 * alone.memory.weights
    assert two.memory.activations.kept == 2 * one.memory.activations.kept
    assert two.speed.tokens_per_s > one.speed.tokens_per_s, "stages wait less when there are more passes"


def test_slices_of_a_sequence_divide_activations_and_zero_shares_over_all(hardware):
    shape, pool = shape_of(LONG | CONFIGS["qwen2"]), hardware.pool("4xh100")
    whole, sliced = (plan_training(shape, TrainingWish(method="full", sequence=num), pool, hardware.assumptions) for num in (1, 4))
    assert sliced.memory.optimizer == whole.memory.optimizer
    assert sliced.memory.activations.kept == pytest.approx(whole.memory.activations.kept / 4)


def test_a_split_that_training_refuses_is_not_planned(hardware):
    with pytest.raises(ValueError, match="zero_stage=1"):
        TrainingWish(pipeline=2, zero_stage=2)
    with pytest.raises(InvalidValue, match="multiple of 2"):
        plan_training(shape_of(LONG | CONFIGS["llama"]), TrainingWish(tensor=2), hardware.pool("1xh100"), hardware.assumptions)
    assert all(plan.pool.num % 4 == 0 for plan in cheapest_first(find("r1-distill-qwen-7b").shape, TrainingWish(tensor=4), hardware, 1e6))


def test_a_gpu_gives_the_whole_bucket_and_main_memory_only_what_is_written_to(hardware):
    for method, numbers in (("lora", 5e7), ("full", 5e8)):
        assert plan(hardware, "1xh100", "r1-distill-qwen-1.5b", method=method).memory.buckets == 2 * numbers
    here = plan(hardware, "1xcpu", "r1-distill-qwen-1.5b", method="lora")
    assert here.memory.buckets == 2 * here.trainable < 1e8


@pytest.mark.parametrize(("vocab", "is_last"), [(101, False), (100_000, True)])
def test_the_busiest_stage_keeps_waiting_passes_or_has_the_logits(hardware, vocab, is_last):
    shape = shape_of(LONG | CONFIGS["llama"] | {"vocab_size": vocab})
    wish = TrainingWish(method="full", zero_stage=1, pipeline=2, accumulation=2, length=128)
    found = plan_training(shape, wish, hardware.pool("2xh100"), hardware.assumptions).memory.activations
    assert (found.logits > 0) is is_last


def host(hardware, gpus, **wish):
    return plan(hardware, gpus, **wish).host


def test_a_node_copies_of_the_base_what_its_files_do_not_have_as_it_is_trained(hardware):
    base = find("r1-distill-qwen-7b").shape.parameters.total
    assert host(hardware, "8xh100").start == host(hardware, "16xh100", zero_stage=3).start == 0, "files are mapped"
    assert host(hardware, "8xh100", method="full", name="r1-distill-qwen-32b").start > 8 * 2 * 64e9, "no GPU holds it twice"
    assert host(hardware, "8xh100", zero_stage=1, pipeline=4).start == 0
    assert host(hardware, "8xh100", zero_stage=1, tensor=4).start == pytest.approx(8 * 2 * base / 4)
    assert host(hardware, "8xh100", zero_stage=1, pipeline=4, dtype="float32").start == 8 * 4 * base
    assert host(hardware, "8xcpu") is None


def test_experts_are_fused_a_layer_at_a_time_at_zero_3_and_all_of_them_by_each_stage_of_a_pipeline(hardware):
    shape = find("r1").shape
    layer = 2 * shape.parameters.experts / shape.num_moe_layers
    assert host(hardware, "32xh100", zero_stage=3, name="r1").start == layer
    assert host(hardware, "32xh100", zero_stage=1, pipeline=4, name="r1").start == pytest.approx(8 * layer * shape.num_moe_layers)


def test_a_nodes_memory_has_what_is_offloaded_and_what_is_copied_to_be_saved(hardware):
    lora, full = host(hardware, "8xh100"), host(hardware, "8xh100", method="full")
    weights = find("r1-distill-qwen-7b").shape.parameters.total
    assert lora.saving < 1e9, "the adapter alone"
    assert full.saving == pytest.approx(4 * weights + 2 * weights)
    away = plan(hardware, "16xh100", method="full", zero_stage=3, offload="parameters")
    assert away.host.num_workers == 8
    assert away.host.training == 8 * away.memory.host
    assert away.host.peak == away.host.processes + max(away.host.start, away.host.training + away.host.saving)


def test_a_wish_has_the_words_of_the_training_config():
    from r1ray.train.config import TrainConfig

    shared = TrainingWish.model_fields.keys() & TrainConfig.model_fields.keys()
    assert {"method", "zero_stage", "dtype", "attention", "gradient_checkpointing", "offload", "micro_batch_size"} <= shared
    for name in ("dtype", "offload", "zero_stage", "attention", "method"):
        for choice in TrainingWish.model_fields[name].annotation.__args__:
            assert choice in TrainConfig.model_fields[name].annotation.__args__
    assert set(TrainConfig.model_fields["offload"].annotation.__args__) == set(TrainingWish.model_fields["offload"].annotation.__args__)


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ({"zero_stage": 0, "dtype": "float16"}, "dtype=float32"),
        ({"tensor": 2, "dtype": "float16"}, "dtype=bfloat16"),
        ({"tensor": 2, "offload": "optimizer"}, "dtype=bfloat16"),
        ({"method": "prefix", "attention": "blockwise"}, "set attention=eager or sdpa"),
    ],
)
def test_what_training_refuses_is_not_planned(wish, words):
    with pytest.raises(ValueError, match=words):
        TrainingWish(**wish)
