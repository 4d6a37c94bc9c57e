"""Tables and colours by rich, of text that cannot steer the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from stepladder import console


class _Stdout:
    """stdout for rich, which may write control sequences; a progress bar's stand-in for stdout is passed through."""

    def __init__(self) -> None:
        self.stream = getattr(sys.stdout, "rich_proxied_file", sys.stdout)
        self.rich_proxied_file = self  # else rich would write to the stream without us

    def write(self, text: str) -> int:
        getattr(self.stream, "write_exactly", self.stream.write)(text)
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class Screen(Console):
    """rich's console on stdout, for text of any origin: it takes no markup, and escapes control characters.

    Args:
        plain: the width in columns where stdout is no terminal; there, long lines tear nothing.
    """

    def __init__(self, plain: int | None = None, **kwargs: Any):
        kwargs.setdefault("file", _Stdout())
        super().__init__(markup=False, emoji=False, highlight=False, **kwargs)
        if plain and not self.is_terminal:
            self.width = plain

    def render_str(self, text: str, **kwargs: Any) -> Text:  # before widths are computed
        return super().render_str(console.printable(text), **kwargs)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else console.printable(text), style, control)
