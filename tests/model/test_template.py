"""The template pair: what training sees is what serving asks for, and R1's reasoning reaches the labels."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1ray.errors import ArtifactInvalid, TemplateMismatch, TemplateNotTrainable, UnsupportedModel
from r1ray.model import template
from r1ray.types import Artifact, Manifest, Message

R1 = template.shipped("deepseek_r1")
CHATML = template.shipped("chatml")
# SmolLM2's own: without a system message it inserts one
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful AI "
    "assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + "
    "message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MARKED = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
)
R1_TOKENS = {"eos": "<｜end▁of▁sentence｜>", "bos": "<｜begin▁of▁sentence｜>"}
TEMPLATES = {
    "r1": (R1, R1_TOKENS),
    "chatml": (CHATML, {}),
    "smollm2": (SMOLLM2, {}),
    "llama3": (LLAMA3, {"bos": "<|begin_of_text|>", "eos": "<|eot_id|>"}),
    "plain": (template.shipped("plain"), R1_TOKENS),
}
USER = Message(role="user", content="I lost my card")
ANSWER = Message(role="assistant", content="It is blocked.")
THOUGHT = dataclasses.replace(ANSWER, reasoning="The user lost a card.\nI block it.")


@pytest.fixture(scope="module")
def tokenizers(tiny_tokenizer):
    """Name -> (tokenizer for inference, tokenizer for training, pair)."""
    pairs = {name: (template.pair_for(text), tokens) for name, (text, tokens) in TEMPLATES.items()}
    return {
        name: (tiny_tokenizer(pair.infer, **tokens), tiny_tokenizer(pair.train, **tokens), pair) for name, (pair, tokens) in pairs.items()
    }


def learned(tokenizer, messages, **options):
    ids, mask = template.training_ids(tokenizer, messages, **options)
    assert len(ids) == len(mask)
    return tokenizer.decode([token for token, bit in zip(ids, mask, strict=True) if bit])


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_known_family_can_be_trained(tokenizers, name):
    pair = tokenizers[name][2]
    assert pair.trainable
    assert pair.infer == TEMPLATES[name][0]
    assert pair.thinks == (name == "r1")


def test_r1s_reasoning_reaches_the_labels(tokenizers):
    assert learned(tokenizers["r1"][1], [USER, THOUGHT]) == (
        "<think>\nThe user lost a card.\nI block it.\n</think>\n\nIt is blocked.<｜end▁of▁sentence｜>"
    )


def test_r1s_shipped_template_alone_would_delete_the_reasoning(tokenizers):
    full = {"role": "assistant", "content": "<think>\nThe user lost a card.\n</think>\n\nIt is blocked."}
    messages = [{"role": "user", "content": "I lost my card"}, full]
    shipped, twin, _ = tokenizers["r1"]
    assert "The user lost" not in shipped.apply_chat_template(messages, tokenize=False)
    assert "The user lost" in twin.apply_chat_template(messages, tokenize=False)


def test_r1s_twin_keeps_every_turns_reasoning_and_its_tool_turns(tokenizers):
    twin = tokenizers["r1"][1]
    text = twin.decode(template.training_ids(twin, [USER, THOUGHT, USER, THOUGHT])[0])
    assert text.count("<think>\nThe user lost") == 2
    assert learned(twin, [USER, Message(role="tool", content="{}"), ANSWER]) == "It is blocked.<｜end▁of▁sentence｜>"


@pytest.mark.parametrize("name", TEMPLATES)
def test_only_the_assistants_words_and_end_of_turn_are_learned(tokenizers, name):
    text = learned(tokenizers[name][1], [USER, ANSWER, USER, ANSWER])
    end = {"r1": "<｜end▁of▁sentence｜>", "plain": "<｜end▁of▁sentence｜>", "llama3": "<|eot_id|>"}.get(name, "<|im_end|>")
    assert text == f"It is blocked.{end}" * 2


CONTENT = st.text(st.sampled_from("ab 好\n\t.{}\"'<"), min_size=1, max_size=12).filter(lambda text: bool(text.strip()))


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=25, deadline=None)
@given(contents=st.lists(CONTENT, min_size=2, max_size=4), system=st.one_of(st.none(), CONTENT))
def test_without_reasoning_training_and_inference_see_the_same_tokens(tokenizers, name, contents, system):
    infer, train, _ = tokenizers[name]
    turns = [Message(role="user" if i % 2 == 0 else "assistant", content=text) for i, text in enumerate(contents)]
    ids, _ = template.training_ids(train, turns, system_prompt=system)
    plain = [{"role": turn.role, "content": turn.content} for turn in turns]
    plain = plain if system is None else [{"role": "system", "content": system}, *plain]
    assert infer.apply_chat_template(plain, return_dict=True)["input_ids"] == ids


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_the_prompt_is_a_prefix_of_what_was_trained(tokenizers, name, system):
    infer, train, pair = tokenizers[name]
    prompt = template.prompt_ids(infer, [USER, ANSWER, USER], system_prompt=system)
    ids, mask = template.training_ids(train, [USER, ANSWER, USER, THOUGHT], system_prompt=system)
    forced = 2 if pair.thinks else 0  # `<think>` and its line break
    assert ids[: len(prompt)] == prompt
    assert mask[: len(prompt) - forced][-1] == 0
    assert all(mask[len(prompt) - forced : len(prompt) + 1])


def test_a_prompt_leaves_out_earlier_reasoning(tokenizers):
    infer = tokenizers["chatml"][0]
    assert template.prompt_ids(infer, [USER, THOUGHT, USER]) == template.prompt_ids(infer, [USER, ANSWER, USER])


def test_a_begin_token_appears_once(tokenizers):
    infer, train, _ = tokenizers["llama3"]
    assert infer.decode(template.prompt_ids(infer, [USER])).count("<|begin_of_text|>") == 1
    assert train.decode(template.training_ids(train, [USER, ANSWER], system_prompt="Hi")[0]).count("<|begin_of_text|>") == 1


def test_an_explicit_system_message_replaces_the_built_in_one(tokenizers):
    infer = tokenizers["smollm2"][0]
    assert "helpful" in infer.decode(template.prompt_ids(infer, [USER]))
    text = infer.decode(template.prompt_ids(infer, [USER], system_prompt="You are a bank."))
    assert "helpful" not in text
    assert "You are a bank." in text
    own = [Message(role="system", content="Mine."), USER]
    assert "You are a bank." not in infer.decode(template.prompt_ids(infer, own, system_prompt="You are a bank."))


def test_a_template_with_marks_is_its_own_twin():
    pair = template.pair_for(MARKED)
    assert pair.train == pair.infer == MARKED
    assert pair.trainable


def test_a_template_without_a_twin_can_be_served_but_not_trained(tiny_tokenizer):
    odd = "{% for message in messages %}{{ message['content'] | upper }};{% endfor %}"
    pair = template.pair_for(odd)
    assert not pair.trainable
    tokenizer = tiny_tokenizer(pair.train)
    assert template.prompt_ids(tokenizer, [USER])
    with pytest.raises(TemplateNotTrainable, match="generation"):
        template.training_ids(tokenizer, [USER, ANSWER])


def test_a_broken_template_is_refused():
    with pytest.raises(UnsupportedModel, match="chat template"):
        template.pair_for("{% for message in %}")


def artifact_in(directory, pair):
    info = template.write(pair, directory)
    manifest = Manifest(
        name="m", kind="full", family="llama", weights_sha256="0", template=info, context_length=8, num_parameters=1, created_at="now"
    )
    return Artifact(path=directory, manifest=manifest, version=3)


def test_the_pair_travels_inside_the_artifact(tmp_path):
    pair = template.pair_for(R1)
    assert template.read(artifact_in(tmp_path, pair)) == pair


def test_an_altered_template_is_noticed(tmp_path):
    artifact = artifact_in(tmp_path, template.pair_for(CHATML))
    (tmp_path / "chat_template.train.jinja").write_text(CHATML)
    with pytest.raises(ArtifactInvalid, match="altered"):
        template.read(artifact)


def test_an_override_must_be_the_artifacts_own_template(tmp_path):
    artifact = artifact_in(tmp_path, template.pair_for(CHATML))
    template.check_override(artifact, None)
    template.check_override(artifact, CHATML + "\n")
    with pytest.raises(TemplateMismatch, match="m@3"):
        template.check_override(artifact, LLAMA3)
