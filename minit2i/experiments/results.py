"""Print the results as Markdown, from results/*.json.

    python -m minit2i.experiments.results             all of them
    python -m minit2i.experiments.results scenes      some

A result is {"name", "question", "command": [lines], "commit", "hardware", "minutes", "seeds", "columns", "rows":
[[...]], "answer"}: the figures were measured by these commands at that commit.  The tables in README.md beside this
file, and in the READMEs above, are printed here; a test compares.
"""

import json
from pathlib import Path

from minit2i.flags import new_parser
from minit2i.train import run

FOLDER = Path(__file__).parent / "results"


def read_results(*names):
    """-> {name: result}, of the given names or of all; ValueError for an unknown one."""
    known = {path.stem: path for path in sorted(FOLDER.glob("*.json"))}
    for name in names:
        if name not in known:
            raise ValueError(f"there is no result {name!r}; use one of {', '.join(known)}")
    return {name: json.loads(known[name].read_text()) for name in names or known}


def table(result):
    """A result's figures as a Markdown table."""
    lines = [result["columns"], ["---"] * len(result["columns"]), *result["rows"]]
    return "\n".join("| " + " | ".join(str(cell).strip() for cell in line) + " |" for line in lines)


def section(result):
    """A result as Markdown: question, commands, table, answer, and how it was measured."""
    took = f", {result['minutes']:g} minutes" if result["minutes"] else ""
    how = f"{result['hardware']}{took}, {result['seeds']} seed{'s' * (result['seeds'] != 1)}, commit {result['commit']}"
    commands = "\n".join(["```bash", *result["command"], "```"])
    return "\n\n".join(
        [f"## {result['name']}", result["question"], commands, table(result), result["answer"], f"*{how}*"]
    )


def main():
    parser = new_parser(__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="results to print [all]")
    print("\n\n".join(section(result) for result in read_results(*parser.parse_args().names).values()))


if __name__ == "__main__":
    run(main)
