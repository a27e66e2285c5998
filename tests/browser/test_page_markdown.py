"""The page's Markdown: what it shows, that nothing of a text becomes HTML, and that no text makes it slow."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tests.browser.chromium import CHROMIUM  # noqa: F401  (skips without a browser)

SOURCE = (Path(__file__).parents[2] / "exl/server/page/markdown.js").read_text(encoding="utf-8")
pytestmark = pytest.mark.browser
ALLOWED = {
    *("A", "B", "BLOCKQUOTE", "BR", "BUTTON", "CODE", "DEL", "DIV", "EM", "H2", "H3", "H4", "H5", "H6", "HR", "LI"),
    *("OL", "P", "PRE", "SPAN", "STRONG", "svg", "TABLE", "TBODY", "TD", "TH", "THEAD", "TR", "UL", "use"),
}
ATTRIBUTES = {"href", "target", "rel", "class", "type", "aria-label", "aria-hidden", "tabindex", "start"}


@pytest.fixture(scope="module")
def blank(browser):
    """A page without a policy, where what got through would run."""
    page = browser.new_page()
    page.evaluate(
        "source => { (0, eval)(source + ';globalThis.MarkdownView = MarkdownView; globalThis.copyText = () => {};') }",
        SOURCE,
    )
    page.evaluate(
        """() => { globalThis.shown = (text) => {
          const root = document.createElement("div");
          document.body.replaceChildren(root);
          new MarkdownView(root).update(text);
          return root.innerHTML;
        } }"""
    )
    yield page
    page.close()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("# One", "<h2>One</h2>"),
        ("###### Six #", "<h6>Six</h6>"),
        ("a **b** *c* _d_ ~~e~~ `f`", "<p>a <strong>b</strong> <em>c</em> <em>d</em> <del>e</del> <code>f</code></p>"),
        ("***a***", "<p><strong><em>a</em></strong></p>"),
        ("**a *b* c**", "<p><strong>a <em>b</em> c</strong></p>"),
        ("2 * 3 * 4 and snake_case_name", "<p>2 * 3 * 4 and snake_case_name</p>"),
        ("``a ` b``", "<p><code>a ` b</code></p>"),
        ("one\ntwo", "<p>one<br>two</p>"),
        ("\\*a\\*", "<p>*a*</p>"),
        ("- a\n- b\n  - c\n\ntext", "<ul><li>a</li><li>b<ul><li>c</li></ul></li></ul><p>text</p>"),
        ("3. a\n4. b", '<ol start="3"><li>a</li><li>b</li></ol>'),
        ("1. a\n   - b\n2. c", "<ol><li>a<ul><li>b</li></ul></li><li>c</li></ol>"),
        ("- [ ] a\n- [x] b", "<ul><li>☐ a</li><li>☑ b</li></ul>"),
        ("> a\n> > b", "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote>"),
        ("---", "<hr>"),
        ("<b>x</b> &amp;", "<p>&lt;b&gt;x&lt;/b&gt; &amp;amp;</p>"),
        (
            "[a](https://x.org/b_c)",
            '<p><a href="https://x.org/b_c" target="_blank" rel="noopener noreferrer">a</a></p>',
        ),
        (
            "see https://x.org/a_b.",
            '<p>see <a href="https://x.org/a_b" target="_blank" rel="noopener noreferrer">https://x.org/a_b</a>.</p>',
        ),
        (
            "![p](https://x.org/p.png)",
            '<p><a href="https://x.org/p.png" target="_blank" rel="noopener noreferrer">p</a></p>',
        ),
        ("[a](javascript:alert(1))", "<p>[a](javascript:alert(1))</p>"),
        ("[a](data:text/html,x)", "<p>[a](data:text/html,x)</p>"),
        ("[a](/local)", "<p>[a](/local)</p>"),
    ],
)
def test_what_is_shown(blank, text, expected):
    assert blank.evaluate("shown", text) == expected


def test_code_and_tables(blank):
    blank.evaluate("shown", "```py\nif a < b:\n    *c*\n```\n\n|a|b|\n|-|-:|\n|1|**2**|\n")
    assert blank.locator("pre code").inner_text() == "if a < b:\n    *c*"
    assert blank.locator(".code-top span").inner_text() == "py"
    assert blank.locator("td").all_inner_texts() == ["1", "2"]
    assert blank.locator("td.right strong").count() == 1


def test_a_fence_that_is_still_open_is_code(blank):
    blank.evaluate("shown", "~~~\n<script>alert(1)</script>")
    assert blank.locator("pre code").inner_text() == "<script>alert(1)</script>"


HOSTILE = [
    "<script>hacked=1</script>",
    "<img src=x onerror=hacked=1>",
    "<svg/onload=hacked=1>",
    "</code></pre><script>hacked=1</script>",
    "[a](javascript:hacked=1)",
    "[a](JaVaScRiPt:hacked=1)",
    "[a]( javascript:hacked=1 )",
    "[a](\x01javascript:hacked=1)",
    "[a](java\tscript:hacked=1)",
    "[a](vbscript:x)",
    "[a](data:text/html;base64,PHNjcmlwdD4=)",
    "[a](file:///etc/passwd)",
    '[a](https://x.org/"onmouseover="hacked=1)',
    "[a](https://x.org/'><img src=x onerror=hacked=1>)",
    '![a](x" onerror="hacked=1)',
    "<a href='javascript:hacked=1'>a</a>",
    "https://x.org/<script>hacked=1</script>",
    "```<script>hacked=1</script>\n<script>hacked=1</script>\n```",
    '```"onclick="hacked=1\nx\n```',
    "|<script>hacked=1</script>|\n|-|\n|<img src=x onerror=hacked=1>|",
    "# <iframe src=javascript:hacked=1>",
    "&lt;script&gt;hacked=1&lt;/script&gt;",
    "<math><mtext></mtext><script>hacked=1</script></math>",
    "`<img src=x onerror=hacked=1>`",
    "\x00<script\x00>hacked=1</script>",
    "\u202e<script>hacked=1</script>",
    "<style>@import 'https://x.org'</style>",
    "[x](https://u:p@x.org)",
]
PIECES = [
    *HOSTILE,
    *("**", "*", "_", "`", "```", "~~~", "\n", "\n\n", "    ", "- ", "1. ", "> ", "# ", "|", "|-|-|\n", "[", "](", ")"),
    *(
        "!",
        "\\",
        "<",
        ">",
        '"',
        "'",
        "&",
        "https://",
        "javascript:",
        "word",
        "é",
        "\U0001d4b3",
        "\ud83d",
        "---",
        "~~",
        "\t",
    ),
]

INSPECT = """() => {
  const found = [];
  for (const node of document.body.querySelectorAll("*")) {
    found.push([node.tagName, [...node.attributes].map(one => [one.name, one.value])]);
  }
  return [found, globalThis.hacked === undefined];
}"""


def inspect(page, text) -> None:
    nodes, is_safe = page.evaluate(INSPECT)
    assert is_safe, text
    for tag, attributes in nodes[1:]:  # without the root
        assert tag in ALLOWED, text
        assert {name for name, _ in attributes} <= ATTRIBUTES, text
        given = dict(attributes)
        if tag == "A":
            assert given["href"].startswith(("http://", "https://")), text
            assert "noopener" in given["rel"], text


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts_are_texts(blank, text):
    blank.evaluate("shown", text)
    inspect(blank, text)


def test_random_texts_make_only_known_nodes_and_grow_to_the_same(blank):
    """Whole at once, and piece by piece with ``finish``, they are the same document."""
    rng = random.Random(17)
    grown = """texts => texts.map(pieces => {
      const whole = shown(pieces.join(""));
      const root = document.createElement("div");
      const view = new MarkdownView(root);
      let text = "";
      for (const piece of pieces) view.update(text += piece);
      view.finish();
      return whole === root.innerHTML;
    })"""
    texts = [[rng.choice(PIECES) for _ in range(rng.randint(1, 14))] for _ in range(1500)]
    same = blank.evaluate(f"texts => ({grown})(texts)", texts)
    assert all(same), texts[same.index(False)]
    for pieces in texts[:150]:
        text = "".join(pieces)
        blank.evaluate("shown", text)
        inspect(blank, text)


def test_what_has_come_stays_while_more_comes(blank):
    """Blocks before the last one keep their nodes, and code that grows keeps its own."""
    kept = blank.evaluate(
        """() => {
          const root = document.createElement("div");
          const view = new MarkdownView(root);
          view.update("one\\n\\ntwo\\n\\n```\\na");
          const nodes = [...root.childNodes], text = root.querySelector("code").firstChild;
          view.update("one\\n\\ntwo\\n\\n```\\na\\nb");
          return nodes.every((node, i) => node === root.childNodes[i]) && text === root.querySelector("code").firstChild
            && text.data === "a\\nb";
        }"""
    )
    assert kept


@pytest.mark.parametrize(
    "text",
    [
        *("*a " * 20000, "**a" * 20000, "[" * 50000, "[a](" * 10000, "`a" * 20000, "``a`" * 20000, "> " * 20000),
        *("- " * 20000, "  " * 30000 + "- a", "|" * 50000 + "\n" + "|-" * 500, "#" * 50000, "https://" * 8000),
        *("a\n" * 30000, "1. a\n" * 8000, "\\" * 50000, "~" * 50000, "_a_" * 20000, "- a\n" + "  - b\n" * 8000),
        *("![" * 30000, "![a](" * 10000, "-" * 50000, "- - " * 10000, "* " * 20000 + "*"),
    ],
    ids=lambda text: json.dumps(text[:8]),
)
def test_no_text_is_slow(blank, text):
    took = "text => { const began = performance.now(); shown(text); return performance.now() - began; }"
    milliseconds = (blank.evaluate(took, text) for _ in range(5))  # other processes may have the processor meanwhile
    assert any(one < 1500 for one in milliseconds)
