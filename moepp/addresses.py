"""Addresses without the user and the password in them: these are kept in memory alone, and never written or printed."""

import re

# user:password@, or a token before @; a password may hold what a path begins with, and a port is none.
USER = re.compile(r"""([A-Za-z][\w+.-]*://)(?:[^\s/?#"'<>]*@|[^\s:/@"']*:(?!\d+(?:[/?#\s]|$))[^\s@"']*@)""")
QUERY = re.compile(
    r"""([?&#](?:[\w-]*(?:token|secret|signature|pass(?:word|wd)?|pwd|api[-_]?key)|user(?:name)?|auth|sig|key)=)[^&\s"'#]+""",
    re.I,
)
NAMED = re.compile(
    r"""(?:pass(?:word|wd|phrase)|secret|api_?key|credential|access_?token|auth_?token)\w*["']?\s*[:=]""", re.I
)


def without_user(text: str) -> str:
    """The text with every address in it free of user, password and token."""
    if "://" not in text:
        return text
    return QUERY.sub(r"\1***", USER.sub(r"\1", text))


def is_private(text: str) -> bool:
    """Whether a record's text is its owner's alone: a user was taken out of it, or a value goes by a secret's name."""
    return without_user(text) != text or bool(NAMED.search(text))
