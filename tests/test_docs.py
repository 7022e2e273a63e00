"""What README and docs name exists: files, links, headings, config fields.  Lines of prose are
short.
"""

import re

import pytest

from hunyuan_jax.config import field_names
from support import paths

ROOT = paths.ROOT
PAGES = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), ROOT / "tests/golden/README.md"]
PLACES = ("", "hunyuan_jax", "hunyuan_jax/layers/ffn/moe", "hunyuan_jax/checkpoint", "docs")
MADE_UP = re.compile(r"NAME|STEP|runs/|idlelib|modeling_hunyuan")  # and what is not ours


def text_outside_code(page):
    """The lines that are prose: no fenced or indented code, no tables."""
    is_code = False
    for line in page.read_text(encoding="utf-8").splitlines():
        is_code ^= line.startswith("```")
        if not is_code and not line.startswith(("    ", "|", "```")):
            yield line


def heading_ids(page):
    """The anchors that a renderer makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_a_page_names_what_exists(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in target:
            name, _, heading = target.partition("#")
            linked = (page.parent / name).resolve() if name else page
            assert linked.exists(), target
            assert not heading or heading in heading_ids(linked), target
    named = set(re.findall(r"(?<![\w./])[\w/]+/[\w/]+\.(?:py|md|json|ipynb)\b", text))
    roots = "tests|configs|benchmarks|docs|hunyuan_jax|pallas_kernels|notebooks"
    named |= set(re.findall(rf"(?<![\w./])(?:{roots})/[\w/]+(?!\w*[\w.])", text))
    for name in named:
        if not MADE_UP.search(name):
            assert any((ROOT / place / name).exists() for place in PLACES), name
    for field in re.findall(r"--config\.([\w.]+)=", text):
        assert field in [*field_names(), "section.field"], field


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_lines_of_prose_are_short(page):
    assert [line for line in text_outside_code(page) if len(line) > 99] == []
