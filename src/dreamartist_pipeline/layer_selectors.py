r"""The syntax of layer selectors: the name of a module, or 're:' and a regular expression for the beginning of a name.

The prefix 'cls(Name):' filters the modules by class. Example: 're:.*\.attn.?$' selects attn1 and attn2.

Regular expressions are those of RE2, which match in linear time: selectors also come from files of others, and Python's
own engine may take hours for one such as 're:(([a-z_0-9.]+)+)+!'. RE2 has no look-around and no back-references.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import re2

_SYNTAX = re.compile(r"(?:cls\((?P<class>\w+)\):)?(?P<regex>re:)?(?P<name>.*)", re.DOTALL)
_OPTIONS = re2.Options()
_OPTIONS.log_errors = False  # to stderr; they are raised


@dataclass(frozen=True)
class LayerSelector:
    """A parsed selector.

    Attributes:
        name: of a module; not used with a pattern.
        pattern: of RE2, or None.
        class_name: of modules that it selects; None for any.
    """

    name: str
    pattern: Any
    class_name: str | None

    def matches(self, name: str, class_name: str) -> bool:
        """Return whether a module with this name and class is selected."""
        if self.class_name not in (None, class_name):
            return False
        return name == self.name if self.pattern is None else self.pattern.match(name) is not None


def parse_selector(text: str) -> LayerSelector:
    """Parse a selector.

    Raises:
        ValueError: an invalid regular expression.
    """
    match = _SYNTAX.fullmatch(text)
    assert match is not None  # every part is optional
    if not match["regex"]:
        return LayerSelector(match["name"], None, match["class"])
    try:
        return LayerSelector(match["name"], re2.compile(match["name"], _OPTIONS), match["class"])
    except re2.error as error:
        reason = error.args[0].decode() if isinstance(error.args[0], bytes) else str(error)
        raise ValueError(f"layer selector {text!r} is not a regular expression of RE2: {reason}") from error
    except UnicodeEncodeError as error:
        raise ValueError(f"layer selector {text!r} is no valid Unicode") from error
