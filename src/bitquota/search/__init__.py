"""From a sensitivity matrix and budgets to the choice that measures best."""
