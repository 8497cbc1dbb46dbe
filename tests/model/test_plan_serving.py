"""Layouts of a model over GPUs: what divides, what fits, what it costs in time, and the lines for serve_config.yaml."""

from __future__ import annotations

import pytest
import yaml

from r1ray.cluster import Cluster, Node, check_placement
from r1ray.errors import ClusterTooSmall, InvalidValue
from r1ray.model.plan.catalog import find, names
from r1ray.model.plan.fragment import fragment
from r1ray.model.plan.hardware import GIB, load_hardware
from r1ray.model.plan.serving import Layout, ServingWish, choose, layouts, plan_replica
from r1ray.serve.config import ModelArgs
from r1ray.settings import Settings

EXAMPLES = [
    ("r1-distill-qwen-1.5b", "1xrtx-4090"),
    ("r1-distill-qwen-32b", "8xh100"),
    ("r1-distill-llama-70b", "8xa100-80gb"),
    ("r1", "16xh100"),
]


@pytest.fixture
def hardware(tmp_path):
    return load_hardware(settings=Settings(home=tmp_path))


def chosen(hardware, name, gpus, **wish):
    return choose(find(name).shape, hardware.pool(gpus), ServingWish(**wish), hardware.assumptions)


def test_every_layer_is_in_one_stage_and_no_stage_is_empty_or_heavy(hardware):
    for name in names():
        shape = find(name).shape
        for stages in (1, 2, 3, 7, shape.num_layers):
            replica = plan_replica(shape, hardware.pool("64xh100"), ServingWish(), hardware.assumptions, (1, stages))
            assert sum(replica.layout.layers) == shape.num_layers
            assert min(replica.layout.layers) >= 1
            if stages <= 3:
                fair = sum(stage.stored for stage in replica.stages) / stages
                assert replica.weight_bytes < fair * 1.12


def test_stages_and_groups_together_store_every_weight_once(hardware):
    shape = find("r1-distill-llama-70b").shape
    for degrees in ((1, 1), (4, 1), (1, 4), (2, 2)):
        replica = plan_replica(shape, hardware.pool("8xh200"), ServingWish(), hardware.assumptions, degrees)
        stored = sum(stage.stored for stage in replica.stages) * degrees[0]
        assert stored == pytest.approx(2 * shape.parameters.total, rel=1e-4)


def test_the_degree_divides_heads_and_kv_heads_and_stays_in_a_node(hardware):
    found = layouts(find("r1-distill-qwen-7b").shape, hardware.pool("16xh100"), ServingWish(streams=1), hardware.assumptions)
    assert {replica.layout.tensor_parallel for replica in found} == {1, 2, 4}  # 28 heads, 4 KV heads
    with pytest.raises(InvalidValue, match="28 heads, 4 KV heads"):
        chosen(hardware, "r1-distill-qwen-7b", "8xh100", tensor_parallel=8)
    with pytest.raises(InvalidValue, match="per node"):
        choose(find("r1").shape, hardware.pool("16xh100", per_node=4), ServingWish(tensor_parallel=8), hardware.assumptions)


def test_the_latent_cache_is_held_by_every_gpu_of_a_group(hardware):
    def per_token(name, split):
        replica = plan_replica(find(name).shape, hardware.pool("8xh200"), ServingWish(), hardware.assumptions, (split, 1))
        return replica.stages[0].kv_per_token

    assert per_token("r1", 8) == per_token("r1", 1) == 61 * 576 * 2
    assert per_token("r1-distill-llama-70b", 8) == per_token("r1-distill-llama-70b", 1) / 8


def test_cache_and_weights_together_stay_within_the_allowed_memory(hardware):
    replica = chosen(hardware, "r1-distill-qwen-32b", "8xh100")
    for stage in replica.stages:
        taken = stage.stored + replica.cache_tokens * stage.kv_per_token + replica.pool.gpu.overhead_gib * GIB
        assert taken < 0.9 * 80 * GIB
    assert replica.num_requests * 4096 <= replica.cache_tokens


def test_a_model_that_cannot_fit_says_how_much_it_takes(hardware):
    with pytest.raises(ClusterTooSmall, match=r"weights in fp8 take 6\d\d GiB"):
        chosen(hardware, "r1", "8xh100")
    with pytest.raises(InvalidValue, match="131072"):
        chosen(hardware, "r1-distill-qwen-7b", "1xh200", context=200_000)


def test_fp8_weights_are_used_where_the_gpu_computes_in_them(hardware):
    assert chosen(hardware, "r1", "16xh100").precision == "fp8"
    assert chosen(hardware, "r1", "32xa100-80gb").precision == "bfloat16"
    assert chosen(hardware, "r1-distill-qwen-7b", "1xh100").precision == "bfloat16"


def test_one_stream_cannot_be_faster_than_reading_the_weights(hardware):
    replica = chosen(hardware, "r1-distill-llama-70b", "8xa100-80gb", tensor_parallel=8, stages=1)
    bound = replica.weight_bytes / (2039e9 * hardware.assumptions.bandwidth_efficiency)
    assert bound * 0.98 < replica.decode_s(1, 1) < 2 * bound


def test_more_streams_give_more_tokens_in_total_and_fewer_each(hardware):
    replica = chosen(hardware, "r1", "16xh100")
    rates = [replica.decode_rate(streams, 2048) for streams in (1, 4, 16, 64)]
    assert rates == sorted(rates)
    each = [replica.decode_s(streams, 2048) for streams in (1, 4, 16, 64)]
    assert each == sorted(each)
    assert each[3] <= 0.1


def test_the_streams_keep_the_wanted_time_per_token(hardware):
    slow, fast = (chosen(hardware, "r1-distill-qwen-32b", "8xh100", tpot_ms=limit) for limit in (100, 15))
    assert fast.most_streams < slow.most_streams
    assert fast.decode_s(fast.most_streams, 4096) <= 0.015


@pytest.mark.parametrize(("name", "gpus"), EXAMPLES)
def test_the_bundles_can_be_placed_on_such_nodes(hardware, name, gpus):
    replica = chosen(hardware, name, gpus)
    resources = {"CPU": 16.0, "GPU": float(replica.pool.per_node)}
    nodes = tuple(Node(id=str(number), resources=resources) for number in range(replica.pool.num_nodes))
    check_placement(Cluster(address="", nodes=nodes), replica.bundles() * replica.num_replicas, wanted_by="test")
    check_placement(Cluster(address="", nodes=nodes), replica.bundles(), strategy=replica.strategy, wanted_by="test")
    assert sum(bundle["GPU"] for bundle in replica.bundles()) == replica.layout.num_gpus


def test_stages_that_fill_nodes_are_spread_over_them(hardware):
    replica = chosen(hardware, "r1", "16xh100", tensor_parallel=8)
    assert replica.strategy == "STRICT_SPREAD"
    assert replica.bundles() == [{"CPU": 9.0, "GPU": 8.0}, {"CPU": 8.0, "GPU": 8.0}]
    assert chosen(hardware, "r1", "16xh100", tensor_parallel=4).strategy == "PACK"


@pytest.mark.parametrize(("name", "gpus"), EXAMPLES)
def test_the_fragment_is_an_entry_of_serve_config(hardware, name, gpus):
    replica = chosen(hardware, name, gpus)
    text = fragment(name, replica)
    (entry,) = yaml.safe_load(text)
    served = ModelArgs.model_validate(entry)
    assert served.engine.num_slots == min(512, replica.most_streams)
    assert [bundle["GPU"] for bundle in served.replica_bundles] == [replica.layout.tensor_parallel] * replica.layout.stages
    assert (served.engine.stages, served.engine.tensor_parallel) == (replica.layout.stages, replica.layout.tensor_parallel)
    assert [line for line in text.splitlines() if "#" not in line] == []


def test_a_layout_counts_its_gpus():
    assert Layout(tensor_parallel=4, layers=(31, 30)).num_gpus == 8
