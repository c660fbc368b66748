"""The pages of the documentation, and the blocks of code in them."""

import re
from itertools import zip_longest

from programs import ROOT

README = ROOT / "README.md"
PAGES = sorted([README, *(ROOT / "docs").glob("*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block:
    """A block: its first line's number, its language, its text, and the output that is shown directly after it, if any."""

    def __init__(self, page, match, following):
        self.line = page.count("\n", 0, match.start()) + 1
        self.language, self.body = match.groups()
        directly = following and not page[match.end() : following.start()].strip()
        self.output = following[2] if directly and following[1] == "text" else None


def blocks_of(path, *languages):
    """A page's blocks in these languages."""
    page = path.read_text()
    matches = list(FENCE.finditer(page))
    blocks = [Block(page, match, following) for match, following in zip_longest(matches, matches[1:])]
    return [block for block in blocks if block.language in languages]
