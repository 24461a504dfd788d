"""Studies: a recipe and its variants, each run from what the recipe's own run can lend it, all judged alike."""
