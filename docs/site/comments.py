"""Griffe extension: comments behind attributes and parameters are shown: here they hold shapes and units."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from typing import Any

import griffe

_EXPONENT = re.compile(r"\de[-+]?\d")
_PLAIN = (ast.Assign, ast.AnnAssign)
Comments = dict[int, tuple[int, str]]  # line -> column and text


class CommentsAreDocstrings(griffe.Extension):
    """Document what has no docstring by `# ...` on its line, or on the lines right above it."""

    def __init__(self) -> None:
        super().__init__()
        self._files: dict[str, Comments] = {}

    def on_attribute_instance(self, *, node: Any, attr: griffe.Attribute, agent: Any, **_: Any) -> None:
        """Document an attribute of a class or module, or a property on one line; show numbers as written."""
        written = ast.get_source_segment(agent.code, node.value) if getattr(node, "value", None) else None
        if written and "\n" not in written and _EXPONENT.search(written):
            attr.value = written  # otherwise 1e12 is 1000000000000.0
        if attr.docstring is not None or not (isinstance(node, _PLAIN) or node.lineno == node.end_lineno):
            return
        comments = self._comments(agent)
        if text := _behind(comments, node) or _above(comments, node):
            attr.docstring = griffe.Docstring(text, parent=attr)

    def on_function_instance(self, *, node: Any, func: griffe.Function, agent: Any, **_: Any) -> None:
        """Add the comments of parameters to what a docstring says."""
        comments = self._comments(agent)
        arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
        lines = [
            f"* `{argument.arg}`: {text}" for argument in arguments if (text := _behind(comments, argument))
        ]
        if lines:
            said = func.docstring.value if func.docstring else ""
            func.docstring = griffe.Docstring("\n".join((said, "", *lines)), parent=func)

    def _comments(self, agent: Any) -> Comments:
        path = str(agent.filepath)
        if path not in self._files:
            tokens = tokenize.generate_tokens(io.StringIO(agent.code).readline)
            self._files[path] = {
                token.start[0]: (token.start[1], token.string.lstrip("#: "))
                for token in tokens
                if token.type == tokenize.COMMENT and not token.string.startswith(("# noqa", "# type:"))
            }
        return self._files[path]


def _behind(comments: Comments, node: Any) -> str:
    """Return the comments on a node's own lines, which need not hold anything else."""
    on_lines = (comments.get(line, (0, "")) for line in range(node.lineno, node.end_lineno + 1))
    return " ".join(text for column, text in on_lines if column > node.col_offset)


def _above(comments: Comments, node: Any) -> str:
    """Return the block of comments that ends on the line before a node."""
    texts: list[str] = []
    line = node.lineno - 1
    while comments.get(line, (-1, ""))[0] == node.col_offset:
        texts.insert(0, comments[line][1])
        line -= 1
    return " ".join(texts)
