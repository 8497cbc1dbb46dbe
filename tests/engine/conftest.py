"""Tiny models that answer in varied tokens, and what transformers' own generate says to each prompt."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from r1ray.engine.config import EngineConfig
from r1ray.engine.protocol import GenerationRequest, TokenChunk
from r1ray.types import Sampling

FAMILIES = ("tiny_llama", "tiny_qwen2", "tiny_deepseek_v3")
NATIVE_FAMILIES = ("tiny_llama", "tiny_qwen2", "tiny_qwen3")


def lively(directory: Path) -> Any:
    """A copy of the model with larger weights: random ones as initialised repeat one token for ever."""
    return copy.deepcopy(_lively(directory))


@functools.cache
def _lively(directory: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 and ".gate." not in name:  # a saturated router ties its experts; rounding would choose among them
                parameter.mul_(6)
    return model.eval()


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def native() -> Any:
    """The parameter `native`, skipped with the reason where the compiled kernels do not run."""
    from r1ray.engine.native import build

    return pytest.param("native", marks=pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not())))


PLACES = [
    "tiny_llama/transformers",
    "tiny_deepseek_v3/transformers",
    *(f"{name}/{way}" for way in ("native", "onnx") for name in NATIVE_FAMILIES),
]


@pytest.fixture(params=PLACES)
def placed(request: pytest.FixtureRequest) -> tuple[Path, str]:
    """A family and a backend that runs it."""
    from r1ray.engine.native import build

    family, backend = request.param.split("/")
    if backend == "native" and (why := build.why_not()):
        pytest.skip(why)
    return request.getfixturevalue(family), backend


@pytest.fixture(scope="session")
def tiny_qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen3: norms on queries and keys."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=64, vocab_size=640, max_position_embeddings=512, tie_word_embeddings=True))
    model.save_pretrained(out := tmp_path_factory.mktemp("tiny_qwen3"))
    return out


@functools.cache
def _greedy(directory: Path, adapter: Path | None, prompt: tuple[int, ...], num: int) -> list[int]:
    import torch
    from peft import PeftModel

    model = lively(directory)
    model = model if adapter is None else PeftModel.from_pretrained(model, adapter)
    ids = torch.tensor([prompt])
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=num, min_new_tokens=num, do_sample=False, pad_token_id=0
    )
    return out[0, len(prompt) :].tolist()


@pytest.fixture
def reference() -> Callable[..., list[int]]:
    """(model directory, prompt, number of tokens, adapter directory) -> transformers' own greedy tokens."""

    def greedy(directory: Path, prompt: tuple[int, ...], num: int, adapter: Path | None = None) -> list[int]:
        return _greedy(directory, adapter, prompt, num)

    return greedy


def prompts(num: int, *, seed: int = 0, longest: int = 60) -> list[tuple[int, ...]]:
    import random

    rng = random.Random(seed)
    return [tuple(rng.randrange(20, 500) for _ in range(rng.randint(1, longest))) for _ in range(num)]


def wanted(
    id: str, prompt: tuple[int, ...], *, max_tokens: int = 12, temperature: float = 0, sampling: dict[str, Any] | None = None, **rest: Any
) -> GenerationRequest:
    rest.setdefault("ignore_eos", True)
    settings = {"temperature": temperature, "max_tokens": max_tokens, **(sampling or {})}
    return GenerationRequest(id=id, prompt_ids=prompt, sampling=Sampling(**settings), **rest)


def engine_of(
    model: Any, *, eos: tuple[int, ...] = (), num_blocks: int = 64, dtype: str = "float32", soft: Any = None, **settings: Any
) -> Any:
    """An engine over `model`, on the backend that the settings name; transformers' modules by default. `soft`: before every stream."""
    from r1ray.engine.batching import BatchingEngine
    from r1ray.engine.native.model import NativeModel, NativeOptions
    from r1ray.engine.paged import TransformersBackend

    way = settings.pop("backend", "transformers")
    config = EngineConfig(num_threads=1, dtype=dtype, **settings)
    context = model.config.max_position_embeddings
    if way == "onnx":
        backend: Any = onnx_backend(model, num_blocks=num_blocks, num_rows=config.num_slots)
    elif way == "native":
        options = NativeOptions(precision=dtype, num_blocks=num_blocks, context=context, num_threads=2)
        backend = NativeModel(model.config, model.state_dict().get, options)
    else:
        backend = TransformersBackend(model, num_blocks=num_blocks)
    if soft is not None:
        from r1ray.engine.soft import SoftPrompted

        backend, context = SoftPrompted(backend, soft), context - soft.num_tokens
    return BatchingEngine(backend, config, context_length=context, eos_token_ids=eos)


def onnx_backend(model: Any, *, num_blocks: int, num_rows: int) -> Any:
    from r1ray.engine.onnx import OnnxBackend, OnnxOptions

    context = model.config.max_position_embeddings
    options = OnnxOptions(precision="float32", num_blocks=num_blocks, num_rows=num_rows, context=context, num_threads=1)
    return OnnxBackend(exported(model), options)


EXPORTS: dict[str, Path] = {}


def exported(model: Any) -> Path:
    """A float32 export of a tiny model, made once for equal weights."""
    import atexit
    import hashlib
    import shutil
    import tempfile

    from r1ray.compress.config import ExportOnnxConfig
    from r1ray.compress.graph import build_graph

    digest = hashlib.sha256(repr(model.config.to_dict()).encode())
    for tensor in model.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    if (key := digest.hexdigest()) not in EXPORTS:
        folder = Path(tempfile.mkdtemp(prefix="exported-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        model.save_pretrained(folder / "model")
        bare_tokenizer().save_pretrained(folder / "model")
        build_graph(folder / "model", folder / "onnx", ExportOnnxConfig(model="tiny", precision="float32"))
        EXPORTS[key] = folder / "onnx"
    return EXPORTS[key]


def bare_tokenizer() -> Any:
    """The exporter asks for one; nobody uses it here."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), eos_token="a")


@contextlib.asynccontextmanager
async def running(model: Any, **settings: Any) -> AsyncIterator[Any]:
    engine = engine_of(model, **settings)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


async def collect(engine: Any, request: GenerationRequest) -> list[TokenChunk]:
    async with aclosing(engine.generate(request)) as chunks:
        return [chunk async for chunk in chunks]


async def tokens(engine: Any, request: GenerationRequest) -> list[int]:
    return [t for chunk in await collect(engine, request) for t in chunk.token_ids]


async def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.001)


def adapter(model_directory: Path, out: Path, seed: int) -> Path:
    """A LoRA adapter of the lively model that changes its answers."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(lively(model_directory), config).save_pretrained(out)
    return out
