"""Write the output of a command into the page that shows it.

python -m diffoundry.parity > table && python docs/tables.py docs/parity.md table
python -m diffoundry.parity.samplers > table && python docs/tables.py docs/schedulers.md table
python -m diffoundry.bench.serving BUNDLE --json docs/serve-load.json --plot docs/serve-load.png > table && \\
    python docs/tables.py docs/serve.md table
"""

from __future__ import annotations

import re
import sys
from pathlib import Path


def with_table(page: str, table: str) -> str:
    """`page` with `table` in the block, or in place of the table, under its "made by" comment."""
    block = re.compile(r"(<!-- made by: [^\n]* -->\n)(?:(?=\|)(?:\|[^\n]*\n)+|(```\n).*?(?=^```$))", re.M | re.S)
    if len(block.findall(page)) != 1:
        raise SystemExit("the page must have one block or table under a comment `made by`")
    return block.sub(lambda found: found[1] + (found[2] or "") + table.rstrip("\n") + "\n", page)


if __name__ == "__main__":
    target, source = map(Path, sys.argv[1:])
    target.write_text(with_table(target.read_text("utf-8"), source.read_text("utf-8")), "utf-8")
