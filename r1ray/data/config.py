"""What a training or evaluation set is and how strictly it is read. Knows no file: reading is `read`'s.

A job nests this as `data`, so its keys are `data.path`, `data.format`, ... on the command line.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from r1ray.config import Config

__all__ = ["DataConfig", "Format"]

Format = Literal["annotated", "messages", "alpaca", "sharegpt", "labelled", "faq", "pairs", "sharegpt_pairs", "alpaca_pairs"]


class DataConfig(Config):
    """One set of dialogues, or of pairs of answers: a file, or several that are read in name order."""

    path: Path = Field(
        description="JSON, JSONL, CSV or Parquet file, a directory of them, or a pattern (chats/**/*.jsonl); also counts from R1RAY_HOME."
    )
    backend: Literal["arrow", "ray"] = Field(
        default="arrow",
        description="Who reads and tokenises: arrow, this process, with all dialogues in its memory; ray, a Ray Data pipeline over the "
        "cluster in bounded memory, for supervised fine-tuning on corpora that do not fit.",
    )
    format: Literal["auto"] | Format = Field(default="auto", description="Row format; auto looks at the columns of the first rows.")
    text_column: str = Field(default="text", min_length=1, description="Labelled rows: the column with the customer's words.")
    label_column: str | None = Field(
        default=None, min_length=1, description="Labelled rows: the column of the label; null: label or category."
    )
    question_column: str | None = Field(
        default=None, min_length=1, description="Questions and answers: the question's column; null: question, prompt, query or 问题."
    )
    answer_column: str | None = Field(
        default=None, min_length=1, description="Questions and answers: the answer's column; null: answer, completion, response or 答案."
    )
    labels: tuple[str, ...] | None = Field(
        default=None, min_length=1, description="Labelled rows: the allowed labels; null allows every label."
    )
    role_order: Literal["strict", "repair"] = Field(
        default="strict",
        description="strict refuses a dialogue whose turns do not alternate; repair joins repeated turns and drops what has no partner.",
    )
    max_bad_share: float = Field(default=0.01, ge=0, le=1, description="Share of invalid rows above which the job fails.")
    rejects: Path | None = Field(
        default=None, description="Where invalid rows are reported as JSON lines, below R1RAY_HOME if relative; null: nowhere."
    )
    system_prompt: str | None = Field(default=None, description="System message where a dialogue has none, put in by the chat template.")
    limit: int | None = Field(default=None, ge=1, description="Use this many dialogues, a seeded sample in file order; null uses all.")
    seed: int = Field(default=0, description="Chooses the sample of `limit`.")

    @model_validator(mode="after")
    def _can_stream(self) -> DataConfig:
        if self.backend == "ray" and self.limit is not None:
            raise ValueError("limit draws a sample from rows in memory, which backend ray never has; set limit=null or backend=arrow")
        return self
