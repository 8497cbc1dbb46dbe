"""What a fine-tuning job is told: one model name, one base, one data set, one way of training.

Imports without torch and ray. Says nothing about where things live (settings) or how they are done.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from r1ray.config import Config
from r1ray.data.config import DataConfig
from r1ray.model.adapters import MOST_POSITIONS, POSITIONS_BLOCK
from r1ray.train.blocks import DistillSettings, DpoSettings, GrpoSettings, RewardModelSettings
from r1ray.train.parallel.layout import check_combination

__all__ = ["LEARNING_RATES", "FinetuneConfig", "LoraSettings", "Parallelism", "PromptSettings", "TrainConfig"]


WorkerCount = Annotated[int, Field(ge=1)]
WorkerRange = tuple[WorkerCount, WorkerCount]


class LoraSettings(Config):
    """The adapter's shape; used when `method` is lora."""

    rank: int = Field(default=16, ge=1, le=512, description="Rank r of the update (seeds 001, 002, 004: 8-64).")
    alpha: float = Field(default=32, gt=0, description="The update is scaled by alpha / rank.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Share of the adapter's inputs dropped in training.")
    targets: tuple[str, ...] | None = Field(default=None, min_length=1, description="Linear layers to adapt; null: the family's own.")
    experts: bool = Field(default=False, description="Adapt a mixture's routed experts too; by default attention only (R1, V3).")
    dora: bool = Field(default=False, description="Train the weights' magnitude apart from their direction (arXiv 2402.09353).")
    rslora: bool = Field(default=False, description="Scale by alpha / sqrt(rank), which keeps high ranks learning (arXiv 2312.03732).")

    @model_validator(mode="after")
    def _experts_are_plain(self) -> LoraSettings:
        if self.experts and (self.dora or self.dropout):
            raise ValueError("lora.experts adapts fused matrices, which know no dora and no dropout; set lora.dora=false lora.dropout=0")
        return self


class PromptSettings(Config):
    """What stands before every prompt; used when `method` is prompt (its embeddings) or prefix (its keys and values)."""

    num_virtual_tokens: int | None = Field(
        default=None,
        ge=POSITIONS_BLOCK,
        le=MOST_POSITIONS,
        multiple_of=POSITIONS_BLOCK,
        description="Trained positions, whole blocks of the engine's cache; null: as many blocks as init_text fills.",
    )
    init_text: str | None = Field(
        default="You are a helpful assistant who answers the customer's question exactly.",
        min_length=1,
        description="What they mean before training, repeated to fill them; {labels} stands for the names of the data's intents. "
        "null: random words (prompt) or numbers (prefix).",
    )


class Parallelism(Config):
    """How many workers share one copy of the model; num_workers / that many compute different rows. For what does not fit otherwise."""

    tensor: int = Field(default=1, ge=1, description="Workers that share every matrix by columns or rows (DeepSpeed AutoTP).")
    pipeline: int = Field(default=1, ge=1, description="Stages of consecutive layers, one per worker (DeepSpeed PipelineModule).")
    sequence: int = Field(default=1, ge=1, description="Workers that share every dialogue by positions (DeepSpeed-Ulysses).")

    @property
    def split(self) -> int:
        """Workers per copy."""
        return self.tensor * self.pipeline * self.sequence


LEARNING_RATES = {"lora": 2e-4, "full": 2e-5, "prompt": 3e-2, "prefix": 1e-2}
"""Where `learning_rate` is not set: the LoRA paper's (arXiv 2106.09685), seed 004's, PEFT's, P-tuning v2's (arXiv 2110.07602)."""
_OWN_MEASURES = {"dpo": "dpo.eval_share", "reward": "reward.eval_share", "grpo": "grpo.num_held_out"}


class TrainConfig(Config):
    """How to train. A batch is `batch_size` dialogues over all workers, so the same seed gives the same batches at any worker count."""

    num_workers: WorkerCount | WorkerRange = Field(
        default=1, description="Ray Train workers, with GPUs one per GPU; [min, max] follows the cluster as nodes join and die."
    )
    use_gpu: bool = Field(default=False, description="One GPU per worker.")
    cpus_per_worker: float = Field(default=1, gt=0, description="Logical CPUs that Ray reserves for a worker.")
    threads_per_worker: int | None = Field(
        default=None, ge=1, description="Compute threads of a worker; null: the cores of its node over the workers there."
    )

    objective: Literal["sft", "dpo", "reward", "grpo", "distill"] = Field(
        default="sft",
        description="What is minimised: sft, the next token of the assistant's turns; dpo, preferring the worse of two answers; reward, "
        "the same by a model that gives numbers; grpo, minus the rewards of its own answers; distill, the distance to a larger model.",
    )
    method: Literal["lora", "full", "prompt", "prefix"] = Field(
        default="lora", description="What is trained: a LoRA adapter, all weights, a soft prompt, or its keys and values in every layer."
    )
    lora: LoraSettings = Field(default_factory=LoraSettings, description="The adapter's shape, for lora.")
    prompt: PromptSettings = Field(default_factory=PromptSettings, description="The soft prompt, for prompt and prefix.")
    dpo: DpoSettings = Field(default_factory=DpoSettings, description="Loss and its parameters, for dpo.")
    reward: RewardModelSettings = Field(default_factory=RewardModelSettings, description="Loss of a reward model, for reward.")
    grpo: GrpoSettings = Field(default_factory=GrpoSettings, description="Answers, rewards and their loss, for grpo.")
    distill: DistillSettings = Field(default_factory=DistillSettings, description="Teacher and divergence, for distill.")
    zero_stage: Literal[0, 1, 2, 3] = Field(
        default=2, description="DeepSpeed ZeRO stage: 1 splits optimizer states over the workers, 2 gradients too, 3 weights too."
    )
    parallelism: Parallelism = Field(
        default_factory=Parallelism, description="Split the model itself, for what ZeRO alone cannot fit; one degree above 1."
    )
    offload: Literal["none", "optimizer", "parameters"] = Field(
        default="none",
        description="What lies in the node's memory instead of the GPU's: optimizer (states and their arithmetic, ZeRO 1-3), parameters "
        "(weights too, ZeRO 3).",
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        default="auto",
        description="Weights and arithmetic; master weights stay float32. auto: bfloat16 where the hardware multiplies it. float16 is for "
        "GPUs without bfloat16; its loss is scaled.",
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Share of attention weights, and of hidden states where the model can.")
    attention: Literal["auto", "eager", "sdpa", "blockwise"] = Field(
        default="auto",
        description="Attention code; auto: sdpa on GPUs, on CPUs blockwise (r1ray's own, for the Llama, Qwen2 and DeepSeek-V3 "
        "architectures) and eager for what that does not do and for all weights on rows of up to 512 tokens.",
    )
    gradient_checkpointing: bool = Field(default=False, description="Compute activations twice to store less: about a quarter slower.")

    learning_rate: float = Field(
        default=LEARNING_RATES["lora"],
        gt=0,
        le=1,
        description="Peak learning rate of AdamW; null: the usual one of the method (seed 004: 3e-5 for LoRA on large models).",
    )
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=1, description="Share of each label spread over the whole vocabulary, in sft (seed 004: 0.1)."
    )
    neftune_alpha: float | None = Field(
        default=None,
        gt=0,
        description="Noise of this size on the embeddings of questions and answers (NEFTune, arXiv 2310.05914); null: none.",
    )
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's decoupled weight decay.")
    warmup_share: float = Field(default=0.05, ge=0, lt=1, description="Linear warm-up over this share of the run (seed 004: 5 %).")
    floor_share: float = Field(default=0.1, ge=0, le=1, description="The cosine ends at this share of the peak learning rate.")
    max_grad_norm: float = Field(default=1.0, gt=0, description="Gradients are clipped to this norm (seed 004: 1.0).")

    num_epochs: int = Field(default=1, ge=1, description="Passes over the data.")
    max_steps: int | None = Field(default=None, ge=1, description="Stop after this many optimizer steps; null: num_epochs decides.")
    max_seconds: float | None = Field(
        default=None,
        gt=0,
        description="Stop after this much training time (start-up not counted); the learning rate still reaches its floor.",
    )
    batch_size: int = Field(default=16, ge=1, description="Dialogues per optimizer step, over all workers.")
    micro_batch_size: int = Field(default=4, ge=1, description="Dialogues per forward pass of a worker; the rest is gradient accumulation.")
    max_length: int = Field(default=1024, ge=16, description="Longest dialogue in tokens; a longer one is cut after an assistant turn.")
    packing: bool | None = Field(
        default=None,
        description="Lay a micro-batch's dialogues end to end with separate attention instead of padding them; null: in sft with "
        "blockwise attention, where padding would be more than 5 %.",
    )
    mix: bool = Field(
        default=True, description="Draw the rows of a file of jobs/prepare_data.py as its mix plan says; false: as they come."
    )
    group_window: int = Field(default=32, ge=1, description="Dialogues of similar length are batched within this many batches; 1 is off.")
    seed: int = Field(default=0, description="Order of the data, adapter initialisation, dropout.")

    eval_share: float = Field(default=0.0, ge=0, le=0.5, description="Share of the dialogues held out, by seed, to measure the loss on.")
    eval_every_steps: int = Field(default=50, ge=1, description="Measure it each so many steps and at the end; the best step is exported.")
    early_stopping_patience: int | None = Field(
        default=None, ge=1, description="Stop after so many measurements in a row without a better one; null: never."
    )

    log_every_steps: int = Field(default=5, ge=1, description="A progress line, an MLflow point and a Ray report each so many steps.")
    checkpoint_every_steps: int | None = Field(
        default=None, ge=1, description="Save each so many steps; null: only by time and at the end."
    )
    checkpoint_every_seconds: float | None = Field(
        default=120, gt=0, description="Save when this much time has passed since the last save, more where saves are slow; null: off."
    )
    num_checkpoints: int = Field(default=2, ge=1, description="Newest checkpoints that are kept; with eval_share, the best and the newest.")
    max_failures: int = Field(default=2, ge=0, description="Worker losses after which the job gives up.")
    collective_timeout_s: int = Field(
        default=1800,
        ge=10,
        description="An exchange between workers fails when one of them is so many seconds late; more for models on slow disks.",
    )
    restart: bool = Field(default=False, description="Forget an earlier run of the same job instead of resuming it.")

    @model_validator(mode="before")
    @classmethod
    def _rate_of_method(cls, given: Any) -> Any:
        if not isinstance(given, Mapping) or given.get("learning_rate") is not None:
            return given
        usual = LEARNING_RATES.get(str(given.get("method", "lora")), LEARNING_RATES["lora"])
        return {**given, "learning_rate": usual}

    @model_validator(mode="after")
    def _is_consistent(self) -> TrainConfig:
        self._can_store()
        if self.method == "prefix" and self.zero_stage == 3:
            raise ValueError("method prefix begins with keys computed by the whole base, which zero_stage 3 splits; set zero_stage=2")
        if self.method == "prefix" and self.gradient_checkpointing:
            raise ValueError(
                "method prefix keeps its keys in a cache, which gradient_checkpointing drops in every layer; set "
                "gradient_checkpointing=false, or method=prompt"
            )
        if (self.label_smoothing or self.neftune_alpha) and (self.objective != "sft" or self.parallelism.pipeline > 1):
            raise ValueError(
                "label_smoothing and neftune_alpha belong to objective sft without parallelism.pipeline; set label_smoothing=0 "
                "neftune_alpha=null"
            )
        if self.packing and self.method in ("prompt", "prefix"):
            raise ValueError(f"packing lays dialogues end to end, and method {self.method} goes before each of them; set packing=false")
        self._can_attend()
        check_combination(self)
        self._can_measure()
        if self.min_workers > self.max_workers:
            raise ValueError(f"num_workers [{self.min_workers}, {self.max_workers}] is an empty range; write [min, max]")
        if self.is_elastic and self.parallelism.split > 1:
            raise ValueError("num_workers cannot be a range where workers share a model (parallelism); set it to a number")
        num_groups = self.max_workers // self.parallelism.split
        if self.objective in ("dpo", "reward"):
            self._can_compare_pairs()
        if self.objective == "grpo":
            self._can_compare_answers()
        if self.objective == "distill" and self.distill.teacher is None:
            raise ValueError("objective distill needs a model to learn from; set train.distill.teacher to a registry reference")
        if self.objective == "distill" and self.distill.mode == "logits" and self.zero_stage == 3:
            raise ValueError("zero_stage 3 would split the teacher, too; set zero_stage=2, or distill.mode=texts")
        if self.batch_size < num_groups:
            raise ValueError(f"batch_size {self.batch_size} leaves some of the {num_groups} workers idle; set batch_size to at least that")
        return self

    def _can_store(self) -> None:
        if self.zero_stage == 0 and self.dtype in ("bfloat16", "float16"):
            raise ValueError(
                f"zero_stage 0 with dtype {self.dtype} keeps no float32 master weights and learns worse; set zero_stage=1 or dtype=float32"
            )
        if self.dtype == "float16" and not self.use_gpu:
            raise ValueError("dtype float16 needs a GPU: CPUs multiply it slower than float32; set dtype=auto, or use_gpu=true")
        least = {"none": 0, "optimizer": 1, "parameters": 3}[self.offload]
        if self.zero_stage < least:
            raise ValueError(f"offload {self.offload} needs ZeRO; set zero_stage={least}, it is {self.zero_stage}")

    def _can_attend(self) -> None:
        if self.attention != "blockwise":
            return
        if self.use_gpu:
            raise ValueError("attention blockwise is written for CPUs; set attention=auto, which is sdpa with use_gpu")
        if self.dropout or self.method == "prefix":
            what = f"dropout {self.dropout}" if self.dropout else "method prefix"
            raise ValueError(f"attention blockwise does not know {what}; set attention=auto, which takes eager then")
        if self.packing and self.learns_logits:
            raise ValueError("attention blockwise does not pack rows for a teacher; set packing=false, or attention=auto")

    def _can_measure(self) -> None:
        own = _OWN_MEASURES.get(self.objective)
        if own is not None and (self.eval_share or self.early_stopping_patience is not None):
            raise ValueError(
                f"eval_share and early_stopping_patience watch the loss of held-out dialogues, which objective {self.objective} does not "
                f"have; set train.{own}, which measures before and after, and eval_share=0 early_stopping_patience=null"
            )
        if self.early_stopping_patience is not None and not self.eval_share:
            raise ValueError("early_stopping_patience needs held-out dialogues to watch; set eval_share, to 0.05 say")

    @property
    def is_elastic(self) -> bool:
        """Whether the number of workers follows the cluster."""
        return self.min_workers < self.max_workers

    @property
    def min_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @property
    def learns_logits(self) -> bool:
        """Whether a teacher computes each pass beside the trained model."""
        return self.objective == "distill" and self.distill.mode == "logits"

    @property
    def keeps_freed(self) -> bool:
        """Whether a worker's malloc keeps what a step frees for the next one (`environment.malloc_environment`)."""
        return not self.use_gpu and self.method != "full"

    @property
    def rows_per_batch(self) -> int:
        """Rows that the passes of one optimizer step compute, over all workers."""
        return self.batch_size * (self.grpo.num_generations if self.objective == "grpo" else 1)

    def _can_compare_pairs(self) -> None:
        if self.packing:
            raise ValueError(f"packing lays dialogues end to end, which the pairs of objective {self.objective} are not; set packing=false")
        if self.objective == "reward" and self.method not in ("lora", "full"):
            raise ValueError(f"objective reward trains by lora or full, method is {self.method}; set one of these")

    def _can_compare_answers(self) -> None:
        if not self.grpo.rewards:
            raise ValueError("objective grpo has nobody to judge its answers; set train.grpo.rewards")
        if self.method not in ("lora", "full"):
            raise ValueError(f"objective grpo trains by lora or full, method is {self.method}; set one of these")
        uneven = [num for num in range(self.min_workers, self.max_workers + 1) if self.batch_size % num]
        if uneven:
            raise ValueError(f"grpo gives each worker as many prompts: batch_size {self.batch_size} is no multiple of {uneven[0]} workers")
        if self.grpo.max_new_tokens >= self.max_length:
            raise ValueError(
                f"grpo.max_new_tokens {self.grpo.max_new_tokens} leaves no room for a prompt in max_length {self.max_length}; raise that"
            )
        if self.packing:
            raise ValueError("packing lays dialogues end to end, which grpo's answers are not; set packing=false")


class FinetuneConfig(Config):
    """`jobs/finetune.py`: base + dialogues -> a new version of `name`."""

    name: str = Field(default="assistant", description="Registered model name of the result.")
    base: str = Field(default="smollm2-135m-instruct", description="Registry reference of the base: name, name@alias or name@version.")
    show: int = Field(default=0, ge=0, description="Print so many dialogues as they would be trained, by role, and train nothing; in sft.")
    collection: str | None = Field(default=None, description="Retrieval collection that the result's answers are grounded in when served.")
    data: DataConfig = Field(description="What to learn from.")
    train: TrainConfig = Field(default_factory=TrainConfig, description="How to learn.")

    @model_validator(mode="after")
    def _can_stream(self) -> FinetuneConfig:
        if self.data.backend == "ray" and self.train.objective != "sft":
            raise ValueError(
                f"data.backend ray streams the dialogues of objective sft, not the rows of {self.train.objective}; set data.backend=arrow"
            )
        return self
