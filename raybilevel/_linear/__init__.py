"""Linear systems with a symmetric matrix known by its products, and what one leaves for the next. No Ray."""
