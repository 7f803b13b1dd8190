"""silver.documents -> a byte-level BPE tokenizer in the lake, trained once and kept.

The file lies at ``tokenizers/ID.json``, ID being the sha256 of its bytes; ``tokenizers/default.json`` names the one
that the lake uses. It is written last, so a killed training is simply done again, and gives the same bytes. Left out:
training several tokenizers at a time, vocabularies other than byte-level BPE.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from pipelines import lake as tables_of
from pipelines.changes import Since
from pipelines.errors import LakeError
from pipelines.files import read_file, write_file
from pipelines.lake import StageResult
from pipelines.tables import SILVER_DOCUMENTS, SILVER_DUPLICATES, SPECIAL_TOKENS, hash_version, tokenizer_uri
from pipelines.tokenize.config import TrainTokenizerConfig

# cl100k_base's pattern (tiktoken, openai_public.py) without possessive quantifiers: words with one leading mark, digits
# by three, runs of marks, line ends, and indentation apart from what it indents.
PATTERN = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


def run(
    spark: SparkSession, lake: str, config: TrainTokenizerConfig, *, run_id: str, since: Since = None
) -> StageResult:
    """Train the lake's tokenizer where it has none yet, or where asked to.

    Raises LakeError when no accepted document has text.
    """
    if not config.retrain and (found := default_tokenizer(lake)):
        return StageResult(counts={"trained": 0, "vocabulary": _size(lake, found)}, unchanged=True)
    inputs = {t.name: tables_of.version(spark, lake, t) for t in (SILVER_DOCUMENTS, SILVER_DUPLICATES)}
    sample = Sample(kept_documents(spark, lake, inputs), config)
    trained = train(sample, config.vocab_size)
    if not sample.documents:
        raise LakeError(
            f"There is no accepted text in {lake} to train a tokenizer on: ingest documents and clean them."
        )
    save(lake, trained)
    counts = {
        "trained": 1,
        "vocabulary": trained.get_vocab_size(),
        "documents": sample.documents,
        "characters": sample.characters,
    }
    read = {name: version for name, version in inputs.items() if version is not None}
    return StageResult(counts=counts, inputs=read)


def kept_documents(spark: SparkSession, lake: str, versions: dict[str, int | None]) -> DataFrame:
    """The accepted documents of silver that no other document stands for, with their cluster_id (null: alone)."""
    silver = tables_of.read(spark, lake, SILVER_DOCUMENTS, versions.get(SILVER_DOCUMENTS.name))
    duplicates = tables_of.read(spark, lake, SILVER_DUPLICATES, versions.get(SILVER_DUPLICATES.name))
    joined = silver.where("size(rejected_by) = 0").join(
        duplicates.select("document_id", "cluster_id", "kept"), "document_id", "left"
    )
    return joined.where("kept IS NULL OR kept").drop("kept")


class Sample:
    """Texts in the order of their documents' seeded hashes, one pass, until the characters are used up."""

    def __init__(self, documents: DataFrame, config: TrainTokenizerConfig) -> None:
        self._documents, self._config = documents, config
        self.documents = self.characters = 0

    def __iter__(self) -> Iterator[str]:
        total = self._documents.agg(F.sum(F.length("text"))).first()
        length = int(total[0] or 0) if total else 0
        # Only about as many documents as are needed come to this process; a share of the hashes is a sample.
        share = min(1.0, 1.2 * self._config.sample_bytes / max(1, length))
        draw = F.sha2(F.concat(F.lit(f"{self._config.seed}/"), "document_id"), 256)
        picked = self._documents.select("document_id", "text", draw.alias("draw"))
        if share < 1:
            picked = picked.where(F.col("draw") < f"{int(share * 16**12):012x}")
        for row in picked.orderBy("draw", "document_id").select("text").toLocalIterator():
            if self.characters >= self._config.sample_bytes:
                return
            text = row[0][: self._config.sample_bytes - self.characters]
            self.documents += 1
            self.characters += len(text)
            yield text


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE over ``texts``; the same texts in the same order give the same tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save(lake: str, tokenizer: Tokenizer) -> str:
    """Store the tokenizer, make it the lake's, and return its id."""
    content = tokenizer.to_str(pretty=False).encode()
    tokenizer_id = hashlib.sha256(content).hexdigest()
    write_file(tokenizer_uri(lake, tokenizer_id), content)
    write_file(_pointer(lake), json.dumps({"tokenizer_id": tokenizer_id}).encode())
    return tokenizer_id


def default_tokenizer(lake: str) -> str | None:
    """The id of the lake's tokenizer; None where none was trained yet."""
    content = read_file(_pointer(lake))
    return str(json.loads(content)["tokenizer_id"]) if content is not None else None


def chosen_tokenizer(lake: str, asked: str | None) -> str:
    """The id asked for, else that of the lake's own.

    Raises LakeError (exit code 2) when the lake has no such tokenizer.
    """
    found = asked or default_tokenizer(lake)
    if found is None:
        raise LakeError(f"{lake} has no tokenizer: run train-tokenizer first, or name another --lake.", 2)
    if read_file(tokenizer_uri(lake, found)) is None:
        raise LakeError(f"{tokenizer_uri(lake, found)} is not there: name a tokenizer of this lake, or train one.", 2)
    return found


def tokenizer_input(tokenizer_id: str) -> dict[str, int]:
    """How a run's record names the tokenizer that it read, as it names tables at versions: 63 bits of its id."""
    return {"tokenizer": hash_version(bytes.fromhex(tokenizer_id))}


def tokenizer_json(lake: str, tokenizer_id: str) -> str:
    """The tokenizer's file. Raises LakeError when it is absent or its bytes are not those of its id."""
    content = read_file(tokenizer_uri(lake, chosen_tokenizer(lake, tokenizer_id))) or b""
    if hashlib.sha256(content).hexdigest() != tokenizer_id:
        raise LakeError(
            f"{tokenizer_uri(lake, tokenizer_id)} was changed: its sha256 is not its name; restore the file."
        )
    return content.decode()


def _pointer(lake: str) -> str:
    return tokenizer_uri(lake, "default")


def _size(lake: str, tokenizer_id: str) -> int:
    return int(Tokenizer.from_str(tokenizer_json(lake, tokenizer_id)).get_vocab_size())
