"""The jobs by name: what each does in one line, and the module that holds it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Job:
    module: str
    help: str


JOBS: dict[str, Job] = {
    "quickstart": Job("jobs.quickstart", "the whole way on real input, from documents to a model that answers"),
    "ingest": Job("jobs.ingest", "read files and records into bronze.documents"),
    "clean": Job("jobs.clean", "normalise, redact and judge every document"),
    "decontaminate": Job("jobs.decontaminate", "reject documents that hold items of evaluation sets"),
    "dedup": Job("jobs.dedup", "find exact and near duplicates and keep one of each cluster"),
    "train-tokenizer": Job("jobs.train_tokenizer", "train the lake's byte-level BPE tokenizer"),
    "tokenize": Job("jobs.tokenize", "tokenize accepted, kept documents into gold.tokens"),
    "pack": Job("jobs.pack", "pack tokens into training sequences of one length"),
    "pipeline": Job("jobs.pipeline", "ingest to pack, in order, in one Spark session"),
    "erase": Job("jobs.erase", "erase documents from every table, and prove it"),
    "maintain": Job("jobs.maintain", "compact the tables' files; remove old files that nothing pins"),
    "report": Job("jobs.report", "one HTML page about the lake: funnel, rules, languages, lineage"),
    "train": Job("jobs.train", "train a mixture of experts on a pinned version of gold.sequences"),
    "evaluate": Job("jobs.evaluate", "held-out loss and bits a byte by domain, beside n-gram baselines"),
    "register": Job("jobs.register", "register a finished training's checkpoint in MLflow"),
    "promote": Job("jobs.promote", "make a version the champion where it is not worse than the one before"),
    "lineage": Job("jobs.lineage", "the way from a model's version back to tables, jobs and code"),
    "generate": Job("jobs.generate", "complete a prompt with a registered model"),
    "serve": Job("jobs.serve", "serve a registered model over HTTP, in the OpenAI shape"),
    "export": Job("jobs.export", "write a model as a Hugging Face folder, for vLLM and transformers"),
    "describe": Job("jobs.describe", "parameters and memory of a model preset, without allocating it"),
}
