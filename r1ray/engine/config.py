"""Settings of an engine. Imports no torch; `create.py` turns it into a running engine."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from r1ray.config import Config

__all__ = ["QUANTISED", "EngineConfig", "FakeConfig", "Precision", "VllmConfig"]

Precision = Literal["float32", "bfloat16", "int8_weight_only", "int8", "int4"]
"""What the in-house engine holds weights in. int8 and int4 round activations to int8 too, int8_weight_only does not."""

QUANTISED: tuple[Precision, ...] = ("int8_weight_only", "int8", "int4")
"""Those that only the native kernels compute in."""

PROFILES: dict[str, dict[str, float]] = {
    "adaptive": {"num_slots": 32, "min_slots": 4, "tpot_objective_ms": 100.0},  # seed 002: 4 at low load, 32 at high
}


class FakeConfig(Config):
    """The fake engine's knobs: for tests of everything above an engine, with no model at all."""

    token_delay_s: float = Field(default=0.0, ge=0, description="Seconds that each token takes.")
    fail_after_tokens: int | None = Field(default=None, ge=0, description="The engine dies after this many tokens in total; null never.")
    max_answer_tokens: int | None = Field(default=None, ge=1, description="Longest echo; null repeats the whole prompt.")


class VllmConfig(Config):
    """What only vLLM has. It runs in a Python environment of its own, which `scripts/setup-vllm` prepares."""

    environment: str | None = Field(
        default=None, description="That environment, on every node under the same path; null: ~/.cache/r1ray/vllm or $R1RAY_VLLM."
    )
    executor: Literal["mp", "ray"] = Field(
        default="mp", description="mp: all GPUs of a replica in one bundle, so in one node; ray: a bundle per GPU, over several nodes."
    )
    max_adapters: int = Field(default=0, ge=0, description="LoRA adapters that share a batch, beside the model's own; 0 takes none.")
    max_adapter_rank: Literal[8, 16, 32, 64, 128, 256] = Field(default=32, description="Largest rank of those adapters.")
    eager: bool = Field(default=False, description="No compilation and no CUDA graphs: starts sooner and answers slower.")
    gpu_memory_share: float = Field(
        default=0.9, gt=0, le=1, description="Of each GPU's memory, weights included, unless kv_cache_gb is set."
    )


class EngineConfig(Config):
    """How one replica generates. The same settings serve chat, evaluation and sampling sweeps."""

    type: Literal["torch", "onnx", "vllm", "fake"] = Field(
        default="torch",
        description="torch: the in-house engine; onnx: an export on ONNX Runtime; vllm: vLLM, for GPUs; fake: echoes the prompt's ids.",
    )
    backend: Literal["auto", "native", "transformers"] = Field(
        default="auto",
        description="Of the in-house engine. native: compiled CPU kernels (Llama, Qwen2, Qwen3 on AVX-512); transformers: any model and "
        "device; auto: native where it can run.",
    )
    profile: Literal["adaptive"] | None = Field(
        default=None,
        description="Sets what is not set beside it. adaptive: 4 to 32 streams, as many as get a token every 100 ms (seed 002's batches).",
    )
    compile: bool | Literal["auto"] = Field(
        default="auto",
        description="Of backend transformers: decoding passes as one compiled graph of the model (Inductor; CUDA graphs on GPUs), ready a "
        "minute or more later; auto: on GPUs.",
    )
    num_slots: int = Field(default=8, ge=1, le=512, description="Streams that run together.")
    tpot_objective_ms: float | None = Field(
        default=None,
        gt=0,
        description="Longest time between two tokens of a stream: fewer than num_slots run together when it is exceeded; null: always all.",
    )
    min_slots: int = Field(default=4, ge=1, description="Streams that run together whatever tpot_objective_ms says (seed 002: 4 to 32).")
    busy_beams: int | None = Field(
        default=None,
        ge=1,
        description="Beams of a search that begins while fewer slots are free than it wants (seed 000: 5 to 2); null: as many as it wants.",
    )
    max_waiting: int = Field(default=256, ge=0, description="Requests that may wait for a slot; one more is refused (QueueFull).")
    max_context: int | None = Field(default=None, ge=2, description="Prompt plus answer in tokens; null is the model's own limit.")
    dtype: Literal["auto", Precision] = Field(
        default="auto",
        description="What weights are held in. int8_weight_only (activations in bfloat16), int8 and int4 (activations in int8): native "
        "backend only; auto: what `r1ray calibrate` found, else bfloat16 where the processor multiplies it natively, else float32.",
    )
    device: str = Field(
        default="auto",
        description="torch device: cpu, cuda, cuda:1; auto takes a GPU when there is one, in a process of Ray's one that Ray has given it.",
    )
    num_threads: int | None = Field(default=None, ge=1, description="Threads inside one operation; null: all cores it may use.")
    prefill_chunk: int = Field(
        default=256, ge=1, description="Prompt tokens computed per step beside the running streams: less is smoother, more is faster."
    )
    stages: int = Field(
        default=1,
        ge=1,
        description="Pipeline stages: layers are split over this process and stages - 1 Ray actors, on other nodes if placement says so.",
    )
    tensor_parallel: int = Field(
        default=1,
        ge=1,
        description="Processes, or vLLM's GPUs, that share each layer; with stages times as many in all. The in-house engine takes backend "
        "transformers for it, and it must divide the model's heads.",
    )
    stage_cpus: float = Field(
        default=1.0, ge=0, description="Logical CPUs that Ray reserves for each actor of a split model, or GPU of vLLM."
    )
    stage_gpus: float = Field(default=0.0, ge=0, description="GPUs that Ray reserves for each actor of a split model; 1 for vLLM on GPUs.")
    prefix_cache: bool = Field(default=True, description="Keep what prompts that begin alike have computed.")
    kv_cache_gb: float | None = Field(
        default=None,
        gt=0,
        description="Memory for keys and values; null: what num_slots full contexts need, at most a share of what is free.",
    )
    fake: FakeConfig = Field(default_factory=FakeConfig, description="Only for type fake.")
    vllm: VllmConfig = Field(default_factory=VllmConfig, description="Only for type vllm.")

    @model_validator(mode="before")
    @classmethod
    def _filled_by_profile(cls, given: Any) -> Any:
        return PROFILES.get(given.get("profile") or "", {}) | given if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _what_the_engine_lacks(self) -> Self:
        if self.type != "vllm":
            return self
        lacking = {
            "backend": self.backend != "auto",
            "device": self.device != "auto",
            "compile": self.compile != "auto",
            "tpot_objective_ms": self.tpot_objective_ms is not None,
            "min_slots": self.min_slots != type(self).model_fields["min_slots"].default,
            "busy_beams": self.busy_beams is not None,
            "dtype": self.dtype not in ("auto", "float32", "bfloat16"),
        }
        if wrong := [key for key, given in lacking.items() if given]:
            raise ValueError(f"{wrong[0]}={getattr(self, wrong[0])} is the in-house engine's and vLLM has none of it: leave it out")
        if self.vllm.executor == "ray" and self.stage_gpus != 1:
            raise ValueError(f"vllm.executor=ray takes a GPU per bundle, stage_gpus is {self.stage_gpus:g}: set it to 1, or executor mp")
        return self

    @model_validator(mode="after")
    def _what_tensor_ranks_lack(self) -> Self:
        if self.tensor_parallel == 1 or self.type == "vllm":
            return self
        if self.type != "torch":
            raise ValueError(
                f"tensor_parallel={self.tensor_parallel} needs type torch or vllm; type {self.type} has one process: leave it out"
            )
        lacking = {"backend": self.backend == "native", "dtype": self.dtype in QUANTISED}
        if wrong := [key for key, given in lacking.items() if given]:
            raise ValueError(
                f"{wrong[0]}={getattr(self, wrong[0])} with tensor_parallel={self.tensor_parallel}: the native kernels compute whole "
                "layers only; set backend=transformers and dtype=bfloat16, or tensor_parallel=1 and split by layers with stages"
            )
        return self

    @model_validator(mode="after")
    def _gpus_of_split_engines(self) -> Self:
        """Ray hides no GPU from an actor that reserved none, and gives the others one each, as cuda:0."""
        if self.type != "torch" or self.stages * self.tensor_parallel == 1 or self.device == "auto":
            return self
        if self.device == "cpu" and self.stage_gpus:
            raise ValueError(f"stage_gpus={self.stage_gpus:g} reserves GPUs that device=cpu leaves idle: set stage_gpus=0, or device=auto")
        if self.device.startswith("cuda:"):
            raise ValueError(f"device={self.device} of a model split over processes, each of which sees its own GPU only: set device=cuda")
        if self.device == "cuda" and not self.stage_gpus:
            raise ValueError(
                "device=cuda with stage_gpus=0: Ray gives the actors no GPU, so all its processes would take the same one; set stage_gpus=1"
            )
        return self

    @model_validator(mode="after")
    def _what_onnx_lacks(self) -> Self:
        lacking = {
            "backend": self.backend != "auto",
            "dtype": self.dtype != "auto",
            "stages": self.stages > 1,
            "compile": self.compile != "auto",
        }
        if self.type == "onnx" and (wrong := [key for key, given in lacking.items() if given]):
            raise ValueError(f"{wrong[0]}={getattr(self, wrong[0])} does not go with type onnx, whose export settled it: leave it out")
        return self

    @property
    def own_bundle(self) -> dict[str, float]:
        """What the engine's actors reserve in the bundle of the process that owns it: the other tensor ranks of its stage."""
        num = self.tensor_parallel - 1 if self.type == "torch" else 0
        return {"CPU": num * self.stage_cpus, "GPU": num * self.stage_gpus}

    @property
    def actor_bundles(self) -> list[dict[str, float]]:
        """What they reserve beside it: a bundle per further stage, so that the tensor ranks of each lie in one node."""
        each = {"CPU": self.stage_cpus, "GPU": self.stage_gpus}
        if self.type != "vllm":
            return [{name: amount * self.tensor_parallel for name, amount in each.items()} for _ in range(self.stages - 1)]
        num_workers = self.stages * self.tensor_parallel
        if self.vllm.executor == "ray":
            return [dict(each) for _ in range(num_workers)]
        return [{name: amount * num_workers for name, amount in each.items()}]
