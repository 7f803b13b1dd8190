"""The report of a lake that the real stages made: figures that add up, and a page that says them and loads nothing."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from jobs import report, runs
from jobs.main import main
from jobs.settings import load
from pipelines import lake as tables_of
from pipelines.clean import stage as clean
from pipelines.clean.config import CleanConfig, Rule
from pipelines.dedup import stage as dedup
from pipelines.dedup.config import DedupConfig
from pipelines.erase import stage as erase
from pipelines.erase.config import EraseConfig
from pipelines.errors import LakeError
from pipelines.ingest import stage as ingest
from pipelines.ingest.config import IngestConfig, SourceConfig
from pipelines.pack import stage as pack
from pipelines.pack.config import PackConfig
from pipelines.report import figures as figures_module
from pipelines.report.charts import chart
from pipelines.report.facts import Erasure, Figures, Rejection, Share
from pipelines.report.figures import figures
from pipelines.report.histograms import scale_of
from pipelines.report.lineage import Lake, last_runs
from pipelines.report.page import render
from pipelines.report.views import number, share
from pipelines.tables import GOLD_SEQUENCES, GOLD_TOKENS, SILVER_DOCUMENTS, TABLES
from pipelines.tokenize import stage as tokenize
from pipelines.tokenize import train
from pipelines.tokenize.config import TokenizeConfig, TrainTokenizerConfig

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

PROSE = (
    "It was a bright day in the old town, and the people of the valley came to see what had happened.\n"
    "Nobody could say why the river had risen, but every farmer knew that it would fall again with time.\n"
    "Some of them brought bread; others carried tools, blankets or letters for their cousins.\n"
)
GERMAN = (
    "Der Fluss stieg in der Nacht über die Ufer und niemand wusste warum das geschah, weil alle Leute im Dorf "
    "schliefen, außer dem alten Müller, der jeden Abend lange wach blieb und auf das Wasser hörte."
)
CODE = '"""Add numbers."""\n\n\ndef add(first: int, second: int) -> int:\n    return first + second\n'
MARKUP = "<script>alert(1)</script>&"
RULES = (
    Rule(name="mine.min_words", signal="words", kind="text", min=20),
    Rule(name="mine.max_words", signal="words", kind="text", max=5000),
    Rule(name="mine.curly_bracket", signal="curly_bracket", kind="text", max=0),
    Rule(name="mine.mean_line_length", signal="mean_line_length", kind="code", max=100, except_languages=("json",)),
)
# What these files come to by the rules above.
DOCUMENTS, REJECTED, DROPPED, QUARANTINED = 8, 3, 1, 1
LENGTH = 64


def write_sources(folder: Path) -> tuple[SourceConfig, ...]:
    files = {
        "prose/good.txt": PROSE,
        "prose/copy.txt": PROSE,
        "prose/german.txt": GERMAN,
        "prose/short.txt": "Too short {",
        "prose/shorter.txt": "Too short",
        "code/add.py": CODE,
        "code/long.py": f'TABLE = "{"abcdefgh" * 200}"\n',
        "code/other.py": CODE.replace("add", "subtract").replace("+", "-") * 3,
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    (folder / "code" / "latin.py").write_bytes(b"name = '\xe9t\xe9'\n")
    return (SourceConfig(path=str(folder / "prose")), SourceConfig(path=str(folder / "code"), name=MARKUP))


def page_of(counted: Figures) -> str:
    return render(counted, made_at=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC))


@pytest.fixture(scope="module")
def built(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A lake that all stages have gone over, its clean run recorded as the command line records it."""
    folder = tmp_path_factory.mktemp("report")
    lake = str(folder / "lake")
    ingest.run(spark, lake, IngestConfig(sources=write_sources(folder)), run_id="r1")
    config = CleanConfig(rules=RULES)
    with runs.recorded(lake, "clean", config.model_dump(mode="json")) as run:
        cleaned = clean.run(spark, lake, config, run_id=run.run_id)
        run.inputs, run.outputs, run.counts = cleaned.inputs, cleaned.outputs, cleaned.counts
    dedup.run(spark, lake, DedupConfig(), run_id="r3")
    train.run(spark, lake, TrainTokenizerConfig(vocab_size=300), run_id="r4")
    tokenize.run(spark, lake, TokenizeConfig(validation_fraction=0.5), run_id="r5")
    pack.run(spark, lake, PackConfig(sequence_length=LENGTH), run_id="r6")
    return lake


@pytest.fixture(scope="module")
def counted(spark: SparkSession, built: str) -> Figures:
    cache = spark._jsparkSession.sharedState().cacheManager()
    before = cache.numCachedEntries()
    counted = figures(spark, built)
    assert cache.numCachedEntries() == before, "figures left something cached"
    return counted


@pytest.mark.slow
def test_figures_add_up(spark: SparkSession, built: str, counted: Figures, monkeypatch: pytest.MonkeyPatch) -> None:
    documents, rejected, accepted, dropped, kept = counted.funnel
    assert [stage.name for stage in counted.funnel] == ["documents", "rejected", "accepted", "duplicates", "kept"]
    assert documents.total == DOCUMENTS == accepted.total + rejected.total
    assert (rejected.total, dropped.total, kept.total) == (REJECTED, DROPPED, DOCUMENTS - REJECTED - DROPPED)
    assert accepted.total == dropped.total + kept.total
    assert documents.documents == {"text": 5, "code": 3}
    assert documents.total_characters == sum(
        tables_of.read(spark, built, SILVER_DOCUMENTS).selectExpr("sum(length(text))").head() or ()
    ), "nothing in these files is redacted or normalised"
    assert [(reason.name, reason.count) for reason in counted.quarantine] == [("invalid_utf8", QUARANTINED)]

    gold = tables_of.read(spark, built, GOLD_TOKENS).selectExpr("count(*)", "sum(token_count)").head()
    assert counted.tokens is not None
    assert (sum(t.documents for t in counted.tokens), sum(t.tokens for t in counted.tokens)) == gold
    assert gold is not None
    assert gold[0] == kept.total
    assert counted.sequences is not None
    room = sum(s.sequences * s.sequence_length for s in counted.sequences)
    assert room - sum(s.padding for s in counted.sequences) == gold[1] + gold[0], "one end token a document"
    segments = tables_of.read(spark, built, GOLD_SEQUENCES).selectExpr("sum(size(document_ids))").head()
    assert segments is not None
    assert sum(s.segments for s in counted.sequences) == segments[0]
    monkeypatch.setattr(figures_module, "MOST_DOMAINS", 0)
    folded = figures_module._sequences(Lake(spark, built), counted.tokenizer)
    assert folded is not None
    assert {s.domain for s in folded} == {figures_module.OTHER_DOMAINS}
    assert sum(s.segments for s in folded) == segments[0]
    longer = tables_of.read(spark, built, GOLD_TOKENS).where(f"token_count >= {LENGTH}").count()
    assert counted.longer == {LENGTH: longer}
    assert sum(h.documents for h in counted.lengths) == gold[0]

    by_source = {s.name: s for s in counted.sources}
    assert set(by_source) == {"prose", MARKUP}
    assert by_source[MARKUP].quarantined == QUARANTINED
    assert sum(s.documents for s in counted.sources) == DOCUMENTS
    assert sum(s.accepted or 0 for s in counted.sources) == accepted.total
    assert sum(s.kept or 0 for s in counted.sources) == kept.total
    assert sum(s.tokens or 0 for s in counted.sources) == gold[1]


@pytest.mark.slow
def test_what_judged_and_what_it_rejected(counted: Figures) -> None:
    assert counted.rules_recorded
    assert counted.rules == RULES
    assert {r.rule: (r.documents, r.alone) for r in counted.rejections or ()} == {
        "mine.min_words": (2, 1),
        "mine.curly_bracket": (1, 0),
        "mine.mean_line_length": (1, 1),
    }
    drawn = {h.name: h for h in counted.histograms}
    assert set(drawn) == {"words", "mean_line_length"}
    assert (drawn["words"].documents, drawn["words"].rejected) == (5, 2)
    assert drawn["words"].bounds == (("min", 20.0), ("max", 5000.0))
    assert (drawn["mean_line_length"].documents, drawn["mean_line_length"].rejected) == (3, 1)
    assert [(f.name, f.documents, f.rejected) for f in counted.flags] == [("curly_bracket", 5, 1)]
    assert counted.duplicates is not None
    assert (counted.duplicates.exact, counted.duplicates.largest) == (2, 2)
    languages = {s.name: s for s in counted.languages or ()}
    assert (languages["de"].documents, languages["de"].kept) == (1, 1)
    assert sum(s.documents for s in languages.values()) == 5
    assert counted.code_languages == (Share(name="python", documents=3, accepted=2, kept=2),)
    assert sum(s.documents for s in counted.license_classes or ()) == DOCUMENTS


@pytest.mark.slow
def test_samples_are_beginnings_of_the_documents_that_they_stand_for(counted: Figures) -> None:
    groups = {(group.kept, group.name): group.samples for group in counted.samples}
    assert set(groups) == {(True, "text"), (True, "code")} | {(False, r.rule) for r in counted.rejections or ()}
    assert {s.source_id for s in groups[False, "mine.min_words"]} == {"short.txt", "shorter.txt"}
    (long,) = groups[False, "mine.mean_line_length"]
    assert long.characters == len(f'TABLE = "{"abcdefgh" * 200}"\n')
    assert long.beginning == 'TABLE = "' + ("abcdefgh" * 200)[:291]
    assert {s.beginning for s in groups[True, "code"]} >= {CODE}
    (cluster,) = counted.clusters
    assert cluster.members == 2
    assert [(method, kept) for method, kept, _ in cluster.shown] == [("exact", True), ("exact", False)]
    assert {s.source_id for _, _, s in cluster.shown} == {"good.txt", "copy.txt"}
    assert all(PROSE.startswith(s.beginning) for _, _, s in cluster.shown)

    outline = Outline(page_of(counted))
    assert outline.count("details") == outline.count("summary") == len(groups) + 1
    assert outline.count("pre") == sum(map(len, groups.values())) + 2
    assert CODE in outline.text


@pytest.mark.slow
def test_what_was_erased_and_what_evaluation_sets_hold(counted: Figures) -> None:
    asked = datetime(2026, 1, 2, tzinfo=UTC)
    done = Erasure(reason="asked by <mail>", documents=3, open=0, last_requested_at=asked)
    text = Outline(page_of(replace(counted, erasures=(done,)))).text
    assert "asked by <mail>" in text
    assert "No table holds any of these documents now" in text
    pending = replace(done, reason=None, open=2)
    assert (
        "2 of these documents may still be in a table" in Outline(page_of(replace(counted, erasures=(pending,)))).text
    )
    verdict = Rejection(rule="contaminated:arc", documents=1, alone=1)
    text = Outline(page_of(replace(counted, rejections=(verdict,)))).text
    assert "contaminated:arc" in text
    assert "no text of the evaluation set" in text


@pytest.mark.slow
def test_lineage(counted: Figures) -> None:
    assert {state.table for state in counted.tables} == set(TABLES) - {"ops.promotions", "ops.erasures"}
    (run,) = counted.runs
    assert (run.job, run.status, run.behind) == ("clean", "succeeded", ())
    assert run.inputs == tuple(f"bronze.documents@{t.version}" for t in counted.tables if t.table == "bronze.documents")
    assert counted.tokenizer is not None
    assert (counted.tokenizer.vocabulary, counted.tokenizer.editions) == (300, 1)
    assert "changed after clean had read it" in page_of(
        replace(counted, runs=(replace(run, behind=("bronze.documents",)),))
    )
    assert f"The last run of clean failed ({run.run_id})." in page_of(
        replace(counted, runs=(replace(run, status="failed"),))
    )


def test_of_two_runs_at_a_time_the_one_that_ended_last_counts(spark: SparkSession, lake: str) -> None:
    with runs.recorded(lake, "ingest", {}):
        pass
    with runs.recorded(lake, "ingest", {}) as long, pytest.raises(ValueError, match="full"):  # noqa: SIM117
        with runs.recorded(lake, "ingest", {}):
            raise ValueError("disk full")
    (run,) = last_runs(Lake(spark, lake))
    assert (run.run_id, run.status) == (long.run_id, "succeeded")


class Outline(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


@pytest.mark.slow
def test_the_page_says_the_figures_and_loads_nothing(counted: Figures) -> None:
    page = page_of(counted)
    outline = Outline(page)
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;&amp;" in page
    assert MARKUP in outline.text
    assert not re.search(r"https?://|@import|url\(", page)
    assert {name for name, _ in outline.tags} & {"script", "link", "img", "iframe", "object", "use", "image"} == set()
    for tag, attributes in outline.tags:
        assert not {"src", "srcset", "onload", "onclick"} & set(attributes), tag
        assert (attributes.get("href") or "#").startswith("#")
    assert outline.count("caption") == outline.count("table") > 8
    assert all(attributes.get("scope") in ("col", "row") for tag, attributes in outline.tags if tag == "th")
    ids = [attributes["id"] for _, attributes in outline.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {a["href"] for tag, a in outline.tags if tag == "a"} | {
        f"#{a['aria-labelledby']}" for _, a in outline.tags if "aria-labelledby" in a
    }
    assert {str(target)[1:] for target in targets} <= set(ids)
    assert outline.count("svg") == len(counted.histograms) + len(counted.lengths)

    tokens = number(sum(t.tokens for t in counted.tokens or ()))
    for said in (
        tokens,
        "invalid_utf8",
        "mine.min_words",
        "at least 20",
        "at most 100",
        "code, not json",
        "≤ 5,000",
        "python",
        "2026-01-02 03:04:05",
        str(counted.tokenizer and counted.tokenizer.tokenizer_id),
    ):
        assert said in outline.text, said
    assert "Next:" not in outline.text


@pytest.mark.slow
def test_a_lake_that_stops_at_bronze(spark: SparkSession, lake: str, tmp_path: Path) -> None:
    ingest.run(spark, lake, IngestConfig(sources=write_sources(tmp_path)), run_id="r1")
    erased = EraseConfig.model_validate({"where": "source = 'prose' AND path LIKE '%short.txt'", "reason": "asked"})
    assert erase.request(spark, lake, erased).counts["requested"] == 1
    counted = figures(spark, lake)
    assert [(e.reason, e.documents, e.open) for e in counted.erasures] == [("asked", 1, 1)]
    assert [stage.name for stage in counted.funnel] == ["documents"]
    assert counted.funnel[0].total == DOCUMENTS - 1
    assert (counted.rejections, counted.tokens, counted.sequences, counted.rules_recorded) == (None, None, None, False)
    assert all((s.accepted, s.tokens) == (None, None) for s in counted.sources)

    output = tmp_path / "pages" / "lake.html"
    for _ in range(2):
        report.run(load(report.Settings, ["--lake", lake, "--output", str(output)], program="lakemoe report"))
    assert [path.name for path in output.parent.iterdir()] == ["lake.html"]
    text = Outline(output.read_text(encoding="utf-8")).text
    assert f"lakemoe clean --lake {lake}" in text
    assert "invalid_utf8" in text
    assert MARKUP in text


def test_a_lake_that_is_not_there(
    spark: SparkSession, lake: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(LakeError, match="run lakemoe ingest") as error:
        figures(spark, lake)
    assert error.value.exit_code == 2
    assert main(["report", "--lake", lake]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not Path(lake).exists()


def test_scales_show_thresholds_and_values() -> None:
    share_ = scale_of(0.01, 0.19, (("max", 0.1),))
    assert (share_.low, share_.high, share_.bins, share_.log) == (0, 0.2, 20, False)
    assert 0.1 in share_.edges
    assert scale_of(0.95, 1.0, (("min", 0.8),)).high == 1
    assert scale_of(0.02, 0.9, (("max", 0.15),)).high <= 1
    counts = scale_of(300, 4000, (("min", 50), ("max", 100000)))
    assert counts.log
    assert counts.edges[-1] > 100000
    assert scale_of(6, 8, (("min", 2),)).bins == 8
    assert scale_of(5, 12, (("min", 3), ("max", 10))).edges[10] == 10
    assert scale_of(0, 0, (("max", 0),)).high > 0


@pytest.mark.slow
def test_numbers_and_drawings(counted: Figures) -> None:
    assert (number(1234567), number(None)) == ("1,234,567", "–")
    assert (share(1, 8), share(1, 10000), share(0, 5), share(1, 0)) == (
        "12.5\u00a0%",
        "<\u00a00.1\u00a0%",
        "0.0\u00a0%",
        "–",
    )
    words = next(h for h in counted.histograms if h.name == "words")
    drawn = chart(words, title="words", notes=())
    assert len(drawn.bars) == sum(count > 0 for count in words.counts)
    low, high = drawn.thresholds
    assert low.x < high.x
    for bar in drawn.bars:
        rejected = bar.rejected_height > 0
        assert rejected == (bar.x < low.x), "what is rejected stands left of the least number of words"
    assert "2 rejected" in drawn.summary
