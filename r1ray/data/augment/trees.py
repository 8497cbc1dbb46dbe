"""Dialogue-tree expansion (seed 004): every way through a template's branches, with drawn wordings and values.

    trees:
      - name: card_lost
        language: zh
        slots: {card_type: [信用卡, 借记卡]}
        start: report
        nodes:
          report:
            user: ["我的{card_type}丢了。", "{card_type}不见了。"]
            assistant: "请问需要马上挂失{card_type}吗？"
            intent: card_lost
            entities: {card_type: "{card_type}"}
            next: [yes, no]
          yes: {user: [需要。], assistant: "已为您挂失。"}
          no: {user: [先不用。], assistant: "好的，需要时请再联系我们。"}

A node is a question and its answer; `next` lists the nodes that may follow, none ends the dialogue.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping
from pathlib import Path

import yaml
from pydantic import Field, ValidationError

from r1ray.config import Config
from r1ray.data.augment.config import TreesConfig
from r1ray.data.augment.provenance import Made, Operation
from r1ray.errors import InvalidValue
from r1ray.settings import Settings
from r1ray.types import Annotations, Conversation, EntityValue, Message

__all__ = ["DialogueTrees", "Node", "Tree"]

_LONGEST_PATH = 16


class Node(Config):
    """One question and its answer."""

    user: tuple[str, ...] = Field(min_length=1, description="Wordings of the question; {slot} stands for a value.")
    assistant: str = Field(min_length=1, description="The answer.")
    intent: str | None = Field(default=None, description="Intent of the answer.")
    entities: dict[str, str] = Field(default_factory=dict, description="Entities of the answer; {slot} stands for a value.")
    next: tuple[str, ...] = Field(default=(), description="Nodes that may follow; none: the dialogue ends.")


class Tree(Config):
    """A dialogue with branches."""

    name: str = Field(min_length=1, description="Part of the rows' ids.")
    slots: dict[str, tuple[EntityValue, ...]] = Field(default_factory=dict, description="Slot -> values, one of which holds in a dialogue.")
    language: str = Field(default="zh", description="zh or en.")
    start: str = Field(description="The first node.")
    nodes: dict[str, Node] = Field(min_length=1, description="Node by name.")

    def paths(self) -> Iterator[tuple[str, ...]]:
        """Every way from the start to an end, loops cut off at 16 nodes."""
        stack: list[tuple[str, ...]] = [(self.start,)]
        while stack:
            path = stack.pop()
            following = self.nodes[path[-1]].next
            if not following:
                yield path
            elif len(path) < _LONGEST_PATH:
                stack += [(*path, name) for name in reversed(following)]


class DialogueTrees:
    """Makes rows of its own instead of changing given ones."""

    name = "trees"

    def __init__(self, config: TreesConfig, seed: int) -> None:
        self._num = config.num
        self._seed = seed
        self.trees = _read(Settings().locate(config.path))

    def made(self) -> Iterator[Made]:
        """At most `num` different dialogues of each tree; all paths take turns, so that none is left out while there is room."""
        for tree in self.trees:
            yield from itertools.islice(self._of(tree), self._num)

    def _of(self, tree: Tree) -> Iterator[Made]:
        rng = random.Random(f"{self._seed}/trees/{tree.name}")
        paths = list(itertools.islice(tree.paths(), 10_000))
        seen: set[tuple[str, ...]] = set()
        num_known = 0
        for number in itertools.count():
            path = paths[number % len(paths)]
            values = {slot: rng.choice(choices) for slot, choices in tree.slots.items()}
            messages = tuple(_turns(tree, path, values, rng))
            content = tuple(m.content for m in messages)
            if content in seen:
                num_known += 1
                if num_known > 20 * len(paths):  # everything there is has been drawn, or nearly
                    return
                continue
            num_known = 0
            seen.add(content)
            # dialogues of one path share a stem, so that `hold_out` does not split them
            name = f"tree-{tree.name}-{'-'.join(path)}#{number}"
            detail = {"tree": tree.name, "path": " ".join(path), **{slot: str(value) for slot, value in values.items()}}
            operation = Operation(name=self.name, seed=self._seed, detail=detail)
            yield Made(
                conversation=Conversation(id=name, messages=messages, source=f"tree:{tree.name}"), origin="", operations=(operation,)
            )


def _turns(tree: Tree, path: tuple[str, ...], values: Mapping[str, EntityValue], rng: random.Random) -> Iterator[Message]:
    for name in path:
        node = tree.nodes[name]
        yield Message(role="user", content=rng.choice(node.user).format(**values))
        entities = {entity: _value(text, values) for entity, text in node.entities.items()}
        annotated = Annotations(intent=node.intent, entities=entities) if node.intent or entities else None
        yield Message(role="assistant", content=node.assistant.format(**values), annotations=annotated)


def _value(text: str, values: Mapping[str, EntityValue]) -> EntityValue:
    """A text that is one slot is its value, numbers included."""
    return values[text[1:-1]] if text.startswith("{") and text[1:-1] in values else text.format(**values)


def _read(path: Path) -> list[Tree]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        trees = [Tree.model_validate(entry) for entry in tree["trees"]]
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, ValidationError) as error:
        raise InvalidValue(f"{path} holds no dialogue trees: {error}. docs/data.md has the form.") from error
    for entry in trees:
        _check(entry, path)
    return trees


def _check(tree: Tree, path: Path) -> None:
    wanted = {tree.start, *(name for node in tree.nodes.values() for name in node.next)}
    if missing := sorted(wanted - set(tree.nodes)):
        raise InvalidValue(f"{path}: tree {tree.name} goes to {', '.join(missing)}, which it has not. Add the node or mend `next`.")
    for name, node in tree.nodes.items():
        for text in (*node.user, node.assistant, *node.entities.values()):
            try:
                text.format(**tree.slots)
            except (KeyError, IndexError, ValueError) as error:
                raise InvalidValue(f"{path}: tree {tree.name}, node {name}: {text!r} has an unknown slot or brace: {error}.") from error
    if next(tree.paths(), None) is None:
        raise InvalidValue(f"{path}: no path of tree {tree.name} ends within {_LONGEST_PATH} nodes. Give a node an empty `next`.")
