"""A sweep as JUnit's XML, for a build server."""

from __future__ import annotations

from xml.etree import ElementTree

from blip2nb.display.overview.miniature import first_words
from blip2nb.report.sweep import Entry, Index


def junit(index: Index) -> str:
    """The runs as test cases: a divergence is a failure, a run that broke off an error, and one that was not run or
    lacks something of the proof that was asked for is skipped."""
    counts = index.counts
    totals = {
        "tests": str(len(index.runs)),
        "failures": str(counts.get("diverges", 0)),
        "errors": str(counts.get("failed", 0)),
        "skipped": str(counts.get("not run", 0) + sum(bool(entry.missing) for entry in index.runs)),
        "time": f"{index.seconds:.2f}",
    }
    suites = ElementTree.Element("testsuites", {"name": "blip2nb sweep", **totals})
    suite = ElementTree.SubElement(suites, "testsuite", {"name": "blip2nb sweep", **totals})
    for entry in index.runs:
        named = {"classname": entry.notebook, "name": entry.run_name, "time": f"{entry.seconds or 0:.2f}"}
        case = ElementTree.SubElement(suite, "testcase", named)
        if entry.parameters:
            properties = ElementTree.SubElement(case, "properties")
            for name, value in entry.parameters.items():
                ElementTree.SubElement(properties, "property", {"name": name, "value": str(value)})
        _outcome(case, entry)
    ElementTree.indent(suites, " ")
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(suites, encoding="unicode") + "\n"


def _outcome(case: ElementTree.Element, entry: Entry) -> None:
    """What of a test case is not a success."""
    if entry.result == "diverges":
        first = entry.first_divergence
        message = f"{first_words(first)}: {first.cause}" if first else entry.summary
        attributes = {"type": "diverges", "message": message}
        ElementTree.SubElement(case, "failure", attributes).text = entry.summary
    elif entry.result == "failed":
        attributes = {"type": "failed", "message": entry.error}
        ElementTree.SubElement(case, "error", attributes).text = entry.traceback or entry.error
    elif entry.result == "not run":
        ElementTree.SubElement(case, "skipped", {"message": entry.error or "not run"})
    elif entry.missing:
        ElementTree.SubElement(case, "skipped", {"message": f"incomplete: {' '.join(entry.missing)}"})
