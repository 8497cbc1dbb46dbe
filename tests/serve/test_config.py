"""serve_config.yaml and the checks before `serve run`."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from r1ray.cluster import Cluster, Node
from r1ray.config import keys
from r1ray.errors import ClusterTooSmall, CollectionNotFound, InvalidValue, ModelNotFound, PortInUse, TemplateMismatch
from r1ray.serve.config import AppArgs, ModelArgs
from r1ray.serve.preflight import bundles_of, main, preflight, read_app_args

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "serve_config.yaml"


def write(tmp_path: Path, port: int = 0, **model) -> Path:
    tree = yaml.safe_load(SHIPPED.read_text(encoding="utf-8"))
    tree["http_options"]["port"] = port
    tree["applications"][0]["args"]["models"][0] |= model
    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def test_the_shipped_file_is_valid_for_serve_and_for_us() -> None:
    from ray.serve.schema import ServeDeploySchema

    ServeDeploySchema.model_validate(yaml.safe_load(SHIPPED.read_text(encoding="utf-8")))
    args, http = read_app_args(SHIPPED)
    assert (http["host"], http["port"]) == ("127.0.0.1", 8000)
    assert args.models[0].ref == "bank-assistant@production"


def test_the_shipped_file_fits_beside_a_job_on_four_logical_cpus() -> None:
    args, _ = read_app_args(SHIPPED)
    models = sum(bundle["CPU"] for model in args.models for bundle in bundles_of(model))
    assert models + args.router.num_cpus + args.retrieval.num_cpus <= 1


def test_the_shipped_file_shows_every_setting_of_the_application() -> None:
    """A key that the file does not show is one that nobody finds. The engine's rarer ones are left to its own documentation."""
    text = SHIPPED.read_text(encoding="utf-8")
    shown = set(re.findall(r"^\s*(?:- )?(\w+):", text, re.M))
    ours = [key for key in keys(AppArgs) if not key.startswith("models")] + [
        key for key in keys(ModelArgs) if not key.startswith("engine.")
    ]
    assert [key for key in ours if key.split(".")[-1] not in shown] == []


def test_a_pipeline_reserves_a_bundle_per_stage() -> None:
    from r1ray.serve.app import _model_options

    model = {"id": "a", "ref": "a@1", "engine": {"stages": 3, "stage_cpus": 2}, "placement": {"num_cpus": 1, "strategy": "STRICT_SPREAD"}}
    options = _model_options(ModelArgs.model_validate(model))
    assert options["placement_group_bundles"] == [{"CPU": 1}, {"CPU": 2}, {"CPU": 2}]
    assert options["placement_group_strategy"] == "STRICT_SPREAD"
    with pytest.raises(ValidationError, match=r"2 bundles for engine\.stages=3"):
        ModelArgs.model_validate(model | {"placement": {"bundles": [{"CPU": 1}, {"CPU": 1}]}})


def test_the_tensor_ranks_of_a_stage_share_a_bundle_so_that_they_lie_in_one_node() -> None:
    from r1ray.serve.app import _model_options

    engine = {"stages": 2, "tensor_parallel": 4, "stage_cpus": 2, "stage_gpus": 1}
    model = {"id": "a", "ref": "a@1", "engine": engine, "placement": {"num_cpus": 1, "num_gpus": 1}}
    options = _model_options(ModelArgs.model_validate(model))
    assert options["placement_group_bundles"] == [{"CPU": 7, "GPU": 4}, {"CPU": 8, "GPU": 4}]
    assert options["ray_actor_options"]["num_gpus"] == 1
    one_stage = ModelArgs.model_validate(model | {"engine": engine | {"stages": 1}})
    assert _model_options(one_stage)["placement_group_bundles"] == [{"CPU": 7, "GPU": 4}]


@pytest.mark.parametrize(("stage_gpus", "placement"), [(1, {}), (0, {"num_gpus": 1}), (1, {"bundles": [{"CPU": 1}, {"CPU": 1, "GPU": 1}]})])
def test_a_split_model_has_gpus_in_every_process_or_in_none(stage_gpus: int, placement: dict[str, object]) -> None:
    model = {"id": "a", "ref": "a@1", "engine": {"stages": 2, "stage_gpus": stage_gpus}, "placement": placement}
    with pytest.raises(ValidationError, match="give each process of a split model one"):
        ModelArgs.model_validate(model)


def test_serve_makes_our_args_of_the_file() -> None:
    import inspect

    from r1ray.serve.app import build

    (parameter,) = inspect.signature(build).parameters.values()
    assert parameter.annotation is AppArgs


@pytest.mark.parametrize(
    ("model", "what"),
    [
        ({"autoscaling": {"min_replicas": 3, "max_replicas": 2}}, "above max_replicas"),
        ({"ref": ""}, "models.0.ref"),
        ({"num_replicas": 2}, "num_replicas"),
    ],
)
def test_wrong_args_name_their_key(tmp_path: Path, model, what: str) -> None:
    with pytest.raises(InvalidValue, match=what):
        read_app_args(write(tmp_path, **model))


def test_two_models_of_one_id_are_refused() -> None:
    with pytest.raises(ValueError, match="given twice"):
        AppArgs(models=(ModelArgs(id="a", ref="x"), ModelArgs(id="a", ref="y")))


def test_a_taken_port_is_found_before_serve_starts(tmp_path: Path, capsys) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        path = write(tmp_path, port=taken.getsockname()[1])
        with pytest.raises(PortInUse):
            preflight(path)
        assert main([str(path)]) == 1
    assert "PortInUse: Port" in capsys.readouterr().err


def test_what_serving_would_miss_is_found_before_serve_starts(tmp_path: Path, settings, registry, tiny_llama) -> None:
    from r1ray.model.importer import import_model

    with pytest.raises(ModelNotFound):
        preflight(write(tmp_path), settings=settings)
    import_model(str(tiny_llama), name="tiny", registry=registry)
    good = write(tmp_path, ref="tiny", collection="")
    preflight(good, settings=settings)
    other = tmp_path / "other.jinja"
    other.write_text("{{ messages }}", encoding="utf-8")
    with pytest.raises(TemplateMismatch):
        preflight(write(tmp_path, ref="tiny", collection="", chat_template=str(other)), settings=settings)
    good = write(tmp_path, ref="tiny", collection="")
    small = Cluster(address="x", nodes=(Node(id="n", resources={"CPU": 0.25}),))
    with pytest.raises(ClusterTooSmall, match="serving bank-assistant"):
        preflight(good, settings=settings, on=small)
    with pytest.raises(CollectionNotFound):
        preflight(write(tmp_path, ref="tiny", collection="nowhere"), settings=settings)


def test_a_replica_that_leaves_has_as_long_for_its_streams_as_an_old_version() -> None:
    from r1ray.serve.app import _model_options

    assert _model_options(ModelArgs(id="a", ref="a@1", drain_timeout_s=1234.0))["graceful_shutdown_timeout_s"] == 1234


def test_the_proxy_must_not_cut_before_requests_are_over_time(tmp_path: Path) -> None:
    path = write(tmp_path)
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    tree["http_options"]["request_timeout_s"] = 60
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    with pytest.raises(InvalidValue, match=r"router\.request_timeout_s=1790 is not below http_options\.request_timeout_s=60"):
        preflight(path)
