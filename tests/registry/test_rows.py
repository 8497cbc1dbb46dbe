"""What MLflow keeps: references, aliases and their histories, listings."""

from __future__ import annotations

import pytest

from r1ray.errors import InvalidValue, ModelNotFound, RegistryError, VersionNotFound
from r1ray.observe import client as mlflow_client
from r1ray.registry import Registry
from r1ray.settings import Settings
from tests.registry.conftest import add


def test_a_registered_model_resolves_by_name_number_and_alias(shared):
    first, second = add(shared, "names"), add(shared, "names", b"second")
    assert (first.version, second.version) == (1, 2)
    assert shared.resolve("names").version == 2, "the newest while nothing is promoted"
    shared.promote("names@1")
    assert shared.resolve("names").version == 1
    assert shared.resolve("names@production").ref == "names@1"
    assert shared.resolve("names@2").path == second.path
    assert shared.resolve("names@latest").version == 2


def test_an_unknown_model_or_version_is_named_with_what_exists(shared):
    add(shared, "known")
    with pytest.raises(ModelNotFound, match=r"'nowhere'.*known"):
        shared.resolve("nowhere")
    with pytest.raises(VersionNotFound, match="'7'; it has 1"):
        shared.resolve("known@7")
    with pytest.raises(VersionNotFound, match="'production'"):
        shared.resolve("known@production")


@pytest.mark.parametrize("name", ["", "a/b", "../up", "a@1", ".hidden", "a b", "x" * 129, "a'b"])
def test_a_name_that_is_no_directory_name_is_refused(shared, name):
    with pytest.raises(InvalidValue, match="no model name"), shared.staging(name):
        pass


def test_an_alias_moved_in_mlflows_own_ui_still_rolls_back(shared):
    for _ in range(2):
        add(shared, "moved")
    shared.promote("moved@1")
    mlflow_client.client(shared.settings.registry_uri).set_registered_model_alias("moved", "production", "2")
    assert shared.rollback("moved").version == 1


def test_aliases_have_histories_of_their_own(shared):
    for _ in range(2):
        add(shared, "aliases")
    shared.promote("aliases@1")
    shared.promote("aliases@2", alias="canary")
    assert {info.version: info.aliases for info in shared.versions("aliases")} == {2: ("canary",), 1: ("production",)}


def test_evaluations_add_metrics_to_a_version(shared):
    add(shared, "measured", metrics={"loss": 0.5})
    shared.annotate("measured@1", {"intent_accuracy": 0.9, "loss": 0.4})
    assert shared.versions("measured")[0].metrics == {"loss": 0.4, "intent_accuracy": 0.9}


def test_models_are_listed_by_name_with_their_aliases(tmp_path):
    registry = Registry(Settings(home=tmp_path))
    assert registry.models() == []
    for name in ("zeta", "alpha"):
        add(registry, name)
    registry.promote("zeta@1")
    assert [(model.name, dict(model.aliases), len(model.versions)) for model in registry.models()] == [
        ("alpha", {}, 1),
        ("zeta", {"production": 1}, 1),
    ]


def test_a_moved_home_still_resolves(tmp_path):
    registry = Registry(Settings(home=tmp_path / "old"))
    add(registry, "mover")
    (tmp_path / "old").rename(tmp_path / "new")
    assert Registry(Settings(home=tmp_path / "new")).resolve("mover").path.is_relative_to(tmp_path / "new")


def test_a_server_that_does_not_answer_is_a_clear_error(tmp_path):
    registry = Registry(Settings(home=tmp_path, registry="http://127.0.0.1:9"))
    with pytest.raises(RegistryError, match=r"No MLflow server answers at http://127\.0\.0\.1:9"):
        registry.resolve("any")
