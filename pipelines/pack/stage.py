"""gold.tokens -> gold.sequences: documents packed into sequences of one length, one domain and split a sequence.

The first run packs everything, by seeded hash groups: the canonical edition, which depends on the documents alone.
Later runs leave a sequence where it is as long as every piece in it is wanted as it is. A sequence that holds a
document that changed, left or moved to the other split goes, its other pieces are packed again together with the new
documents' (``arrange``). Packed over several runs an edition holds the same documents in another arrangement;
``repack`` brings back the canonical one. The mode ``concat`` has no pieces that could stay and packs everything.
"""

from __future__ import annotations

from collections.abc import Mapping

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from tokenizers import Tokenizer

from pipelines import lake as tables_of
from pipelines.changes import Since, changes, keys, within, without
from pipelines.errors import LakeError
from pipelines.lake import StageResult
from pipelines.pack.config import PackConfig
from pipelines.pack.fim import fill_in_the_middle
from pipelines.pack.pieces import pieces_of_documents, tails_of_sequences
from pipelines.pack.sequences import Edition
from pipelines.tables import END_OF_TEXT, GOLD_SEQUENCES, GOLD_TOKENS, PAD, SPLITS
from pipelines.tokenize.train import chosen_tokenizer, tokenizer_input, tokenizer_json

# A loss over fewer validation sequences than these says little.
FEW_SEQUENCES = 8


def run(
    spark: SparkSession, lake: str, config: PackConfig, *, run_id: str, since: Since = None, repack: bool = False
) -> StageResult:
    """Bring the edition of this tokenizer and sequence length in line with gold.tokens.

    since: the version of gold.tokens that the last run by this configuration saw; None looks at every document.
    repack: arrange everything anew, as a first run does.
    Raises LakeError (exit code 2) when gold.tokens holds nothing of the tokenizer.
    """
    tokenizer_id = chosen_tokenizer(lake, config.tokenizer)
    version = tables_of.version(spark, lake, GOLD_TOKENS)
    tokens = tables_of.read(spark, lake, GOLD_TOKENS, version).where(F.col("tokenizer_id") == tokenizer_id)
    if tokens.isEmpty() and not tables_of.exists(spark, lake, GOLD_SEQUENCES):
        raise LakeError(
            f"gold.tokens in {lake} holds nothing of tokenizer {tokenizer_id}: run tokenize with it first.", 2
        )
    tokenizer = Tokenizer.from_str(tokenizer_json(lake, tokenizer_id))
    edition = _edition(tokenizer, config, tokenizer_id)
    rate, spm_rate = config.fim_rate, config.fim_spm_rate
    fim = fill_in_the_middle(tokenizer, rate=rate, spm_rate=spm_rate, seed=config.seed) if rate else None
    tables_of.ensure(spark, lake, GOLD_SEQUENCES)
    stored = tables_of.read(spark, lake, GOLD_SEQUENCES).where(edition.scope)
    canonical = repack or config.mode == "concat"
    changed = None if canonical else keys(changes(spark, lake, GOLD_TOKENS, since, version, "document_id"))
    wanted = pieces_of_documents(within(tokens, changed), config, edition.end, fim).persist()
    try:
        if canonical:
            loose, replaced = wanted.where("offset IS NULL" if config.mode == "best_fit" else "true"), None
        else:
            loose, replaced = arrange(wanted, stored, changed)
        sequences = edition.whole(wanted).unionByName(edition.pack(loose))
        written = tables_of.sync(spark, lake, GOLD_SEQUENCES, sequences, scope=edition.scope, among=replaced)
    finally:
        wanted.unpersist()
    packed = tables_of.read(spark, lake, GOLD_SEQUENCES, written.version).where(edition.scope)
    counts = {"sequences": 0, "padding": 0, "tokens": 0}
    by_domain = {}
    for split, domain, number, padding in tables_of.few(
        packed.groupBy("split", "domain").agg(F.count("*"), F.sum("pad_count"))
    ):
        by_domain[split, domain] = int(number)
        counts[f"sequences_{split}"] = counts.get(f"sequences_{split}", 0) + int(number)
        counts["sequences"] += int(number)
        counts["padding"] += int(padding)
    counts["tokens"] = counts["sequences"] * config.sequence_length - counts["padding"]
    counts |= {"inserted": written.inserted, "deleted": written.deleted}
    return StageResult(
        counts=counts,
        inputs={GOLD_TOKENS.name: version or 0, **tokenizer_input(tokenizer_id)},
        outputs={GOLD_SEQUENCES.name: written.version},
        notes=thin_validation(by_domain),
    )


def thin_validation(sequences: Mapping[tuple[str, str], int]) -> tuple[str, ...]:
    """A sentence where evaluation has too little to go by. sequences: their number by split and domain."""
    train, validation = SPLITS
    number = sum(n for (split, _), n in sequences.items() if split == validation)
    domains = sorted({domain for split, domain in sequences if split == train})
    missing = [domain for domain in domains if not sequences.get((validation, domain))]
    if not domains or (number >= FEW_SEQUENCES and not missing):
        return ()
    lacks = f", none of {' and '.join(missing)}" if missing else ""
    return (
        f"The validation split is too thin for an evaluation (sequences: {number}{lacks}): raise "
        "--tokenize.validation-fraction, and run tokenize and pack again.",
    )


def _edition(tokenizer: Tokenizer, config: PackConfig, tokenizer_id: str) -> Edition:
    """Raises LakeError (exit code 2) when the tokenizer lacks a control token."""
    end, pad = tokenizer.token_to_id(END_OF_TEXT), tokenizer.token_to_id(PAD)
    if end is None or pad is None:
        raise LakeError(f"Tokenizer {tokenizer_id} lacks {END_OF_TEXT} or {PAD}: train one, or add them to it.", 2)
    return Edition(config=config, tokenizer_id=tokenizer_id, end=end, pad=pad)


def arrange(wanted: DataFrame, stored: DataFrame, changed: DataFrame | None) -> tuple[DataFrame, DataFrame | None]:
    """(tails to pack, sequence_id of the stored sequences that are no longer wanted as they are, or may not be).

    wanted: the pieces of the documents to look at. stored: the edition's sequences. changed: document_id of the
    documents to look at; None: all.
    """
    holding = stored.select("sequence_id", F.explode("document_ids").alias("document_id"))
    looked_at = within(
        stored, None if changed is None else keys(within(holding, changed), "sequence_id"), "sequence_id"
    )
    held = tails_of_sequences(looked_at).localCheckpoint()
    tails = wanted.where("offset IS NULL")
    # A sequence stays where it holds just the tails that are wanted; of documents that did not change all are.
    what = ["document_id", "split", "domain", "tokens"]
    unwanted = within(held, changed).join(tails.select(*what), what, "left_anti")
    stale = keys(unwanted, "sequence_id")
    assert stale is not None
    loose = without(tails, without(held, stale, "sequence_id").select("document_id"))
    if changed is not None:
        others = without(within(held, stale, "sequence_id"), changed)
        loose = loose.unionByName(others.drop("sequence_id"))
    whole = looked_at.where("segment_lengths[0] = sequence_length").select("sequence_id")
    return loose, keys(whole.union(stale), "sequence_id")
