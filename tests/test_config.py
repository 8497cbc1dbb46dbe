"""Reading a config: precedence, the override grammar, and errors that name the key and what to do."""

from __future__ import annotations

import subprocess
import sys
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, ValidationError

from r1ray.config import Config, config_hash, described, dump_yaml, keys, load_config, parse_arguments
from r1ray.errors import InvalidValue, UnknownKey


class Adapter(Config):
    type: Literal["lora"] = "lora"
    rank: int = Field(default=16, ge=1)


class Full(Config):
    type: Literal["full"] = "full"
    freeze: bool = False


class Train(Config):
    num_workers: int = Field(default=1, ge=1)
    learning_rate: float = 1e-4
    tags: tuple[str, ...] = ()
    method: Adapter | Full = Field(default_factory=Adapter, discriminator="type")


class Server(Config):
    port: int = 80


class Job(Config):
    name: str = "job"
    note: str | None = None
    extra: dict[str, float] = Field(default_factory=dict)
    train: Train = Field(default_factory=Train)
    servers: tuple[Server, ...] = ()


def written(tmp_path, text):
    path = tmp_path / "job.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_an_override_wins_over_the_file_and_the_file_over_the_default(tmp_path):
    path = written(tmp_path, "name: from-file\ntrain:\n  num_workers: 2\n")
    config = load_config(Job, path, ["train.num_workers=3"])
    assert (config.name, config.train.num_workers, config.train.learning_rate) == ("from-file", 3, 1e-4)


def test_the_last_of_two_overrides_wins():
    assert load_config(Job, None, ["name=a", "name=b"]).name == "b"


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        ("train.learning_rate=2e-5", "learning_rate", 2e-5),
        ("train.learning_rate=-1E+3", "learning_rate", -1000.0),
        ("train.tags=[a, b]", "tags", ("a", "b")),
        ("train.num_workers= 4 ", "num_workers", 4),
    ],
)
def test_values_are_read_as_yaml_with_exponents_as_numbers(override, field, value):
    assert getattr(load_config(Job, None, [override]).train, field) == value


def test_null_unsets_and_an_equals_sign_may_stand_in_the_value(tmp_path):
    path = written(tmp_path, "note: something\n")
    assert load_config(Job, path, ["note=null"]).note is None
    assert load_config(Job, None, ["name=a=b"]).name == "a=b"


def test_a_variant_is_chosen_by_its_type():
    config = load_config(Job, None, ["train.method.type=full", "train.method.freeze=true"])
    assert config.train.method == Full(freeze=True)


def test_a_key_of_a_mapping_can_be_set():
    assert load_config(Job, None, ["extra.weight=0.5"]).extra == {"weight": 0.5}


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("train.num_worker=2", "train.num_workers"),
        ("tarin.num_workers=2", "train"),
        ("num_workers=2", "train.num_workers"),
        ("train.method={type: lora, rnak: 2}", "train.method.rank"),
        ("servers=[{prot: 1}]", "servers.0.port"),
        ("zzz=2", None),
    ],
)
def test_an_unknown_key_names_the_nearest(override, nearest):
    with pytest.raises(UnknownKey) as caught:
        load_config(Job, None, [override])
    if nearest:
        assert f"Did you mean {nearest!r}?" in str(caught.value)
    else:
        assert "Known keys: name, note, extra, train" in str(caught.value)


@pytest.mark.parametrize("override", ["train", "=1", "", "train.num_workers", "name={a", ".=1", "train..num_workers=1", "a.=1"])
def test_a_malformed_override_is_refused_with_the_form(override):
    with pytest.raises((InvalidValue, UnknownKey)):
        load_config(Job, None, [override])


def test_an_override_below_a_plain_value_is_refused(tmp_path):
    with pytest.raises(InvalidValue, match="has no fields"):
        load_config(Job, written(tmp_path, "name: x\n"), ["name.first=1"])


def test_a_section_that_the_file_leaves_empty_takes_overrides(tmp_path):
    assert load_config(Job, written(tmp_path, "train:\n"), ["train.num_workers=2"]).train.num_workers == 2


def test_a_section_left_empty_means_its_defaults(tmp_path):
    assert load_config(Job, written(tmp_path, "train:\n")).train == Train()


def test_a_value_out_of_limits_names_the_key_the_limit_and_the_value(tmp_path):
    with pytest.raises(InvalidValue, match=r"train\.num_workers: .*greater than or equal to 1 \(got 0\)"):
        load_config(Job, written(tmp_path, "train: {num_workers: 0}"))


def test_keys_that_do_not_go_together_are_told_without_the_whole_section():
    from r1ray.train.config import FinetuneConfig

    with pytest.raises(InvalidValue) as told:
        load_config(FinetuneConfig, None, ["data.path=x", "train.method=prefix", "train.gradient_checkpointing=true"])
    assert "In the command line: train: method prefix keeps its keys" in str(told.value)
    assert "num_workers" not in str(told.value) and "Value error" not in str(told.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "holds a list"),
        ("a: [", "no readable YAML"),
        ("name: x\nname: y\n", "'name' twice"),
        ("1: x", "Keys should be strings"),
    ],
)
def test_a_file_that_is_no_config_is_refused(tmp_path, text, message):
    with pytest.raises((InvalidValue, UnknownKey), match=message):
        load_config(Job, written(tmp_path, text))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InvalidValue, match=r"No config file at .*nowhere\.yaml"):
        load_config(Job, tmp_path / "nowhere.yaml")


def test_a_directory_is_no_config_file(tmp_path):
    with pytest.raises(InvalidValue):
        load_config(Job, tmp_path)


def test_an_empty_file_means_the_defaults(tmp_path):
    assert load_config(Job, written(tmp_path, "# nothing\n")) == Job()


def test_overrides_may_stand_on_both_sides_of_the_option(tmp_path):
    path = written(tmp_path, "name: x\n")
    config = parse_arguments(Job, None, ["train.num_workers=2", "--config", str(path), "train.learning_rate=1e-3"])
    assert (config.name, config.train.num_workers, config.train.learning_rate) == ("x", 2, 1e-3)


@pytest.mark.parametrize(
    "written_as",
    [["--train.num_workers", "2", "--name", "x"], ["--train.num_workers=2", "name=x"], ["name=x", "--train.num_workers", "2"]],
)
def test_a_setting_may_be_written_as_an_option(written_as):
    config = parse_arguments(Job, None, written_as)
    assert (config.name, config.train.num_workers) == ("x", 2)


@pytest.mark.parametrize("written_as", [["--name"], ["--name", "--train.num_workers", "2"]])
def test_an_option_without_a_value_says_how_to_write_it(written_as, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_arguments(Job, None, written_as)
    assert ended.value.code == 2
    assert "--name has no value. Write --name VALUE or name=VALUE" in capsys.readouterr().err


def test_an_unknown_option_names_the_nearest_setting():
    with pytest.raises(UnknownKey, match="num_workers"):
        parse_arguments(Job, None, ["--train.num-workers", "2"])


def test_every_key_is_listed_with_both_variants():
    assert {"train", "train.num_workers", "train.method.rank", "train.method.freeze"} <= set(keys(Job))


def test_a_config_is_immutable():
    with pytest.raises(ValidationError):
        Job().name = "other"


CONFIGS = st.builds(
    Job,
    name=st.text(max_size=20),
    note=st.none() | st.text(max_size=20),
    extra=st.dictionaries(st.text(max_size=5), st.floats(allow_nan=False, allow_infinity=False), max_size=3),
    train=st.builds(
        Train,
        num_workers=st.integers(1, 100),
        learning_rate=st.floats(1e-12, 1e12),
        tags=st.lists(st.text(max_size=8), max_size=3).map(tuple),
        method=st.builds(Adapter, rank=st.integers(1, 99)) | st.builds(Full),
    ),
)


@given(config=CONFIGS)
@settings(deadline=None, max_examples=60)
def test_the_resolved_config_reads_back_as_itself(config, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "round-trip.yaml"
    path.write_text(dump_yaml(config), encoding="utf-8")
    again = load_config(Job, path)
    assert again == config
    assert config_hash(again) == config_hash(config)


@given(one=CONFIGS, other=CONFIGS)
@settings(deadline=None, max_examples=60)
def test_the_hash_tells_configs_apart(one, other):
    assert (config_hash(one) == config_hash(other)) == (one.model_dump_json() == other.model_dump_json())


@given(st.text(max_size=30))
@settings(deadline=None, max_examples=100)
def test_no_override_raises_anything_but_our_errors(text):
    try:
        load_config(Job, None, [text])
    except (InvalidValue, UnknownKey) as error:
        assert str(error).endswith((".", "?"))


def test_the_hash_is_the_same_in_another_process():
    code = "from r1ray.types import Sampling; from r1ray.config import config_hash; print(config_hash(Sampling(stop=('a',))))"
    prints = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout for _ in range(2)}
    assert len(prints) == 1


def test_keys_are_listed_with_default_and_meaning(capsys):
    with pytest.raises(SystemExit) as ended:
        parse_arguments(Job, None, ["--keys"])
    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split("  # ")[0].split(" = ")[0] for line in lines} == {*keys(Job), "servers[].port"}
    assert all("  # " in line for line in lines)


class Evaluation(Config):
    train: Train = Field(default_factory=lambda: Train(num_workers=4), description="How.")
    server: Server | None = Field(default=None, description="Where.")
    path: str = Field(description="What.")


def test_listed_defaults_are_those_of_the_job_not_of_the_groups_class():
    lines = list(described(Evaluation))
    assert "train.num_workers = 4  # " in lines
    assert "train  # How." in lines
    assert "server = null  # Where." in lines
    assert "server.port = 80  # " in lines
    assert "path = (required)  # What." in lines


def test_a_mistake_on_the_command_line_is_not_blamed_on_the_file_alone(tmp_path):
    path = written(tmp_path, "name: a\n")
    with pytest.raises(UnknownKey, match=f"Unknown key 'nmae' in {path} or the command line. Did you mean 'name'?"):
        load_config(Job, path, ["nmae=b"])
    with pytest.raises(UnknownKey, match=r"in the command line\. "):
        load_config(Job, None, ["nmae=b"])
