"""Text that lost its characters on the way: how much of it, and which kind. Repairs nothing.

U+FFFD      a decoder gave up                       �
cid         a PDF font without a character map      (cid:12)
private     the same, as private-use characters
control     control characters but tab and line break
utf8_latin  UTF-8 that was read as Latin-1          Ã©, â€™, ä½ å¥½
utf8_gbk    UTF-8 that was read as GBK              浣犲ソ, 锟斤拷, 烫烫烫
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Mangled", "mangled"]

# How cp1252 shows the bytes 0x80-0xBF, the second and later bytes of a character in UTF-8.
_TAIL = "\u0080-\u00bf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ"
_ODD = re.compile(
    r"(?P<replacement>\ufffd+)"
    r"|(?P<cid>\(cid:\d+\))"
    r"|(?P<private>[\ue000-\uf8ff]+)"
    r"|(?P<control>[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x80-\x9f]+)"
    rf"|(?P<utf8_latin>(?:[ÂÃ][{_TAIL}]|[âäåæçèéï][{_TAIL}]{{2}})+)"
    r"|(?P<utf8_gbk>锟斤拷|烫烫烫|屯屯屯|(?:鈥[\u4e00-\u9fff]|锛[\u4e00-\u9fff]|銆[\u4e00-\u9fff€]|鐨[勫刁]|浣犲|鎴戜|鏄[惁剧]|涓€)+)"
)
_SUSPECT = re.compile(r"[\ufffd\ue000-\uf8ff\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9fÂÃâäåæçèéï锟烫屯鈥锛銆鐨浣鎴鏄涓]|\(cid:")


@dataclass(frozen=True, slots=True)
class Mangled:
    """`share` of the characters that are mangled, and how many of each kind."""

    share: float = 0.0
    kinds: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.share:.1%} mangled characters ({', '.join(f'{n} {kind}' for kind, n in self.kinds.items())})"


_NONE = Mangled()


def mangled(text: str) -> Mangled:
    """What of `text` is mangled; the share is of all characters but blanks at the ends."""
    if not _SUSPECT.search(text):
        return _NONE
    kinds: Counter[str] = Counter()
    for found in _ODD.finditer(text):
        kinds[found.lastgroup or ""] += found.end() - found.start()
    if not kinds:
        return _NONE
    return Mangled(share=kinds.total() / max(len(text.strip()), 1), kinds=dict(kinds))
