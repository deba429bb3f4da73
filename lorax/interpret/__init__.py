"""Evaluate a traced function on adapted weights: the rule tables, put together."""

from lorax.interpret import control, evaluate, layout, uses

for _table in (layout.RULES, uses.RULES, control.RULES):
    assert not evaluate.RULES.keys() & _table.keys()
    evaluate.RULES.update(_table)
