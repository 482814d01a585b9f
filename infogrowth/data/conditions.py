"""A condition in SQL: one expression over columns, parsed by duckdb and refused if it is more.

It is taken apart at its top-level ANDs, so that what each clause keeps can be counted. What was
checked is what is run: the clauses are written anew from the syntax tree.
"""

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import duckdb

from infogrowth.errors import UserError

# An expression's value must not depend on the time, the session or chance.
_SESSION = re.compile(r"now|today|age|getvariable|transaction_timestamp|.*(current|search_path).*")
_REFUSED = {"SUBQUERY": "a query of its own", "WINDOW": "a window function", "STAR": "*"}


class Condition:
    """One SQL expression.

    Args:
        text: what the user wrote.
        base: the database that parses it.

    Attributes:
        clauses: its top-level AND-clauses as SQL.

    Raises:
        UserError: it is no single expression, or its value would not be the same each time.
    """

    def __init__(self, text: str, base: duckdb.DuckDBPyConnection):
        self.text, self._base = text, base
        if not text.strip():
            raise UserError("the condition is empty; give an SQL expression over columns")
        self._tree = self._parse()
        self._check_functions()
        self.clauses = [self._sql(clause) for clause in _clauses(self._tree)]

    def columns(self, tables: Mapping[str, Sequence[str]]) -> set[tuple[str, str]]:
        """The columns that it names, as (table, column); a name that several tables have is of all.

        Args:
            tables: the columns of each table.

        Raises:
            UserError: a name that no table has, with the nearest that one has.
        """
        lambdas = [node["lhs"] for node in _walk(self._tree) if node["class"] == "LAMBDA"]
        parameters = {
            name for lhs in lambdas for reference in _references(lhs) for name in reference
        }
        found: set[tuple[str, str]] = set()
        for first, *rest in _references(self._tree):
            named = [table for table in tables if rest and table.lower() == first.lower()]
            name = rest[0] if named else first
            if name in parameters:
                continue
            candidates = [(table, column) for table in named or tables for column in tables[table]]
            matching = {pair for pair in candidates if pair[1].lower() == name.lower()}
            if not matching:
                raise UserError(self._unknown_column(name, [column for _, column in candidates]))
            found |= matching
        return found

    def _parse(self) -> dict[str, Any]:
        """The syntax tree of one expression."""
        refused = f"the condition {self.text!r} must be one SQL expression over columns"
        statement = f"SELECT 1 WHERE (\n{self.text}\n)"
        answer = json.loads(self._answer("SELECT json_serialize_sql($1)", statement))
        if answer["error"]:
            raise UserError(f"{refused}: {answer['error_message']}")
        nodes = [entry["node"] for entry in answer["statements"]]
        plain = len(nodes) == 1 and nodes[0]["type"] == "SELECT_NODE"
        if not plain or self._answer("SELECT json_deserialize_sql($1)", json.dumps(answer)) != (
            f"SELECT 1 WHERE {self._sql(nodes[0]['where_clause'])}"
        ):
            raise UserError(f"{refused}, nothing around it")
        tree = nodes[0]["where_clause"]
        for node in _walk(tree):
            if node["class"] in _REFUSED:
                raise UserError(f"{refused}; it holds {_REFUSED[node['class']]}")
        return tree

    def _sql(self, tree: dict[str, Any]) -> str:
        """An expression's tree as SQL."""
        answer = json.loads(self._answer("SELECT json_serialize_sql('SELECT 1 WHERE true')"))
        answer["statements"][0]["node"]["where_clause"] = tree
        text = self._answer("SELECT json_deserialize_sql($1)", json.dumps(answer))
        return text.removeprefix("SELECT 1 WHERE ")

    def _check_functions(self) -> None:
        volatile = self._base.execute(
            "SELECT DISTINCT lower(function_name) FROM duckdb_functions() "
            "WHERE stability = 'VOLATILE'"
        ).fetchall()
        for node in _walk(self._tree):
            name = str(node.get("function_name", "")).lower()
            if _SESSION.fullmatch(name) or (name,) in volatile:
                raise UserError(
                    f"the condition {self.text!r} calls {name}(), whose value is not the same "
                    "each time; a selection must be reproducible"
                )

    def _unknown_column(self, name: str, valid: Sequence[str]) -> str:
        valid = list(dict.fromkeys(valid))
        close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
        advice = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(valid)}"
        if f'"{name}"' in self.text:
            advice += " (text goes in single quotes)"
        return f"the condition {self.text!r} names {name!r}, which is no column; {advice}"

    def _answer(self, query: str, *parameters: str) -> str:
        return self._base.execute(query, list(parameters)).fetchall()[0][0]


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


def _references(tree: Any) -> list[list[str]]:
    """The columns named in a tree, each as its parts (table and column, or column alone)."""
    return [node["column_names"] for node in _walk(tree) if node["class"] == "COLUMN_REF"]
