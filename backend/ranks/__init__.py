"""N identical processes that act as one: group.py is the parent's side, rank.py the child's."""
