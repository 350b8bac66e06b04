"""The results' data, and the tables of experiments/README.md made from them."""

from pathlib import Path

import pytest

from minit2i.experiments import results

README = Path(results.__file__).with_name("README.md")
KEYS = {"name", "question", "command", "commit", "hardware", "minutes", "seeds", "columns", "rows", "answer"}


@pytest.mark.parametrize("name", results.read_results())
def test_a_result_is_whole(name):
    result = results.read_results(name)[name]
    assert set(result) == KEYS and result["name"] == name and result["command"]
    assert result["rows"] and all(len(row) == len(result["columns"]) for row in result["rows"])
    assert len(result["commit"]) >= 7 and result["answer"] and result["question"].endswith("?")


def test_a_table_has_a_line_for_each_row():
    lines = results.table({"columns": ["a", "b"], "rows": [["x", 1.5], ["y", ""]]}).splitlines()
    assert lines == ["| a | b |", "| --- | --- |", "| x | 1.5 |", "| y |  |"]


def test_unknown_results_are_refused():
    with pytest.raises(ValueError, match="no result 'nothing'; use one of"):
        results.read_results("nothing")


def test_the_command_prints_some_and_has_help(monkeypatch, capsys):
    for argv, code in ((["x", "--help"], 0), (["x", "--nothing"], 2)):
        monkeypatch.setattr("sys.argv", argv)
        with pytest.raises(SystemExit) as end:
            results.main()
        assert (end.value.code or 0) == code
    assert "NAME" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["x", "muon"])
    results.main()
    assert capsys.readouterr().out.startswith("## muon")


@pytest.mark.skipif(not README.exists(), reason="no README yet")
def test_the_readmes_tables_are_the_data():
    text = README.read_text()
    missing = [name for name, result in results.read_results().items() if results.table(result) not in text]
    assert not missing, f"python -m minit2i.experiments.results {' '.join(missing)} prints what the README should hold"
