"""The documents: the site is built, links lead somewhere, tables are the code's, blocks run."""

import re
import shutil
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from posixpath import normpath
from urllib.parse import unquote, urlsplit

import doc_blocks
import fork_server
import pytest
from markdown_it import MarkdownIt

ROOT = Path(__file__).parent.parent
PAGES = [*doc_blocks.PAGES, "CONTRIBUTING.md", "CHANGELOG.md"]
GITHUB = MarkdownIt("commonmark").enable("table")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """What ``make docs`` builds, and what is wrong with it."""
    folder = tmp_path_factory.mktemp("site")
    # Copies: zensical builds beside the file that a link leads to.
    shutil.copytree(ROOT / "docs", folder / "docs")
    shutil.copy(ROOT / "zensical.toml", folder)
    said = _build(folder, "--strict")
    if said:  # then there may be no pages
        _build(folder)
    return folder / "site", said


def _build(folder: Path, *flags: str) -> str:
    """What is wrong with the site; empty if nothing is."""
    command = [Path(sys.executable).with_name("zensical"), "build", "--clean", *flags]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return re.sub(r"\x1b\[[\d;]*m", "", done.stdout + done.stderr) if done.returncode else ""


@pytest.fixture
def site(built: tuple[Path, str]) -> Path:
    return built[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that several pages read; whoever is first trains it."""
    return tmp_path_factory.mktemp("trained") / "outputs"


def test_the_site_is_built_without_a_warning(built: tuple[Path, str]) -> None:
    """A link to a page or an anchor that is not there is one."""
    assert not built[1], built[1]


class _Links(HTMLParser):
    """Where a page leads, pictures included."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.links += [value for name, value in attributes if name in ("href", "src") and value]


def test_the_site_asks_nobody_else(site: Path) -> None:
    """A page is read on machines without a network; only its links lead elsewhere."""
    pages = [*site.rglob("*.html")]
    assert len(pages) > 20
    for page in pages:
        scripts = re.findall(r'<(?:script|img|iframe)[^>]+src="([^"]*)"', page.read_text())
        sheets = re.findall(r'<link[^>]+stylesheet[^>]+href="([^"]*)"', page.read_text())
        assert not [each for each in (*scripts, *sheets) if urlsplit(each).netloc], page


def test_every_page_is_in_the_navigation(site: Path) -> None:
    """Start, Guides, Reference and Internals, in this order, and all that is in them."""
    html = (site / "index.html").read_text()
    start = html.index("md-nav--primary")
    navigation = html[start : html.index("<article")]
    linked = [normpath(urlsplit(each).path) for each in _Links(navigation).links]
    shelves = dict.fromkeys(each.partition("/")[0] for each in linked if "/" in each)
    assert list(shelves) == ["start", "guides", "reference", "internals"]
    pages = {page.removeprefix("docs/") for page in doc_blocks.PAGES if page.startswith("docs/")}
    assert {page.replace(".md", ".html") for page in pages} <= {*linked, "index.html"}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page: str) -> None:
    """Those of the site's build are pages and anchors; these are all others, and the README's."""
    for link in _Links(GITHUB.render((ROOT / page).read_text())).links:
        where = urlsplit(link)
        if where.scheme or where.netloc or not where.path:
            continue
        target = (ROOT / page).parent / unquote(where.path)
        assert target.exists(), f"{page}: {link}"
        if where.fragment and target.suffix == ".md":
            assert where.fragment in _anchors(target.read_text()), f"{page}: {link}"


def _anchors(markdown: str) -> set[str]:
    """The anchors of a page, as GitHub makes them of its headings."""
    anchors = set()
    for token, inline in zip(tokens := GITHUB.parse(markdown), tokens[1:], strict=False):
        if token.type == "heading_open":
            text = "".join(child.content for child in inline.children)
            anchors.add(re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-"))
    return anchors


def test_a_page_reads_alike_on_github_and_on_the_site(site: Path) -> None:
    """The site's Markdown wants four spaces where GitHub's takes two, and loses what has less."""
    tags = re.compile(r"<(li|ul|ol|table|tr|td|th|pre|h\d|blockquote|img)\b")
    for page in doc_blocks.PAGES:
        if not page.startswith("docs/"):
            continue
        html = (site / page.removeprefix("docs/")).with_suffix(".html").read_text()
        article = html[html.index("<article") : html.index("</article>")]
        here = Counter(tags.findall(article))
        assert here == Counter(tags.findall(GITHUB.render((ROOT / page).read_text()))), page


def test_the_reference_is_the_codes() -> None:
    script = ROOT / "scripts" / "make_reference.py"
    lines = f"""
import runpy, sys
sys.path.insert(0, {str(script.parent)!r})
sys.argv = [{str(script)!r}, "--check"]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    command = [fork_server.python(), "-c", lines]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_row_without_a_meaning_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A new key gets a row with an empty cell, and what people wrote beside the others stays."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import tables

    monkeypatch.setattr(tables, "ROOT", tmp_path)
    old = tables.markdown([{"key": "`a`", "default": 1, "meaning": "as it says"}])
    (tmp_path / "page.md").write_text(f"<!-- keys: begin -->\n{old}<!-- keys: end -->\n")
    rows = [{"key": "`a`", "default": 2}, {"key": "`b`", "default": 3}]
    made = tables.markdown(tables.with_prose("page.md", "keys", rows, ["meaning"]))
    assert "| `a` | 2 | as it says |" in made
    assert tables.without(made, ["meaning"]) == ["`b`"]


@pytest.mark.parametrize("page", [page for page in doc_blocks.PAGES if [*doc_blocks.blocks(page)]])
@pytest.mark.parametrize("full", [False, pytest.param(True, marks=pytest.mark.full)])
def test_blocks_run_as_they_stand(page: str, full: bool, tmp_path: Path, trained: Path) -> None:
    """In the page's order and one folder; what takes long is run by ``make test-all``."""
    blocks = [each for each in doc_blocks.blocks(page) if not each.why_not]
    blocks = [each for each in blocks if full or not each.full]
    if full and not any(each.full for each in blocks):
        return  # the short check runs all of them
    reader = doc_blocks.Reader(tmp_path, trained) if blocks else None
    for block in blocks:
        done = reader.types(block.text)
        assert done.returncode == block.code, f"{block}\n{block.text}\n{done.stdout[-4000:]}"


def test_a_comment_that_nobody_knows_is_refused() -> None:
    text = "<!-- shell: never -->\n```bash\nezpz-moe flavors\n```\n"
    with pytest.raises(ValueError, match="page:2: nobody knows <!-- shell: never -->"):
        [*doc_blocks.blocks("page", text)]


def test_a_block_has_what_a_reader_types() -> None:
    text = (
        "<!-- shell: full, exit 1 -->\n```console\n$ ezpz-moe doctor\nbroken\n```\n"
        "<!-- shell: not run: it needs a GPU -->\n```bash\nx\n```\n```toml\n[model]\n```\n"
    )
    first, second = doc_blocks.blocks("page", text)
    assert first == doc_blocks.Block("page", 2, "ezpz-moe doctor\n", full=True, code=1)
    assert second.why_not == "it needs a GPU"
