"""A run, a sweep or a comparison as one page to look at: charts with their tables, self-contained, from records alone.

Charts are Vega-Lite specifications, written as plain dictionaries; the page draws them with JavaScript that lies in it.
"""

from secateur.report.page.document import Document, Section, Tile
from secateur.report.page.records import RunRecords
from secateur.report.page.render import is_available, render_page, save_charts
from secateur.report.page.run import run_document

__all__ = ["Document", "RunRecords", "Section", "Tile", "is_available", "render_page", "run_document", "save_charts"]
