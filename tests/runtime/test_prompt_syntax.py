"""The prompt syntax: a table of what it means, what it refuses, and properties that hold for any text."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from diffoundry.common.errors import RequestError
from diffoundry.runtime.text.prompt_syntax import Fragment, Prompt, parse

SYNTAX = st.lists(st.sampled_from([*' ab19\n()[]<|"+-.,:;=\\é', "BREAK", "AND", "<lora:"]), max_size=40).map("".join)
SPACE = " \t\r\n"


def plain(text):
    return (Fragment(text, 1.0),)


def fragments(text):
    """Those of a prompt of one part."""
    prompt = parse(text)
    assert not prompt.joined
    assert prompt.weights == (1.0,)
    (part,) = prompt.parts
    return part


def escape(text):
    """The prompt or part of one that is this very text, by backslashes."""
    return re.sub(r'([\\()\[<"+:-]|\b(?:BREAK|AND)\b)', r"\\\1", text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        (" \n", []),
        ("()", []),
        ("()++ a", [("a", 1)]),
        ("a large  red star", [("a large  red star", 1)]),
        # signs
        ("a cat+ in", [("a", 1), ("cat", 1.1), ("in", 1)]),
        ("ball++, forest", [("ball", 1.1**2), (", forest", 1)]),
        ("dog--", [("dog", 0.9**2)]),
        ("it's+ (here-)", [("it's", 1.1), ("here", 0.9)]),
        ("v1.5+ x", [("v1.5", 1.1), ("x", 1)]),
        ("cat+!", [("cat", 1.1), ("!", 1)]),
        ("t-shirt c++11 a--b x+- rock-'n'-roll", [("t-shirt c++11 a--b x+- rock-'n'-roll", 1)]),
        ("a - b + c", [("a - b + c", 1)]),
        # groups
        ("a (large red)1.3 star", [("a", 1), ("large red", 1.3), ("star", 1)]),
        ("(x)2 dogs", [("x", 2), ("dogs", 1)]),
        ("(x).5, (y)0", [("x", 0.5), (",", 1), ("y", 0)]),
        ("(x)1.", [("x .", 1)]),
        ("(red)++blue", [("red", 1.1**2), ("blue", 1)]),
        ("super(man) (x) 1.3 (y) ++", [("super man x 1.3 y ++", 1)]),
        ("(a, b. c)-", [("a, b. c", 0.9)]),
        ("a (b (c)+)1.2", [("a", 1), ("b", 1.2), ("c", 1.2 * 1.1)]),
        ("((x)+ y+)--", [("x y", 1.1 * 0.9**2)]),
        ("((a++)+ (b)+++)--- c---", [("a b", 0.99**3), ("c", 0.9**3)]),
        ("((((x)))++)", [("x", 1.1**2)]),
        ("(16:9)+", [("16:9", 1.1)]),
        # quotes
        ('"a b"++ c', [("a b", 1.1**2), ("c", 1)]),
        ('("a (b)2"1.5)2', [("a", 3), ("b", 6)]),
        ('a 5" nail says "hi"', [('a 5" nail says "hi"', 1)]),
        ('a "hi"-themed "cake"', [('a "hi"-themed "cake"', 1)]),
        # escapes
        (r"c\+\+ \(x\) \"y\" \\ 1\.3 a\,b", [(r'c++ (x) "y" \ 1.3 a,b', 1)]),
        (r"x\++ (red\:1.3)", [("x+", 1.1), ("red:1.3", 1)]),
        (r"(a\))+ \(b\)-", [("a)", 1.1), ("(b)", 0.9)]),
        ("C:\\dir \\", [("C:\\dir \\", 1)]),
        (r"\.swap\(x\)", [(".swap(x)", 1)]),
        (r"\[a\] ] \<lora:x> <fox> a\[", [("[a] ] <lora:x> <fox> a[", 1)]),
        (r"\BREAK \AND BREAKS and _AND \\AN", [(r"BREAK AND BREAKS and _AND \AN", 1)]),
        (r"\((ring)\) (\(x\))+", [("( ring )", 1), ("(x)", 1.1)]),
        ("((a) b) (c (d))", [("a b c d", 1)]),
    ],
)
def test_fragments(text, expected):
    assert [(fragment.text, pytest.approx(fragment.weight)) for fragment in fragments(text)] == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('("a", "b").blend(0.7, 0.3)', Prompt((plain("a"), plain("b")), (0.7, 0.3))),
        ('("a","b").blend(6,2)', Prompt((plain("a"), plain("b")), (0.75, 0.25))),
        ('("a","b").blend()', Prompt((plain("a"), plain("b")), (0.5, 0.5))),
        ('("a","b").blend(1, -.5)', Prompt((plain("a"), plain("b")), (2.0, -1.0))),
        ('("a","b").blend(1, -1, no_normalize)', Prompt((plain("a"), plain("b")), (1.0, -1.0))),
        ('("a","b").blend(no_normalize)', Prompt((plain("a"), plain("b")), (1.0, 1.0))),
        ('\n( "a, (b)2" ,\n"" )\n.and( )\n', Prompt(((Fragment("a,", 1.0), Fragment("b", 2.0)), ()), (1.0, 1.0), True)),
        (r'("say \"a\"").and(0.5)', Prompt((plain('say "a"'),), (0.5,), True)),
        ('("a+","b").and(1, 0.5)', Prompt(((Fragment("a", 1.1),), plain("b")), (1.0, 0.5), True)),
    ],
)
def test_blends_and_conjunctions(text, expected):
    assert parse(text) == expected


@pytest.mark.parametrize(
    ("text", "character", "reason"),
    [
        ("a ( b", 3, r"never closed: write \\\("),
        ("a (b (c)", 3, "never closed"),
        ("a ) b", 3, r"never opened: write \\\)"),
        ('"a ) b"+', 4, "never opened"),
        ('("a (b", "c").and()', 5, "never closed"),
        ("(a)1.3d", 4, "unclear weight"),
        ("(a)1.3.4", 4, "unclear weight"),
        ("(a)-0.5", 4, "unclear weight"),
        ("(a)+-", 4, "unclear weight"),
        ("a (red:1.3) b", 3, r"write \(words\)1.3"),
        ("a (red:2) b", 3, r"write \(words\)1.3"),
        ("(a red star: 1)", 1, r"write \(words\)1.3"),
        ("(red:-1)", 1, r"write \(words\)1.3"),
        ("(red:.5)++", 1, r"write \(words\)1.3"),
        ("a ((ring)), b", 3, r"write \(words\)1.21"),
        ("(((ring)))", 1, r"write \(words\)1.21"),
        ("((ring):1.3)", 1, r"write \(words\)1.3"),
        ("((a b)(c d)) ((e))", 14, r"write \(words\)1.21"),
        ("a [ring] b", 3, r"write \(words\)0.9"),
        ('("a", "[b]").and()', 8, r"write \(words\)0.9"),
        ("a[ring", 2, r"write \(words\)0.9"),
        ("[a:b:0.5]", 1, "between steps"),
        ("[a|b]", 1, "between steps"),
        ("star <lora:name:0.8>", 6, "fuse it into the checkpoint"),
        ("<LyCO:x>", 1, "fuse it into the checkpoint"),
        ("a BREAK b", 3, r'write \("one part", "another"\)\.and'),
        ("a AND b", 3, r"blend\(1, 1\)"),
        ("(a)101", 1, "above 100"),
        ("((a)50)50", 1, "above 100"),
        ("a" + "+" * 9000, 1, "above 100"),
        ("(a)" + "9" * 400, 1, "above 100"),
        ("(((a)0)" + "9" * 400 + ")2", 1, "above 100"),
        ("(" * 101 + "a" + ")" * 101, 101, "100 parentheses deep"),
        ("a cat.swap(dog)", 6, "not supported"),
        ("(cat).attend(1.3)", 6, r"write \(words\)1.3"),
        ("a withLora(x, 1)", 3, "not supported"),
        ("useLora(x)", 1, "not supported"),
        ('("a", "b").blend(1, 1) c', 23, "must be the whole prompt"),
        ('c ("a", "b").and()', 13, "must be the whole prompt"),
        ("(a, b).blend(1, 1)", 7, "double quotes"),
        ('("a" "b").blend(1, 1)', 10, "must be the whole prompt"),
        ('("a", "b").blend(1, 1', 17, r"end .blend\(\) with \)"),
        ('("a", "b").blend(1)', 17, "1 weights to 2 parts"),
        ('("a", "b").and(1, 1, 1)', 15, "3 weights to 2 parts"),
        ('("a", "b").blend(1, -1)', 17, "sums to 0"),
        ('("a", "b").blend(1, x)', 17, "holds 'x'"),
        ('("a", "b").blend(1,)', 17, "holds ''"),
        ('("a", "b").blend(1, 1e9)', 17, "holds '1e9'"),
        ('("a", "b").blend(1, 101)', 17, "holds '101'"),
        ('("a", "b").and(1, 1, no_normalize)', 15, "holds 'no_normalize'"),
    ],
)
def test_refusals_say_where_and_why(text, character, reason):
    with pytest.raises(RequestError, match=reason) as caught:
        parse(text)
    assert str(caught.value).startswith(f"prompt, character {character}: ")


@settings(deadline=None)
@given(SYNTAX)
def test_any_text_is_read_or_refused_in_one_line(text):
    refusal = None
    try:
        prompt = fragments(text)
    except RequestError as error:
        refusal = str(error)
    if refusal is None:
        assert all(fragment.text and 0 <= fragment.weight <= 100 for fragment in prompt)
    else:
        assert "\n" not in refusal


@settings(deadline=None)
@given(SYNTAX | st.text(max_size=40))
def test_escaped_text_is_itself(text):
    assert fragments(escape(text)) == (plain(text.strip(SPACE)) if text.strip(SPACE) else ())


@settings(deadline=None)
@given(st.text(alphabet=st.characters(exclude_characters='()"+-\\[', exclude_categories=["Cs"]), max_size=40))
def test_text_without_syntax_is_itself(text):
    assert fragments(text) == (plain(text.strip(SPACE)) if text.strip(SPACE) else ())


WORDS = st.text(alphabet='a1 ()"+-\\:.', min_size=1, max_size=6).filter(lambda text: text.strip())
SIGNS = st.sampled_from(["", "+", "++", "-", "---", "0.5", "1.25", "0"])
TREES = st.recursive(
    WORDS, lambda inner: st.tuples(st.sampled_from('("'), st.lists(inner, min_size=1, max_size=3), SIGNS), max_leaves=8
)


def written(tree, quoted=False):
    """The prompt of a tree of (bracket, items, weight); inside quotes, which do not nest, all brackets are round."""
    if isinstance(tree, str):
        return escape(tree)
    bracket, items, weight = tree
    quotes = bracket == '"' and weight and not quoted
    inner = " ".join(written(item, quoted or quotes) for item in items)
    return f'"{inner}"{weight}' if quotes else f"({inner}){weight}"


def leaves(tree, weight=1.0):
    if isinstance(tree, str):
        yield tree, weight
        return
    _, items, signs = tree
    own = {"": 1.0, "+": 1.1, "-": 0.9}.get(signs[:1])
    own = float(signs) if own is None else own ** len(signs) if signs else 1.0
    for item in items:
        yield from leaves(item, weight * own)


@settings(deadline=None)
@given(TREES)
def test_weights_are_the_products_of_their_groups(tree):
    try:
        found = fragments(written(tree))
    except RequestError as error:
        if "raises the weight in other tools" not in str(error):
            raise
        reject()
    expected = list(leaves(tree))
    merged = " ".join(fragment.text for fragment in found).split()
    assert merged == " ".join(text for text, _ in expected).split()
    weights = [fragment.weight for fragment in found for _ in fragment.text.split()]
    assert weights == [pytest.approx(weight) for text, weight in expected for _ in text.split()]
    assert all(math.isfinite(weight) for weight in weights)
