import base64
import hashlib
import re

import pytest
from markupsafe import Markup

from infogrowth.report.charts import COLORS, finish, svg
from infogrowth.report.formatting import compact, count, decimal, percent, shown
from infogrowth.report.page import render


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0.0 %"),
        (0.001, "< 0.1 %"),
        (3.21, "3.2 %"),
        (9.96, "10 %"),
        (78.4, "78 %"),
        (99.97, "99.9 %"),
        (100, "100 %"),
    ],
)
def test_percentages_never_round_to_none_or_all_when_they_are_not(value, text):
    assert percent(value).replace("\N{NARROW NO-BREAK SPACE}", " ") == text


def test_numbers_for_readers():
    assert decimal(-0.1234) == "−0.123"
    assert decimal(-0.0001) == "0.000"
    assert decimal(float("nan")) == decimal(None) == "–"
    assert count(1234567) == "1\N{NARROW NO-BREAK SPACE}234\N{NARROW NO-BREAK SPACE}567"
    assert [compact(v) for v in (950, 12_500, 3e6, 0.25)] == ["950", "12.5k", "3M", "0.25"]


def test_shown_text_has_no_controls_no_direction_overrides_and_no_lone_surrogates():
    assert shown("a\x00b\x1bc‮d⁦e\ud800f\n") == "a b c d e?f "
    assert shown("中文 العربية 🙂") == "中文 العربية 🙂"


def test_the_policy_lets_the_browser_run_the_page_s_own_script_only():
    page = render("report.html.j2", title="t", table=None, training=None).decode()
    script = re.search(r"<script>(.*)</script>", page, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert "unsafe-inline'; script" in policy  # styles only
    assert page.count("<script") == 1


def test_texts_are_escaped_in_titles():
    page = render("report.html.j2", title="</title><script>", table=None, training=None).decode()
    assert page.count("<script") == 1
    assert "&lt;/title&gt;&lt;script&gt;" in page


def test_a_chart_follows_the_theme_and_names_what_it_shows():
    def draw(figure):
        axes = figure.subplots()
        axes.plot([1, 2], color=COLORS["kept"], label="a $b_1$ <i>")
        finish(axes)

    drawn = svg("one", (200, 100), draw, description='says "what" <it> shows')
    assert isinstance(drawn, Markup)
    assert "var(--kept)" in drawn
    assert not [color for color in COLORS.values() if color in drawn]
    assert 'aria-label="says &quot;what&quot; &lt;it&gt; shows"' in drawn
    assert "a $b_1$ &lt;i&gt;" in drawn
    assert "<metadata" not in drawn


def test_charts_on_one_page_share_no_ids_and_every_reference_is_met():
    def draw(figure):
        figure.subplots().plot([1, 2, 3], marker="o")

    page = svg("one", (200, 100), draw, description="d") + svg(
        "two", (200, 100), draw, description="d"
    )
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    references = set(re.findall(r'href="#([^"]+)"', page)) | set(
        re.findall(r"url\(#([^)]+)\)", page)
    )
    assert references and references <= set(ids)
