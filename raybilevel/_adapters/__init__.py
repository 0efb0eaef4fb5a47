"""Training frameworks as bilevel problems: what their adapters share."""
