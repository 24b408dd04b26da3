"""What is printed is what was given: nothing in it is taken for markup."""

from rich.table import Table

from highrank.base.console import console, say

TEXT = "placement [q,v] :x: [bold]r[/bold] [/] [link=x]"


def test_texts_are_printed_as_they_are(capsys, monkeypatch):
    monkeypatch.setattr(console, "_width", 200)
    table = Table(TEXT, title=TEXT, caption=TEXT)
    table.add_row(TEXT)
    console.print(table)
    console.print(TEXT)
    say(TEXT)
    assert capsys.readouterr().out.count(TEXT) == 6
