"""Texts of the shape that keys and passwords have. They are shown masked."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from verl.data_tools.check.findings import Finding, Sample


class Shape(NamedTuple):
    """What a secret is, its pattern (of one group at most, which is the secret), and texts of which it has one."""

    name: str
    pattern: str
    marks: tuple[str, ...]


# Prefixes and lengths that their issuers document.
SHAPES = (
    Shape("a private key", r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY(?: BLOCK)?-----[\w+/=\s:,-]{40,}", ("PRIVATE KEY",)),
    Shape("an AWS access key id", r"\b(?:AKIA|ASIA|ABIA|ACCA)[A-Z2-7]{16}\b", ("AKIA", "ASIA", "ABIA", "ACCA")),
    Shape("an AWS secret key", r"(?i:secret.{0,30}?)['\"=:\s]([A-Za-z0-9/+]{40})(?![\w/+=])", ("aws", "AWS", "Aws")),
    Shape("an Anthropic key", r"\bsk-ant-[A-Za-z0-9_-]{30,}", ("sk-ant-",)),
    Shape("an OpenAI key", r"\bsk-(?:(?:proj|svcacct|admin|None)-[\w-]{30,}|\w{20}T3BlbkFJ\w{20})", ("sk-",)),
    Shape("an API key (sk-...)", r"\bsk-(?:or-v1-)?[A-Za-z0-9]{32,}\b", ("sk-",)),
    Shape("a Google API key", r"\bAIza[A-Za-z0-9_-]{35}(?![A-Za-z0-9_-])", ("AIza",)),
    Shape("a GitHub token", r"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{60,})", ("gh", "github_pat_")),
    Shape("a GitLab token", r"\bglpat-[A-Za-z0-9_-]{20,}", ("glpat-",)),
    Shape("a Hugging Face token", r"\bhf_[A-Za-z]{34}\b", ("hf_",)),
    Shape("a Slack token", r"\bxox[abposr]-[A-Za-z0-9-]{20,}", ("xox",)),
    Shape("a Slack webhook", r"https://hooks\.slack\.com/services/T\w+/B\w+/\w{20,}", ("hooks.slack.com",)),
    Shape("a Stripe key", r"\b[sr]k_live_[A-Za-z0-9]{20,}", ("k_live_",)),
    Shape("a SendGrid key", r"\bSG\.[A-Za-z0-9_-]{20,24}\.[A-Za-z0-9_-]{40,}", ("SG.",)),
    Shape("a Twilio key", r"\bSK[0-9a-f]{32}\b", ("SK",)),
    Shape("an npm token", r"\bnpm_[A-Za-z0-9]{36}\b", ("npm_",)),
    Shape("a PyPI token", r"\bpypi-AgEIcHlwaS5vcmc[A-Za-z0-9_-]{50,}", ("pypi-",)),
    Shape("an Alibaba Cloud key id", r"\bLTAI[A-Za-z0-9]{16,26}\b", ("LTAI",)),
    Shape("a Tencent Cloud key id", r"\bAKID[A-Za-z0-9]{32}\b", ("AKID",)),
    Shape("a JSON web token", r"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{20,}", ("eyJ",)),
    Shape("an address with a password", r"://[^\s/:@\"'<>]{1,60}:([^\s/:@\"'<>{}$\[\]]{6,60})@[\w.-]+", ("://",)),
)  # fmt: skip
_PATTERNS = {shape: re.compile(shape.pattern) for shape in SHAPES}
# A placeholder repeats itself, says what it is, or counts.
_PLACEHOLDER = re.compile(
    r"example|your|placeholder|password|secret|xxxx|\.\.\.|1234567|abcdefg|0{8}|\*{4}", re.IGNORECASE
)
_FEWEST_CHARACTERS = 6
# Of a long key: somewhere in it, any short word turns up.
_LOOKED_AT = 100


def secrets_in(text: str) -> Iterator[tuple[str, str]]:
    """What each secret in a text is, with the secret; placeholders of documentation are none."""
    taken: list[tuple[int, int]] = []
    for shape, pattern in _PATTERNS.items():
        # Most texts have none of its marks, which is quickly seen.
        for match in pattern.finditer(text) if any(mark in text for mark in shape.marks) else ():
            secret, span = match[pattern.groups], match.span(pattern.groups)
            if any(span[0] < end and start < span[1] for start, end in taken):
                continue
            body = secret.partition("KEY")[2] if "PRIVATE KEY" in secret else secret
            if len(set(body)) >= _FEWEST_CHARACTERS and not _PLACEHOLDER.search(body[:_LOOKED_AT]):
                taken.append(span)
                yield shape.name, secret


def masked(secret: str) -> str:
    """Its beginning, which says what it is, and its length."""
    first = secret.splitlines()[0]
    shown = first if first.startswith("-----BEGIN") else first[:4]
    return f"{shown}*** ({len(secret)} characters)"


def findings_of_secrets(number: int, sample: Sample) -> Iterator[Finding]:
    """Secrets in the texts of a row; each kind once for prompt and answer."""
    prompt = "\n".join(message["content"] for message in sample.messages)
    for where, text in (("the prompt", prompt), ("the answer", sample.answer)):
        seen = dict(reversed(list(secrets_in(text))))
        yield from (Finding("secret", number, f"{name} in {where}", masked(secret)) for name, secret in seen.items())
