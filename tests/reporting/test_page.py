import re
from functools import cache

import pytest
from sample_reports import Page, make_report

from slrc.backends.engine_summary import EngineSummary
from slrc.reporting.page import render_page, write_page
from slrc.reporting.plots import ROWS_PER_PLOT, layers_plots
from slrc.reporting.report import Pair, Report, TargetResult
from slrc.reporting.tables import report_table

HEADINGS = ("Training", "History of slr", "Latency", "Sparsity by layer")


def test_a_predicted_latency_stands_beside_the_measured_one() -> None:
    latency = make_report().latency[0].model_copy(update={"predicted_ms": 1.0})
    page = render_page(make_report(latency=(latency,)))
    assert "predicted" in page
    assert "measured −20.0%" in page
    assert "predicted" not in render_page(make_report())


@cache
def whole_page() -> str:
    return render_page(make_report())


BARE = {
    "accuracy": None,
    "training": None,
    "latency": (),
    "history": (),
    "curve": (),
    "layers": (),
    "checks": (),
    "notes": (),
}


@pytest.mark.parametrize("changes", [{}, BARE, BARE | {"targets": (), "config": {}, "environment": {}}])
def test_the_page_is_well_formed_and_self_contained(changes):
    source = render_page(make_report(**changes))
    page = Page(source)
    assert page.faults == []
    assert len(page.ids) == len(set(page.ids))
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert {a.removeprefix("#") for a in page.addresses} <= set(page.ids)
    assert set(re.findall(r"url\(#([^)]*)\)", source)) <= set(page.ids)
    assert not re.search(r"https?:|@import|url\((?!#)", source)


def test_all_text_is_there_and_escaped():
    report = make_report()
    text = Page(render_page(report)).text
    expected = [report.model, *report.notes, *(c.step for c in report.checks), "Some <CPU>", "slr.rho", "0.125"]
    assert [x for x in expected if x not in text] == []
    assert text.count("a<script>$x$") == 2  # in the plot and in the table


def test_figures_stand_with_their_conditions():
    text = " ".join(Page(whole_page()).text.replace("\u00a0", " ").split())
    assert "sparsity 49.9% reached of 50.0% asked" in text
    assert "accuracy0.9100 0.9050−0.0050" in text
    assert "hard-pruned0.8500 −0.0600no retraining" in text
    assert "95.9 kof 381 k−74.8%" in text
    assert "2.000 ms 0.800 ms2.50× (2.25 to 2.75) 1 thread, batch 8, 1,000 runs each" in text
    assert "p902.250 ms 0.875 ms" in text
    assert "slim <i>= ort3.0e−07 2.0e−081.0e−04 yes" in text


def test_a_sparsity_that_nobody_asked_for_is_reached_alone():
    found = make_report().sparsity.model_copy(update={"asked": 0.499, "reached": 0.499})
    text = " ".join(Page(render_page(make_report(sparsity=found))).text.replace("\u00a0", " ").split())
    assert "sparsity 49.9% reached" in text
    assert "asked" not in text


@pytest.mark.parametrize(("field", "heading"), zip(("curve", "history", "latency", "layers"), HEADINGS, strict=True))
def test_a_plot_without_data_is_left_out(field, heading):
    whole, without = whole_page(), render_page(make_report(**{field: ()}))
    assert whole.count("<svg") == 4
    assert f"<h2>{heading}</h2>" in whole
    assert without.count("<svg") == 3
    assert f"<h2>{heading}</h2>" not in without


def test_a_curve_without_a_metric_has_its_loss_only():
    curve = tuple(r.model_copy(update={"metric": None, "hard_pruned": None}) for r in make_report().curve)
    page = render_page(make_report(accuracy=None, curve=curve))
    assert 'aria-label="training loss over 2 epochs"' in page
    assert "live model" not in page


def test_phases_follow_one_another():
    page = whole_page()
    assert 'aria-label="accuracy and training loss over 2 epochs"' in page
    assert ">retrain</text>" in page


def test_conditions_are_marked_for_slr_alone():
    assert "condition rejected" in whole_page()
    assert "condition" not in Page(render_page(make_report(method="admm"))).text.replace("conditions", "")


def test_a_target_that_was_not_run_says_why():
    size = Pair(dense=2, compiled=1)
    target = TargetResult(target="arm", folder="arm", size_bytes=size, precision="int8", not_run="no <arm> here")
    text = Page(render_page(make_report(latency=(), targets=(target,)))).text
    assert "latency, arm" in text
    assert "no <arm> here" in text


def test_an_engine_shows_what_it_consists_of():
    dense = EngineSummary(layers=5, precisions={"float16": 4, "float32": 1})
    compiled = dense.model_copy(update={"sparse_eligible": 3, "sparse_chosen": 0})
    target = TargetResult(
        target="tensorrt",
        folder="tensorrt",
        size_bytes=Pair(dense=2, compiled=1),
        precision="float16",
        engine=Pair(dense=dense, compiled=compiled),
    )
    report = make_report(targets=(target,))
    text = Page(render_page(report)).text
    assert "engine, tensorrt" in text
    assert "5 layers (4 float16, 1 float32); 2:4: 3 eligible, 0 chosen" in text
    assert "3 eligible" in "".join(str(cell) for column in report_table(report).columns for cell in column.cells)
    assert Report.model_validate_json(report.model_dump_json()) == report


def test_many_layers_are_split_into_plots_of_equal_length():
    layer = make_report().layers[0]
    plots = layers_plots([layer.model_copy(update={"name": f"layer{i}"}) for i in range(3 * ROWS_PER_PLOT + 1)])
    assert len(plots) == 4
    boxes = {re.search(r'viewBox="[^"]*"', svg).group() for svg in plots}
    assert len(boxes) == 1
    assert [i for i in range(3 * ROWS_PER_PLOT + 1) if f">layer{i}</text>" not in "".join(plots)] == []


def test_the_same_report_gives_the_same_bytes(tmp_path):
    write_page(make_report(), tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == whole_page()


def test_the_page_tells_what_a_step_took():
    page = render_page(make_report())
    for told in ("12.3&nbsp;ms", "adds 33%", "the method 1.2%", "1,234&nbsp;MB", "1.5&nbsp;MB", "2.2&nbsp;MB"):
        assert told in page
    assert "A step took" not in render_page(make_report(training=None))
