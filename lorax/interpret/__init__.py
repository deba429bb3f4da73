"""Evaluate a traced function on adapted weights: the rule tables, put together."""

from lorax.interpret import control, convolution, evaluate, layout, ragged, uses

for _table in (layout.RULES, uses.RULES, convolution.RULES, ragged.RULES, control.RULES):
    assert not evaluate.RULES.keys() & _table.keys()
    evaluate.RULES.update(_table)
evaluate.ENTERED.update(control.ENTERED)
evaluate.CUT.update(control.CUT, layout.CUT, uses.CUT)
