"""cluster.yaml, and the commented AWS example in it, against Ray's own schema."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "cluster.yaml").read_text(encoding="utf-8")
MARK = "# --- AWS"


def on_premise():
    return yaml.safe_load(TEXT)


def on_aws():
    """What stands after uncommenting: its keys replace those above."""
    commented = TEXT[TEXT.index(MARK) :].splitlines()[1:]
    assert all(line.startswith("#") for line in commented)
    return on_premise() | yaml.safe_load("\n".join(line.removeprefix("#").removeprefix(" ") for line in commented))


@pytest.mark.parametrize("config", [on_premise, on_aws])
def test_rays_launcher_accepts_it(config):
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(config()))


@pytest.mark.parametrize("config", [on_premise, on_aws])
def test_it_uses_token_authentication_and_one_home_on_every_node(config):
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        start = " ".join(config()[key])
        assert "RAY_AUTH_MODE=token" in start
        assert "R1RAY_HOME=<SHARED_DIRECTORY>" in start
        assert 'eval "$(r1ray environment)"' in start
        assert "r1ray.io/role=" in start
    assert "~/.ray/auth_token" in config()["file_mounts"]


def test_set_up_is_the_locked_one():
    assert on_premise()["setup_commands"] == ["cd ~/r1ray && scripts/setup"]
    assert "uv pip sync" in (ROOT / "scripts" / "setup").read_text(encoding="utf-8")


def test_aws_has_a_head_without_work_and_workers_with_and_without_gpus():
    types = on_aws()["available_node_types"]
    assert types[on_aws()["head_node_type"]]["resources"] == {"CPU": 0}
    assert {kind["labels"]["r1ray.io/role"] for kind in types.values()} == {"head", "cpu", "gpu"}
    assert [name for name, kind in types.items() if kind["resources"].get("GPU")] == ["gpu_worker"]


def test_the_placement_check_counts_what_the_autoscaler_may_add():
    from r1ray.cluster import Cluster, _launcher_groups, _planned, num_placeable

    planned = tuple(_planned((), _launcher_groups(yaml.safe_dump(on_aws()))))
    assert num_placeable(Cluster(address="", nodes=planned), {"CPU": 1, "GPU": 1}) == 16


def test_placeholders_are_what_a_user_must_fill_in():
    assert set(re.findall(r"<[A-Z_]+>", TEXT)) == {
        "<PLACEHOLDER>",
        "<HEAD_IP>",
        "<CPU_WORKER_IP>",
        "<GPU_WORKER_IP>",
        "<SSH_USER>",
        "<SHARED_DIRECTORY>",
        "<DEEP_LEARNING_AMI>",
    }
    assert not re.search(r"\b\d{1,3}(\.\d{1,3}){3}\b", TEXT.replace("127.0.0.1", "")), "no address of somebody's machine"
