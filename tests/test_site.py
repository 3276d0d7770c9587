"""The site has every page and everything public, and its benchmark page what is stored."""

import importlib
import pathlib

import vattn
from benchmarks.records import RESULTS, load
from docs._site import api, benchmarks_page
from tests.model_zoo import MODELS

ROOT = pathlib.Path(__file__).parents[1]


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    pages = [path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md")]
    expected = [page.as_posix() for page in pages if "_build" not in page.parts]
    expected += [f"api/{page}.md" for page in api.page_modules()]
    assert [page for page in expected if f": {page}\n" not in navigation] == []


def test_the_api_pages_have_everything_public():
    """Operators, models and modules, each in one place."""
    homes = set(api.homes().values())
    assert {f"vattn.{op}" for op in vattn.ops.OPERATORS} <= homes
    assert {api.homes()[api.canonical(entry.kind)] for entry in MODELS.values()} <= homes
    texts = api.pages()

    def anchor(path: str) -> str:
        defined = api.canonical(getattr(importlib.import_module(path.rpartition(".")[0]), path.rpartition(".")[2]))
        return f"::: {path}\n" if defined in (None, path) else f"{{#{path}}}\n"

    for page, modules in api.page_modules().items():
        for module in modules:
            expected = [f"{module}.{member}" for member in api.public_names(module)]
            assert [path for path in expected if anchor(path) not in texts[page]] == []
    for defined, home in api.homes().items():
        assert sum(text.count(f"::: {defined}\n") for text in texts.values()) == 1, home


def test_the_benchmark_page_is_that_of_the_stored_lines():
    lines = [line for line in load("leap_attention", RESULTS) if line.machine == "AMD EPYC" and line.dtype == "float32"]
    case = [line for line in lines if line.case == lines[0].case and line.pass_name == "forward"]
    medians = {line.provider: line.measured.median for line in case if line.role in ("vattn", "peer") and line.measured}
    own = medians.pop("vattn")
    ratio = min(medians.values()) / own
    page = benchmarks_page.page()
    table = page.split("\n## leap_attention\n")[1].split("\n### AMD EPYC, float32\n")[1]
    row = next(x for x in table.split("\n") if "| forward |" in x)
    assert f"`{case[0].case}`" in row
    assert f"| {ratio:.2f} |" in row
    for operator, machine, dtype in benchmarks_page.latest():
        assert f"\n### {machine}, {dtype}\n" in page.split(f"\n## {operator}\n")[1].split("\n## ")[0]
