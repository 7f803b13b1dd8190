# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # From documents to a registered model
#
# The way of `lakemoe quickstart`, one step a cell: documents become Delta tables, the tables become training sequences,
# the sequences train a mixture of experts, and the model that is not worse than the last one becomes the champion.
#
# Every step can be run again: what is done is found done, and nothing is added. To open this file as a notebook, use
# Jupyter with jupytext, or `jupytext --to ipynb quickstart.py` and import the result, in Databricks too. On two
# cores the defaults take about eight minutes, most of it training.

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from pyspark.sql import functions as F

from jobs.quickstart import default_sources
from jobs.stages import run_stage
from jobs.summary import funnel
from model.evaluate.held_out import EvaluateConfig, evaluate_folder
from model.evaluate.versions import held_out_loss
from model.network.generate import SamplingConfig, generate
from model.registry.lineage import lineage
from model.registry.load import load
from model.registry.promote import promote
from model.registry.register import register
from model.train.config import TrainConfig
from model.train.journal import Journal
from model.train.trainer import train
from pipelines.clean.config import CleanConfig
from pipelines.dedup.config import DedupConfig
from pipelines.ingest.config import IngestConfig, SourceConfig
from pipelines.lake import read
from pipelines.pack.config import PackConfig
from pipelines.session import spark_session
from pipelines.tables import GOLD_SEQUENCES, GOLD_TOKENS, SILVER_DOCUMENTS
from pipelines.tokenize.config import TokenizeConfig, TrainTokenizerConfig

# %% [markdown]
# ## Parameters
#
# Another value of these is all that another corpus or a larger model takes. A training that is done is not done again
# with other settings: give it another `name`.

# %% tags=["parameters"]
lake = "lake"  # where tables, trainings and the registry go: a folder
sources = []  # folders or files; empty: the standard library's sources and the installed packages' documentation
name = "quickstart"  # the training's and the registered model's name
vocabulary = 2048  # tokens
sequence_length = 512  # tokens
validation_fraction = 0.04  # of the documents, never trained on
overrides = {}  # fields of the preset conf/models/quickstart.yaml that are replaced, such as {"layers": 6}
steps = 200  # optimizer steps
global_batch_size = 8  # sequences a step
warmup_steps = 20  # steps until the peak learning rate
learning_rate = 3e-3  # its peak
prompt = "def read(path):\n"  # what the finished model continues
max_tokens = 64  # of the completion

# %% [markdown]
# ## Build the lake
#
# Files become rows of bronze as they are; cleaning writes silver with a verdict for each document, and rejects none
# without a reason. Deduplication finds documents that are the same but for a few words and keeps one of each cluster.

# %%
found = tuple(SourceConfig(path=path) for path in sources) or default_sources()
counts = {"ingest": run_stage("ingest", lake, IngestConfig(sources=found))}
counts["clean"] = run_stage("clean", lake, CleanConfig())
counts["dedup"] = run_stage("dedup", lake, DedupConfig())

# %% [markdown]
# What is kept trains the tokenizer, is tokenized, and is packed into sequences of one length. Documents of one cluster
# fall on the same side of the split, so that nothing held out was nearly seen in training.

# %%
counts["train-tokenizer"] = run_stage("train-tokenizer", lake, TrainTokenizerConfig(vocab_size=vocabulary))
counts["tokenize"] = run_stage("tokenize", lake, TokenizeConfig(validation_fraction=validation_fraction))
counts["pack"] = run_stage("pack", lake, PackConfig(sequence_length=sequence_length))

# %% [markdown]
# ## The funnel
#
# How many documents each stage let through, and why the others fell out. A document that several rules reject counts
# for each of them.

# %%
pd.DataFrame(funnel(counts), columns=["", "count", "remark"]).style.hide(axis="index").format({"count": "{:,}"})

# %%
reasons = pd.Series({k.removeprefix("rejected_by."): n for k, n in counts["clean"].items() if k.startswith("rejected_by.")}, dtype=int)
stages = pd.Series({"read": counts["clean"]["documents"], "accepted": counts["clean"]["accepted"], "kept": counts["tokenize"]["documents"]})
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained", width_ratios=(2, 3))
left.bar_label(left.barh(stages.index[::-1], stages[::-1], color="tab:blue"), fmt="{:,.0f}", padding=3)
left.set(title="Documents", xlim=(0, 1.18 * stages.max()))
shown = reasons.sort_values().tail(8)
right.bar_label(right.barh(shown.index, shown, color="tab:orange"), fmt="{:,.0f}", padding=3)
right.set(title="Rejected by rule", xlim=(0, 1.12 * max(1, shown.max() if len(shown) else 1)))
for axes in (left, right):
    axes.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# The documents that most rules reject. A verdict that looks wrong here is a threshold to change (`conf/clean.yaml`):
# signals are stored, so that `clean` judges again without reading a file.

# %%
spark = spark_session()
silver = read(spark, lake, SILVER_DOCUMENTS)
worst = silver.selectExpr(
    "source_id", "size(rejected_by) AS rules", "array_join(rejected_by, ', ') AS rejected_by", "substring(text, 1, 60) AS begins"
)
worst.where("rules > 0").orderBy("rules", "source_id", ascending=[False, True]).limit(5).toPandas()

# %% [markdown]
# ## Tokens
#
# What the model will see, by source and split, and how long documents are beside a sequence: those right of the line are
# cut, the others are packed whole, several to a sequence.

# %%
tokens = read(spark, lake, GOLD_TOKENS).select("source", "kind", "split", "token_count").toPandas()
tokens.groupby(["source", "kind", "split"]).token_count.agg(documents="count", tokens="sum").style.format("{:,}")

# %%
figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
edges = [2**n for n in range(21)]
of_kind = {kind: of.token_count for kind, of in tokens.groupby("kind")}
axes.hist(list(of_kind.values()), bins=edges, stacked=True, label=list(of_kind), color=["tab:blue", "tab:orange"][: len(of_kind)])
axes.axvline(sequence_length, color="black", linewidth=1, linestyle="--", label="one sequence")
axes.set(title="Lengths of documents", xscale="log", xlim=(max(1, tokens.token_count.min()), 2 * tokens.token_count.max()), xlabel="tokens in a document", ylabel="documents")
axes.spines[["top", "right"]].set_visible(False)
axes.legend(frameon=False)
plt.show()

# %%
sequences = read(spark, lake, GOLD_SEQUENCES).where(f"sequence_length = {sequence_length}")
packed = sequences.groupBy("split", "domain").agg(F.count("*").alias("sequences"), F.sum("pad_count").alias("padding"))
packed.orderBy("split", "domain").toPandas().set_index(["split", "domain"]).style.format("{:,}")

# %% [markdown]
# ## Train
#
# The loader pins the table's newest version and reads it without Spark. A kernel that dies here loses little: the same
# cell goes on from the last checkpoint, to the same weights.

# %%
settings = TrainConfig(
    name=name,
    overrides=overrides,
    steps=steps,
    global_batch_size=global_batch_size,
    warmup_steps=warmup_steps,
    learning_rate=learning_rate,
    sequence_length=sequence_length,
    log_every=max(1, steps // 10),
)
training = train(lake, settings)
print(f"{training.tokens:,} tokens in {training.seconds:.0f} s; checkpoint {training.checkpoint}")

# %% [markdown]
# Left the loss on the training data, step by step and smoothed. Right how evenly the router uses the experts: the
# fullest expert's share over the mean of its layer, 1 where all get the same. Far above it, some experts learn little.

# %%
curve = pd.DataFrame(Journal(settings.output_folder(lake)).lines()).set_index("step")
window = max(1, steps // 10)  # steps that a smoothed value is the mean of
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.4), layout="constrained")
left.plot(curve.loss, color="tab:blue", alpha=0.3, linewidth=1, label="step")
left.plot(curve.loss.rolling(window, center=True, min_periods=1).mean(), color="tab:blue", label="smoothed")
left.set(title="Training loss", xlabel="step", ylabel="nats a token")
left.legend(frameon=False)
load_of_layers = pd.DataFrame(curve.expert_load_max.tolist(), index=curve.index).rolling(window, center=True, min_periods=1).mean()
right.plot(load_of_layers, label=[f"layer {n}" for n in load_of_layers.columns])
right.axhline(1, color="black", linewidth=1, linestyle="--")
right.set(title="Fullest expert over the mean, smoothed", xlabel="step", ylim=(0, None))
right.legend(frameon=False, ncols=2)
for axes in (left, right):
    axes.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# ## Evaluate
#
# The loss on documents that were held out, beside two models without a network, fitted on the same training split: how
# often each token comes (unigram), and how often after the one before it (bigram). A network above them has learned less
# than counting does; a few more steps change that.

# %%
evaluation = evaluate_folder(Path(training.checkpoint), lake, EvaluateConfig())
scores = pd.DataFrame({domain: vars(score) for domain, score in (*evaluation.domains.items(), ("all", evaluation.total))}).T
scores.style.format("{:.3f}").format("{:,.0f}", subset=["targets", "bytes"])

# %%
figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
scores[["unigram", "bigram", "loss"]].rename(columns={"loss": "this model"}).plot.bar(ax=axes, rot=0, color=["0.8", "0.6", "tab:blue"])
axes.set(title="Held-out loss, less is better", ylabel="nats a token")
axes.spines[["top", "right"]].set_visible(False)
axes.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.1))
plt.show()

# %% [markdown]
# ## Register and promote
#
# The checkpoint becomes a version in MLflow's registry, with its figures and the versions of its tables as tags. The gate
# measures it beside the champion on the same held-out data; every decision, a refusal too, is a row of ops.promotions.

# %%
version = register(training.checkpoint, lake=lake, name=name, metrics=evaluation.metrics)
decision = promote(name, version.version, lake=lake, held_out_loss=held_out_loss(name, version.version, lake=lake, config=EvaluateConfig()))
print(f"{version.uri} is {decision.decision}. {decision.reason}")

# %% [markdown]
# ## Ask the champion
#
# Whoever serves the model names the alias, not a version: the next promotion takes effect by itself. A model this small
# has learned the shape of code and prose, not their sense.

# %%
champion = load(f"models:/{name}@champion", lake=lake)
sampling = SamplingConfig(max_tokens=max_tokens, temperature=0.7, seed=0)
completion = "".join(piece.text for piece in generate(champion.transformer, champion.tokenizer, prompt, sampling))
print(prompt + completion)

# %% [markdown]
# ## Lineage
#
# From the champion back to the rows that it learned from: each table at the version that was read, the run that wrote it,
# and whether that version can still be read.

# %%
origin = lineage(f"models:/{name}@champion", lake=lake)
print(f"{origin.model} version {origin.version}, trained by code {origin.code_version}")
pd.DataFrame([vars(use) for use in origin.tables]).fillna({"missing": "no"})
