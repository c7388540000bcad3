"""What a page says, whatever it is about: a title, a verdict, a few numbers, sections, and how it was made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from secateur.report.page.chart import Chart
from secateur.report.tables import Table


@dataclass(frozen=True, slots=True)
class Saying:
    """What one model says, beside what another one does.

    Attributes:
        who: said it, and how.
        common: the start that both have in common.
        differing: where it parts from the other; may be empty.
        rest: what follows.
        detail: a line below, such as how long it is.
    """

    who: str
    common: str
    differing: str
    rest: str
    detail: str


@dataclass(frozen=True, slots=True)
class Exchange:
    """A prompt and what models say to it; folded under its title.

    Attributes:
        title: a line.
        detail: the rest of that line, less prominent.
        prompt: in full.
        sayings: side by side where there is room, two in a row.
    """

    title: str
    detail: str
    prompt: str
    sayings: Sequence[Saying]


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page.

    Attributes:
        name: its anchor.
        title: its heading.
        text: paragraphs.
        charts: shown side by side where there is room.
        tables: folded; each opens by itself.
        items: a list.
        exchanges: prompts with their answers; the first is open.
    """

    name: str
    title: str
    text: Sequence[str] = ()
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    items: Sequence[str] = ()
    exchanges: Sequence[Exchange] = ()


@dataclass(frozen=True, slots=True)
class Tile:
    """A number to see at once.

    Attributes:
        label: what it is.
        value: the number as shown.
        detail: its interval, or what it is made of.
        is_missing: whether it was not measured.
    """

    label: str
    value: str
    detail: str
    is_missing: bool = False


@dataclass(frozen=True, slots=True)
class Document:
    """A page.

    Attributes:
        kind: the line above the title.
        title: of what the page is.
        subject: the rest of the title, less prominent; may be empty.
        verdict: what came out, in a sentence or two.
        sections: in their order; the first is where a reader who skips the head arrives.
        tiles: the few numbers at the top.
        cautions: what weakens the evidence; sentences.
        made: tables on how the page's numbers were made.
        recipe_yaml: the recipe, every default written out.
        commands: what repeats it, and what builds the page again.
        version: of secateur, that wrote it.
    """

    kind: str
    title: str
    verdict: str
    sections: Sequence[Section]
    subject: str = ""
    tiles: Sequence[Tile] = ()
    cautions: Sequence[str] = ()
    made: Sequence[Table] = ()
    recipe_yaml: str = ""
    commands: Sequence[str] = ()
    version: str = ""

    @property
    def charts(self) -> list[Chart]:
        """All charts, in the order of the page."""
        return [chart for section in self.sections for chart in section.charts]
