"""Samples and the score tables that lie beside them, joined by id in duckdb, and filtered there.

The database may read the given files and no others. A condition is one SQL expression over columns:
duckdb parses it, and what is more than that is refused. It is taken apart at its top-level ANDs, so
that what each clause keeps can be counted; what was checked is what is run, for the clauses are
written anew from the syntax tree.
"""

import json
import os
import re
import secrets
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from infogrowth.annotations import Annotation
from infogrowth.data.exports import as_column
from infogrowth.data.features import ID_COLUMNS
from infogrowth.data.text import IMAGE_EXTENSIONS
from infogrowth.errors import UserError, refusing

POSITION = "sample_position"  # the column that orders the samples

_EXTENSION = "(?i)(" + "|".join(map(re.escape, IMAGE_EXTENSIONS)) + ")$"
_CHUNK_ROWS = 65_536
# An expression's value must not depend on the time, the session or chance.
_SESSION = re.compile(r"now|today|age|getvariable|transaction_timestamp|.*(current|search_path).*")
_REFUSED = {"SUBQUERY": "a query of its own", "WINDOW": "a window function", "STAR": "*"}


@dataclass(frozen=True)
class Clause:
    """One AND-clause: its text, how many samples it keeps by itself and after the clauses before
    it, and for how many it is unknown, because a value is missing (these are not kept)."""

    text: str
    alone: int
    left: int
    unknown: int


@dataclass
class ScoreTable:
    """Score files of the same columns, what they are called in conditions, and how their ids met
    those of the samples."""

    name: str
    files: list[str]
    id_column: str
    columns: list[str]
    samples_without: int = 0
    ids_without: int = 0
    repeated_ids: int = 0

    def summary(self) -> str:
        """How the ids met, in one line."""
        counts = [f"{self.samples_without:,} samples have no row"]
        counts.append(f"{self.ids_without:,} ids are of no sample")
        if self.repeated_ids:
            counts.append(
                f"{self.repeated_ids:,} ids come several times, of which the first counts"
            )
        return f"columns {', '.join(self.columns)}; {', '.join(counts)}"

    def rows(self) -> str:
        """SQL of the files' rows, numbered by file and row in the column ``score_row``."""
        files = _literal(self.files)
        return (
            f"(SELECT *, list_position({files}, score_file) * (1::BIGINT << 40) + file_row_number "
            f"AS score_row FROM read_parquet({files}, filename = 'score_file', "
            "file_row_number = true))"
        )


class SampleTable:
    """Samples in order, and score tables joined to them by id.

    Ids meet as they are, else without folder and image extension (``a/1.jpg`` meets ``1``) where
    that is unique. Of an id that a score table has several times the first row counts.

    Args:
        samples: a table, or parquet files, which are read when needed.
        query: SQL over ``{source}`` that brings the columns ``sample_position`` (ascending in
            the order of the samples) and ``id``.
        scores: parquet files, or folders of them. Files with the same columns are one table.

    Raises:
        UserError: a score table that cannot be read, has no id column, or meets no sample.
    """

    def __init__(self, samples: pa.Table | Sequence[Path], query: str, scores: Sequence[str] = ()):
        self.scores = _score_tables(scores)
        files = [] if isinstance(samples, pa.Table) else [str(path) for path in samples]
        readable = [*files, *(file for table in self.scores for file in table.files)]
        # Made where memory does not suffice, and removed by the database at its end.
        spill = os.path.join(tempfile.gettempdir(), f"infogrowth-select-{secrets.token_hex(8)}")
        extensions = ("autoinstall_known_extensions", "autoload_known_extensions")
        self._base = duckdb.connect(
            config={"temp_directory": spill, **dict.fromkeys(extensions, False)}
        )
        self._base.execute(f"SET allowed_paths = {_literal(readable)}")
        self._base.execute("SET enable_external_access = false")
        self._base.execute("SET lock_configuration = true")
        source = f"read_parquet({_literal(files)})"
        if isinstance(samples, pa.Table):
            self._base.register(source := "given", samples)
        self._base.execute(f"CREATE VIEW samples AS {query.format(source=source)}")
        self.count = self._rows("SELECT count(*) FROM samples")[0][0]
        for number, table in enumerate(self.scores):
            self._meet(f"met_{number}", table)
        self._joined = "samples"

    def filter(self, condition: str) -> tuple[np.ndarray, list[Clause], list[str]]:
        """The positions (n,) int64 of the samples that meet ``condition``, ascending; what each of
        its clauses keeps; and the score columns that it names, as :meth:`rows` takes them.

        Raises:
            UserError: it is no single expression, names a column that is not there, would not be
                the same each time, or fails.
        """
        try:
            tree = self._parsed(condition)
            clauses = [self._sql(clause) for clause in _clauses(tree)]
            where = " AND ".join(clauses)
            # Before work is done: are all names those of columns?
            self._base.execute(f"EXPLAIN SELECT 1 FROM {_join(self.scores)} WHERE {where}")
            used = [(t, [c for c in t.columns if _names(tree, t.name, c)]) for t in self.scores]
            used = [(table, columns) for table, columns in used if columns]
            for table, columns in used:
                listed = ", ".join(map(_quoted, (POSITION, *columns)))
                name = _quoted(table.name)
                read_once = f"SELECT {listed} FROM memory.main.{name}"
                self._base.execute(f"CREATE OR REPLACE TEMP TABLE {name} AS {read_once}")
            self._joined = _join([table for table, _ in used])
            found = self._base.execute(
                f"SELECT {POSITION} FROM {self._joined} WHERE {where} ORDER BY {POSITION}"
            ).fetchnumpy()
            counts = self._count(clauses)
        except duckdb.Error as error:
            first = str(error).split("\n\n")[0].replace("\n", " ")
            advice = "; text goes in single quotes" if "not found" in first else ""
            raise UserError(f"the condition {condition!r} fails: {first}{advice}") from error
        taken = [f"{_quoted(t.name)}.{_quoted(c)}" for t, columns in used for c in columns]
        return np.asarray(found[POSITION], np.int64), counts, taken

    def gains(self, positions: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Positions (n,) and gains (n, 2) float64, of all samples or of those at ``positions``."""
        found = self._base.sql(
            f"SELECT {POSITION}::BIGINT, gain_image::DOUBLE, gain_text::DOUBLE "
            f"FROM {self._chosen(positions, 'samples')} ORDER BY {POSITION}"
        ).to_arrow_table()
        rows, *gains = (column.to_numpy() for column in found.columns)
        return rows, np.stack(gains, axis=1)

    def rows(self, positions: np.ndarray, columns: Sequence[str]) -> Iterator[pa.Table]:
        """The given columns (SQL) of the samples at ``positions``, in their order."""
        relation = self._base.sql(
            f"SELECT {', '.join(columns)} FROM {self._chosen(positions, self._joined)} "
            f"ORDER BY {POSITION}"
        )
        pending: list[pa.RecordBatch] = []
        for batch in relation.to_arrow_reader(_CHUNK_ROWS):
            pending.append(batch)
            if sum(map(len, pending)) >= _CHUNK_ROWS:  # the same chunks however many threads
                table = pa.Table.from_batches(pending)
                yield table.slice(0, _CHUNK_ROWS).combine_chunks()
                pending = table.slice(_CHUNK_ROWS).to_batches()
        if pending:
            yield pa.Table.from_batches(pending).combine_chunks()

    def _count(self, texts: Sequence[str]) -> list[Clause]:
        columns = []
        for n, text in enumerate(texts):
            conditions = (text, " AND ".join(texts[: n + 1]), f"({text}) IS NULL")
            columns += [f"count(*) FILTER (WHERE {condition})" for condition in conditions]
        counts = self._rows(f"SELECT {', '.join(columns)} FROM {self._joined}")[0]
        return [Clause(text, *counts[3 * n : 3 * n + 3]) for n, text in enumerate(texts)]

    def _parsed(self, condition: str) -> dict[str, Any]:
        """The syntax tree of a condition: one expression, whose value is the same each time."""
        duckdb.SQLExpression(condition)  # raises where it closes the brackets that come around it
        statement = f"SELECT 1 WHERE (\n{condition}\n)"
        answer = json.loads(self._answer("SELECT json_serialize_sql($1)", statement))
        if answer["error"]:
            raise duckdb.ParserException(answer["error_message"])
        tree = answer["statements"][0]["node"]["where_clause"]
        volatile = self._rows(
            "SELECT DISTINCT lower(function_name) FROM duckdb_functions() "
            "WHERE stability = 'VOLATILE'"
        )
        for node in _walk(tree):
            if node["class"] in _REFUSED:
                raise UserError(
                    f"the condition {condition!r} must be an expression over columns alone; "
                    f"it holds {_REFUSED[node['class']]}"
                )
            name = str(node.get("function_name", "")).lower()
            if _SESSION.fullmatch(name) or (name,) in volatile:
                raise UserError(
                    f"the condition {condition!r} calls {name}(), whose value is not the same "
                    "each time; a selection must be reproducible"
                )
        return tree

    def _sql(self, tree: dict[str, Any]) -> str:
        """An expression's tree as SQL."""
        answer = json.loads(self._answer("SELECT json_serialize_sql('SELECT 1 WHERE true')"))
        answer["statements"][0]["node"]["where_clause"] = tree
        text = self._answer("SELECT json_deserialize_sql($1)", json.dumps(answer))
        return text.removeprefix("SELECT 1 WHERE ")

    def _answer(self, query: str, *parameters: str) -> str:
        return self._base.execute(query, list(parameters)).fetchall()[0][0]

    def _meet(self, met: str, table: ScoreTable) -> None:
        """Find each sample's row in a score table (table ``met``); make a view of that table."""
        self._base.execute(
            "CREATE OR REPLACE TEMP MACRO stem(name) AS CASE "
            f"WHEN regexp_matches(name, {_literal(_EXTENSION)}) THEN regexp_extract("
            f"regexp_replace(name, {_literal(_EXTENSION)}, ''), '[^/]*$') ELSE name END"
        )
        column, rows = _quoted(table.id_column), table.rows()
        kinds = self._rows(f"SELECT typeof({column}) FROM {rows} LIMIT 1")
        if kinds in ([("DOUBLE",)], [("FLOAT",)]):  # whole numbers that pandas made floats of
            column = f"TRY_CAST({column} AS BIGINT)"
        elif kinds == [("BLOB",)]:
            column = f"decode({column})"
        self._base.execute(
            f"CREATE OR REPLACE TEMP TABLE theirs AS SELECT CAST({column} AS VARCHAR) AS id, "
            f"min(score_row) AS score_row, count(*) AS times FROM {rows} "
            f"WHERE {_quoted(table.id_column)} IS NOT NULL GROUP BY 1"
        )
        self._base.execute(
            f"CREATE TEMP TABLE {met} AS SELECT {POSITION}, score_row "
            "FROM samples JOIN theirs USING (id)"
        )
        self._base.execute(
            f"INSERT INTO {met} SELECT ours.{POSITION}, min(theirs.score_row) "
            f"FROM (SELECT {POSITION}, id FROM samples ANTI JOIN {met} USING ({POSITION})) ours "
            "JOIN theirs ON stem(ours.id) = stem(theirs.id) GROUP BY 1 HAVING count(*) = 1"
        )
        matched, used, ids, repeated, ours, theirs = self._rows(
            f"SELECT (SELECT count(*) FROM {met}), (SELECT count(DISTINCT score_row) FROM {met}), "
            "(SELECT count(*) FROM theirs), (SELECT count(*) FROM theirs WHERE times > 1), "
            "(SELECT min(id) FROM samples), (SELECT min(id) FROM theirs)"
        )[0]
        if matched == 0 and self.count:
            raise UserError(
                f"no id of {table.files[0]} (column {table.id_column!r}, for example "
                f"{theirs!r}) is the id of a sample (for example {ours!r})"
            )
        table.samples_without, table.ids_without = self.count - matched, ids - used
        table.repeated_ids = repeated
        columns = "".join(f", {_quoted(name)}" for name in table.columns)
        self._base.execute(
            f"CREATE VIEW {_quoted(table.name)} AS SELECT {POSITION}{columns} "
            f"FROM {met} JOIN {rows} USING (score_row)"
        )

    def _chosen(self, positions: np.ndarray | None, joined: str) -> str:
        if positions is None:
            return joined
        self._base.register("chosen_positions", pa.table({POSITION: np.sort(positions)}))
        return f"{joined} SEMI JOIN chosen_positions USING ({POSITION})"

    def _rows(self, query: str) -> list[tuple[Any, ...]]:
        return self._base.execute(query).fetchall()


def columns_of(annotations: Sequence[Annotation], gains: np.ndarray) -> pa.Table:
    """The samples of a result JSON as a table for :class:`SampleTable`, extra keys and all; values
    of one key that no column could hold together are there as JSON text."""
    columns: dict[str, Any] = {
        POSITION: np.arange(len(annotations)),
        "id": [entry["image"] for entry in annotations],
        "caption": as_column([entry["caption"] for entry in annotations]),
        "gain_image": gains[:, 0],
        "gain_text": gains[:, 1],
        "gain": gains.mean(axis=1),
    }
    for key in dict.fromkeys(key for entry in annotations for key in entry):
        if key not in (*columns, "image", "gains"):
            columns[key] = as_column([entry.get(key) for entry in annotations])
    return pa.table(columns)


def _score_tables(paths: Sequence[str]) -> list[ScoreTable]:
    """The score files by their columns, in the order in which they are given."""
    tables: dict[tuple[str, ...], ScoreTable] = {}
    for path in map(Path, paths):
        for file in sorted(path.glob("*.parquet")) or [path]:
            with refusing(file, "the table of --scores", pa.ArrowException):
                names = tuple(pq.read_schema(file).names)
            if names not in tables:
                id_column = next((name for name in ID_COLUMNS if name in names), None)
                if id_column is None:
                    raise UserError(
                        f"{file} has no column of ids: expected one of {', '.join(ID_COLUMNS)}, "
                        f"found {', '.join(names)}"
                    )
                taken = {"samples", *(table.name for table in tables.values())}
                name, number = path.stem, 1
                while name.lower() in taken:
                    name, number = f"{path.stem}_{number + 1}", number + 1
                columns = [column for column in names if column not in (id_column, POSITION)]
                tables[names] = ScoreTable(name.lower(), [], id_column, columns)
            tables[names].files.append(str(file))
    return list(tables.values())


def _join(tables: Sequence[ScoreTable]) -> str:
    """The samples beside some score tables, as SQL."""
    return "samples" + "".join(f" LEFT JOIN {_quoted(t.name)} USING ({POSITION})" for t in tables)


def _clauses(tree: dict[str, Any]) -> list[dict[str, Any]]:
    if tree["type"] != "CONJUNCTION_AND":
        return [tree]
    return [clause for child in tree["children"] for clause in _clauses(child)]


def _walk(node: Any) -> Iterator[dict[str, Any]]:
    """Every expression in a syntax tree."""
    if isinstance(node, dict) and "class" in node:
        yield node
    children = node.values() if isinstance(node, dict) else node
    for child in children if isinstance(node, dict | list) else ():
        yield from _walk(child)


def _names(tree: dict[str, Any], table: str, column: str) -> bool:
    """Whether an expression names a column, by its table or alone."""
    names = [node["column_names"] for node in _walk(tree) if node["class"] == "COLUMN_REF"]
    forms = [[part.lower() for part in name] for name in names]
    return any(
        form[0] == column.lower() or form[:2] == [table.lower(), column.lower()] for form in forms
    )


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _literal(value: str | Sequence[str]) -> str:
    if isinstance(value, str):
        return "'" + value.replace("'", "''") + "'"
    return "[" + ", ".join(map(_literal, value)) + "]"
