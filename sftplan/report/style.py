"""How text looks on a terminal: colour and block characters, never the only carriers of meaning."""

from __future__ import annotations

from dataclasses import dataclass

_CODES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "blue": "34",
          "magenta": "35", "cyan": "36"}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Style:
    """What the terminal can show."""

    colour: bool = False
    unicode: bool = True

    def paint(self, text: str, *names: str) -> str:
        """`text` in the named colours, if there is colour."""
        if not self.colour or not text:
            return text
        codes = ";".join(_CODES[name] for name in names)
        return f"\x1b[{codes}m{text}\x1b[0m"

    def bar(self, share: float, width: int) -> str:
        """A share of `width` columns; at least a trace of what is not nothing.

        >>> Style(unicode=True).bar(0.5, 8), Style(unicode=False).bar(0.5, 8)
        ('████', '####')
        """
        if share <= 0:
            return ""
        if not self.unicode:
            return "#" * max(1, min(width, round(share * width)))
        eighths = max(1, min(width * 8, round(share * width * 8)))
        full, rest = divmod(eighths, 8)
        return "█" * full + (" ▏▎▍▌▋▊▉"[rest] if rest else "")

    @property
    def times(self) -> str:
        """The multiplication sign."""
        return "×" if self.unicode else "x"


PLAIN = Style(unicode=False)
