"""`tinyft bench`: given a budget, which method gives the best model?

grid.py     what is run: tasks, budgets, methods, seeds (pure)
tasks.py    rows to train on, to choose learning rates on, and to score on
store.py    the folder: who works on what, what is finished, the table
runner.py   one unit of work after the other, each run in a process of its own
peers.py    the same job with PEFT and the Hugging Face Trainer, or with plain torch
rows.py     from a run's report to a row of the table
summary.py  means, spreads, fronts, the planner's regret (pure)
charts.py   drawings as SVG; page.py the HTML page; pictures.py the PNGs
command.py  all of it as one function
"""
