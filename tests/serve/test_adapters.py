"""Adapters beside their base: each answers to a model id of its own, from one engine, and follows its own alias."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from pydantic import ValidationError

from r1ray.errors import AdapterMismatch, UnsupportedModel
from r1ray.serve.adapters import AdapterShelf
from r1ray.serve.catalog import look_up
from r1ray.serve.chat import Card, ChatService, Served
from r1ray.serve.config import AppArgs, ModelArgs
from r1ray.serve.host import ModelHost, registry_host
from r1ray.serve.meter import Meter
from r1ray.serve.protocol import Delta, Done, Fault, TextRequest
from r1ray.serve.request import CompletionBody
from r1ray.serve.wire import model_body
from r1ray.types import Message, Sampling, SamplingPolicy

ARGS = {"id": "base", "ref": "fake@production", "adapters": [{"id": "faq", "ref": "faq@production"}, {"id": "sales", "ref": "sales@1"}]}


@pytest.fixture
def beside(fakes, tmp_path):
    """A host over the fake engine, which says the name of the adapter that a request asks it for; its registry can be changed."""

    def adapter(name, version=1, *, base="0" * 64, kind="LORA", policy=None, **manifest):
        path = tmp_path / f"{name}-{version}"
        path.mkdir(exist_ok=True)
        (path / "adapter_config.json").write_text(json.dumps({"peft_type": kind}), encoding="utf-8")
        artifact = fakes.make_artifact(version, policy=policy)
        told = {"name": name, "kind": "adapter", "base": "fake@1", "base_sha256": base, "weights_sha256": "1" * 64, **manifest}
        return replace(artifact, path=path, manifest=artifact.manifest.model_copy(update=told))

    def says_its_adapter(request):
        return list((request.adapter or "base").encode()) * 10

    known = {"faq@production": adapter("faq"), "sales@1": adapter("sales")}
    shelf = fakes.Shelf(fakes.make_artifact(), answer=says_its_adapter, token_delay_s=0.002)
    args = ModelArgs.model_validate(ARGS)
    adapters = AdapterShelf(args.adapters, find=lambda ref: known[ref], codec=lambda _: fakes.ByteCodec())
    return SimpleNamespace(host=ModelHost(args, shelf.find, shelf.load, adapters), known=known, shelf=shelf, adapter=adapter)


def ask(adapter=None, id="r", **fields):
    return TextRequest(id=id, messages=(Message(role="user", content="hi"),), adapter=adapter, **fields)


async def answer(host, request):
    events = [event async for event in host.stream(request)]
    return "".join(event.content for event in events if isinstance(event, Delta)), events[-1]


def test_each_id_is_answered_by_its_own_adapter_in_one_engine(beside) -> None:
    async def run():
        await beside.host.start()
        return await asyncio.gather(*(answer(beside.host, ask(name, id=str(name))) for name in (None, "faq", "sales")))

    answers = asyncio.run(run())
    assert [text[:7] for text, _ in answers] == ["basebas", "faq@1fa", "sales@1"]
    assert [end.ref for _, end in answers] == ["fake@1", "faq@1", "sales@1"]
    assert len(beside.shelf.engines) == 1


def test_an_adapter_brings_its_own_system_prompt_and_sampling_policy(beside) -> None:
    short = SamplingPolicy(default=Sampling(max_tokens=3))
    beside.known["faq@production"] = beside.adapter("faq", system_prompt="be brief", policy=short)

    async def run():
        await beside.host.start()
        text, end = await answer(beside.host, ask("faq"))
        told = await beside.host.tokenize(None, (Message(role="user", content="hi"),), "faq")
        return text, end.finish_reason, bytes(told).decode()

    assert asyncio.run(run()) == ("faq", "length", "<system>be brief<user>hi<assistant>")


def test_a_promotion_of_one_adapter_is_followed_in_the_running_engine(beside) -> None:
    async def run():
        await beside.host.start()
        running = beside.host.stream(ask("faq", id="old"))
        await anext(running)
        beside.known["faq@production"] = beside.adapter("faq", 2)
        assert await beside.host.refresh() is False, "the base stays"
        new = await answer(beside.host, ask("faq", id="new"))
        loaded = set(beside.shelf.engines[0].adapters)
        old = [event async for event in running][-1]
        await asyncio.sleep(0.3)
        return new, loaded, old, set(beside.shelf.engines[0].adapters)

    (text, new), both, old, after = asyncio.run(run())
    assert text.startswith("faq@2") and (old.ref, new.ref) == ("faq@1", "faq@2") and isinstance(old, Done)
    assert both == {"faq@1", "faq@2", "sales@1"}
    assert after == {"faq@2", "sales@1"}


def test_an_adapter_that_does_not_fit_leaves_the_one_before_and_the_others(beside) -> None:
    async def run():
        await beside.host.start()
        beside.known["faq@production"] = beside.adapter("faq", 2, base="2" * 64)
        for _ in range(2):
            assert await beside.host.refresh() is False
        beside.known["faq@production"] = beside.adapter("faq", 3)
        before = await answer(beside.host, ask("faq"))
        await beside.host.refresh()
        return before[1].ref, (await answer(beside.host, ask("faq")))[1].ref, (await answer(beside.host, ask("sales")))[1].ref

    assert asyncio.run(run()) == ("faq@1", "faq@3", "sales@1")


def test_a_new_base_gets_the_adapters_too_or_the_old_one_stays(beside, fakes) -> None:
    async def run():
        await beside.host.start()
        beside.shelf.artifact = fakes.make_artifact(2)
        assert await beside.host.refresh() is True
        _, end = await answer(beside.host, ask("sales"))
        other = fakes.make_artifact(3)
        beside.shelf.artifact = replace(other, manifest=other.manifest.model_copy(update={"weights_sha256": "9" * 64}))
        with pytest.raises(AdapterMismatch, match="fake@3 has other weights"):
            await beside.host.refresh()
        return end.ref, (await beside.host.stats()).ref, len(beside.shelf.engines)

    assert asyncio.run(run()) == ("sales@1", "fake@2", 2), "what cannot be served is not loaded"


def test_a_new_base_waits_for_the_adapters_that_were_trained_on_it(beside, fakes) -> None:
    """Promoted one after the other: until all fit together, the old ones answer."""

    async def run():
        await beside.host.start()
        other = fakes.make_artifact(2)
        beside.shelf.artifact = replace(other, manifest=other.manifest.model_copy(update={"weights_sha256": "9" * 64}))
        with pytest.raises(AdapterMismatch):
            await beside.host.refresh()
        assert await beside.host.refresh() is False, "not tried again as it is"
        beside.known["faq@production"] = beside.adapter("faq", 2, base="9" * 64)
        with pytest.raises(AdapterMismatch, match="sales@1 was trained on"):
            await beside.host.refresh()
        assert (await answer(beside.host, ask("faq")))[1].ref == "faq@1"
        beside.known["sales@1"] = beside.adapter("sales", base="9" * 64)
        beside.known["faq@production"] = beside.adapter("faq", 3, base="9" * 64)
        assert await beside.host.refresh() is True
        return [(await answer(beside.host, ask(name)))[1].ref for name in (None, "faq", "sales")]

    assert asyncio.run(run()) == ["fake@2", "faq@3", "sales@1"]


@pytest.mark.parametrize(("told", "error"), [({"base": "2" * 64}, "other weights"), ({"kind": "PROMPT_TUNING"}, "soft prompt")])
def test_a_replica_does_not_start_with_what_is_no_adapter_of_its_base(beside, told, error) -> None:
    beside.known["sales@1"] = beside.adapter("sales", **told)
    with pytest.raises(AdapterMismatch, match=error):
        asyncio.run(beside.host.start())
    assert not beside.shelf.engines


def test_a_replica_does_not_start_on_an_engine_without_adapters(beside) -> None:
    load = beside.shelf.load

    async def without(artifact):
        version = await load(artifact)
        version.engine.capabilities -= {"adapters"}
        return version

    beside.host._load = without
    with pytest.raises(UnsupportedModel, match="2 adapters are to be served beside a model whose engine takes none"):
        asyncio.run(beside.host.start())
    assert beside.shelf.engines[0].stats().state == "stopped"


def test_a_name_that_this_replica_does_not_know_is_a_fault(beside) -> None:
    async def run():
        await beside.host.start()
        return [event async for event in beside.host.stream(ask("other"))]

    (fault,) = asyncio.run(run())
    assert isinstance(fault, Fault) and (fault.status, fault.code) == (404, "model_not_found")


def test_clients_see_adapters_as_models(beside) -> None:
    card = Card(id="base", created=1, root="fake@1", max_model_len=2048)
    of_faq = replace(card, id="faq", root="faq@1", parent="base")
    served = {"base": Served(card, beside.host), "faq": Served(of_faq, beside.host, adapter="faq")}
    service = ChatService(served, AppArgs.model_validate({"models": [ARGS]}), Meter([]))

    async def run():
        await beside.host.start()
        live = await service.complete(CompletionBody(model="faq", prompt="x", max_tokens=5), "r")
        events = [event async for _, event in live.events]
        return "".join(event.content for event in events if isinstance(event, Delta)), list(await service.stats())

    assert asyncio.run(run()) == ("faq@1", ["base"])
    assert {key: model_body(of_faq)[key] for key in ("id", "root", "parent")} == {"id": "faq", "root": "faq@1", "parent": "base"}


@pytest.mark.parametrize(
    ("engine", "what"),
    [
        ({"stages": 2}, "a split model or an ONNX export takes none"),
        ({"type": "onnx"}, "a split model or an ONNX export takes none"),
        ({"type": "vllm", "vllm": {"max_adapters": 1}}, "engine.vllm.max_adapters to at least that, it is 1"),
    ],
)
def test_an_engine_that_takes_no_adapters_is_an_error_of_the_settings(engine, what) -> None:
    with pytest.raises(ValidationError, match=what):
        ModelArgs.model_validate(ARGS | {"engine": engine})


def test_an_adapters_id_is_an_id_like_any_other() -> None:
    with pytest.raises(ValidationError, match="'faq' is given twice"):
        AppArgs.model_validate({"models": [ARGS, {"id": "faq", "ref": "x"}]})


def test_an_adapter_beside_its_base_answers_as_it_does_merged(registry, tiny_llama, tmp_path) -> None:
    """The real engine on a registry: what preflight sees, and what three ids answer."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from r1ray.model.importer import import_model

    base = import_model(str(tiny_llama), name="tiny", registry=registry)
    torch.manual_seed(0)
    settings = LoraConfig(r=4, lora_alpha=64, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32), settings).save_pretrained(tmp_path / "made")
    made = import_model(str(tmp_path / "made"), name="faq", base=base.ref, registry=registry)
    engine = {"dtype": "float32", "backend": "transformers", "num_threads": 1, "num_slots": 2, "max_context": 256}
    beside_it = ModelArgs.model_validate({"id": "t", "ref": base.ref, "engine": engine, "adapters": [{"id": "faq", "ref": made.ref}]})
    entries = look_up([beside_it])
    assert [(entry.card.root, entry.card.parent) for entry in entries.values()] == [("tiny@1", None), ("faq@1", "t")]
    with pytest.raises(AdapterMismatch, match="of kind full"):
        look_up([beside_it.model_copy(update={"adapters": (beside_it.adapters[0].model_copy(update={"ref": base.ref}),)})])

    async def texts(args, *names):
        host = registry_host(args)
        await host.start()
        greedy = {"overrides": {"temperature": 0, "max_tokens": 12}, "ignore_eos": True}
        try:
            return [(await answer(host, ask(name, id=str(name), **greedy)))[0] for name in names]
        finally:
            await host.stop()

    alone = [asyncio.run(texts(ModelArgs.model_validate({"id": "x", "ref": ref, "engine": engine}), None))[0] for ref in ("tiny", "faq")]
    assert asyncio.run(texts(beside_it, None, "faq")) == alone
    assert alone[0] != alone[1]
