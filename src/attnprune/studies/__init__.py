"""What pruning costs, tried out on copies: ways side by side (``sweep``), layers one by one (``sensitivity``)."""
