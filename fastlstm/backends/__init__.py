"""The backends, which run layers. docs/design.md lists their functions, and `dispatch` chooses among them."""
