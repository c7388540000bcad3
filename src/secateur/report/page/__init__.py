"""A run as one page to look at: charts with their tables, self-contained, made from records alone.

Charts are Vega-Lite specifications, written as plain dictionaries; the page draws them with JavaScript that lies in it.
"""

from secateur.report.page.records import RunRecords
from secateur.report.page.render import is_available, render_page, save_charts

__all__ = ["RunRecords", "is_available", "render_page", "save_charts"]
