"""Formulas become MathML when the site is built, with a font beside them: pages need no script.

Browsers that find no font with a table of mathematical sizes put indices on the line.
"""

from __future__ import annotations

import html
import re
from pathlib import Path

import ziamath
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
FONT = Path(ziamath.__file__).parent / "fonts/STIXTwoMath-Regular.ttf"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Put the font of formulas into the site."""
    files.append(File.generated(config, "assets/math.ttf", abs_src_path=str(FONT)))
    return files


def on_page_content(content: str, **_: object) -> str:
    """Replace the formulas that arithmatex has marked."""
    return FORMULA.sub(_formula, content)


def _formula(found: re.Match[str]) -> str:
    kind = "inline" if found[2] == "(" else "block"
    return convert(html.unescape(found[3]), display=kind)
